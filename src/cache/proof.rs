//! The decision, pure: gathered facts to proven ranges, or a reason.

use crate::cache::ranges::Ranges;
use crate::reason::{Reason, Refusal};

/// A time of day as the kernel and rclone keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 UTC.
    pub seconds: i64,
    /// Nanoseconds, below 1,000,000,000.
    pub nanos: u32,
}

impl Timestamp {
    /// The modification time of a file.
    pub fn modified(file: &std::fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self {
            seconds: file.mtime(),
            nanos: file.mtime_nsec() as u32,
        }
    }
}

/// What the cache's metadata says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Size of the cache file when the metadata was written, bytes.
    pub size: u64,
    /// What is present, up to `size`.
    pub ranges: Ranges,
    /// Whether there are changes that the remote does not have.
    pub dirty: bool,
    /// Which version of the remote file this is; `None`: never tied to one.
    pub fingerprint: Option<Fingerprint>,
}

/// rclone's mark of a remote file's version (fs/fingerprint.go).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// Bytes.
    pub size: u64,
    /// Modification time; absent where the backend has none.
    pub modified: Option<Timestamp>,
}

/// How the data file was tied to the clip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tie {
    /// The daemon holds exactly this inode open for this name.
    HeldByDaemon,
    /// Opened by the path that the mount's source gives, and that path still
    /// led to the same inode afterwards, by a daemon that was started with
    /// `--vfs-cache-mode full`: with another mode it may not read the cache.
    DerivedPath,
    /// Opened by a derived path which then led elsewhere.
    PathMoved,
}

/// What was gathered of one clip, in the order of the protocol's steps.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Whether the mount's superblock is read-only.
    pub read_only: bool,
    /// Which other rclone uses the same cache for the same remote.
    pub shared_with: Option<String>,
    /// FUSE's size, bytes: by path, after the prime.
    pub fuse_size: u64,
    /// FUSE's modification time, likewise.
    pub fuse_modified: Timestamp,
    /// How the data file was found.
    pub tie: Tie,
    /// Size of the data file, bytes.
    pub data_size: u64,
    /// Links of the data file.
    pub data_links: u64,
    /// Type of the cache's file system, statfs(2).
    pub data_fs: i64,
    /// The metadata, read after the data file was opened.
    pub metadata: Metadata,
}

/// What has been proven: these bytes of the data file are FUSE's, as long as
/// the data file stays linked and of this size, and the metadata unchanged.
/// Holes are checked where a range is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The file's size, bytes.
    pub size: u64,
    /// Its modification time.
    pub modified: Timestamp,
    /// What is present.
    pub ranges: Ranges,
}

/// File systems whose SEEK_HOLE tells holes from data, by statfs(2) type. On
/// others (ZFS, NFS, FUSE) everything may read as data.
const SEEK_HOLE_FILE_SYSTEMS: [(i64, &str); 4] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0x0102_1994, "tmpfs"),
];

/// The gates that concern the mount alone.
///
/// # Errors
/// [`Reason::Unsupported`] for a mount on which nothing can be proven.
pub fn check_mount(read_only: bool, shared_with: Option<&str>) -> Result<(), Refusal> {
    let refuse = |detail: String| Err(Refusal::new(Reason::Unsupported, detail));
    if !read_only {
        return refuse("the mount is writable: nothing is proven yet for such mounts".into());
    }
    if let Some(other) = shared_with {
        return refuse(format!(
            "another rclone uses the same cache for the same remote: {other}"
        ));
    }
    Ok(())
}

/// Decides what of a clip may be read from the cache.
///
/// # Errors
/// The first step that does not hold, as a [`Refusal`].
pub fn prove(facts: &Facts) -> Result<Proof, Refusal> {
    let refuse = |reason, detail: String| Err(Refusal::new(reason, detail));
    let meta = &facts.metadata;
    check_mount(facts.read_only, facts.shared_with.as_deref())?;
    if !SEEK_HOLE_FILE_SYSTEMS
        .iter()
        .any(|(magic, _)| *magic == facts.data_fs)
    {
        return refuse(
            Reason::Unsupported,
            format!(
                "the cache's file system (type {:#x}) is not known to report holes",
                facts.data_fs
            ),
        );
    }
    if facts.tie == Tie::PathMoved || facts.data_links == 0 {
        return refuse(Reason::Changed, "the cache file was replaced".into());
    }
    if facts.data_links > 1 {
        return refuse(
            Reason::Unsupported,
            "the cache file has another hard link, which would hide its removal".into(),
        );
    }
    if meta.dirty {
        return refuse(Reason::Dirty, "not uploaded yet".into());
    }
    if meta.size != facts.data_size || facts.data_size != facts.fuse_size {
        return refuse(
            Reason::SizeMismatch,
            format!(
                "size by fuse {}, by metadata {}, of the cache file {}",
                facts.fuse_size, meta.size, facts.data_size
            ),
        );
    }
    let Some(fingerprint) = &meta.fingerprint else {
        return refuse(Reason::StaleMetadata, "no fingerprint".into());
    };
    let Some(modified) = fingerprint.modified else {
        return refuse(
            Reason::StaleMetadata,
            "the fingerprint has no modification time".into(),
        );
    };
    if fingerprint.size != facts.fuse_size || modified != facts.fuse_modified {
        return refuse(
            Reason::StaleMetadata,
            format!(
                "fingerprint of {} bytes at {}.{:09}, fuse shows {} bytes at {}.{:09}",
                fingerprint.size,
                modified.seconds,
                modified.nanos,
                facts.fuse_size,
                facts.fuse_modified.seconds,
                facts.fuse_modified.nanos
            ),
        );
    }
    if meta.ranges.spans().is_empty() {
        return refuse(Reason::NoMetadata, "no range is cached".into());
    }
    Ok(Proof {
        size: facts.fuse_size,
        modified: facts.fuse_modified,
        ranges: meta.ranges.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIME: Timestamp = Timestamp {
        seconds: 1_700_000_000,
        nanos: 5,
    };

    fn good() -> Facts {
        Facts {
            read_only: true,
            shared_with: None,
            fuse_size: 100,
            fuse_modified: TIME,
            tie: Tie::HeldByDaemon,
            data_size: 100,
            data_links: 1,
            data_fs: 0xef53,
            metadata: Metadata {
                size: 100,
                ranges: Ranges::from_sorted(&[(0, 40), (60, 40)], 100).unwrap(),
                dirty: false,
                fingerprint: Some(Fingerprint {
                    size: 100,
                    modified: Some(TIME),
                }),
            },
        }
    }

    #[test]
    fn good_facts_prove_the_ranges() {
        let proof = prove(&good()).unwrap();
        assert_eq!(proof.ranges.bytes(), 80);
        assert_eq!(proof.size, 100);
    }

    #[test]
    fn each_gate_refuses_by_itself() {
        type Break = fn(&mut Facts);
        let cases: [(Reason, Break); 17] = [
            (Reason::Unsupported, |f| f.read_only = false),
            (Reason::Unsupported, |f| {
                f.shared_with = Some("pid 1".into());
            }),
            (Reason::Unsupported, |f| f.data_fs = 0x6573_5546),
            (Reason::Changed, |f| f.tie = Tie::PathMoved),
            (Reason::Changed, |f| f.data_links = 0),
            (Reason::Unsupported, |f| f.data_links = 2),
            (Reason::Dirty, |f| f.metadata.dirty = true),
            (Reason::SizeMismatch, |f| f.metadata.size = 99),
            (Reason::SizeMismatch, |f| f.data_size = 101),
            (Reason::SizeMismatch, |f| f.fuse_size = 101),
            (Reason::SizeMismatch, |f| {
                f.fuse_size = 1;
                f.metadata.size = 1;
            }),
            (Reason::StaleMetadata, |f| f.metadata.fingerprint = None),
            (Reason::StaleMetadata, |f| {
                f.metadata.fingerprint.as_mut().unwrap().modified = None;
            }),
            (Reason::StaleMetadata, |f| {
                f.metadata.fingerprint.as_mut().unwrap().size = 99;
            }),
            (Reason::StaleMetadata, |f| f.fuse_modified.nanos += 1),
            (Reason::StaleMetadata, |f| f.fuse_modified.seconds -= 1),
            (Reason::NoMetadata, |f| {
                f.metadata.ranges = Ranges::default();
            }),
        ];
        for (index, (reason, damage)) in cases.into_iter().enumerate() {
            let mut facts = good();
            damage(&mut facts);
            let refusal = prove(&facts).expect_err("a broken fact must refuse");
            assert_eq!(refusal.reason, reason, "case {index}: {refusal}");
        }
    }

    proptest! {
        /// Whatever the facts, a proof implies every gate.
        #[test]
        fn a_proof_implies_every_gate(
            read_only: bool, shared_cache: bool, dirty: bool,
            sizes in prop::array::uniform4(99u64..101),
            links in 0u64..3,
            nanos in 4u32..6,
            tie in prop::sample::select(vec![Tie::HeldByDaemon, Tie::DerivedPath, Tie::PathMoved]),
            fs in prop::sample::select(vec![0xef53i64, 0x5846_5342, 0x6573_5546, 0]),
        ) {
            let mut facts = good();
            facts.read_only = read_only;
            facts.shared_with = shared_cache.then(|| "pid 1".into());
            facts.metadata.dirty = dirty;
            facts.fuse_size = sizes[0];
            facts.data_size = sizes[1];
            facts.metadata.size = sizes[2];
            facts.metadata.fingerprint.as_mut().unwrap().size = sizes[3];
            facts.data_links = links;
            facts.fuse_modified.nanos = nanos;
            facts.tie = tie;
            facts.data_fs = fs;
            let holds = read_only
                && !shared_cache
                && !dirty
                && sizes.iter().all(|s| *s == sizes[0])
                && links == 1
                && nanos == TIME.nanos
                && tie != Tie::PathMoved
                && fs != 0x6573_5546
                && fs != 0;
            prop_assert_eq!(prove(&facts).is_ok(), holds);
        }
    }
}
