//! `mount`'s own.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[cfg(feature = "metrics")]
use super::MetricsArgs;
use super::{Format, Size};

#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: 0 unmounted, or in the background and mounted; 1 serving failed; 2 the
folders or options make no sense; 3 it cannot be mounted here, or passthrough is
required and cannot be had. SIGINT, SIGTERM, SIGHUP and SIGQUIT unmount.")]
pub struct MountArgs {
    /// A folder on an rclone mount.
    pub source: PathBuf,
    /// Where it is shown again: a folder.
    pub mountpoint: PathBuf,
    /// Whether the kernel reads whole clips by itself, Linux 6.9.
    #[arg(long, value_enum, default_value_t = Passthrough::Auto)]
    pub passthrough: Passthrough,
    /// What the kernel reads from.
    #[arg(long, value_enum, default_value_t = MountSnapshot::Auto)]
    pub snapshot: MountSnapshot,
    /// Memory for copies, at most.
    #[arg(long, default_value = "4GiB", value_name = "SIZE")]
    pub copy_budget: Size,
    /// Let other users in, as far as owners and modes allow.
    #[arg(long)]
    pub allow_other: bool,
    /// Threads that serve: each may wait for rclone.
    #[arg(long, default_value_t = 64, value_name = "N",
          value_parser = clap::value_parser!(u16).range(2..=1024))]
    pub threads: u16,
    /// Stay in the foreground, and tell at the end what was read and how.
    #[arg(short, long)]
    pub foreground: bool,
    /// How to tell it.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Mount options, as of mount(8).
    #[arg(short, value_delimiter = ',', value_name = "OPTION")]
    pub options: Vec<String>,
    #[cfg(feature = "metrics")]
    #[command(flatten)]
    pub metrics: MetricsArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Passthrough {
    /// Where it can.
    Auto,
    /// All is read by proven ranges.
    Never,
    /// Where it cannot, nothing is mounted.
    Require,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MountSnapshot {
    /// Reflinks; without, all is read by proven ranges.
    Auto,
    /// Reflinks; without, copies in memory.
    Copy,
    /// The same; where neither can be had for want of passthrough, nothing is
    /// mounted.
    Require,
    /// The cache file itself, while nobody else has it open: for remotes whose
    /// clips never change.
    Off,
}
