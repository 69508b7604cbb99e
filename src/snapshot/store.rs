//! Which snapshots are kept, and how much memory they take.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::resource::{Resource, getrlimit};

use super::{Kept, Object, lock};
use crate::reader::Shown;
use crate::reason::{Reason, Refusal};
use crate::sys::coarse_ms;

/// Snapshots that are kept at most, and at least: each has three descriptors, of
/// as many as the process may have when it begins.
const KEPT: usize = 4_000;
const KEPT_LEAST: usize = 100;
/// The share of the descriptors that each takes, at most.
const OF_DESCRIPTORS: u64 = 10;
/// Copies of other versions and clips that others have open, at most: each has
/// a descriptor, however small it is.
const RETIRED: usize = 200;
/// How often to look for snapshots whose clips are gone, milliseconds.
const SWEEP_MS: u64 = 1_000;

/// A clip's place, held while its snapshot is made or looked at.
#[derive(Default)]
pub(super) struct Slot {
    /// Counts the uses of the store; the least is the longest ago.
    used: AtomicU64,
    kept: Mutex<Option<Kept>>,
}

impl Slot {
    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Kept>> {
        lock(&self.kept)
    }

    /// `None` while somebody is at it.
    #[cfg(feature = "mount")]
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, Option<Kept>>> {
        self.kept.try_lock().ok()
    }
}

/// Room that a sealed copy takes, until it is dropped.
pub(super) struct Charge {
    bytes: u64,
    taken: Arc<AtomicU64>,
}

impl Charge {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Locks: a slot's own may be held when the table's is taken; under the table's
/// a slot's is only tried. What takes long, also freeing a copy, is done under
/// none but a slot's own.
pub(super) struct Store {
    budget: u64,
    /// Snapshots that are kept at most.
    most: usize,
    /// Bytes of sealed copies, also of those that are being made.
    taken: Arc<AtomicU64>,
    swept_ms: AtomicU64,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    slots: HashMap<Shown, Arc<Slot>>,
    /// Copies of clips that have changed, which others had open: their memory
    /// is in use until those close them.
    retired: Vec<Object>,
    uses: u64,
}

/// Snapshots that a process of so many descriptors keeps.
fn most_kept(limit: u64) -> usize {
    let most = usize::try_from(limit / OF_DESCRIPTORS).unwrap_or(KEPT);
    most.clamp(KEPT_LEAST, KEPT)
}

/// Descriptors that snapshots may take, of so many that the process may have.
pub(crate) fn descriptors(limit: u64) -> u64 {
    (3 * most_kept(limit) + RETIRED) as u64
}

impl Store {
    pub(super) fn new(budget: u64) -> Self {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
        Self {
            budget,
            most: most_kept(limit),
            taken: Arc::default(),
            swept_ms: AtomicU64::new(coarse_ms()),
            table: Mutex::default(),
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.table).slots.is_empty()
    }

    /// A clip's place, if it has one.
    #[cfg(feature = "mount")]
    pub(super) fn find(&self, clip: &Shown) -> Option<Arc<Slot>> {
        let mut table = lock(&self.table);
        table.uses += 1;
        let slot = table.slots.get(clip)?;
        slot.used.store(table.uses, Ordering::Relaxed);
        Some(Arc::clone(slot))
    }

    /// A clip's place, empty at first.
    pub(super) fn slot(&self, clip: &Shown) -> Arc<Slot> {
        let mut table = lock(&self.table);
        table.uses += 1;
        let slot = match table.slots.get(clip) {
            Some(slot) => Arc::clone(slot),
            None => Arc::clone(table.slots.entry(clip.clone()).or_default()),
        };
        slot.used.store(table.uses, Ordering::Relaxed);
        slot
    }

    /// Gives a place back after use: empty ones are not kept, nor too many.
    pub(super) fn leave(&self, clip: &Shown, slot: Arc<Slot>) {
        let mut freed = Vec::new();
        {
            let mut table = lock(&self.table);
            // Ours and the table's: nobody else is at it, or can come to it.
            if Arc::strong_count(&slot) == 2 && slot.lock().is_none() {
                table.slots.remove(clip);
            }
            drop(slot);
            while table.slots.len() > self.most {
                let Some(oldest) = table.oldest(|_| true) else {
                    break;
                };
                freed.extend(table.take(&oldest));
            }
        }
        self.retire_all(freed);
    }

    /// Drops a snapshot that is not current any more.
    pub(super) fn retire(&self, kept: Option<Kept>) {
        self.retire_all(kept);
    }

    fn retire_all(&self, kept: impl IntoIterator<Item = Kept>) {
        let objects = kept.into_iter().filter_map(|kept| kept.object);
        let in_use: Vec<_> = objects.filter(|o| o.memory() > 0 && o.in_use()).collect();
        if !in_use.is_empty() {
            lock(&self.table).retired.extend(in_use);
        }
    }

    /// Once a second: drops the snapshots of clips that were evicted or have
    /// changed, which would keep blocks of unlinked cache files, and copies that
    /// nobody has open any more.
    pub(super) fn sweep(&self) {
        let (now, last) = (coarse_ms(), self.swept_ms.load(Ordering::Relaxed));
        if now.saturating_sub(last) < SWEEP_MS {
            return;
        }
        let swept = &self.swept_ms;
        if swept
            .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
            .is_err()
        {
            return;
        }
        let mut gone = Vec::new();
        let free: Vec<Object>;
        {
            let mut table = lock(&self.table);
            for slot in table.slots.values() {
                if let Ok(mut kept) = slot.kept.try_lock()
                    && kept.as_ref().is_some_and(|k| !k.vigil.is_linked())
                {
                    gone.extend(kept.take());
                }
            }
            table.slots.retain(|_, slot| {
                Arc::strong_count(slot) > 1 || slot.kept.try_lock().map_or(true, |k| k.is_some())
            });
            free = table.free();
        }
        drop(free);
        self.retire_all(gone);
    }

    /// Takes room for a copy, at the expense of those that were not used for the
    /// longest time. What others have open is not freed by dropping it, so it
    /// stays, and counts.
    ///
    /// # Errors
    /// [`Reason::Budget`].
    pub(super) fn reserve(&self, bytes: u64) -> Result<Charge, Refusal> {
        let mut freed = Vec::new();
        let mut table = lock(&self.table);
        let mut going: u64 = 0;
        let fits = |going| {
            let taken = self.taken.load(Ordering::Acquire).saturating_sub(going);
            bytes <= self.budget.saturating_sub(taken)
        };
        let many = |table: &Table| table.retired.len() >= RETIRED;
        if bytes <= self.budget && (!fits(0) || many(&table)) {
            freed = table.free();
            going = freed.iter().map(Object::memory).sum();
        }
        while bytes <= self.budget && !fits(going) {
            let idle = |kept: &Kept| {
                let object = kept.object.as_ref();
                object.is_some_and(|o| o.memory() > 0 && !o.in_use())
            };
            let Some(oldest) = table.oldest(idle) else {
                break;
            };
            let object = table.take(&oldest).and_then(|kept| kept.object);
            going += object.as_ref().map_or(0, Object::memory);
            freed.extend(object);
        }
        let many = many(&table);
        let fits = fits(going) && !many;
        if fits {
            // Under the table's lock, so that nobody else takes the same room.
            self.taken.fetch_add(bytes, Ordering::AcqRel);
        }
        drop(table);
        drop(freed);
        if fits {
            let taken = Arc::clone(&self.taken);
            return Ok(Charge { bytes, taken });
        }
        if many {
            let detail = format!("others have {RETIRED} copies open that are not kept any more");
            return Err(Refusal::new(Reason::Budget, detail));
        }
        let (budget, taken) = (self.budget, self.taken.load(Ordering::Acquire));
        Err(Refusal::new(
            Reason::Budget,
            format!("a copy of {bytes} bytes; of the budget's {budget}, {taken} are in use"),
        ))
    }
}

impl Table {
    /// The place that was used the longest ago, of those that nobody is at and
    /// whose snapshot is `wanted`.
    fn oldest(&self, wanted: impl Fn(&Kept) -> bool) -> Option<Shown> {
        let mut slots: Vec<_> = self.slots.iter().collect();
        slots.sort_by_key(|(_, slot)| slot.used.load(Ordering::Relaxed));
        let found = slots.into_iter().find(|(_, slot)| {
            Arc::strong_count(slot) == 1
                && slot
                    .kept
                    .try_lock()
                    .is_ok_and(|kept| kept.as_ref().is_some_and(&wanted))
        });
        found.map(|(clip, _)| clip.clone())
    }

    /// Takes a place out of the table.
    fn take(&mut self, clip: &Shown) -> Option<Kept> {
        let slot = self.slots.remove(clip)?;
        slot.lock().take()
    }

    /// Takes out the retired copies that nobody has open.
    fn free(&mut self) -> Vec<Object> {
        let (stay, free) = self.retired.drain(..).partition(Object::in_use);
        self.retired = stay;
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{SnapshotKind, reopen};

    #[test]
    fn copies_that_others_keep_are_limited_in_number() {
        let store = Store::new(1 << 20);
        let one = || {
            let file = rustix::fs::memfd_create("clip", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            let object = Object {
                fd: reopen(&file).unwrap(),
                kind: SnapshotKind::Copy,
                charge: Some(store.reserve(1)?),
            };
            let held = object.open()?;
            lock(&store.table).retired.push(object);
            Ok(held)
        };
        let held: Vec<_> = (0..RETIRED).map(|_| one().unwrap()).collect();
        let full: Result<_, Refusal> = one();
        assert_eq!(full.unwrap_err().reason, Reason::Budget);
        drop(held);
        one().unwrap();
    }
}
