//! Makes the table agree with the kernel's descriptor tables again: for single
//! processes that the BPF programs have marked, for all of them at the start
//! and when mounts change, and after a loss until nothing is lost any more.
//!
//! The descriptor tables are looked at in the kernel, by the `reconcile` program
//! that this thread runs: the very routine that follows system calls decides,
//! against programs that race with it, too. /proc only tells which processes
//! there are.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use libbpf_rs::{MapCore, MapFlags, MapHandle, ProgramMut};

use super::abi::{self, Mark, Reconciled};
use super::session::Source;
use super::state::State;
use super::{TrackerError, failed, host, pinned};

/// From a mark to its reconciliation: several marks are one then.
const MARK_DELAY: Duration = Duration::from_millis(10);
/// At most so long, however long the last round took.
const MARK_DELAY_MAX: Duration = Duration::from_millis(80);
/// A round is not followed by the next before so many times its own duration:
/// what bounds the CPU time of reconciliation to a twentieth.
const IDLE_FACTOR: u32 = 20;
/// From a loss to the first try to make it good, and at most between tries.
const HEAL_DELAY: Duration = Duration::from_millis(50);
const HEAL_DELAY_MAX: Duration = Duration::from_secs(1);
/// Programs that did not run leave no event: how often to look for such.
const MISSES_INTERVAL: Duration = Duration::from_secs(1);
/// Rounds that marks may cause by marking others.
const ROUNDS_MAX: usize = 8;
/// Runs of the program for one process, of up to 65,536 descriptors each.
const RUNS_MAX: usize = 4_096;

pub(super) struct Reconciler<'a> {
    pub(super) program: ProgramMut<'a>,
    pub(super) marks: MapHandle,
    pub(super) procs: MapHandle,
    pub(super) sweeping: MapHandle,
    pub(super) source: Source<'a>,
    /// When to look at the marks.
    due: Option<Instant>,
    /// When to make losses good, and how long to wait after that fails.
    heal_due: Option<Instant>,
    heal_delay: Duration,
    /// How long the last round took.
    took: Duration,
    misses_due: Instant,
}

impl<'a> Reconciler<'a> {
    pub(super) fn new(
        program: ProgramMut<'a>,
        [marks, procs, sweeping]: [MapHandle; 3],
        source: Source<'a>,
    ) -> Self {
        Self {
            program,
            marks,
            procs,
            sweeping,
            source,
            due: None,
            heal_due: None,
            heal_delay: HEAL_DELAY,
            took: Duration::ZERO,
            misses_due: Instant::now() + MISSES_INTERVAL,
        }
    }

    /// When there is something to do without an event.
    pub(super) fn next_due(&self) -> Instant {
        let others = self.due.into_iter().chain(self.heal_due);
        others.fold(self.misses_due, Instant::min)
    }

    /// Does what is due; called after events were applied.
    pub(super) fn work(&mut self, state: &mut State<'_>) -> Result<(), TrackerError> {
        let now = Instant::now();
        if state.marked {
            state.marked = false;
            let delay = (self.took * IDLE_FACTOR).clamp(MARK_DELAY, MARK_DELAY_MAX);
            self.due.get_or_insert(now + delay);
        }
        if !state.pathless.is_empty() {
            self.due.get_or_insert(now + MARK_DELAY);
        }
        if self.misses_due <= now {
            state.shared.note_recursion_misses();
            self.misses_due = now + MISSES_INTERVAL;
        }
        if self.heal_due.is_none() && !state.shared.known_losses().complete() {
            self.heal_due = Some(now + self.heal_delay);
        }
        if self.due.is_some_and(|due| due <= now) {
            self.due = None;
            self.busy(state, |this, state| this.settle_marks(state, false))?;
        }
        if self.heal_due.is_some_and(|due| due <= now) {
            self.heal_due = None;
            self.busy(state, Self::heal)?;
        }
        Ok(())
    }

    /// Looks at every process: at the start, and when mounts have come or gone.
    pub(super) fn adopt(&mut self, state: &mut State<'_>) -> Result<(), TrackerError> {
        self.busy(state, |this, state| {
            if !this.sweep(state, false)? {
                state.shared.note_reconcile_failed(&mut state.published);
            }
            this.settle_marks(state, false)
        })
    }

    /// `dump-map` waits until it is over.
    fn busy(
        &mut self,
        state: &mut State<'_>,
        work: impl FnOnce(&mut Self, &mut State<'_>) -> Result<(), TrackerError>,
    ) -> Result<(), TrackerError> {
        let started = Instant::now();
        state.published.set(|meta| meta.busy = 1);
        let result = work(self, state);
        state.published.set(|meta| meta.busy = 0);
        self.took = started.elapsed();
        result
    }

    /// Reconciles the marked processes, and those that are marked by that; with
    /// `resend` the kernel tells of every descriptor again.
    fn settle_marks(&mut self, state: &mut State<'_>, resend: bool) -> Result<(), TrackerError> {
        for _ in 0..ROUNDS_MAX {
            self.source.drain(state);
            state.marked = false;
            let pathless: BTreeSet<u32> = state.pathless.drain(..).collect();
            for pid in pathless {
                self.one(state, pid, Mark::FOUND, true)?;
            }
            let mut keys: Vec<Vec<u8>> = self.marks.keys().collect();
            let count = keys.len();
            keys.retain(|key| *key != abi::MARK_ALL.to_ne_bytes());
            if keys.len() < count {
                // It stays until then: `dump-map` waits for it.
                let due = Instant::now() + self.heal_delay;
                self.heal_due.get_or_insert(due);
            }
            if keys.is_empty() {
                break;
            }
            let mut marked = BTreeMap::new();
            for key in keys {
                // First: a mark that comes from now on is a new one.
                let Ok(why) = self.marks.lookup_and_delete(&key) else {
                    state.shared.note_reconcile_failed(&mut state.published);
                    continue;
                };
                if let Ok(pid) = key.try_into().map(u32::from_ne_bytes) {
                    marked.insert(pid, why.map_or(Mark::FOUND, |bytes| Mark::decode(&bytes)));
                }
            }
            // Who shares a table with one of these is not told; there are few.
            let sharers = abi::sharers(&self.procs);
            if sharers.iter().any(|pid| marked.contains_key(pid)) {
                for pid in sharers {
                    marked.entry(pid).or_insert(Mark::SHARER);
                }
            }
            for (pid, mark) in marked {
                self.one(state, pid, mark, resend)?;
            }
        }
        if !self.marks_are_empty() {
            self.due.get_or_insert(Instant::now() + MARK_DELAY);
        }
        self.source.drain(state);
        Ok(())
    }

    /// Whether no single process is marked.
    fn marks_are_empty(&self) -> bool {
        let all = abi::MARK_ALL.to_ne_bytes();
        self.marks.keys().all(|key| key == all)
    }

    /// Tries to make all losses good: the table is exact if none came meanwhile.
    fn heal(&mut self, state: &mut State<'_>) -> Result<(), TrackerError> {
        let before = state.shared.losses().breaking();
        // First: what gets lost from now on is for the next time.
        let _ = self.marks.delete(&abi::MARK_ALL.to_ne_bytes());
        let mut exact = self.sweep(state, true)?;
        // Threads with tables of their own are marked by that.
        self.settle_marks(state, true)?;
        let now = SystemTime::now();
        let keys = state.write_table().keys(0..=u32::MAX);
        for key in keys {
            state.agree(key, now, true);
        }
        exact &= state.shared.losses().breaking() == before;
        if exact {
            state.shared.note_healed(before);
            state.published.set(|meta| meta.healed = before);
            self.heal_delay = HEAL_DELAY;
        } else {
            self.heal_delay = (self.heal_delay * 2).min(HEAL_DELAY_MAX);
            self.heal_due = Some(Instant::now() + self.heal_delay);
        }
        Ok(())
    }

    /// Reconciles every process; false where they could not all be told. With
    /// `resend` the kernel tells of every descriptor again.
    fn sweep(&mut self, state: &mut State<'_>, resend: bool) -> Result<bool, TrackerError> {
        // Forks are looked at whatever their parents are known to have: a child
        // may come in before the place where we are.
        self.set_sweeping(1)?;
        let pids = host::processes();
        let complete = pids.is_ok();
        for pid in pids.unwrap_or_default() {
            self.one(state, pid, Mark::FOUND, resend)?;
        }
        self.set_sweeping(0)?;
        // Entries of processes that are gone by now, ours and the kernel's.
        let mut known = state.write_table().pids();
        known.extend(pinned::tracked_pids(&state.fds));
        for pid in known {
            self.one(state, pid, Mark::FOUND, false)?;
        }
        self.source.drain(state);
        Ok(complete)
    }

    fn set_sweeping(&self, on: u32) -> Result<(), TrackerError> {
        self.sweeping
            .update(&0u32.to_ne_bytes(), &on.to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| failed("BPF map", e))
    }

    /// Reconciles one process, or a thread with a table of its own.
    fn one(
        &mut self,
        state: &mut State<'_>,
        pid: u32,
        mark: Mark,
        resend: bool,
    ) -> Result<(), TrackerError> {
        let mut from = 0;
        for _ in 0..RUNS_MAX {
            let found = abi::reconcile(&self.program, (pid, from), mark, resend)
                .map_err(|e| failed("reconciling with the kernel", e))?;
            match found {
                Reconciled::From(next) => {
                    from = next;
                    self.source.drain(state);
                }
                Reconciled::Done | Reconciled::Gone => {
                    let now = SystemTime::now();
                    let keys = state.write_table().keys(pid..=pid);
                    for key in keys {
                        state.agree(key, now, false);
                    }
                    return Ok(());
                }
            }
        }
        state.shared.note_reconcile_failed(&mut state.published);
        Ok(())
    }
}
