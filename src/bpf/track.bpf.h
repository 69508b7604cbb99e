/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Keeps `fds` as the kernel's descriptor tables are. One function decides for
 * every call that makes, replaces or ends a descriptor, and for reconciliation:
 * sync_fd() looks at what the descriptor is *now*, after the call.
 */
#ifndef TRACK_BPF_H
#define TRACK_BPF_H

/* linux/magic.h */
#define FUSE_SUPER_MAGIC 0x65735546
/* linux/fs.h; FMODE_PATH has been 0x4000 since 3.x (1abf0c718f15) */
#define FMODE_READ 0x1
#define FMODE_WRITE 0x2
#define FMODE_PATH 0x4000
/* linux/stat.h */
#define S_IFMT 00170000
#define S_IFREG 0100000
/* asm-generic/errno-base.h */
#define ENOENT 2
#define EFAULT 14
#define EEXIST 17

#define START_TIME_BITS 42
#define START_TIME_MASK ((1ULL << START_TIME_BITS) - 1)
/* How often sync_fd() follows a descriptor that other threads keep changing. */
#define SYNC_TRIES 4
/* Scratch buffers tried before an event goes without its path. */
#define SCRATCH_TRIES 4
/* Names that one call of walk_names() writes. */
#define VB_WALK_STEPS 64

const volatile __u32 scratch_count = 4;

/* Anchors: the skeleton generates the types of maps, and of these. */
const struct vb_event anchor_event = {};
const struct vb_reconcile anchor_reconcile = {};

/*
 * Errors of a map's operations are ints: before 6.4 (kernel commit d7ba4cc900bf)
 * they were returned so, and a long's upper half was not set: -EEXIST was none.
 */
static __always_inline int insert(void *map, const void *key, const void *value, __u64 flags)
{
	return (int)bpf_map_update_elem(map, key, value, flags);
}

static __always_inline int erase(void *map, const void *key)
{
	return (int)bpf_map_delete_elem(map, key);
}

static __always_inline void count_loss(enum vb_loss cause)
{
	struct vb_stats *s;
	__u32 zero = 0;

	s = bpf_map_lookup_elem(&stats, &zero);
	if (s && cause < VB_LOSS_MAX)
		__sync_fetch_and_add(&s->losses[cause], 1);
}

static __always_inline void count_event(void)
{
	struct vb_stats *s;
	__u32 zero = 0;

	s = bpf_map_lookup_elem(&stats, &zero);
	if (s)
		__sync_fetch_and_add(&s->events, 1);
}

/* Whether a device is watched. */
static __always_inline bool is_watched(__u32 dev)
{
	__u32 slot = VB_DEV_SLOT(dev), *there = bpf_map_lookup_elem(&watched_slots, &slot);

	/* The one early exit that every other file on the host takes. */
	return there && *there && bpf_map_lookup_elem(&watched, &dev);
}

/* The device of a file's superblock. */
static __always_inline __u32 dev_of(struct file *file)
{
	if (bpf_ksym_exists(bpf_rdonly_cast)) {
		file = bpf_rdonly_cast(file, bpf_core_type_id_kernel(struct file));
		return file->f_inode->i_sb->s_dev;
	}
	return BPF_CORE_READ(file, f_inode, i_sb, s_dev);
}

/* The watched superblock of a file that counts as tracked, or NULL. */
static __always_inline struct super_block *tracked_sb(struct file *file, __u32 *dev)
{
	struct super_block *sb;
	struct inode *inode;
	__u32 mode;

	if (!file)
		return NULL;
	*dev = dev_of(file);
	if (!is_watched(*dev))
		return NULL;
	inode = BPF_CORE_READ(file, f_inode);
	sb = BPF_CORE_READ(inode, i_sb);
	/* A device number is reused after an unmount: other types never match. */
	if (BPF_CORE_READ(sb, s_magic) != FUSE_SUPER_MAGIC)
		return NULL;
	if ((BPF_CORE_READ(inode, i_mode) & S_IFMT) != S_IFREG)
		return NULL;
	mode = (__u32)BPF_CORE_READ(file, f_mode);
	if ((mode & FMODE_PATH) || !(mode & (FMODE_READ | FMODE_WRITE)))
		return NULL;
	return sb;
}

/* Takes a scratch buffer; its slot, or negative where none is free. */
static __always_inline int take_scratch(void)
{
	__u32 first = bpf_get_smp_processor_id();
	struct scratch *s;

	for (__u32 i = 0; i < SCRATCH_TRIES; i++) {
		__u32 slot = (first + i) % scratch_count;

		s = bpf_map_lookup_elem(&scratches, &slot);
		if (s && !__sync_lock_test_and_set(&s->busy, 1))
			return slot;
	}
	return -1;
}

/*
 * Writes the next VB_WALK_STEPS names towards the root, from the buffer's end
 * to its start. 1: the root is reached, 0: call again, negative: unreadable.
 *
 * A global function, verified once by itself and with few steps: unrolled to
 * 2,048 steps in each caller, the same walk took the verifier minutes.
 */
__noinline int walk_names(__u32 slot)
{
	struct scratch *s = bpf_map_lookup_elem(&scratches, &slot);
	struct dentry *root, *dentry;
	__s64 off;

	if (!s)
		return -1;
	root = (struct dentry *)s->root;
	dentry = (struct dentry *)s->dentry;
	off = s->off;
	for (int i = 0; i < VB_WALK_STEPS; i++) {
		const unsigned char *name;
		__s64 len;

		if (dentry == root)
			return 1;
		len = BPF_CORE_READ(dentry, d_name.len);
		name = BPF_CORE_READ(dentry, d_name.name);
		if (len < 1 || len >= VB_NAME_SPAN || len + 1 > off)
			return -1;
		off -= len + 1;
		s->record[sizeof(struct vb_event) + (off & (VB_PATH_MAX - 1))] = '/';
		if (bpf_probe_read_kernel(&s->record[sizeof(struct vb_event) +
						     ((off + 1) & (VB_PATH_MAX - 1))],
					  len & (VB_NAME_SPAN - 1), name))
			return -1;
		dentry = BPF_CORE_READ(dentry, d_parent);
		s->dentry = (__u64)dentry;
		s->off = off;
	}
	return 0;
}

/*
 * Writes the path from the superblock's root to the file, without a leading
 * slash, so that it ends at record[sizeof(event) + VB_PATH_MAX]. Returns where
 * it starts, relative to record[sizeof(event)]; negative: unreadable.
 */
static __always_inline int walk_path(struct scratch *s, __u32 slot, struct file *file,
				     struct super_block *sb)
{
	int done = 0;

	s->root = (__u64)BPF_CORE_READ(sb, s_root);
	s->dentry = (__u64)BPF_CORE_READ(file, f_path.dentry);
	s->off = VB_PATH_MAX;
	/* The root is one step beyond the deepest path. */
	for (int i = 0; i <= VB_DEPTH_MAX / VB_WALK_STEPS && !done; i++)
		done = walk_names(slot);
	return done == 1 && s->off < VB_PATH_MAX ? s->off + 1 : -1;
}

/*
 * A record for an event without a path, in the ring itself: on the stack of 512
 * bytes that all callers share there is no room for it. NULL: no room in the ring.
 */
static __always_inline struct vb_event *reserve(void)
{
	struct vb_event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e)
		count_loss(VB_LOSS_RING_FULL);
	return e;
}

static __always_inline void submit(struct vb_event *e)
{
	bpf_ringbuf_submit(e, 0);
	count_event();
}

static __always_inline void fill_event(struct vb_event *e, __u8 kind, __u32 tid, __u32 pid,
				       __u32 fd)
{
	__builtin_memset(e, 0, sizeof(*e));
	e->kind = kind;
	e->ts = bpf_ktime_get_boot_ns();
	e->pid = pid;
	e->tid = tid;
	e->fd = fd;
}

/* What an entry says of itself. */
static __always_inline void fill_entry(struct vb_event *e, const struct vb_fd *entry)
{
	e->opened_at = entry->opened_at;
	e->ino = entry->ino;
	e->size = entry->size;
	e->open_ns = entry->open_ns;
	e->dev = entry->dev;
	e->flags = entry->flags;
	e->own_pid = entry->own_pid;
	e->mnt_id = entry->mnt_id;
	__builtin_memcpy(e->comm, entry->comm, sizeof(e->comm));
}

/*
 * Tells of an entry, with its file's path; without where that cannot be had.
 * Like sync_fd(), a global function whose task is an address.
 */
__noinline int tell(__u64 address, __u32 pid, __u32 fd, __u32 kind)
{
	struct task_struct *task = (struct task_struct *)address;
	struct vb_fd_key key = { .pid = pid, .fd = fd };
	struct vb_fd *entry = bpf_map_lookup_elem(&fds, &key);
	int off, slot = take_scratch();
	__u32 tid = tid_of(task);
	struct scratch *s = NULL;
	struct super_block *sb;
	struct vb_event *e;
	struct file *file;
	__u32 start;

	if (slot >= 0)
		s = bpf_map_lookup_elem(&scratches, &slot);
	/* Gone again already: who saw that has told, of what user space never had. */
	if (!entry)
		goto release;
	if (!s) {
		count_loss(VB_LOSS_SCRATCH_BUSY);
		goto pathless;
	}
	file = (struct file *)entry->file;
	sb = BPF_CORE_READ(file, f_inode, i_sb);
	off = walk_path(s, slot, file, sb);
	if (off < 0 || off >= VB_PATH_MAX) {
		count_loss(VB_LOSS_PATH_UNREADABLE);
		goto pathless;
	}
	e = &s->event;
	fill_event(e, kind, tid, pid, fd);
	fill_entry(e, entry);
	/* The record starts on 8 bytes; the path begins up to 7 bytes behind. */
	start = off & (VB_PATH_MAX - 8);
	e->path_off = sizeof(*e) + off - start;
	e->path_len = VB_PATH_MAX - off;
	if (bpf_probe_read_kernel(&s->record[start], sizeof(*e), e)) {
		count_loss(VB_LOSS_PATH_UNREADABLE);
		goto pathless;
	}
	if (bpf_ringbuf_output(&events, &s->record[start], sizeof(*e) + VB_PATH_MAX - start, 0))
		count_loss(VB_LOSS_RING_FULL);
	else
		count_event();
	goto release;
pathless:
	e = reserve();
	if (e) {
		fill_event(e, kind, tid, pid, fd);
		fill_entry(e, entry);
		submit(e);
	}
release:
	if (s)
		__sync_lock_test_and_set(&s->busy, 0);
	return 0;
}

/* Has user space reconcile a process, or VB_MARK_ALL. */
__noinline int mark(__u32 pid, __u32 why)
{
	struct vb_event *e;
	int err;

	for (int i = 0; i < SYNC_TRIES; i++) {
		__u32 *marked = bpf_map_lookup_elem(&marks, &pid);

		if (!marked) {
			err = insert(&marks, &pid, &why, BPF_NOEXIST);
			if (err == -EEXIST)
				continue;
			goto new;
		}
		__sync_fetch_and_or(marked, why);
		/* If it was taken just before, that was written to nothing. */
		marked = bpf_map_lookup_elem(&marks, &pid);
		if (marked && (*marked & why) == why)
			return 0;
	}
	err = -1;
new:
	if (err) {
		count_loss(VB_LOSS_MARKS_FULL);
		return 0;
	}
	e = reserve();
	if (e) {
		fill_event(e, VB_EVENT_MARK, pid, pid, 0);
		submit(e);
	}
	return 0;
}

/* Counts what no event will tell of, and has it made good. */
static __always_inline void lose(enum vb_loss cause)
{
	count_loss(cause);
	mark(VB_MARK_ALL, VB_MARK_FOUND);
}

/* What `proc_slots` counts of a pid. */
static __always_inline __u32 *proc_slot(__u32 pid)
{
	__u32 slot = pid % PROC_SLOTS;

	return bpf_map_lookup_elem(&proc_slots, &slot);
}

/* A process that has, or had, a tracked descriptor; or NULL. */
static __always_inline struct vb_proc *find_proc(__u32 pid)
{
	__u32 *count = proc_slot(pid);

	return count && *count ? bpf_map_lookup_elem(&procs, &pid) : NULL;
}

/* Adds a process to `procs`, unless it is there. */
static __always_inline void add_proc(__u32 pid, const struct vb_proc *proc)
{
	__u32 *count = proc_slot(pid);

	/* First: who finds no count looks no further. */
	if (count)
		__sync_fetch_and_add(count, 1);
	/* Another thread may be faster, which is as well. */
	if (insert(&procs, &pid, proc, BPF_NOEXIST) && count)
		__sync_fetch_and_add(count, -1);
}

static __always_inline void remove_proc(__u32 pid)
{
	__u32 *count = proc_slot(pid);

	if (!erase(&procs, &pid) && count)
		__sync_fetch_and_add(count, -1);
}

/*
 * Notes that a process has a tracked descriptor, or something else, for good.
 * Returns whether there was room for that.
 */
__noinline int note_proc(__u32 pid, __u64 flags)
{
	struct vb_proc *proc = bpf_map_lookup_elem(&procs, &pid);
	struct vb_proc new = { .flags = flags };

	if (!proc) {
		add_proc(pid, &new);
		proc = bpf_map_lookup_elem(&procs, &pid);
	}
	if (!proc) {
		lose(VB_LOSS_PROCS_FULL);
		return 0;
	}
	if ((proc->flags & flags) != flags)
		__sync_fetch_and_or(&proc->flags, flags);
	return 1;
}

/*
 * Has user space reconcile a table whose descriptors nobody has looked at. It is
 * noted at once, so that what is forked from it until then is looked at, too.
 */
static __always_inline void mark_unseen(__u32 pid, __u32 why)
{
	note_proc(pid, 0);
	mark(pid, why);
}

/*
 * The name of a task's descriptor table: its process, or the thread itself
 * where it does not have the table of the process's first thread.
 */
__noinline __u32 table_id(__u64 address, __u32 tgid)
{
	struct task_struct *task = (struct task_struct *)address;
	struct files_struct *files = BPF_CORE_READ(task, files);
	struct files_struct *leaders = BPF_CORE_READ(task, group_leader, files);
	__u32 tid;

	if (files == leaders)
		return tgid;
	tid = tid_of(task);
	/* A first thread that has exited has none: the others keep the process's. */
	if (!leaders && !bpf_map_lookup_elem(&procs, &tid))
		return tgid;
	return tid;
}

/* The current task's table, if its process has, or had, tracked descriptors; or 0. */
static __always_inline __u32 tracked_table(void)
{
	__u32 tgid = current_tgid();
	struct vb_proc *proc = find_proc(tgid);

	if (!proc)
		return 0;
	if (!(proc->flags & VB_PROC_THREADS))
		return tgid;
	return table_id(bpf_get_current_task(), tgid);
}

/* After an entry came or went, or was replaced. */
__noinline int count_entry(__u32 pid, __s64 change)
{
	struct vb_proc *proc = bpf_map_lookup_elem(&procs, &pid);

	if (!proc)
		return 0;
	__sync_fetch_and_add(&proc->entries, change);
	if (proc->flags & VB_PROC_SHARED)
		mark(pid, VB_MARK_SHARED);
	return 0;
}

/* Tells that an entry is gone. Global, for the stack's sake, as agree() is. */
__noinline int tell_close(__u64 opened_at, __u64 ino, __u32 dev, __u32 pid, __u32 fd)
{
	/* Whose call it was; not the one that reconciles. */
	__u32 tid = current_tgid() == pid ? current_tid() : pid;
	struct vb_event *e = reserve();

	if (!e)
		return 0;
	fill_event(e, VB_EVENT_CLOSE, tid, pid, fd);
	e->opened_at = opened_at;
	e->ino = ino;
	e->dev = dev;
	submit(e);
	return 0;
}

/*
 * Whether an entry is of this very file: seen already by another thread, which
 * sends the one event of it, or a dup2() onto itself. The inode counts, too: a
 * struct file's address is used again at once after a close that was not seen.
 */
static __always_inline bool is_of(const struct vb_fd *entry, const struct file *file,
				  const struct inode *inode, __u32 dev)
{
	return entry && entry->file == (__u64)file && entry->dev == dev &&
	       entry->ino == BPF_CORE_READ(inode, i_ino);
}

static __always_inline __u32 mount_of(struct file *file)
{
	struct vfsmount *mnt = BPF_CORE_READ(file, f_path.mnt);

	return BPF_CORE_READ((struct mount *)((void *)mnt - bpf_core_field_offset(struct mount, mnt)),
			     mnt_id);
}

/* Returns whether user space is to be told. */
static __always_inline bool track(struct task_struct *task, const struct vb_fd_key *key,
				  struct file *file, __u32 dev, __u32 kind, __u64 open_ns)
{
	struct vb_fd entry = {}, *old;
	struct inode *inode;
	int err;

	/*
	 * First the process: from then on its closes are looked at. Of what is
	 * known, too: a pid that was given away again may have lost its mark.
	 */
	if (!note_proc(key->pid, 0))
		return false;
	inode = BPF_CORE_READ(file, f_inode);
	old = bpf_map_lookup_elem(&fds, key);
	if (!(kind & VB_SYNC_NEW) && is_of(old, file, inode, dev))
		return kind & VB_SYNC_RESEND;
	entry.opened_at = bpf_ktime_get_boot_ns();
	entry.file = (__u64)file;
	entry.ino = BPF_CORE_READ(inode, i_ino);
	entry.size = BPF_CORE_READ(inode, i_size);
	entry.open_ns = open_ns;
	entry.dev = dev;
	entry.flags = BPF_CORE_READ(file, f_flags);
	entry.own_pid = own_pid_of((__u64)task);
	entry.mnt_id = mount_of(file);
	if (bpf_core_read_str(entry.comm, sizeof(entry.comm), &task->comm) < 0)
		entry.comm[0] = 0;

	err = insert(&fds, key, &entry, BPF_NOEXIST);
	if (err == -EEXIST) {
		/* Of a close that was not seen, or by a thread that was faster. */
		old = bpf_map_lookup_elem(&fds, key);
		if (!(kind & VB_SYNC_NEW) && is_of(old, file, inode, dev))
			return false;
		if (old)
			tell_close(old->opened_at, old->ino, old->dev, key->pid, key->fd);
		err = insert(&fds, key, &entry, BPF_EXIST);
		/* Gone meanwhile: who looks at it next puts it right. */
		if (err == -ENOENT)
			return false;
		count_entry(key->pid, 0);
	} else if (!err) {
		count_entry(key->pid, 1);
	}
	if (err)
		lose(VB_LOSS_FDS_FULL);
	return !err;
}

static __always_inline void untrack(const struct vb_fd_key *key)
{
	struct vb_fd *entry = bpf_map_lookup_elem(&fds, key);
	__u64 opened_at, ino;
	__u32 dev;

	if (!entry)
		return;
	opened_at = entry->opened_at;
	ino = entry->ino;
	dev = entry->dev;
	/* Gone already: another thread was faster, and has told. */
	if (erase(&fds, key))
		return;
	count_entry(key->pid, -1);
	tell_close(opened_at, ino, dev, key->pid, key->fd);
}

/* fd_file() and tracked_sb() as global functions, for the stack's sake. */
__noinline __u64 file_of(__u64 files, __u32 fd)
{
	return (__u64)fd_file((struct files_struct *)files, fd);
}

/* The device of a file that counts as tracked, or 0, which no FUSE mount has. */
__noinline __u32 tracked_dev(__u64 file)
{
	__u32 dev = 0;

	return tracked_sb((struct file *)file, &dev) ? dev : 0;
}

/* What agree() did: */
#define AGREE_TRACKED 1 /* the descriptor is tracked now */
#define AGREE_TELL 2    /* user space is to be told */

/*
 * Makes the entry of a descriptor agree with its table.
 *
 * Two threads can race: A closes the descriptor and reads NULL here, B opens
 * the same number and inserts, A deletes B's entry. So: write, read again,
 * repeat until what was written is what is there.
 *
 * A global function, verified once by itself; the task is an address.
 */
__noinline int agree(__u64 task, __u32 pid, __u32 fd, __u32 kind, __u64 open_ns)
{
	__u64 files = (__u64)BPF_CORE_READ((struct task_struct *)task, files);
	struct vb_fd_key key = { .pid = pid, .fd = fd };
	__u64 file = file_of(files, fd), now;
	int done = 0;

	/* Not unrolled, for the stack's sake. */
#pragma clang loop unroll(disable)
	for (int i = 0; i < SYNC_TRIES; i++) {
		__u32 dev = tracked_dev(file);

		if (!dev) {
			untrack(&key);
			done = 0;
		} else {
			done |= AGREE_TRACKED;
			if (track((struct task_struct *)task, &key, (struct file *)file, dev, kind,
				  open_ns))
				done |= AGREE_TELL;
		}
		now = file_of(files, fd);
		if (now == file)
			return done;
		file = now;
		kind = VB_EVENT_ADOPT;
		open_ns = 0;
	}
	count_loss(VB_LOSS_UNSTABLE);
	mark(pid, VB_MARK_FOUND);
	return done;
}

/*
 * After a call that made or ended a descriptor, or for reconciliation: makes
 * its entry agree with its table and tells of it. Returns whether it is tracked.
 */
static __always_inline bool sync_fd(__u64 task, __u32 pid, __u32 fd, __u32 kind, __u64 open_ns)
{
	int done = agree(task, pid, fd, kind, open_ns);

	/* One after the other: together they would not fit on the stack. */
	if (done & AGREE_TELL)
		tell(task, pid, fd, kind & VB_SYNC_KIND);
	return done & AGREE_TRACKED;
}

/* A part of a table to go through. */
struct walk {
	__u64 task;
	__u32 pid;
	__u32 next; /* where it has come to */
	__u32 last;
	__u32 kind;
	__u32 found;      /* descriptors that are tracked */
	__u32 ring_limit; /* stop when so many bytes wait in the ring; 0: never */
};

static long walk_slot(void *map, const __u32 *index, __u64 *unused, struct walk *walk)
{
	if (walk->next > walk->last)
		return 1;
	if (walk->ring_limit &&
	    bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > walk->ring_limit)
		return 1;
	walk->found += sync_fd(walk->task, walk->pid, walk->next, walk->kind, 0);
	walk->next++;
	return 0;
}

/* Calls sync_fd() for START_SLOTS descriptors at most; whether that was all. */
static __always_inline bool walk_table(struct walk *walk)
{
	bpf_for_each_map_elem(&starts, walk_slot, walk, 0);
	return walk->next > walk->last;
}

#endif /* TRACK_BPF_H */
