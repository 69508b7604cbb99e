//! Whether tracking goes on.

use std::sync::Arc;

use super::{Shared, TrackerError, Watch};

/// Whether a [`Tracker`](super::Tracker) still works, and what at, asked from another
/// thread.
#[derive(Clone)]
pub struct Pulse(pub(super) Arc<Shared>);

impl Pulse {
    /// As [`Tracker::flush`](super::Tracker::flush): returns when the tracking thread
    /// has come round, and never while it is stuck.
    ///
    /// # Errors
    /// Where tracking has ended.
    pub fn wait(&self) -> Result<(), TrackerError> {
        self.0.flush()
    }

    /// How many descriptors are tracked.
    #[must_use]
    pub fn tracked(&self) -> usize {
        self.0.read_table().len()
    }

    /// As [`Tracker::watches`](super::Tracker::watches).
    #[must_use]
    pub fn watches(&self) -> Vec<Watch> {
        self.0.watches()
    }
}
