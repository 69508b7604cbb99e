/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The ABI between the BPF programs and user space: map keys, map values and
 * ring buffer records. Fixed widths, widest members first, padding explicit.
 * Sizes are asserted here and again in src/tracker/abi.rs.
 *
 * "pid" is the kernel's tgid and "tid" the kernel's pid, both as seen from the
 * initial pid namespace. Times are nanoseconds of CLOCK_BOOTTIME. "dev" is the
 * kernel's own encoding of a superblock's device, major << 20 | minor.
 */
#ifndef RCLONE_BYPASS_H
#define RCLONE_BYPASS_H

/* Bumped at every change of a layout below; `dump-map` refuses another one. */
#define VB_ABI_VERSION 1

#define VB_COMM_LEN 16
/* PATH_MAX of linux/limits.h: a path has up to 4,095 bytes and no NUL here. */
#define VB_PATH_MAX 4096
/* NAME_MAX of linux/limits.h, plus one: a power of two that masks a length. */
#define VB_NAME_SPAN 256
/* The deepest path of 4,095 bytes: one-letter names and a slash between. */
#define VB_DEPTH_MAX 2048
/* Path bytes in one element of the `paths` map. */
#define VB_PATH_CHUNK 240

enum vb_event_kind {
	VB_EVENT_OPEN = 1,  /* an open call returned a descriptor; path follows */
	VB_EVENT_DUP = 2,   /* a dup call made one; path follows */
	VB_EVENT_CLOSE = 3, /* the descriptor named by opened_at is gone */
	VB_EVENT_EXIT = 4,  /* the process is gone, and every descriptor it had */
};

/* What got lost, one counter each. User space adds causes of its own. */
enum vb_loss {
	VB_LOSS_FDS_FULL = 0,    /* no room in `fds`: a descriptor is not tracked */
	VB_LOSS_PROCS_FULL,      /* no room in `procs`: likewise */
	VB_LOSS_RING_FULL,       /* an event could not be sent */
	VB_LOSS_PATH_UNREADABLE, /* the path exceeds 4,095 bytes or kept changing */
	VB_LOSS_SCRATCH_BUSY,    /* no scratch buffer was free: event without path */
	VB_LOSS_CLOSE_UNSEEN,    /* no room in `closing`: an entry may be stale */
	VB_LOSS_UNSTABLE,        /* threads changed one descriptor again and again */
	VB_LOSS_DELETE_FAILED,   /* an entry of a dead process would not go */
	VB_LOSS_OPEN_UNTIMED,    /* an open's start was not seen: no open_ns */
	VB_LOSS_MAX,
};

struct vb_fd_key {
	__u32 pid;
	__u32 fd;
};

struct vb_fd {
	__u64 opened_at; /* with the key, names this one open for good */
	__u64 file;      /* address of the struct file: identity only */
	__u64 ino;
	__u64 size;    /* of the file at its open, bytes */
	__u64 open_ns; /* time in the open call; 0: unknown, or a dup */
	__u32 dev;
	__u32 flags; /* the file's f_flags: O_RDONLY and so on */
	char comm[VB_COMM_LEN];
};

struct vb_event {
	__u64 ts;
	__u64 opened_at;
	__u64 ino;
	__u64 size;
	__u64 open_ns;
	__u32 pid;
	__u32 tid;
	__u32 fd;
	__u32 dev;
	__u32 flags;
	__u16 path_off; /* from the record's start */
	__u16 path_len; /* 0: no path */
	char comm[VB_COMM_LEN];
	__u8 kind; /* enum vb_event_kind */
	__u8 pad[7];
};

/*
 * A piece of the absolute path of the entry (pid, fd, opened_at), as seen
 * through the watched mount. User space alone writes.
 */
struct vb_path_key {
	__u64 opened_at;
	__u32 pid;
	__u32 fd;
	__u32 chunk;
	__u32 pad;
};

struct vb_path {
	__u16 total;  /* bytes of the whole path */
	__u8 outside; /* 1: not below a watched prefix, and not to be shown */
	__u8 pad[5];
	__u8 bytes[VB_PATH_CHUNK];
};

/* The one element of `meta`: who owns the pins. User space alone writes. */
struct vb_meta {
	__u64 since;      /* start of tracking */
	__u64 start_time; /* field 22 of the owner's /proc/<pid>/stat, clock ticks */
	__u64 loss_paths; /* paths that found no room in `paths` */
	__u32 version;    /* VB_ABI_VERSION */
	__u32 pid;
};

/* The one element of `stats`. */
struct vb_stats {
	__u64 losses[VB_LOSS_MAX];
	__u64 events; /* sent */
};

/* A process that has, or had, a tracked descriptor; absent: never. */
struct vb_proc {
	__u64 seen;
};

_Static_assert(sizeof(struct vb_fd_key) == 8, "vb_fd_key");
_Static_assert(sizeof(struct vb_fd) == 64, "vb_fd");
_Static_assert(sizeof(struct vb_event) == 88, "vb_event");
_Static_assert(sizeof(struct vb_path_key) == 24, "vb_path_key");
_Static_assert(sizeof(struct vb_path) == 248, "vb_path");
_Static_assert(sizeof(struct vb_meta) == 32, "vb_meta");
_Static_assert(sizeof(struct vb_stats) == 80, "vb_stats");
_Static_assert(sizeof(struct vb_proc) == 8, "vb_proc");
_Static_assert(sizeof(struct vb_event) % 8 == 0, "records stay aligned");

#endif /* RCLONE_BYPASS_H */
