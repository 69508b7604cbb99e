//! `run` as a service: units, readiness, watchdog, a socket that systemd makes, logs
//! for the journal.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::clips::{CLIP, MIB, clip, options};
use common::handover::{Raw, folder};
use common::{Tracking, assert_fails, content, eventually, need_root, patience, program, put};
use common::{rig_with, stderr};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use vmafx_bypass::BypassOptions;
use vmafx_bypass::rig::Rig;

const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/systemd");

/// Of `systemd-analyze security`, times ten: no more than it was reached.
const EXPOSURE: &str = "--threshold=28";

fn analyze(arguments: &[&str]) -> Output {
    let mut command = Command::new("systemd-analyze");
    command.arg("--no-pager").args(arguments).output().unwrap()
}

#[test]
fn the_units_are_valid() {
    // The program need not be installed here.
    let folder = tempfile::tempdir().unwrap();
    let built = program().get_program().to_str().unwrap().to_owned();
    let mut paths = Vec::new();
    for name in ["vmafx-bypass.service", "vmafx-bypass.socket"] {
        let text = fs::read_to_string(format!("{UNITS}/{name}")).unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text.replace("/usr/bin/vmafx-bypass", &built)).unwrap();
        paths.push(path.to_str().unwrap().to_owned());
    }
    // Its pages are the package's, whose test looks for them.
    let output = analyze(&["verify", "--man=no", &paths[0], &paths[1]]);
    let text = stderr(&output);
    let about_them = text.lines().filter(|line| line.contains("vmafx-bypass"));
    assert_eq!(about_them.collect::<Vec<_>>(), [""; 0], "{text}");
    assert!(output.status.success(), "{text}");
}

#[test]
fn the_service_is_as_confined_as_it_was() {
    let unit = format!("{UNITS}/vmafx-bypass.service");
    let output = analyze(&["security", "--offline=true", EXPOSURE, &unit]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
}

/// The system calls of a set of systemd's.
fn calls_of(set: &str) -> BTreeSet<String> {
    let output = analyze(&["syscall-filter", set]);
    assert!(output.status.success(), "{set}: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().skip(1).map(str::trim);
    let names = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    names.flat_map(calls).collect()
}

fn calls(name: &str) -> BTreeSet<String> {
    if name.starts_with('@') {
        calls_of(name)
    } else {
        [name.to_owned()].into()
    }
}

/// The profile for containers was made from what `run` was seen to call.
#[test]
fn the_service_may_make_the_calls_that_a_container_may() {
    let unit = fs::read_to_string(format!("{UNITS}/vmafx-bypass.service")).unwrap();
    let mut allowed = BTreeSet::new();
    for line in unit
        .lines()
        .filter_map(|l| l.strip_prefix("SystemCallFilter="))
    {
        let denied = line.strip_prefix('~');
        for call in denied.unwrap_or(line).split(' ').flat_map(calls) {
            if denied.is_some() {
                allowed.remove(&call);
            } else {
                allowed.insert(call);
            }
        }
    }
    let profile = fs::read(format!("{UNITS}/../seccomp/vmafx-bypass.json")).unwrap();
    let profile: Value = serde_json::from_slice(&profile).unwrap();
    let rules = profile["syscalls"].as_array().unwrap().iter();
    let names = rules
        .filter(|rule| rule["action"] == "SCMP_ACT_ALLOW")
        .flat_map(|rule| rule["names"].as_array().unwrap())
        .map(|name| name.as_str().unwrap());
    let (mut missing, mut count) = (Vec::new(), 0);
    for name in names {
        count += 1;
        if !allowed.contains(name) {
            missing.push(name);
        }
    }
    assert!(count > 100, "{count}");
    missing.sort_unstable();
    // Mounts are for privileged clients, which take a drop-in; limits are set by
    // prlimit64.
    assert_eq!(missing, ["mount_setattr", "open_tree", "setrlimit"]);
}

#[test]
fn the_settings_are_all_commented_out_and_the_units() {
    let settings = fs::read_to_string(format!("{UNITS}/vmafx-bypass.env")).unwrap();
    assert!(settings.lines().all(|l| l.is_empty() || l.starts_with('#')));
    let unit = fs::read_to_string(format!("{UNITS}/vmafx-bypass.service")).unwrap();
    let shown = settings.lines().filter_map(|l| l.strip_prefix('#'));
    let shown: Vec<_> = shown.filter(|l| l.starts_with("VMAFX_")).collect();
    assert_eq!(shown.len(), 3, "{shown:?}");
    for line in shown {
        let is_default =
            unit.contains(&format!("={line}\n")) || unit.contains(&format!("\"{line}\""));
        assert_eq!(
            is_default,
            !line.starts_with("VMAFX_EBPF_BYPASS="),
            "{line}"
        );
    }
}

/// The service manager's end of NOTIFY_SOCKET.
struct Manager {
    socket: UnixDatagram,
    folder: TempDir,
}

impl Manager {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        Self { socket, folder }
    }

    fn start(&self, prefix: &Path, args: &[&str], watchdog: Option<&str>) -> Tracking {
        Tracking::start_by(prefix, args, |mut command| {
            command.env("NOTIFY_SOCKET", self.folder.path().join("notify"));
            if let Some(limit) = watchdog {
                command.env("WATCHDOG_USEC", limit);
            }
            command
        })
    }

    /// The next message; `None`: for so long there was none.
    fn next_within(&self, time: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(time)).unwrap();
        let mut bytes = [0; 4096];
        let length = self.socket.recv(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes[..length]).into_owned())
    }

    /// Skips messages up to one that has this line.
    fn next_with(&self, line: &str) -> String {
        loop {
            let message = self.next_within(patience()).expect(line);
            if message.lines().any(|l| l == line) {
                return message;
            }
        }
    }
}

/// A mount with a clip.
fn mounted() -> Rig {
    rig_with(options(Path::new("rclone"), &["--allow-other"]), |source| {
        put(source, CLIP, &content(1, 2 * MIB));
    })
}

/// A thread of a process, by its name.
fn thread(pid: u32, name: &str) -> Pid {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut paths = threads.map(|entry| entry.unwrap().path());
    let is_it = |path: &PathBuf| fs::read_to_string(path.join("comm")).unwrap().trim() == name;
    let path = paths.find(is_it).expect(name);
    Pid::from_raw(path.file_name().unwrap().to_str().unwrap().parse().unwrap())
}

#[test]
fn systemd_is_told_of_start_life_and_end_but_not_of_a_stuck_tracker() {
    let rig = mounted();
    let manager = Manager::new();
    let mut run = manager.start(&rig.mountpoint(), &["--no-events"], Some("400000"));
    assert_eq!(run.next().unwrap()["event"], "attach");
    let ready = manager.next_with("READY=1");
    let below = format!("`{}`", rig.mountpoint().display());
    assert!(
        ready.contains("\nSTATUS=tracking 0 descriptors below"),
        "{ready}"
    );
    assert!(ready.contains(&below), "{ready}");
    for _ in 0..3 {
        manager.next_with("WATCHDOG=1");
    }
    let open = File::open(clip(&rig)).unwrap();
    eventually("its number in the status", || {
        let message = manager.next_with("WATCHDOG=1");
        message.contains("STATUS=tracking 1 descriptors")
    });
    drop(open);

    let tracker = thread(run.pid(), "vmafx-tracker");
    ptrace::attach(tracker).unwrap();
    waitpid(tracker, Some(WaitPidFlag::__WALL)).unwrap();
    // One may be on its way.
    while manager.next_within(Duration::from_secs(1)).is_some() {}
    assert_eq!(manager.next_within(Duration::from_secs(1)), None);
    ptrace::detach(tracker, None).unwrap();
    manager.next_with("WATCHDOG=1");

    let lines = run.end(Signal::SIGTERM);
    manager.next_with("STOPPING=1");
    // --no-events: they are counted alone.
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0]["event"], "summary");
    assert!(lines[0]["events"].as_u64() >= Some(2), "{lines:?}");
}

#[test]
fn a_service_that_waits_for_its_mount_is_ready() {
    need_root();
    let (manager, folder) = (Manager::new(), tempfile::tempdir().unwrap());
    let run = manager.start(folder.path(), &["--wait"], None);
    let ready = manager.next_with("READY=1");
    let waits = "STATUS=tracking 0 descriptors; waiting for a mount";
    assert!(ready.lines().any(|line| line == waits), "{ready}");
    run.end(Signal::SIGINT);
    manager.next_with("STOPPING=1");
}

/// What systemd does for a .socket unit: listens at each path, and starts a command
/// when somebody connects. Its environment is not handed on.
fn activate(kind: &[&str], paths: &[&Path]) -> Command {
    let mut command = Command::new("systemd-socket-activate");
    command.args(kind).args(["-E", "VMAFX_EBPF_BYPASS=1"]);
    for path in paths {
        command.arg("-l").arg(path);
    }
    command.stdin(Stdio::null());
    command
}

#[test]
fn a_socket_that_systemd_makes_is_served_and_stays() {
    let rig = mounted();
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let folder = folder();
    let socket = folder.path().join("handover.sock");
    // Whoever connects first starts it, and waits until it answers.
    let first = std::thread::spawn({
        let socket = socket.clone();
        move || eventually("a socket", || Raw::try_connect(&socket).is_ok())
    });
    let run = Tracking::start_by(&rig.mountpoint(), &[], |command| {
        let mut by = activate(&["--seqpacket"], &[&socket]);
        by.arg(command.get_program()).args(command.get_args());
        by
    });
    first.join().unwrap();
    let inode = fs::metadata(&socket).unwrap().ino();
    let options = BypassOptions::new().socket(&socket).socket_alone();
    let mut bytes = vec![0; 2 * MIB];
    eventually("a proof by the server", || {
        let file = options.open(clip(&rig)).unwrap();
        assert_eq!(file.read_at(&mut bytes, 0).unwrap(), bytes.len());
        file.stats().cache_bytes == bytes.len() as u64
    });
    assert!(bytes == content(1, 2 * MIB));
    let lines = run.end(Signal::SIGTERM);
    assert!(
        lines.last().unwrap()["handover"]["ranges"].as_u64() >= Some(1),
        "{lines:?}"
    );
    assert_eq!(fs::metadata(&socket).unwrap().ino(), inode);
}

#[test]
fn what_else_systemd_may_give_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (one, other) = (path("one"), path("other"));
    let refused = |kind: &[&str], paths: &[&Path], arguments: &[&str]| {
        for path in paths {
            // A socket's file is its maker's to remove.
            let _ = fs::remove_file(path);
        }
        let mut command = activate(kind, paths);
        command.arg(program().get_program());
        command.args(["run", "--prefix", "/"]).args(arguments);
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        eventually("a socket", || {
            Raw::try_connect(paths[0]).is_ok() || UnixStream::connect(paths[0]).is_ok()
        });
        let output = child.wait_with_output().unwrap();
        // systemd-socket-activate tells what it does.
        let own = stderr(&output);
        let own = own
            .lines()
            .filter(|line| line.starts_with("vmafx-bypass: "));
        Output {
            stderr: own.collect::<Vec<_>>().join("\n").into_bytes(),
            ..output
        }
    };
    let packets = &["--seqpacket"];
    let output = refused(packets, &[&one, &other], &[]);
    assert_fails(&output, 3, "2 were given");
    let output = refused(&[], &[&one], &[]);
    assert_fails(&output, 3, "ListenSequentialPacket=PATH");
    let output = refused(packets, &[&one], &["--socket", other.to_str().unwrap()]);
    assert_fails(&output, 3, "name that one or none");
    let arguments = ["--socket", one.to_str().unwrap(), "--socket-mode", "0666"];
    let output = refused(packets, &[&one], &arguments);
    assert_fails(&output, 2, "SocketMode=");
}

#[test]
fn in_the_journal_each_line_has_its_level() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let pins = format!("/sys/fs/bpf/vmafx-journal-{}", std::process::id());
    let log = folder.path().join("log");
    let logged = |inode: &dyn Fn(u64) -> u64, arguments: &[&str]| {
        let file = File::create(&log).unwrap();
        let found = file.metadata().unwrap();
        let stream = format!("{}:{}", found.dev(), inode(found.ino()));
        let mut command = program();
        command.args(["-v", "run", "--pin-dir", &pins, "--no-events", "--prefix"]);
        command.arg(folder.path()).args(arguments);
        command.env("JOURNAL_STREAM", stream).stderr(file);
        command.stdout(Stdio::null()).status().unwrap();
        fs::read_to_string(&log).unwrap()
    };
    let text = logged(&|inode| inode, &["--enable", "--wait", "--duration=10ms"]);
    for begin in ["<7>pid ", "<6>attached by ", "<5>summary: "] {
        assert!(text.lines().any(|line| line.starts_with(begin)), "{text}");
    }
    let has_level = |line: &str| {
        let level = line.strip_prefix('<').and_then(|rest| rest.split_once('>'));
        level.is_some_and(|(level, _)| ["3", "4", "5", "6", "7"].contains(&level))
    };
    assert!(text.lines().all(has_level), "{text}");
    let text = logged(&|inode| inode, &[]);
    assert!(
        text.starts_with("<3>vmafx-bypass: tracking is opt-in"),
        "{text}"
    );
    // The journal is another file: whoever redirects it wants plain text.
    let text = logged(&|inode| inode + 1, &[]);
    assert!(
        text.starts_with("vmafx-bypass: tracking is opt-in"),
        "{text}"
    );
}
