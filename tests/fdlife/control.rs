//! What the harness and all workers share: a page of atomics in a file.
//!
//! Workers fork, exec and die in the middle of anything, so that nothing here
//! is ever locked. Every loop of a worker (a thread, or a process of one) has a
//! slot, which its creator reserves before it exists: no loop is missed.

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::calls;
use crate::kinds::KINDS;

pub const SLOTS: usize = 512;
pub const WORKERS: usize = 16;
/// The last calls of a worker that are kept.
pub const KEPT: usize = 8192;
pub const PATHS: usize = 32;
pub const PATH_MAX: usize = 512;

pub const FREE: u32 = 0;
/// Reserved by the one who is about to create the loop.
pub const RESERVED: u32 = 1;
pub const RUNNING: u32 = 2;
pub const PARKED: u32 = 3;

#[repr(C)]
pub struct Slot {
    pub state: AtomicU32,
    pub worker: AtomicU32,
    /// Of the loop; of its creator while it is reserved.
    pub tgid: AtomicI32,
    pub tid: AtomicI32,
    /// For a child that is given descriptors by seccomp(2): the listener, and
    /// whether the supervisor has it.
    pub listener: AtomicI32,
    pub fetched: AtomicI32,
    /// What the loop begins with.
    pub seed: AtomicU64,
    pub life: AtomicU64,
}

/// A call that was made.
#[repr(C)]
pub struct Record {
    /// Its number among the worker's; 0: none yet.
    pub number: AtomicU64,
    pub tgid: AtomicI32,
    pub tid: AtomicI32,
    pub kind: AtomicU32,
    pub args: [AtomicI64; 2],
    pub ret: AtomicI64,
}

#[repr(C)]
pub struct Worker {
    /// Calls made.
    pub calls: AtomicU64,
    pub records: [Record; KEPT],
}

#[repr(C)]
pub struct Control {
    /// Odd: everybody is to park.
    pub epoch: AtomicU32,
    pub stop: AtomicU32,
    pub harness: AtomicI32,
    /// Slots reserved, ever.
    pub reserved: AtomicU64,
    /// Calls made by all.
    pub calls: AtomicU64,
    /// The sum of the weights of the kinds to be made, and each weight.
    pub total: AtomicU32,
    pub weights: [AtomicU32; KINDS],
    /// By kind: successes and errors.
    pub counts: [[AtomicU64; 2]; KINDS],
    /// Clips are first, others behind them: see `Place`.
    pub clips: AtomicU32,
    pub paths: [[AtomicU8; PATH_MAX]; PATHS],
    pub slots: [Slot; SLOTS],
    pub workers: [Worker; WORKERS],
}

impl Control {
    /// Sets a path, which is at most so long.
    pub fn set_path(&self, index: usize, path: &[u8]) {
        assert!(path.len() < PATH_MAX && !path.contains(&0));
        for (to, byte) in self.paths[index].iter().zip(path) {
            to.store(*byte, SeqCst);
        }
        self.paths[index][path.len()].store(0, SeqCst);
    }

    /// The address of a path that ends with a zero.
    pub fn path(&self, index: usize) -> usize {
        std::ptr::from_ref(&self.paths[index]).addr()
    }

    /// Reserves a slot; `None`: the worker has as many as it may.
    pub fn reserve(&self, worker: u32, most: usize, tgid: i32, tid: i32) -> Option<usize> {
        let live = || {
            let of_worker =
                |s: &&Slot| s.state.load(SeqCst) != FREE && s.worker.load(SeqCst) == worker;
            self.slots.iter().filter(of_worker).count()
        };
        if live() >= most {
            self.reclaim(|slot| slot.worker.load(SeqCst) == worker);
            if live() >= most {
                return None;
            }
        }
        let take = |slot: &Slot| {
            let taken = slot.state.compare_exchange(FREE, RESERVED, SeqCst, SeqCst);
            taken.is_ok()
        };
        let index = self.slots.iter().position(take)?;
        let slot = &self.slots[index];
        slot.worker.store(worker, SeqCst);
        slot.tgid.store(tgid, SeqCst);
        slot.tid.store(tid, SeqCst);
        slot.listener.store(-1, SeqCst);
        slot.fetched.store(0, SeqCst);
        self.reserved.fetch_add(1, SeqCst);
        Some(index)
    }

    /// The one who was to have the slot has come. Whoever had this thread's or,
    /// of a new process, this process's number before is gone.
    pub fn claim(&self, index: usize, tgid: i32, tid: i32) -> bool {
        for (other, slot) in self.slots.iter().enumerate() {
            let same = if tgid == tid {
                slot.tgid.load(SeqCst) == tgid
            } else {
                slot.tid.load(SeqCst) == tid
            };
            let state = slot.state.load(SeqCst);
            if other != index && same && matches!(state, RUNNING | PARKED) {
                slot.state.store(FREE, SeqCst);
            }
        }
        let slot = &self.slots[index];
        slot.tgid.store(tgid, SeqCst);
        slot.tid.store(tid, SeqCst);
        let old = slot
            .state
            .compare_exchange(RESERVED, RUNNING, SeqCst, SeqCst);
        // After an exec it is the same slot.
        matches!(old, Ok(_) | Err(RUNNING))
    }

    /// After an exec: what other threads of the process had reserved is for
    /// nobody. A child that comes for one all the same finds that, and ends.
    pub fn abandon(&self, tgid: i32) {
        for slot in &self.slots {
            if slot.tgid.load(SeqCst) == tgid {
                // Where it is not reserved, it is somebody's.
                let _ = slot.state.compare_exchange(RESERVED, FREE, SeqCst, SeqCst);
            }
        }
    }

    /// Frees the slots of the dead: a thread's exec or exit_group() ends the
    /// others of its process wherever they are.
    pub fn reclaim(&self, of: impl Fn(&Slot) -> bool) {
        for slot in &self.slots {
            let state = slot.state.load(SeqCst);
            if !matches!(state, RUNNING | PARKED) || !of(slot) {
                continue;
            }
            let (tgid, tid) = (slot.tgid.load(SeqCst), slot.tid.load(SeqCst));
            if !calls::is_alive(tgid, tid) {
                // Lost where it changed meanwhile, and looked at again later.
                let _ = slot.state.compare_exchange(state, FREE, SeqCst, SeqCst);
            }
        }
    }

    /// Waits while everybody is to park; so the loop is at no call.
    pub fn park_here(&self, index: usize) {
        let slot = &self.slots[index];
        loop {
            let epoch = self.epoch.load(SeqCst);
            if epoch.is_multiple_of(2) {
                return;
            }
            slot.state.store(PARKED, SeqCst);
            calls::futex_wait(&self.epoch, epoch);
            slot.state.store(RUNNING, SeqCst);
            if !calls::is_alive_process(self.harness.load(SeqCst)) {
                calls::exit_group(1);
            }
        }
    }

    pub fn record(&self, worker: u32, tgid: i32, tid: i32, kind: usize, args: [i64; 2], ret: i64) {
        let worker = &self.workers[worker as usize];
        let number = worker.calls.fetch_add(1, SeqCst);
        let record = &worker.records[number as usize % KEPT];
        record.number.store(0, SeqCst);
        record.tgid.store(tgid, SeqCst);
        record.tid.store(tid, SeqCst);
        record.kind.store(kind as u32, SeqCst);
        record.args[0].store(args[0], SeqCst);
        record.args[1].store(args[1], SeqCst);
        record.ret.store(ret, SeqCst);
        record.number.store(number + 1, SeqCst);
        self.counts[kind][usize::from(ret < 0)].fetch_add(1, SeqCst);
        self.calls.fetch_add(1, SeqCst);
    }
}
