//! What `run` costs the host, by attach mode: see docs/BENCHMARKING.md.
//!
//! One executable: it starts an rclone and the program itself, and is started
//! again by itself as the workers that open clips.
#![allow(missing_docs)]

mod host;
mod load;
mod memory;
mod report;
mod tracked;
mod worker;

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use tempfile::TempDir;
use vmafx_bypass::rig::{Rig, RigOptions};

use report::Report;
use tracked::{Mode, Program};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The clip's size: more than one open's read-ahead, little to cache.
const CLIP_BYTES: usize = 1 << 20;
const CLIP: &str = "clip.y4m";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// System calls on files that are not tracked, and opens of one that is.
    Calls,
    /// `run`'s CPU time at the highest rates.
    Load,
    /// Memory, and dump-map, by tracked descriptors.
    Memory,
}

/// Measures what `run` costs, with and without it, interleaved.
#[derive(Debug, Parser)]
struct Args {
    /// The program to measure.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_vmafx-bypass"), value_name = "FILE")]
    program: PathBuf,
    /// The rclone to mount with.
    #[arg(long, default_value = "rclone", value_name = "FILE")]
    rclone: PathBuf,
    /// Attach modes, `raw+account` with `run --account`; those that do not work here
    /// are listed with the reason.
    #[arg(long, value_delimiter = ',', default_value = "tracepoint,raw,fentry")]
    attach: Vec<String>,
    /// Which parts to measure.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "calls,load,memory"
    )]
    only: Vec<Part>,
    /// Rounds of the calls; each has every mode and none. Fewer after two minutes.
    #[arg(long, default_value_t = 31, value_name = "N")]
    rounds: usize,
    /// A folder on tmpfs.
    #[arg(long, default_value = "/dev/shm", value_name = "DIR")]
    tmpfs: PathBuf,
    /// Write the figures there, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
    /// Be a worker: what to do, and with which file.
    #[arg(long, hide = true, num_args = 1..)]
    worker: Vec<String>,
}

/// What every part works with.
struct Bench {
    pub program: Program,
    pub modes: Vec<Mode>,
    /// The mounted clip.
    pub clip: PathBuf,
    /// A folder on tmpfs, for files that are not tracked and for output.
    pub memory: TempDir,
    /// A folder on the disk.
    pub disk: TempDir,
    /// The rclone; gone when dropped.
    _rig: Rig,
}

impl Bench {
    fn start(args: &Args) -> Outcome<Self> {
        let options = RigOptions {
            rclone: args.rclone.clone(),
            ..RigOptions::default()
        };
        let rig = Rig::start(options, |source| {
            fs::write(source.join(CLIP), vec![b'c'; CLIP_BYTES])
        })?;
        rig.cache_whole(Path::new(CLIP))?;
        let named = || tempfile::Builder::new().prefix("vmafx-bench-").to_owned();
        let memory = named().tempdir_in(&args.tmpfs)?;
        let disk = named().tempdir()?;
        let program = Program::new(&args.program, &rig.mountpoint(), memory.path());
        Ok(Self {
            modes: program.modes(&args.attach)?,
            program,
            clip: rig.mountpoint().join(CLIP),
            memory,
            disk,
            _rig: rig,
        })
    }
}

/// Keeps this thread on the last CPU that it may use: the first has more
/// interrupts. Returns those that it might use before.
fn pin_to_one_cpu() -> io::Result<CpuSet> {
    let before = sched_getaffinity(Pid::from_raw(0))?;
    let mut allowed = (0..CpuSet::count()).filter(|&cpu| before.is_set(cpu).unwrap_or(false));
    let last = allowed.next_back().unwrap_or(0);
    let mut one = CpuSet::new();
    one.set(last)?;
    sched_setaffinity(Pid::from_raw(0), &one)?;
    Ok(before)
}

fn run(args: &Args) -> Outcome<()> {
    let bench = Bench::start(args)?;
    let mut report = Report::new(&bench)?;
    if args.only.contains(&Part::Calls) {
        report.calls = host::measure(&bench, args.rounds)?;
    }
    if args.only.contains(&Part::Load) {
        report.load = load::measure(&bench)?;
        report.dups = load::dups(&bench)?;
    }
    if args.only.contains(&Part::Memory) {
        report.memory = memory::measure(&bench)?;
    }
    report.print();
    if let Some(path) = &args.json {
        serde_json::to_writer_pretty(File::create(path)?, &report)?;
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    match args.worker.as_slice() {
        [] => run(&args),
        task => worker::run(task),
    }
}
