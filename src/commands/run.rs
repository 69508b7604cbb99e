//! `run`: events as they happen.

use std::process;

use anyhow::Result;

use crate::cli::RunArgs;
use crate::exit::{Coded, Exit};
use crate::output::Notes;
use crate::signals::Signals;
use vmafx_bypass::optin::{self, OptIn};

/// Checks the opt-in and tracks until a signal.
pub fn run(args: &RunArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    match optin::from_env() {
        OptIn::Killed => {
            return Err(Coded::error(
                Exit::Environment,
                format!(
                    "{0}=0 switches tracking off on this host: unset it or set {0}=1",
                    optin::VARIABLE
                ),
            ));
        }
        OptIn::Unset if !args.enable => {
            return Err(Coded::error(
                Exit::Environment,
                format!(
                    "tracking is opt-in: set {}=1, or start with --enable",
                    optin::VARIABLE
                ),
            ));
        }
        OptIn::Unset | OptIn::Yes => {}
    }
    notes.detail(format_args!("pid {}", process::id()));
    tracking::run(args, notes, signals)
}

#[cfg(not(feature = "ebpf"))]
mod tracking {
    use super::{Coded, Exit, Notes, Result, RunArgs, Signals};

    pub fn run(_: &RunArgs, _: &Notes, _: Signals) -> Result<Exit> {
        Err(Coded::error(
            Exit::Environment,
            "this build has no tracker: build it with the cargo feature `ebpf`",
        ))
    }
}

#[cfg(feature = "ebpf")]
mod tracking {
    use std::io::{self, BufWriter, Write};
    use std::path::Path;
    use std::sync::mpsc::RecvTimeoutError;
    use std::sync::{Arc, Mutex, PoisonError};
    use std::time::{Duration, Instant};

    use anyhow::Context;
    use serde::Serialize;
    #[cfg(feature = "metrics")]
    use vmafx_bypass::handover;
    use vmafx_bypass::tracker::{
        AttachMode, Event, EventKind, Losses, Stopper, Subscription, TrackerError, Update, Watch,
    };
    use vmafx_bypass::{Tracker, TrackerOptions};

    use super::{Coded, Exit, Notes, Result, RunArgs, Signals};
    use crate::cli::{Attach, Format, Wait};
    use crate::commands::account;
    use crate::commands::estimate::{self, Estimator};
    #[cfg(feature = "metrics")]
    use crate::commands::metrics;
    use crate::commands::notify::Service;
    use crate::commands::{confine, serve};
    use crate::output::{self, JsonPath, Row, SCHEMA, escape, losses_json, losses_text, shown};
    use crate::signals::Interrupted;

    /// Clips and processes that the summary lists at most, of each.
    const LISTED: usize = 10;

    pub fn run(args: &RunArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
        // Nothing that it does starts a program.
        rustix::thread::set_no_new_privs(true).context("no_new_privs")?;
        let service = Service::from_env(notes);
        let (args, given) = serve::given(args)?;
        let args = &args;
        #[cfg(feature = "metrics")]
        let metrics = metrics::serve(
            args.metrics.metrics,
            metrics::Run::new(args),
            confine::lasting(),
            notes,
        )?;
        // Signals first: a prefix on a mount that hangs would hang the start.
        let stopper: Arc<Mutex<Option<Stopper>>> = Arc::default();
        let interrupted = signals.powerless().watch({
            let stopper = Arc::clone(&stopper);
            move || {
                let stopper = stopper.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(stopper) = &*stopper {
                    stopper.stop();
                }
            }
        });
        let (tracker, updates) = Tracker::start_subscribed(TrackerOptions {
            prefixes: args.prefix.clone(),
            allow_missing: args.wait.is_some(),
            attach: mode(args.attach),
            log: notes.libbpf_log(),
            pin_dir: Some(args.pin_dir.clone()),
            max_fds: args.max_fds,
            ring_bytes: args.ring_size.0 as u32,
            account: args.account,
            keep: Some(confine::lasting()),
        })
        .map_err(coded)?;
        *stopper.lock().unwrap_or_else(PoisonError::into_inner) = Some(tracker.stopper());
        if interrupted.exit().is_some() {
            tracker.stopper().stop();
        }
        if tracker.replaced_pins() {
            notes.note(format_args!(
                "warning: replaced the pins that a dead process had left at `{}`",
                args.pin_dir.display()
            ));
        }
        for (mode, error) in tracker.refused_modes() {
            notes.detail(format_args!("not attached by {}: {error}", mode.name()));
        }
        if tracker.attach_mode() == Some(AttachMode::Tracepoint) {
            notes.note("note: 32-bit programs are not seen by --attach tracepoint");
        }
        if tracker.in_pid_namespace() {
            notes.note(
                "warning: in a pid namespace of its own: processes outside of it are not shown",
            );
        }
        let bound = serve::bind(args, notes, given)?;
        confine::before_serving(args, notes);
        let server = serve::start(args, notes, bound)?;
        confine::after_serving(args, notes);
        #[cfg(feature = "metrics")]
        metrics.counted().attached(
            tracker.observer(),
            server.as_ref().map(handover::Server::observer),
        );
        let telling = service.ready(tracker.pulse());
        let mut printer = Printer::new(args, notes, &tracker);
        let ended = printer
            .begin(&tracker.watches())
            .map_err(Into::into)
            .and_then(|()| {
                if let Some(Wait::AtMost(limit)) = args.wait
                    && tracker.watches().is_empty()
                    && interrupted.exit().is_none()
                {
                    wait_for_mount(&updates, *limit, &mut printer)?;
                }
                let end = tracker.stopper();
                let duration = args.duration.map(|d| *d);
                follow(&updates, duration, &end, &interrupted, &mut printer)
            });
        telling.stopping();
        // Before `stop`, where the kernel may take seconds to detach.
        let entries = tracker.entries();
        let (events, losses) = (tracker.events(), tracker.losses());
        let complete = losses.complete() && entries.iter().all(|fd| fd.path.is_some());
        let tracked = entries.len();
        let accounts = match &ended {
            Ok(()) => printer.accounts(&interrupted),
            // Nobody reads it.
            Err(_) => Ok(None),
        };
        let handover = server.as_ref().map(|server| server.stats().into());
        drop(server);
        let summarised = printer.end(
            events,
            tracked,
            complete,
            &losses,
            accounts.as_ref().ok().and_then(Option::as_ref),
            handover.as_ref(),
        );
        if ended.is_ok() && summarised.is_ok() {
            interrupted.note_told();
        }
        // The tracker's own errors come first.
        tracker.stop().map_err(coded)?;
        ended?;
        summarised?;
        accounts?;
        Ok(Exit::Done)
    }

    fn mode(attach: Attach) -> Option<AttachMode> {
        match attach {
            Attach::Auto => None,
            Attach::Fentry => Some(AttachMode::Fentry),
            Attach::Raw => Some(AttachMode::Raw),
            Attach::Tracepoint => Some(AttachMode::Tracepoint),
        }
    }

    fn coded(error: TrackerError) -> anyhow::Error {
        match &error {
            TrackerError::Environment(_) | TrackerError::Prefix(_) => {
                Coded::error(Exit::Environment, error.to_string())
            }
            _ => error.into(),
        }
    }

    fn wait_for_mount(
        updates: &Subscription,
        limit: Duration,
        printer: &mut Printer<'_>,
    ) -> Result<()> {
        let started = Instant::now();
        loop {
            match updates.recv_timeout(limit.saturating_sub(started.elapsed())) {
                Ok(update) => {
                    printer.update(&update)?;
                    if matches!(update, Update::Mounted(_)) {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Coded::error(
                        Exit::Environment,
                        format!(
                            "no prefix came on an rclone mount within {}",
                            humantime::format_duration(limit)
                        ),
                    ));
                }
            }
        }
    }

    /// Prints until tracking ends, by itself or when the time is over.
    fn follow(
        updates: &Subscription,
        duration: Option<Duration>,
        end: &Stopper,
        interrupted: &Interrupted,
        printer: &mut Printer<'_>,
    ) -> Result<()> {
        // One beyond the clock's range never comes.
        let mut deadline = duration.and_then(|d| Instant::now().checked_add(d));
        loop {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                // What was sent before is still printed.
                end.stop();
                deadline = None;
            }
            // Rows are flushed when there is nothing more to print at once.
            let update = match updates.recv_timeout(Duration::ZERO) {
                Err(RecvTimeoutError::Timeout) => {
                    printer.flush()?;
                    match deadline {
                        None => updates.recv().ok_or(RecvTimeoutError::Disconnected),
                        Some(deadline) => {
                            updates.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                        }
                    }
                }
                ready => ready,
            };
            match update {
                Ok(update) => {
                    printer.update(&update)?;
                    interrupted.note_progress();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    #[derive(Serialize)]
    struct JsonEvent<'a> {
        event: &'static str,
        ts: String,
        tid: u32,
        #[serde(flatten)]
        row: &'a Row,
        open_ns: Option<u64>,
        /// What the process has read of the clip so far; of `close` alone.
        #[serde(flatten)]
        read: Option<account::Cost>,
    }

    #[derive(Serialize)]
    struct JsonMount {
        event: &'static str,
        ts: String,
        #[serde(flatten)]
        prefix: JsonPath,
        dev: String,
        source: String,
        read_only: bool,
        attach: &'static str,
    }

    /// Prints events as text rows or NDJSON.
    struct Printer<'a> {
        format: Format,
        notes: &'a Notes,
        mode: Option<AttachMode>,
        out: BufWriter<std::io::Stdout>,
        tracker: &'a Tracker,
        /// Whether reads are counted.
        account: bool,
        /// Whether events have rows.
        events: bool,
        estimator: Estimator,
    }

    impl<'a> Printer<'a> {
        fn new(args: &RunArgs, notes: &'a Notes, tracker: &'a Tracker) -> Self {
            Self {
                format: args.format,
                notes,
                mode: tracker.attach_mode(),
                tracker,
                account: args.account,
                events: !args.no_events && (args.format == Format::Json || !notes.is_quiet()),
                out: BufWriter::new(io::stdout()),
                estimator: Estimator::new(args.cache_dir.clone()),
            }
        }

        fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
            output::write_json(&mut self.out, value)
        }

        fn begin(&mut self, watches: &[Watch]) -> io::Result<()> {
            if self.format == Format::Json {
                self.json(&serde_json::json!({"schema": SCHEMA, "stream": "events"}))?;
            }
            if watches.is_empty() {
                let by = self.mode.map_or("", AttachMode::describe);
                self.notes
                    .note(format_args!("attached by {by}; waiting for a mount"));
            }
            for watch in watches {
                self.mount("attach", watch)?;
            }
            if self.format == Format::Text && self.events {
                writeln!(
                    self.out,
                    "{:<12} {:<7} {:>7} {:>4} {:<15} {:>10} {:>6} {:<14} {:>9} {}PATH",
                    "TIME",
                    "EVENT",
                    "PID",
                    "FD",
                    "COMM",
                    "SIZE",
                    "CACHED",
                    "STATE",
                    "OPEN",
                    if self.account { account::HEADER } else { "" },
                )?;
            }
            self.flush()
        }

        /// A prefix that is watched now, or not any more.
        fn mount(&mut self, event: &'static str, watch: &Watch) -> io::Result<()> {
            let mount = &watch.mount;
            match self.format {
                Format::Json => self.json(&JsonMount {
                    event,
                    ts: output::time(std::time::SystemTime::now()),
                    prefix: JsonPath::new(Some(&watch.prefix)),
                    dev: mount.dev.to_string(),
                    source: mount.source.to_string_lossy().into_owned(),
                    read_only: mount.read_only,
                    attach: self.mode.map_or("", AttachMode::name),
                }),
                Format::Text => {
                    let by = self.mode.map_or("", AttachMode::describe);
                    let what = match event {
                        "attach" => format!("attached by {by}, watching"),
                        "mount" => "mounted, watching".into(),
                        _ => "unmounted, waiting for".into(),
                    };
                    let mode = if mount.read_only {
                        "read-only"
                    } else {
                        "writable"
                    };
                    self.notes.note(format_args!(
                        "{what} `{}` ({} {}, device {}, {mode})",
                        escape(watch.prefix.as_os_str()),
                        mount.fstype,
                        escape(&mount.source),
                        mount.dev,
                    ));
                    Ok(())
                }
            }
        }

        fn update(&mut self, update: &Update) -> io::Result<()> {
            match update {
                Update::Fd(event) => self.event(event),
                Update::Mounted(watch) => self.mount("mount", watch),
                Update::Unmounted(watch) => self.mount("unmount", watch),
                _ => Ok(()),
            }
        }

        fn event(&mut self, event: &Event) -> io::Result<()> {
            if !self.events {
                return Ok(());
            }
            let fd = &event.fd;
            let path: Option<&Path> = fd.path.as_deref();
            let estimate = self.estimator.estimate(fd.dev, path, fd.size);
            let row = Row {
                pid: fd.pid,
                own_pid: fd.own_pid,
                fd: fd.fd,
                comm: fd.comm.to_string_lossy().into_owned(),
                path: JsonPath::new(path),
                dev: fd.dev.to_string(),
                ino: fd.ino,
                flags: fd.flags,
                size: fd.size,
                cached_bytes: estimate.cached_bytes,
                state: estimate::state(&estimate),
            };
            let closed = event.kind == EventKind::Close;
            let read = (self.account && closed).then(|| {
                let cost = self.tracker.read_cost(fd.pid, fd.dev, fd.ino);
                account::Cost::from(cost.unwrap_or_default())
            });
            let ts = output::time(event.at);
            if self.format == Format::Json {
                return self.json(&JsonEvent {
                    event: event.kind.name(),
                    ts,
                    tid: event.tid,
                    row: &row,
                    open_ns: fd.open_ns,
                    read,
                });
            }
            let open = match (event.kind.name(), fd.open_ns) {
                ("open", Some(ns)) => format!("{:.1} us", ns as f64 / 1e3),
                _ => "-".to_owned(),
            };
            // The time of day alone, to the millisecond.
            let clock = ts.get(11..23).unwrap_or(&ts);
            writeln!(
                self.out,
                "{clock:<12} {:<7} {:>7} {:>4} {:<15} {:>10} {:>6} {:<14} {open:>9} {}{}",
                event.kind.name(),
                row.pid,
                row.fd,
                escape(&fd.comm),
                row.size(),
                row.cached(),
                row.state,
                if self.account {
                    account::columns(read)
                } else {
                    String::new()
                },
                shown(path),
            )
        }

        /// What reads cost, for the summary; `None`: that was not asked for. It can
        /// take long, and is not to be cut off.
        fn accounts(&mut self, interrupted: &Interrupted) -> Result<Option<account::Report>> {
            let accounts = self.tracker.accounts().context("reading the accounts")?;
            Ok(accounts.map(|accounts| {
                let progress = || interrupted.note_progress();
                account::Report::new(&accounts, &mut self.estimator, progress).largest(LISTED)
            }))
        }

        fn flush(&mut self) -> io::Result<()> {
            self.out.flush()
        }

        /// The summary, with every loss; printed even with `--quiet`.
        fn end(
            &mut self,
            events: u64,
            tracked: usize,
            complete: bool,
            losses: &Losses,
            accounts: Option<&account::Report>,
            handover: Option<&serve::Summary>,
        ) -> Result<()> {
            if self.format == Format::Json {
                let mut summary = serde_json::json!({
                    "event": "summary",
                    "ts": output::time(std::time::SystemTime::now()),
                    "events": events,
                    "tracked": tracked,
                    "complete": complete,
                    "losses": losses_json(losses),
                });
                if let Some(accounts) = accounts {
                    summary["account"] = serde_json::to_value(accounts)?;
                }
                if let Some(handover) = handover {
                    summary["handover"] = serde_json::to_value(handover)?;
                }
                self.json(&summary)?;
            } else {
                let lost = match losses_text(losses) {
                    None => "nothing lost".to_owned(),
                    Some(lost) if complete => format!("{lost}; all made good"),
                    Some(lost) => format!("{lost}; the table is not complete"),
                };
                output::report(format_args!(
                    "summary: {events} events, {tracked} descriptors still open, {lost}"
                ));
                for line in accounts.iter().flat_map(|report| report.text()) {
                    output::report(line);
                }
                if let Some(handover) = handover {
                    output::report(handover.text());
                }
            }
            self.flush().context("standard output")
        }
    }
}
