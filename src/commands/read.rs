//! `read`: the bytes of a file, by the way that is proven.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use vmafx_bypass::snapshot::{Mapped, SnapshotMode, SnapshotOptions, Snapshots};
use vmafx_bypass::{AlignedBuffer, BypassFile, BypassOptions, Reason, Refusal, Verify};

use crate::cli::{Format, ReadArgs, ReadEngine, VerifyMode};
use crate::exit::{Coded, Exit};
use crate::output::{self, JsonPath, Notes, SCHEMA, Sink, human_bytes};
use crate::signals::{Interrupted, Signals};

/// Reads and reports.
pub fn run(args: &ReadArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    let interrupted = signals.watch(|| {});
    if args.engine == ReadEngine::Mmap {
        if args.verify != VerifyMode::Off {
            let text = "--verify compares what pread reads: leave out --engine mmap";
            return Err(Coded::error(Exit::Usage, text));
        }
        let started = Instant::now();
        match map(&args.path)? {
            Ok(map) => return write_map(&map, args, started, &interrupted),
            Err(refusal) => notes.note(format_args!(
                "note: `{}` is not mapped: {refusal}; it is read by pread",
                args.path.display()
            )),
        }
    }
    let started = Instant::now();
    let file = match args.engine {
        ReadEngine::Fuse => BypassFile::open_fuse_only(&args.path),
        ReadEngine::Auto | ReadEngine::Pread | ReadEngine::Mmap => {
            options(args.socket.as_deref()).open(&args.path)
        }
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

/// Maps a whole clip, or says why it is none that can be.
fn map(path: &Path) -> Result<Result<Mapped, Refusal>> {
    let snapshots = Snapshots::of_huge_pages(SnapshotOptions {
        mode: SnapshotMode::Auto,
        // What memory there is limits it.
        copy_budget: u64::MAX,
    });
    let found = std::fs::metadata(path).with_context(|| format!("`{}`", path.display()))?;
    if !found.is_file() {
        return Ok(Err(Refusal::new(Reason::Unsupported, "it is no file")));
    }
    // Who may not read it fails here.
    let clip = File::open(path).with_context(|| format!("`{}`", path.display()))?;
    let whole = snapshots.open(clip.as_fd());
    Ok(whole.and_then(|whole| whole.map()))
}

fn write_map(
    map: &Mapped,
    args: &ReadArgs,
    started: Instant,
    interrupted: &Interrupted,
) -> Result<Exit> {
    let open_ns = started.elapsed().as_nanos() as u64;
    let mut sink = Sink::open(&args.output)?;
    let started = Instant::now();
    let at = |offset: u64| usize::try_from(offset).map_or(map.len(), |n| n.min(map.len()));
    let start = at(args.offset.0);
    let end = args.length.map_or(map.len(), |length| {
        at(args.offset.0.saturating_add(length.0))
    });
    for block in map[start..end].chunks(args.block_size.0 as usize) {
        if let Some(exit) = interrupted.exit() {
            return Ok(exit);
        }
        sink.write(block)?;
    }
    let read_ns = started.elapsed().as_nanos() as u64;
    sink.finish()?;
    if let Some(format) = args.stats {
        let path = std::fs::canonicalize(&args.path).unwrap_or_else(|_| args.path.clone());
        let bytes = (end - start) as u64;
        let report = Report {
            schema: SCHEMA,
            path: JsonPath::new(Some(&path)),
            state: "active",
            bytes,
            cache_bytes: bytes,
            fuse_bytes: 0,
            verified_bytes: 0,
            mismatch_offset: None,
            bytes_by_reason: BTreeMap::new(),
            open_ns,
            read_ns,
        };
        output::report(report.render(format)?);
    }
    Ok(Exit::Done)
}

/// Copies what was asked for; false when a signal ended it.
fn copy(
    file: &BypassFile,
    args: &ReadArgs,
    sink: &mut Sink,
    interrupted: &Interrupted,
) -> Result<bool> {
    file.advise_in_order();
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
