//! What the tracking thread and its users share, and how it tells them of changes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use nix::sys::eventfd::EventFd;

use super::account::{self, Accounts};
use super::attach::AttachMode;
use super::losses::{Loss, Losses};
use super::table::{Event, EventKind, Table};
use super::watch::Watch;
use super::{TrackerError, abi, host, pinned};
use crate::sys::coarse_ms;

/// Events that a slow subscriber may lag behind.
const SUBSCRIBER_CAPACITY: usize = 65_536;

/// What the tracking thread and its users share.
pub(super) struct Shared {
    pub(super) table: RwLock<Table>,
    pub(super) watches: RwLock<Vec<Watch>>,
    pub(super) subscribers: Mutex<Vec<SyncSender<Update>>>,
    pub(super) lagged: AtomicU64,
    pub(super) paths_full: AtomicU64,
    pub(super) reconcile_failed: AtomicU64,
    /// Losses that were made good.
    pub(super) healed: AtomicU64,
    pub(super) events: AtomicU64,
    /// What subscribers were told of descriptors, by kind.
    pub(super) told: [AtomicU64; EventKind::ALL.len()],
    /// When the thread last did something, [`coarse_ms`]; it does so once a second.
    pub(super) beat_ms: AtomicU64,
    pub(super) ended: AtomicBool,
    /// The most that was seen: the count goes with the programs.
    pub(super) recursion_misses: AtomicU64,
    /// Likewise, of programs that count reads.
    pub(super) read_misses: AtomicU64,
    /// The ids of these programs.
    pub(super) read_programs: OnceLock<Vec<u32>>,
    pub(super) replaced_pins: AtomicBool,
    pub(super) mode: OnceLock<AttachMode>,
    pub(super) refused: Mutex<Vec<(AttachMode, String)>>,
    pub(super) kernel: Mutex<Option<abi::Stats>>,
    pub(super) accounts: Mutex<Option<account::Live>>,
    pub(super) commands: Mutex<Sender<Command>>,
    pub(super) wake: EventFd,
}

pub(super) enum Command {
    Flush(Sender<()>),
    Stop,
    /// A prefix has resolved.
    Look,
}

/// What a [`Tracker`](super::Tracker) tells its subscribers. Small: a queue of 65,536 of them is
/// allocated for each.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Update {
    /// Something happened to a descriptor.
    Fd(Event),
    /// A prefix came on an rclone mount.
    Mounted(Box<Watch>),
    /// A prefix's mount went away.
    Unmounted(Box<Watch>),
}

/// The updates of a [`Tracker`](super::Tracker) from the subscription on.
pub struct Subscription(Receiver<Update>);

impl Subscription {
    /// Waits for an update; `None` when tracking has ended.
    #[must_use]
    pub fn recv(&self) -> Option<Update> {
        self.0.recv().ok()
    }

    /// Waits at most so long for an update.
    ///
    /// # Errors
    /// `Timeout`, or `Disconnected` when tracking has ended.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Update, RecvTimeoutError> {
        self.0.recv_timeout(timeout)
    }
}

/// Ends every subscription when the tracking thread ends, however it does.
pub(super) struct EndSubscriptions<'a>(pub(super) &'a Shared);

impl Drop for EndSubscriptions<'_> {
    fn drop(&mut self) {
        self.0.end_subscriptions();
    }
}

impl Shared {
    pub(super) fn subscribe(&self) -> Subscription {
        let (sender, receiver) = mpsc::sync_channel(SUBSCRIBER_CAPACITY);
        self.lock_subscribers().push(sender);
        Subscription(receiver)
    }

    pub(super) fn end_subscriptions(&self) {
        self.ended.store(true, Ordering::Relaxed);
        self.lock_subscribers().clear();
    }

    pub(super) fn send(&self, command: Command) {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        // Where the thread has ended, there is nobody to tell or to wake.
        if commands.send(command).is_ok() {
            let _ = self.wake.write(1);
        }
    }

    pub(super) fn flush(&self) -> Result<(), TrackerError> {
        let (done, wait) = mpsc::channel();
        self.send(Command::Flush(done));
        wait.recv()
            .map_err(|_| TrackerError::Failed("the tracker has ended".into()))
    }

    pub(super) fn watches(&self) -> Vec<Watch> {
        let watches = self.watches.read();
        watches.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The thread is at work.
    pub(super) fn beat(&self) {
        self.beat_ms.store(coarse_ms(), Ordering::Relaxed);
    }

    pub(super) fn read_table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_accounts(&self) -> MutexGuard<'_, Option<account::Live>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn accounts(&self) -> std::io::Result<Option<Accounts>> {
        // Read without the lock, for which tracking would wait.
        let maps = self
            .lock_accounts()
            .as_ref()
            .map(|live| Arc::clone(&live.maps));
        maps.map(|maps| maps.read()).transpose()
    }

    pub(super) fn lock_subscribers(&self) -> MutexGuard<'_, Vec<SyncSender<Update>>> {
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn publish(&self, update: &Update) {
        if let Update::Fd(event) = update {
            self.told[event.kind as usize].fetch_add(1, Ordering::Relaxed);
        }
        self.lock_subscribers()
            .retain(|subscriber| match subscriber.try_send(update.clone()) {
                Ok(()) => true,
                Err(TrySendError::Full(_)) => {
                    self.lagged.fetch_add(1, Ordering::Relaxed);
                    true
                }
                Err(TrySendError::Disconnected(_)) => false,
            });
    }

    pub(super) fn note_mode(&self, mode: AttachMode) {
        // There is one session, which attaches once.
        let _ = self.mode.set(mode);
    }

    pub(super) fn note_refused(&self, mode: AttachMode, error: &TrackerError) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.push((mode, error.to_string()));
    }

    pub(super) fn note_reconcile_failed(&self, published: &mut pinned::Published) {
        let failed = self.reconcile_failed.fetch_add(1, Ordering::Relaxed) + 1;
        published.set(|meta| meta.loss_reconcile = failed);
    }

    pub(super) fn note_healed(&self, losses: u64) {
        self.healed.store(losses, Ordering::Relaxed);
    }

    pub(super) fn note_recursion_misses(&self) {
        let reads = self.read_programs.get().map_or(&[][..], Vec::as_slice);
        let misses = host::recursion_misses("self", reads);
        self.recursion_misses
            .fetch_max(misses.tracking, Ordering::Relaxed);
        self.read_misses.fetch_max(misses.reads, Ordering::Relaxed);
    }

    /// Every loss so far, but for programs that did not run since the last look.
    pub(super) fn known_losses(&self) -> Losses {
        let kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let mut losses = kernel.as_ref().map(abi::Stats::losses).unwrap_or_default();
        for (loss, counter) in [
            (Loss::RecursionMisses, &self.recursion_misses),
            (Loss::ReconcileFailed, &self.reconcile_failed),
            (Loss::PathsFull, &self.paths_full),
            (Loss::SubscriberLagged, &self.lagged),
        ] {
            losses.add(loss, counter.load(Ordering::Relaxed));
        }
        losses.add(
            Loss::ReadUncounted,
            losses.get(Loss::ReadUncounted) + self.read_misses.load(Ordering::Relaxed),
        );
        losses.healed = self.healed.load(Ordering::Relaxed);
        losses
    }

    pub(super) fn losses(&self) -> Losses {
        self.note_recursion_misses();
        self.known_losses()
    }
}
