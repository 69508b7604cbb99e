//! What became of the opens.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use serde::Serialize;

use super::fill::Tally;
use super::source::Given;
use crate::reason::{Reason, Refusal};
use crate::snapshot::SnapshotKind;

/// What `exec` did, in numbers. `opens` is the sum of `elsewhere`,
/// `substituted`, `interrupted` and of all in `by_reason`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Opens for reading, of whatever file, that were answered.
    pub opens: u64,
    /// Of these, of no clip on a watched mount: other files, folders, nothing.
    pub elsewhere: u64,
    /// Opens of clips that were answered with a snapshot.
    pub substituted: u64,
    /// The sizes of these clips, together: what was read at most, if once.
    pub bytes: u64,
    /// How many of them used a snapshot that was there already.
    pub reused: u64,
    /// How many of them a handover server has answered.
    pub by_server: u64,
    /// Opens that a signal ended before they were answered.
    pub interrupted: u64,
    /// Substituted opens by the kind of snapshot.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Opens of clips that went through FUSE, by reason.
    pub by_reason: BTreeMap<Reason, u64>,
    /// The first of each reason, in words.
    pub details: BTreeMap<Reason, String>,
    /// Clips that were completed in rclone's cache.
    pub filled: u64,
    /// Clips that were to be, and were not: too much is missing, it took too
    /// long, or failed.
    pub fill_failed: u64,
    /// Bytes that were read for it through FUSE.
    pub fill_bytes: u64,
    /// Why the command ran without assistance; `None`: it was assisted.
    pub unassisted: Option<String>,
    /// Whether no_new_privs had to be set, so that set-uid programs have no effect.
    pub no_new_privs: bool,
}

#[derive(Default)]
pub(super) struct Counters {
    elsewhere: AtomicU64,
    bytes: AtomicU64,
    reused: AtomicU64,
    by_server: AtomicU64,
    interrupted: AtomicU64,
    kinds: [AtomicU64; 3],
    reasons: Vec<(AtomicU64, OnceLock<String>)>,
    pub(super) fills: Arc<Tally>,
}

const KINDS: [SnapshotKind; 3] = [
    SnapshotKind::Reflink,
    SnapshotKind::Copy,
    SnapshotKind::Live,
];

fn one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn new() -> Self {
        Self {
            reasons: Reason::ALL.iter().map(|_| Default::default()).collect(),
            ..Self::default()
        }
    }

    pub(super) fn elsewhere(&self) {
        one(&self.elsewhere);
    }

    pub(super) fn interrupted(&self) {
        one(&self.interrupted);
    }

    pub(super) fn refused(&self, refusal: Refusal) {
        let (count, detail) = &self.reasons[refusal.reason as usize];
        one(count);
        detail.get_or_init(|| refusal.detail);
    }

    pub(super) fn substituted(&self, given: &Given) -> Substituted<'_> {
        let whole = &given.whole;
        let substituted = Substituted {
            counters: self,
            kind: KINDS.iter().position(|k| *k == whole.kind).unwrap_or(0),
            size: whole.size,
            reused: u64::from(whole.reused),
            by_server: u64::from(given.by_server),
        };
        substituted.add(1);
        substituted
    }

    pub(super) fn report(&self) -> Report {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let kinds = KINDS.iter().zip(&self.kinds);
        let kinds: BTreeMap<_, _> = kinds
            .map(|(kind, count)| (kind.name(), get(count)))
            .filter(|(_, count)| *count > 0)
            .collect();
        let reasons = || Reason::ALL.iter().zip(&self.reasons);
        let details = reasons().filter_map(|(r, (_, detail))| Some((*r, detail.get()?.clone())));
        let by_reason: BTreeMap<_, _> = reasons()
            .map(|(reason, (count, _))| (*reason, get(count)))
            .filter(|(_, count)| *count > 0)
            .collect();
        let substituted = kinds.values().sum();
        let (elsewhere, interrupted) = (get(&self.elsewhere), get(&self.interrupted));
        Report {
            opens: elsewhere + substituted + interrupted + by_reason.values().sum::<u64>(),
            elsewhere,
            substituted,
            bytes: get(&self.bytes),
            reused: get(&self.reused),
            by_server: get(&self.by_server),
            interrupted,
            kinds,
            by_reason,
            details: details.collect(),
            filled: get(&self.fills.filled),
            fill_failed: get(&self.fills.failed),
            fill_bytes: get(&self.fills.bytes),
            unassisted: None,
            no_new_privs: false,
        }
    }
}

/// An open that is counted as substituted.
pub(super) struct Substituted<'a> {
    counters: &'a Counters,
    kind: usize,
    size: u64,
    reused: u64,
    by_server: u64,
}

impl Substituted<'_> {
    /// It was not.
    pub(super) fn take_back(self) {
        self.add(1_u64.wrapping_neg());
    }

    /// Once, or minus once: the counters wrap around.
    fn add(&self, times: u64) {
        let add = |counter: &AtomicU64, number: u64| {
            counter.fetch_add(number.wrapping_mul(times), Ordering::Relaxed);
        };
        add(&self.counters.kinds[self.kind], 1);
        add(&self.counters.bytes, self.size);
        add(&self.counters.reused, self.reused);
        add(&self.counters.by_server, self.by_server);
    }
}
