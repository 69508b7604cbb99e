//! rclone's VFS disk cache: where it is, what its metadata says, and the facts
//! that a proof needs.
//!
//! Layout (vfs/vfscache/cache.go): data in `<cache>/vfs/<Name>/<Root>/<path>`,
//! metadata in `<cache>/vfsMeta/` with the same tail.

mod daemon;
mod facts;
mod hidden;
mod locate;
mod locator;
mod metadata;
mod names;
mod sharing;
mod start;

pub use daemon::Daemon;
pub(crate) use facts::{Clip, FuseFile, gather, no_cachestat};
pub use locate::{Folders, Located, mount_facts};
pub use locator::Locator;
#[cfg(feature = "mount")]
pub(crate) use metadata::fingerprint_mark;
pub use metadata::parse as parse_metadata;
pub(crate) use metadata::{MetadataFile, is_same_version, read_metadata};

use std::fs;
use std::path::Path;

use crate::cache::proof::{Metadata, Timestamp};
use crate::cache::ranges::Ranges;
use crate::reason::{Reason, Refusal};

/// What the metadata alone says of a clip: an estimate, for display. It proves
/// nothing, opens nothing through FUSE and may lag: rclone writes metadata when
/// a file is opened and after its last close, not while it downloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes that the metadata lists as present.
    pub cached_bytes: Option<u64>,
    /// `None`: all of it seems cached and current (`active`).
    pub state: Option<Reason>,
    /// What the metadata lists as present.
    pub ranges: Ranges,
}

impl Estimate {
    /// Nothing is known, for this reason.
    pub fn unknown(reason: Reason) -> Self {
        Self {
            cached_bytes: None,
            state: Some(reason),
            ranges: Ranges::default(),
        }
    }
}

/// Estimates how much of a clip is cached. `inside` is its path inside the
/// mount, `size` FUSE's size in bytes.
#[must_use]
pub fn estimate(folders: &Folders, inside: &Path, size: u64) -> Estimate {
    let metadata = match listing(folders, inside) {
        Ok(metadata) => metadata,
        Err(refusal) if refusal.reason == Reason::NoMetadata => {
            return Estimate {
                cached_bytes: Some(0),
                state: (size > 0).then_some(Reason::NoMetadata),
                ranges: Ranges::default(),
            };
        }
        Err(refusal) => return Estimate::unknown(refusal.reason),
    };
    Estimate {
        cached_bytes: Some(metadata.ranges.bytes()),
        state: seems(&metadata, size),
        ranges: metadata.ranges,
    }
}

/// The state of a clip of FUSE's `size` by its metadata alone.
fn seems(metadata: &Metadata, size: u64) -> Option<Reason> {
    let cached = metadata.ranges.bytes();
    let fingerprint = metadata.fingerprint.as_ref();
    if metadata.dirty {
        Some(Reason::Dirty)
    } else if metadata.size != size {
        Some(Reason::SizeMismatch)
    } else if cached > 0 && fingerprint.is_some_and(|f| f.modified.is_none()) {
        // No proof can be had. Without any fingerprint one may: rclone 1.60
        // writes it when the clip is opened once more.
        Some(Reason::StaleMetadata)
    } else {
        (cached < size).then_some(Reason::Partial)
    }
}

/// What the metadata of a clip says.
fn listing(folders: &Folders, inside: &Path) -> Result<Metadata, Refusal> {
    names::check(inside)?;
    let file = read_metadata(&folders.metadata_path(inside))?;
    metadata::parse(&file.bytes)
}

/// What seems to be cached of the version of a clip that FUSE shows: as
/// [`estimate`], but nothing of another version counts, nor of a cache file
/// that is not there or of another size. Opens nothing but the metadata.
///
/// With the ranges comes why they are not the whole clip, or cannot be told.
#[must_use]
pub fn present(
    folders: &Folders,
    inside: &Path,
    size: u64,
    modified: Timestamp,
) -> (Ranges, Option<Refusal>) {
    let nothing = |refusal| (Ranges::default(), Some(refusal));
    if size == 0 {
        return (Ranges::default(), None);
    }
    let metadata = match listing(folders, inside) {
        Ok(metadata) => metadata,
        Err(refusal) => return nothing(refusal),
    };
    let data = folders.data_path(inside);
    let data_size = match fs::metadata(&data) {
        Ok(found) => found.len(),
        Err(e) => {
            let otherwise = match e.kind() {
                std::io::ErrorKind::NotFound => Reason::NoCacheFile,
                _ => Reason::IoError,
            };
            let what = format_args!("`{}`", data.display());
            return nothing(Refusal::from_io(what, &e, otherwise));
        }
    };
    current(&metadata, data_size, size, modified)
}

/// As [`present`], of what was read: pure.
fn current(
    metadata: &Metadata,
    data_size: u64,
    size: u64,
    modified: Timestamp,
) -> (Ranges, Option<Refusal>) {
    let refuse = |reason, detail: String| Some(Refusal::new(reason, detail));
    let ranges = metadata.ranges.clone();
    if metadata.dirty {
        return (ranges, refuse(Reason::Dirty, "not uploaded yet".into()));
    }
    // A backend without times has a fingerprint without one.
    let same_version = metadata
        .fingerprint
        .as_ref()
        .is_some_and(|f| f.size == size && f.modified.is_none_or(|time| time == modified));
    if !same_version {
        let detail = "the metadata is of another version than fuse shows";
        return (
            Ranges::default(),
            refuse(Reason::StaleMetadata, detail.into()),
        );
    }
    if metadata.size != size || data_size != size {
        let of = metadata.size;
        let detail =
            format!("size by fuse {size}, by metadata {of}, of the cache file {data_size}");
        return (Ranges::default(), refuse(Reason::SizeMismatch, detail));
    }
    let cached = ranges.bytes();
    let short = cached < size;
    let detail = || format!("the metadata lists {cached} of {size} bytes");
    (
        ranges,
        short.then(|| Refusal::new(Reason::Partial, detail())),
    )
}

impl Located {
    /// Whether the daemon's arguments or environment say that it caches what
    /// is read, `--vfs-cache-mode full`; it may have been told otherwise than
    /// by these.
    #[must_use]
    pub fn says_it_caches_reads(&self) -> bool {
        self.cache_mode_full
    }

    /// The size that the daemon keeps its cache below, `--vfs-cache-max-size`;
    /// `None` where there is no such limit, or it does not show it.
    #[must_use]
    pub fn cache_limit(&self) -> Option<u64> {
        let option = self.daemon.start().ok()?.option("vfs-cache-max-size")?;
        parse_size_suffix(option.to_str()?)
    }
}

/// rclone's sizes (fs/sizesuffix.go): `10G`, `1.5GiB`, `off`; a number alone
/// is KiB.
fn parse_size_suffix(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "b" => 0,
        "" | "k" | "ki" | "kib" => 10,
        "m" | "mi" | "mib" => 20,
        "g" | "gi" | "gib" => 30,
        "t" | "ti" | "tib" => 40,
        "p" | "pi" | "pib" => 50,
        "e" | "ei" | "eib" => 60,
        _ => return None,
    };
    let number: f64 = digits.parse().ok()?;
    // Less than nothing is `off`, too.
    (number >= 0.0).then(|| (number * (1_u64 << shift) as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::proof::Fingerprint;

    const TIME: Timestamp = Timestamp {
        seconds: 1_700_000_000,
        nanos: 5,
    };

    fn whole() -> Metadata {
        Metadata {
            size: 100,
            ranges: Ranges::from_sorted(&[(0, 100)], 100).unwrap(),
            dirty: false,
            fingerprint: Some(Fingerprint {
                size: 100,
                modified: Some(TIME),
            }),
        }
    }

    #[test]
    fn a_clip_seems_to_be_what_its_metadata_tells() {
        assert_eq!(seems(&whole(), 100), None);
        assert_eq!(seems(&whole(), 101), Some(Reason::SizeMismatch));
        let changed = |change: fn(&mut Metadata)| {
            let mut metadata = whole();
            change(&mut metadata);
            seems(&metadata, 100)
        };
        assert_eq!(changed(|m| m.dirty = true), Some(Reason::Dirty));
        assert_eq!(changed(|m| m.fingerprint = None), None);
        let timeless = |m: &mut Metadata| m.fingerprint.as_mut().unwrap().modified = None;
        assert_eq!(changed(timeless), Some(Reason::StaleMetadata));
        let partial = |m: &mut Metadata| m.ranges = Ranges::from_sorted(&[(0, 60)], 100).unwrap();
        assert_eq!(changed(partial), Some(Reason::Partial));
        let nothing = |m: &mut Metadata| {
            m.ranges = Ranges::default();
            m.fingerprint.as_mut().unwrap().modified = None;
        };
        assert_eq!(changed(nothing), Some(Reason::Partial));
    }

    #[test]
    fn only_bytes_of_the_version_that_fuse_shows_count() {
        type Change = fn(&mut Metadata);
        let cases: [(Change, u64, Option<Reason>); 7] = [
            (|_| (), 100, None),
            (|m| m.dirty = true, 100, Some(Reason::Dirty)),
            (
                |m| m.ranges = Ranges::from_sorted(&[(0, 60)], 100).unwrap(),
                60,
                Some(Reason::Partial),
            ),
            (|m| m.fingerprint = None, 0, Some(Reason::StaleMetadata)),
            (
                |m| {
                    m.fingerprint
                        .as_mut()
                        .unwrap()
                        .modified
                        .as_mut()
                        .unwrap()
                        .nanos = 6;
                },
                0,
                Some(Reason::StaleMetadata),
            ),
            (|m| m.size = 99, 0, Some(Reason::SizeMismatch)),
            (
                |m| m.fingerprint.as_mut().unwrap().modified = None,
                100,
                None,
            ),
        ];
        for (index, (change, bytes, reason)) in cases.into_iter().enumerate() {
            let mut metadata = whole();
            change(&mut metadata);
            let (ranges, refusal) = current(&metadata, 100, 100, TIME);
            let found = (ranges.bytes(), refusal.map(|r| r.reason));
            assert_eq!(found, (bytes, reason), "case {index}");
        }
        let (ranges, refusal) = current(&whole(), 99, 100, TIME);
        assert!(ranges.spans().is_empty());
        assert_eq!(refusal.unwrap().reason, Reason::SizeMismatch);
    }

    #[test]
    fn sizes_are_read_as_rclone_reads_them() {
        for (text, bytes) in [
            ("off", None),
            ("-1", None),
            ("0", Some(0)),
            ("100", Some(100 << 10)),
            ("1b", Some(1)),
            ("10M", Some(10 << 20)),
            ("1.5GiB", Some(3 << 29)),
            ("2ti", Some(2 << 40)),
            ("G", None),
            ("", None),
        ] {
            assert_eq!(parse_size_suffix(text), bytes, "{text}");
        }
    }
}
