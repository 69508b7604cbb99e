/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The system calls that make, copy or end descriptors: which there are, by
 * number, and what is looked at after each. The ways to attach differ in how
 * they come to handle_exit() alone.
 */
#ifndef CALLS_BPF_H
#define CALLS_BPF_H

/* fcntl(2), close_range(2), unshare(2), net(7) and seccomp(2), linux uapi */
#define F_DUPFD 0
#define F_DUPFD_CLOEXEC 1030
#define CLOSE_RANGE_UNSHARE 2
#define CLOSE_RANGE_CLOEXEC 4
#define CLONE_FILES 0x400
#define SOL_SOCKET 1
#define SCM_RIGHTS 1
#define SYS_RECVMSG 17
#define SYS_RECVMMSG 19
#define SECCOMP_IOCTL_NOTIF_ADDFD 0x40182103
#define SECCOMP_ADDFD_FLAG_SEND 2

/* Control messages looked at in one message, and notifications of one filter. */
#define CMSGS_MAX 8
#define NOTIFICATIONS_MAX 64

enum call {
	CALL_NONE,
	CALL_OPEN,
	CALL_DUP,
	CALL_FCNTL,
	CALL_GETFD,
	CALL_CLOSE,
	CALL_CLOSE_RANGE,
	CALL_RECVMSG,
	CALL_RECVMMSG,
	CALL_UNSHARE,
	CALL_IOCTL,
	CALL_SOCKETCALL, /* the old 32-bit way to recvmsg(2) */
	CALL_READ,       /* counted where that is asked for */
};

#define CALLS 512

/* The calls of 64-bit programs, and of 32-bit ones on the same kernel. */
#if defined(__TARGET_ARCH_x86)
/* arch/x86/entry/syscalls/syscall_64.tbl, syscall_32.tbl */
const volatile __u8 native_calls[CALLS] = {
	[2] = CALL_OPEN,     [85] = CALL_OPEN,	  [257] = CALL_OPEN,	 [304] = CALL_OPEN,
	[437] = CALL_OPEN,   [32] = CALL_DUP,	  [33] = CALL_DUP,	 [292] = CALL_DUP,
	[72] = CALL_FCNTL,   [438] = CALL_GETFD,  [3] = CALL_CLOSE,	 [436] = CALL_CLOSE_RANGE,
	[47] = CALL_RECVMSG, [299] = CALL_RECVMMSG, [272] = CALL_UNSHARE, [16] = CALL_IOCTL,
	[0] = CALL_READ,     [17] = CALL_READ,	  [19] = CALL_READ,	 [295] = CALL_READ,
	[327] = CALL_READ,
};
const volatile __u8 compat_calls[CALLS] = {
	[5] = CALL_OPEN,      [8] = CALL_OPEN,	     [295] = CALL_OPEN,	   [342] = CALL_OPEN,
	[437] = CALL_OPEN,    [41] = CALL_DUP,	     [63] = CALL_DUP,	   [330] = CALL_DUP,
	[55] = CALL_FCNTL,    [221] = CALL_FCNTL,    [438] = CALL_GETFD,   [6] = CALL_CLOSE,
	[436] = CALL_CLOSE_RANGE, [372] = CALL_RECVMSG, [337] = CALL_RECVMMSG, [417] = CALL_RECVMMSG,
	[310] = CALL_UNSHARE, [54] = CALL_IOCTL,     [102] = CALL_SOCKETCALL,
	[3] = CALL_READ,      [180] = CALL_READ,     [145] = CALL_READ,	   [333] = CALL_READ,
	[378] = CALL_READ,
};
#elif defined(__TARGET_ARCH_arm64)
/* include/uapi/asm-generic/unistd.h, arch/arm64/tools/syscall_32.tbl */
const volatile __u8 native_calls[CALLS] = {
	[56] = CALL_OPEN,     [265] = CALL_OPEN,     [437] = CALL_OPEN,	  [23] = CALL_DUP,
	[24] = CALL_DUP,      [25] = CALL_FCNTL,     [438] = CALL_GETFD,  [57] = CALL_CLOSE,
	[436] = CALL_CLOSE_RANGE, [212] = CALL_RECVMSG, [243] = CALL_RECVMMSG, [97] = CALL_UNSHARE,
	[29] = CALL_IOCTL,    [63] = CALL_READ,	     [67] = CALL_READ,	  [65] = CALL_READ,
	[69] = CALL_READ,     [286] = CALL_READ,
};
const volatile __u8 compat_calls[CALLS] = {
	[5] = CALL_OPEN,      [8] = CALL_OPEN,	     [322] = CALL_OPEN,	  [371] = CALL_OPEN,
	[437] = CALL_OPEN,    [41] = CALL_DUP,	     [63] = CALL_DUP,	  [358] = CALL_DUP,
	[55] = CALL_FCNTL,    [221] = CALL_FCNTL,    [438] = CALL_GETFD,  [6] = CALL_CLOSE,
	[436] = CALL_CLOSE_RANGE, [297] = CALL_RECVMSG, [365] = CALL_RECVMMSG, [417] = CALL_RECVMMSG,
	[337] = CALL_UNSHARE, [54] = CALL_IOCTL,     [102] = CALL_SOCKETCALL,
	[3] = CALL_READ,      [180] = CALL_READ,     [145] = CALL_READ,	   [361] = CALL_READ,
	[392] = CALL_READ,
};
#else
#error "no table of system calls for this architecture"
#endif

/* Whether reads are counted, too. */
const volatile __u8 account_reads = 0;

/* Whether a call's end is looked at. */
static __always_inline bool is_followed(__u8 kind)
{
	return kind && (account_reads || kind != CALL_READ);
}

/* The registers that the current system call began with. */
static __always_inline struct pt_regs *own_regs(void)
{
	return (struct pt_regs *)bpf_task_pt_regs(bpf_get_current_task_btf());
}

/* A system call that returned. */
struct called {
	long ret;
	bool compat; /* of a 32-bit program */
};

/* A call's argument, counted from 0; only the first three are needed. */
static __always_inline __u64 argument(const struct called *call, int index)
{
	/* Not before: most calls' arguments are never asked for. */
	struct pt_regs *regs = own_regs();

#if defined(__TARGET_ARCH_x86)
	if (call->compat)
		return (__u32)(index == 0 ? BPF_CORE_READ(regs, bx) :
			       index == 1 ? BPF_CORE_READ(regs, cx) :
					    BPF_CORE_READ(regs, dx));
#endif
	return index == 0 ? PT_REGS_PARM1_CORE_SYSCALL(regs) :
	       index == 1 ? PT_REGS_PARM2_CORE_SYSCALL(regs) :
			    PT_REGS_PARM3_CORE_SYSCALL(regs);
}

static __always_inline int handle_enter_open(void)
{
	__u32 tid = (__u32)bpf_get_current_pid_tgid();
	__u32 slot = tid % START_SLOTS;
	__u64 *start = bpf_map_lookup_elem(&starts, &slot);

	if (start)
		*start = (__u64)tid << START_TIME_BITS |
			 (bpf_ktime_get_boot_ns() & START_TIME_MASK);
	return 0;
}

/* When this thread's open call began, modulo 2^42; NULL: that was not seen. */
static __always_inline __u64 *open_start(void)
{
	__u32 tid = (__u32)bpf_get_current_pid_tgid();
	__u32 slot = tid % START_SLOTS;
	__u64 *start = bpf_map_lookup_elem(&starts, &slot);

	return start && *start >> START_TIME_BITS == tid ? start : NULL;
}

/* Nanoseconds since this thread's handle_enter_open(), 0 when it was not seen. */
static __always_inline __u64 open_duration(void)
{
	__u64 *start = open_start();

	if (!start) {
		count_loss(VB_LOSS_OPEN_UNTIMED);
		return 0;
	}
	return (bpf_ktime_get_boot_ns() - *start) & START_TIME_MASK;
}

/* The current task's descriptor, by the fewest reads: every open on the host pays. */
static __always_inline struct file *own_file(__u32 fd)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct fdtable *fdt = task->files->fdt;

	return fd < fdt->max_fds ? load_pointer(&fdt->fd[fd]) : NULL;
}

/* The current task's table, noted if it is a thread's own; 0: not to be seen. */
static __always_inline __u32 current_table(void)
{
	__u32 tgid = current_tgid(), pid;

	if (!tgid)
		return 0;
	pid = table_id(bpf_get_current_task(), tgid);
	if (pid != tgid)
		note_proc(tgid, VB_PROC_THREADS);
	return pid;
}

/*
 * sync_fd() after a call. Whoever shares the table is looked at, too: not only
 * when an entry changes, for what one has closed another may have opened.
 */
static __always_inline void follow_fd(__u64 task, __u32 pid, __u32 fd, __u32 kind, __u64 open_ns)
{
	struct vb_proc *proc;

	sync_fd(task, pid, fd, kind, open_ns);
	proc = bpf_map_lookup_elem(&procs, &pid);
	if (proc && (proc->flags & VB_PROC_SHARED))
		mark(pid, VB_MARK_SHARED);
}

/* After a call that returned a new descriptor. */
static __always_inline void handle_new_fd(__u32 fd, __u32 kind)
{
	__u64 task = bpf_get_current_task();
	__u32 pid, dev = 0;

	if (tracked_sb(own_file(fd), &dev)) {
		pid = current_table();
		if (!pid)
			return;
		follow_fd(task, pid, fd, kind,
			  (kind & VB_SYNC_KIND) == VB_EVENT_OPEN ? open_duration() : 0);
		return;
	}
	pid = tracked_table();
	/* It may stand where a close was not seen, or a dup2() replaced. */
	if (pid)
		follow_fd(task, pid, fd, VB_EVENT_ADOPT, 0);
}

static __always_inline void handle_close(const struct called *call)
{
	__u32 pid = tracked_table();

	/* close() frees the descriptor even where it returns an error. */
	if (pid)
		follow_fd(bpf_get_current_task(), pid, argument(call, 0), VB_EVENT_ADOPT, 0);
}

/* After unshare(2) or the like: threads may have tables of their own now. */
static __always_inline void handle_unshared(void)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u32 tgid = current_tgid();

	if (tgid && threads_of(task) > 1)
		mark(tgid, VB_MARK_FOUND);
}

static __always_inline void handle_close_range(const struct called *call)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u32 flags = argument(call, 2), first = argument(call, 0), last = argument(call, 1);
	struct walk walk = { .task = (__u64)task, .kind = VB_EVENT_ADOPT };
	struct vb_proc *proc;
	__u32 size;

	if (call->ret)
		return;
	if (flags & CLOSE_RANGE_UNSHARE)
		handle_unshared();
	if (flags & CLOSE_RANGE_CLOEXEC)
		return;
	walk.pid = tracked_table();
	if (!walk.pid)
		return;
	/* The copy may end before the last of its entries. */
	if (flags & CLOSE_RANGE_UNSHARE)
		mark(walk.pid, VB_MARK_FOUND);
	size = table_size(BPF_CORE_READ(task, files));
	walk.next = first;
	walk.last = last < size ? last : size - 1;
	proc = bpf_map_lookup_elem(&procs, &walk.pid);
	if (proc && (proc->flags & VB_PROC_SHARED))
		mark(walk.pid, VB_MARK_SHARED);
	if (!walk_table(&walk))
		mark(walk.pid, VB_MARK_FOUND);
}

/* Descriptors in a control message. */
struct passed {
	__u64 from; /* user space's address of the next */
	__u64 task;
	__u32 pid;
	__u32 left;
};

static long take_passed(void *map, const __u32 *index, __u64 *unused, struct passed *passed)
{
	__u32 fd;

	if (!passed->left--)
		return 1;
	if (bpf_probe_read_user(&fd, sizeof(fd), (void *)passed->from))
		return 1;
	passed->from += sizeof(fd);
	follow_fd(passed->task, passed->pid, fd, VB_EVENT_RECEIVE, 0);
	return 0;
}

/*
 * Finds descriptors in what a message brought, SCM_RIGHTS of unix(7): where
 * they begin, and how many; none: 0.
 */
static __always_inline __u32 find_passed(const struct user_msghdr *message, __u64 *from)
{
	struct user_msghdr header;
	__u64 at, end;

	if (bpf_probe_read_user(&header, sizeof(header), message))
		return 0;
	/* The kernel has set it to what there is. */
	at = (__u64)header.msg_control;
	end = at + header.msg_controllen;
	for (int i = 0; i < CMSGS_MAX; i++) {
		struct cmsghdr control;

		if (at + sizeof(control) > end ||
		    bpf_probe_read_user(&control, sizeof(control), (void *)at) ||
		    control.cmsg_len < sizeof(control))
			return 0;
		if (control.cmsg_level == SOL_SOCKET && control.cmsg_type == SCM_RIGHTS) {
			*from = at + sizeof(control);
			return (control.cmsg_len - sizeof(control)) / sizeof(__u32);
		}
		at += (control.cmsg_len + 7) & ~7ULL;
	}
	return 0;
}

static __always_inline void handle_recvmsg(const struct called *call)
{
	struct passed passed = {};

	/* Descriptors may have come before a write to the header failed. */
	if (call->ret < 0 && call->ret != -EFAULT)
		return;
	if (call->compat || call->ret < 0) {
		mark_unseen(current_tgid(), VB_MARK_FOUND);
		return;
	}
	passed.left = find_passed((const struct user_msghdr *)argument(call, 1), &passed.from);
	if (!passed.left)
		return;
	passed.task = bpf_get_current_task();
	passed.pid = current_table();
	if (passed.pid)
		bpf_for_each_map_elem(&starts, take_passed, &passed, 0);
}

/* Messages of recvmmsg(2). */
struct messages {
	__u64 from;
	__u32 left;
};

static long look_for_passed(void *map, const __u32 *index, __u64 *unused,
			    struct messages *messages)
{
	__u64 from;

	if (!messages->left--)
		return 1;
	if (find_passed((const struct user_msghdr *)messages->from, &from)) {
		mark_unseen(current_tgid(), VB_MARK_FOUND);
		return 1;
	}
	messages->from += sizeof(struct mmsghdr);
	return 0;
}

static __always_inline void handle_recvmmsg(const struct called *call)
{
	struct messages messages = { .left = call->ret };

	if (call->ret <= 0 && call->ret != -EFAULT)
		return;
	if (call->compat || call->ret < 0) {
		mark_unseen(current_tgid(), VB_MARK_FOUND);
		return;
	}
	messages.from = argument(call, 1);
	bpf_for_each_map_elem(&starts, look_for_passed, &messages, 0);
}

/*
 * After a seccomp(2) supervisor put a descriptor into another process. With
 * SECCOMP_ADDFD_FLAG_SEND that process's own call returns it, which may be any
 * call, and it may have left the list.
 */
static __always_inline void handle_addfd(const struct called *call)
{
	struct seccomp_notif_addfd addfd;
	struct seccomp_filter *filter;
	struct list_head *head, *at;
	__u32 dev = 0;
	bool sent;

	if (bpf_probe_read_user(&addfd, sizeof(addfd), (void *)argument(call, 2)))
		goto unknown;
	sent = addfd.flags & SECCOMP_ADDFD_FLAG_SEND;
	if (sent && !tracked_sb(own_file(addfd.srcfd), &dev))
		return;
	if (!bpf_core_type_exists(struct seccomp_knotif))
		goto unknown;
	filter = BPF_CORE_READ(own_file(argument(call, 0)), private_data);
	head = (void *)BPF_CORE_READ(filter, notif) +
	       bpf_core_field_offset(struct notification, notifications);
	at = BPF_CORE_READ(head, next);
	for (int i = 0; i < NOTIFICATIONS_MAX && at != head; i++) {
		struct seccomp_knotif *notif =
			(void *)at - bpf_core_field_offset(struct seccomp_knotif, list);
		struct task_struct *task;
		__u32 tgid, pid;

		if (BPF_CORE_READ(notif, id) == addfd.id) {
			task = BPF_CORE_READ(notif, task);
			tgid = tgid_of(task);
			if (!tgid)
				return;
			pid = table_id((__u64)task, tgid);
			if (!sent)
				follow_fd((__u64)task, pid, call->ret, VB_EVENT_RECEIVE, 0);
			/* It may have been killed, and be gone already. */
			if (sent || !table_of(task))
				mark_unseen(pid, VB_MARK_FOUND);
			return;
		}
		at = BPF_CORE_READ(at, next);
	}
unknown:
	/* Whose it is cannot be told: all are reconciled. */
	mark(VB_MARK_ALL, VB_MARK_FOUND);
}

/*
 * When the kernel puts a file into the current task's table, for whatever
 * reason: marks what no exit of a call above will tell of, such as an open
 * that was under way when the tracker attached.
 */
static __always_inline int handle_install(struct file *file, enum call kind)
{
	__u32 tgid, dev = 0;

	if ((kind == CALL_OPEN && open_start()) || kind == CALL_DUP || kind == CALL_FCNTL ||
	    kind == CALL_GETFD || kind == CALL_RECVMSG || !tracked_sb(file, &dev))
		return 0;
	tgid = current_tgid();
	if (tgid)
		mark_unseen(table_id(bpf_get_current_task(), tgid), VB_MARK_FOUND);
	return 0;
}

/* After one of the calls above. */
static __always_inline int handle_exit(enum call kind, const struct called *call)
{
	switch (kind) {
	case CALL_OPEN:
		if (call->ret >= 0)
			handle_new_fd(call->ret, VB_EVENT_OPEN | VB_SYNC_NEW);
		break;
	case CALL_FCNTL: {
		__u32 command = argument(call, 1);

		if (command != F_DUPFD && command != F_DUPFD_CLOEXEC)
			break;
	}
		/* fallthrough */
	case CALL_DUP:
		if (call->ret >= 0)
			handle_new_fd(call->ret, VB_EVENT_DUP);
		break;
	case CALL_GETFD:
		if (call->ret >= 0)
			handle_new_fd(call->ret, VB_EVENT_RECEIVE);
		break;
	case CALL_CLOSE:
		handle_close(call);
		break;
	case CALL_CLOSE_RANGE:
		handle_close_range(call);
		break;
	case CALL_RECVMSG:
		handle_recvmsg(call);
		break;
	case CALL_RECVMMSG:
		handle_recvmmsg(call);
		break;
	case CALL_UNSHARE:
		if (!call->ret && (argument(call, 0) & CLONE_FILES))
			handle_unshared();
		break;
	case CALL_IOCTL:
		if (call->ret >= 0 && (__u32)argument(call, 1) == SECCOMP_IOCTL_NOTIF_ADDFD)
			handle_addfd(call);
		break;
	case CALL_SOCKETCALL: {
		__u32 which = argument(call, 0);

		if (call->ret >= 0 && (which == SYS_RECVMSG || which == SYS_RECVMMSG))
			mark_unseen(current_tgid(), VB_MARK_FOUND);
		break;
	}
	default:
		break;
	}
	return 0;
}

#endif /* CALLS_BPF_H */
