//! `explain`: every gate between a file and the bypass, with evidence.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use vmafx_bypass::cache::ranges::Span;
use vmafx_bypass::cache::trail::{Gate, Step};
use vmafx_bypass::{Explanation, Reason};

use super::read::options;
use crate::cli::{ExplainArgs, Format};
use crate::exit::Exit;
use crate::output::{JsonPath, SCHEMA, escape, human_bytes, write_json};

/// Columns of the range map.
const WIDTH: usize = 64;
/// Ranges listed in text; JSON has all of them.
const MAX_ROWS: usize = 20;

/// Explains one file.
pub fn run(args: &ExplainArgs) -> Result<Exit> {
    let shown = || format!("`{}`", args.path.display());
    let source = source_of(&args.path).with_context(shown)?;
    let path = source.as_deref().unwrap_or(&args.path);
    let options = options(args.socket.as_deref());
    let explanation = options.explain(path).with_context(shown)?;
    // As it was given: on a mount of ours, which reads that clip.
    let reexport = source.is_some().then_some(args.path.as_path());
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => write_json(&mut out, &Document::new(&explanation, reexport))?,
        Format::Text => {
            if let Some(given) = reexport {
                let given = escape(given.as_os_str());
                writeln!(out, "{given} is on a mount of vmafx-bypass, which shows:")?;
            }
            write_text(&mut out, &explanation)?;
        }
    }
    out.flush()?;
    Ok(Exit::Done)
}

#[cfg(feature = "mount")]
fn source_of(path: &Path) -> io::Result<Option<PathBuf>> {
    vmafx_bypass::reexport::source_of(path)
}

// As with the feature.
#[cfg(not(feature = "mount"))]
#[allow(clippy::unnecessary_wraps)]
fn source_of(_: &Path) -> io::Result<Option<PathBuf>> {
    Ok(None)
}

fn name(reason: Option<Reason>) -> &'static str {
    reason.map_or("active", Reason::name)
}

/// A file's state: why none of it, or the largest part that is not an edge.
fn state(explanation: &Explanation) -> &'static str {
    let refused = explanation.refusal.as_ref().map(|refusal| refusal.reason);
    let mut reasons = explanation.ranges.iter().filter_map(|(_, reason)| *reason);
    name(refused.or_else(|| reasons.find(|reason| !reason.is_benign())))
}

#[derive(Serialize)]
struct Document {
    schema: u32,
    #[serde(flatten)]
    path: JsonPath,
    #[serde(skip_serializing_if = "Option::is_none")]
    reexport: Option<JsonPath>,
    state: &'static str,
    size: u64,
    cached_bytes: u64,
    gates: Vec<GateRow>,
    ranges: Vec<RangeRow>,
}

#[derive(Serialize)]
struct GateRow {
    name: &'static str,
    /// Null: not come to, because an earlier one does not hold.
    pass: Option<bool>,
    detail: Option<String>,
    remedy: Option<&'static str>,
}

#[derive(Serialize)]
struct RangeRow {
    start: u64,
    end: u64,
    reason: &'static str,
}

impl Document {
    fn new(explanation: &Explanation, reexport: Option<&Path>) -> Self {
        let ranges = explanation.ranges.iter().map(|(span, reason)| RangeRow {
            start: span.start,
            end: span.end,
            reason: name(*reason),
        });
        Self {
            schema: SCHEMA,
            path: JsonPath::new(Some(&explanation.path)),
            reexport: reexport.map(|path| JsonPath::new(Some(path))),
            state: state(explanation),
            size: explanation.size,
            cached_bytes: explanation.cached_bytes(),
            gates: gates(explanation),
            ranges: ranges.collect(),
        }
    }
}

/// What a gate found, if it was come to.
fn step(explanation: &Explanation, gate: Gate) -> Option<&Step> {
    explanation.steps.iter().find(|step| step.gate == gate)
}

/// Every gate there is, in order.
fn gates(explanation: &Explanation) -> Vec<GateRow> {
    let server = step(explanation, Gate::Handover);
    let is_handed_over = server.is_some_and(|step| step.found.is_ok());
    let row = |gate: &Gate| {
        let step = step(explanation, *gate);
        let refusal = step.and_then(|step| step.found.as_ref().err());
        // What a server has made up for needs no remedy.
        let refusal = refusal.filter(|_| !is_handed_over);
        GateRow {
            name: gate.name(),
            pass: step.map(|step| step.found.is_ok()),
            detail: step.map(|step| match &step.found {
                Ok(evidence) => evidence.clone(),
                Err(refusal) => format!("{}: {}", refusal.reason, refusal.detail),
            }),
            remedy: refusal.map(|refusal| refusal.reason.remedy()),
        }
    };
    Gate::ALL.iter().map(row).collect()
}

fn write_text(out: &mut impl Write, explanation: &Explanation) -> io::Result<()> {
    let path = escape(explanation.path.as_os_str());
    writeln!(
        out,
        "{path}: {}; `read` would take {} of {} from the cache",
        state(explanation),
        human_bytes(explanation.cached_bytes()),
        human_bytes(explanation.size)
    )?;
    for gate in gates(explanation) {
        let mark = match gate.pass {
            Some(true) => "ok",
            Some(false) => "NO",
            None => "-",
        };
        let detail = gate.detail.as_deref().unwrap_or("not come to");
        writeln!(
            out,
            "  {mark:<3} {:<15} {}",
            gate.name,
            escape(detail.as_ref())
        )?;
        if let Some(remedy) = gate.remedy {
            writeln!(out, "      {:<15} -> {remedy}", "")?;
        }
    }
    let mut steps = explanation.steps.iter();
    if let Some(refusal) = &explanation.refusal
        && !steps.any(|step| step.found.as_ref() == Err(refusal))
    {
        writeln!(out, "  NO  {}", escape(refusal.to_string().as_ref()))?;
        writeln!(out, "      -> {}", refusal.reason.remedy())?;
    }
    if explanation.size > 0 {
        let bar = bar(&explanation.ranges, explanation.size);
        writeln!(out, "  [{bar}] # cache, . fuse, + both")?;
    }
    for (span, reason) in explanation.ranges.iter().take(MAX_ROWS) {
        let Span { start, end } = span;
        let size = human_bytes(end - start);
        writeln!(
            out,
            "  {start:>14} to {end:>14} {size:>12}  {}",
            name(*reason)
        )?;
    }
    if let Some(more) = explanation.ranges.len().checked_sub(MAX_ROWS + 1) {
        writeln!(out, "  … {} more; --format json has them all", more + 1)?;
    }
    let changed = if step(explanation, Gate::Prime).is_some() {
        "one byte was read through fuse, so that rclone looks at the clip's version"
    } else if step(explanation, Gate::Handover).is_some() {
        "the server may have read one byte through fuse"
    } else {
        "nothing was read"
    };
    writeln!(out, "  {changed}; nothing was changed")
}

/// The file in columns.
fn bar(ranges: &[(Span, Option<Reason>)], size: u64) -> String {
    let edge = |column: usize| (u128::from(size) * column as u128 / WIDTH as u128) as u64;
    let cell = |column| {
        let start = edge(column);
        // A small file has columns of less than a byte.
        let end = edge(column + 1).max(start + 1);
        let touched = ranges
            .iter()
            .filter(|(s, _)| s.start < end && s.end > start);
        let mut cached = touched.map(|(_, reason)| reason.is_none());
        let first = cached.next().unwrap_or(false);
        match (first, cached.all(|other| other == first)) {
            (true, true) => '#',
            (false, true) => '.',
            (_, false) => '+',
        }
    };
    (0..WIDTH).map(cell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_shows_what_comes_from_where() {
        let range = |start, end, reason| (Span { start, end }, reason);
        let fuse = Some(Reason::Partial);
        assert_eq!(bar(&[range(0, 640, None)], 640), "#".repeat(64));
        assert_eq!(bar(&[range(0, 1, fuse)], 1), ".".repeat(64));
        let halves = [range(0, 325, None), range(325, 640, fuse)];
        let expected = format!("{}+{}", "#".repeat(32), ".".repeat(31));
        assert_eq!(bar(&halves, 640), expected);
        let huge = u64::MAX / 2;
        assert_eq!(bar(&[range(0, huge, None)], huge), "#".repeat(64));
    }
}
