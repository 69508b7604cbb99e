/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Tasks, their numbers in the tracker's pid namespace, and their descriptor
 * tables. Tasks other than the current one are addresses, read by
 * bpf_probe_read_kernel(), which survives any address.
 */
#ifndef TASK_BPF_H
#define TASK_BPF_H

/* linux/pid_types.h */
#define PIDTYPE_TGID_INDEX 1
/* linux/sched.h */
#define PF_EXITING 0x00000004
#define PF_IO_WORKER 0x00000010
#define PF_KTHREAD 0x00200000
/* lib/xarray.c: at least 4 bits a level */
#define XA_HEIGHT_MAX 16
/* Pid namespaces nest 32 deep (linux/pid_namespace.h: MAX_PID_NS_LEVEL). */
#define PIDNS_LEVEL_MAX 32

/* The inode number of the tracker's pid namespace; 0: it is the host's. */
const volatile __u32 pidns_inum = 0;

/* A pid's number at a level of nesting. */
static __always_inline struct upid *upid_at(struct pid *pid, __u32 level)
{
	return (struct upid *)((void *)pid + bpf_core_field_offset(struct pid, numbers) +
			       level * bpf_core_type_size(struct upid));
}

/* A pid's number in the tracker's namespace; 0: it has none there. */
static __always_inline __u32 pid_number(struct pid *pid)
{
	__u32 deepest = pid ? BPF_CORE_READ(pid, level) : 0;

	for (__u32 level = 1; pid && level <= PIDNS_LEVEL_MAX && level <= deepest; level++) {
		struct upid *upid = upid_at(pid, level);

		if (BPF_CORE_READ(upid, ns, ns.inum) == pidns_inum)
			return BPF_CORE_READ(upid, nr);
	}
	return 0;
}

static __always_inline __u32 tgid_of(struct task_struct *task)
{
	if (!pidns_inum)
		return BPF_CORE_READ(task, tgid);
	return pid_number(BPF_CORE_READ(task, signal, pids[PIDTYPE_TGID_INDEX]));
}

static __always_inline __u32 tid_of(struct task_struct *task)
{
	if (!pidns_inum)
		return BPF_CORE_READ(task, pid);
	return pid_number(BPF_CORE_READ(task, thread_pid));
}

/* The current task's, which is at hand where the namespace is the host's. */
static __always_inline __u32 current_tgid(void)
{
	if (!pidns_inum)
		return bpf_get_current_pid_tgid() >> 32;
	return tgid_of((struct task_struct *)bpf_get_current_task());
}

static __always_inline __u32 current_tid(void)
{
	if (!pidns_inum)
		return (__u32)bpf_get_current_pid_tgid();
	return tid_of((struct task_struct *)bpf_get_current_task());
}

/*
 * The task with a number in the current task's pid namespace, or 0: idr_find()
 * by hand (lib/radix-tree.c), under RCU as every program.
 *
 * This and other functions are global: verified once, and not in every caller.
 * Such a function takes and returns numbers alone.
 */
__noinline __u64 find_task(__u32 nr)
{
	struct task_struct *current = (struct task_struct *)bpf_get_current_task();
	struct pid *own = BPF_CORE_READ(current, thread_pid);
	__u32 bits = bpf_core_field_size(((struct xa_node *)0)->slots) == 64 * 8 ? 6 : 4;
	struct upid *upid;
	struct hlist_node *first;
	__u64 entry;

	if (!own)
		return 0;
	upid = upid_at(own, BPF_CORE_READ(own, level));
	entry = (__u64)BPF_CORE_READ(upid, ns, idr.idr_rt.xa_head);
	for (int i = 0; i < XA_HEIGHT_MAX; i++) {
		struct xa_node *node;
		__u32 shift;

		/* xa_is_node(), linux/xarray.h */
		if ((entry & 3) != 2 || entry < 4096)
			break;
		node = (struct xa_node *)(entry - 2);
		shift = BPF_CORE_READ(node, shift) & 63;
		/* Only the topmost node can be too small for a number. */
		if (!i && (__u64)nr >> shift >> bits)
			return 0;
		if (bpf_probe_read_kernel(&entry, sizeof(entry),
					  (void *)node + bpf_core_field_offset(struct xa_node, slots) +
						  (((__u64)nr >> shift) & ((1 << bits) - 1)) * 8))
			return 0;
	}
	if (!entry || (entry & 3))
		return 0;
	first = BPF_CORE_READ((struct pid *)entry, tasks[0].first);
	if (!first)
		return 0;
	return (__u64)first - bpf_core_field_offset(struct task_struct, pid_links);
}

/* What a process calls itself: its number in its own namespace. */
__noinline __u32 own_pid_of(__u64 task)
{
	struct pid *pid = BPF_CORE_READ((struct task_struct *)task, signal,
					pids[PIDTYPE_TGID_INDEX]);
	struct upid *deepest;

	if (!pid)
		return 0;
	deepest = upid_at(pid, BPF_CORE_READ(pid, level));
	return BPF_CORE_READ(deepest, nr);
}

/*
 * From 6.2 on (kernel commit a35b9af4ec2c): an address as one of the kernel's
 * types, to be read by plain loads, which a fault makes 0. A call to read each
 * member costs every open on the host more.
 */
extern void *bpf_rdonly_cast(const void *address, __u32 btf_id) __ksym __weak;

/* A pointer in the kernel's memory; NULL where it cannot be read. */
static __always_inline void *load_pointer(void *at)
{
	void *pointer = NULL;

	/* A type that begins with a pointer: there is none for a pointer alone. */
	if (bpf_ksym_exists(bpf_rdonly_cast))
		return ((struct list_head *)bpf_rdonly_cast(
				at, bpf_core_type_id_kernel(struct list_head)))->next;
	if (bpf_probe_read_kernel(&pointer, sizeof(pointer), at))
		return NULL;
	return pointer;
}

/* The file behind a descriptor of a table, or NULL. */
static __always_inline struct file *fd_file(struct files_struct *files, __u32 fd)
{
	struct fdtable *fdt = BPF_CORE_READ(files, fdt);
	struct file **slots, *file = NULL;

	if (!fdt || fd >= BPF_CORE_READ(fdt, max_fds))
		return NULL;
	slots = BPF_CORE_READ(fdt, fd);
	if (bpf_probe_read_kernel(&file, sizeof(file), &slots[fd]))
		return NULL;
	return file;
}

/*
 * A task's descriptor table. One that exits keeps it for a while, such as until
 * its memory is freed (from 6.16 on), but its entries were forgotten at the start
 * of that. One that works for io_uring has that of the thread it works for.
 */
static __always_inline struct files_struct *table_of(struct task_struct *task)
{
	if (BPF_CORE_READ(task, flags) & (PF_EXITING | PF_IO_WORKER | PF_KTHREAD))
		return NULL;
	return BPF_CORE_READ(task, files);
}

/* Descriptors that a table has room for. */
static __always_inline __u32 table_size(struct files_struct *files)
{
	return BPF_CORE_READ(files, fdt, max_fds);
}

/* Threads of a process that have not begun to exit. */
static __always_inline int threads_of(struct task_struct *task)
{
	return BPF_CORE_READ(task, signal, nr_threads);
}

#endif /* TASK_BPF_H */
