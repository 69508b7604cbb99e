//! `exec`: runs a command past FUSE.

use std::ffi::OsString;

use anyhow::Result;
use serde::Serialize;
use vmafx_bypass::exec::{self, Error, ExecOptions, FillOptions, Inherited, Programs, Report};
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
        socket: args.socket.clone(),
        fill: args.fill.then(|| FillOptions {
            max_size: args.fill_max_size.0,
            timeout: args.fill_timeout.into(),
        }),
        programs: Programs::new(&args.include, &args.exclude),
        inherited: Inherited {
            mask: signals.mask_before(),
            ignores_pipe: pipe::was_ignored(),
            closed: pipe::were_closed(),
        },
    };
    let mut tell = |why: &str| notes.note(format_args!("note: {why}"));
    let ended = exec::run(&args.command, &options, &mut tell).map_err(|error| {
        let code = match &error {
            Error::NotFound(_) => 127,
            Error::NotExecutable { .. } => 126,
            Error::Failed(_) => 125,
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
    let kinds = report.kinds.iter();
    let mut kinds: Vec<String> = kinds.map(|(kind, n)| format!(", {n} {kind}")).collect();
    if report.by_server > 0 {
        kinds.push(format!(", {} by the server", report.by_server));
    }
    let reasons = report.by_reason.iter();
    let mut rest: Vec<String> = reasons
        .map(|(reason, n)| format!(", {n} through FUSE: {reason}"))
        .collect();
    if report.filled > 0 {
        let read = human_bytes(report.fill_bytes);
        rest.push(format!(", {} clips completed ({read})", report.filled));
    }
    if report.fill_failed > 0 {
        rest.push(format!(", {} not completed", report.fill_failed));
    }
    if report.interrupted > 0 {
        rest.push(format!(", {} interrupted", report.interrupted));
    }
    Ok(format!(
        "exec: {} of {} opens of clips got a snapshot ({}{}){}; {} other opens",
        report.substituted,
        report.opens - report.elsewhere,
        human_bytes(report.bytes),
        kinds.concat(),
        rest.concat(),
        report.elsewhere
    ))
}
