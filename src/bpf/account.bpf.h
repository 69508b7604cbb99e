/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What reads through tracked descriptors cost: `run --account`. By read(2), pread(2),
 * readv(2), preadv(2) and preadv2(2) alone; maps, splices and io_uring are not seen.
 *
 * A read is counted for the file that its descriptor was of when it began, so that
 * another thread's close or dup2() changes nothing.
 */
#ifndef ACCOUNT_BPF_H
#define ACCOUNT_BPF_H

/* The entry of a descriptor of the current task's table, if it is tracked. */
static __always_inline struct vb_fd *read_from(__u32 pid, const struct called *call)
{
	struct vb_fd_key key = { .pid = pid, .fd = argument(call, 0) };

	return bpf_map_lookup_elem(&fds, &key);
}

static __always_inline int handle_enter_read(const struct called *call)
{
	__u32 tid = (__u32)bpf_get_current_pid_tgid(), pid = tracked_table();
	struct reading *reading, new = {};
	struct vb_fd *entry;
	__u32 dev, *mount;

	if (!pid)
		return 0;
	entry = read_from(pid, call);
	reading = bpf_map_lookup_elem(&readings, &tid);
	if (!entry) {
		/* Of a read whose end was not seen. */
		if (reading)
			reading->start = 0;
		return 0;
	}
	if (!reading) {
		/* Where that fails, the end counts what is not known of its start. */
		insert(&readings, &tid, &new, BPF_NOEXIST);
		reading = bpf_map_lookup_elem(&readings, &tid);
	}
	if (!reading)
		return 0;
	dev = entry->dev;
	mount = bpf_map_lookup_elem(&watched, &dev);
	/* Unmounted just now. */
	if (!mount)
		return 0;
	reading->ino = entry->ino;
	reading->size = entry->size;
	reading->dev = dev;
	reading->mount = *mount;
	reading->pid = pid;
	reading->tid = tid;
	reading->start = bpf_ktime_get_boot_ns();
	return 0;
}

/* The account of a process and a clip, made if there is none. */
static __always_inline struct vb_account *account_of(const struct vb_account_key *key, __u32 dev)
{
	struct vb_account *found = bpf_map_lookup_elem(&accounts, key);
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct vb_account new = {};
	struct vb_reads *all;
	__u32 zero = 0;

	if (found)
		return found;
	new.dev = dev;
	/* The process's name: threads have their own. */
	if (BPF_CORE_READ_STR_INTO(&new.comm, task, group_leader, comm) < 0)
		new.comm[0] = 0;
	all = bpf_map_lookup_elem(&reads, &zero);
	/* Another thread may be faster. */
	if (!insert(&accounts, key, &new, BPF_NOEXIST) && all)
		__sync_fetch_and_add(&all->accounts, 1);
	return bpf_map_lookup_elem(&accounts, key);
}

static __always_inline int handle_exit_read(const struct called *call)
{
	__u32 tid = (__u32)bpf_get_current_pid_tgid(), pid = tracked_table(), zero = 0;
	struct vb_account_key key = {};
	struct vb_account *account;
	struct reading *reading;
	struct vb_reads *all;
	__u64 bytes, ns;

	if (!pid)
		return 0;
	reading = bpf_map_lookup_elem(&readings, &tid);
	/* Another's: its place was taken just now, as the least used one. */
	if (!reading || !reading->start || reading->tid != tid) {
		/* It was under way when tracking began, or no room was found for it. */
		if (read_from(pid, call))
			count_loss(VB_LOSS_READ_UNCOUNTED);
		return 0;
	}
	ns = bpf_ktime_get_boot_ns() - reading->start;
	bytes = call->ret > 0 ? call->ret : 0;
	reading->start = 0;
	key.ino = reading->ino;
	key.mount = reading->mount;
	key.pid = reading->pid;
	account = account_of(&key, reading->dev);
	all = bpf_map_lookup_elem(&reads, &zero);
	if (!account || !all) {
		count_loss(VB_LOSS_READ_UNCOUNTED);
		return 0;
	}
	account->size = reading->size;
	__sync_fetch_and_add(&account->reads, 1);
	__sync_fetch_and_add(&account->bytes, bytes);
	__sync_fetch_and_add(&account->ns, ns);
	__sync_fetch_and_add(&all->reads, 1);
	__sync_fetch_and_add(&all->bytes, bytes);
	__sync_fetch_and_add(&all->ns, ns);
	return 0;
}

#endif /* ACCOUNT_BPF_H */
