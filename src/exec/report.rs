//! What became of the opens.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::reason::Reason;
use crate::snapshot::{SnapshotKind, Whole};

/// What `exec` did, in numbers. `opens` is the sum of `elsewhere`,
/// `substituted`, `interrupted` and of all in `by_reason`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Opens for reading, of whatever file, that were seen.
    pub opens: u64,
    /// Of these, of no clip on a watched mount: other files, folders, nothing.
    pub elsewhere: u64,
    /// Opens of clips that were answered with a snapshot.
    pub substituted: u64,
    /// The sizes of these clips, together: what was read at most, if once.
    pub bytes: u64,
    /// How many of them used a snapshot that was there already.
    pub reused: u64,
    /// Opens that a signal ended before they were answered.
    pub interrupted: u64,
    /// Substituted opens by the kind of snapshot.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Opens of clips that went through FUSE, by reason.
    pub by_reason: BTreeMap<Reason, u64>,
    /// Why the command ran without assistance; `None`: it was assisted.
    pub unassisted: Option<String>,
    /// Whether no_new_privs had to be set, so that set-uid programs have no effect.
    pub no_new_privs: bool,
}

#[derive(Default)]
pub(super) struct Counters {
    opens: AtomicU64,
    elsewhere: AtomicU64,
    bytes: AtomicU64,
    reused: AtomicU64,
    interrupted: AtomicU64,
    kinds: [AtomicU64; 3],
    reasons: Vec<AtomicU64>,
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
            reasons: Reason::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
            ..Self::default()
        }
    }

    pub(super) fn seen(&self) {
        one(&self.opens);
    }

    pub(super) fn elsewhere(&self) {
        one(&self.elsewhere);
    }

    pub(super) fn interrupted(&self) {
        one(&self.interrupted);
    }

    pub(super) fn refused(&self, reason: Reason) {
        one(&self.reasons[reason as usize]);
    }

    pub(super) fn substituted(&self, whole: &Whole) -> Substituted<'_> {
        let substituted = Substituted {
            counters: self,
            kind: KINDS.iter().position(|k| *k == whole.kind).unwrap_or(0),
            size: whole.size,
            reused: u64::from(whole.reused),
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
        let reasons = Reason::ALL.iter().zip(&self.reasons);
        Report {
            opens: get(&self.opens),
            elsewhere: get(&self.elsewhere),
            substituted: kinds.values().sum(),
            bytes: get(&self.bytes),
            reused: get(&self.reused),
            interrupted: get(&self.interrupted),
            kinds,
            by_reason: reasons
                .map(|(reason, count)| (*reason, get(count)))
                .filter(|(_, count)| *count > 0)
                .collect(),
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
    }
}
