//! What a handover server gives: clips below its prefixes.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};

use crate::cache::rclone::Locator;
use crate::handover::{Client, Lease, Source, WholeFd, protocol::WholeKind};
use crate::mounts::{Mount, MountTable};
use crate::reader::Proven;
use crate::reason::{Reason, Refusal};
use crate::snapshot::{SnapshotKind, Snapshots};

/// The clips below some folders on rclone mounts, for a
/// [`handover::Server`](crate::handover::Server).
///
/// A client's descriptor must be of a regular file on such a mount, below a
/// prefix, and open for reading alone. It may have been opened in another mount
/// namespace, where the mount has another place.
pub struct Clips {
    prefixes: Vec<PathBuf>,
    snapshots: Arc<Snapshots>,
}

/// A client's clip that may be handed over.
struct Admitted {
    /// Opened on a mount of ours: the client's own, or its file opened anew.
    clip: OwnedFd,
    read_only: bool,
}

impl Clips {
    /// `prefixes`: absolute, without symlinks; the mounts need not be there yet.
    pub fn new(prefixes: Vec<PathBuf>, snapshots: Arc<Snapshots>) -> Self {
        Self {
            prefixes,
            snapshots,
        }
    }

    /// Looks at a descriptor, without asking its file system anything, which
    /// may be any user's own and never answer.
    fn admit(&self, client: Client, clip: OwnedFd) -> Result<Admitted, Refusal> {
        check_flags(clip.as_fd())?;
        let stat = stat(clip.as_fd())?;
        if FileType::from_raw_mode(u32::from(stat.stx_mode)) != FileType::RegularFile {
            let detail = "the descriptor is not of a regular file";
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        let path = fs::read_link(link(clip.as_fd())).map_err(|e| io("the clip's path", &e))?;
        let locator = Locator::now()?;
        let table = locator.table();
        let own = table.by_id(stat.stx_mnt_id).cloned();
        let is_ours = own.is_some();
        let mount = own.map_or_else(|| elsewhere(client.pid, stat.stx_mnt_id), Ok)?;
        if !mount.is_rclone() {
            let reason = if mount.is_fuse() {
                Reason::NotRclone
            } else {
                Reason::NotFuse
            };
            let detail = format!("the descriptor is of a file on {}", mount.fstype);
            return Err(Refusal::new(reason, detail));
        }
        let inside = mount.inside(&path).ok_or_else(|| {
            let detail = "the clip's path is not below its mount point";
            Refusal::new(Reason::Ambiguous, detail)
        })?;
        let watched = self.prefixes.iter().any(|prefix| {
            table.containing(prefix).is_some_and(|on| {
                on.dev == mount.dev && on.inside(prefix).is_some_and(|p| inside.starts_with(p))
            })
        });
        if !watched {
            let detail = "the clip is not below a prefix of this server";
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        let clip = if is_ours {
            clip
        } else {
            open_here(table, &mount, &inside, &stat)?
        };
        Ok(Admitted {
            clip,
            read_only: mount.read_only,
        })
    }
}

impl Source for Clips {
    fn ranges(
        &self,
        client: Client,
        clip: OwnedFd,
        pulled: Option<u64>,
    ) -> Result<Box<dyn Lease>, Refusal> {
        let admitted = self.admit(client, clip)?;
        if !admitted.read_only {
            let detail = "the mount is writable: only read-only mounts' clips are handed over";
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        Ok(Box::new(Proven::of(admitted.clip, pulled, client.uid)?))
    }

    fn whole(&self, client: Client, clip: OwnedFd) -> Result<WholeFd, Refusal> {
        let admitted = self.admit(client, clip)?;
        let whole = self.snapshots.open(admitted.clip.as_fd())?;
        Ok(WholeFd {
            fd: whole.fd,
            kind: match whole.kind {
                SnapshotKind::Reflink => WholeKind::Reflink,
                SnapshotKind::Copy => WholeKind::Copy,
                SnapshotKind::Live => WholeKind::Live,
            },
            size: whole.size,
        })
    }
}

fn io(what: &str, error: &io::Error) -> Refusal {
    Refusal::from_io(what, error, Reason::IoError)
}

fn link(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// To hold a file open for reading is the proof that it may be read.
fn check_flags(clip: BorrowedFd<'_>) -> Result<(), Refusal> {
    let flags = fcntl(clip, FcntlArg::F_GETFL).map_err(|e| io("fcntl", &e.into()))?;
    let flags = OFlag::from_bits_retain(flags);
    let access = flags & OFlag::O_ACCMODE;
    if flags.contains(OFlag::O_PATH) || access == OFlag::O_WRONLY {
        let detail = "the descriptor is not open for reading";
        return Err(Refusal::new(Reason::Permission, detail));
    }
    if access != OFlag::O_RDONLY {
        let detail = "the descriptor is open for writing";
        return Err(Refusal::new(Reason::WriteOpen, detail));
    }
    Ok(())
}

fn stat(clip: BorrowedFd<'_>) -> Result<Statx, Refusal> {
    let at = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
    rustix::fs::statx(clip, "", at, wanted).map_err(|e| {
        if e == rustix::io::Errno::ACCESS {
            // Not even root may: fs/fuse/dir.c, fuse_allow_current_process.
            let detail = "the clip's mount belongs to its user alone: mount with --allow-other, \
                          or run the server as that user";
            return Refusal::new(Reason::Permission, detail);
        }
        io("statx of the clip", &e.into())
    })
}

/// A mount as the client's mount namespace has it; the kernel's ids of mounts
/// are unique in all of them.
fn elsewhere(pid: u32, id: u64) -> Result<Mount, Refusal> {
    let unseen = |what: &dyn std::fmt::Display| {
        let detail = format!(
            "the clip's mount is not in our mount table, nor in its client's, pid {pid}{what}"
        );
        Refusal::new(Reason::Ambiguous, detail)
    };
    let text =
        fs::read(format!("/proc/{pid}/mountinfo")).map_err(|e| unseen(&format_args!(": {e}")))?;
    let table = MountTable::parse(&text);
    table.by_id(id).cloned().ok_or_else(|| unseen(&""))
}

/// Opens, by a mount of ours, the file that the client has open by one of its
/// own of the same superblock. That it is the same file is checked before it is
/// opened for reading.
fn open_here(
    table: &MountTable,
    mount: &Mount,
    inside: &Path,
    stat: &Statx,
) -> Result<OwnedFd, Refusal> {
    let paths = table
        .iter()
        .filter(|own| own.dev == mount.dev)
        .filter_map(|own| own.outside(inside));
    for path in paths {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(found) = rustix::fs::open(&path, flags, Mode::empty()) else {
            continue;
        };
        let at = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let own = rustix::fs::statx(&found, "", at, StatxFlags::INO);
        let own = own.map_err(|e| io("statx", &e.into()))?;
        let identity = |s: &Statx| (s.stx_dev_major, s.stx_dev_minor, s.stx_ino);
        if identity(&own) != identity(stat) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        return rustix::fs::open(link(found.as_fd()), flags, Mode::empty())
            .map_err(|e| io("opening the clip by our own mount", &e.into()));
    }
    let shown = inside.display();
    let detail = format!("`{shown}` of the client's mount is another file, or none, by ours");
    Err(Refusal::new(Reason::Ambiguous, detail))
}
