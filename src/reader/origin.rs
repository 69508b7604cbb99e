//! Where a proof's metadata is looked at again.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::companion::Companion;
use super::epoch::changed;
use crate::cache::proof::Proof;
#[cfg(feature = "mount")]
use crate::cache::rclone::fingerprint_mark;
use crate::cache::rclone::{FuseFile, MetadataFile, is_same_version};
use crate::handover::Connection;
use crate::reason::{Reason, Refusal};
use crate::sys::coarse_ms;

/// For so long a server's word counts for the next piece, too, milliseconds: to
/// ask for each would cost a fast reader a twentieth of its time.
const LATELY_MS: u64 = 20;

/// What tells whether the metadata is still what was proven.
pub(super) enum Origin {
    /// We have read it ourselves.
    Metadata(Mutex<MetadataFile>),
    /// A handover server has, and is asked.
    Server {
        connection: Mutex<Connection>,
        /// When it last said that all holds, [`coarse_ms`].
        seen_ms: AtomicU64,
        /// Whether rclone knows that the clip is being read.
        pinned: AtomicBool,
    },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Origin {
    pub(super) fn metadata(file: MetadataFile) -> Self {
        Self::Metadata(Mutex::new(file))
    }

    pub(super) fn server(connection: Connection) -> Self {
        Self::Server {
            connection: Mutex::new(connection),
            seen_ms: AtomicU64::new(coarse_ms()),
            pinned: AtomicBool::new(false),
        }
    }

    /// Whether the metadata is unchanged.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        match self {
            Self::Metadata(file) => hold(lock(file).unchanged()),
            Self::Server {
                connection,
                seen_ms,
                ..
            } => {
                let now = coarse_ms();
                lock(connection).check()?;
                seen_ms.store(now, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// As [`check`](Self::check), before a piece is first read. A server that
    /// was asked for another piece just now is not asked again: what is read
    /// from a piece later relies on looks that are a second apart.
    pub(super) fn check_lately(&self) -> Result<(), Refusal> {
        match self {
            Self::Server { seen_ms, .. }
                if coarse_ms().saturating_sub(seen_ms.load(Ordering::Relaxed)) < LATELY_MS =>
            {
                Ok(())
            }
            _ => self.check(),
        }
    }

    /// As [`check`](Self::check), at the cost of one fstat(2), of the metadata
    /// file that was read; on writable mounts, where no server is asked.
    pub(super) fn check_in_place(&self) -> Result<(), Refusal> {
        match self {
            Self::Metadata(file) => hold(lock(file).unchanged_in_place()),
            Self::Server { .. } => self.check(),
        }
    }

    /// Whether the metadata still names the version that was proven.
    pub(super) fn check_version(&self) -> Result<(), Refusal> {
        match self {
            Self::Metadata(file) => hold(lock(file).is_same_version_still()),
            Self::Server { .. } => self.check(),
        }
    }

    /// Whether two proofs' metadata name one version, as far as we have read it.
    pub(super) fn is_same_version(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Metadata(one), Self::Metadata(other)) => {
                let bytes = |file: &Mutex<MetadataFile>| lock(file).bytes.clone();
                is_same_version(&bytes(one), &bytes(other))
            }
            _ => false,
        }
    }

    /// What tells versions of one size and time apart, as far as we have read the
    /// metadata.
    #[cfg(feature = "mount")]
    pub(super) fn mark(&self) -> Option<u64> {
        match self {
            Self::Metadata(file) => fingerprint_mark(&lock(file).bytes),
            Self::Server { .. } => None,
        }
    }

    /// Makes rclone open the clip for us, as it is for whoever proves a clip
    /// himself: it does not evict then what is read. The server has closed its
    /// own descriptor when it had its proof. Not at once, since most reads are
    /// over before rclone next looks for something to evict.
    pub(super) fn pin(&self, proof: &Proof, companion: &Companion) {
        if let Self::Server { pinned, .. } = self
            && let Some(offset) = proof.ranges.first()
            && !pinned.swap(true, Ordering::Relaxed)
        {
            // Without it the clip may be evicted, which is noticed.
            let _ = companion.prime(offset);
        }
    }

    /// See [`Epoch::tell_difference`](super::epoch::Epoch::tell_difference).
    pub(super) fn tell_difference(&self, offset: u64, companion: &Companion) {
        if let Self::Server { connection, .. } = self {
            // It is our own quarantine that counts here.
            let _ = lock(connection).differs(companion.share().as_fd(), offset);
        }
    }
}

fn hold(is_same: bool) -> Result<(), Refusal> {
    if is_same {
        Ok(())
    } else {
        Err(changed("has new metadata"))
    }
}

/// Whether a server may know more: the cache, or the daemon, is not ours to see.
pub(super) fn is_hidden(reason: Reason) -> bool {
    matches!(reason, Reason::Permission | Reason::NotRclone)
}
