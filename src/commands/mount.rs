//! `mount`: shows an rclone mount again, past FUSE where it is cached.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use serde::Serialize;
use vmafx_bypass::optin::{self, OptIn};
use vmafx_bypass::reexport::{self, Error, Mounted, Options, Stats};
use vmafx_bypass::snapshot::{SnapshotMode, SnapshotOptions};

use crate::cli::{Format, MountArgs, MountSnapshot, Passthrough};
#[cfg(feature = "metrics")]
use crate::commands::metrics;
use crate::exit::{self, Coded, Exit};
use crate::output::{self, JsonPath, Notes, SCHEMA, escape, human_bytes, write_json};
use crate::signals::Signals;

/// How long readers that have files open may go on after a signal.
const GRACE: Duration = Duration::from_secs(1);
/// How long a signal may wait for a mount that is being made.
const MOUNTS_WITHIN: Duration = Duration::from_secs(2);
/// What the process in the background says when it is mounted.
const MOUNTED: &str = "mounted";
/// Set for the process in the background.
const BACKGROUND: &str = "VMAFX_BYPASS_MOUNT_IN_BACKGROUND";

/// Mounts, and serves until it is unmounted; or has another process do so.
pub fn run(args: &MountArgs, notes: &Notes, mut signals: Signals) -> Result<Exit> {
    let background = !args.foreground && std::env::var_os(BACKGROUND).is_some();
    if args.foreground || background {
        // A terminal's end or key would leave a dead mount.
        signals.also([Signal::SIGHUP, Signal::SIGQUIT]);
        serve(args, background, notes, signals)
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

fn serve(args: &MountArgs, background: bool, notes: &Notes, signals: Signals) -> Result<Exit> {
    if background {
        leave_what_was_inherited();
    }
    raise_descriptor_limit();
    #[cfg(feature = "metrics")]
    let metrics = metrics::serve(
        args.metrics.metrics,
        metrics::Mount::default(),
        vmafx_bypass::privileges::Capabilities::NONE,
        notes,
    )?;
    let unmounted = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&unmounted);
    let (tell, told_end) = mpsc::channel::<reexport::Unmounter>();
    let interrupted = signals.watch(move || {
        // While it is being mounted, the source may hang: then it ends without.
        let Ok(end) = told_end.recv_timeout(MOUNTS_WITHIN) else {
            return;
        };
        // Where others hold it, it ends for them when this process does.
        let lazily = unmount(&end);
        done.store(true, Ordering::SeqCst);
        if lazily {
            std::thread::sleep(GRACE);
        }
    });
    let mounted = Mounted::mount(&options(args)).map_err(coded)?;
    let watch = mounted.watch();
    #[cfg(feature = "metrics")]
    metrics.counted().mounted(watch.clone());
    if tell.send(mounted.unmounter()).is_err() && interrupted.exit().is_some() {
        // A signal could not wait.
        return Ok(Exit::Done);
    }
    let told = Told {
        format: args.format,
        background,
    };
    if !background {
        told.mounted(&mounted).or_else(unless_broken_pipe)?;
    }
    if let Some(refusal) = mounted.refusal()
        && !background
    {
        notes.note(format_args!(
            "note: `{}`: clips are read {}: {refusal}",
            mounted.mountpoint().display(),
            ways(&mounted)
        ));
    }
    // Nobody may listen, which changes nothing.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    if background {
        say_and_detach()?;
    }
    let stopped = std::thread::Builder::new().name("vmafx-mount".into());
    let serving = stopped.spawn(move || mounted.serve()).context("a thread")?;
    let stats = wait(serving, &unmounted, &watch)?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    told.ended(&stats)?;
    Ok(Exit::Done)
}

/// Unmounts, as soon as no mount of others stands in the way: a mount that nobody
/// serves would take what is below it along. Whether files are open on it.
fn unmount(end: &reexport::Unmounter) -> bool {
    const INTERVAL: Duration = Duration::from_millis(200);
    let mut told = false;
    loop {
        match end.unmount() {
            Ok(lazily) => return lazily,
            Err(e) => {
                if !told {
                    output::report(format!(
                        "mount: not unmounted yet: {e}: unmount that; a second signal ends it so"
                    ));
                }
                told = true;
                std::thread::sleep(INTERVAL);
            }
        }
    }
}

/// Nobody may read what is told; it is served nevertheless.
fn unless_broken_pipe(error: anyhow::Error) -> Result<()> {
    if exit::is_broken_pipe(&error) {
        return Ok(());
    }
    Err(error)
}

/// In the background: the group and terminal, and descriptors that somebody may
/// wait to be closed; and ends with the process that waits for it.
fn leave_what_was_inherited() {
    // Only who leads a group already may not; it then has no terminal's either.
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM);
    let names = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
    let numbers = names.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let numbers: Vec<i32> = numbers.filter(|number| *number > 2).collect();
    for number in numbers {
        // One was the folder's own.
        let _ = nix::unistd::close(number);
    }
}

/// Until it is unmounted and closed; once a signal has unmounted it, no longer than
/// the grace.
fn wait(
    serving: std::thread::JoinHandle<Result<Stats, Error>>,
    unmounted: &AtomicBool,
    watch: &reexport::Watch,
) -> Result<Stats> {
    const INTERVAL: Duration = Duration::from_millis(20);
    let mut left = GRACE;
    while !serving.is_finished() {
        if unmounted.load(Ordering::SeqCst) {
            if left.is_zero() {
                return Ok(watch.stats());
            }
            left = left.saturating_sub(INTERVAL);
        }
        watch.sweep();
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
        .env(BACKGROUND, "1")
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
    // Told, it goes.
    let _ = nix::sys::prctl::set_pdeathsig(None);
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
                let (source, point) = (escape(source.as_os_str()), escape(point.as_os_str()));
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
