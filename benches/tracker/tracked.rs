//! `run` as a child, and what the kernel says of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libbpf_rs::ProgramType;
use libbpf_rs::query::{MapInfoIter, ProgInfoIter};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde::Serialize;
use serde_json::Value;

use crate::Outcome;

const PATIENCE: Duration = Duration::from_secs(20);
/// How long others may trace before this gives up.
const OTHERS_PATIENCE: Duration = Duration::from_secs(180);
const INTERVAL: Duration = Duration::from_millis(2);

/// An attach mode, and why it does not work here, if so.
#[derive(Debug, Clone, Serialize)]
pub struct Mode {
    pub name: String,
    pub not_here: Option<String>,
}

/// What `run` prints while it is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// Every event, as JSON.
    Json,
    /// Nothing but the summary.
    None,
}

/// The program, and where it works.
pub struct Program {
    file: PathBuf,
    prefix: PathBuf,
    pin_dir: PathBuf,
    /// Where its output goes.
    folder: PathBuf,
}

impl Program {
    pub fn new(file: &Path, prefix: &Path, folder: &Path) -> Self {
        Self {
            file: file.to_path_buf(),
            prefix: prefix.to_path_buf(),
            pin_dir: format!("/sys/fs/bpf/vmafx-bench-{}", std::process::id()).into(),
            folder: folder.to_path_buf(),
        }
    }

    /// Tries each mode once.
    pub fn modes(&self, names: &[String]) -> Outcome<Vec<Mode>> {
        let mut modes = Vec::new();
        for name in names {
            wait_for_silence()?;
            let not_here = match self.start(name, Rows::None, &[])? {
                Ok(tracked) => {
                    tracked.stop()?;
                    None
                }
                Err(message) => Some(message),
            };
            modes.push(Mode {
                name: name.clone(),
                not_here,
            });
        }
        Ok(modes)
    }

    /// Starts `run` and waits until it has attached; the inner error where the
    /// mode does not work here.
    pub fn start(
        &self,
        attach: &str,
        rows: Rows,
        arguments: &[&str],
    ) -> Outcome<Result<Tracked, String>> {
        let (output, errors) = (self.folder.join("output"), self.folder.join("errors"));
        let mut command = Command::new(&self.file);
        let (attach, account) = match attach.strip_suffix("+account") {
            Some(attach) => (attach, &["--account"][..]),
            None => (attach, &[][..]),
        };
        command
            .args(["run", "--enable", "--attach", attach, "--prefix"])
            .arg(&self.prefix)
            .arg("--pin-dir")
            .arg(&self.pin_dir)
            .args(match rows {
                Rows::Json => &["--format=json"][..],
                Rows::None => &["-q"],
            })
            .args(account)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(File::create(&errors)?);
        let mut child = command
            .spawn()
            .map_err(|e| format!("`{}`: {e}", self.file.display()))?;
        // The last pin is made once all is attached.
        let pinned = self.pin_dir.join("meta");
        let deadline = Instant::now() + PATIENCE;
        let ended = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if pinned.exists() {
                break None;
            }
            if Instant::now() >= deadline {
                child.kill()?;
                child.wait()?;
                return Err(format!("`run --attach {attach}` did not start").into());
            }
            sleep(INTERVAL);
        };
        let Some(status) = ended else {
            return Ok(Ok(Tracked {
                child,
                pin_dir: self.pin_dir.clone(),
                program: self.file.clone(),
                output,
                errors,
                rows,
            }));
        };
        let said = fs::read_to_string(&errors)?;
        let said = said.lines().next().unwrap_or_default().to_owned();
        match status.code() {
            // 3: the host cannot; 2: this build does not know the mode.
            Some(2 | 3) => Ok(Err(said)),
            _ => Err(format!("`run --attach {attach}`: {status}: {said}").into()),
        }
    }
}

/// A running `run`; killed where it is dropped without [`stop`](Self::stop).
pub struct Tracked {
    child: Child,
    pin_dir: PathBuf,
    program: PathBuf,
    output: PathBuf,
    errors: PathBuf,
    rows: Rows,
}

impl Tracked {
    /// User and system time used so far.
    pub fn cpu(&self) -> Outcome<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name, in brackets, may hold anything; utime is field 14.
        let after = stat.rsplit(')').next().unwrap_or_default();
        let ticks = after.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|t| t.parse::<u64>().unwrap_or(0)).sum();
        let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100) as f64;
        Ok(Duration::from_secs_f64(ticks as f64 / per_second))
    }

    /// A field of /proc/PID/status, bytes.
    pub fn status(&self, field: &str) -> Outcome<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|l| l.strip_prefix(field));
        let kib = line.and_then(|l| l.trim_start_matches(':').split_whitespace().next());
        Ok(kib.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) << 10)
    }

    /// The kernel's memory of each of its maps, bytes, by name.
    pub fn maps(&self) -> Outcome<BTreeMap<String, u64>> {
        let names: BTreeMap<u32, String> = MapInfoIter::default()
            .map(|map| (map.id, map.name.to_string_lossy().into_owned()))
            .collect();
        let mut maps = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{}/fdinfo", self.child.id()))? {
            // It may have closed it meanwhile.
            let Ok(text) = fs::read_to_string(entry?.path()) else {
                continue;
            };
            let field = |name: &str| -> Option<u64> {
                let line = text.lines().find_map(|l| l.strip_prefix(name))?;
                line.trim_start_matches(':').trim().parse().ok()
            };
            if let (Some(id), Some(bytes)) = (field("map_id"), field("memlock")) {
                let name = names.get(&(id as u32)).cloned();
                maps.insert(name.unwrap_or_else(|| format!("map {id}")), bytes);
            }
        }
        Ok(maps)
    }

    /// `dump-map` as it is now.
    pub fn dump(&self, format: &str) -> Outcome<Output> {
        let output = Command::new(&self.program)
            .args(["dump-map", "--format", format, "--pin-dir"])
            .arg(&self.pin_dir)
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("dump-map: {}", said.trim()).into());
        }
        Ok(output)
    }

    pub fn dump_json(&self) -> Outcome<Value> {
        Ok(serde_json::from_slice(&self.dump("json")?.stdout)?)
    }

    /// Ends it; where it prints rows, its summary.
    pub fn stop(mut self) -> Outcome<Value> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)?;
        let status = self.child.wait()?;
        if !status.success() {
            let said = fs::read_to_string(&self.errors)?;
            return Err(format!("`run` ended with {status}: {}", said.trim()).into());
        }
        if self.rows == Rows::None {
            return Ok(Value::Null);
        }
        let text = fs::read_to_string(&self.output)?;
        let last = text.lines().last().unwrap_or_default();
        Ok(serde_json::from_str(last)?)
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        // After `stop` there is nothing left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.pin_dir);
    }
}

/// Everything that a document counts as lost, by cause; empty: nothing.
pub fn lost(document: &Value) -> BTreeMap<String, u64> {
    let losses = document["losses"].as_object().into_iter().flatten();
    let counts = losses.map(|(cause, count)| (cause.clone(), count.as_u64().unwrap_or(0)));
    counts.filter(|(_, count)| *count > 0).collect()
}

/// The BPF programs on this host that may run in a system call of anyone.
pub fn tracing_programs() -> BTreeSet<u32> {
    let traces = [
        ProgramType::Kprobe,
        ProgramType::Tracepoint,
        ProgramType::PerfEvent,
        ProgramType::RawTracepoint,
        ProgramType::RawTracepointWritable,
        ProgramType::Tracing,
        ProgramType::Lsm,
    ];
    let of = ProgInfoIter::default().filter(|program| traces.contains(&program.ty));
    of.map(|program| program.id).collect()
}

/// Waits until no BPF program traces anything: neither a `run` that has just
/// ended, which the kernel frees a little later, nor others'.
pub fn wait_for_silence() -> Outcome<()> {
    let deadline = Instant::now() + OTHERS_PATIENCE;
    while !tracing_programs().is_empty() {
        if Instant::now() >= deadline {
            let ids = tracing_programs();
            let message = format!("BPF programs {ids:?} of others trace this host: end them");
            return Err(io::Error::other(message).into());
        }
        sleep(INTERVAL);
    }
    Ok(())
}
