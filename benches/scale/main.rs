//! How the cost of a bypass grows: with what is missing of a clip, with how small
//! and how large it is, with its ranges, and with how many clips are open. See
//! docs/BENCHMARKING.md.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod grown;
mod shares;

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

use clap::{Parser, ValueEnum};
use common::quantile;
use vmafx_bypass::rig::{Rig, RigOptions};

type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Clips of which 0 to 100 % are cached.
    Shares,
    /// Clips of 64 KiB and of 1 MiB, opened and read to their end.
    Small,
    /// Clips of 1 MiB to 8 GiB.
    Sizes,
    /// A clip of 1 to 10,000 cached ranges.
    Ranges,
    /// 1 to 1,000 clips that are open at once.
    Clips,
}

#[derive(Debug, Parser)]
struct Args {
    /// The rclone to mount with.
    #[arg(long, default_value = "rclone", value_name = "FILE")]
    rclone: PathBuf,
    /// Which parts to measure.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "shares,small,sizes,ranges,clips"
    )]
    only: Vec<Part>,
    /// Each has every way, in another order.
    #[arg(long, default_value_t = 9, value_name = "N")]
    rounds: usize,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// An rclone that reads no further than it is asked to.
fn options(args: &Args) -> RigOptions {
    RigOptions {
        rclone: args.rclone.clone(),
        mount_arguments: vec!["--buffer-size=0".into(), "--dir-cache-time=1h".into()],
        ..RigOptions::default()
    }
}

/// Starts one with clips of noise.
fn rig_with(args: &Args, clips: &[(String, usize)]) -> Outcome<Rig> {
    let rig = Rig::start(options(args), |source| {
        for (name, size) in clips {
            std::fs::write(source.join(name), common::noise(*size))?;
        }
        Ok(())
    })?;
    Ok(rig)
}

/// Runs each of `count` things once a round, beginning with another in turn. The
/// samples of each.
fn rounds(
    args: &Args,
    count: usize,
    mut run: impl FnMut(usize) -> Outcome<f64>,
) -> Outcome<Vec<Vec<f64>>> {
    let mut samples = vec![Vec::new(); count];
    for round in 0..args.rounds {
        for offset in 0..count {
            let index = (round + offset) % count;
            samples[index].push(run(index)?);
        }
    }
    Ok(samples)
}

/// The median, and where half of the samples are, in a unit of so many nanoseconds.
fn shown(samples: &[f64], unit: f64) -> String {
    let [low, middle, high] = [0.25, 0.5, 0.75].map(|share| quantile(samples, share) / unit);
    format!("{middle:.2} ({low:.2} to {high:.2})")
}

fn each_by_itself(args: &Args) -> Outcome<()> {
    for part in &args.only {
        let name = part.to_possible_value().ok_or("a part without a name")?;
        let status = Command::new(std::env::current_exe()?)
            .args(["--only", name.get_name()])
            .args(["--rounds", &args.rounds.to_string()])
            .arg("--rclone")
            .arg(&args.rclone)
            .status()?;
        if !status.success() {
            return Err(format!("{}: {status}", name.get_name()).into());
        }
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    // Each part by a process of its own: the memory that one leaves free would hide
    // what the next one takes.
    if let [_, _, ..] = args.only[..] {
        return each_by_itself(&args);
    }
    let release = rustix::system::uname();
    println!(
        "linux {}, {} CPUs, {} rounds",
        release.release().to_string_lossy(),
        std::thread::available_parallelism()?,
        args.rounds
    );
    for part in &args.only {
        match part {
            Part::Shares => shares::shares(&args)?,
            Part::Small => shares::small(&args)?,
            Part::Sizes => grown::sizes(&args)?,
            Part::Ranges => grown::ranges(&args)?,
            Part::Clips => grown::clips(&args)?,
        }
    }
    Ok(())
}
