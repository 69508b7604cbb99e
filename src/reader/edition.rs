//! Which bytes an open file has: for who keeps what was read.

use std::io;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, StatxFlags};

use super::BypassFile;
use super::epoch::Epoch;
use super::state::State;
use crate::cache::proof::Timestamp;

/// A version of a file, and the cache file that its bytes are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edition {
    size: u64,
    modified: Timestamp,
    /// Of rclone's fingerprint, which may have a hash of the bytes.
    mark: Option<u64>,
    data: Option<DataFile>,
}

/// A file, told from any later one of the same number by when it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DataFile {
    dev: (u32, u32),
    ino: u64,
    made: (i64, u32),
}

impl Edition {
    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn modified(&self) -> Timestamp {
        self.modified
    }

    /// Whether another of equal value has the same bytes. A version alone does
    /// not tell: a clip may be replaced by one of the same size and time.
    pub(crate) fn is_certain(&self) -> bool {
        self.data.is_some()
    }

    /// Whether another is of the same size and time, and nothing else tells them
    /// apart.
    pub(crate) fn is_same_version(&self, other: &Self) -> bool {
        let differ = |(own, other)| own != other;
        (self.size, self.modified) == (other.size, other.modified)
            && !self.mark.zip(other.mark).is_some_and(differ)
    }

    #[cfg(test)]
    pub(crate) fn for_tests(size: u64, modified: Timestamp, ino: u64) -> Self {
        let data = DataFile {
            dev: (0, 1),
            ino,
            made: (0, 0),
        };
        Self {
            data: Some(data),
            ..Self::uncertain_for_tests(size, modified)
        }
    }

    #[cfg(test)]
    pub(crate) fn uncertain_for_tests(size: u64, modified: Timestamp) -> Self {
        Self {
            size,
            modified,
            mark: None,
            data: None,
        }
    }
}

impl BypassFile {
    /// What reads are of at the moment, and the generation that it holds for.
    ///
    /// # Errors
    /// Those of statx(2) through FUSE.
    pub(crate) fn edition(&self) -> io::Result<(Edition, u64)> {
        // First: what ends a proof meanwhile counts as later.
        let generation = self.generation();
        let edition = match &**self.state.load() {
            State::Active(epoch) if epoch.check_data().is_ok() => {
                let (size, modified) = epoch.version();
                Edition {
                    size,
                    modified,
                    mark: epoch.mark(),
                    data: data_file(epoch),
                }
            }
            _ => {
                let (size, modified) = self.companion.version_now()?;
                Edition {
                    size,
                    modified,
                    mark: None,
                    data: None,
                }
            }
        };
        Ok((edition, generation))
    }

    /// Bytes that came through FUSE up to now.
    pub(crate) fn fuse_bytes(&self) -> u64 {
        self.counters.fuse()
    }

    /// Whether the file that is read past FUSE is the clip's to this moment; false
    /// while there is none.
    pub(crate) fn is_proven_still(&self) -> bool {
        match &**self.state.load() {
            State::Active(epoch) => epoch.check_data().is_ok(),
            State::Fuse { .. } => false,
        }
    }

    /// Changes with each proof that begins or ends: while it is the same, and
    /// [`edition`](Self::edition) was certain, so were all bytes that were read.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// `None` on writable mounts, where bytes change in place, and where the file
/// system does not tell when a file was made.
fn data_file(epoch: &Epoch) -> Option<DataFile> {
    if epoch.is_writable() {
        return None;
    }
    let wanted = StatxFlags::INO | StatxFlags::BTIME;
    let stat = rustix::fs::statx(epoch.data(), "", AtFlags::EMPTY_PATH, wanted).ok()?;
    StatxFlags::from_bits_retain(stat.stx_mask)
        .contains(wanted)
        .then_some(DataFile {
            dev: (stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            made: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
        })
}
