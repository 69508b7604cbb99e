//! Reflinks: unlinked files that share the cache file's blocks.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::{Whence, lseek};
use rustix::fs::{IFlags, Mode, OFlags};

use super::{dress, reopen};
use crate::reader::WholeClip;
use crate::reason::{Reason, Refusal};

/// Clones a clip's cache file; `None` where its file system cannot, or we may
/// not write there.
///
/// # Errors
/// Where the clip changes meanwhile.
pub(super) fn of(clip: &WholeClip) -> Result<Option<OwnedFd>, Refusal> {
    let Some(file) = clone(clip) else {
        return Ok(None);
    };
    let failed = |e: io::Error| Refusal::new(Reason::IoError, format!("a reflink: {e}"));
    // It cannot change any more, so what holds now holds for good: that it has
    // no hole, and that it was made while the cache file was the clip's.
    let size = file.metadata().map_err(failed)?.size();
    let hole = lseek(&file, 0, Whence::SeekHole).map_err(|e| failed(e.into()))?;
    if size != clip.size() || hole as u64 != size {
        let detail = format!("a reflink has {size} bytes, and a hole at {hole}");
        return Err(Refusal::new(Reason::Changed, detail));
    }
    clip.check()?;
    dress(&file, clip)?;
    let snapshot = reopen(&file).map_err(failed)?;
    // Against root, too, who could open it for writing by /proc. Others than
    // root may not set it, and its owner could, if it wanted to, write anyway.
    if let Ok(flags) = rustix::fs::ioctl_getflags(&file) {
        let _ = rustix::fs::ioctl_setflags(&file, flags | IFlags::IMMUTABLE);
    }
    Ok(Some(snapshot))
}

/// Whether a folder's file system has reflinks, and we may make them there: tried
/// with two files that have no name.
#[must_use]
pub fn has_reflinks(folder: &Path) -> bool {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::EXCL | OFlags::CLOEXEC;
    let open = || rustix::fs::open(folder, flags, Mode::RUSR);
    let (Ok(from), Ok(to)) = (open(), open()) else {
        return false;
    };
    rustix::fs::ioctl_ficlone(&to, &from).is_ok()
}

fn clone(clip: &WholeClip) -> Option<File> {
    let folder = clip.data_path().parent()?;
    // O_EXCL: nobody can give it a name.
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::open(folder, flags, Mode::RUSR).ok()?;
    rustix::fs::ioctl_ficlone(&file, clip.data()).ok()?;
    Some(file.into())
}
