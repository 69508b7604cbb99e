//! For the tests of `exec`: a mount with cached clips, and runs under it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use vmafx_bypass::rig::Rig;

use super::clips::options;
use super::{content, program, put, rclones, rig_with, stderr};

/// Clips of every rig here: all cached whole but the last.
pub const WHOLE: [(&str, usize); 3] =
    [("clip", 3_000_001), ("sub/deep/other", 70_000), ("b", 4096)];
pub const PARTIAL: &str = "partial";

/// What a clip holds.
pub fn bytes_of(name: &str) -> Vec<u8> {
    if name == PARTIAL {
        return content(9, 8 << 20);
    }
    let index = WHOLE.iter().position(|(n, _)| *n == name).unwrap();
    content(index as u32 + 1, WHOLE[index].1)
}

/// A read-only mount of an rclone with these clips.
pub fn mounted(rclone: &Path) -> Rig {
    let arguments = ["--buffer-size=0", "--vfs-read-chunk-size=128k"];
    let rig = rig_with(options(rclone, &arguments), |source| {
        for (name, _) in WHOLE {
            put(source, name, &bytes_of(name));
        }
        put(source, PARTIAL, &bytes_of(PARTIAL));
    });
    for (name, _) in WHOLE {
        rig.cache_whole(Path::new(name)).unwrap();
    }
    super::fuse_range(&rig.mountpoint().join(PARTIAL), 0, 4096);
    rig
}

/// The same of PATH's rclone.
pub fn clips() -> Rig {
    mounted(Path::new("rclone"))
}

/// For each rclone.
pub fn each(test: impl Fn(&Rig)) {
    for rclone in rclones() {
        test(&mounted(&rclone));
    }
}

/// `exec` with a report as JSON; add `--` and the command.
pub fn exec(options: &[&str]) -> Command {
    let mut command = program();
    command.args(["exec", "--report=json"]).args(options);
    command.stdin(Stdio::null());
    command
}

/// A command's end under `exec`.
#[derive(Debug)]
pub struct Done {
    pub stdout: Vec<u8>,
    /// All lines but the report.
    pub stderr: String,
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub report: Value,
}

impl Done {
    pub fn of(output: &Output) -> Self {
        let text = stderr(output);
        let text = text.trim_end();
        let (before, last) = text.rsplit_once('\n').unwrap_or(("", text));
        let report = serde_json::from_str(last).unwrap_or_else(|_| panic!("no report: {text:?}"));
        let done = Self {
            stdout: output.stdout.clone(),
            stderr: before.to_owned(),
            code: output.status.code(),
            signal: output.status.signal(),
            report,
        };
        done.check_sum();
        done
    }

    fn check_sum(&self) {
        let number = |name: &str| self.report[name].as_u64().unwrap();
        let reasons = self.report["by_reason"].as_object().unwrap();
        let through_fuse: u64 = reasons.values().map(|n| n.as_u64().unwrap()).sum();
        let parts = number("elsewhere") + number("substituted") + number("interrupted");
        assert_eq!(number("opens"), parts + through_fuse, "{}", self.report);
    }

    pub fn substituted(&self) -> u64 {
        self.report["substituted"].as_u64().unwrap()
    }

    /// Opens that went through FUSE for a reason.
    pub fn reason(&self, reason: &str) -> u64 {
        self.report["by_reason"][reason].as_u64().unwrap_or(0)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Runs a command under `exec` in a folder.
pub fn run_in(folder: &Path, options: &[&str], command: &[impl AsRef<OsStr>]) -> Done {
    let mut exec = exec(options);
    exec.arg("--").args(command).current_dir(folder);
    Done::of(&exec.output().unwrap())
}

/// The same plainly.
pub fn plainly(folder: &Path, command: &[impl AsRef<OsStr>]) -> Output {
    let mut plain = Command::new(&command[0]);
    plain.args(&command[1..]).current_dir(folder);
    plain.stdin(Stdio::null()).output().unwrap()
}

/// Runs a shell's script in a folder by both ways, and compares; what `exec` said.
pub fn both(folder: &Path, script: &str) -> Done {
    let command = ["bash", "-c", script];
    let plain = plainly(folder, &command);
    let done = run_in(folder, &[], &command);
    assert_eq!(
        done.text(),
        String::from_utf8_lossy(&plain.stdout),
        "{script}"
    );
    assert_eq!(done.code, plain.status.code(), "{script}: {}", done.stderr);
    assert_eq!(done.stderr, stderr(&plain).trim_end(), "{script}");
    done
}

/// Python with what the tests' scripts need.
pub fn python(script: &str) -> [String; 3] {
    let prelude = "import ctypes,fcntl,hashlib,mmap,os,signal,subprocess,sys,threading,time\n\
                   libc=ctypes.CDLL(None,use_errno=True)\n\
                   def sys_(*a):\n r=libc.syscall(*a)\n if r<0: raise OSError(ctypes.get_errno(),'syscall')\n return r\n";
    ["python3".into(), "-c".into(), format!("{prelude}{script}")]
}

/// Runs a Python script by both ways, and compares.
pub fn both_python(folder: &Path, script: &str) -> Done {
    let command = python(script);
    let plain = plainly(folder, &command);
    let done = run_in(folder, &[], &command);
    assert_eq!(
        done.text(),
        String::from_utf8_lossy(&plain.stdout),
        "{script}\n{}",
        done.stderr
    );
    assert_eq!(done.code, plain.status.code(), "{script}: {}", done.stderr);
    done
}

/// The children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let path = PathBuf::from(format!("/proc/{pid}/task/{pid}/children"));
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace()
        .map(|p| p.parse().unwrap())
        .collect()
}
