//! `bench`'s own.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};

use super::{Size, parse_block_size};

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Clips on an rclone mount, relative to --prefix or absolute.
    #[arg(required_unless_present = "generate")]
    pub path: Vec<PathBuf>,
    /// A folder on an rclone mount.
    #[arg(long, value_name = "DIR")]
    pub prefix: Option<PathBuf>,
    /// Make a clip of this size, serve, mount and cache it, and clean up.
    #[arg(long, value_name = "SIZE", num_args = 0..=1, default_missing_value = "100MiB",
          require_equals = false, conflicts_with_all = ["path", "prefix"])]
    pub generate: Option<Size>,
    /// The rclone program for --generate.
    #[arg(long, default_value = "rclone", value_name = "PROGRAM")]
    pub rclone: PathBuf,
    /// Bytes per read.
    #[arg(long, default_value = "4KiB,64KiB,256KiB,1MiB", value_delimiter = ',',
          value_name = "LIST", value_parser = parse_block_size)]
    pub block_size: Vec<Size>,
    /// In which order.
    #[arg(
        long,
        value_enum,
        default_value = "sequential,random",
        value_delimiter = ','
    )]
    pub pattern: Vec<Pattern>,
    /// Measured runs of each engine.
    #[arg(long, default_value_t = 7, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub runs: u32,
    /// Readers at once, each with the clip open for itself.
    #[arg(long, default_value = "1", value_delimiter = ',', value_name = "LIST",
          value_parser = clap::value_parser!(u32).range(1..=256))]
    pub streams: Vec<u32>,
    /// The folder of --prefix on another mount of the remote, with other options: for
    /// the engine `fuse_tuned`. --generate makes one itself.
    #[arg(long, value_name = "DIR", requires = "prefix")]
    pub tuned: Option<PathBuf>,
    /// Drop the kernel's pages of the clip and of its cache file before each run:
    /// what is read comes from the disk.
    #[arg(long)]
    pub cold: bool,
    /// What to compare; `all`: whatever can run here, and why others cannot.
    #[arg(
        long,
        value_enum,
        default_value = "fuse,bypass,raw",
        value_delimiter = ','
    )]
    pub engines: Vec<Engine>,
    /// The socket of `run --socket`: for the engine `handover`, and for `bypass`
    /// where the cache may not be opened; by default the one that
    /// VMAFX_BYPASS_SOCKET names.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Fail with exit 5 where FUSE is not so many times slower than the bypass:
    /// one number, or by block size (`4KiB=12,64KiB=20`); sequential reads.
    #[arg(long, value_delimiter = ',', value_name = "RATIO")]
    pub gate: Vec<GateArg>,
    /// Fail with exit 5 where an engine's ratio to FUSE is worse than in this
    /// report, which `--format json` has written before, by more than
    /// --max-regression.
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// How much of a ratio of the baseline may be lost.
    #[arg(long, default_value = "10%", value_name = "PERCENT", value_parser = parse_percent)]
    pub max_regression: f64,
    /// Measure again, so often, what misses the gate or the baseline.
    #[arg(long, default_value_t = 2, value_name = "N",
          value_parser = clap::value_parser!(u32).range(0..=100))]
    pub retries: u32,
    /// Write what the gate and the baseline found as JUnit's XML, too.
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// How to print results.
    #[arg(long, value_enum, default_value_t = BenchFormat::Text)]
    pub format: BenchFormat,
    /// Write to this file; `-` is standard output.
    #[arg(short, long, default_value = "-", value_name = "FILE")]
    pub output: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchFormat {
    Text,
    Json,
    /// One file with pictures, and the JSON in it.
    Html,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    Sequential,
    Random,
    /// An open and one read.
    Open,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Every one that can run here.
    All,
    /// The rclone mount.
    Fuse,
    /// Another mount of the remote, by --tuned.
    #[value(name = "fuse_tuned")]
    FuseTuned,
    /// This program's reader.
    Bypass,
    /// The same by a server's proof, even where the cache may be opened.
    Handover,
    /// This program's reader, its buffer lent: no copy.
    Bufread,
    /// A snapshot of the clip, mapped.
    Mmap,
    /// A program that knows of nothing, under `exec`.
    Exec,
    /// A mount of ours, the kernel reading from a reflink or copy.
    #[cfg(feature = "mount")]
    Mount,
    /// A mount of ours, by proven ranges.
    #[cfg(feature = "mount")]
    #[value(name = "mount_ranges")]
    MountRanges,
    /// pread(2) on the cache file, without any proof.
    Raw,
    /// The same by io_uring, file and buffers registered.
    #[value(name = "io_uring")]
    IoUring,
    /// A program that knows of nothing, with a library preloaded that opens the cache
    /// file, without any proof.
    Preload,
    /// A local copy of the clip, made for the purpose.
    Copy,
}

/// A share, of `10%` or `10`.
fn parse_percent(text: &str) -> Result<f64, String> {
    match text.strip_suffix('%').unwrap_or(text).trim().parse::<f64>() {
        Ok(percent) if (0.0..100.0).contains(&percent) => Ok(percent / 100.0),
        _ => Err("not a share; write it as 10%".into()),
    }
}

/// A gate: for every block size, or for one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateArg {
    pub block_size: Option<u64>,
    pub ratio: f64,
}

impl FromStr for GateArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (block_size, ratio) = match text.split_once('=') {
            Some((size, ratio)) => (Some(parse_block_size(size)?.0), ratio),
            None => (None, text),
        };
        match ratio.parse::<f64>() {
            Ok(ratio) if ratio.is_finite() && ratio > 0.0 => Ok(Self { block_size, ratio }),
            _ => Err("a gate is a positive number, or SIZE=NUMBER".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_parse() {
        let parse = |t: &str| t.parse::<GateArg>().ok();
        let gate = |block_size, ratio| Some(GateArg { block_size, ratio });
        assert_eq!(parse("20"), gate(None, 20.0));
        assert_eq!(parse("4KiB=30.5"), gate(Some(4096), 30.5));
        for bad in ["", "0", "-1", "x=1", "4KiB=", "nan", "inf"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
