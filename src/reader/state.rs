//! What a file's reads do at the moment.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::companion::Companion;
use super::epoch::Epoch;
use super::remote::Via;
use crate::cache::trail::Trail;
use crate::reason::{Reason, Refusal};

/// How often a proof that could not be had, or has ended, is tried again.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Failed proofs in a row that lengthen the time to the next: up to a minute.
const MAX_DOUBLINGS: u32 = 6;

// Always behind one Arc; a box would cost each read another step.
#[allow(clippy::large_enum_variant)]
pub(super) enum State {
    /// Proven ranges are read from the cache.
    Active(Epoch),
    /// All goes through FUSE; `again`: when another proof may be tried.
    Fuse {
        refusal: Refusal,
        again: Option<Instant>,
    },
}

/// A state that stays.
pub(super) fn never(refusal: Refusal) -> State {
    State::Fuse {
        refusal,
        again: None,
    }
}

/// The state that a proof leads to, or its refusal. `failures`: how many proofs
/// in a row could not be had; each doubles the time to the next try, because a
/// try looks the path up, for which rclone may ask a slow remote.
pub(super) fn state_of(
    companion: &Companion,
    via: &Via,
    pulled: Option<u64>,
    failures: &AtomicU32,
) -> State {
    match via.prove(companion, pulled, &mut Trail::off()) {
        Ok(epoch) => {
            failures.store(0, Ordering::Relaxed);
            State::Active(epoch)
        }
        Err(refusal) => {
            let lasting = matches!(
                refusal.reason,
                Reason::NotFuse | Reason::WriteOpen | Reason::Quarantined
            );
            let doublings = failures.fetch_add(1, Ordering::Relaxed).min(MAX_DOUBLINGS);
            let wait = RETRY_AFTER * (1 << doublings);
            State::Fuse {
                again: (!lasting).then(|| Instant::now() + wait),
                refusal,
            }
        }
    }
}
