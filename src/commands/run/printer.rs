//! What `run` prints: rows or NDJSON, and the summary.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use vmafx_bypass::Tracker;
use vmafx_bypass::tracker::{AttachMode, Event, EventKind, Losses, Update, Watch};

use crate::cli::{Format, RunArgs};
use crate::commands::estimate::{self, Estimator};
use crate::commands::{account, serve};
use crate::output::{self, JsonPath, Notes, Row, SCHEMA, escape, losses_json, losses_text, shown};

/// Clips and processes that the summary lists at most, of each.
const LISTED: usize = 10;

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
pub struct Printer<'a> {
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
    pub fn new(args: &RunArgs, notes: &'a Notes, tracker: &'a Tracker) -> Self {
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

    pub fn begin(&mut self, watches: &[Watch]) -> io::Result<()> {
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

    pub fn update(&mut self, update: &Update) -> io::Result<()> {
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
            ("open", Some(ns)) => output::human_ns(ns),
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
    pub fn accounts(&mut self, progress: impl FnMut()) -> Result<Option<account::Report>> {
        let accounts = self.tracker.accounts().context("reading the accounts")?;
        Ok(accounts.map(|accounts| {
            account::Report::new(&accounts, &mut self.estimator, progress).largest(LISTED)
        }))
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// The summary, with every loss; printed even with `--quiet`.
    pub fn end(
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
