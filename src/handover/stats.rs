//! What a server has done, counted.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::histogram::{Durations, Histogram};
use crate::reason::Reason;

/// What a handover server has done so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HandoverStats {
    /// Connections.
    pub clients: u64,
    /// Connections open now.
    pub connected: u64,
    /// Cache files handed over with their ranges.
    pub ranges: u64,
    /// Whole clips handed over.
    pub whole: u64,
    /// Questions whether a proof still holds.
    pub checks: u64,
    /// Proofs that had ended when their client asked, by reason.
    pub ended: BTreeMap<Reason, u64>,
    /// Clips that were not handed over, by reason.
    pub refused: BTreeMap<Reason, u64>,
    /// Requests that were none: garbage, without a descriptor or with several.
    pub rejected: u64,
    /// Requests that were put off because too many were being worked on.
    pub busy: u64,
    /// Connections refused because there were too many.
    pub turned_away: u64,
    /// Connections closed because their client did not read, or was silent.
    pub dropped: u64,
}

/// How long the proofs of one kind of request took that had one end.
#[derive(Debug, Clone, PartialEq)]
pub struct ProofTimes {
    /// Whole clips, or else ranges.
    pub whole: bool,
    /// Whether something was handed over, or else refused.
    pub given: bool,
    /// From the request's descriptor to the answer.
    pub durations: Durations,
}

type ByReason = [AtomicU64; Reason::ALL.len()];

#[derive(Default)]
pub(super) struct Counters {
    pub(super) clients: AtomicU64,
    pub(super) ranges: AtomicU64,
    pub(super) whole: AtomicU64,
    pub(super) checks: AtomicU64,
    ended: ByReason,
    refused: ByReason,
    pub(super) rejected: AtomicU64,
    pub(super) busy: AtomicU64,
    pub(super) turned_away: AtomicU64,
    pub(super) dropped: AtomicU64,
    /// Of ranges and of whole clips, refused and given.
    proofs: [[Histogram; 2]; 2],
}

/// Counts one more.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn by_reason(counters: &ByReason) -> BTreeMap<Reason, u64> {
    Reason::ALL
        .iter()
        .zip(counters)
        .map(|(reason, n)| (*reason, n.load(Ordering::Relaxed)))
        .filter(|(_, n)| *n > 0)
        .collect()
}

impl Counters {
    pub(super) fn ended(&self, reason: Reason) {
        count(&self.ended[reason as usize]);
    }

    pub(super) fn refused(&self, reason: Reason) {
        count(&self.refused[reason as usize]);
    }

    pub(super) fn proved(&self, whole: bool, given: bool, took: Duration) {
        self.proofs[usize::from(whole)][usize::from(given)].add(took);
    }

    pub(super) fn proof_times(&self) -> Vec<ProofTimes> {
        let of = |whole: bool, given: bool| ProofTimes {
            whole,
            given,
            durations: self.proofs[usize::from(whole)][usize::from(given)].snapshot(),
        };
        let kinds = [false, true].into_iter();
        kinds
            .flat_map(|whole| [of(whole, true), of(whole, false)])
            .collect()
    }

    pub(super) fn snapshot(&self, connected: usize) -> HandoverStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        HandoverStats {
            clients: load(&self.clients),
            connected: connected as u64,
            ranges: load(&self.ranges),
            whole: load(&self.whole),
            checks: load(&self.checks),
            ended: by_reason(&self.ended),
            refused: by_reason(&self.refused),
            rejected: load(&self.rejected),
            busy: load(&self.busy),
            turned_away: load(&self.turned_away),
            dropped: load(&self.dropped),
        }
    }
}
