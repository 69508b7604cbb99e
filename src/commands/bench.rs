//! `bench`: FUSE, the bypass and the raw cache file, side by side.

mod chart;
mod environment;
mod html;
mod junit;
mod report;

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use vmafx_bypass::bench::{
    self, Baseline, BenchError, Check, Engine, Gate, Pattern, Plan, Verdict,
};
use vmafx_bypass::rig::{Rig, RigOptions};

use crate::cli::{self, BenchArgs};
use crate::exit::{Coded, Exit};
use crate::output::{Notes, Sink, human_bytes};
use crate::signals::{Interrupted, Signals};

/// Measures, prints, and judges.
pub fn run(args: &BenchArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    let gates: Vec<Gate> = args
        .gate
        .iter()
        .map(|gate| Gate {
            block_size: gate.block_size.map(|size| size as usize),
            ratio: gate.ratio,
        })
        .collect();
    let mut plan = plan(args);
    check_gates(&gates, &plan)?;
    let baseline = args.baseline.as_deref().map(|path| baseline(path, args));
    let baseline = baseline.transpose()?;
    if baseline.is_some() && !plan.engines.contains(&Engine::Fuse) {
        let text = "--baseline compares with fuse: add fuse to --engines";
        return Err(Coded::error(Exit::Usage, text));
    }

    let interrupted = signals.watch(|| {});
    // Kept until the end: dropped, it unmounts and cleans up.
    let mut rig = None;
    if let Some(size) = args.generate {
        notes.note(format_args!(
            "generating, serving, mounting and caching a clip of {}",
            human_bytes(size.0)
        ));
        let Some(made) = generate(&args.rclone, size.0, &interrupted)? else {
            return Ok(stopped(&interrupted));
        };
        plan.clips = vec![made.mountpoint().join(CLIP)];
        rig = Some(made);
    }
    let progress = |clip: &Path, pattern: Pattern, block_size: usize| {
        notes.detail(format_args!(
            "measuring `{}`, {}, blocks of {}",
            clip.display(),
            pattern.name(),
            human_bytes(block_size as u64)
        ));
    };
    let stop = || interrupted.exit().is_some();
    let judge = |results: &[_]| Verdict::of(&gates, baseline.as_ref(), results);
    let measure = || {
        let mut results = bench::measure(&plan, progress, stop)?;
        for _ in 0..args.retries {
            let verdict = judge(&results);
            if !bench::measure_again(&plan, &verdict, &mut results, progress, stop)? {
                break;
            }
            for check in verdict.checks.iter().filter(|check| !check.pass) {
                notes.note(format_args!("measured again: {}", described(check)));
            }
        }
        Ok(results)
    };
    let results = match measure() {
        Ok(results) => results,
        Err(BenchError::Stopped) => return Ok(stopped(&interrupted)),
        Err(error @ BenchError::Mismatch { .. }) => {
            return Err(Coded::error(Exit::Mismatch, error.to_string()));
        }
        Err(error @ BenchError::Engine { .. }) => {
            return Err(Coded::error(Exit::Environment, error.to_string()));
        }
        Err(error) => return Err(error.into()),
    };
    let judged = !gates.is_empty() || baseline.is_some();
    let verdict = judged.then(|| judge(&results));
    let environment = environment::Environment::read(&plan, args.generate.is_some());
    drop(rig);

    let report = report::Report::new(&environment, &results, verdict.as_ref(), args.runs);
    let mut sink = Sink::open(&args.output)?;
    let text = match args.format {
        cli::BenchFormat::Json => report.json()?,
        cli::BenchFormat::Text => report.text(),
        cli::BenchFormat::Html => html::page(&report)?,
    };
    sink.write(text.as_bytes())?;
    sink.finish()?;
    if let (Some(path), Some(verdict)) = (&args.junit, &verdict) {
        let mut sink = Sink::open(path)?;
        sink.write(junit::xml(verdict)?.as_bytes())?;
        sink.finish()?;
    }

    for result in results.iter().filter(|r| r.fuse_bytes > 0) {
        notes.note(format_args!(
            "warning: `{}`, {}, blocks of {}: {} of {} came through FUSE",
            result.path.display(),
            result.pattern.name(),
            human_bytes(result.block_size as u64),
            human_bytes(result.fuse_bytes),
            result.engine.name()
        ));
    }
    match verdict {
        Some(verdict) if !verdict.pass => Err(missed(&verdict)),
        _ => Ok(Exit::Done),
    }
}

fn stopped(interrupted: &Interrupted) -> Exit {
    interrupted.exit().unwrap_or(Exit::Failed)
}

fn missed(verdict: &Verdict) -> anyhow::Error {
    let missed: Vec<String> = verdict
        .checks
        .iter()
        .filter(|check| !check.pass)
        .map(described)
        .collect();
    Coded::error(Exit::Gate, format!("gate missed: {}", missed.join(", ")))
}

/// A comparison in one line.
fn described(check: &Check) -> String {
    let mut text = format!(
        "`{}` by {} in {} blocks of {}",
        check.path.display(),
        check.engine.name(),
        check.pattern.name(),
        human_bytes(check.block_size as u64)
    );
    // Writing to a string does not fail.
    if check.streams > 1 {
        let _ = write!(text, " by {} readers", check.streams);
    }
    let _ = write!(text, ": {:.1}x of at least ", check.ratio);
    let _ = match check.baseline {
        Some(then) => write!(text, "{:.1}x (it was {then:.1}x)", check.threshold),
        None => write!(text, "{}x", check.threshold),
    };
    if check.tries > 1 {
        let _ = write!(text, ", measured {} times", check.tries);
    }
    text
}

fn baseline(path: &Path, args: &BenchArgs) -> Result<Baseline> {
    let failed = |e: String| {
        let text = format!(
            "`{}`: {e}; write one by `bench --format json`",
            path.display()
        );
        Coded::error(Exit::Usage, text)
    };
    let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
    Baseline::parse(&text, args.max_regression).map_err(failed)
}

fn plan(args: &BenchArgs) -> Plan {
    let prefix = args.prefix.clone().unwrap_or_default();
    let engines = args.engines.iter().map(|engine| match engine {
        cli::Engine::Fuse => Engine::Fuse,
        cli::Engine::Bypass => Engine::Bypass,
        cli::Engine::Handover => Engine::Handover,
        cli::Engine::Bufread => Engine::Bufread,
        cli::Engine::Mmap => Engine::Mmap,
        cli::Engine::Raw => Engine::Raw,
        cli::Engine::Copy => Engine::Copy,
        #[cfg(feature = "mount")]
        cli::Engine::Mount => Engine::Mount,
        #[cfg(feature = "mount")]
        cli::Engine::MountRanges => Engine::MountRanges,
    });
    let patterns = args.pattern.iter().map(|pattern| match pattern {
        cli::Pattern::Sequential => Pattern::Sequential,
        cli::Pattern::Random => Pattern::Random,
        cli::Pattern::Open => Pattern::Open,
    });
    Plan {
        // An absolute path stays as it is.
        clips: args.path.iter().map(|path| prefix.join(path)).collect(),
        engines: unique(engines),
        patterns: unique(patterns),
        block_sizes: unique(args.block_size.iter().map(|size| size.0 as usize)),
        streams: unique(args.streams.iter().copied()),
        runs: args.runs,
        cold: args.cold,
        socket: args.socket.clone(),
    }
}

/// What a list names, in its order, none twice.
fn unique<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for item in items {
        if !seen.contains(&item) {
            seen.push(item);
        }
    }
    seen
}

/// A gate that compares nothing would pass for ever.
fn check_gates(gates: &[Gate], plan: &Plan) -> Result<()> {
    let usage = |message: String| Err(Coded::error(Exit::Usage, message));
    if gates.is_empty() {
        return Ok(());
    }
    for engine in [Engine::Fuse, Engine::Bypass] {
        if !plan.engines.contains(&engine) {
            let name = engine.name();
            return usage(format!(
                "--gate compares fuse with bypass: add {name} to --engines"
            ));
        }
    }
    if plan.patterns.iter().all(|p| *p == Pattern::Open) {
        return usage("--gate compares reads: add sequential or random to --pattern".into());
    }
    for size in gates.iter().filter_map(|gate| gate.block_size) {
        if !plan.block_sizes.contains(&size) {
            return usage(format!(
                "--gate names blocks of {size} bytes: add them to --block-size"
            ));
        }
    }
    Ok(())
}

/// The generated clip's name.
const CLIP: &str = "clip.y4m";

/// Serves, mounts and caches a clip of random bytes; `None` when interrupted.
fn generate(rclone: &Path, size: u64, interrupted: &Interrupted) -> Result<Option<Rig>> {
    let options = RigOptions {
        rclone: PathBuf::from(rclone),
        ..RigOptions::default()
    };
    let fill = |source: &Path| {
        let mut clip = BufWriter::new(File::create(source.join(CLIP))?);
        let mut random = File::open("/dev/urandom")?;
        let mut left = size;
        while left > 0 {
            if interrupted.exit().is_some() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let part = left.min(16 << 20);
            io::copy(&mut Read::by_ref(&mut random).take(part), &mut clip)?;
            left -= part;
        }
        clip.flush()
    };
    let made = Rig::start(options, fill)
        .map_err(|e| Coded::error(Exit::Environment, e.to_string()))
        .and_then(|rig| {
            rig.cache_whole_unless(Path::new(CLIP), || interrupted.exit().is_some())
                .context("caching the generated clip")?;
            Ok(rig)
        });
    match made {
        Err(_) if interrupted.exit().is_some() => Ok(None),
        made => made.map(Some),
    }
}
