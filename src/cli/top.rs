//! `top`'s own.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::Format;

#[derive(Debug, Args)]
#[command(after_help = "\
Without a terminal, with --count and with --format json it prints what it sees, once an
interval. Reads are counted by a `run --account` alone.

Exit codes: 0 ended by a key, or after --count; 3 there is no `run` to show; 129, 130,
131 or 143 a signal came.")]
pub struct TopArgs {
    /// Where the maps are pinned.
    #[arg(long, default_value = "/sys/fs/bpf/vmafx-bypass", value_name = "DIR")]
    pub pin_dir: PathBuf,
    /// How often to look: at least 100ms; less often by itself where a look takes long.
    #[arg(short, long, default_value = "1s", value_name = "DURATION")]
    pub interval: Interval,
    /// Print what is seen, so many times, and end.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// What to show first, or to print.
    #[arg(long, value_enum, default_value_t = TopView::Clips)]
    pub view: TopView,
    /// How to print; JSON has both views.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TopView {
    /// A row a clip.
    Clips,
    /// A row a process.
    Processes,
}

/// How often to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval(pub Duration);

impl FromStr for Interval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let interval = humantime::parse_duration(text).map_err(|e| e.to_string())?;
        if interval < Duration::from_millis(100) {
            return Err("at least 100ms".into());
        }
        Ok(Self(interval))
    }
}
