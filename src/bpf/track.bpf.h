/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The handlers, written once: each takes plain values, so that a further way
 * to attach is a thin wrapper in rclone_bypass.bpf.c.
 *
 * One function decides for every call that makes, replaces or ends a
 * descriptor: sync_fd() looks at what the descriptor is *now*, after the call.
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
#define EEXIST 17

#define START_TIME_BITS 42
#define START_TIME_MASK ((1ULL << START_TIME_BITS) - 1)
/* How often sync_fd() follows a descriptor that other threads keep changing. */
#define SYNC_TRIES 4
/* Scratch buffers tried before an event goes without its path. */
#define SCRATCH_TRIES 4
/* Names that one call of walk_names() writes. */
#define VB_WALK_STEPS 64
/* For sync_fd(): no call made this descriptor, look at what is there. */
#define AS_FOUND 0

const volatile __u32 scratch_count = 4;

/* An anchor: the skeleton generates the types of maps, and of this. */
const struct vb_event anchor_event = {};

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

/* The file behind a descriptor of the current process, or NULL. */
static __always_inline struct file *fd_file(__u32 fd)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct fdtable *fdt = BPF_CORE_READ(task, files, fdt);
	struct file **slots, *file = NULL;

	if (!fdt || fd >= BPF_CORE_READ(fdt, max_fds))
		return NULL;
	slots = BPF_CORE_READ(fdt, fd);
	if (bpf_probe_read_kernel(&file, sizeof(file), &slots[fd]))
		return NULL;
	return file;
}

/* The watched superblock of a file that counts as tracked, or NULL. */
static __always_inline struct super_block *tracked_sb(struct file *file, __u32 *dev)
{
	struct super_block *sb;
	struct inode *inode;
	__u32 mode;

	if (!file)
		return NULL;
	inode = BPF_CORE_READ(file, f_inode);
	sb = BPF_CORE_READ(inode, i_sb);
	*dev = BPF_CORE_READ(sb, s_dev);
	/* The one early exit that every other file on the host takes. */
	if (!bpf_map_lookup_elem(&watched, dev))
		return NULL;
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

static __always_inline void send(void *record, __u32 len)
{
	if (bpf_ringbuf_output(&events, record, len, 0))
		count_loss(VB_LOSS_RING_FULL);
	else
		count_event();
}

/* Sends an event with the file's path; without it where it cannot be had. */
static __always_inline void send_with_path(struct vb_event *e, struct file *file,
					   struct super_block *sb)
{
	int off, slot = take_scratch();
	struct scratch *s = NULL;
	__u32 start;

	if (slot >= 0)
		s = bpf_map_lookup_elem(&scratches, &slot);
	if (!s) {
		count_loss(VB_LOSS_SCRATCH_BUSY);
		send(e, sizeof(*e));
		return;
	}
	off = walk_path(s, slot, file, sb);
	if (off < 0 || off >= VB_PATH_MAX) {
		count_loss(VB_LOSS_PATH_UNREADABLE);
		send(e, sizeof(*e));
		goto release;
	}
	/* The record starts on 8 bytes; the path begins up to 7 bytes behind. */
	start = off & (VB_PATH_MAX - 8);
	e->path_off = sizeof(*e) + off - start;
	e->path_len = VB_PATH_MAX - off;
	if (!bpf_probe_read_kernel(&s->record[start], sizeof(*e), e))
		send(&s->record[start], sizeof(*e) + VB_PATH_MAX - start);
	else
		count_loss(VB_LOSS_PATH_UNREADABLE);
release:
	__sync_lock_test_and_set(&s->busy, 0);
}

static __always_inline void fill_event(struct vb_event *e, __u8 kind, __u64 now, __u32 fd)
{
	__u64 id = bpf_get_current_pid_tgid();

	__builtin_memset(e, 0, sizeof(*e));
	e->kind = kind;
	e->ts = now;
	e->pid = id >> 32;
	e->tid = (__u32)id;
	e->fd = fd;
	if (bpf_get_current_comm(e->comm, sizeof(e->comm)))
		e->comm[0] = 0;
}

/* Notes that the process has a tracked descriptor, for good. */
static __always_inline int note_proc(__u32 pid)
{
	struct vb_proc proc = { .seen = 1 };
	long err;

	if (bpf_map_lookup_elem(&procs, &pid))
		return 0;
	err = bpf_map_update_elem(&procs, &pid, &proc, BPF_NOEXIST);
	return err && err != -EEXIST ? -1 : 0;
}

static __always_inline void send_close(const struct vb_fd_key *key, __u64 opened_at,
				       __u64 ino, __u32 dev)
{
	struct vb_event e;

	fill_event(&e, VB_EVENT_CLOSE, bpf_ktime_get_boot_ns(), key->fd);
	e.opened_at = opened_at;
	e.ino = ino;
	e.dev = dev;
	send(&e, sizeof(e));
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

static __always_inline void track(const struct vb_fd_key *key, struct file *file,
				  struct super_block *sb, __u32 dev, __u8 kind, __u64 open_ns)
{
	struct vb_fd entry = {}, *old;
	struct vb_event e;
	struct inode *inode;
	long err;

	inode = BPF_CORE_READ(file, f_inode);
	old = bpf_map_lookup_elem(&fds, key);
	/* An open is always a new one, should its close not have been seen. */
	if (kind != VB_EVENT_OPEN && is_of(old, file, inode, dev))
		return;
	/* First the process: from then on its closes are looked at. */
	if (note_proc(key->pid)) {
		count_loss(VB_LOSS_PROCS_FULL);
		return;
	}
	fill_event(&e, kind == AS_FOUND ? VB_EVENT_OPEN : kind, bpf_ktime_get_boot_ns(),
		   key->fd);
	e.opened_at = e.ts;
	e.ino = BPF_CORE_READ(inode, i_ino);
	e.size = BPF_CORE_READ(inode, i_size);
	e.flags = BPF_CORE_READ(file, f_flags);
	e.dev = dev;
	e.open_ns = open_ns;

	entry.opened_at = e.opened_at;
	entry.file = (__u64)file;
	entry.ino = e.ino;
	entry.size = e.size;
	entry.open_ns = open_ns;
	entry.dev = dev;
	entry.flags = e.flags;
	__builtin_memcpy(entry.comm, e.comm, sizeof(entry.comm));

	err = old ? -EEXIST : bpf_map_update_elem(&fds, key, &entry, BPF_NOEXIST);
	if (err == -EEXIST) {
		/* Of a close that was not seen, or by a thread that was faster. */
		old = bpf_map_lookup_elem(&fds, key);
		if (kind != VB_EVENT_OPEN && is_of(old, file, inode, dev))
			return;
		if (old)
			send_close(key, old->opened_at, old->ino, old->dev);
		err = bpf_map_update_elem(&fds, key, &entry, BPF_ANY);
	}
	if (err) {
		count_loss(VB_LOSS_FDS_FULL);
		return;
	}
	send_with_path(&e, file, sb);
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
	if (bpf_map_delete_elem(&fds, key))
		return;
	send_close(key, opened_at, ino, dev);
}

/*
 * Makes the entry of a descriptor agree with the process's descriptor table,
 * after a call that made it (kind OPEN or DUP) or ended it (AS_FOUND).
 *
 * Two threads can race: A closes the descriptor and reads NULL here, B opens
 * the same number and inserts, A deletes B's entry. So: write, read again,
 * repeat until what was written is what is there.
 */
static __always_inline void sync_fd(__u32 fd, __u8 kind, __u64 open_ns)
{
	struct vb_fd_key key = {
		.pid = bpf_get_current_pid_tgid() >> 32,
		.fd = fd,
	};
	struct file *file = fd_file(fd), *now;

	for (int i = 0; i < SYNC_TRIES; i++) {
		struct super_block *sb;
		__u32 dev = 0;

		sb = tracked_sb(file, &dev);
		if (sb)
			track(&key, file, sb, dev, kind, open_ns);
		else
			untrack(&key);
		now = fd_file(fd);
		if (now == file)
			return;
		file = now;
		kind = AS_FOUND;
		open_ns = 0;
	}
	count_loss(VB_LOSS_UNSTABLE);
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

/* Nanoseconds since this thread's handle_enter_open(), 0 when it was not seen. */
static __always_inline __u64 open_duration(void)
{
	__u32 tid = (__u32)bpf_get_current_pid_tgid();
	__u32 slot = tid % START_SLOTS;
	__u64 *start = bpf_map_lookup_elem(&starts, &slot);

	if (!start || *start >> START_TIME_BITS != tid) {
		count_loss(VB_LOSS_OPEN_UNTIMED);
		return 0;
	}
	return (bpf_ktime_get_boot_ns() - *start) & START_TIME_MASK;
}

/* Whether the current process has, or had, a tracked descriptor. */
static __always_inline bool is_tracked_proc(void)
{
	__u32 pid = bpf_get_current_pid_tgid() >> 32;

	return bpf_map_lookup_elem(&procs, &pid) != NULL;
}

/* After a call that returned a new descriptor, or an error below zero. */
static __always_inline int handle_new_fd(long ret, __u8 kind)
{
	struct file *file;
	__u32 dev = 0;

	if (ret < 0)
		return 0;
	file = fd_file(ret);
	if (tracked_sb(file, &dev))
		sync_fd(ret, kind, kind == VB_EVENT_OPEN ? open_duration() : 0);
	else if (is_tracked_proc())
		/* It may stand where a close was not seen, or a dup2() replaced. */
		sync_fd(ret, AS_FOUND, 0);
	return 0;
}

static __always_inline int handle_enter_close(__u32 fd)
{
	__u64 id = bpf_get_current_pid_tgid();
	__u32 tid = (__u32)id;

	/* Not only a tracked descriptor: it may become one before the close. */
	if (!is_tracked_proc())
		return 0;
	if (bpf_map_update_elem(&closing, &tid, &fd, BPF_ANY))
		count_loss(VB_LOSS_CLOSE_UNSEEN);
	return 0;
}

static __always_inline int handle_exit_close(void)
{
	__u32 tid = (__u32)bpf_get_current_pid_tgid();
	__u32 *closed = bpf_map_lookup_elem(&closing, &tid);
	__u32 fd;

	if (!closed)
		return 0;
	fd = *closed;
	bpf_map_delete_elem(&closing, &tid);
	/* close() frees the descriptor even where it returns an error. */
	sync_fd(fd, AS_FOUND, 0);
	return 0;
}

struct drop {
	__u32 pid;
	__u32 failed;
};

static long drop_entry(void *map, const struct vb_fd_key *key, struct vb_fd *entry,
		       struct drop *drop)
{
	struct vb_fd_key own = *key;

	if (own.pid == drop->pid && bpf_map_delete_elem(map, &own))
		drop->failed = 1;
	return 0;
}

/*
 * At the exit of a thread. With the last of a process all its descriptors go;
 * user space is told once and derives the closes.
 */
static __always_inline int handle_thread_exit(void)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u64 id = bpf_get_current_pid_tgid();
	__u32 pid = id >> 32, tid = (__u32)id;
	struct drop drop = { .pid = pid };
	struct vb_event e;

	if (!is_tracked_proc())
		return 0;
	/* A thread killed inside close() never reaches its exit. */
	bpf_map_delete_elem(&closing, &tid);
	/* do_exit() counts the thread out before it fires this tracepoint. */
	if (BPF_CORE_READ(task, signal, live.counter) > 0)
		return 0;
	bpf_for_each_map_elem(&fds, drop_entry, &drop, 0);
	if (drop.failed)
		count_loss(VB_LOSS_DELETE_FAILED);
	bpf_map_delete_elem(&procs, &pid);
	fill_event(&e, VB_EVENT_EXIT, bpf_ktime_get_boot_ns(), 0);
	send(&e, sizeof(e));
	return 0;
}

#endif /* TRACK_BPF_H */
