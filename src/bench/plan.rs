//! What to measure.

use std::path::PathBuf;

use serde::Serialize;

/// A way to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// read(2) and pread(2) through the rclone mount.
    Fuse,
    /// [`BypassFile`](crate::BypassFile).
    Bypass,
    /// The same, by the proof of a handover server.
    Handover,
    /// [`BypassFile`](crate::BypassFile) by `BufRead`, which lends its buffer;
    /// at random as `bypass`.
    Bufread,
    /// A snapshot, mapped: each open proves the clip, and maps it.
    Mmap,
    /// read(2) and pread(2) on the cache file, without any proof.
    Raw,
    /// read(2) and pread(2) on a local copy of the clip, which is made before.
    Copy,
    /// read(2) and pread(2) through a mount of ours, the kernel reading from a
    /// snapshot.
    #[cfg(feature = "mount")]
    Mount,
    /// The same, by proven ranges.
    #[cfg(feature = "mount")]
    MountRanges,
}

impl Engine {
    /// The contract's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fuse => "fuse",
            Self::Bypass => "bypass",
            Self::Handover => "handover",
            Self::Bufread => "bufread",
            Self::Mmap => "mmap",
            Self::Raw => "raw",
            Self::Copy => "copy",
            #[cfg(feature = "mount")]
            Self::Mount => "mount",
            #[cfg(feature = "mount")]
            Self::MountRanges => "mount_ranges",
        }
    }
}

impl Engine {
    /// Whether what it reads may be not in memory.
    pub(super) fn can_be_cold(self) -> bool {
        #[cfg(feature = "mount")]
        if self == Self::Mount {
            return false;
        }
        self != Self::Mmap
    }
}

/// In which order blocks are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// From start to end; a sample is the whole clip.
    Sequential,
    /// Whole blocks in a fixed random order, none twice; a sample is one read.
    Random,
    /// A sample is an open and the read of one block.
    Open,
}

impl Pattern {
    /// The contract's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Random => "random",
            Self::Open => "open",
        }
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Clips on an rclone mount, cached whole.
    pub clips: Vec<PathBuf>,
    /// Engines, without repetition.
    pub engines: Vec<Engine>,
    /// Patterns, without repetition.
    pub patterns: Vec<Pattern>,
    /// Bytes per read, each at least 1.
    pub block_sizes: Vec<usize>,
    /// Readers at once, each at least 1.
    pub streams: Vec<u32>,
    /// Measured runs of each, at least 1.
    pub runs: u32,
    /// Whether the kernel's pages of the clip, and of its cache file, are dropped
    /// before each run: what is read then comes from the disk.
    pub cold: bool,
    /// The handover server; `None`: the one that `VMAFX_BYPASS_SOCKET` names.
    pub socket: Option<PathBuf>,
}
