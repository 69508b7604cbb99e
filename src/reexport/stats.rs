//! What was opened and read, and by which way.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::reader::ReadStats;
use crate::reason::{Reason, Refusal};
use crate::snapshot::SnapshotKind;

/// How a clip is read that was opened below a mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By the kernel, from this kind of snapshot.
    Passthrough(SnapshotKind),
    /// By proven ranges, the kernel keeping pages.
    Ranges,
    /// By proven ranges, the kernel keeping none: the source is writable.
    Direct,
}

impl Way {
    /// The contract's name, `snake_case`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Passthrough(kind) => kind.name(),
            Self::Ranges => "ranges",
            Self::Direct => "direct",
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Passthrough(kind) => kind as usize,
            Self::Ranges => SnapshotKind::ALL.len(),
            Self::Direct => SnapshotKind::ALL.len() + 1,
        }
    }

    /// Every way there is.
    pub fn all() -> impl Iterator<Item = Self> {
        let kinds = SnapshotKind::ALL.iter();
        let passed = kinds.map(|kind| Self::Passthrough(*kind));
        passed.chain([Self::Ranges, Self::Direct])
    }
}

/// Ways there are.
const WAYS: usize = SnapshotKind::ALL.len() + 2;

/// Counts of one mount, from its start on. What the kernel reads by passthrough
/// is in no count of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Clips opened, by their way.
    pub opens: BTreeMap<&'static str, u64>,
    /// Opens that failed.
    pub failed: u64,
    /// Why opens were not by passthrough, if not for the whole mount.
    pub by_reason: BTreeMap<Reason, u64>,
    /// Bytes that came from the cache, by ranges.
    pub cache_bytes: u64,
    /// Bytes that came through rclone's mount, by ranges.
    pub fuse_bytes: u64,
    /// Of these, why.
    pub fuse_by_reason: BTreeMap<Reason, u64>,
    /// Reads that failed: of the source, or because the clip had changed.
    pub failed_reads: u64,
}

impl Stats {
    /// Opens by passthrough.
    #[must_use]
    pub fn passed(&self) -> u64 {
        let kinds = SnapshotKind::ALL.iter();
        kinds.filter_map(|kind| self.opens.get(kind.name())).sum()
    }
}

#[derive(Default)]
pub(super) struct Counters {
    opens: [AtomicU64; WAYS],
    failed: AtomicU64,
    by_reason: [AtomicU64; Reason::ALL.len()],
    cache_bytes: AtomicU64,
    fuse_by_reason: [AtomicU64; Reason::ALL.len()],
    failed_reads: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn opened(&self, way: Way) {
        add(&self.opens[way.index()], 1);
    }

    pub(super) fn failed(&self) {
        add(&self.failed, 1);
    }

    pub(super) fn refused(&self, refusal: &Refusal) {
        add(&self.by_reason[refusal.reason as usize], 1);
    }

    pub(super) fn failed_read(&self) {
        add(&self.failed_reads, 1);
    }

    /// What a file that is closed now has read.
    pub(super) fn read(&self, stats: &ReadStats) {
        add(&self.cache_bytes, stats.cache_bytes);
        for (reason, bytes) in &stats.by_reason {
            add(&self.fuse_by_reason[*reason as usize], *bytes);
        }
    }

    /// Now, with what files have read that are still open.
    pub(super) fn snapshot(&self, open: impl Iterator<Item = ReadStats>) -> Stats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let reasons = |counters: &[AtomicU64]| -> BTreeMap<Reason, u64> {
            let all = Reason::ALL.iter().zip(counters);
            all.map(|(reason, n)| (*reason, load(n)))
                .filter(|(_, n)| *n > 0)
                .collect()
        };
        let mut stats = Stats {
            opens: Way::all()
                .map(|way| (way.name(), load(&self.opens[way.index()])))
                .filter(|(_, n)| *n > 0)
                .collect(),
            failed: load(&self.failed),
            by_reason: reasons(&self.by_reason),
            cache_bytes: load(&self.cache_bytes),
            fuse_bytes: 0,
            fuse_by_reason: reasons(&self.fuse_by_reason),
            failed_reads: load(&self.failed_reads),
        };
        for file in open {
            stats.cache_bytes += file.cache_bytes;
            for (reason, bytes) in file.by_reason {
                *stats.fuse_by_reason.entry(reason).or_default() += bytes;
            }
        }
        stats.fuse_bytes = stats.fuse_by_reason.values().sum();
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_has_a_count_of_its_own() {
        let counters = Counters::default();
        for (n, way) in Way::all().enumerate() {
            assert_eq!(way.index(), n);
            (0..=n).for_each(|_| counters.opened(way));
        }
        counters.refused(&Refusal::new(Reason::Partial, "x"));
        let open = ReadStats {
            cache_bytes: 5,
            by_reason: [(Reason::Edge, 2)].into(),
            ..ReadStats::default()
        };
        counters.read(&open);
        let stats = counters.snapshot([open].into_iter());
        assert_eq!(stats.opens["reflink"], 1);
        assert_eq!(stats.opens["direct"], 5);
        assert_eq!(stats.passed(), 1 + 2 + 3);
        assert_eq!((stats.cache_bytes, stats.fuse_bytes), (10, 4));
        assert_eq!(stats.by_reason, [(Reason::Partial, 1)].into());
    }
}
