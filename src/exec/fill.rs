//! `--fill`: completes clips in rclone's cache while their opens wait.
//!
//! A clip is read through FUSE by a thread of its own, once for all opens that
//! wait for it. These wait no longer than is allowed, whatever the thread hangs
//! in, and no longer than their process wants.

use std::collections::HashMap;
use std::fs;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::notify::SLOTS;
use crate::warm;

/// How clips are completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillOptions {
    /// Bytes that may be missing of a clip.
    pub max_size: u64,
    /// How long an open may wait for it.
    pub timeout: Duration,
}

/// Opens that wait at once: each has a thread, and others need some.
const MAX_WAITING: usize = SLOTS / 2;
/// How often who waits looks whether his process still wants it.
const LOOK: Duration = Duration::from_millis(100);
/// After its last byte, how long rclone may take to write its metadata: from
/// 1.74 on 5 seconds, for ever where another program has the clip open.
const CONFIRM: Duration = Duration::from_secs(20);
/// A clip that could not be completed is left alone for so long.
const AGAIN: Duration = Duration::from_secs(60);

/// The clips that are being completed.
pub(super) struct Fills {
    options: FillOptions,
    waiting: AtomicUsize,
    jobs: Mutex<HashMap<PathBuf, Arc<Job>>>,
    tally: Arc<Tally>,
}

/// What became of it.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) filled: AtomicU64,
    pub(super) failed: AtomicU64,
    /// Read through FUSE, also of those that failed.
    pub(super) bytes: AtomicU64,
}

/// One clip's.
struct Job {
    deadline: Instant,
    /// Opens that wait for it; without any it stops.
    waiting: AtomicUsize,
    end: Mutex<Option<End>>,
    ended: Condvar,
    tally: Arc<Tally>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// So many bytes were read for it.
    Filled(u64),
    /// Nobody waited any more.
    Abandoned,
    Failed(Instant),
}

impl Fills {
    pub(super) fn new(options: FillOptions, tally: Arc<Tally>) -> Self {
        Self {
            options,
            waiting: AtomicUsize::new(0),
            jobs: Mutex::default(),
            tally,
        }
    }

    /// Completes a clip, or waits until another open's thread has; false where
    /// that failed, would take too long, or is not wanted any more.
    pub(super) fn complete(&self, clip: BorrowedFd<'_>, wanted: &dyn Fn() -> bool) -> bool {
        let Ok(path) = fs::read_link(format!("/proc/self/fd/{}", clip.as_raw_fd())) else {
            return false;
        };
        let waits = |waiting| (waiting < MAX_WAITING).then_some(waiting + 1);
        let order = Ordering::Relaxed;
        if self.waiting.fetch_update(order, order, waits).is_err() {
            return false;
        }
        let end = loop {
            // One that was given up just now is begun anew.
            match self.join(&path).map(|job| job.wait(wanted)) {
                Some(Some(End::Abandoned)) if wanted() => {}
                end => break end.flatten(),
            }
        };
        self.waiting.fetch_sub(1, order);
        matches!(end, Some(End::Filled(_)))
    }

    /// The clip's job, begun if there is none, with the caller as one who waits.
    fn join(&self, path: &Path) -> Option<Arc<Job>> {
        let mut jobs = lock(&self.jobs);
        jobs.retain(|_, job| match *lock(&job.end) {
            None => true,
            // Its thread may still hang: one is enough.
            Some(End::Failed(at)) => Arc::strong_count(job) > 1 || at.elapsed() < AGAIN,
            Some(_) => false,
        });
        if let Some(job) = jobs.get(path) {
            job.waiting.fetch_add(1, Ordering::AcqRel);
            return Some(Arc::clone(job));
        }
        let job = Arc::new(Job {
            deadline: Instant::now() + self.options.timeout,
            waiting: AtomicUsize::new(1),
            end: Mutex::default(),
            ended: Condvar::new(),
            tally: Arc::clone(&self.tally),
        });
        let (own, max_size) = (Arc::clone(&job), self.options.max_size);
        let clip = path.to_path_buf();
        thread::Builder::new()
            .name("exec-fill".into())
            .spawn(move || own.run(clip, max_size))
            .ok()?;
        jobs.insert(path.to_path_buf(), Arc::clone(&job));
        Some(job)
    }
}

impl Job {
    /// Waits for its end; `None` where the caller's patience ends before.
    fn wait(&self, wanted: &dyn Fn() -> bool) -> Option<End> {
        let mut end = lock(&self.end);
        while end.is_none() && wanted() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // The thread may notice much later.
                self.finish(&mut end, End::Failed(Instant::now()));
                break;
            }
            let waited = self.ended.wait_timeout(end, left.min(LOOK));
            end = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        *end
    }

    fn run(&self, path: PathBuf, max_size: u64) {
        let is_abandoned = || self.waiting.load(Ordering::Acquire) == 0;
        let stop = || is_abandoned() || Instant::now() >= self.deadline;
        let filled = fill(path, max_size, self.deadline, &stop, &self.tally);
        let end = if let Some(bytes) = filled {
            End::Filled(bytes)
        } else if is_abandoned() && Instant::now() < self.deadline {
            End::Abandoned
        } else {
            End::Failed(Instant::now())
        };
        self.finish(&mut lock(&self.end), end);
    }

    /// Its end, for all who wait, if it has none yet.
    fn finish(&self, current: &mut Option<End>, end: End) {
        if current.is_some() {
            return;
        }
        match end {
            // Nothing was missing: an empty clip, of which rclone keeps nothing.
            End::Filled(0) | End::Abandoned => {}
            End::Filled(_) => one(&self.tally.filled),
            End::Failed(_) => one(&self.tally.failed),
        }
        *current = Some(end);
        self.ended.notify_all();
    }
}

fn one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Reads what is missing of a clip; how many bytes that were, if rclone then
/// has all of it.
fn fill(
    path: PathBuf,
    max_size: u64,
    deadline: Instant,
    stop: &(dyn Fn() -> bool + Sync),
    tally: &Tally,
) -> Option<u64> {
    let found = warm::find(&[path], &|_| {}, stop);
    let [clip] = &found.clips[..] else {
        return None;
    };
    if clip.missing_bytes() > max_size {
        return None;
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let options = warm::Options {
        jobs: NonZeroUsize::MIN,
        wait: Some(left.min(CONFIRM)),
    };
    let reports = warm::complete(&found.clips, &options, &|_| {}, stop);
    let read: u64 = reports.iter().map(|report| report.read_bytes).sum();
    tally.bytes.fetch_add(read, Ordering::Relaxed);
    let is_cached = |report: &warm::Report| report.state == warm::State::Cached;
    reports.iter().all(is_cached).then_some(read)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
