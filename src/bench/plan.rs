//! What to measure.

use std::path::PathBuf;

use serde::Serialize;

/// A way to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// read(2) and pread(2) through the rclone mount.
    Fuse,
    /// The same through another mount of the remote: see [`Plan::tuned`].
    FuseTuned,
    /// [`BypassFile`](crate::BypassFile).
    Bypass,
    /// The same, by the proof of a handover server.
    Handover,
    /// [`BypassFile`](crate::BypassFile) by `BufRead`, which lends its buffer;
    /// at random as `bypass`.
    Bufread,
    /// A snapshot, mapped: each open proves the clip, and maps it.
    Mmap,
    /// A program that knows of nothing, under `exec`.
    Exec,
    /// read(2) and pread(2) through a mount of ours, the kernel reading from a
    /// snapshot.
    #[cfg(feature = "mount")]
    Mount,
    /// The same, by proven ranges.
    #[cfg(feature = "mount")]
    MountRanges,
    /// read(2) and pread(2) on the cache file, without any proof.
    Raw,
    /// The same by io_uring, with the file and, as far as memory may be locked, the
    /// buffers registered: up to 8 reads at once in order, one at random.
    IoUring,
    /// A program that knows of nothing, whose opens of the clip a preloaded library
    /// turns into opens of the cache file, without any proof.
    Preload,
    /// read(2) and pread(2) on a local copy of the clip, which is made before.
    Copy,
}

impl Engine {
    /// Every engine of this build.
    pub const ALL: &'static [Self] = &[
        Self::Fuse,
        Self::FuseTuned,
        Self::Bypass,
        Self::Handover,
        Self::Bufread,
        Self::Mmap,
        Self::Exec,
        #[cfg(feature = "mount")]
        Self::Mount,
        #[cfg(feature = "mount")]
        Self::MountRanges,
        Self::Raw,
        Self::IoUring,
        Self::Preload,
        Self::Copy,
    ];

    /// The contract's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fuse => "fuse",
            Self::FuseTuned => "fuse_tuned",
            Self::Bypass => "bypass",
            Self::Handover => "handover",
            Self::Bufread => "bufread",
            Self::Mmap => "mmap",
            Self::Exec => "exec",
            #[cfg(feature = "mount")]
            Self::Mount => "mount",
            #[cfg(feature = "mount")]
            Self::MountRanges => "mount_ranges",
            Self::Raw => "raw",
            Self::IoUring => "io_uring",
            Self::Preload => "preload",
            Self::Copy => "copy",
        }
    }

    /// Whether what it reads may be not in memory. A program that is run for it reads
    /// the clip once before it is measured.
    pub(super) fn can_be_cold(self) -> bool {
        #[cfg(feature = "mount")]
        if self == Self::Mount {
            return false;
        }
        !matches!(self, Self::Mmap | Self::Exec | Self::Preload)
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
    /// Whether engines that cannot run here are left out, and told in
    /// [`Results::left_out`](super::Results::left_out); if not, one ends it.
    pub leave_out: bool,
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
    /// Another mount of the same remote, for [`Engine::FuseTuned`].
    pub tuned: Option<Tuned>,
    /// The `vmafx-bypass` program: for [`Engine::Exec`] and [`Engine::Preload`], which
    /// run its `bench` as the program that reads.
    pub program: Option<PathBuf>,
}

/// Where else clips are mounted, with other options.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// The folder that clips are below.
    pub prefix: PathBuf,
    /// The same folder of the other mount.
    pub folder: PathBuf,
}
