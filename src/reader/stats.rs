//! What was read, and by which way.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::reason::Reason;

/// Bytes read by a [`BypassFile`](super::BypassFile), by their way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// From the cache file.
    pub cache_bytes: u64,
    /// Of these, compared with FUSE's, and equal.
    pub verified_bytes: u64,
    /// Through FUSE, by reason; reasons without a byte are left out.
    pub by_reason: BTreeMap<Reason, u64>,
}

impl ReadStats {
    /// Bytes read through FUSE, for whatever reason.
    #[must_use]
    pub fn fuse_bytes(&self) -> u64 {
        self.by_reason.values().sum()
    }
}

#[derive(Default)]
pub(super) struct Counters {
    cache: AtomicU64,
    by_reason: [AtomicU64; Reason::ALL.len()],
}

impl Counters {
    pub(super) fn add_cache(&self, bytes: usize) {
        self.cache.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn add_fuse(&self, bytes: usize, reason: Reason) {
        self.by_reason[reason as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that came through FUSE.
    #[cfg(feature = "mount")]
    pub(super) fn fuse(&self) -> u64 {
        let load = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        self.by_reason.iter().map(load).sum()
    }

    pub(super) fn snapshot(&self) -> ReadStats {
        ReadStats {
            cache_bytes: self.cache.load(Ordering::Relaxed),
            verified_bytes: 0,
            by_reason: Reason::ALL
                .iter()
                .zip(&self.by_reason)
                .map(|(reason, bytes)| (*reason, bytes.load(Ordering::Relaxed)))
                .filter(|(_, bytes)| *bytes > 0)
                .collect(),
        }
    }
}
