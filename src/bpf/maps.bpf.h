/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The maps. Sizes marked "set at load" come from the tracker's options. */
#ifndef MAPS_BPF_H
#define MAPS_BPF_H

/* Slots of `starts`: a power of two, so that a thread id masks to a slot. */
#define START_SLOTS 65536
/* Slots of `proc_slots`: a power of two. */
#define PROC_SLOTS 16384

/*
 * A scratch buffer: the record of an event with its path, built from the end.
 * Shared by all programs on all CPUs and taken by an atomic exchange, since
 * some attach modes run programs preemptibly, where a per-CPU buffer could be
 * written by two at once.
 */
struct scratch {
	__u32 busy;
	__u32 off;    /* the walk: where the path starts so far */
	__u64 dentry; /* the walk: next to write */
	__u64 root;   /* the walk: where it ends */
	struct vb_event event;
	/*
	 * Twice VB_PATH_MAX: the verifier bounds the record's start and its
	 * length apart, not their sum.
	 */
	__u8 record[sizeof(struct vb_event) + 2 * VB_PATH_MAX];
};

/*
 * Superblocks to track, by device; the value numbers the mounts that are, and were,
 * watched. User space alone writes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u32);
	__type(value, __u32);
} watched SEC(".maps");

/*
 * 1: a device of this VB_DEV_SLOT() may be watched; 0: none is. What every open on
 * the host asks first, for less than a look into a hash map. User space alone
 * writes, before a device is watched and after it was.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, VB_DEV_SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} watched_slots SEC(".maps");

/* The tracked descriptors: set at load. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct vb_fd_key);
	__type(value, struct vb_fd);
} fds SEC(".maps");

/* Processes that have had a tracked descriptor, by pid: set at load. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct vb_proc);
} procs SEC(".maps");

/*
 * How many of `procs` there are of a pid modulo the slots: 0 means none, which is
 * all that most opens and closes on the host have to ask.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PROC_SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} proc_slots SEC(".maps");

/*
 * Processes to reconcile, and why (VB_MARK_). Kernel and user space write;
 * user space is told by an event of the first mark alone.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, __u32);
} marks SEC(".maps");

/*
 * When each thread's open call began, as tid << 42 | time in ns modulo 2^42
 * (73 minutes). One plain 8-byte store, because every open on the host pays
 * it; where two threads share a slot the later one wins and the other's
 * open_ns is unknown, which is counted. Also what bpf_for_each_map_elem() counts
 * on for loops: bpf_loop() came with 5.17.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, START_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} starts SEC(".maps");

/* Scratch buffers: set at load, twice the CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

/* Events to user space, struct vb_event and a path each: set at load, bytes. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 * 1024 * 1024);
} events SEC(".maps");

/* Paths of tracked descriptors in chunks, for `dump-map`; user space alone writes. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct vb_path_key);
	__type(value, struct vb_path);
} paths SEC(".maps");

/* A read that is under way. */
struct reading {
	__u64 start; /* 0: none is */
	__u64 ino;
	__u64 size;
	__u32 dev;
	__u32 mount;
	__u32 pid;
	__u32 tid;
};

/* What each thread reads, by its number. Set at load: 1 where reads are not counted. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct reading);
} readings SEC(".maps");

/* Reads by process and clip; old ones make room for new ones. Set at load, likewise. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct vb_account_key);
	__type(value, struct vb_account);
} accounts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct vb_reads);
} reads SEC(".maps");

/*
 * Where clips are that were open once: as `paths`, by (pid 0, fd: mount, opened_at:
 * inode). User space alone writes. Set at load, likewise.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct vb_path_key);
	__type(value, struct vb_path);
} clips SEC(".maps");

/* 1: not every process has been looked at yet. User space alone writes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} sweeping SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct vb_meta);
} meta SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct vb_stats);
} stats SEC(".maps");

#endif /* MAPS_BPF_H */
