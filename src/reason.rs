//! Why bytes went through FUSE: one enum, the same in the library, JSON,
//! metrics and documentation.

use std::ffi::CStr;
use std::fmt;

use serde::Serialize;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $remedy:literal;)*) => {
        /// Why a file, or a range of it, is read through FUSE and not from the cache.
        ///
        /// Names in `snake_case` are part of the command line's contract.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
        #[serde(rename_all = "snake_case")]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
        }

        impl Reason {
            /// Every reason, in declaration order: the order of counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The contract's name, `snake_case`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// [`name`](Self::name) as C reads it.
            #[must_use]
            pub fn name_c(self) -> &'static CStr {
                match self {
                    $(Self::$variant => const { for_c(concat!($name, "\0")) },)*
                }
            }

            /// What an operator can do about it, one sentence.
            #[must_use]
            pub fn remedy(self) -> &'static str {
                match self {
                    $(Self::$variant => $remedy,)*
                }
            }

            /// [`remedy`](Self::remedy) as C reads it.
            #[must_use]
            pub fn remedy_c(self) -> &'static CStr {
                match self {
                    $(Self::$variant => const { for_c(concat!($remedy, "\0")) },)*
                }
            }
        }
    };
}

/// A literal that ends with its only NUL.
const fn for_c(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("a NUL within a reason's text"),
    }
}

reasons! {
    /// `VMAFX_EBPF_BYPASS=0`, or the caller asked for FUSE alone.
    Disabled = "disabled", "unset VMAFX_EBPF_BYPASS, or choose another engine";
    /// The file is on no FUSE mount: it is read plainly.
    NotFuse = "not_fuse", "nothing to do: the file is already local";
    /// The file is on a FUSE mount of another type than `fuse.rclone`, or its
    /// daemon cannot be found.
    NotRclone = "not_rclone", "only `rclone mount` is supported; the daemon must be visible in /proc";
    /// No data file in the cache.
    NoCacheFile = "no_cache_file", "read the clip once, and mount with --vfs-cache-mode full";
    /// No metadata file in the cache, or it lists no cached range.
    NoMetadata = "no_metadata", "read the clip once and close it, and mount with --vfs-cache-mode full";
    /// The metadata cannot be parsed, or kept changing while it was read.
    BadMetadata = "bad_metadata", "try again; if it stays, the rclone version may be unknown";
    /// The metadata describes another version of the file than FUSE shows.
    StaleMetadata = "stale_metadata", "read the clip again so that rclone refreshes it; do not mount with --no-modtime";
    /// The range is not in the cache.
    Partial = "partial", "read the clip once from start to end";
    /// The range is at the edge of what is cached, where a block may be there
    /// in part: on writable mounts, and for what was just read through FUSE.
    Edge = "edge", "nothing to do: a block or two at each end come through FUSE";
    /// The mount is writable, and the kernel has pages of the range: they may be
    /// newer than what rclone has, and are read without it.
    PageCache = "page_cache", "nothing to do: the bytes came from the kernel's memory";
    /// The metadata lists the range but the cache file has a hole in it.
    Hole = "hole", "delete the clip from rclone's cache: it was damaged, perhaps by a power loss";
    /// rclone has changes to the file which it has not uploaded.
    Dirty = "dirty", "wait for rclone to upload the file";
    /// FUSE, the metadata and the cache file disagree on the size.
    SizeMismatch = "size_mismatch", "read the clip again so that rclone refreshes it";
    /// The cache file or its metadata changed while it was read.
    Changed = "changed", "nothing to do: the clip changed, or was evicted; reads go on through FUSE";
    /// The cache, or the daemon's /proc, may not be read.
    Permission = "permission", "run as rclone's user, with CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE, or set VMAFX_BYPASS_SOCKET to the socket of `run --socket`";
    /// The descriptor is open for writing.
    WriteOpen = "write_open", "open the clip read-only";
    /// `exec`: who opens the clip has other rights than `exec` itself.
    Credentials = "credentials", "run exec itself as the user that opens the clips, inside su, sudo or the container";
    /// `exec`: who opens the clip is, or may be, in a sandbox that `exec` itself
    /// is not in.
    Sandboxed = "sandboxed", "nothing to do, or start exec inside the sandbox";
    /// `exec`: the program is on the list of those that are left alone.
    Program = "program", "read the clip by another program, or name it with --include if you know that it does no harm";
    /// A system call failed on the way to a proof.
    IoError = "io_error", "see the message; is the daemon alive and the cache's disk healthy?";
    /// A verification found other bytes in the cache than FUSE's, in this file
    /// or in two others.
    Quarantined = "quarantined", "report it with the offset: bypassed and FUSE's bytes differed";
    /// More than one cache file or daemon could be the right one.
    Ambiguous = "ambiguous", "give each mount its own cache folder, and start rclone with the mount point as an argument";
    /// The handover server is gone, silent, busy or not to be trusted.
    Handover = "handover", "start `vmafx-bypass run --socket` as root; see the message";
    /// The clip was handed over without a snapshot: its bytes may change when the
    /// remote's do.
    Live = "live", "use --snapshot auto, unless the remote's clips never change";
    /// The cache file is open elsewhere, so that it may not be handed over
    /// without a snapshot.
    Busy = "busy", "use --snapshot auto, or wait until rclone has closed the clip: from 1.74 on 5 seconds after its last reader, or as --vfs-handle-caching says";
    /// A sealed copy of the clip has no room: in the budget, or in memory.
    Budget = "budget", "raise --copy-budget, or keep the cache on xfs or btrfs, where snapshots take no memory";
    /// The mount, the cache's file system or the name is of a kind for which
    /// there is no proof.
    Unsupported = "unsupported", "mount with --read-only, or run linux 6.16; keep the cache on ext4, xfs, btrfs or tmpfs, one mount per cache";
}

impl Reason {
    /// Whether it is of a few bytes, or bytes that cost little, of a file that is
    /// bypassed as it should be.
    #[must_use]
    pub fn is_benign(self) -> bool {
        matches!(self, Self::Edge | Self::PageCache)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A reason with its evidence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Refusal {
    /// Which step of the proof did not hold.
    pub reason: Reason,
    /// What was found: one line, with the path or pid.
    pub detail: String,
}

impl Refusal {
    /// A refusal for `reason`, found as `detail` says.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }

    /// The refusal that a failed system call on `what` means: `permission` for
    /// EACCES and EPERM, else `otherwise`.
    pub fn from_io(what: impl fmt::Display, error: &std::io::Error, otherwise: Reason) -> Self {
        let reason = match error.kind() {
            std::io::ErrorKind::PermissionDenied => Reason::Permission,
            _ => otherwise,
        };
        Self::new(reason, format!("{what}: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_serde_writes() {
        for reason in Reason::ALL {
            let json = serde_json::to_value(reason).unwrap();
            assert_eq!(json, reason.name());
            assert!(!reason.remedy().is_empty());
            assert_eq!(reason.name_c().to_str(), Ok(reason.name()));
            assert_eq!(reason.remedy_c().to_str(), Ok(reason.remedy()));
        }
    }

    #[test]
    fn declaration_order_indexes_counters() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }
}
