//! `top` without a terminal: tables, or lines of JSON, one after the other.

use std::io::{self, Write};
use std::time::SystemTime;

use serde::Serialize;
use vmafx_bypass::tracker::DumpError;

use super::columns::{Row, padded};
use super::list::List;
use super::look::Look;
use super::model::{Clip, Process, Usage};
use super::words;
use crate::cli::{Format, TopView};
use crate::output::{self, JsonPath, SCHEMA, losses_json, write_json};

/// Prints what was seen.
pub struct Lines<W: Write> {
    out: W,
    format: Format,
    view: TopView,
    /// The last look that there was something.
    last: Look,
    gone: bool,
}

impl<W: Write> Lines<W> {
    /// Prints the first look.
    pub fn begin(out: W, format: Format, view: TopView, first: Look) -> io::Result<Self> {
        let mut lines = Self {
            out,
            format,
            view,
            last: first,
            gone: false,
        };
        if format == Format::Json {
            let head = serde_json::json!({"schema": SCHEMA, "stream": "top"});
            write_json(&mut lines.out, &head)?;
        }
        lines.look()?;
        Ok(lines)
    }

    /// Prints a look, or once that there is nothing to see any more. Whether it
    /// was a look.
    pub fn print(&mut self, look: Result<Look, DumpError>) -> io::Result<bool> {
        match look {
            Ok(look) => {
                self.last = look;
                self.gone = false;
                self.look()?;
                return Ok(true);
            }
            Err(_) if self.gone => {}
            Err(gone) => {
                self.gone = true;
                match self.format {
                    Format::Json => {
                        let ts = output::time(SystemTime::now());
                        let line = serde_json::json!({
                            "event": "gone", "ts": ts, "reason": gone.to_string(),
                        });
                        write_json(&mut self.out, &line)?;
                    }
                    Format::Text => {
                        writeln!(self.out, "{}", words::owner(&self.last, Some(&gone)).0)?;
                    }
                }
                self.out.flush()?;
            }
        }
        Ok(false)
    }

    fn look(&mut self) -> io::Result<()> {
        match self.format {
            Format::Json => write_json(&mut self.out, &JsonLook::of(&self.last))?,
            Format::Text => self.table()?,
        }
        self.out.flush()
    }

    fn table(&mut self) -> io::Result<()> {
        let look = &self.last;
        let at = humantime::format_rfc3339_millis(look.at);
        let picture = &look.picture;
        let amount = words::amount(look, picture.clips.len(), picture.processes.len());
        writeln!(self.out, "{at} {}", words::owner(look, None).0)?;
        writeln!(self.out, "{amount}")?;
        writeln!(self.out, "{}", words::reads(picture))?;
        let (clips, processes) = (picture.clips.clone(), picture.processes.clone());
        match self.view {
            TopView::Clips => self.rows(clips)?,
            TopView::Processes => self.rows(processes)?,
        }
        writeln!(self.out)
    }

    fn rows<R: Row>(&mut self, rows: Vec<R>) -> io::Result<()> {
        let line = |text: &dyn Fn(usize) -> String| {
            let cells = R::COLUMNS.iter().enumerate();
            let cells: Vec<String> = cells
                .map(|(index, column)| padded(&text(index), column.width, column.right))
                .collect();
            cells.join(" ")
        };
        let names = line(&|index| R::COLUMNS[index].name.to_owned());
        writeln!(self.out, "{names}")?;
        for row in List::of(rows).shown() {
            writeln!(self.out, "{}", line(&|index| (R::COLUMNS[index].text)(row)))?;
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct JsonLook {
    event: &'static str,
    ts: String,
    owner: JsonOwner,
    complete: bool,
    losses: serde_json::Map<String, serde_json::Value>,
    descriptors: usize,
    account: Option<JsonUsage>,
    clips: Vec<JsonClip>,
    processes: Vec<JsonProcess>,
}

#[derive(Serialize)]
struct JsonOwner {
    pid: u32,
    alive: bool,
    since: String,
}

/// In all since `run` counts, and a second since the last look.
#[derive(Serialize)]
struct JsonUsage {
    reads: u64,
    read_bytes: u64,
    read_ns: u64,
    reads_per_s: Option<f64>,
    read_bytes_per_s: Option<f64>,
    read_ns_per_s: Option<f64>,
}

#[derive(Serialize)]
struct JsonClip {
    #[serde(flatten)]
    path: JsonPath,
    dev: String,
    ino: u64,
    size: Option<u64>,
    cached_bytes: Option<u64>,
    /// Null: not estimated yet.
    state: Option<&'static str>,
    descriptors: u32,
    pids: Vec<u32>,
    account: Option<JsonUsage>,
}

#[derive(Serialize)]
struct JsonProcess {
    pid: u32,
    comm: String,
    descriptors: u32,
    clips: u32,
    account: Option<JsonUsage>,
}

impl JsonLook {
    fn of(look: &Look) -> Self {
        let picture = &look.picture;
        Self {
            event: "look",
            ts: output::time(look.at),
            owner: JsonOwner {
                pid: look.owner.pid,
                alive: look.owner.alive,
                since: output::time(look.owner.since),
            },
            complete: look.complete,
            losses: losses_json(&look.losses),
            descriptors: picture.fds,
            account: picture.usage.map(JsonUsage::of),
            clips: picture.clips.iter().map(JsonClip::of).collect(),
            processes: picture.processes.iter().map(JsonProcess::of).collect(),
        }
    }
}

impl JsonUsage {
    fn of(usage: Usage) -> Self {
        Self {
            reads: usage.total.reads,
            read_bytes: usage.total.bytes,
            read_ns: usage.total.ns,
            reads_per_s: usage.rate.map(|r| r.reads),
            read_bytes_per_s: usage.rate.map(|r| r.bytes),
            read_ns_per_s: usage.rate.map(|r| r.ns),
        }
    }
}

impl JsonClip {
    fn of(clip: &Clip) -> Self {
        let facts = &clip.facts;
        Self {
            path: JsonPath::new(facts.path.as_deref()),
            dev: clip.id.dev.to_string(),
            ino: clip.id.ino,
            size: facts.size,
            cached_bytes: facts.cached,
            state: (!facts.state.is_empty()).then_some(facts.state),
            descriptors: clip.fds,
            pids: clip.pids.clone(),
            account: clip.usage.map(JsonUsage::of),
        }
    }
}

impl JsonProcess {
    fn of(process: &Process) -> Self {
        Self {
            pid: process.pid,
            comm: process.comm.clone(),
            descriptors: process.fds,
            clips: process.clips,
            account: process.usage.map(JsonUsage::of),
        }
    }
}
