//! A tracker's state, for those who do not own it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::table::{EventKind, TrackedFd};
use super::{Accounts, AttachMode, Losses, Shared, TrackerError, Watch};
use crate::sys::coarse_ms;

/// Reads what a [`Tracker`](super::Tracker) knows, from any thread, also when that has
/// ended: then it is as it was.
#[derive(Clone)]
pub struct Observer(pub(super) Arc<Shared>);

impl Observer {
    /// As [`Tracker::entries`](super::Tracker::entries).
    #[must_use]
    pub fn entries(&self) -> Vec<Arc<TrackedFd>> {
        self.0.read_table().entries()
    }

    /// How many descriptors are tracked.
    #[must_use]
    pub fn tracked(&self) -> usize {
        self.0.read_table().len()
    }

    /// As [`Tracker::losses`](super::Tracker::losses).
    #[must_use]
    pub fn losses(&self) -> Losses {
        self.0.losses()
    }

    /// As [`Tracker::watches`](super::Tracker::watches).
    #[must_use]
    pub fn watches(&self) -> Vec<Watch> {
        self.0.watches()
    }

    /// As [`Tracker::attach_mode`](super::Tracker::attach_mode).
    #[must_use]
    pub fn attach_mode(&self) -> Option<AttachMode> {
        self.0.mode.get().copied()
    }

    /// How many events of each kind subscribers were told of; of one that lags, or
    /// if there is none, were to be told of.
    pub fn told(&self) -> impl Iterator<Item = (EventKind, u64)> {
        let counts = self.0.told.iter().map(|n| n.load(Ordering::Relaxed));
        EventKind::ALL.into_iter().zip(counts)
    }

    /// As [`Tracker::accounts`](super::Tracker::accounts).
    ///
    /// # Errors
    /// Where the maps cannot be read.
    pub fn accounts(&self) -> std::io::Result<Option<Accounts>> {
        self.0.accounts()
    }

    /// As [`Tracker::flush`](super::Tracker::flush): returns when the tracking thread
    /// has come round, and never while it is stuck.
    ///
    /// # Errors
    /// Where tracking has ended.
    pub fn flush(&self) -> Result<(), TrackerError> {
        self.0.flush()
    }

    /// Whether tracking has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0.ended.load(Ordering::Relaxed)
    }

    /// For how long the tracking thread has done nothing; about a second at most,
    /// but while it looks at every process of a large host.
    #[must_use]
    pub fn silence(&self) -> Duration {
        let last = self.0.beat_ms.load(Ordering::Relaxed);
        Duration::from_millis(coarse_ms().saturating_sub(last))
    }
}
