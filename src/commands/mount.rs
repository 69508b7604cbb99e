//! `mount`: shows an rclone mount again, past FUSE where it is cached.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;
use vmafx_bypass::optin::{self, OptIn};
use vmafx_bypass::reexport::{self, Error, Mounted, Options, Stats};
use vmafx_bypass::snapshot::{SnapshotMode, SnapshotOptions};

use crate::cli::{Format, MountArgs, MountSnapshot, Passthrough};
use crate::exit::{Coded, Exit};
use crate::output::{self, JsonPath, Notes, SCHEMA, human_bytes, write_json};
use crate::signals::{Interrupted, Signals};

/// How long readers that have files open may go on after a signal.
const GRACE: Duration = Duration::from_secs(1);
/// What the process in the background says when it is mounted.
const MOUNTED: &str = "mounted";

/// Mounts, and serves until it is unmounted; or has another process do so.
pub fn run(args: &MountArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    if args.foreground || args.background {
        serve(args, notes, signals)
    } else {
        signals.unblock();
        in_background()
    }
}

fn options(args: &MountArgs) -> Options {
    let required = args.snapshot == MountSnapshot::Require;
    Options {
        source: args.source.clone(),
        mountpoint: args.mountpoint.clone(),
        passthrough: match args.passthrough {
            Passthrough::Auto if required => reexport::Passthrough::Require,
            Passthrough::Auto => reexport::Passthrough::Auto,
            Passthrough::Never => reexport::Passthrough::Never,
            Passthrough::Require => reexport::Passthrough::Require,
        },
        snapshots: SnapshotOptions {
            mode: match args.snapshot {
                MountSnapshot::Auto => SnapshotMode::Reflink,
                MountSnapshot::Copy | MountSnapshot::Require => SnapshotMode::Auto,
                MountSnapshot::Off => SnapshotMode::Off,
            },
            copy_budget: args.copy_budget.0,
        },
        allow_other: args.allow_other,
        threads: args.threads.into(),
        options: args.options.clone(),
    }
}

fn coded(error: Error) -> anyhow::Error {
    let exit = match &error {
        Error::Usage(_) => Exit::Usage,
        Error::Environment(_) => Exit::Environment,
        _ => Exit::Failed,
    };
    Coded::error(exit, error.to_string())
}

/// Each clip that is open has up to three descriptors.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // As it is, it also works, with fewer clips open at once.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn serve(args: &MountArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    if args.background {
        // Only who leads a group already may not; it then has no terminal's either.
        let _ = nix::unistd::setsid();
    }
    raise_descriptor_limit();
    let mounted = Mounted::mount(&options(args)).map_err(coded)?;
    let (end, watch) = (mounted.unmounter(), mounted.watch());
    let interrupted = signals.watch(move || {
        // Where others hold it, it ends for them when this process does.
        if !matches!(end.unmount(), Ok(false)) {
            std::thread::sleep(GRACE);
        }
    });
    let told = Told {
        format: args.format,
        background: args.background,
    };
    if !args.background {
        told.mounted(&mounted)?;
    }
    if let Some(refusal) = mounted.refusal()
        && !args.background
    {
        notes.note(format_args!(
            "note: `{}`: clips are read {}: {refusal}",
            mounted.mountpoint().display(),
            ways(&mounted)
        ));
    }
    // Nobody may listen, which changes nothing.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    if args.background {
        say_and_detach()?;
    }
    let stopped = std::thread::Builder::new().name("vmafx-mount".into());
    let serving = stopped.spawn(move || mounted.serve()).context("a thread")?;
    let stats = wait(serving, &interrupted, &watch)?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    told.ended(&stats)?;
    Ok(Exit::Done)
}

/// Until it is unmounted and closed; after a signal no longer than the grace.
fn wait(
    serving: std::thread::JoinHandle<Result<Stats, Error>>,
    interrupted: &Interrupted,
    watch: &reexport::Watch,
) -> Result<Stats> {
    const INTERVAL: Duration = Duration::from_millis(20);
    let mut left = GRACE;
    while !serving.is_finished() {
        if interrupted.exit().is_some() {
            if left.is_zero() {
                return Ok(watch.stats());
            }
            left = left.saturating_sub(INTERVAL);
        }
        std::thread::sleep(INTERVAL);
    }
    let served = serving.join();
    served
        .map_err(|_| Coded::error(Exit::Failed, "the serving thread panicked"))?
        .map_err(coded)
}

/// Starts this program again, and waits until it has mounted or failed.
fn in_background() -> Result<Exit> {
    let program = std::env::current_exe().context("this program's path")?;
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .arg("--background")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting in the background")?;
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut line)?;
    }
    if line.trim_end() == MOUNTED {
        return Ok(Exit::Done);
    }
    // It has told why.
    let status = child.wait()?;
    Ok(Exit::Code(status.code().unwrap_or(1) as u8))
}

/// Tells the process that waits, and leaves its terminal and pipes.
fn say_and_detach() -> Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{MOUNTED}")?;
    out.flush()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    // No folder is kept from being unmounted.
    std::env::set_current_dir("/")?;
    Ok(())
}

/// By which ways clips are read.
fn ways(mounted: &Mounted) -> &'static str {
    if optin::from_env() == OptIn::Killed {
        "through fuse alone"
    } else if mounted.refusal().is_some() {
        "by proven ranges"
    } else {
        "by passthrough where whole, else by proven ranges"
    }
}

/// How it is told.
struct Told {
    format: Format,
    background: bool,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Mounted {
        source: JsonPath,
        mountpoint: JsonPath,
        passthrough: bool,
        reason: Option<&'static str>,
        detail: Option<&'a str>,
    },
    Summary {
        #[serde(flatten)]
        stats: &'a Stats,
    },
}

impl Told {
    fn mounted(&self, mounted: &Mounted) -> Result<()> {
        let refusal = mounted.refusal();
        let (source, point) = (mounted.source(), mounted.mountpoint());
        let mut out = io::stdout().lock();
        match self.format {
            Format::Json => {
                let begin = serde_json::json!({"schema": SCHEMA, "stream": "mount"});
                write_json(&mut out, &begin)?;
                let event = Event::Mounted {
                    source: JsonPath::new(Some(source)),
                    mountpoint: JsonPath::new(Some(point)),
                    passthrough: refusal.is_none(),
                    reason: refusal.map(|refusal| refusal.reason.name()),
                    detail: refusal.map(|refusal| refusal.detail.as_str()),
                };
                write_json(&mut out, &event)?;
            }
            Format::Text => {
                let way = ways(mounted);
                let (source, point) = (source.display(), point.display());
                writeln!(out, "`{source}` is mounted at `{point}`: {way}")?;
            }
        }
        out.flush()?;
        Ok(())
    }

    fn ended(&self, stats: &Stats) -> Result<()> {
        if self.background {
            return Ok(());
        }
        if self.format == Format::Json {
            let mut out = io::stdout().lock();
            write_json(&mut out, &Event::Summary { stats })?;
            out.flush()?;
            return Ok(());
        }
        let opens: Vec<String> = stats
            .opens
            .iter()
            .map(|(w, n)| format!("{n} {w}"))
            .collect();
        let counts = |all: &std::collections::BTreeMap<vmafx_bypass::Reason, u64>| {
            let all: Vec<_> = all.iter().map(|(r, n)| format!("{r} {n}")).collect();
            all.join(", ")
        };
        let mut text = format!(
            "mount: opens: {}; by ranges {} from the cache, {} through FUSE",
            if opens.is_empty() {
                "none".to_owned()
            } else {
                opens.join(", ")
            },
            human_bytes(stats.cache_bytes),
            human_bytes(stats.fuse_bytes)
        );
        if !stats.fuse_by_reason.is_empty() {
            text = format!("{text} ({} bytes)", counts(&stats.fuse_by_reason));
        }
        if !stats.by_reason.is_empty() {
            text = format!("{text}; not passed through: {}", counts(&stats.by_reason));
        }
        if stats.failed + stats.failed_reads > 0 {
            let (opens, reads) = (stats.failed, stats.failed_reads);
            text = format!("{text}; failed: {opens} opens, {reads} reads");
        }
        output::report(text);
        Ok(())
    }
}
