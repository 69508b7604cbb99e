//! `run --account`: what reads through FUSE cost, and what the bypass would have
//! saved, estimated from how fast this machine reads a local file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use serde::Serialize;
use vmafx_bypass::mounts::Dev;
use vmafx_bypass::tracker::{Accounts, ReadCost};
use vmafx_bypass::{AlignedBuffer, Reason};

use crate::commands::estimate::{self, Estimator};
use crate::output::{JsonPath, escape, human_bytes, human_ns, shown};

/// Bytes that are read to measure, and by how many at once.
const MEASURED: usize = 16 << 20;
const SMALL: usize = 4 << 10;
const LARGE: usize = 1 << 20;
/// The best of so many counts: others disturb, and never help.
const TRIES: usize = 3;

/// The columns of events.
pub const HEADER: &str = "      READ  IN READS ";

/// These columns of an event.
pub fn columns(read: Option<Cost>) -> String {
    match read {
        Some(cost) => format!(
            "{:>10} {:>9} ",
            human_bytes(cost.read_bytes),
            human_ns(cost.read_ns)
        ),
        None => format!("{:>10} {:>9} ", "-", "-"),
    }
}

/// What reads cost, as JSON has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    pub reads: u64,
    pub read_bytes: u64,
    pub read_ns: u64,
}

impl From<ReadCost> for Cost {
    fn from(cost: ReadCost) -> Self {
        Self {
            reads: cost.reads,
            read_bytes: cost.bytes,
            read_ns: cost.ns,
        }
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.reads += other.reads;
        self.read_bytes += other.read_bytes;
        self.read_ns += other.read_ns;
    }
}

/// What local reads take here: of a file in the page cache, with the look after each
/// that the bypass owes (fstat(2)).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LocalRate {
    /// Nanoseconds for a call, whatever it reads.
    local_call_ns: f64,
    /// Bytes in a second, beside that.
    local_bytes_per_s: f64,
}

impl LocalRate {
    /// Measures it, in some 30 ms; `None`: there is no memory for a file to read.
    pub fn measure() -> Option<Self> {
        Self::try_measure().ok()
    }

    fn try_measure() -> io::Result<Self> {
        let mut file = File::from(memory_file()?);
        let mut block = AlignedBuffer::new(LARGE);
        block.fill(1);
        for _ in 0..MEASURED / LARGE {
            file.write_all(&block)?;
        }
        let mut read = |size: usize| -> io::Result<Duration> {
            let mut best = Duration::MAX;
            for _ in 0..TRIES {
                let started = Instant::now();
                for at in (0..MEASURED).step_by(size) {
                    file.read_exact_at(&mut block[..size], at as u64)?;
                    rustix::fs::fstat(&file)?;
                }
                best = best.min(started.elapsed());
            }
            Ok(best)
        };
        Ok(Self::from_times(read(SMALL)?, read(LARGE)?))
    }

    /// From the times that all bytes took by small blocks, and by large ones.
    fn from_times(small: Duration, large: Duration) -> Self {
        let (small, large) = (small.as_nanos() as f64, large.as_nanos() as f64);
        let more = (MEASURED / SMALL - MEASURED / LARGE) as f64;
        let call = ((small - large) / more).max(0.0);
        let bytes = (large - call * (MEASURED / LARGE) as f64).max(1.0);
        Self {
            local_call_ns: call,
            local_bytes_per_s: MEASURED as f64 / bytes * 1e9,
        }
    }

    /// What the bypass would have saved of a cost, if this share of the clip is
    /// cached, nanoseconds.
    pub fn saved(&self, cost: Cost, share: f64) -> u64 {
        let local = cost.reads as f64 * self.local_call_ns
            + cost.read_bytes as f64 * 1e9 / self.local_bytes_per_s;
        (share * (cost.read_ns as f64 - local)).max(0.0) as u64
    }
}

fn memory_file() -> io::Result<OwnedFd> {
    let name = c"vmafx-local-rate";
    let flags = MemfdFlags::CLOEXEC;
    // Where files in memory must not be executable (vm.memfd_noexec), they must say so,
    // which Linux before 6.3 does not know.
    let made = memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL);
    Ok(made.or_else(|_| memfd_create(name, flags))?)
}

/// A clip that was read, by one process or by all.
#[derive(Debug, Serialize)]
pub struct Clip {
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comm: Option<String>,
    #[serde(flatten)]
    path: JsonPath,
    dev: String,
    ino: u64,
    size: u64,
    cached_bytes: Option<u64>,
    state: &'static str,
    #[serde(flatten)]
    cost: Cost,
    saved_ns: Option<u64>,
    /// Processes that have read it.
    #[serde(skip_serializing_if = "Option::is_none")]
    processes: Option<u64>,
    #[serde(skip)]
    name: Option<PathBuf>,
}

/// A process that has read clips.
#[derive(Debug, Serialize)]
pub struct Process {
    pid: u32,
    comm: String,
    clips: u64,
    #[serde(flatten)]
    cost: Cost,
    saved_ns: Option<u64>,
    #[serde(skip)]
    name: OsString,
}

/// All of it, what took longest first.
#[derive(Debug, Serialize)]
pub struct Report {
    #[serde(flatten)]
    total: Cost,
    /// Null, here and below: the rate could not be measured.
    saved_ns: Option<u64>,
    forgotten: u64,
    #[serde(flatten)]
    rate: Option<LocalRate>,
    clips: Vec<Clip>,
    processes: Vec<Process>,
    /// By clip and process; `dump-map` alone shows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    each: Option<Vec<Clip>>,
}

impl Report {
    /// Estimates each clip once, by rclone's metadata alone; `progress` is called for
    /// each, since there may be many and a disk slow.
    pub fn new(accounts: &Accounts, estimator: &mut Estimator, progress: impl FnMut()) -> Self {
        Self::at_rate(accounts, LocalRate::measure(), estimator, progress)
    }

    fn at_rate(
        accounts: &Accounts,
        rate: Option<LocalRate>,
        estimator: &mut Estimator,
        mut progress: impl FnMut(),
    ) -> Self {
        let nothing = rate.map(|_| 0);
        let mut estimates = HashMap::new();
        // A device number may be another mount's by now: then paths differ.
        let mut clips: BTreeMap<(Dev, u64, Option<&Path>), Clip> = BTreeMap::new();
        let mut processes: BTreeMap<u32, Process> = BTreeMap::new();
        let mut each = Vec::new();
        let mut seen = HashSet::new();
        for account in &accounts.each {
            let path = account.path.as_deref();
            let key = (account.dev, account.ino, path);
            let (cached_bytes, reason) = *estimates.entry(key).or_insert_with(|| {
                progress();
                let estimate = estimator.estimate(account.dev, path, account.size);
                (estimate.cached_bytes, estimate.state)
            });
            let cost = Cost::from(account.cost);
            let share = share(cached_bytes, account.size, reason);
            let saved_ns = rate.map(|rate| rate.saved(cost, share));
            let clip = || Clip {
                pid: None,
                comm: None,
                path: JsonPath::new(path),
                dev: account.dev.to_string(),
                ino: account.ino,
                size: account.size,
                cached_bytes,
                state: estimate::word(reason),
                cost: Cost::default(),
                saved_ns: nothing,
                processes: None,
                name: account.path.clone(),
            };
            let comm = || account.comm.to_string_lossy().into_owned();
            // After a remount a clip may have two accounts of a process.
            let is_new = seen.insert((account.pid, key));
            let whole = clips.entry(key).or_insert_with(clip);
            whole.cost += cost;
            whole.saved_ns = sum(whole.saved_ns, saved_ns);
            whole.processes = Some(whole.processes.unwrap_or(0) + u64::from(is_new));
            let process = processes.entry(account.pid).or_insert_with(|| Process {
                pid: account.pid,
                comm: comm(),
                clips: 0,
                cost: Cost::default(),
                saved_ns: nothing,
                name: account.comm.clone(),
            });
            process.cost += cost;
            process.saved_ns = sum(process.saved_ns, saved_ns);
            process.clips += u64::from(is_new);
            each.push(Clip {
                pid: Some(account.pid),
                comm: Some(comm()),
                cost,
                saved_ns,
                ..clip()
            });
        }
        let mut clips: Vec<_> = clips.into_values().collect();
        clips.sort_by_key(|clip| std::cmp::Reverse(clip.cost.read_ns));
        let mut processes: Vec<_> = processes.into_values().collect();
        processes.sort_by_key(|process| std::cmp::Reverse(process.cost.read_ns));
        Self {
            total: accounts.total.into(),
            saved_ns: each.iter().map(|clip| clip.saved_ns).fold(nothing, sum),
            forgotten: accounts.forgotten,
            rate,
            clips,
            processes,
            each: Some(each),
        }
    }

    /// Without all but the first so many clips and processes, for a summary.
    pub fn largest(mut self, count: usize) -> Self {
        self.clips.truncate(count);
        self.processes.truncate(count);
        self.each = None;
        self
    }

    /// The same for people, a line each.
    pub fn text(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "account: {} reads of {} took {} through FUSE; the bypass would have saved {}",
            self.total.reads,
            human_bytes(self.total.read_bytes),
            human_ns(self.total.read_ns),
            self.saved_ns.map_or_else(
                || "some of it (not measured: no memory)".into(),
                |ns| format!("about {}", human_ns(ns))
            ),
        )];
        if self.forgotten > 0 {
            lines.push(format!(
                "  {} accounts made room for newer ones, and are in the total alone",
                self.forgotten
            ));
        }
        for clip in &self.clips {
            lines.push(format!(
                "  {:>9} {:>10} {:<14} {}",
                human_ns(clip.cost.read_ns),
                human_bytes(clip.cost.read_bytes),
                clip.state,
                shown(clip.name.as_deref()),
            ));
        }
        for process in &self.processes {
            lines.push(format!(
                "  {:>9} {:>10} pid {} ({}), {} clips",
                human_ns(process.cost.read_ns),
                human_bytes(process.cost.read_bytes),
                process.pid,
                escape(&process.name),
                process.clips,
            ));
        }
        lines
    }
}

fn sum(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    Some(one? + other?)
}

/// How much of a clip the bypass would read from the cache, 0 to 1.
pub fn share(cached_bytes: Option<u64>, size: u64, reason: Option<Reason>) -> f64 {
    match (cached_bytes, reason) {
        (Some(cached), None | Some(Reason::Partial)) if size > 0 => {
            (cached as f64 / size as f64).min(1.0)
        }
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: LocalRate = LocalRate {
        local_call_ns: 1_000.0,
        local_bytes_per_s: 1e9,
    };

    #[test]
    fn what_is_saved_is_what_local_reads_would_not_have_taken() {
        let cost = Cost {
            reads: 10,
            read_bytes: 1_000_000,
            read_ns: 5_000_000,
        };
        // 10 calls and 1 MB: 1.01 ms.
        assert_eq!(RATE.saved(cost, 1.0), 3_990_000);
        assert_eq!(RATE.saved(cost, 0.5), 1_995_000);
        assert_eq!(RATE.saved(cost, 0.0), 0);
        let fast = Cost {
            read_ns: 1_000,
            ..cost
        };
        assert_eq!(RATE.saved(fast, 1.0), 0, "the page cache was as fast");
    }

    #[test]
    fn only_what_would_be_bypassed_counts() {
        assert!((share(Some(50), 100, Some(Reason::Partial)) - 0.5).abs() < 1e-9);
        assert!((share(Some(100), 100, None) - 1.0).abs() < 1e-9);
        for (cached, size, reason) in [
            (None, 100, None),
            (Some(100), 100, Some(Reason::Unsupported)),
            (Some(0), 0, None),
        ] {
            assert!(share(cached, size, reason) < 1e-9);
        }
    }

    #[test]
    fn a_rate_has_a_part_for_calls_and_one_for_bytes() {
        let calls = |size: usize| (MEASURED / size) as u64;
        // 500 ns a call, and a byte in a quarter of one.
        let time = |size| Duration::from_nanos(500 * calls(size) + MEASURED as u64 / 4);
        let rate = LocalRate::from_times(time(SMALL), time(LARGE));
        assert!((rate.local_call_ns - 500.0).abs() < 1.0, "{rate:?}");
        assert!((rate.local_bytes_per_s - 4e9).abs() < 4e6, "{rate:?}");
    }

    #[test]
    fn clips_and_processes_are_summed_up() {
        use vmafx_bypass::tracker::Account;
        let account = |pid, ino, ns| Account {
            pid,
            comm: "ffmpeg".into(),
            dev: Dev(1),
            mount: 1,
            ino,
            path: None,
            size: 100,
            cost: ReadCost {
                reads: 1,
                bytes: 10,
                ns,
            },
        };
        let accounts = Accounts {
            total: ReadCost {
                reads: 9,
                bytes: 90,
                ns: 900,
            },
            each: vec![
                account(1, 7, 5),
                account(2, 7, 2),
                account(2, 8, 1),
                // After a remount.
                Account {
                    mount: 2,
                    ..account(2, 7, 1)
                },
            ],
            forgotten: 6,
        };
        let mut estimated = 0;
        let progress = || estimated += 1;
        let report = Report::at_rate(&accounts, Some(RATE), &mut Estimator::default(), progress);
        assert_eq!(estimated, 2, "each clip once");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["reads"], &json["read_ns"]), (&9.into(), &900.into()));
        assert_eq!(json["clips"][0]["ino"], 7);
        assert_eq!(json["clips"][0]["processes"], 2);
        assert_eq!(json["clips"][0]["read_ns"], 8);
        assert_eq!(json["processes"][0]["pid"], 1);
        assert_eq!(json["processes"][1]["clips"], 2);
        assert_eq!(json["each"].as_array().unwrap().len(), 4);
        let text = report.largest(1).text();
        assert_eq!(text.len(), 4, "{text:?}");
        let report = Report::at_rate(&accounts, None, &mut Estimator::default(), || ());
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            (&json["saved_ns"], json.get("local_call_ns")),
            (&serde_json::Value::Null, None)
        );
    }
}
