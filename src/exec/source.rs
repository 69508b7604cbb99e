//! Where the snapshots of clips come from: made here, or had from a handover
//! server where the cache is not ours to see; completed before, if so wanted.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::fill::Fills;
use crate::cache::proof::Timestamp;
use crate::handover::{self, protocol::WholeKind};
use crate::mounts::Dev;
use crate::reader::{by_either, is_root};
use crate::reason::{Reason, Refusal};
use crate::snapshot::{SnapshotKind, Snapshots, Whole};

/// A clip's snapshot, and where it is from.
pub(super) struct Given {
    pub(super) whole: Whole,
    pub(super) by_server: bool,
}

pub(super) struct Source {
    pub(super) snapshots: Snapshots,
    /// The socket of a handover server.
    pub(super) server: Option<PathBuf>,
    pub(super) fills: Option<Fills>,
}

impl Source {
    /// Hands a clip over, which an O_PATH descriptor refers to. It may take long;
    /// `wanted` tells whether anybody still waits for it.
    pub(super) fn open(
        &self,
        clip: BorrowedFd<'_>,
        dev: Dev,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Given, Refusal> {
        let own = || {
            let whole = self.own(clip, wanted)?;
            let by_server = false;
            Ok(Given { whole, by_server })
        };
        let Some(socket) = &self.server else {
            return own();
        };
        by_either(is_root(), dev, own, || from_server(socket, clip))
    }

    fn own(&self, clip: BorrowedFd<'_>, wanted: &dyn Fn() -> bool) -> Result<Whole, Refusal> {
        let refusal = match self.snapshots.open(clip) {
            Err(refusal) if is_incomplete(refusal.reason) => refusal,
            result => return result,
        };
        match &self.fills {
            Some(fills) if fills.complete(clip, wanted) => self.snapshots.open(clip),
            _ => Err(refusal),
        }
    }
}

/// Whether reading the clip through FUSE may make it whole in the cache.
fn is_incomplete(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Partial | Reason::NoMetadata | Reason::NoCacheFile | Reason::StaleMetadata
    )
}

/// Asks the server. It gives the clip to those who have it open for reading.
fn from_server(socket: &Path, clip: BorrowedFd<'_>) -> Result<Given, Refusal> {
    let io = |what: &str, e: std::io::Error| Refusal::from_io(what, &e, Reason::IoError);
    let link = format!("/proc/self/fd/{}", clip.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let open = rustix::fs::open(link, flags, Mode::empty());
    let open = open.map_err(|e| io("opening the clip through fuse", e.into()))?;
    let given = handover::whole(socket, open.as_fd())?;
    let kind = match given.kind {
        WholeKind::Reflink => SnapshotKind::Reflink,
        WholeKind::Copy => SnapshotKind::Copy,
        WholeKind::Live => {
            let detail = "the server gave the cache file itself";
            return Err(Refusal::new(Reason::Live, detail));
        }
    };
    let modified = check_version(&given.fd, &open)?;
    Ok(Given {
        whole: Whole {
            fd: given.fd,
            kind,
            size: given.size,
            modified,
            reused: false,
        },
        by_server: true,
    })
}

/// A snapshot has the size and time of its clip, which FUSE shows us, too.
fn check_version(snapshot: &OwnedFd, clip: &OwnedFd) -> Result<Timestamp, Refusal> {
    let version = |fd: &OwnedFd| {
        let stat = rustix::fs::fstat(fd)
            .map_err(|e| Refusal::from_io("fstat", &e.into(), Reason::IoError))?;
        let modified = Timestamp {
            seconds: stat.st_mtime,
            nanos: stat.st_mtime_nsec as u32,
        };
        Ok((stat.st_size, modified))
    };
    let (shown, found) = (version(clip)?, version(snapshot)?);
    if shown == found {
        return Ok(shown.1);
    }
    let detail = "the server's snapshot is not of the version that fuse shows";
    Err(Refusal::new(Reason::Changed, detail))
}
