//! rclone's VFS disk cache: where it is, what its metadata says, and the facts
//! that a proof needs.
//!
//! Layout (vfs/vfscache/cache.go): data in `<cache>/vfs/<Name>/<Root>/<path>`,
//! metadata in `<cache>/vfsMeta/` with the same tail.

mod daemon;
mod facts;
mod locate;
mod metadata;
mod names;

pub use daemon::Daemon;
pub(crate) use facts::{Clip, FuseFile, gather, no_cachestat};
pub use locate::{Folders, Located, Locator, mount_facts};
pub use metadata::parse as parse_metadata;
pub(crate) use metadata::{MetadataFile, read_metadata};

use std::path::Path;

use crate::reason::Reason;

/// What the metadata alone says of a clip: an estimate, for display. It proves
/// nothing, opens nothing through FUSE and may lag: rclone writes metadata when
/// a file is opened and after its last close, not while it downloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes that the metadata lists as present.
    pub cached_bytes: Option<u64>,
    /// `None`: all of it seems cached and current (`active`).
    pub state: Option<Reason>,
}

impl Estimate {
    /// Nothing is known, for this reason.
    pub fn unknown(reason: Reason) -> Self {
        Self {
            cached_bytes: None,
            state: Some(reason),
        }
    }
}

/// Estimates how much of a clip is cached. `inside` is its path inside the
/// mount, `size` FUSE's size in bytes.
#[must_use]
pub fn estimate(folders: &Folders, inside: &Path, size: u64) -> Estimate {
    let metadata = names::check(inside)
        .and_then(|()| read_metadata(&folders.metadata_path(inside)))
        .and_then(|file| metadata::parse(&file.bytes));
    let metadata = match metadata {
        Ok(metadata) => metadata,
        Err(refusal) if refusal.reason == Reason::NoMetadata => {
            return Estimate {
                cached_bytes: Some(0),
                state: (size > 0).then_some(Reason::NoMetadata),
            };
        }
        Err(refusal) => return Estimate::unknown(refusal.reason),
    };
    let cached = metadata.ranges.bytes();
    let state = if metadata.dirty {
        Some(Reason::Dirty)
    } else if metadata.size != size {
        Some(Reason::SizeMismatch)
    } else if cached < size {
        Some(Reason::Partial)
    } else {
        None
    };
    Estimate {
        cached_bytes: Some(cached),
        state,
    }
}
