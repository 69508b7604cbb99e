//! Which reason fits which failed call.

use nix::errno::Errno;

use crate::tracer::{Fault, Kind};

/// Calls by what their names begin with, the first match counts; and the
/// reasons that fit EACCES, ENOENT, and all else. None to name: the proof does
/// not depend on the call. Bytes may always come from the cache all the same:
/// of many calls the answer is had another way, or asked for again.
const FITTING: &[(&str, &str, &str, &str)] = &[
    // The clip through FUSE.
    ("statx CLIP", "permission", "changed", "changed io_error"),
    (
        "statx of CLIP",
        "io_error changed permission",
        "io_error changed",
        "io_error changed",
    ),
    ("close of CLIP", "", "", ""),
    ("fcntl(1) of", "", "", ""),
    ("fcntl(3) of CLIP", "permission", "io_error", "io_error"),
    ("fcntl(4) of CLIP", "permission", "io_error", "io_error"),
    ("cachestat of CLIP", "permission", "io_error", "io_error"),
    // That it is missing is the answer that was hoped for.
    ("statx BARRIER", "permission", "", "io_error"),
    ("pread of CLIP", "permission", "io_error", "io_error"),
    ("open CLIP", "", "", ""),
    (
        "open /proc/self/fd/CLIP",
        "permission",
        "io_error",
        "io_error",
    ),
    (
        "readlink /proc/self/fd/CLIP",
        "permission io_error",
        "io_error",
        "io_error",
    ),
    // Its mount and daemon.
    ("statx MOUNT", "ambiguous", "ambiguous", "ambiguous"),
    ("poll", "permission", "io_error", "io_error"),
    (
        "statx /proc/self/ns/mnt",
        "permission",
        "io_error",
        "io_error",
    ),
    (
        "open /proc/self/mountinfo",
        "permission",
        "io_error",
        "io_error",
    ),
    (
        "read of /proc/self/mountinfo",
        "permission",
        "io_error",
        "io_error ambiguous",
    ),
    ("statx of /proc/DAEMON/stat", "", "", ""),
    ("close of /proc/DAEMON/stat", "", "", ""),
    // The daemon is taken for dead, and found anew; then it must say since when
    // it runs.
    ("open /proc/DAEMON/stat", "io_error", "io_error", "io_error"),
    (
        "read of /proc/DAEMON/stat",
        "io_error",
        "io_error",
        "io_error",
    ),
    // The metadata; where it was proven before, any failure ends the proof.
    ("close of METADATA", "", "", ""),
    (
        "pread of METADATA",
        "permission changed",
        "no_metadata changed",
        "io_error bad_metadata changed",
    ),
    // Only where it is looked at around a read of a writable mount.
    ("fstat of METADATA", "changed", "changed", "changed"),
    (
        "open METADATA",
        "permission changed",
        "no_metadata changed",
        "io_error changed",
    ),
    (
        "statx METADATA",
        "permission changed",
        "no_metadata changed",
        "io_error changed",
    ),
    (
        "statx of METADATA",
        "permission changed",
        "no_metadata changed",
        "io_error changed",
    ),
    // The cache file; where the daemon hides it, it is looked for by its path.
    ("statx CACHE", "permission", "no_cache_file", "io_error"),
    // To the C library ENOENT is the end of a folder that was removed.
    (
        "getdents of /proc/DAEMON/fd",
        "permission",
        "no_cache_file",
        "io_error",
    ),
    (
        "open /proc/DAEMON/fd/DATA",
        "permission",
        "no_cache_file",
        "io_error",
    ),
    (
        "readlink /proc/DAEMON/fd/DATA",
        "permission",
        "no_cache_file",
        "io_error",
    ),
    ("readlink /proc/DAEMON/fd/", "permission", "", "io_error"),
    ("open /proc/DAEMON/fd", "permission", "io_error", "io_error"),
    (
        "fstat of /proc/DAEMON/fd",
        "permission",
        "io_error",
        "io_error",
    ),
    ("close of /proc/DAEMON/fd", "", "", ""),
    (
        "readlink /proc/self/fd/DATA",
        "permission",
        "io_error",
        "io_error",
    ),
    ("close of DATA", "", "", ""),
    ("statx of DATA", "permission", "io_error", "io_error"),
    (
        "fstatfs of DATA",
        "permission io_error",
        "io_error",
        "io_error",
    ),
    (
        "lseek(4) of DATA",
        "permission io_error",
        "io_error",
        "io_error",
    ),
    // Advice.
    ("fadvise of DATA", "", "", ""),
    // The kernel then reads ahead, and what it has is read from there.
    ("fadvise of CLIP", "page_cache", "page_cache", "page_cache"),
    (
        "pread of DATA",
        "permission io_error",
        "io_error",
        "io_error",
    ),
    (
        "fstat of DATA",
        "permission io_error",
        "io_error",
        "io_error",
    ),
];

/// Finding the daemon: what it is asked for, or what all processes are.
const WHILE_LOCATING: (&str, &str, &str) = (
    "permission io_error not_rclone unsupported",
    "io_error not_rclone unsupported",
    "io_error not_rclone no_metadata no_cache_file ambiguous unsupported",
);

/// Calls without which no file can be opened through FUSE: their error is the
/// caller's. (An open that a signal interrupts is made again.)
fn is_of_open(call: &str) -> bool {
    ["open CLIP", "statx of CLIP", "fcntl(3) of CLIP"].contains(&call)
}

/// Whether what came of an episode of `command` fits the fault. `usual`: what
/// comes of it if no call fails.
pub fn fits(command: &str, fault: &Fault, outcome: &str, usual: &str) -> bool {
    let (phase, call) = fault.site.split_once(": ").unwrap();
    if let Some(error) = outcome.strip_prefix("open error: ") {
        return phase == "open" && is_of_open(call) && is_of(fault.kind, error);
    }
    if let Some(error) = outcome.strip_prefix("read error: ") {
        // Where there is nothing but FUSE to read by.
        let by_fuse = usual != "cache" && phase != "open";
        return by_fuse && call == "pread of CLIP" && is_of(fault.kind, error);
    }
    if outcome == usual {
        return true;
    }
    if command == "fuse" {
        return false;
    }
    let row = FITTING.iter().find(|row| call.starts_with(row.0));
    let (access, missing, other) = match row {
        Some((_, access, missing, other)) => (*access, *missing, *other),
        None if call.contains("/proc") => WHILE_LOCATING,
        None => return false,
    };
    let fitting = match fault.kind {
        Kind::Error(Errno::ENOSYS) => "unsupported",
        Kind::Error(Errno::EACCES | Errno::EPERM) => access,
        Kind::Error(Errno::ENOENT) => missing,
        _ => other,
    };
    // Several, where a proof could not be had, and neither could the next, or
    // where a part was read as usual.
    let mut reasons = outcome.split('+').filter(|reason| *reason != usual);
    reasons.all(|reason| fitting.split(' ').any(|fits| fits == reason))
}

/// Whether an error is the one that was injected; a read that gives nothing
/// looks like the end of the file.
fn is_of(kind: Kind, error: &str) -> bool {
    match kind {
        Kind::Error(errno) => error.ends_with(&format!("(os error {})", errno as i32)),
        Kind::Nothing => error == "unexpected end of file",
        Kind::Short => false,
    }
}
