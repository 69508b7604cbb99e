//! `read`: the bytes of a file, by the way that is proven.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use vmafx_bypass::{AlignedBuffer, BypassFile, BypassOptions, Reason, Verify};

use crate::cli::{Format, ReadArgs, ReadEngine, VerifyMode};
use crate::exit::{Coded, Exit};
use crate::output::{self, JsonPath, Notes, SCHEMA, Sink, human_bytes};
use crate::signals::{Interrupted, Signals};

/// Reads and reports.
pub fn run(args: &ReadArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    let interrupted = signals.watch(|| {});
    let started = Instant::now();
    let file = match args.engine {
        ReadEngine::Fuse => BypassFile::open_fuse_only(&args.path),
        ReadEngine::Auto | ReadEngine::Pread => options(args.socket.as_deref()).open(&args.path),
    }
    .with_context(|| format!("`{}`", args.path.display()))?
    .verifying(match args.verify {
        VerifyMode::Off => Verify::Off,
        VerifyMode::Sample => Verify::Sample,
        VerifyMode::Full => Verify::Full,
    });
    let open_ns = started.elapsed().as_nanos() as u64;
    let opened_as = file.refusal();

    let mut sink = Sink::open(&args.output)?;
    let started = Instant::now();
    let finished = copy(&file, args, &mut sink, &interrupted)?;
    let read_ns = started.elapsed().as_nanos() as u64;
    if !finished {
        return Ok(interrupted.exit().unwrap_or(Exit::Failed));
    }
    sink.finish()?;

    let stats = file.stats();
    let asked_for_fuse = args.engine == ReadEngine::Fuse;
    for (reason, bytes) in &stats.by_reason {
        if asked_for_fuse || *reason == Reason::NotFuse || reason.is_benign() {
            continue;
        }
        let detail = opened_as
            .as_ref()
            .filter(|refusal| refusal.reason == *reason)
            .map_or_else(String::new, |refusal| format!(" ({})", refusal.detail));
        notes.note(format_args!(
            "note: {} of `{}` came through FUSE: {reason}{detail}; {}",
            human_bytes(*bytes),
            args.path.display(),
            reason.remedy()
        ));
    }
    if let Some(format) = args.stats {
        let state = match (&opened_as, stats.cache_bytes) {
            (Some(refusal), 0) => refusal.reason.name(),
            _ => match stats.by_reason.keys().find(|reason| !reason.is_benign()) {
                Some(reason) => reason.name(),
                None => "active",
            },
        };
        let report = Report {
            schema: SCHEMA,
            path: JsonPath::new(Some(file.path())),
            state,
            bytes: stats.cache_bytes + stats.fuse_bytes(),
            cache_bytes: stats.cache_bytes,
            fuse_bytes: stats.fuse_bytes(),
            verified_bytes: stats.verified_bytes,
            mismatch_offset: file.mismatch(),
            bytes_by_reason: stats.by_reason,
            open_ns,
            read_ns,
        };
        output::report(report.render(format)?);
    }
    if let Some(offset) = file.mismatch() {
        return Err(Coded::error(
            Exit::Mismatch,
            format!(
                "`{}`: the cache and fuse differ at offset {offset}; fuse's bytes were written, {}",
                args.path.display(),
                Reason::Quarantined.remedy()
            ),
        ));
    }
    Ok(Exit::Done)
}

/// How to open, by a server at this socket or by the environment's.
pub fn options(socket: Option<&Path>) -> BypassOptions {
    let options = BypassOptions::new();
    match socket {
        Some(socket) => options.socket(socket),
        None => options,
    }
}

#[derive(Serialize)]
struct Report {
    schema: u32,
    #[serde(flatten)]
    path: JsonPath,
    state: &'static str,
    bytes: u64,
    cache_bytes: u64,
    fuse_bytes: u64,
    verified_bytes: u64,
    /// The first offset at which the cache had other bytes than FUSE.
    mismatch_offset: Option<u64>,
    bytes_by_reason: BTreeMap<Reason, u64>,
    open_ns: u64,
    read_ns: u64,
}

impl Report {
    fn render(&self, format: Format) -> Result<String> {
        if format == Format::Json {
            return Ok(serde_json::to_string(self)?);
        }
        let rate = self.bytes as f64 / (self.read_ns.max(1) as f64 / 1e9);
        let verified = match self.verified_bytes {
            0 => String::new(),
            bytes => format!("; {} compared with FUSE", human_bytes(bytes)),
        };
        Ok(format!(
            "{}: {} ({} from the cache, {} through FUSE) in {:.1} ms, {}/s; opened in {:.1} ms{verified}",
            self.state,
            human_bytes(self.bytes),
            human_bytes(self.cache_bytes),
            human_bytes(self.fuse_bytes),
            self.read_ns as f64 / 1e6,
            human_bytes(rate as u64),
            self.open_ns as f64 / 1e6
        ))
    }
}

/// Copies what was asked for; false when a signal ended it.
fn copy(
    file: &BypassFile,
    args: &ReadArgs,
    sink: &mut Sink,
    interrupted: &Interrupted,
) -> Result<bool> {
    let mut buffer = AlignedBuffer::new(args.block_size.0 as usize);
    let mut offset = args.offset.0;
    let mut left = args.length.map_or(u64::MAX, |length| length.0);
    while left > 0 {
        if interrupted.exit().is_some() {
            return Ok(false);
        }
        let want = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = file
            .read_at(&mut buffer[..want], offset)
            .with_context(|| format!("reading `{}` at offset {offset}", args.path.display()))?;
        if n == 0 {
            break;
        }
        sink.write(&buffer[..n])?;
        offset += n as u64;
        left -= n as u64;
    }
    Ok(true)
}
