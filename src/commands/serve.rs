//! `run --socket`: the handover server beside the tracker.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;
use vmafx_bypass::handover::{Bound, Given, HandoverStats, Server, ServerError, ServerOptions};
use vmafx_bypass::snapshot::{SnapshotMode, SnapshotOptions, Snapshots};
use vmafx_bypass::{Clips, Reason};

use crate::cli::RunArgs;
use crate::exit::{Coded, Exit};
use crate::output::{self, Notes};

/// Descriptors for as many clients as a server takes, and the tracker's own.
const DESCRIPTORS: u64 = 16_384;

/// The socket that systemd gives, if it does, and the arguments with it.
pub fn given(args: &RunArgs) -> Result<(RunArgs, Option<Given>)> {
    let mut args = args.clone();
    let given = Given::from_env().map_err(coded)?;
    if let Some(given) = &given {
        let path = args.socket.get_or_insert_with(|| given.path().into());
        if !given.is_at(path) {
            let (path, other) = (shown(path), shown(given.path()));
            let message =
                format!("--socket `{path}`, and systemd gives `{other}`: name that one or none");
            return Err(Coded::error(Exit::Environment, message));
        }
        if args.socket_mode.is_some() || args.socket_owner.is_some() {
            let message = "--socket-mode and --socket-owner: the socket is systemd's: write \
                           SocketMode=, SocketUser= and SocketGroup= in its unit";
            return Err(Coded::error(Exit::Usage, message));
        }
    }
    Ok((args, given))
}

fn coded(error: ServerError) -> anyhow::Error {
    match error {
        ServerError::InUse { .. } | ServerError::Unfit(_) => {
            Coded::error(Exit::Environment, error.to_string())
        }
        error => error.into(),
    }
}

/// Makes the socket, if one is named, or takes the one that is given.
pub fn bind(args: &RunArgs, notes: &Notes, given: Option<Given>) -> Result<Option<Bound>> {
    let Some(socket) = &args.socket else {
        return Ok(None);
    };
    let mut options = ServerOptions {
        owner: args.socket_owner.unwrap_or_default(),
        log: notes
            .is_verbose()
            .then(|| Box::new(|line: &str| output::detail(line)) as _),
        ..ServerOptions::new(socket)
    };
    options.mode = args.socket_mode.unwrap_or(options.mode);
    let bound = match given {
        Some(given) => Server::bind_given(given, options),
        None => Server::bind(options).map_err(coded)?,
    };
    Ok(Some(bound))
}

/// Serves on it.
pub fn start(args: &RunArgs, notes: &Notes, bound: Option<Bound>) -> Result<Option<Server>> {
    let (Some(bound), Some(socket)) = (bound, &args.socket) else {
        return Ok(None);
    };
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < DESCRIPTORS {
        // With fewer the server takes fewer clients.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard.min(DESCRIPTORS), hard);
    }
    let prefixes = args.prefix.iter().map(|given| {
        // One that is not there yet is taken as it is written.
        std::fs::canonicalize(given).or_else(|_| std::path::absolute(given))
    });
    let snapshots = Snapshots::new(SnapshotOptions {
        mode: SnapshotMode::Auto,
        copy_budget: args.copy_budget.0,
    });
    let clips = Clips::new(prefixes.collect::<Result<_, _>>()?, Arc::new(snapshots));
    let server = bound.serve(Arc::new(clips))?;
    notes.note(format_args!(
        "handing cache files over at `{}`",
        shown(socket)
    ));
    Ok(Some(server))
}

fn shown(path: &Path) -> String {
    output::escape(path.as_os_str())
}

/// What the server has done, for the summary.
#[derive(Serialize)]
pub struct Summary {
    clients: u64,
    ranges: u64,
    whole: u64,
    checks: u64,
    ended: BTreeMap<Reason, u64>,
    refused: BTreeMap<Reason, u64>,
    rejected: u64,
    busy: u64,
    turned_away: u64,
    dropped: u64,
}

impl From<HandoverStats> for Summary {
    fn from(stats: HandoverStats) -> Self {
        Self {
            clients: stats.clients,
            ranges: stats.ranges,
            whole: stats.whole,
            checks: stats.checks,
            ended: stats.ended,
            refused: stats.refused,
            rejected: stats.rejected,
            busy: stats.busy,
            turned_away: stats.turned_away,
            dropped: stats.dropped,
        }
    }
}

impl Summary {
    /// One line.
    pub fn text(&self) -> String {
        let by_reason = |counts: &BTreeMap<Reason, u64>| {
            let all: u64 = counts.values().sum();
            let each: Vec<String> = counts.iter().map(|(r, n)| format!("{r} {n}")).collect();
            if each.is_empty() {
                "0".to_owned()
            } else {
                format!("{all} ({})", each.join(", "))
            }
        };
        let mut text = format!(
            "handover: {} clips by ranges, {} whole, to {} clients; {} refused, {} proofs ended",
            self.ranges,
            self.whole,
            self.clients,
            by_reason(&self.refused),
            by_reason(&self.ended),
        );
        for (count, what) in [
            (self.rejected, "requests rejected"),
            (self.busy, "put off"),
            (self.turned_away, "clients turned away"),
            (self.dropped, "dropped"),
        ] {
            if count > 0 {
                // Writing to a string does not fail.
                let _ = write!(text, ", {count} {what}");
            }
        }
        text
    }
}
