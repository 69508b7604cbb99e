//! What the tests share: rclone mounts, the program, and clips that can be judged.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

pub mod alike;

pub mod bindfs;

pub mod clips;

pub mod exec;

pub mod fds;

pub mod handover;

pub mod metrics;

pub mod reexport;

pub mod snapshots;

pub mod xfs;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmafx_bypass::rig::{Rig, RigOptions};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The same, or TEST_PATIENCE, seconds, where all is slow: `make test-vm`.
pub fn patience() -> Duration {
    let set = std::env::var("TEST_PATIENCE");
    set.map_or(PATIENCE, |text| Duration::from_secs(text.parse().unwrap()))
}

/// Fails where the test does not run as root: it must not pass by skipping.
pub fn need_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root: run `make test`, or `make test-unit` for what does not"
    );
}

/// The rclone programs to test with: PATH's, and a newer one if RCLONE_NEW
/// names it, which `make test` always does.
pub fn rclones() -> Vec<PathBuf> {
    let mut programs = vec![PathBuf::from("rclone")];
    programs.extend(std::env::var_os("RCLONE_NEW").map(PathBuf::from));
    programs
}

pub fn rig_of(rclone: &Path, fill: impl FnOnce(&Path)) -> Rig {
    rig_with(
        RigOptions {
            rclone: rclone.into(),
            ..RigOptions::default()
        },
        fill,
    )
}

/// A read-only mount of what `fill` puts into the served folder.
pub fn rig(fill: impl FnOnce(&Path)) -> Rig {
    rig_of(Path::new("rclone"), fill)
}

pub fn rig_with(options: RigOptions, fill: impl FnOnce(&Path)) -> Rig {
    need_root();
    Rig::start(options, |source| {
        fill(source);
        Ok(())
    })
    .expect("rclone must serve and mount")
}

/// Bytes that tell where they are from: each 16 hold the seed and the offset.
pub fn content(seed: u32, size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size + 16);
    while bytes.len() < size {
        let line = format!("{seed:04x}{:011x}\n", bytes.len());
        bytes.extend_from_slice(line.as_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// Puts a clip into the served folder.
pub fn put(source: &Path, name: &str, bytes: &[u8]) {
    let path = source.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The built program.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmafx-bypass"));
    command.env_remove("VMAFX_EBPF_BYPASS");
    command
}

/// Runs the program to its end.
pub fn run(args: &[&str]) -> Output {
    program().args(args).stdin(Stdio::null()).output().unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Asserts the exit code, and that standard error is one line that holds `message`.
pub fn assert_fails(output: &Output, code: i32, message: &str) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.contains(message), "{message:?} is not in {text:?}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text:?}");
}

/// Waits until `is_so`; fails with `what` after a while.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience();
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reads a file's range through FUSE.
pub fn fuse_range(path: &Path, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let file = fs::File::open(path).unwrap();
    let mut done = 0;
    while done < length {
        match file
            .read_at(&mut bytes[done..], offset + done as u64)
            .unwrap()
        {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    bytes
}

/// Only one `run` at a time and tracker tests in a row: their counters must
/// not see each other's work.
static TRACKING: Mutex<()> = Mutex::new(());

/// A `run --format json` in the background, its pins apart from all others.
pub struct Tracking {
    child: Child,
    lines: BufReader<ChildStdout>,
    pub pin_dir: PathBuf,
    _alone: std::sync::MutexGuard<'static, ()>,
}

impl Tracking {
    /// Starts it on a prefix and waits until it is attached.
    pub fn start(prefix: &Path, args: &[&str]) -> Self {
        Self::start_by(prefix, args, |command| command)
    }

    /// As [`start`](Self::start), with a change of the command, or by another.
    pub fn start_by(prefix: &Path, args: &[&str], change: impl FnOnce(Command) -> Command) -> Self {
        need_root();
        let alone = TRACKING
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let pin_dir = PathBuf::from(format!("/sys/fs/bpf/vmafx-test-{}", std::process::id()));
        let mut command = program();
        command
            .env("VMAFX_EBPF_BYPASS", "1")
            .args(["run", "--format", "json", "--prefix"])
            .arg(prefix)
            .arg("--pin-dir")
            .arg(&pin_dir)
            .args(args);
        if let Some(mode) = std::env::var_os("TEST_ATTACH") {
            command.arg("--attach").arg(mode);
        }
        let mut child = change(command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut tracking = Self {
            child,
            lines,
            pin_dir,
            _alone: alone,
        };
        let first = tracking.next().expect("run must start");
        assert_eq!(first, serde_json::json!({"schema": 1, "stream": "events"}));
        tracking
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line; `None` at the end.
    pub fn next(&mut self) -> Option<Value> {
        let line = self.next_line()?;
        Some(serde_json::from_str(&line).expect("a line of JSON"))
    }

    /// The next line as it is; `None` at the end.
    pub fn next_line(&mut self) -> Option<String> {
        let mut line = String::new();
        (self.lines.read_line(&mut line).unwrap() > 0).then_some(line)
    }

    /// Skips lines up to one for which `wanted` holds.
    pub fn next_where(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let line = self.next().expect("an event before the end");
            if wanted(&line) {
                return line;
            }
        }
    }

    /// What `dump-map --format json` says now. On a kernel that preempts BPF
    /// programs some do not run, by no fault of a test: then once that is healed.
    pub fn dump(&self) -> Value {
        let mut dump = self.dump_now();
        let missed = |dump: &Value| dump["losses"]["recursion_misses"] != 0;
        let deadline = Instant::now() + patience();
        while missed(&dump) && dump["complete"] == false && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(100));
            dump = self.dump_now();
        }
        dump
    }

    fn dump_now(&self) -> Value {
        let output = program()
            .args(["dump-map", "--format", "json", "--pin-dir"])
            .arg(&self.pin_dir)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).expect("one JSON document")
    }

    /// Kills it; it leaves its pins.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it by a signal; the lines left, the summary last.
    pub fn end(mut self, signal: nix::sys::signal::Signal) -> Vec<Value> {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
        let mut lines = Vec::new();
        while let Some(line) = self.next() {
            lines.push(line);
        }
        let status = self.child.wait().unwrap();
        assert_eq!(status.code(), Some(0), "a signal ends `run` with 0");
        assert!(!self.pin_dir.exists(), "pins are removed");
        lines
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        // Ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.pin_dir);
    }
}

/// A Python program that does something with files and then waits for a line
/// on its standard input: a worker as the tracker sees it.
pub struct Worker {
    child: Child,
    output: BufReader<ChildStdout>,
    first: String,
}

impl Worker {
    /// Runs `script`; in it `step()` reports and waits for the next
    /// [`proceed`](Self::proceed).
    pub fn start(folder: &Path, script: &str, args: &[&str]) -> Self {
        Self::start_by(&["python3"], folder, script, args)
    }

    /// The same, by another command that runs Python: `unshare … python3`.
    pub fn start_by(command: &[&str], folder: &Path, script: &str, args: &[&str]) -> Self {
        let mut worker = Self::spawn(command, folder, script, args);
        worker.first = worker.read();
        if worker.first == "ready" {
            worker.first.clear();
        }
        worker
    }

    /// The line that the script printed before its first [`step`].
    pub fn line(&self) -> &str {
        &self.first
    }

    fn spawn(command: &[&str], folder: &Path, script: &str, args: &[&str]) -> Self {
        let prelude = "import os,sys,threading,time\n\
                       def step():\n print('ready',flush=True); sys.stdin.readline()\n";
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .arg("-c")
            .arg(format!("{prelude}{script}\nstep()\n"))
            .args(args)
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            output,
            first: String::new(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn read(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn wake(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    /// Lets it go on to its next step.
    pub fn proceed(&mut self) {
        self.wake();
        assert_eq!(self.read(), "ready");
    }

    /// Kills it.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Lets it end.
    pub fn end(mut self) {
        self.wake();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
