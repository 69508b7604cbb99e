//! The command line's types.

mod bench;
mod exec;
mod generate;
#[cfg(feature = "metrics")]
mod metrics;
#[cfg(feature = "mount")]
mod mount;
#[cfg(feature = "top")]
mod top;

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::LazyLock;

pub use bench::{BenchArgs, BenchFormat, Engine, Pattern};
use clap::{Args, Parser, Subcommand, ValueEnum};
pub use exec::{ExecArgs, Snapshot};
pub use generate::{GenerateArgs, Generated};
#[cfg(feature = "metrics")]
pub use metrics::MetricsArgs;
#[cfg(feature = "mount")]
pub use mount::{MountArgs, MountSnapshot, Passthrough};
#[cfg(feature = "top")]
pub use top::{TopArgs, TopView};
use vmafx_bypass::handover::Owner;
use vmafx_bypass::version;

/// What `--version` says.
static BUILD: LazyLock<String> = LazyLock::new(|| version::build().to_string());

/// Reads clips that rclone has cached past FUSE, never at the price of a wrong byte.
#[derive(Debug, Parser)]
#[command(version, long_version = BUILD.as_str(), max_term_width = 100, after_help = "\
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the environment cannot do it or nobody
opted in, 4 data mismatch, 5 gate missed.")]
pub struct Cli {
    /// Print no notes and warnings.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Explain more.
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show which clips programs open below an rclone mount, as it happens.
    Run(RunArgs),
    /// Show what a running `run` tracks at the moment.
    DumpMap(DumpMapArgs),
    /// Read a file, from the cache where that is proven to be right.
    Read(ReadArgs),
    /// Show what works on this host, and why not: kernel, rights, ways to
    /// attach, mounts, caches. Exit 3 where `run` could not work.
    Doctor(DoctorArgs),
    /// Show whether a file is bypassed, gate by gate, and why not.
    ///
    /// It opens the file through FUSE and, where something of it is cached,
    /// reads one byte there, as every proof does. It changes nothing else.
    Explain(ExplainArgs),
    /// Measure FUSE, the bypass and the raw cache file side by side.
    Bench(BenchArgs),
    /// Run a program that nobody will change, past FUSE.
    ///
    /// What it opens for reading on rclone mounts, and is whole in the cache, it
    /// gets as a snapshot: a reflink or a copy in memory. All else goes on as
    /// without exec.
    Exec(ExecArgs),
    /// Show an rclone mount again, read-only, past FUSE where it is cached: for
    /// programs that nobody changes and nobody wraps.
    ///
    /// Whole clips are read by the kernel itself, from reflinks or copies (Linux
    /// 6.9); all else by proven ranges.
    #[cfg(feature = "mount")]
    Mount(MountArgs),
    /// Complete clips in rclone's cache: read what is missing, and only that.
    Warm(WarmArgs),
    /// Write man pages, or a shell's completions: for packages.
    #[command(hide = true)]
    Generate(GenerateArgs),
    /// Show live what a running `run` tracks: clips and processes, what of them is
    /// cached, and what is read through FUSE.
    #[cfg(feature = "top")]
    Top(TopArgs),
}

#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// A folder on an rclone mount; may be given more than once.
    #[arg(long, required = true, value_delimiter = ',', value_name = "DIR")]
    pub prefix: Vec<PathBuf>,
    /// Opt in for this one start; VMAFX_EBPF_BYPASS=1 does so for good.
    #[arg(long)]
    pub enable: bool,
    /// rclone's cache folder, where its daemon does not show it; for the
    /// estimates alone.
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Where to pin the maps.
    #[arg(long, default_value = "/sys/fs/bpf/vmafx-bypass", value_name = "DIR")]
    pub pin_dir: PathBuf,
    /// How to attach.
    #[arg(long, value_enum, default_value_t = Attach::Auto)]
    pub attach: Attach,
    /// Descriptors tracked at once, at most.
    #[arg(long, default_value_t = 65_536, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=1 << 22))]
    pub max_fds: u32,
    /// Count what reads of clips through FUSE cost, by clip and process, and estimate
    /// what the bypass would have saved. Every read of the host pays a little.
    #[arg(long)]
    pub account: bool,
    /// Size of the event ring: a power of two.
    #[arg(long, default_value = "4MiB", value_name = "SIZE", value_parser = parse_ring_size)]
    pub ring_size: Size,
    /// Start before the prefix is mounted: wait for it, at most so long if a
    /// duration is given.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "forever",
          value_name = "DURATION")]
    pub wait: Option<Wait>,
    /// End by itself after this time.
    #[arg(long, value_name = "DURATION")]
    pub duration: Option<humantime::Duration>,
    /// How to print events.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Print no row for each event: notes, mounts and the summary alone.
    #[arg(long)]
    pub no_events: bool,
    /// Hand proven cache files over, at this Unix socket, to those who hold a
    /// clip below a prefix open and may not open the cache. A socket that systemd
    /// gives is served without this option, too.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Who may ask: the socket file's mode, octal.
    /// 0660 by default.
    #[arg(long, value_name = "MODE", value_parser = parse_mode, requires = "socket")]
    pub socket_mode: Option<u32>,
    /// Whose the socket file is: user:group, user, or :group.
    #[arg(long, value_name = "OWNER", requires = "socket")]
    pub socket_owner: Option<Owner>,
    /// Bytes of memory that whole clips which are handed over may take, where
    /// the cache's file system has no reflinks.
    #[arg(long, default_value = "1GiB", value_name = "SIZE", requires = "socket")]
    pub copy_budget: Size,
    #[cfg(feature = "metrics")]
    #[command(flatten)]
    pub metrics: MetricsArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Attach {
    /// Of what works here, what costs the host least.
    Auto,
    /// The system calls' functions: no cost for other calls.
    Fentry,
    /// The raw tracepoints of all system calls: sees 32-bit programs, too.
    Raw,
    /// A tracepoint for each system call: needs tracefs.
    Tracepoint,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

#[derive(Debug, Args)]
pub struct DumpMapArgs {
    /// Where the maps are pinned.
    #[arg(long, default_value = "/sys/fs/bpf/vmafx-bypass", value_name = "DIR")]
    pub pin_dir: PathBuf,
    /// Only these processes.
    #[arg(long, value_delimiter = ',', value_name = "PID")]
    pub pid: Vec<u32>,
    /// How to print them.
    #[arg(long, value_enum, default_value_t = TableFormat::Table)]
    pub format: TableFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TableFormat {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct ReadArgs {
    /// The file.
    pub path: PathBuf,
    /// Start here.
    #[arg(long, default_value = "0", value_name = "SIZE")]
    pub offset: Size,
    /// Read so much, and not to the end.
    #[arg(long, value_name = "SIZE")]
    pub length: Option<Size>,
    /// Write to this file, whole or not at all; `-` is standard output.
    #[arg(short, long, default_value = "-", value_name = "FILE")]
    pub output: PathBuf,
    /// Bytes read at once.
    #[arg(long, default_value = "1MiB", value_name = "SIZE", value_parser = parse_block_size)]
    pub block_size: Size,
    /// How to read: `auto` takes what is fastest of one reading, pread(2).
    #[arg(long, value_enum, default_value_t = ReadEngine::Auto)]
    pub engine: ReadEngine,
    /// Compare what comes from the cache with FUSE's bytes: up to 4 KiB of the
    /// first read and of every 64th, or all. On a difference FUSE's bytes are
    /// written, and the exit code is 4.
    #[arg(long, value_enum, default_value_t = VerifyMode::Off)]
    pub verify: VerifyMode,
    /// Where the cache may not be opened, ask the server of `run --socket` at
    /// this socket; by default the one that VMAFX_BYPASS_SOCKET names.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Tell on standard error which way the bytes came.
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true,
          default_missing_value = "text", value_name = "FORMAT")]
    pub stats: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VerifyMode {
    Off,
    Sample,
    Full,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Folders that must be on rclone mounts.
    #[arg(long, value_delimiter = ',', value_name = "DIR")]
    pub prefix: Vec<PathBuf>,
    /// How to print it.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The file.
    pub path: PathBuf,
    /// Where the cache may not be opened, ask the server of `run --socket` at
    /// this socket; by default the one that VMAFX_BYPASS_SOCKET names.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// How to print it.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReadEngine {
    /// From the cache where proven, through FUSE elsewhere.
    Auto,
    /// The same, by pread(2): the fastest for one reading.
    Pread,
    /// A whole clip from a snapshot in memory or on the cache's file system; one that
    /// cannot be had so is read by pread(2).
    Mmap,
    /// Through FUSE alone.
    Fuse,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: 0 all is cached, or read to its end and only not shown by rclone's
metadata yet (`unconfirmed`); 1 something is not; 3 a mount does not cache what
is read, or hides its cache; 130 or 143 a signal came: what is cached stays, and
another run goes on. With --check, 0 says that the metadata shows every byte;
only a `read` proves them.")]
pub struct WarmArgs {
    /// Clips, or folders of clips, on rclone mounts.
    #[arg(required = true)]
    pub path: Vec<PathBuf>,
    /// Only look at rclone's metadata; opens no clip.
    #[arg(long)]
    pub check: bool,
    /// Clips that are read at once.
    #[arg(short, long, default_value_t = 4, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=256))]
    pub jobs: u16,
    /// How long to wait at the end until rclone's metadata shows every byte,
    /// from rclone 1.74 on at least 5 seconds; `none`: do not wait.
    #[arg(long, default_value = "20s", value_name = "DURATION")]
    pub wait: Confirm,
    /// How to print results.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// A number of bytes: `4096`, `64KiB`, `100MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim() {
            "" | "B" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err("not a size; write it as 4096, 64KiB or 100MiB".into()),
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| "not a size; write it as 4096, 64KiB or 100MiB".into())
    }
}

fn parse_block_size(text: &str) -> Result<Size, String> {
    match text.parse()? {
        size @ Size(1..=0x1000_0000) => Ok(size),
        _ => Err("a block has 1 byte to 256MiB".into()),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode @ 0..=0o777) => Ok(mode),
        _ => Err("not a mode; write it as 0660".into()),
    }
}

fn parse_ring_size(text: &str) -> Result<Size, String> {
    match text.parse()? {
        size @ Size(0x1000..=0x4000_0000) if size.0.is_power_of_two() => Ok(size),
        _ => Err("a ring is a power of two, 4KiB to 1GiB".into()),
    }
}

/// How long to wait for a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    Forever,
    AtMost(humantime::Duration),
}

impl FromStr for Wait {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "forever" => Ok(Self::Forever),
            duration => duration.parse().map(Self::AtMost),
        }
    }
}

/// How long to wait for rclone's metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confirm(pub Option<std::time::Duration>);

impl FromStr for Confirm {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self(None)),
            duration => Ok(Self(Some(humantime::parse_duration(duration)?))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_parse() {
        let parse = |t: &str| t.parse::<Size>().ok().map(|s| s.0);
        assert_eq!(parse("4096"), Some(4096));
        assert_eq!(parse("64KiB"), Some(65_536));
        assert_eq!(parse("100MiB"), Some(104_857_600));
        assert_eq!(parse("1 GiB"), Some(1 << 30));
        for bad in [
            "",
            "KiB",
            "-1",
            "1.5MiB",
            "4kb",
            "99999999TiB",
            "18446744073709551616",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
