//! Whole clips, mapped.

use std::fmt;
use std::ops::Deref;

use memmap2::Mmap;

use super::{SnapshotKind, Whole};
use crate::reason::{Reason, Refusal};

/// A whole clip's bytes, without a copy and without a call for each read; they
/// never change, and outlive whatever becomes of clip, cache and daemon.
///
/// Truncation, of which a mapping's reader dies by SIGBUS, is excluded: a copy cannot
/// be cut, and a reflink has no name and is open for writing nowhere.
/// A reflink's pages come from the disk, whose error would be a SIGBUS; where that
/// matters, [`SnapshotMode::Auto`](super::SnapshotMode::Auto) on a file system
/// without reflinks, or reading, is the better choice.
pub struct Mapped(Mmap);

impl Whole {
    /// Maps a snapshot.
    ///
    /// # Errors
    /// [`Reason::Live`] for the cache file itself, which rclone may cut or
    /// overwrite; [`Reason::IoError`] where mmap(2) fails.
    pub fn map(&self) -> Result<Mapped, Refusal> {
        if self.kind == SnapshotKind::Live {
            let detail = "the cache file itself may change: nothing is mapped";
            return Err(Refusal::new(Reason::Live, detail));
        }
        // SAFETY: no process can write to the file or cut it: it is a sealed memfd, or
        // on a read-only mount of its own, or a reflink without a name that was opened
        // for writing by nobody else, is not any more by us, and is immutable where its
        // file system knows that.
        let map = unsafe { Mmap::map(&self.fd) };
        let map = map.map_err(|e| Refusal::from_io("mmap of a snapshot", &e, Reason::IoError))?;
        Ok(Mapped(map))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped").field("len", &self.len()).finish()
    }
}
