//! Every call of some work, failed in each way, and what came of it.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;
use serde_json::Value;

use crate::expect;
use crate::tracer::{Episode, Fault, Kind};

/// The errors that each call is failed with.
const ERRORS: [Errno; 6] = [
    Errno::EIO,
    Errno::EACCES,
    Errno::ENOENT,
    Errno::ESTALE,
    Errno::EINTR,
    Errno::ENOTCONN,
];
/// Calls of one name are failed one by one up to so many. Of more, three are.
const ONE_BY_ONE: usize = 6;

/// Beside them, what cachestat(2) alone gives: to those who may not ask, and
/// on kernels without it.
const OF_CACHESTAT: [Errno; 2] = [Errno::EPERM, Errno::ENOSYS];

const MOUNT_TABLE: &str = "/proc/self/mountinfo";

/// The faults of all calls of an undisturbed episode for which `wanted` holds:
/// each call alone, and all of one name together.
pub fn faults(calls: &[String], wanted: impl Fn(&str) -> bool) -> Vec<Fault> {
    let mut counts = BTreeMap::<&str, usize>::new();
    for call in calls.iter().filter(|call| wanted(call)) {
        *counts.entry(call).or_default() += 1;
    }
    let mut faults = Vec::new();
    for (site, count) in counts {
        // One line of code, for one process or descriptor after another.
        let looped = site.contains("/proc/PID") || site.contains("/proc/self");
        let picked: BTreeSet<usize> = if count > ONE_BY_ONE || (looped && count > 2) {
            [1, 2, count / 2].into()
        } else {
            (1..=count).collect()
        };
        // All of one name: a disk or daemon that has failed for good. EINTR is
        // never for good, and asks for another try.
        let all = (count > 1).then_some(0);
        for occurrence in picked.into_iter().chain(all) {
            for kind in kinds(site) {
                if occurrence > 0 || kind != Kind::Error(Errno::EINTR) {
                    faults.push(Fault {
                        site: site.into(),
                        occurrence,
                        kind,
                    });
                }
            }
        }
    }
    faults
}

fn kinds(site: &str) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = ERRORS.map(Kind::Error).into();
    if site.contains("/proc/") {
        // These are of file systems with a server.
        kinds.retain(|kind| {
            ![Errno::ESTALE, Errno::ENOTCONN]
                .map(Kind::Error)
                .contains(kind)
        });
    }
    if site.contains(": close of /proc") {
        // Folders in /proc have nothing to fail on when they are closed, and
        // Rust's own ReadDir panics if they do.
        kinds.retain(|kind| *kind == Kind::Error(Errno::EINTR));
    } else if site.contains(": cachestat") {
        kinds.extend(OF_CACHESTAT.map(Kind::Error));
    } else if site.contains(": read of ") || site.contains(": pread of ") {
        kinds.extend([Kind::Nothing, Kind::Short]);
    }
    kinds
}

/// What came of an episode, in a word: `cache`, the reasons for FUSE, or the error.
pub fn outcome(episode: &Episode) -> String {
    let report = &episode.report;
    if let Some(error) = report["open_error"].as_str() {
        return format!("open error: {error}");
    }
    if let Some(error) = report["error"].as_str() {
        return format!("read error: {error}");
    }
    let reasons: Vec<&String> = match &report["by_reason"] {
        Value::Object(reasons) => reasons.keys().collect(),
        _ => Vec::new(),
    };
    if reasons.is_empty() {
        return "cache".into();
    }
    let reasons: Vec<&str> = reasons.into_iter().map(String::as_str).collect();
    reasons.join("+")
}

/// What must hold of every episode, whatever failed.
///
/// # Errors
/// What does not.
fn check(
    command: &str,
    fault: &Fault,
    episode: &Episode,
    plain: &Episode,
    others: usize,
) -> Result<(), String> {
    let report = &episode.report;
    if !report["wrong_at"].is_null() {
        return Err(format!("wrong bytes at {}", report["wrong_at"]));
    }
    if report["open_error"].is_null() {
        let number = |name: &str| report[name].as_u64().unwrap();
        if number("bytes") != number("cache") + number("fuse") {
            return Err("the statistics are not of the bytes read".into());
        }
        if report["error"].is_null() && report["bytes"] != plain.report["bytes"] {
            return Err("not all was read".into());
        }
    }
    // The watched mount table belongs to the process, not to a file: after an
    // error it is closed, and opened again when it is next needed.
    let files = |open: &[String]| -> Vec<String> {
        let files = open.iter().filter(|path| *path != MOUNT_TABLE);
        files.cloned().collect()
    };
    let mut expected = files(&plain.open);
    for _ in 0..others {
        expected.extend(["CLIP", "DATA", "METADATA"].map(String::from));
    }
    expected.sort();
    let tables = episode.open.iter().filter(|path| *path == MOUNT_TABLE);
    if files(&episode.open) != expected || tables.count() > 1 {
        let (now, then) = (episode.open.len(), expected.len());
        return Err(format!("{now} descriptors are left open, not {then}"));
    }
    let usual = outcome(plain);
    let outcome = outcome(episode);
    if !expect::fits(command, fault, &outcome, &usual) {
        return Err(format!("{outcome} does not fit: {report}"));
    }
    Ok(())
}

/// The outcomes of many faults, and what was wrong with them.
#[derive(Default)]
pub struct Verdicts {
    outcomes: BTreeMap<String, usize>,
    wrong: Vec<String>,
    unmet: usize,
}

impl Verdicts {
    /// Judges an episode in which `fault` was asked for, by one of the same
    /// command in which all went well. `others`: so many files are open besides.
    pub fn add(
        &mut self,
        command: &str,
        fault: &Fault,
        episode: &Episode,
        plain: &Episode,
        others: usize,
    ) {
        let result = if episode.failed == 0 {
            // Processes come and go, of which a loop then sees one fewer.
            if fault.site.contains("/proc/") && fault.occurrence > 1 {
                self.unmet += 1;
                return;
            }
            Err("the call was not made this time".to_owned())
        } else {
            check(command, fault, episode, plain, others)
        };
        if let Err(wrong) = result {
            self.wrong.push(format!("{command}: {fault:?}: {wrong}"));
        }
        *self.outcomes.entry(outcome(episode)).or_default() += 1;
    }

    /// Fails if anything was wrong; `at_least` so many faults were tried.
    pub fn conclude(self, what: &str, at_least: usize) {
        println!("{what}: {:?}", self.outcomes);
        let wrong = &self.wrong[..self.wrong.len().min(20)];
        assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
        let tried: usize = self.outcomes.values().sum();
        assert!(tried >= at_least, "{what}: only {tried} faults");
        let unmet = self.unmet;
        assert!(unmet * 20 <= tried, "{what}: {unmet} calls were not made");
    }
}
