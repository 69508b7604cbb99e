/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The ABI between the BPF programs and user space: map keys, map values and
 * ring buffer records. Fixed widths, widest members first, padding explicit.
 * Sizes are asserted here and again in src/tracker/abi.rs.
 *
 * "pid" names a descriptor table: the kernel's tgid, or for a thread that has
 * a table of its own (unshare(2)) its tid; both as seen from the pid namespace
 * of the tracker. Times are nanoseconds of CLOCK_BOOTTIME. "dev" is the
 * kernel's own encoding of a superblock's device, major << 20 | minor.
 */
#ifndef RCLONE_BYPASS_H
#define RCLONE_BYPASS_H

/* Bumped at every change of a layout below; `dump-map` refuses another one. */
#define VB_ABI_VERSION 4

#define VB_COMM_LEN 16
/* PATH_MAX of linux/limits.h: a path has up to 4,095 bytes and no NUL here. */
#define VB_PATH_MAX 4096
/* NAME_MAX of linux/limits.h, plus one: a power of two that masks a length. */
#define VB_NAME_SPAN 256
/* The deepest path of 4,095 bytes: one-letter names and a slash between. */
#define VB_DEPTH_MAX 2048
/* Path bytes in one element of the `paths` map. */
#define VB_PATH_CHUNK 240
/* Programs that count reads, at most: two for each function of a read call. */
#define VB_READ_PROGRAMS 24

/*
 * Slots of `watched_slots`: a power of two. Anonymous devices such as FUSE's have
 * major 0.
 */
#define VB_DEV_SLOTS 4096
#define VB_DEV_SLOT(dev) (((dev) ^ (dev) >> 20) % VB_DEV_SLOTS)

/* What became of a descriptor. All but CLOSE, EXIT and MARK bring a path. */
enum vb_event_kind {
	VB_EVENT_OPEN = 1,    /* an open call returned it */
	VB_EVENT_DUP = 2,     /* a dup call made it */
	VB_EVENT_CLOSE = 3,   /* the one named by opened_at is gone */
	VB_EVENT_EXIT = 4,    /* the process is gone, and all that it had */
	VB_EVENT_INHERIT = 5, /* a fork copied it from the parent */
	VB_EVENT_RECEIVE = 6, /* another process gave it, or it was taken from one */
	VB_EVENT_ADOPT = 7,   /* it was found open */
	VB_EVENT_MARK = 8,    /* something came into `marks` */
};

/* What got lost, one counter each. User space adds causes of its own. */
enum vb_loss {
	VB_LOSS_FDS_FULL = 0,    /* no room in `fds`: a descriptor is not tracked */
	VB_LOSS_PROCS_FULL,      /* no room in `procs`: likewise */
	VB_LOSS_MARKS_FULL,      /* no room in `marks`: a process is not reconciled */
	VB_LOSS_RING_FULL,       /* an event could not be sent */
	VB_LOSS_PATH_UNREADABLE, /* the path exceeds 4,095 bytes or kept changing */
	VB_LOSS_SCRATCH_BUSY,    /* no scratch buffer was free: event without path */
	VB_LOSS_UNSTABLE,        /* threads changed one descriptor again and again */
	VB_LOSS_DELETE_FAILED,   /* an entry of a dead process would not go */
	VB_LOSS_OPEN_UNTIMED,    /* an open's start was not seen: no open_ns */
	VB_LOSS_READ_UNCOUNTED,  /* a read's start was not seen, or no account had room */
	VB_LOSS_MAX,
};

/* Why a process is to be reconciled with what the kernel has; `marks` has their sum. */
#define VB_MARK_FOUND 1  /* it may have descriptors that no call told of */
#define VB_MARK_FORKED 2 /* it was forked, with more than a program copies at once */
#define VB_MARK_SHARED 4 /* so may the others that share its descriptor table */
#define VB_MARK_URING 8  /* io_uring opened or closed something */
/* In place of a pid in `marks`: every process, for something got lost. */
#define VB_MARK_ALL 0

/* What `reconcile` did; else: call again from this descriptor. */
#define VB_RECONCILE_DONE 0xffffffffU
#define VB_RECONCILE_GONE 0xfffffffeU  /* no such process: nothing is left of it */

/* The arguments of `reconcile`, its context. */
struct vb_reconcile {
	__u64 pid;
	__u64 from;  /* the first descriptor */
	__u64 kind; /* enum vb_event_kind for what is found, | VB_SYNC_ */
};

/* With a kind, for sync_fd(): */
#define VB_SYNC_KIND 0xff
#define VB_SYNC_NEW 0x100    /* a call returned it just now: never the old one */
#define VB_SYNC_RESEND 0x200 /* tell of it even if it is known */
#define VB_SYNC_ALONE 0x400  /* reconcile: mark no threads with tables of their own */

struct vb_fd_key {
	__u32 pid;
	__u32 fd;
};

struct vb_fd {
	__u64 opened_at; /* with the key, names this one open for good */
	__u64 file;      /* address of the struct file: identity only */
	__u64 ino;
	__u64 size;    /* of the file at its open, bytes */
	__u64 open_ns; /* time in the open call; 0: unknown, or no open */
	__u32 dev;
	__u32 flags;  /* the file's f_flags: O_RDONLY and so on */
	__u32 own_pid; /* the process's pid in its own pid namespace */
	__u32 mnt_id; /* of the mount that it was opened through */
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
	__u32 own_pid;
	__u32 mnt_id;
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
	__u64 loss_reconcile; /* processes that could not be reconciled */
	__u64 healed;     /* losses that were made good, of those that break the table */
	__u32 version;    /* VB_ABI_VERSION */
	__u32 pid;
	__u32 busy; /* 1: reconciliation is under way */
	__u32 account; /* 1: reads are counted */
	__u32 read_programs[VB_READ_PROGRAMS]; /* the ids of those that do; 0: no more */
};

/*
 * Reads by a process of a clip, whatever descriptors it has had of it. Devices and
 * inodes are used again by later mounts: "mount" numbers those that were watched.
 */
struct vb_account_key {
	__u64 ino;
	__u32 mount;
	__u32 pid;
};

struct vb_account {
	__u64 reads; /* calls that returned, with an error or without */
	__u64 bytes;
	__u64 ns; /* in these calls */
	__u64 size; /* of the clip, when the descriptor that was last read was opened */
	__u32 dev;
	__u32 pad;
	char comm[VB_COMM_LEN]; /* the process's, at its first read of the clip */
};

/* Reads of all, a CPU's part of them. */
struct vb_reads {
	__u64 reads;
	__u64 bytes;
	__u64 ns;
	__u64 accounts; /* that were begun */
};

/* The one element of `stats`. */
struct vb_stats {
	__u64 losses[VB_LOSS_MAX];
	__u64 events; /* sent */
};

/* With vb_proc: */
#define VB_PROC_THREADS 1 /* a thread has a descriptor table of its own */
#define VB_PROC_SHARED 2  /* another process shares the table */
#define VB_PROC_URING 4   /* it opens or closes by io_uring */

/* A process that has, or had, a tracked descriptor; absent: never. */
struct vb_proc {
	__u64 entries; /* in `fds` */
	__u64 flags;   /* VB_PROC_ */
};

_Static_assert(sizeof(struct vb_reconcile) == 24, "vb_reconcile");
_Static_assert(sizeof(struct vb_fd_key) == 8, "vb_fd_key");
_Static_assert(sizeof(struct vb_fd) == 72, "vb_fd");
_Static_assert(sizeof(struct vb_event) == 96, "vb_event");
_Static_assert(sizeof(struct vb_path_key) == 24, "vb_path_key");
_Static_assert(sizeof(struct vb_path) == 248, "vb_path");
_Static_assert(sizeof(struct vb_meta) == 152, "vb_meta");
_Static_assert(sizeof(struct vb_account_key) == 16, "vb_account_key");
_Static_assert(sizeof(struct vb_account) == 56, "vb_account");
_Static_assert(sizeof(struct vb_reads) == 32, "vb_reads");
_Static_assert(sizeof(struct vb_stats) == 88, "vb_stats");
_Static_assert(sizeof(struct vb_proc) == 16, "vb_proc");
_Static_assert(sizeof(struct vb_event) % 8 == 0, "records stay aligned");

#endif /* RCLONE_BYPASS_H */
