//! `exec`'s own.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::{Format, Size};

#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: the command's own, or its death by the same signal; 125 exec itself
failed; 126 the command cannot be executed; 127 it was not found.")]
pub struct ExecArgs {
    /// Watch clips below these folders alone, and not all rclone mounts.
    #[arg(long, value_delimiter = ',', value_name = "DIR")]
    pub prefix: Vec<PathBuf>,
    /// Tell at the end, on standard error, what became of the opens.
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true,
          default_missing_value = "text", value_name = "FORMAT")]
    pub report: Option<Format>,
    /// How clips are handed over.
    #[arg(long, value_enum, default_value_t = Snapshot::Auto)]
    pub snapshot: Snapshot,
    /// Memory for copies, at most.
    #[arg(long, default_value = "4GiB", value_name = "SIZE")]
    pub copy_budget: Size,
    /// Where the cache may not be opened, ask the server of `run --socket` at
    /// this socket; by default the one that VMAFX_BYPASS_SOCKET names.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Complete clips in the cache that are not whole, while their opens wait.
    #[arg(long)]
    pub fill: bool,
    /// Bytes that may be missing of a clip, for it to be completed.
    #[arg(long, default_value = "4GiB", value_name = "SIZE", requires = "fill")]
    pub fill_max_size: Size,
    /// How long an open may wait for its clip to be completed.
    #[arg(long, default_value = "5m", value_name = "DURATION", requires = "fill")]
    pub fill_timeout: humantime::Duration,
    /// Programs, by name, to be taken off the list of those that are left alone.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub include: Vec<OsString>,
    /// Further programs to be left alone.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub exclude: Vec<OsString>,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND",
          value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Snapshot {
    /// As a reflink where the cache's file system can, else as a copy in memory,
    /// else through FUSE.
    Auto,
    /// The same; without assistance the command does not run.
    Require,
    /// The cache file itself, while nobody else has it open: for remotes whose
    /// clips never change.
    Off,
}
