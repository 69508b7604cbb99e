//! What the tracker shows of descriptors, beside what the kernel says of them.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Tracking, eventually};

/// Descriptors and their files, in order.
pub type Open = Vec<(u64, PathBuf)>;

/// The descriptors of a process below `mount`, as the kernel tells them.
pub fn truth(pid: u32, mount: &Path) -> Open {
    let mut open: Open = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(Result::unwrap)
        // In the tests' own process, other tests close theirs meanwhile.
        .filter_map(|fd| Some((fd.file_name(), fs::read_link(fd.path()).ok()?)))
        .filter(|(_, path)| path.starts_with(mount))
        .map(|(fd, path)| (fd.to_str().unwrap().parse().unwrap(), path))
        .collect();
    open.sort();
    open
}

/// What `dump-map` has of a process.
pub fn dumped(dump: &Value, pid: u32) -> Open {
    let entries = dump["entries"].as_array().unwrap().iter();
    entries
        .filter(|entry| entry["pid"] == pid)
        .map(|entry| (entry["fd"].as_u64().unwrap(), path(entry)))
        .collect()
}

/// What `run` told of a process: what happened to which descriptor.
pub fn told(lines: &[Value], pid: u32) -> Vec<(&str, u64, PathBuf)> {
    let fields = |l: &'_ Value| (l["fd"].as_u64().unwrap(), path(l));
    lines
        .iter()
        .filter(|line| line["pid"] == pid)
        .map(|line| (line["event"].as_str().unwrap(), fields(line)))
        .map(|(event, (fd, path))| (event, fd, path))
        .collect()
}

/// The exact path of an event or entry; `?` where it got lost.
pub fn path(row: &Value) -> PathBuf {
    let text = row["path"].as_str().unwrap_or("?");
    let Some(hex) = row["path_hex"].as_str() else {
        return text.into();
    };
    let digits = (0..hex.len()).step_by(2);
    let bytes: Vec<u8> = digits
        .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap())
        .collect();
    assert_eq!(text, String::from_utf8_lossy(&bytes));
    OsString::from_vec(bytes).into()
}

/// Ends `run`; all that it told, with a summary of no loss at the end, but for
/// programs that the kernel preempted so that others did not run.
pub fn end(tracking: Tracking) -> Vec<Value> {
    tracking.dump();
    let lines = tracking.end(Signal::SIGTERM);
    let summary = lines.last().expect("a summary");
    assert_eq!(summary["event"], "summary");
    let mut lost = lost(summary);
    lost.retain(|cause| *cause != "recursion_misses");
    assert!(lost.is_empty(), "{summary}");
    assert_eq!(summary["complete"], true);
    lines
}

/// The causes that a dump or summary has losses of.
pub fn lost(document: &Value) -> Vec<&str> {
    let losses = document["losses"].as_object().unwrap();
    assert!(losses.len() > 5, "every cause is named: {losses:?}");
    let counted = losses.iter().filter(|(_, count)| **count != 0);
    counted.map(|(cause, _)| cause.as_str()).collect()
}

/// Halts `run` until it is dropped: programs go on and are tracked without it.
pub struct Halted(Pid);

impl Halted {
    pub fn new(tracking: &Tracking) -> Self {
        let pid = Pid::from_raw(tracking.pid() as i32);
        kill(pid, Signal::SIGSTOP).unwrap();
        eventually("the stop", || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        });
        Self(pid)
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGCONT).unwrap();
    }
}
