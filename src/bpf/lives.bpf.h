/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The lives of processes: forks copy descriptor tables, exec closes some of a
 * table, the end of a process all of it; and reconciliation, which user space
 * runs by BPF_PROG_RUN for a process that was marked.
 */
#ifndef LIVES_BPF_H
#define LIVES_BPF_H

/* Bytes in the ring at which reconciliation lets user space take them first. */
const volatile __u32 ring_limit = 0;

/* A table of at most so many descriptors is copied by the fork's own handler. */
#define INLINE_SLOTS 1024

/* Entries to forget. */
struct drop {
	__u32 pid;
	__u32 from; /* the first descriptor */
	__u32 failed;
};

static long drop_entry(void *map, const struct vb_fd_key *key, struct vb_fd *entry,
		       struct drop *drop)
{
	struct vb_fd_key own = *key;
	int err;

	if (own.pid != drop->pid || own.fd < drop->from)
		return 0;
	err = erase(map, &own);
	if (!err)
		count_entry(own.pid, -1);
	else if (err != -ENOENT)
		drop->failed = 1;
	return 0;
}

/* Goes through all of `fds`, which may be large. */
static __always_inline void drop_from(__u32 pid, __u32 from)
{
	struct drop drop = { .pid = pid, .from = from };

	bpf_for_each_map_elem(&fds, drop_entry, &drop, 0);
	if (drop.failed)
		count_loss(VB_LOSS_DELETE_FAILED);
}

static long drop_slot(void *map, const __u32 *index, __u64 *unused, struct walk *walk)
{
	struct vb_fd_key key = { .pid = walk->pid, .fd = walk->next };

	if (walk->next++ > walk->last)
		return 1;
	if (!erase(&fds, &key))
		count_entry(key.pid, -1);
	return 0;
}

/*
 * Forgets a table that is gone; user space is told once and derives the closes.
 * Of a task, by its descriptors, and by all of `fds` only if there are more.
 */
__noinline int drop_table(__u64 address, __u32 pid, __u32 ended)
{
	struct task_struct *task = (struct task_struct *)address;
	struct vb_proc *proc = bpf_map_lookup_elem(&procs, &pid);
	struct walk walk = { .pid = pid };
	struct files_struct *files;
	struct vb_event *e;
	__u32 tid;

	if (!proc)
		return 0;
	files = task ? BPF_CORE_READ(task, files) : NULL;
	if (files && proc->entries) {
		walk.last = table_size(files);
		bpf_for_each_map_elem(&starts, drop_slot, &walk, 0);
	}
	if (proc->entries)
		drop_from(pid, 0);
	if (ended)
		remove_proc(pid);
	tid = task ? tid_of(task) : pid;
	e = reserve();
	if (e) {
		fill_event(e, VB_EVENT_EXIT, tid, pid, 0);
		submit(e);
	}
	return 0;
}

/* Whether there may be descriptors that nobody has been told of yet. */
static __always_inline bool is_sweeping(void)
{
	__u32 zero = 0, *sweep = bpf_map_lookup_elem(&sweeping, &zero);

	return sweep && *sweep;
}

/* After a fork, of a process or of a thread: the child has not run yet. */
static __always_inline int handle_fork(struct task_struct *parent, struct task_struct *child)
{
	struct files_struct *files = BPF_CORE_READ(child, files);
	bool same = BPF_CORE_READ(parent, files) == files;
	__u32 parents = tgid_of(parent), tgid = tgid_of(child);
	struct walk walk = { .task = (__u64)child, .kind = VB_EVENT_INHERIT };

	if (!tgid || !table_of(child))
		return 0;
	if (same) {
		__u32 pid = table_id((__u64)parent, parents);

		/* The ordinary thread. */
		if (parents == tgid && pid == tgid)
			return 0;
		walk.pid = parents == tgid ? tid_of(child) : tgid;
		/*
		 * CLONE_FILES without CLONE_THREAD: two processes with one table;
		 * or a thread of one that has not its process's.
		 */
		note_proc(pid, VB_PROC_SHARED);
		note_proc(walk.pid, VB_PROC_SHARED);
		if (walk.pid != tgid)
			note_proc(tgid, VB_PROC_THREADS);
		mark(walk.pid, VB_MARK_SHARED);
		return 0;
	}
	/*
	 * What another thread of the parent has just opened may be in the copy
	 * before that thread has noted it; without one, the parent is known.
	 */
	if (parents && !find_proc(parents) && threads_of(parent) == 1 &&
	    !is_sweeping())
		return 0;
	walk.pid = tgid;
	if (parents == tgid) {
		/* CLONE_THREAD without CLONE_FILES. */
		walk.pid = tid_of(child);
		note_proc(tgid, VB_PROC_THREADS);
	}
	walk.last = table_size(files) - 1;
	if (walk.last >= INLINE_SLOTS)
		mark_unseen(walk.pid, VB_MARK_FORKED);
	else
		walk_table(&walk);
	return 0;
}

/* After an exec: what was to be closed is closed, all other threads are gone. */
static __always_inline int handle_exec(struct task_struct *task, __u32 old_tid)
{
	__u32 tgid = current_tgid();
	struct vb_proc *proc = find_proc(tgid);
	struct walk walk = { .task = (__u64)task, .pid = tgid, .kind = VB_EVENT_ADOPT };

	if (!proc)
		return 0;
	/*
	 * A thread with a table of its own has become the process. Its number is free,
	 * and may be another's by now.
	 */
	if (!pidns_inum && old_tid != tgid && find_proc(old_tid))
		mark(old_tid, VB_MARK_FOUND);
	walk.last = table_size(BPF_CORE_READ(task, files)) - 1;
	/* The table may be a smaller copy of the one before: then the rest of it. */
	if (!walk_table(&walk) || proc->entries != walk.found)
		mark(tgid, VB_MARK_FOUND);
	return 0;
}

/* At the exit of a thread, which still has its table. */
static __always_inline int handle_thread_exit(struct task_struct *task)
{
	__u32 tgid = current_tgid(), tid, pid;
	struct vb_proc *proc = find_proc(tgid);
	bool last;

	if (!proc)
		return 0;
	/* do_exit() counts the thread out before it fires this tracepoint. */
	last = BPF_CORE_READ(task, signal, live.counter) <= 0;
	if (proc->flags & VB_PROC_THREADS) {
		pid = table_id((__u64)task, tgid);
		tid = tid_of(task);
		if (pid == tid && pid != tgid)
			drop_table((__u64)task, pid, true);
		else if (pid == tid && BPF_CORE_READ(task, files, count.counter) == 1)
			/* The first thread's, while others have theirs. */
			drop_table((__u64)task, pid, false);
		else if (!last)
			mark(tgid, VB_MARK_FOUND);
	}
	if (last)
		drop_table((__u64)task, tgid, true);
	return 0;
}

/* Whether an io_uring operation makes or ends descriptors. */
static __always_inline bool changes_fds(__u8 opcode)
{
	/* linux/io_uring.h; IORING_OP_FIXED_FD_INSTALL came with 6.8 */
	return opcode == IORING_OP_OPENAT || opcode == IORING_OP_OPENAT2 ||
	       opcode == IORING_OP_CLOSE || opcode == IORING_OP_RECVMSG || opcode == 54;
}

/* When io_uring takes an operation: it is done now, or later by another thread. */
static __always_inline int handle_uring_submit(struct io_kiocb *request)
{
	__u32 tgid;

	if (!changes_fds(BPF_CORE_READ(request, opcode)))
		return 0;
	tgid = current_tgid();
	if (tgid && note_proc(tgid, VB_PROC_URING))
		mark(tgid, VB_MARK_URING);
	return 0;
}

/* When an operation is done: which one, older kernels do not tell. */
static __always_inline int handle_uring_complete(void)
{
	__u32 tgid = current_tgid();
	struct vb_proc *proc = find_proc(tgid);

	if (proc && (proc->flags & VB_PROC_URING))
		mark(tgid, VB_MARK_URING);
	return 0;
}

/* The threads of a process, by the tables that they have. */
struct threads {
	__u64 head;
	__u64 node;
	__u64 table; /* the process's: its first thread's, or another's if that has exited */
	__u64 owner; /* that other thread */
	__u32 users; /* threads with the process's table */
	__u32 alone; /* 1: not to be marked */
	__u32 apart; /* 1: there are others. Not a count: the verifier would follow it */
};

static long look_at_thread(void *map, const __u32 *index, __u64 *unused,
			   struct threads *threads)
{
	struct task_struct *task = (struct task_struct *)(threads->node -
		bpf_core_field_offset(struct task_struct, thread_node));
	__u64 files;
	__u32 tid;

	if (!threads->node || threads->node == threads->head)
		return 1;
	threads->node = (__u64)BPF_CORE_READ(task, thread_node.next);
	files = (__u64)table_of(task);
	if (!files || files == threads->table)
		return 0;
	tid = tid_of(task);
	if (!threads->table && !bpf_map_lookup_elem(&procs, &tid)) {
		threads->table = files;
		threads->owner = (__u64)task;
		return 0;
	}
	threads->apart = 1;
	threads->users--;
	if (threads->alone)
		return 0;
	/* For good: without its process's first thread, that is what tells it. */
	note_proc(tid, 0);
	mark(tid, VB_MARK_FOUND);
	return 0;
}

static __always_inline int handle_reconcile(__u32 pid, __u32 from, __u32 kind)
{
	struct task_struct *named = (struct task_struct *)find_task(pid), *task = named;
	struct walk walk = { .pid = pid, .next = from, .kind = kind };
	struct threads threads = {};
	struct files_struct *files;
	struct vb_proc *proc;
	bool process;
	__u32 tgid;

	if (!task) {
		drop_table(0, pid, true);
		if (!find_task(pid))
			return VB_RECONCILE_GONE;
		/*
		 * The number was given away again before that, and what is forked from
		 * who has it is not looked at until it has been.
		 */
		mark(VB_MARK_ALL, VB_MARK_FOUND);
		return 0;
	}
	tgid = tgid_of(task);
	process = tgid == pid;
	files = table_of(task);
	threads.users = process ? threads_of(task) : 1;
	if (process && (!files || (!from && threads.users > 1))) {
		struct signal_struct *signal = BPF_CORE_READ(task, signal);

		threads.head = (__u64)signal + bpf_core_field_offset(struct signal_struct, thread_head);
		threads.node = (__u64)BPF_CORE_READ(signal, thread_head.next);
		threads.table = (__u64)files;
		threads.alone = kind & VB_SYNC_ALONE ? 1 : 0;
		bpf_for_each_map_elem(&starts, look_at_thread, &threads, 0);
		if (threads.apart)
			note_proc(pid, VB_PROC_THREADS);
		if (!files && threads.owner) {
			task = (struct task_struct *)threads.owner;
			files = (struct files_struct *)threads.table;
		}
	} else if (!process && files == BPF_CORE_READ(task, group_leader, files)) {
		/* No table of its own any more. */
		goto gone;
	}
	if (!files)
		goto gone;
	if (!from && BPF_CORE_READ(files, count.counter) > (int)threads.users) {
		/* More users than known: others, or somebody just looks at it. */
		proc = bpf_map_lookup_elem(&procs, &pid);
		if (!proc || !(proc->flags & VB_PROC_SHARED)) {
			note_proc(pid, VB_PROC_SHARED);
			/* Once more: what others did until now they did not mark. */
			mark(pid, VB_MARK_SHARED);
		}
	}
	walk.task = (__u64)task;
	walk.last = table_size(files) - 1;
	walk.ring_limit = ring_limit;
	if (!walk_table(&walk))
		return walk.next;
	proc = bpf_map_lookup_elem(&procs, &pid);
	/* Entries beyond the end of a table that has replaced a larger one. */
	if (proc && (from || proc->entries != walk.found))
		drop_from(pid, walk.last + 1);
	/*
	 * An exec gives a process's number to another of its threads, and a thread's
	 * away, an unshare changes the table, an exit has forgotten all before what
	 * was added here: once more, by what it is now.
	 */
	if (find_task(pid) != (__u64)named || table_of(task) != files)
		return 0;
	return VB_RECONCILE_DONE;
gone:
	drop_table(0, pid, !process || BPF_CORE_READ(task, signal, live.counter) <= 0);
	return VB_RECONCILE_GONE;
}

#endif /* LIVES_BPF_H */
