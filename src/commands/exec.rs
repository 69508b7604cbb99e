//! `exec`: runs a command past FUSE.

use std::ffi::OsString;

use anyhow::Result;
use serde::Serialize;
use vmafx_bypass::exec::{self, Error, ExecOptions, Inherited, Programs, Report};
use vmafx_bypass::snapshot::{SnapshotMode, SnapshotOptions};

use crate::cli::{ExecArgs, Format, Snapshot};
use crate::exit::{Coded, Exit};
use crate::output::{self, Notes, SCHEMA, human_bytes};
use crate::pipe;
use crate::signals::Signals;

/// Runs the command; does not return where a signal has ended it.
pub fn run(args: &ExecArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    let options = ExecOptions {
        prefixes: args.prefix.clone(),
        snapshots: SnapshotOptions {
            mode: match args.snapshot {
                Snapshot::Auto => SnapshotMode::Auto,
                Snapshot::Require => SnapshotMode::Require,
                Snapshot::Off => SnapshotMode::Off,
            },
            copy_budget: args.copy_budget.0,
        },
        programs: Programs::new(&args.include, &args.exclude),
        inherited: Inherited {
            mask: signals.mask_before(),
            ignores_pipe: pipe::was_ignored(),
        },
    };
    let mut tell = |why: &str| notes.note(format_args!("note: {why}"));
    let ended = exec::run(&args.command, &options, &mut tell).map_err(|error| {
        let code = match &error {
            Error::NotFound(_) => 127,
            Error::NotExecutable { .. } => 126,
            _ => 125,
        };
        Coded::error(Exit::Code(code), error.to_string())
    })?;
    if ended.report.no_new_privs {
        notes.detail("no_new_privs was set: set-uid programs had no effect");
    }
    if let Some(format) = args.report {
        output::report(render(&ended.report, &args.command, format)?);
    }
    ended.die_alike();
    Ok(Exit::Code(match (ended.code(), ended.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal as u8,
        (None, None) => 125,
    }))
}

#[derive(Serialize)]
struct Json<'a> {
    schema: u32,
    #[serde(flatten)]
    report: &'a Report,
}

fn render(report: &Report, command: &[OsString], format: Format) -> Result<String> {
    if format == Format::Json {
        return Ok(serde_json::to_string(&Json {
            schema: SCHEMA,
            report,
        })?);
    }
    let program = command.first().map(|c| c.display().to_string());
    let program = program.unwrap_or_default();
    if let Some(why) = &report.unassisted {
        return Ok(format!("exec: `{program}` ran unassisted: {why}"));
    }
    let clips = report.opens - report.elsewhere;
    let mut line = format!(
        "exec: {} of {clips} opens of clips got a snapshot ({}",
        report.substituted,
        human_bytes(report.bytes)
    );
    for (kind, count) in &report.kinds {
        line.push_str(&format!(", {count} {kind}"));
    }
    line.push(')');
    for (reason, count) in &report.by_reason {
        line.push_str(&format!(", {count} through FUSE: {reason}"));
    }
    if report.interrupted > 0 {
        line.push_str(&format!(", {} interrupted", report.interrupted));
    }
    line.push_str(&format!("; {} other opens", report.elsewhere));
    Ok(line)
}
