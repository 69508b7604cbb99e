//! `warm`: completes clips in rclone's cache.

use std::io::{self, IsTerminal, Write};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use vmafx_bypass::Reason;
use vmafx_bypass::warm::{self, Clip, Options, Progress, Report, State};

use crate::cli::{Format, WarmArgs};
use crate::exit::{Coded, Exit};
use crate::output::{JsonPath, Notes, SCHEMA, human_bytes, shown, write_json};
use crate::signals::Signals;

/// Completes, waits, and reports.
pub fn run(args: &WarmArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    let interrupted = signals.watch(|| {});
    let stop = || interrupted.exit().is_some();
    let started = Instant::now();
    let meter = Meter::new(notes);

    let found = warm::find(&args.path, &|progress| meter.show(progress), &stop);
    let overflows = found.overflows();
    meter.bar.suspend(|| {
        for doubt in found.doubts().iter().chain(&overflows) {
            notes.note(format_args!("warning: {doubt}"));
        }
        if found.symlinks > 0 {
            let count = found.symlinks;
            notes.note(format_args!(
                "note: {count} symlinks below folders were not followed"
            ));
        }
        if found.clips.is_empty() && found.failed.is_empty() {
            notes.note("note: there is no clip below these folders");
        }
    });
    let mut reports: Vec<Report> = if args.check {
        found.clips.iter().map(warm::check).collect()
    } else {
        meter.begin(&found.clips);
        let options = Options {
            jobs: NonZeroUsize::new(args.jobs.into()).unwrap_or(NonZeroUsize::MIN),
            wait: args.wait.0,
        };
        warm::complete(
            &found.clips,
            &options,
            &|progress| meter.show(progress),
            &stop,
        )
    };
    meter.bar.finish_and_clear();
    reports.extend(found.failed);

    let summary = Summary {
        schema: SCHEMA,
        check: args.check,
        elapsed_ns: started.elapsed().as_nanos() as u64,
        totals: Totals::of(&reports),
        clips: reports.iter().map(Row::of).collect(),
    };
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => write_json(&mut out, &summary)?,
        Format::Text => summary.write(&mut out)?,
    }
    out.flush()?;

    if let Some(exit) = interrupted.exit() {
        return Ok(exit);
    }
    let refused = reports.iter().find(|r| r.state == State::Refused);
    if let Some(refusal) = refused.and_then(|report| report.refusal.as_ref()) {
        let message = match refusal.reason {
            // What to do is said there, since it is for the whole mount.
            Reason::NoCacheFile => refusal.to_string(),
            reason => format!("{refusal}; {}", reason.remedy()),
        };
        return Err(Coded::error(Exit::Environment, message));
    }
    let good = |report: &Report| {
        report.state == State::Cached || (report.state == State::Unconfirmed && !args.check)
    };
    if !reports.iter().all(good) {
        return Ok(Exit::Failed);
    }
    // Cached they are, but not for long.
    if !args.check && !overflows.is_empty() {
        bail!("the cache is too small: {}", overflows.join(", "));
    }
    Ok(Exit::Done)
}

/// The progress bar, on a terminal; it has no colours.
struct Meter<'a> {
    bar: ProgressBar,
    notes: &'a Notes,
    clips: AtomicUsize,
    ended: AtomicUsize,
}

impl<'a> Meter<'a> {
    fn new(notes: &'a Notes) -> Self {
        let target = if notes.is_quiet() || !io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(style("{spinner} {msg}"));
        Self {
            bar,
            notes,
            clips: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
        }
    }

    /// From now on clips are read.
    fn begin(&self, clips: &[Clip]) {
        self.clips.store(clips.len(), Ordering::Relaxed);
        self.bar.reset();
        self.bar
            .set_length(clips.iter().map(Clip::missing_bytes).sum());
        self.bar.set_style(style(
            "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
        ));
    }

    fn show(&self, progress: Progress<'_>) {
        match progress {
            Progress::Found(count) => {
                self.bar.set_message(format!("looking for clips: {count}"));
                self.bar.tick();
            }
            Progress::Begin(path) => self.bar.suspend(|| {
                self.notes
                    .detail(format_args!("reading `{}`", shown(Some(path))));
            }),
            Progress::Read(bytes) => self.bar.inc(bytes),
            Progress::End { spared } => {
                let ended = self.ended.fetch_add(1, Ordering::Relaxed) + 1;
                let clips = self.clips.load(Ordering::Relaxed);
                self.bar.set_message(format!("{ended} of {clips} clips"));
                self.bar.inc(spared);
            }
            Progress::Waiting(count) => {
                self.bar.set_style(style("{spinner} {msg}"));
                let message = format!("waiting until rclone's metadata shows {count} clips whole");
                self.bar.set_message(message);
                self.bar.tick();
            }
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[derive(Serialize)]
struct Summary {
    schema: u32,
    check: bool,
    elapsed_ns: u64,
    totals: Totals,
    clips: Vec<Row>,
}

/// One clip.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    path: JsonPath,
    state: State,
    size: Option<u64>,
    cached_bytes_before: u64,
    cached_bytes_after: u64,
    read_bytes: u64,
    reason: Option<Reason>,
    error: Option<String>,
    #[serde(skip)]
    shown: String,
}

/// Over all clips; and of each state, how many there are.
#[derive(Serialize, Default)]
struct Totals {
    clips: u64,
    bytes: u64,
    cached_bytes_before: u64,
    cached_bytes_after: u64,
    read_bytes: u64,
    states: std::collections::BTreeMap<&'static str, u64>,
}

impl Totals {
    fn of(reports: &[Report]) -> Self {
        let mut totals = Self {
            states: State::ALL.iter().map(|state| (state.name(), 0)).collect(),
            ..Self::default()
        };
        for report in reports {
            totals.clips += 1;
            totals.bytes += report.size.unwrap_or(0);
            totals.cached_bytes_before += report.cached_before;
            totals.cached_bytes_after += report.cached_after;
            totals.read_bytes += report.read_bytes;
            *totals.states.entry(report.state.name()).or_default() += 1;
        }
        totals
    }
}

impl Row {
    fn of(report: &Report) -> Self {
        Self {
            path: JsonPath::new(Some(&report.path)),
            state: report.state,
            size: report.size,
            cached_bytes_before: report.cached_before,
            cached_bytes_after: report.cached_after,
            read_bytes: report.read_bytes,
            reason: report.refusal.as_ref().map(|refusal| refusal.reason),
            error: report
                .refusal
                .as_ref()
                .map(|refusal| refusal.detail.clone()),
            shown: shown(Some(&report.path)),
        }
    }

    fn cached(&self) -> String {
        match self.size {
            None => "-".to_owned(),
            // Not 100 before it is whole.
            Some(size) => match (self.cached_bytes_after * 100).checked_div(size) {
                Some(percent) => format!("{percent}%"),
                None => "100%".to_owned(),
            },
        }
    }
}

impl Summary {
    /// A line a clip, and one for all.
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        if !self.clips.is_empty() {
            let (state, size, cached, read) = ("STATE", "SIZE", "CACHED", "READ");
            writeln!(out, "{state:<11} {size:>10} {cached:>6} {read:>10} PATH")?;
        }
        for row in &self.clips {
            let size = row.size.map_or_else(|| "-".to_owned(), human_bytes);
            let read = human_bytes(row.read_bytes);
            let (state, cached, path) = (row.state.name(), row.cached(), &row.shown);
            write!(out, "{state:<11} {size:>10} {cached:>6} {read:>10} {path}")?;
            if let (Some(reason), Some(error)) = (row.reason, &row.error) {
                write!(out, " ({reason}: {})", error.replace('\n', "; "))?;
            }
            writeln!(out)?;
        }
        let totals = &self.totals;
        let states = State::ALL.iter().map(|state| state.name());
        let states: Vec<String> = states
            .filter_map(|name| match totals.states.get(name) {
                None | Some(0) => None,
                Some(count) => Some(format!("{count} {name}")),
            })
            .collect();
        let clips = match totals.clips {
            0 => "no clips".to_owned(),
            1 => format!("1 clip: {}", states.join(", ")),
            clips => format!("{clips} clips: {}", states.join(", ")),
        };
        writeln!(
            out,
            "{clips}; {} of {} cached, {} read through FUSE in {:.1} s",
            human_bytes(totals.cached_bytes_after),
            human_bytes(totals.bytes),
            human_bytes(totals.read_bytes),
            self.elapsed_ns as f64 / 1e9
        )
    }
}
