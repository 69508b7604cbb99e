//! What `exec` gains for programs and what it costs an open: see
//! docs/BENCHMARKING.md.
//!
//! It starts an rclone and the program itself, and is started again by itself as
//! the worker that opens clips or runs ffmpeg.
#![allow(missing_docs)]

mod opens;
mod videos;
mod worker;

use std::error::Error;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::{Parser, ValueEnum};
use serde::Serialize;
use vmafx_bypass::rig::{Rig, RigOptions};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Two clips, for ffmpeg.
const CLIPS: [&str; 2] = ["a.y4m", "b.y4m"];

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// ffmpeg: decode of a clip, PSNR of two.
    Videos,
    /// One open, of clips and of other files.
    Opens,
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
        default_value = "videos,opens"
    )]
    only: Vec<Part>,
    /// Each has every way, in another order.
    #[arg(long, default_value_t = 9, value_name = "N")]
    rounds: usize,
    /// Frames of a clip, of 1920 by 1080: 3 MiB each.
    #[arg(long, default_value_t = 60, value_name = "N")]
    frames: u32,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
    /// Be a worker: what to do.
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    worker: Vec<String>,
}

/// What every part works with.
struct Bench {
    program: PathBuf,
    rounds: usize,
    rig: Rig,
}

/// Median, and where half of the samples are.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    p25: f64,
    p50: f64,
    p75: f64,
}

impl Spread {
    fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self {
            p25: rank(&samples, 0.25),
            p50: rank(&samples, 0.5),
            p75: rank(&samples, 0.75),
        }
    }
}

/// Of sorted samples.
fn rank(sorted: &[f64], share: f64) -> f64 {
    let index = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// How a worker is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way<'a> {
    Plain,
    Exec,
    /// As a user who may not open the cache, by the server at this socket.
    Server(&'a Path),
}

impl Bench {
    fn start(args: &Args) -> Outcome<Self> {
        let options = RigOptions {
            rclone: args.rclone.clone(),
            mount_arguments: vec!["--allow-other".into()],
            ..RigOptions::default()
        };
        let frames = args.frames.to_string();
        let rig = Rig::start(options, |source| {
            for (name, kind) in CLIPS.iter().zip(["testsrc2", "testsrc"]) {
                let made = Command::new("ffmpeg")
                    .args(["-v", "error", "-f", "lavfi", "-i"])
                    .arg(format!("{kind}=size=1920x1080:rate=25"))
                    .args(["-frames:v", &frames, "-pix_fmt", "yuv420p"])
                    .arg(source.join(name))
                    .status()?;
                if !made.success() {
                    return Err(std::io::Error::other("ffmpeg makes no clips"));
                }
            }
            fs::write(source.join("small"), vec![7; 1 << 20])
        })?;
        fs::set_permissions(rig.folder(), Permissions::from_mode(0o755))?;
        for name in CLIPS.iter().chain(&["small"]) {
            rig.cache_whole(Path::new(name))?;
        }
        Ok(Self {
            program: args.program.clone(),
            rounds: args.rounds,
            rig,
        })
    }

    /// Runs a worker in a folder; the nanoseconds that it prints.
    fn work(&self, way: Way, folder: &Path, task: &[&str]) -> Outcome<Vec<f64>> {
        let own = std::env::current_exe()?;
        let mut command = match way {
            Way::Plain => Command::new(&own),
            Way::Exec => {
                let mut command = Command::new(&self.program);
                command.args(["exec", "--report=json", "--"]).arg(&own);
                command
            }
            Way::Server(socket) => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
                command.arg(&self.program).args(["exec", "--report=json"]);
                command.arg("--socket").arg(socket).arg("--").arg(&own);
                command
            }
        };
        command.arg("--worker").args(task).current_dir(folder);
        // Cargo's: with it, the loader tries each library in four more places.
        command.env_remove("LD_LIBRARY_PATH");
        let output = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("{way:?} {task:?}: {said}").into());
        }
        // Else something else would be measured.
        if way != Way::Plain && !said.contains(r#""by_reason":{}"#) {
            return Err(format!("{way:?} {task:?} was not assisted: {said}").into());
        }
        let text = String::from_utf8(output.stdout)?;
        Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
    }
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    if !args.worker.is_empty() {
        return worker::run(&args.worker);
    }
    let bench = Bench::start(&args)?;
    let release = rustix::system::uname();
    println!(
        "linux {}, {} CPUs, {} rounds",
        release.release().to_string_lossy(),
        std::thread::available_parallelism()?,
        args.rounds
    );
    if args.only.contains(&Part::Videos) {
        videos::measure(&bench)?;
    }
    if args.only.contains(&Part::Opens) {
        opens::measure(&bench)?;
    }
    Ok(())
}
