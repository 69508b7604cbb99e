//! `dump-map`: what a running `run` tracks.

use anyhow::Result;

use crate::cli::DumpMapArgs;
use crate::exit::{Coded, Exit};
use crate::output::Notes;
use crate::signals::Signals;

/// Prints the pinned maps.
pub fn run(args: &DumpMapArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    signals.unblock();
    dumping::run(args, notes)
}

#[cfg(not(feature = "ebpf"))]
mod dumping {
    use super::{Coded, DumpMapArgs, Exit, Notes, Result};

    pub fn run(_: &DumpMapArgs, _: &Notes) -> Result<Exit> {
        Err(Coded::error(
            Exit::Environment,
            "this build has no tracker: build it with the cargo feature `ebpf`",
        ))
    }
}

#[cfg(feature = "ebpf")]
mod dumping {
    use std::collections::HashMap;
    use std::io::{self, BufWriter, Write};
    use std::path::Path;

    use anyhow::Context;
    use serde::Serialize;
    use vmafx_bypass::mounts::Dev;
    use vmafx_bypass::tracker::{Accounts, Dump, DumpEntry, ReadCost, dump};

    use super::{Coded, DumpMapArgs, Exit, Notes, Result};
    use crate::cli::TableFormat;
    use crate::commands::account::Report;
    use crate::commands::estimate::{self, Estimator};
    use crate::output::{self, JsonPath, Row, SCHEMA, escape, losses_json, losses_text, shown};

    pub fn run(args: &DumpMapArgs, notes: &Notes) -> Result<Exit> {
        let mut dump =
            dump(&args.pin_dir).map_err(|e| Coded::error(Exit::Environment, e.to_string()))?;
        if !args.pid.is_empty() {
            dump.entries.retain(|e| args.pid.contains(&e.pid));
        }
        let account = dump.accounts.take().map(|accounts| {
            let accounts = of_processes(accounts, &args.pid);
            Report::new(&accounts, &mut Estimator::default(), || ())
        });
        let mut out = BufWriter::new(io::stdout());
        match args.format {
            TableFormat::Json => print_json(&mut out, &dump, account.as_ref()),
            TableFormat::Table => print_table(&mut out, &dump, account.as_ref()),
        }
        .and_then(|()| out.flush())
        .context("standard output")?;
        if !dump.owner.alive {
            notes.note(format_args!(
                "warning: pid {}, which kept these maps, has died: they are as it left them",
                dump.owner.pid
            ));
        }
        if let Some(lost) = losses_text(&dump.losses) {
            notes.note(format_args!("warning: {lost}"));
        }
        Ok(Exit::Done)
    }

    /// What these processes have read alone; all, if none is named.
    fn of_processes(mut accounts: Accounts, pids: &[u32]) -> Accounts {
        if !pids.is_empty() {
            accounts.each.retain(|account| pids.contains(&account.pid));
            accounts.total = ReadCost::default();
            for account in &accounts.each {
                accounts.total += account.cost;
            }
        }
        accounts
    }

    /// Superblock, path and size.
    type File<'a> = (Dev, Option<&'a Path>, u64);
    /// The cached bytes and the state.
    type Estimated = (Option<u64>, &'static str);

    /// Each file's estimate, made once: many descriptors may be of one file,
    /// and a dump is of one moment.
    #[derive(Default)]
    struct Estimates<'a> {
        estimator: Estimator,
        made: HashMap<File<'a>, Estimated>,
    }

    impl<'a> Estimates<'a> {
        fn of(&mut self, entry: &'a DumpEntry) -> Estimated {
            let (dev, path, size) = (entry.dev, entry.path.as_deref(), entry.size);
            *self.made.entry((dev, path, size)).or_insert_with(|| {
                let estimate = self.estimator.estimate(dev, path, size);
                (estimate.cached_bytes, estimate::state(&estimate))
            })
        }
    }

    fn row<'a>(entry: &'a DumpEntry, estimates: &mut Estimates<'a>) -> Row {
        let path = entry.path.as_deref();
        let (cached_bytes, state) = estimates.of(entry);
        Row {
            pid: entry.pid,
            own_pid: entry.own_pid,
            fd: entry.fd,
            comm: entry.comm.to_string_lossy().into_owned(),
            path: JsonPath::new(path),
            dev: entry.dev.to_string(),
            ino: entry.ino,
            flags: entry.flags,
            size: entry.size,
            cached_bytes,
            state,
        }
    }

    #[derive(Serialize)]
    struct JsonDump<'a> {
        schema: u32,
        owner: JsonOwner,
        complete: bool,
        losses: serde_json::Map<String, serde_json::Value>,
        entries: Vec<JsonEntry>,
        #[serde(skip_serializing_if = "Option::is_none")]
        account: Option<&'a Report>,
    }

    #[derive(Serialize)]
    struct JsonOwner {
        pid: u32,
        alive: bool,
        since: String,
    }

    #[derive(Serialize)]
    struct JsonEntry {
        #[serde(flatten)]
        row: Row,
        opened_at: String,
    }

    fn print_json(out: &mut impl Write, dump: &Dump, account: Option<&Report>) -> io::Result<()> {
        let mut estimates = Estimates::default();
        let document = JsonDump {
            schema: SCHEMA,
            owner: JsonOwner {
                pid: dump.owner.pid,
                alive: dump.owner.alive,
                since: output::time(dump.owner.since),
            },
            complete: dump.complete(),
            losses: losses_json(&dump.losses),
            entries: dump
                .entries
                .iter()
                .map(|entry| JsonEntry {
                    row: row(entry, &mut estimates),
                    opened_at: output::time(entry.opened_at),
                })
                .collect(),
            account,
        };
        output::write_json(out, &document)
    }

    fn print_table(out: &mut impl Write, dump: &Dump, account: Option<&Report>) -> io::Result<()> {
        let mut estimates = Estimates::default();
        writeln!(
            out,
            "{:>7} {:>4} {:<15} {:<24} {:>10} {:>6} {:<14} PATH",
            "PID", "FD", "COMM", "OPENED", "SIZE", "CACHED", "STATE"
        )?;
        for entry in &dump.entries {
            let row = row(entry, &mut estimates);
            let opened = humantime::format_rfc3339_millis(entry.opened_at);
            writeln!(
                out,
                "{:>7} {:>4} {:<15} {opened:<24} {:>10} {:>6} {:<14} {}",
                row.pid,
                row.fd,
                escape(&entry.comm),
                row.size(),
                row.cached(),
                row.state,
                shown(entry.path.as_deref()),
            )?;
        }
        for line in account.iter().flat_map(|report| report.text()) {
            writeln!(out, "{line}")?;
        }
        Ok(())
    }
}
