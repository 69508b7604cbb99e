//! For the tests of `mount`: re-exports in the foreground, and programs on both
//! mounts.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::{eventually, need_root, program};

/// The kernel reads clips by itself; on the file systems of tests, from copies.
pub const PASSED: &[&str] = &["--snapshot=copy"];
/// All is read by ranges.
pub const RANGES: &[&str] = &["--passthrough=never"];

/// A `mount --foreground --format json`; unmounted and gone when dropped.
pub struct Reexport {
    child: Child,
    lines: BufReader<ChildStdout>,
    folder: TempDir,
    /// What was told when it was mounted.
    pub mounted: Value,
}

/// The command that mounts in the foreground.
pub fn mount(source: &Path, point: &Path, args: &[&str]) -> Command {
    let mut command = program();
    command
        .args(["mount", "--foreground", "--format=json"])
        .args(args)
        .args([source, point])
        .stdin(Stdio::null());
    command
}

impl Reexport {
    pub fn start(source: &Path, args: &[&str]) -> Self {
        Self::start_by(source, args, |_| ())
    }

    /// As [`start`](Self::start), with a change of the command.
    pub fn start_by(source: &Path, args: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        need_root();
        let folder = tempfile::Builder::new().prefix("vmafx-mount-").tempdir();
        let folder = folder.unwrap();
        fs::create_dir(folder.path().join("m")).unwrap();
        let mut command = mount(source, &folder.path().join("m"), args);
        change(&mut command);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut next = || -> Value {
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            serde_json::from_str(&line).expect("it must mount")
        };
        assert_eq!(next(), serde_json::json!({"schema": 1, "stream": "mount"}));
        let mounted = next();
        assert_eq!(mounted["event"], "mounted", "{mounted}");
        Self {
            child,
            lines,
            folder,
            mounted,
        }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("m")
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has counted so far.
    pub fn stats(&self) -> Value {
        let mut value = vec![0; 64 << 10];
        let name = "user.vmafx_bypass.stats";
        let length = rustix::fs::getxattr(self.path(), name, &mut value[..]).unwrap();
        serde_json::from_slice(&value[..length]).unwrap()
    }

    /// Opens of a way: `copy`, `ranges`…
    pub fn opens(&self, way: &str) -> u64 {
        self.stats()["opens"][way].as_u64().unwrap_or(0)
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    /// Ends it by a signal; what it has counted.
    pub fn end(mut self) -> Value {
        self.signal(Signal::SIGTERM);
        let (status, summary) = self.wait();
        assert_eq!(status.code(), Some(0), "a signal ends `mount` with 0");
        assert!(!self.is_mounted());
        summary
    }

    /// Waits for its end; its status, and what it has counted.
    pub fn wait(&mut self) -> (ExitStatus, Value) {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        let summary = serde_json::from_str(&line).unwrap_or_default();
        (self.child.wait().unwrap(), summary)
    }

    /// Kills it; what it had mounted stays, and is dead.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn is_mounted(&self) -> bool {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.contains(&format!(" {} ", self.path().display()))
    }

    /// Its open descriptors.
    pub fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.pid());
        fs::read_dir(folder).unwrap().count()
    }

    /// Its resident memory, bytes.
    pub fn resident(&self) -> usize {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
        kib.parse::<usize>().unwrap() << 10
    }
}

impl Drop for Reexport {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut unmount = Command::new("umount");
        unmount.arg("-lq").arg(self.path()).stderr(Stdio::null());
        let _ = unmount.status();
    }
}

/// Runs a shell's script in a folder.
pub fn shell(folder: &Path, script: &str) -> Output {
    let mut bash = Command::new("bash");
    bash.args(["-c", script]).current_dir(folder);
    bash.stdin(Stdio::null()).output().unwrap()
}

/// Runs a script on the rclone mount and on its re-export, and compares output and
/// exit codes; the folder's own path stands for `{}` in both.
pub fn both(source: &Path, shown: &Path, script: &str) -> String {
    let run = |folder: &Path| {
        let path = folder.to_str().unwrap();
        let output = shell(folder, script);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(path, "{}");
        (
            text(&output.stdout),
            text(&output.stderr),
            output.status.code(),
        )
    };
    let (expected, found) = (run(source), run(shown));
    assert_eq!(found.0, expected.0, "{script}\n{}", found.1);
    assert_eq!(found.1, expected.1, "{script}");
    assert_eq!(found.2, expected.2, "{script}");
    found.0
}

/// Starts a shell's script in a folder, waits until it says `ready`.
pub fn background(folder: &Path, script: &str) -> Waiting {
    let mut bash = Command::new("bash");
    bash.args(["-c", script]).current_dir(folder);
    let mut child = bash
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line.trim_end(), "ready", "{script}");
    Waiting { child, lines }
}

/// A script that waits for a line on its standard input.
pub struct Waiting {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Waiting {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets it go on; what it then prints, its errors, and its exit code.
    pub fn go_on(mut self) -> (String, String, Option<i32>) {
        use std::io::{Read, Write};
        // It may have ended.
        let _ = self.child.stdin.take().unwrap().write_all(b"\n");
        let (mut text, mut errors) = (String::new(), String::new());
        self.lines.read_to_string(&mut text).unwrap();
        let mut pipe = self.child.stderr.take().unwrap();
        pipe.read_to_string(&mut errors).unwrap();
        (text, errors, self.child.wait().unwrap().code())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a path shows a size.
pub fn until_size(path: &Path, size: usize) {
    eventually("the clip's new size", || {
        fs::metadata(path).is_ok_and(|m| m.len() == size as u64)
    });
}
