//! `bench`: FUSE, the bypass and the raw cache file, side by side.

mod chart;
mod environment;
mod generate;
mod html;
mod junit;
mod report;

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use vmafx_bypass::bench::{
    self, Baseline, BenchError, Check, Engine, Gate, Measurement, Pattern, Plan, Tuned, Verdict,
};

use crate::cli::{self, BenchArgs};
use crate::exit::{Coded, Exit};
use crate::output::{Notes, SCHEMA, Sink, human_bytes};
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
    // Kept until the end: dropped, they unmount and clean up.
    let mut rigs = None;
    if let Some(size) = args.generate {
        notes.note(format_args!(
            "generating, serving, mounting and caching a clip of {}",
            human_bytes(size.0)
        ));
        let tuned = plan
            .engines
            .contains(&Engine::FuseTuned)
            .then_some(plan.leave_out);
        let made = generate::rigs(&args.rclone, size.0, tuned, notes, &interrupted)?;
        let Some(made) = made else {
            return Ok(stopped(&interrupted));
        };
        plan.clips = vec![made.clip()];
        plan.tuned = made.tuned();
        rigs = Some(made);
    }
    let judge = |results: &[_]| Verdict::of(&gates, baseline.as_ref(), results);
    let measured = measure(&plan, args.retries, &judge, notes, &interrupted)?;
    let Some(results) = measured else {
        return Ok(stopped(&interrupted));
    };
    let left_out = results.left_out;
    let results = results.measurements;
    let judged = !gates.is_empty() || baseline.is_some();
    let verdict = judged.then(|| judge(&results));
    let environment = environment::Environment::read(&plan, args.generate.map(|_| &*args.rclone));
    drop(rigs);

    let report = report::Report {
        schema: SCHEMA,
        environment: &environment,
        runs: args.runs,
        results: &results,
        left_out: &left_out,
        gate: verdict.as_ref(),
    };
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

/// Measures, and again what misses; `None` when interrupted.
fn measure(
    plan: &Plan,
    retries: u32,
    judge: &dyn Fn(&[Measurement]) -> Verdict,
    notes: &Notes,
    interrupted: &Interrupted,
) -> Result<Option<bench::Results>> {
    let progress = |clip: &Path, pattern: Pattern, block_size: usize| {
        notes.detail(format_args!(
            "measuring `{}`, {}, blocks of {}",
            clip.display(),
            pattern.name(),
            human_bytes(block_size as u64)
        ));
    };
    let stop = || interrupted.exit().is_some();
    let measure = || {
        let mut results = bench::measure(plan, progress, stop)?;
        for _ in 0..retries {
            let verdict = judge(&results.measurements);
            let measured = &mut results.measurements;
            if !bench::measure_again(plan, &verdict, measured, progress, stop)? {
                break;
            }
            for check in verdict.checks.iter().filter(|check| !check.pass) {
                notes.note(format_args!("measured again: {}", described(check)));
            }
        }
        Ok(results)
    };
    match measure() {
        Ok(results) => Ok(Some(results)),
        Err(BenchError::Stopped) => Ok(None),
        // The terminal's ^C comes to the programs that it runs, too.
        Err(_) if stop() => Ok(None),
        Err(error @ BenchError::Mismatch { .. }) => {
            Err(Coded::error(Exit::Mismatch, error.to_string()))
        }
        Err(error @ BenchError::Engine { .. }) => {
            Err(Coded::error(Exit::Environment, error.to_string()))
        }
        Err(error) => Err(error.into()),
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
    let all = args.engines.contains(&cli::Engine::All);
    let engines = if all {
        Engine::ALL.to_vec()
    } else {
        unique(args.engines.iter().filter_map(|engine| engine.of_bench()))
    };
    let tuned = args.tuned.as_ref().map(|folder| Tuned {
        prefix: prefix.clone(),
        folder: folder.clone(),
    });
    let patterns = args.pattern.iter().map(|pattern| match pattern {
        cli::Pattern::Sequential => Pattern::Sequential,
        cli::Pattern::Random => Pattern::Random,
        cli::Pattern::Open => Pattern::Open,
    });
    Plan {
        // An absolute path stays as it is.
        clips: args.path.iter().map(|path| prefix.join(path)).collect(),
        engines,
        leave_out: all,
        patterns: unique(patterns),
        block_sizes: unique(args.block_size.iter().map(|size| size.0 as usize)),
        streams: unique(args.streams.iter().copied()),
        runs: args.runs,
        cold: args.cold,
        socket: args.socket.clone(),
        tuned,
        // As it was started, also where it was replaced since.
        program: Some("/proc/self/exe".into()),
    }
}

impl cli::Engine {
    /// `None`: all of them.
    fn of_bench(self) -> Option<Engine> {
        Some(match self {
            Self::All => return None,
            Self::Fuse => Engine::Fuse,
            Self::FuseTuned => Engine::FuseTuned,
            Self::Bypass => Engine::Bypass,
            Self::Handover => Engine::Handover,
            Self::Bufread => Engine::Bufread,
            Self::Mmap => Engine::Mmap,
            Self::Exec => Engine::Exec,
            #[cfg(feature = "mount")]
            Self::Mount => Engine::Mount,
            #[cfg(feature = "mount")]
            Self::MountRanges => Engine::MountRanges,
            Self::Raw => Engine::Raw,
            Self::IoUring => Engine::IoUring,
            Self::Preload => Engine::Preload,
            Self::Copy => Engine::Copy,
        })
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
