//! A whole clip, proven to be handed over: what snapshots are made of.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::fs::{AtFlags, FileType, StatxFlags};

use super::companion::Companion;
use super::epoch::Epoch;
use super::prove::{Wanted, prove};
use crate::cache::proof::Timestamp;
use crate::cache::trail::Trail;
use crate::reason::{Reason, Refusal};
use crate::sys::coarse_ms;

/// statx(2) gives mount ids that are never used again, Linux 6.8.
const MNT_ID_UNIQUE: u32 = 0x4000;

/// A clip as a descriptor shows it: which file it is, and by which path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Shown {
    /// Before Linux 6.8 an id that a later mount may have.
    mount: u64,
    dev: (u32, u32),
    ino: u64,
    path: PathBuf,
}

impl Shown {
    /// Looks at a descriptor, which may be an O_PATH one. Neither opens the
    /// file nor asks FUSE.
    ///
    /// # Errors
    /// Unless it is a regular file's, and cannot write.
    pub(crate) fn by(clip: BorrowedFd<'_>) -> Result<Self, Refusal> {
        let failed = |call: &str, e: io::Error| {
            Refusal::from_io(format_args!("{call} of the clip"), &e, Reason::IoError)
        };
        let flags = fcntl(clip, FcntlArg::F_GETFL).map_err(|e| failed("fcntl", e.into()))?;
        let flags = OFlag::from_bits_retain(flags);
        let path = fs::read_link(link(clip)).map_err(|e| failed("readlink", e))?;
        if !flags.contains(OFlag::O_PATH) && flags & OFlag::O_ACCMODE != OFlag::O_RDONLY {
            let detail = format!("`{}` is open for writing", path.display());
            return Err(Refusal::new(Reason::WriteOpen, detail));
        }
        let at = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
        let wanted = wanted | StatxFlags::from_bits_retain(MNT_ID_UNIQUE);
        let stat =
            rustix::fs::statx(clip, "", at, wanted).map_err(|e| failed("statx", e.into()))?;
        if FileType::from_raw_mode(u32::from(stat.stx_mode)) != FileType::RegularFile {
            let detail = format!("`{}` is no regular file", path.display());
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        Ok(Self {
            mount: stat.stx_mnt_id,
            dev: (stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            path,
        })
    }

    /// What FUSE shows of it now, by its path: size in bytes, and modification
    /// time; from the kernel's attribute cache, which lasts a second unless the
    /// mount says otherwise.
    fn version(&self) -> Result<(u64, Timestamp), Refusal> {
        let found = fs::metadata(&self.path).map_err(|e| {
            let otherwise = match e.kind() {
                io::ErrorKind::NotFound => Reason::Changed,
                _ => Reason::IoError,
            };
            Refusal::from_io(format_args!("`{}`", self.path.display()), &e, otherwise)
        })?;
        let dev = (
            rustix::fs::major(found.dev()),
            rustix::fs::minor(found.dev()),
        );
        if (dev, found.ino()) != (self.dev, self.ino) {
            let detail = format!("`{}` leads to another file by now", self.path.display());
            return Err(Refusal::new(Reason::Changed, detail));
        }
        Ok((found.len(), Timestamp::modified(&found)))
    }
}

fn link(file: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

/// A clip of which every byte is proven, held open through FUSE meanwhile.
pub(crate) struct WholeClip {
    companion: Companion,
    vigil: Vigil,
}

impl WholeClip {
    /// Proves a clip whole, on a read-only mount. The clip is opened through
    /// FUSE anew, by what `clip` refers to.
    ///
    /// # Errors
    /// Why it is not proven, or not whole.
    pub(crate) fn prove(clip: BorrowedFd<'_>, shown: Shown) -> Result<Self, Refusal> {
        let proven_ms = coarse_ms();
        let companion = Companion::open(&link(clip)).map_err(|e| {
            Refusal::from_io(
                format_args!("`{}`", shown.path.display()),
                &e,
                Reason::IoError,
            )
        })?;
        let epoch = prove(&companion, None, Wanted::Whole, &mut Trail::off())?;
        epoch.check_whole()?;
        let vigil = Vigil {
            epoch,
            shown,
            proven_ms,
        };
        Ok(Self { companion, vigil })
    }

    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.vigil.epoch.version().0
    }

    /// As FUSE shows it.
    pub(crate) fn modified(&self) -> Timestamp {
        self.vigil.epoch.version().1
    }

    /// As FUSE shows them.
    pub(crate) fn permissions(&self) -> Result<u32, Refusal> {
        let metadata = self.companion.metadata();
        metadata
            .map(|m| m.mode() & 0o7777)
            .map_err(|e| Refusal::from_io("fstat of the clip through fuse", &e, Reason::IoError))
    }

    /// The cache file. What is read from it counts only after
    /// [`check`](Self::check).
    pub(crate) fn data(&self) -> &File {
        self.vigil.epoch.data()
    }

    /// Where the cache file can be opened from here.
    pub(crate) fn data_path(&self) -> &Path {
        self.vigil.epoch.cache_path()
    }

    /// Fills the buffer from the cache file, which was still the clip's after
    /// the read.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Refusal> {
        self.vigil.epoch.read_whole(buffer, offset)
    }

    /// Looks at everything again: what was taken from the cache file before is
    /// the clip's if this holds.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        self.vigil.epoch.check_whole()?;
        self.vigil.check()
    }

    /// Closes the clip, and keeps what tells whether it still is the same.
    pub(crate) fn close(self) -> Vigil {
        self.vigil
    }
}

/// What tells whether a clip still is the version that was proven, without
/// having it open through FUSE: that would make rclone write a remote's change
/// into the unlinked cache file, and keep it from making a new one.
pub(crate) struct Vigil {
    epoch: Epoch,
    shown: Shown,
    /// When the proof was begun, [`coarse_ms`].
    proven_ms: u64,
}

impl Vigil {
    /// Whether FUSE shows, and the cache has, the version that was proven.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        if self.shown.version()? != self.epoch.version() {
            let detail = format!("`{}` has changed", self.shown.path.display());
            return Err(Refusal::new(Reason::Changed, detail));
        }
        self.epoch.check_version()
    }

    /// Whether the cache file still has its name.
    pub(crate) fn is_linked(&self) -> bool {
        self.epoch.check_data().is_ok()
    }

    /// Milliseconds since rclone itself was last asked.
    pub(crate) fn age_ms(&self) -> u64 {
        coarse_ms().saturating_sub(self.proven_ms)
    }

    /// Whether a later proof is of the same version, in the same cache file.
    pub(crate) fn is_same(&self, clip: &WholeClip) -> bool {
        self.epoch.is_same(&clip.vigil.epoch).unwrap_or(false)
    }

    /// The cache file.
    pub(crate) fn data(&self) -> &File {
        self.epoch.data()
    }

    /// Its size, bytes, and its modification time.
    pub(crate) fn version(&self) -> (u64, Timestamp) {
        self.epoch.version()
    }
}
