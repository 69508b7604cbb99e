//! `run`'s CPU time while clips are opened, and descriptors made, at speed.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::tracked::{Rows, Tracked, lost, wait_for_silence};
use crate::worker::Worker;
use crate::{Bench, Outcome};

const WORKERS: u64 = 2;
/// Slices of each mode: this often, and so many seconds each.
const ROUNDS: usize = 2;
const SECONDS: u64 = 4;
/// Rates of dup+close, per second and all workers; each twice the one before.
const FIRST_RATE: u64 = 20_000;
const LAST_RATE: u64 = 2_560_000;
const STEP_SECONDS: u64 = 1;
/// How long `run` may take for what is left after the workers' end.
const REST: Duration = Duration::from_millis(300);

/// What a mode did under load.
#[derive(Debug, Serialize)]
pub struct LoadFigures {
    /// `None`: without `run`.
    pub mode: Option<String>,
    pub rows: Rows,
    /// Calls of each second, each with its close.
    pub per_second: f64,
    /// To the rate without `run`, where that was measured.
    pub ratio: Option<f64>,
    /// Of one CPU, percent.
    pub cpu_percent: Option<f64>,
    pub lost: BTreeMap<String, u64>,
}

/// What the workers did in a time.
struct Done {
    calls: u64,
    took: Duration,
    cpu: Option<Duration>,
}

/// Lets all workers do a task, and takes the time of all.
fn work(task: &[&str], tracked: Option<&Tracked>) -> Outcome<Done> {
    let before = tracked.map(Tracked::cpu).transpose()?;
    let start = Instant::now();
    let started: Outcome<Vec<_>> = (0..WORKERS).map(|_| Worker::start(task)).collect();
    let mut calls = 0;
    for mut worker in started? {
        calls += worker.answer()?;
    }
    let took = start.elapsed();
    if tracked.is_some() {
        sleep(REST);
    }
    let after = tracked.map(Tracked::cpu).transpose()?;
    Ok(Done {
        calls,
        took,
        cpu: after
            .zip(before)
            .map(|(after, before)| after.saturating_sub(before)),
    })
}

fn start(bench: &Bench, mode: Option<&str>, rows: Rows) -> Outcome<Option<Tracked>> {
    wait_for_silence()?;
    let Some(mode) = mode else {
        return Ok(None);
    };
    Ok(Some(bench.program.start(mode, rows, &[])??))
}

fn modes(bench: &Bench) -> Vec<&str> {
    let here = bench.modes.iter().filter(|mode| mode.not_here.is_none());
    here.map(|mode| mode.name.as_str()).collect()
}

/// Opens and closes of a tracked clip, as fast as the mount sustains.
pub fn measure(bench: &Bench) -> Outcome<Vec<LoadFigures>> {
    let clip = bench.clip.to_string_lossy();
    let seconds = SECONDS.to_string();
    let of_modes = modes(bench).into_iter();
    let setups: Vec<(Option<&str>, Rows)> = std::iter::once((None, Rows::None))
        .chain(of_modes.flat_map(|mode| [(Some(mode), Rows::Json), (Some(mode), Rows::None)]))
        .collect();
    let mut figures: Vec<LoadFigures> = Vec::new();
    for (mode, rows) in &setups {
        figures.push(LoadFigures {
            mode: mode.map(str::to_owned),
            rows: *rows,
            per_second: 0.0,
            ratio: None,
            cpu_percent: mode.map(|_| 0.0),
            lost: BTreeMap::new(),
        });
    }
    for _ in 0..ROUNDS {
        for ((mode, rows), figure) in setups.iter().zip(&mut figures) {
            let tracked = start(bench, *mode, *rows)?;
            let done = work(&["open", &clip, &seconds], tracked.as_ref())?;
            let share = 1.0 / ROUNDS as f64;
            figure.per_second += share * done.calls as f64 / done.took.as_secs_f64();
            if let (Some(percent), Some(cpu)) = (&mut figure.cpu_percent, done.cpu) {
                *percent += share * 100.0 * cpu.as_secs_f64() / done.took.as_secs_f64();
            }
            if let Some(tracked) = tracked {
                let document = tracked.dump_json()?;
                let summary = tracked.stop()?;
                // The summary knows of slow subscribers, too.
                let document = if summary.is_null() { document } else { summary };
                for (cause, count) in lost(&document) {
                    *figure.lost.entry(cause).or_default() += count;
                }
            }
        }
    }
    let base = figures[0].per_second;
    for figure in &mut figures {
        figure.ratio = Some(figure.per_second / base);
    }
    Ok(figures)
}

/// Dups and closes of one tracked descriptor: the highest rate at which nothing
/// is lost, and as fast as it goes.
pub fn dups(bench: &Bench) -> Outcome<Vec<LoadFigures>> {
    let clip = bench.clip.to_string_lossy();
    let seconds = STEP_SECONDS.to_string();
    let mut figures = Vec::new();
    for mode in modes(bench) {
        for rows in [Rows::Json, Rows::None] {
            let step = |rate: u64| -> Outcome<LoadFigures> {
                let Some(tracked) = start(bench, Some(mode), rows)? else {
                    return Err("no mode".into());
                };
                let rate = (rate / WORKERS).to_string();
                let done = work(&["dup", &clip, &seconds, &rate], Some(&tracked))?;
                let document = tracked.dump_json()?;
                let summary = tracked.stop()?;
                let document = if summary.is_null() { document } else { summary };
                let took = done.took.as_secs_f64();
                let cpu = done.cpu.unwrap_or_default();
                Ok(LoadFigures {
                    mode: Some(mode.to_owned()),
                    rows,
                    per_second: done.calls as f64 / took,
                    ratio: None,
                    cpu_percent: Some(100.0 * cpu.as_secs_f64() / took),
                    lost: lost(&document),
                })
            };
            let rates = std::iter::successors(Some(FIRST_RATE), |rate| Some(rate * 2));
            let mut best = None;
            for rate in rates.take_while(|&rate| rate <= LAST_RATE) {
                let figure = step(rate)?;
                if !figure.lost.is_empty() {
                    break;
                }
                // The workers themselves do no more.
                let enough = figure.per_second < 0.7 * rate as f64;
                best = Some(figure);
                if enough {
                    break;
                }
            }
            figures.extend(best);
            figures.push(step(0)?);
        }
    }
    Ok(figures)
}
