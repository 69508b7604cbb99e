//! Completes clips in rclone's cache: reads what is missing through FUSE, and
//! waits until rclone's metadata shows it.
//!
//! [`find`] lists the clips and what is missing of each, [`complete`] reads
//! it, and [`check`] only looks. What is cached stays cached, so that a run
//! that was stopped goes on where it was.

mod confirm;
mod fill;
mod find;

pub use confirm::check;
pub use find::{Clip, Found, Site, find};

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::reason::Refusal;
use fill::Filled;

/// How to complete clips.
#[derive(Debug, Clone)]
pub struct Options {
    /// Clips that are read at once. rclone downloads each in order of its
    /// bytes, so that several of one clip would not help.
    pub jobs: NonZeroUsize,
    /// How long to wait, after the last clip was closed, until rclone's
    /// metadata shows them whole; since rclone 1.74 this takes 5 seconds.
    pub wait: Option<Duration>,
}

/// What happens meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<'a> {
    /// So many clips were found by now.
    Found(usize),
    /// A clip is opened.
    Begin(&'a Path),
    /// So many bytes were read through FUSE.
    Read(u64),
    /// A clip was read as far as it will be; of what seemed to be missing
    /// these bytes turned out to be cached.
    End {
        /// Bytes that need not be read.
        spared: u64,
    },
    /// All is read; the metadata of so many clips does not show it yet.
    Waiting(usize),
}

/// What has become of a clip, or of a path that leads to none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The metadata shows every byte, of the version that FUSE shows. Only a
    /// read proves it: metadata may be wrong after a power loss.
    Cached,
    /// Read to the end through FUSE, and the metadata does not show it yet:
    /// rclone writes it when nobody has the clip open any more.
    Unconfirmed,
    /// Bytes are missing.
    Incomplete,
    /// A signal came first.
    Stopped,
    /// An error ended it.
    Failed,
    /// Its mount, as it is, caches nothing, or does not show what it caches.
    Refused,
}

impl State {
    /// Every state, best first.
    pub const ALL: [Self; 6] = [
        Self::Cached,
        Self::Unconfirmed,
        Self::Incomplete,
        Self::Stopped,
        Self::Failed,
        Self::Refused,
    ];

    /// The contract's name, `snake_case`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cached => "cached",
            Self::Unconfirmed => "unconfirmed",
            Self::Incomplete => "incomplete",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

/// What was done for one clip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Its absolute path without symlinks, or a path as it was given where it
    /// leads to no clip.
    pub path: PathBuf,
    /// What has become of it.
    pub state: State,
    /// FUSE's size, bytes; `None` where it is no clip.
    pub size: Option<u64>,
    /// Bytes of this version that the metadata listed at first.
    pub cached_before: u64,
    /// The same at the end.
    pub cached_after: u64,
    /// Bytes read through FUSE.
    pub read_bytes: u64,
    /// Why it is not `cached`.
    pub refusal: Option<Refusal>,
}

impl Report {
    fn of_path(path: &Path, state: State, refusal: Refusal) -> Self {
        Self {
            path: path.to_path_buf(),
            state,
            size: None,
            cached_before: 0,
            cached_after: 0,
            read_bytes: 0,
            refusal: Some(refusal),
        }
    }
}

/// Reads what is missing of each clip, and reports in their order. `stop` is
/// asked often; once it says so, clips are left as they are.
#[must_use]
pub fn complete(
    clips: &[Clip],
    options: &Options,
    progress: &(dyn Fn(Progress<'_>) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
) -> Vec<Report> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut buffer = fill::Buffer::default();
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            match clips.get(index) {
                Some(clip) => done.push((index, fill::fill(clip, &mut buffer, progress, stop))),
                None => return done,
            }
        }
    };
    let jobs = options.jobs.get().min(clips.len());
    let mut done: Vec<(usize, Filled)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        let joined = workers.into_iter().map(|worker| match worker.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.flatten().collect()
    });
    done.sort_by_key(|(index, _)| *index);
    let done = done.into_iter().map(|(_, filled)| filled);
    confirm::confirm(
        clips.iter().zip(done).collect(),
        options.wait,
        progress,
        stop,
    )
}
