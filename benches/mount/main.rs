//! What `mount` gains and costs, beside rclone's mount and the cache file: see
//! docs/BENCHMARKING.md.
//!
//! It starts an rclone, and the program itself in two modes, and reads by this
//! process and by programs.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod programs;
mod reads;

use std::error::Error;
use std::fs;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use common::{noise, quantile, ratio};
use tempfile::TempDir;
use vmafx_bypass::BypassFile;
use vmafx_bypass::rig::{Rig, RigOptions};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// One clip, and two for ffmpeg.
const CLIP: &str = "clip";
const VIDEOS: [&str; 2] = ["a.y4m", "b.y4m"];
/// For opens: how many, and of so many bytes.
const SMALL: usize = 200;
/// Between two runs.
const SETTLE: Duration = Duration::from_millis(100);
const SMALL_SIZE: usize = 1 << 20;
/// Files in a folder, to be listed.
const MANY: usize = 100_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// A clip that is whole: blocks of three sizes, in order and at random.
    Reads,
    /// One open and one read.
    Opens,
    /// Clips that are cached by half.
    Half,
    /// ffmpeg: decode of a clip, PSNR of two.
    Videos,
    /// A folder of 100,000 files.
    Listing,
}

#[derive(Debug, Parser)]
struct Args {
    /// The program to measure.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_vmafx-bypass"), value_name = "FILE")]
    program: PathBuf,
    /// The rclone to mount with.
    #[arg(long, default_value = "rclone", value_name = "FILE")]
    rclone: PathBuf,
    /// Which parts to measure.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "reads,opens,half,videos,listing"
    )]
    only: Vec<Part>,
    /// Each has every way, in another order.
    #[arg(long, default_value_t = 9, value_name = "N")]
    rounds: usize,
    /// The clip's size, MiB.
    #[arg(long, default_value_t = 100, value_name = "N")]
    size: usize,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Where the same clips are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Rclone,
    /// By the kernel, from copies.
    Passed,
    /// By ranges.
    Ranges,
    /// What rclone serves: local files.
    Local,
}

impl Way {
    const ALL: [Self; 4] = [Self::Rclone, Self::Passed, Self::Ranges, Self::Local];

    fn name(self) -> &'static str {
        match self {
            Self::Rclone => "rclone's mount",
            Self::Passed => "mount, passed through",
            Self::Ranges => "mount, by ranges",
            Self::Local => "local",
        }
    }
}

/// The program's mount in the background, until it is dropped.
struct Shown {
    folder: TempDir,
}

impl Shown {
    fn start(program: &Path, source: &Path, option: &str) -> Outcome<Self> {
        let folder = tempfile::Builder::new().prefix("vmafx-bench-").tempdir()?;
        let mut command = Command::new(program);
        command
            .args(["mount", option])
            .arg(source)
            .arg(folder.path());
        if !command.status()?.success() {
            return Err("it does not mount".into());
        }
        Ok(Self { folder })
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        // What is left is a mount that its user sees, and may unmount.
        let _ = unmount.arg("-l").arg(self.folder.path()).status();
    }
}

/// What every part works with.
struct Bench {
    args: Args,
    // In the order in which they are to go.
    passed: Shown,
    ranges: Shown,
    rig: Rig,
}

impl Bench {
    fn start(args: Args) -> Outcome<Self> {
        let wants = |part| args.only.contains(&part);
        let options = RigOptions {
            rclone: args.rclone.clone(),
            mount_arguments: vec!["--buffer-size=0".into(), "--dir-cache-time=1h".into()],
            ..RigOptions::default()
        };
        let rig = Rig::start(options, |source| {
            let noise = noise(args.size << 20);
            fs::write(source.join(CLIP), &noise)?;
            if wants(Part::Opens) {
                for n in 0..SMALL {
                    fs::write(source.join(format!("small{n}")), &noise[..SMALL_SIZE])?;
                }
            }
            if wants(Part::Half) {
                for n in 0..2 * args.rounds {
                    fs::write(source.join(format!("half{n}")), &noise)?;
                }
            }
            if wants(Part::Videos) {
                programs::make_videos(source)?;
            }
            if wants(Part::Listing) {
                fs::create_dir(source.join("many"))?;
                for n in 0..MANY {
                    fs::write(source.join(format!("many/{n:06}.y4m")), "x")?;
                }
            }
            Ok(())
        })?;
        let point = rig.mountpoint();
        Ok(Self {
            passed: Shown::start(&args.program, &point, "--snapshot=copy")?,
            ranges: Shown::start(&args.program, &point, "--passthrough=never")?,
            args,
            rig,
        })
    }

    fn folder(&self, way: Way) -> PathBuf {
        match way {
            Way::Rclone => self.rig.mountpoint(),
            Way::Passed => self.passed.folder.path().into(),
            Way::Ranges => self.ranges.folder.path().into(),
            Way::Local => self.rig.source(),
        }
    }

    /// The cache file of a clip that is whole.
    fn cache_file(&self, name: &str) -> Outcome<PathBuf> {
        let file = BypassFile::open(self.rig.mountpoint().join(name))?;
        file.cache_path().ok_or_else(|| "not in the cache".into())
    }

    /// An open drops the pages that the kernel has of rclone's mount, 15 ms for 100
    /// MiB: not to be paid by whoever comes after the one that read them. And rclone
    /// still has something to do after a read.
    fn settle(&self) {
        for name in [CLIP, VIDEOS[0], VIDEOS[1]] {
            // Not all are made for each part.
            let _ = File::open(self.rig.mountpoint().join(name));
        }
        std::thread::sleep(SETTLE);
    }

    /// Runs each of `count` things once a round, beginning with another in turn,
    /// and every second round in the opposite order: none always comes after the
    /// same one. The samples of each.
    fn rounds(
        &self,
        count: usize,
        mut run: impl FnMut(usize) -> Outcome<f64>,
    ) -> Outcome<Vec<Vec<f64>>> {
        let mut samples = vec![Vec::new(); count];
        for round in 0..self.args.rounds {
            for offset in 0..count {
                let offset = if round % 2 == 1 {
                    count - 1 - offset
                } else {
                    offset
                };
                let index = (round + offset) % count;
                self.settle();
                samples[index].push(run(index)?);
            }
        }
        Ok(samples)
    }
}

fn main() -> Outcome<()> {
    let bench = Bench::start(Args::parse())?;
    let release = rustix::system::uname();
    println!(
        "linux {}, {} CPUs, {} rounds",
        release.release().to_string_lossy(),
        std::thread::available_parallelism()?,
        bench.args.rounds
    );
    for part in &bench.args.only {
        match part {
            Part::Reads => reads::whole(&bench)?,
            Part::Opens => reads::opens(&bench)?,
            Part::Half => reads::half(&bench)?,
            Part::Videos => programs::videos(&bench)?,
            Part::Listing => programs::listing(&bench)?,
        }
    }
    Ok(())
}
