//! What processes of readers are given, and what they tell.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::judge::Wrong;

/// A clip that readers read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Clip {
    pub name: String,
    pub file: u16,
    /// Nobody reads it for half of the time: long enough for rclone to evict it.
    pub dozes: bool,
}

/// What a process of readers is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Task {
    pub folder: PathBuf,
    pub clips: Vec<Clip>,
    /// Those that a mutator changes, a group for each.
    pub groups: Vec<Vec<Clip>>,
    pub seed: u64,
    pub threads: u64,
    /// Whether clips are also written through the mount.
    pub writable: bool,
}

/// A way to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `read_at`, the file opened for a read or two.
    OpenClose,
    /// `read_at`, the file held for seconds.
    Held,
    /// `Read` and `Seek`, small and sequential, by the buffer.
    Sequential,
    /// Threads that share one file.
    Shared,
    /// A descriptor that somebody else has opened.
    FromFd,
}

/// A read that FUSE does not account for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Suspect {
    pub clip: String,
    pub kind: Option<Kind>,
    pub seed: u64,
    pub offset: u64,
    pub asked: usize,
    pub read_bytes: usize,
    /// Bytes that the file took from the cache meanwhile.
    pub cache_bytes: u64,
    /// When the FUSE read before it began, and when it began and ended, ns.
    pub before: u64,
    pub read: [u64; 2],
    pub way: String,
    /// The version that FUSE had shown elsewhere in the file; 0: not asked.
    pub floor: u32,
    /// Size and time that FUSE had shown before that, whole seconds.
    pub shown: Option<(u64, u64)>,
    pub state: String,
    pub wrong: Vec<Wrong>,
    pub more_wrong: usize,
}

/// What readers did.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Tally {
    pub reads: u64,
    pub bytes: u64,
    pub cache_bytes: u64,
    pub cache_bytes_by_kind: BTreeMap<String, u64>,
    pub cache_bytes_by_clip: BTreeMap<String, u64>,
    pub fuse_bytes_by_reason: BTreeMap<String, u64>,
    /// Refusals that a file was opened with.
    pub refused_opens: BTreeMap<String, u64>,
    pub opens: u64,
    /// Errors that the bypassed file returned, as FUSE may at any time.
    pub errors: BTreeMap<String, u64>,
    /// Right at once; a later read of FUSE, or one by an older descriptor,
    /// accounted for it; FUSE had nothing but errors.
    pub right: u64,
    pub right_later: u64,
    pub unjudged: u64,
    /// Not accounted for, but nothing in it came from the cache: FUSE's own.
    pub fuse_alone: u64,
    pub suspects: u64,
}

impl Tally {
    pub fn add(&mut self, other: Self) {
        let sum = |to: &mut BTreeMap<String, u64>, from: BTreeMap<String, u64>| {
            for (key, n) in from {
                *to.entry(key).or_default() += n;
            }
        };
        self.reads += other.reads;
        self.bytes += other.bytes;
        self.cache_bytes += other.cache_bytes;
        sum(&mut self.cache_bytes_by_kind, other.cache_bytes_by_kind);
        sum(&mut self.cache_bytes_by_clip, other.cache_bytes_by_clip);
        sum(&mut self.fuse_bytes_by_reason, other.fuse_bytes_by_reason);
        sum(&mut self.refused_opens, other.refused_opens);
        self.opens += other.opens;
        sum(&mut self.errors, other.errors);
        self.right += other.right;
        self.right_later += other.right_later;
        self.unjudged += other.unjudged;
        self.fuse_alone += other.fuse_alone;
        self.suspects += other.suspects;
    }
}

/// What a process of readers tells, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// A thread is about to do this: what it hangs in, if nothing follows.
    Doing(u64, String),
    Suspect(Box<Suspect>),
    Done(Box<Tally>),
}
