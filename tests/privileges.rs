//! What it takes to track and to read: capabilities one by one, and what `run`
//! gives up. docs/PRIVILEGES.md has the table.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use common::{
    Tracking, Worker, assert_fails, eventually, need_root, program, put, rig_with, stderr,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use vmafx_bypass::rig::{Rig, RigOptions};

/// Somebody who is nobody else on the machine.
const USER: u32 = 54_321;

/// What clips are while an rclone starts, such as another test's: until it is known
/// where that caches, it might be in the same folder.
const STARTS: &str = "unsupported";

/// linux/capability.h.
const DAC_OVERRIDE: u64 = 1 << 1;
const DAC_READ_SEARCH: u64 = 1 << 2;
const FOWNER: u64 = 1 << 3;
const SYS_PTRACE: u64 = 1 << 19;
const SYS_ADMIN: u64 = 1 << 21;

/// A mount that all may read, of an rclone that hides its cache from them: its
/// folder by its mode, and where it is, in the environment, by /proc.
struct Place {
    rig: Rig,
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let options = RigOptions {
            mount_arguments: vec!["--allow-other".into()],
            cache_argument: false,
            ..RigOptions::default()
        };
        let rig = rig_with(options, |source| put(source, "clip", b"clip"));
        rig.cache_whole(Path::new("clip")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        // Where tests are built may be closed to others.
        fs::copy(env!("CARGO_BIN_EXE_vmafx-bypass"), folder.path().join("vb")).unwrap();
        for open in [rig.folder(), folder.path()] {
            fs::set_permissions(open, Permissions::from_mode(0o755)).unwrap();
        }
        let place = Self { rig, folder };
        fs::create_dir(place.bpf()).unwrap();
        mount(
            Some("bpf"),
            &place.bpf(),
            Some("bpf"),
            MsFlags::empty(),
            Some("mode=0700"),
        )
        .unwrap();
        chown(place.bpf(), Some(USER), Some(USER)).unwrap();
        place
    }

    fn program(&self) -> PathBuf {
        self.folder.path().join("vb")
    }

    /// A BPF file system of the user's own.
    fn bpf(&self) -> PathBuf {
        self.folder.path().join("bpf")
    }

    fn clip(&self) -> PathBuf {
        self.rig.mountpoint().join("clip")
    }

    /// The program as the user, with these capabilities and no others.
    fn as_user(&self, capabilities: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={USER}"));
        command.arg(format!("--regid={USER}"));
        command.arg("--clear-groups");
        if !capabilities.is_empty() {
            command.arg(format!("--inh-caps={capabilities}"));
            command.arg(format!("--ambient-caps={capabilities}"));
        }
        command.arg(self.program());
        command.env_remove("VMAFX_EBPF_BYPASS");
        command
    }

    /// The arguments of a `run` that prints JSON.
    fn run_arguments(&self) -> Vec<String> {
        let pins = self.bpf().join("pins");
        let words = ["run", "--enable", "--format=json", "--prefix"];
        let mut words = words.map(str::to_owned).to_vec();
        words.push(self.rig.mountpoint().to_str().unwrap().into());
        words.push(format!("--pin-dir={}", pins.display()));
        words
    }

    /// `run` follows another process that opens the clip, of which it must say this,
    /// and ends well.
    fn tracks(&self, command: &mut Command, state: &str) {
        let mut run = Run::start(command);
        assert!(self.bpf().join("pins").exists());
        eventually(state, || {
            let worker = Worker::start(&self.rig.mountpoint(), "os.open('clip',0)", &[]);
            let open = run.next_where(|line| line["event"] == "open");
            assert_eq!(open["pid"], worker.pid());
            assert!(open["state"] == state || open["state"] == STARTS, "{open}");
            open["state"] == state
        });
        // Once it is attached, nobody has what it takes to attach.
        for thread in threads(run.child.id()) {
            assert_eq!(
                thread.effective & !(DAC_READ_SEARCH | SYS_PTRACE),
                0,
                "{thread:?}"
            );
            assert_eq!((thread.no_new_privs, thread.seccomp), (1, 2), "{thread:?}");
        }
        run.end();
        assert!(!self.bpf().join("pins").exists());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Not there, unless a test failed early.
        let _ = umount2(&self.bpf(), MntFlags::MNT_DETACH);
    }
}

/// A `run` by any user.
struct Run {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Run {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut run = Self { child, lines };
        run.next_where(|line| line["event"] == "attach");
        run
    }

    fn next_where(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "it has ended");
            let line = serde_json::from_str(&line).unwrap();
            if wanted(&line) {
                return line;
            }
        }
    }

    fn end(mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        self.next_where(|line| line["event"] == "summary" && line["complete"] == true);
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What `read --stats=json` told last.
fn stats(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    serde_json::from_str(stderr(output).lines().last().unwrap()).unwrap()
}

/// What a thread may do, by its status file.
#[derive(Debug)]
struct Thread {
    name: String,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
    bounding: u64,
    no_new_privs: u64,
    seccomp: u64,
}

fn threads(pid: u32) -> Vec<Thread> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let threads = tasks.map(|task| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let mut lines = status.lines();
            lines
                .find_map(|line| line.strip_prefix(name))
                .unwrap()
                .trim()
        };
        let set = |name: &str| u64::from_str_radix(field(name), 16).unwrap();
        Thread {
            name: field("Name:").to_owned(),
            effective: set("CapEff:"),
            permitted: set("CapPrm:"),
            inheritable: set("CapInh:"),
            ambient: set("CapAmb:"),
            bounding: set("CapBnd:"),
            no_new_privs: set("NoNewPrivs:"),
            seccomp: set("Seccomp:"),
        }
    });
    threads.collect()
}

#[test]
fn two_capabilities_track_and_two_more_tell_states() {
    let place = Place::new();
    for (capabilities, state) in [
        ("+bpf,+perfmon", "permission"),
        ("+bpf,+perfmon,+dac_read_search,+sys_ptrace", "active"),
    ] {
        let mut command = place.as_user(capabilities);
        place.tracks(command.args(place.run_arguments()), state);
    }
    // One of the two does not do.
    for less in ["+bpf", "+perfmon", ""] {
        let mut command = place.as_user(less);
        let output = command.args(place.run_arguments()).output().unwrap();
        assert_fails(&output, 3, "run as root, or with CAP_BPF and CAP_PERFMON");
    }
}

#[test]
fn file_capabilities_do_as_well() {
    let place = Place::new();
    let set = |capabilities: &str| {
        let mut setcap = Command::new("setcap");
        let done = setcap.arg(capabilities).arg(place.program()).status();
        assert!(done.expect("the Debian package libcap2-bin").success());
    };
    // The command that `doctor` tells, with the kill switch, so that it is quick.
    let output = place
        .as_user("")
        .args(["doctor", "--format=json"])
        .env("VMAFX_EBPF_BYPASS", "0")
        .output()
        .unwrap();
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let check = checked(&document, "cap_sys_ptrace");
    let remedy = check["remedy"].as_str().unwrap();
    let capabilities = remedy
        .split("setcap ")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    set(capabilities);
    let mut command = place.as_user("");
    place.tracks(command.args(place.run_arguments()), "active");
}

#[test]
fn tracepoints_take_a_capability_more_or_a_folder_that_is_open() {
    let place = Place::new();
    let mut command = place.as_user("+bpf,+perfmon");
    command
        .args(place.run_arguments())
        .arg("--attach=tracepoint");
    let output = command.output().unwrap();
    assert_fails(&output, 3, "may not be read: add CAP_DAC_READ_SEARCH");
    let mut command = place.as_user("+bpf,+perfmon,+dac_read_search");
    command.args(place.run_arguments());
    place.tracks(command.arg("--attach=tracepoint"), "permission");
}

#[test]
fn run_as_root_gives_up_all_but_two_capabilities() {
    let place = Place::new();
    // A thread more, which the network talks to.
    let metrics: &[&str] = if cfg!(feature = "metrics") {
        &["--metrics=127.0.0.1:0"]
    } else {
        &[]
    };
    let mut tracking = Tracking::start(&place.rig.mountpoint(), metrics);
    let threads = threads(tracking.pid());
    assert!(threads.len() >= 3 + metrics.len(), "{threads:?}");
    for thread in &threads {
        let signals = thread.name == "vmafx-signals";
        let kept = if signals {
            0
        } else {
            DAC_READ_SEARCH | SYS_PTRACE
        };
        assert_eq!(
            (thread.effective, thread.permitted),
            (kept, kept),
            "{thread:?}"
        );
        assert_eq!((thread.inheritable, thread.ambient), (0, 0), "{thread:?}");
        assert_eq!(thread.bounding, kept, "{thread:?}");
        assert_eq!((thread.no_new_privs, thread.seccomp), (1, 2), "{thread:?}");
    }
    // It goes on, and tells states.
    eventually("a state", || {
        let worker = Worker::start(&place.rig.mountpoint(), "os.open('clip',0)", &[]);
        let open = tracking.next_where(|line| line["event"] == "open");
        assert_eq!(open["pid"], worker.pid());
        assert!(
            open["state"] == "active" || open["state"] == STARTS,
            "{open}"
        );
        open["state"] == "active"
    });
    tracking.end(Signal::SIGTERM);
}

#[test]
fn the_handover_server_keeps_what_it_takes_to_serve() {
    let place = Place::new();
    // In a folder of another user's, from which the socket is to go at the end.
    let folder = place.folder.path().join("sockets");
    fs::create_dir(&folder).unwrap();
    chown(&folder, Some(USER), Some(USER)).unwrap();
    let socket = folder.join("socket");
    let named = format!("--socket={}", socket.display());
    let owner = format!("--socket-owner={USER}:{USER}");
    let tracking = Tracking::start(&place.rig.mountpoint(), &[&named, &owner]);

    // A server that has no processor for 250 ms is left alone for a while.
    let read = |command: &dyn Fn() -> Command| {
        eventually("an answer of the server", || {
            let mut command = command();
            command.args(["read", "--stats=json", "--output=-", &named]);
            let output = command.arg(place.clip()).output().unwrap();
            assert_eq!(output.stdout, b"clip");
            let stats = stats(&output);
            let state = stats["state"].as_str().unwrap().to_owned();
            assert!(
                ["active", "handover", STARTS].contains(&state.as_str()),
                "{stats}"
            );
            state == "active" && stats["cache_bytes"] == 4
        });
    };
    read(&|| place.as_user(""));
    // The cache file is root's: for root it takes a mount of its own.
    read(&|| program());

    let mut serving = 0;
    for thread in threads(tracking.pid()) {
        let kept = match thread.name.as_str() {
            "vmafx-signals" => 0,
            "vmafx-tracker" => DAC_READ_SEARCH | SYS_PTRACE,
            "vmafx-accept" | "vmafx-answer" => {
                serving += 1;
                assert!(thread.effective & SYS_ADMIN != 0, "{thread:?}");
                continue;
            }
            _ => DAC_READ_SEARCH | SYS_PTRACE | DAC_OVERRIDE | FOWNER,
        };
        assert_eq!(thread.effective, kept, "{thread:?}");
        assert_eq!((thread.no_new_privs, thread.seccomp), (1, 2), "{thread:?}");
    }
    assert_eq!(serving, 25);
    tracking.end(Signal::SIGTERM);
    assert!(!socket.exists());
}

#[test]
fn pins_in_a_folder_of_another_user_go_at_the_end() {
    let place = Place::new();
    assert_eq!(fs::metadata(place.bpf()).unwrap().uid(), USER);
    let mut command = program();
    command.args(place.run_arguments()).arg("--duration=100ms");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!place.bpf().join("pins").exists());
}

#[test]
fn with_two_capabilities_a_user_reads_past_fuse() {
    let place = Place::new();
    for (capabilities, state) in [
        ("", "permission"),
        ("+dac_read_search", "permission"),
        ("+sys_ptrace", "permission"),
        ("+dac_read_search,+sys_ptrace", "active"),
    ] {
        eventually(state, || {
            let mut command = place.as_user(capabilities);
            let command = command.args(["read", "--stats=json", "--output=-"]);
            let output = command.arg(place.clip()).output().unwrap();
            assert_eq!(output.stdout, b"clip");
            let found = &stats(&output)["state"];
            assert!(found == state || found == STARTS, "{}", stderr(&output));
            found == state
        });
    }
}

#[test]
fn where_no_way_attaches_each_is_named() {
    need_root();
    let place = Place::new();
    // Its capabilities are full, and count for nothing.
    let mut words = place.run_arguments();
    words.pop();
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user"])
        .arg(env!("CARGO_BIN_EXE_vmafx-bypass"))
        .args(words)
        .arg(format!(
            "--pin-dir=/sys/fs/bpf/vmafx-test-{}-none",
            std::process::id()
        ))
        .env_remove("VMAFX_EBPF_BYPASS")
        .output()
        .unwrap();
    assert_fails(&output, 3, "(--attach fentry)");
    for mode in ["raw", "tracepoint"] {
        assert!(stderr(&output).contains(&format!("(--attach {mode})")));
    }
}

fn checked<'a>(document: &'a Value, name: &str) -> &'a Value {
    let checks = document["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap()
}

#[test]
fn each_capability_has_its_check() {
    need_root();
    for name in [
        "bpf",
        "perfmon",
        "dac_read_search",
        "sys_ptrace",
        "sys_admin",
    ] {
        // CAP_SYS_ADMIN does for some.
        let taken = format!("-{name},-sys_admin");
        let output: Output = Command::new("setpriv")
            .arg(format!("--bounding-set={taken}"))
            .arg(env!("CARGO_BIN_EXE_vmafx-bypass"))
            .args(["doctor", "--format=json"])
            // It loads nothing then, and is quick.
            .env("VMAFX_EBPF_BYPASS", "0")
            .output()
            .unwrap();
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        let check = checked(&document, &format!("cap_{name}"));
        assert_eq!(check["pass"], false, "{name}");
        let remedy = check["remedy"].as_str().unwrap();
        assert!(remedy.to_lowercase().contains(name), "{name}: {remedy}");
    }
    // All of them are in the page.
    let page = include_str!("../docs/PRIVILEGES.md");
    for name in [
        "BPF",
        "PERFMON",
        "DAC_READ_SEARCH",
        "SYS_PTRACE",
        "SYS_ADMIN",
    ] {
        assert!(page.contains(&format!("CAP_{name}")), "{name}");
    }
}
