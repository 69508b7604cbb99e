//! The decision, pure: gathered facts to proven ranges, or a reason.

use std::fmt;

use crate::cache::ranges::Ranges;
use crate::cache::trail::{Gate, Trail};
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

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}", self.seconds, self.nanos)
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

/// What is known of a mount before anything is asked of rclone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountFacts {
    /// Whether the mount's superblock is read-only.
    pub read_only: bool,
    /// Which other rclone uses the same cache for the same remote.
    pub shared_with: Option<String>,
    /// The running kernel's version, major and minor.
    pub kernel: (u32, u32),
}

/// What is gathered on a writable mount alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WritableFacts {
    /// Whether data file, metadata and FUSE's view were the same once more
    /// after the rename barrier: a lookup in the clip's folder, which rclone
    /// answers only when no rename in it is under way.
    pub settled: bool,
    /// Pages of the clip that programs have changed and rclone has not got.
    pub unwritten_pages: u64,
}

/// What was gathered of one clip, in the order of the protocol's steps.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The mount.
    pub mount: MountFacts,
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
    /// The granularity at which that file system tells holes, bytes.
    pub data_block: u64,
    /// The metadata, read after the data file was opened.
    pub metadata: Metadata,
    /// Whether the reader itself has pulled bytes through FUSE: it may add
    /// ranges that the metadata does not list yet.
    pub pulled: bool,
    /// Gathered where the mount is writable.
    pub writable: Option<WritableFacts>,
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
    /// What the metadata lists as present.
    pub listed: Ranges,
    /// What may be read: `listed`, on a writable mount without the blocks at
    /// the edges of each range, which may be there in part.
    pub ranges: Ranges,
    /// The granularity of holes, bytes: at the edges of what the data file
    /// has, a block of this size may be there in part.
    pub block: u64,
    /// Whether programs may change the clip through the mount: the metadata
    /// and the kernel's pages are then looked at around every read.
    pub writable: bool,
}

/// File systems whose SEEK_HOLE tells holes from data, by statfs(2) type. On
/// others (ZFS, NFS, FUSE) everything may read as data.
const SEEK_HOLE_FILE_SYSTEMS: [(i64, &str); 4] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0x0102_1994, "tmpfs"),
];

/// From Linux 6.16 on, a page that is on its way to a FUSE daemon counts as
/// under writeback until the daemon has it (kernel commit 0c58a97f919c, "fuse:
/// remove tmp folio for writebacks and internal rb tree"); before, cachestat(2)
/// shows it as clean while the cache file still has the old bytes.
const WRITEBACK_IS_SEEN: (u32, u32) = (6, 16);

/// What a gate found: its evidence, or why it does not hold.
pub type Found = Result<String, Refusal>;

fn refuse<T>(reason: Reason, detail: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(reason, detail))
}

/// The gates that concern the mount alone.
///
/// # Errors
/// [`Reason::Unsupported`] for a mount on which nothing can be proven.
pub fn check_mount(mount: &MountFacts, trail: &mut Trail) -> Result<(), Refusal> {
    trail.note(Gate::Access, access(mount))?;
    trail.note(Gate::NotShared, not_shared(mount))
}

/// Whether a mount of this kind, read-only or writable, can be proven here.
fn access(mount: &MountFacts) -> Found {
    let (major, minor) = mount.kernel;
    if mount.read_only {
        Ok("read-only".into())
    } else if mount.kernel >= WRITEBACK_IS_SEEN {
        Ok(format!("writable, linux {major}.{minor}"))
    } else {
        refuse(
            Reason::Unsupported,
            format!(
                "the mount is writable, and before linux 6.16 changed pages on their way to \
                 rclone cannot be seen; this is {major}.{minor}"
            ),
        )
    }
}

/// Whether the cache is its daemon's alone.
fn not_shared(mount: &MountFacts) -> Found {
    match &mount.shared_with {
        None => Ok("no other rclone has this remote in this cache".into()),
        Some(other) => refuse(
            Reason::Unsupported,
            format!("another rclone uses the same cache for the same remote: {other}"),
        ),
    }
}

fn file_system(facts: &Facts) -> Found {
    check_file_system(facts.data_fs)
}

/// Whether a file system, by its statfs(2) type, tells holes.
///
/// # Errors
/// [`Reason::Unsupported`] where it is not known to.
pub fn check_file_system(magic: i64) -> Found {
    let known = SEEK_HOLE_FILE_SYSTEMS
        .iter()
        .find(|(known, _)| *known == magic);
    match known {
        Some((_, name)) => Ok((*name).into()),
        None => refuse(
            Reason::Unsupported,
            format!("the cache's file system (type {magic:#x}) is not known to report holes"),
        ),
    }
}

fn links(facts: &Facts) -> Found {
    match (facts.tie, facts.data_links) {
        (Tie::PathMoved, _) | (_, 0) => refuse(Reason::Changed, "the cache file was replaced"),
        (_, 1) => Ok("one link".into()),
        _ => refuse(
            Reason::Unsupported,
            "the cache file has another hard link, which would hide its removal",
        ),
    }
}

fn clean(facts: &Facts) -> Found {
    if facts.metadata.dirty {
        refuse(Reason::Dirty, "not uploaded yet")
    } else {
        Ok("nothing to upload".into())
    }
}

fn size(facts: &Facts) -> Found {
    let (fuse, metadata, data) = (facts.fuse_size, facts.metadata.size, facts.data_size);
    if metadata == data && data == fuse {
        Ok(format!("{fuse} bytes"))
    } else {
        refuse(
            Reason::SizeMismatch,
            format!("size by fuse {fuse}, by metadata {metadata}, of the cache file {data}"),
        )
    }
}

fn version(facts: &Facts) -> Found {
    let Some(fingerprint) = &facts.metadata.fingerprint else {
        return refuse(Reason::StaleMetadata, "no fingerprint");
    };
    let Some(modified) = fingerprint.modified else {
        return refuse(
            Reason::StaleMetadata,
            "the fingerprint has no modification time",
        );
    };
    if fingerprint.size == facts.fuse_size && modified == facts.fuse_modified {
        return Ok(format!("fingerprint and fuse agree on {modified}"));
    }
    refuse(
        Reason::StaleMetadata,
        format!(
            "fingerprint of {} bytes at {modified}, fuse shows {} bytes at {}",
            fingerprint.size, facts.fuse_size, facts.fuse_modified
        ),
    )
}

fn ranges(facts: &Facts) -> Found {
    let ranges = &facts.metadata.ranges;
    if ranges.spans().is_empty() && !facts.pulled {
        return refuse(Reason::NoMetadata, "no range is cached");
    }
    Ok(format!(
        "{} bytes in {} ranges",
        ranges.bytes(),
        ranges.spans().len()
    ))
}

fn settled(facts: &Facts) -> Found {
    match facts.writable {
        _ if facts.mount.read_only => Ok("not needed: the mount is read-only".into()),
        Some(WritableFacts { settled: true, .. }) => {
            Ok("the same again after the rename barrier".into())
        }
        _ => refuse(
            Reason::Changed,
            "the clip changed, or was renamed, while it was looked at",
        ),
    }
}

fn page_cache(facts: &Facts) -> Found {
    match facts.writable {
        _ if facts.mount.read_only => Ok("not needed: the mount is read-only".into()),
        Some(WritableFacts {
            unwritten_pages: 0, ..
        }) => Ok("no page waits to be written".into()),
        found => refuse(
            Reason::Dirty,
            format!(
                "{} changed pages have not reached rclone",
                found.map_or(0, |found| found.unwritten_pages)
            ),
        ),
    }
}

/// Decides what of a clip may be read from the cache, and tells `trail` of
/// each gate.
///
/// # Errors
/// The first step that does not hold, as a [`Refusal`].
pub fn prove(facts: &Facts, trail: &mut Trail) -> Result<Proof, Refusal> {
    type Check = fn(&Facts) -> Found;
    let gates: [(Gate, Check); 10] = [
        (Gate::Access, |facts| access(&facts.mount)),
        (Gate::NotShared, |facts| not_shared(&facts.mount)),
        (Gate::FileSystem, file_system),
        (Gate::Links, links),
        (Gate::Clean, clean),
        (Gate::Size, size),
        (Gate::Version, version),
        (Gate::Ranges, ranges),
        (Gate::Settled, settled),
        (Gate::PageCache, page_cache),
    ];
    // All of them, for those who want to know each.
    let mut refused = None;
    for (gate, check) in gates {
        let found = trail.note(gate, check(facts));
        refused = refused.or(found.err());
    }
    refused.map_or_else(
        || {
            let listed = facts.metadata.ranges.clone();
            let writable = !facts.mount.read_only;
            Ok(Proof {
                size: facts.fuse_size,
                modified: facts.fuse_modified,
                ranges: if writable {
                    listed.inner(facts.data_block)
                } else {
                    listed.clone()
                },
                listed,
                block: facts.data_block,
                writable,
            })
        },
        Err,
    )
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
            mount: MountFacts {
                read_only: true,
                shared_with: None,
                kernel: (5, 15),
            },
            fuse_size: 100,
            fuse_modified: TIME,
            tie: Tie::HeldByDaemon,
            data_size: 100,
            data_links: 1,
            data_fs: 0xef53,
            data_block: 10,
            metadata: Metadata {
                size: 100,
                ranges: Ranges::from_sorted(&[(0, 40), (60, 40)], 100).unwrap(),
                dirty: false,
                fingerprint: Some(Fingerprint {
                    size: 100,
                    modified: Some(TIME),
                }),
            },
            pulled: false,
            writable: None,
        }
    }

    fn good_writable() -> Facts {
        let mut facts = good();
        facts.mount.read_only = false;
        facts.mount.kernel = (6, 16);
        facts.writable = Some(WritableFacts {
            settled: true,
            unwritten_pages: 0,
        });
        facts
    }

    fn decide(facts: &Facts) -> Result<Proof, Refusal> {
        prove(facts, &mut Trail::off())
    }

    #[test]
    fn good_facts_prove_the_ranges() {
        let proof = decide(&good()).unwrap();
        assert_eq!(proof.ranges.bytes(), 80);
        assert_eq!((proof.size, proof.writable), (100, false));
        // On a writable mount without the blocks at the edges.
        let proof = decide(&good_writable()).unwrap();
        assert_eq!(proof.ranges.bytes(), 40);
        assert!(proof.writable && proof.listed.bytes() == 80);
    }

    #[test]
    fn each_gate_refuses_by_itself() {
        type Break = fn(&mut Facts);
        let both: [(Reason, Break); 16] = [
            (Reason::Unsupported, |f| {
                f.mount.shared_with = Some("pid 1".into());
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
        let writable: [(Reason, Break); 5] = [
            (Reason::Unsupported, |f| f.mount.kernel = (6, 15)),
            (Reason::Unsupported, |f| f.mount.kernel = (5, 99)),
            (Reason::Changed, |f| {
                f.writable.as_mut().unwrap().settled = false;
            }),
            (Reason::Dirty, |f| {
                f.writable.as_mut().unwrap().unwritten_pages = 1;
            }),
            (Reason::Changed, |f| f.writable = None),
        ];
        let cases = both.iter().map(|case| (good(), case));
        let cases = cases.chain(both.iter().chain(&writable).map(|c| (good_writable(), c)));
        for (index, (mut facts, (reason, damage))) in cases.enumerate() {
            damage(&mut facts);
            let refusal = decide(&facts).expect_err("a broken fact must refuse");
            assert_eq!(refusal.reason, *reason, "case {index}: {refusal}");
        }
    }

    #[test]
    fn the_trail_has_every_gate_once() {
        let mut trail = Trail::on();
        let mut facts = good();
        facts.metadata.dirty = true;
        facts.metadata.fingerprint = None;
        let refusal = prove(&facts, &mut trail).unwrap_err();
        assert_eq!(refusal.reason, Reason::Dirty);
        let steps = trail.into_steps();
        let failed = steps.iter().filter(|step| step.found.is_err());
        let failed: Vec<Gate> = failed.map(|step| step.gate).collect();
        assert_eq!(failed, [Gate::Clean, Gate::Version]);
        let mut sorted = steps.clone();
        sorted.sort_by_key(|step| Gate::ALL.iter().position(|gate| *gate == step.gate));
        assert_eq!(steps, sorted);
        assert_eq!(steps.len(), 10);
    }

    proptest! {
        /// Whatever the facts, a proof implies every gate, and is of what the
        /// metadata lists.
        #[test]
        fn a_proof_implies_every_gate(
            read_only: bool, shared_cache: bool, dirty: bool, pulled: bool, empty: bool,
            sizes in prop::array::uniform4(99u64..101),
            links in 0u64..3,
            nanos in 4u32..6,
            tie in prop::sample::select(vec![Tie::HeldByDaemon, Tie::DerivedPath, Tie::PathMoved]),
            fs in prop::sample::select(vec![0xef53i64, 0x5846_5342, 0x6573_5546, 0]),
            kernel in (5u32..8, 14u32..18),
            settled in prop::option::of((any::<bool>(), 0u64..2)),
        ) {
            let mut facts = good();
            facts.mount = MountFacts {
                read_only,
                shared_with: shared_cache.then(|| "pid 1".into()),
                kernel,
            };
            facts.writable = settled.map(|(settled, unwritten_pages)| WritableFacts {
                settled,
                unwritten_pages,
            });
            facts.pulled = pulled;
            facts.metadata.dirty = dirty;
            if empty {
                facts.metadata.ranges = Ranges::default();
            }
            facts.fuse_size = sizes[0];
            facts.data_size = sizes[1];
            facts.metadata.size = sizes[2];
            facts.metadata.fingerprint.as_mut().unwrap().size = sizes[3];
            facts.data_links = links;
            facts.fuse_modified.nanos = nanos;
            facts.tie = tie;
            facts.data_fs = fs;
            let new_enough = kernel.0 > 6 || (kernel.0 == 6 && kernel.1 >= 16);
            let holds = (read_only || (new_enough && settled == Some((true, 0))))
                && !shared_cache
                && !dirty
                && (pulled || !empty)
                && sizes.iter().all(|s| *s == sizes[0])
                && links == 1
                && nanos == TIME.nanos
                && tie != Tie::PathMoved
                && fs != 0x6573_5546
                && fs != 0;
            let proof = decide(&facts);
            prop_assert_eq!(proof.is_ok(), holds);
            if let Ok(proof) = proof {
                prop_assert_eq!(&proof.listed, &facts.metadata.ranges);
                prop_assert_eq!(proof.writable, !read_only);
                let expected = match (empty, read_only) {
                    (true, _) => 0,
                    (false, true) => 80,
                    (false, false) => 40,
                };
                prop_assert_eq!(proof.ranges.bytes(), expected);
            }
        }
    }
}
