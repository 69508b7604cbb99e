//! How `run` and `dump-map` start, end and refuse: exit codes, messages, pins.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, DirBuilder, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::bindfs::Bindfs;
use common::fds::{dumped, lost};
use common::{Tracking, Worker, assert_fails, need_root, program, put, rig, stderr};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use vmafx_bypass::rig::Rig;

/// A folder for pins that no other test uses, gone when dropped.
struct PinDir(PathBuf);

impl PinDir {
    fn new(name: &str) -> Self {
        let folder = format!("/sys/fs/bpf/vmafx-test-{}-{name}", std::process::id());
        Self(folder.into())
    }
}

impl Drop for PinDir {
    fn drop(&mut self) {
        // Not there, unless a test failed.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The arguments of a `run` that ends by itself should it start.
fn arguments(prefix: &Path, pin_dir: &Path) -> Vec<String> {
    let [prefix, pin_dir] = [prefix, pin_dir].map(|path| path.to_str().unwrap().to_owned());
    let words = "run --enable --format json --duration 200ms --prefix";
    let words = words.split(' ').map(str::to_owned);
    words.chain([prefix, "--pin-dir".into(), pin_dir]).collect()
}

/// Runs `run` to its end.
fn try_run(prefix: &Path, pin_dir: &Path, more: &[&str]) -> Output {
    need_root();
    let mut command = program();
    command.args(arguments(prefix, pin_dir)).args(more);
    command.output().unwrap()
}

/// Runs it in a mount namespace of its own that the shell script `prepare`
/// changes, with the capabilities that setpriv(1) is told.
fn try_run_in(prepare: &str, capabilities: Option<&str>, arguments: &[String]) -> Output {
    need_root();
    let setpriv = capabilities.map_or(String::new(), |capabilities| {
        format!("setpriv --bounding-set={capabilities} --inh-caps={capabilities} --")
    });
    let script = format!("{prepare} exec {setpriv} \"$0\" \"$@\"");
    let program = env!("CARGO_BIN_EXE_vmafx-bypass");
    Command::new("unshare")
        .args(["--mount", "sh", "-ec", &script, program])
        .args(arguments)
        .env_remove("VMAFX_EBPF_BYPASS")
        .output()
        .unwrap()
}

/// The lines that a `run` to its end printed.
fn lines(output: &Output) -> Vec<Value> {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    let text = output
        .stdout
        .split(|&b| b == b'\n')
        .filter(|line| !line.is_empty());
    text.map(|line| serde_json::from_slice(line).unwrap())
        .collect()
}

fn dump_map(pin_dir: &Path, arguments: &[&str]) -> Output {
    need_root();
    let mut command = program();
    command
        .args(["dump-map", "--format", "json", "--pin-dir"])
        .arg(pin_dir);
    command.args(arguments).output().unwrap()
}

fn clip_rig() -> Rig {
    rig(|source| put(source, "clip", b"clip"))
}

#[test]
fn run_starts_only_where_someone_opted_in() {
    let pins = PinDir::new("optin");
    let mut words = arguments(Path::new("/"), &pins.0);
    words.retain(|word| word != "--enable");
    need_root();
    let output = program().args(&words).output().unwrap();
    assert_fails(
        &output,
        3,
        "set VMAFX_EBPF_BYPASS=1, or start with --enable",
    );
    // Anything but 1 is no opt-in.
    let output = program()
        .args(&words)
        .env("VMAFX_EBPF_BYPASS", "yes")
        .output()
        .unwrap();
    assert_fails(
        &output,
        3,
        "set VMAFX_EBPF_BYPASS=1, or start with --enable",
    );
    // The fleet's kill switch beats this one start's opt-in.
    words.push("--enable".into());
    let output = program()
        .args(&words)
        .env("VMAFX_EBPF_BYPASS", "0")
        .output()
        .unwrap();
    assert_fails(&output, 3, "VMAFX_EBPF_BYPASS=0 switches tracking off");
    assert!(output.stdout.is_empty() && !pins.0.exists());
}

#[test]
fn a_run_of_limited_duration_ends_by_itself() {
    let rig = clip_rig();
    let pins = PinDir::new("duration");
    let lines = lines(&try_run(&rig.mountpoint(), &pins.0, &[]));
    let kinds: Vec<_> = lines[1..].iter().map(|line| &line["event"]).collect();
    assert_eq!(lines[0], json!({"schema": 1, "stream": "events"}));
    assert_eq!(kinds, ["attach", "summary"]);
    assert!(lost(&lines[2]).is_empty() && lines[2]["complete"] == true);
    assert!(!pins.0.exists());
}

#[test]
fn waiting_for_a_mount_ends_when_its_time_is_over() {
    let folder = tempfile::tempdir().unwrap();
    let pins = PinDir::new("wait");
    let output = try_run(folder.path(), &pins.0, &["--wait=300ms", "--quiet"]);
    assert_fails(&output, 3, "no prefix came on an rclone mount within 300ms");
    assert!(!pins.0.exists());
}

#[test]
fn a_prefix_must_be_a_folder_on_an_rclone_mount() {
    need_root();
    let rig = clip_rig();
    let point = tempfile::tempdir().unwrap();
    let _other = Bindfs::over(point.path(), Path::new("/usr/share"));
    let folder = tempfile::tempdir().unwrap();
    let pins = PinDir::new("prefix");
    for (prefix, message) in [
        (
            folder.path().join("none"),
            "does not exist: mount it first, or start with --wait",
        ),
        (rig.mountpoint().join("none"), "does not exist"),
        (rig.mountpoint().join("clip"), "is not a folder"),
        (
            folder.path().to_owned(),
            "not on an rclone mount: mount it first",
        ),
        (point.path().to_owned(), "is FUSE but not rclone"),
    ] {
        let output = try_run(&prefix, &pins.0, &[]);
        assert_fails(&output, 3, message);
        assert!(stderr(&output).contains(prefix.to_str().unwrap()));
    }
    // Nor does one right prefix make up for a wrong one.
    let more = ["--prefix", folder.path().to_str().unwrap()];
    let output = try_run(&rig.mountpoint(), &pins.0, &more);
    assert_fails(&output, 3, folder.path().to_str().unwrap());
    assert!(!pins.0.exists());
}

#[test]
fn others_than_root_are_told_what_they_lack() {
    let rig = clip_rig();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    // Where the tests were built may be closed to others.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let copy = folder.path().join("vmafx-bypass");
    fs::copy(env!("CARGO_BIN_EXE_vmafx-bypass"), &copy).unwrap();
    let nobody = |arguments: &[String]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(&copy).args(arguments).output().unwrap()
    };
    let pins = PinDir::new("nobody");
    let output = nobody(&arguments(&rig.mountpoint(), &pins.0));
    assert_fails(&output, 3, "run as root, or with CAP_BPF and CAP_PERFMON");
    assert!(!pins.0.exists());
    // The maps are their owner's alone.
    let dump = ["dump-map", "--pin-dir", tracking.pin_dir.to_str().unwrap()];
    let output = nobody(&dump.map(str::to_owned));
    assert_fails(&output, 3, "run as the user who started `run`, or as root");
    tracking.end(Signal::SIGTERM);
}

#[test]
fn two_capabilities_are_enough() {
    let rig = clip_rig();
    let pins = PinDir::new("caps");
    let words = arguments(&rig.mountpoint(), &pins.0);
    let output = try_run_in("", Some("-all,+bpf,+perfmon"), &words);
    assert_eq!(lines(&output)[1]["event"], "attach");
    let output = try_run_in("", Some("-bpf,-sys_admin"), &words);
    assert_fails(&output, 3, "run as root, or with CAP_BPF and CAP_PERFMON");
}

#[test]
fn a_kernel_without_btf_is_named() {
    let pins = PinDir::new("btf");
    let words = arguments(Path::new("/"), &pins.0);
    let output = try_run_in("mount -t tmpfs none /sys/kernel/btf;", None, &words);
    assert_fails(&output, 3, "CONFIG_DEBUG_INFO_BTF");
}

/// Covers tracefs, wherever it is, and the BPF file system.
const HIDE_TRACEFS: &str = "mount -t tmpfs none /sys/kernel/tracing;\
                            mount -t tmpfs none /sys/kernel/debug;";
const HIDE_BPFFS: &str = "mount -t tmpfs none /sys/fs/bpf;";

#[test]
fn missing_file_systems_are_mounted_or_named() {
    let rig = clip_rig();
    let pins = PinDir::new("mounts");
    let words = arguments(&rig.mountpoint(), &pins.0);
    let hidden = format!("{HIDE_TRACEFS}{HIDE_BPFFS}");
    let mounted = lines(&try_run_in(&hidden, None, &words));
    assert_eq!(mounted[1]["event"], "attach");
    let mut by_tracepoint = words.clone();
    by_tracepoint.push("--attach=tracepoint".into());
    let mounted = lines(&try_run_in(&hidden, None, &by_tracepoint));
    assert_eq!(mounted[1]["attach"], "tracepoint");
    let output = try_run_in(HIDE_TRACEFS, Some("-sys_admin"), &by_tracepoint);
    assert_fails(&output, 3, "`mount -t tracefs tracefs /sys/kernel/tracing`");
    let output = try_run_in(HIDE_BPFFS, Some("-sys_admin"), &words);
    assert_fails(&output, 3, "`mount -t bpf bpf /sys/fs/bpf`");
}

#[test]
fn pins_belong_on_a_bpf_file_system() {
    let rig = clip_rig();
    let folder = tempfile::tempdir().unwrap();
    let pins = folder.path().join("pins");
    let output = try_run(&rig.mountpoint(), &pins, &[]);
    assert_fails(
        &output,
        3,
        "is not on a BPF file system: choose a --pin-dir below",
    );
    assert!(!pins.exists());
}

#[test]
fn a_folder_of_another_user_holds_no_pins() {
    let rig = clip_rig();
    let folder = PinDir::new("strangers");
    std::fs::create_dir(&folder.0).unwrap();
    let tried = |told: &str| {
        assert_fails(&try_run(&rig.mountpoint(), &folder.0, &[]), 1, told);
    };
    std::os::unix::fs::chown(&folder.0, Some(65534), None).unwrap();
    tried("belongs to uid 65534: choose another --pin-dir");
    std::os::unix::fs::chown(&folder.0, Some(0), None).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&folder.0, mode).unwrap();
    tried("others may write to it: chmod 700");
}

#[test]
fn a_second_run_on_the_same_pins_names_the_first() {
    let rig = clip_rig();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(&rig.mountpoint(), "os.open('clip',0)", &[]);
    let output = try_run(&rig.mountpoint(), &tracking.pin_dir, &[]);
    assert_fails(&output, 1, &format!("in use by pid {}:", tracking.pid()));
    // Nothing of the first was touched, and elsewhere there is room for another.
    assert_eq!(dumped(&tracking.dump(), worker.pid()).len(), 1);
    let pins = PinDir::new("second");
    lines(&try_run(&rig.mountpoint(), &pins.0, &[]));
    assert_eq!(dumped(&tracking.dump(), worker.pid()).len(), 1);
    tracking.end(Signal::SIGTERM);
}

#[test]
fn pins_of_a_killed_run_are_called_so_and_replaced() {
    let rig = clip_rig();
    let mut tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(&rig.mountpoint(), "os.open('clip',0)", &[]);
    tracking.next_where(|line| line["event"] == "open");
    tracking.kill();
    let output = dump_map(&tracking.pin_dir, &[]);
    assert_eq!(output.status.code(), Some(0));
    let warning = format!(
        "warning: pid {}, which kept these maps, has died",
        tracking.pid()
    );
    assert!(stderr(&output).contains(&warning), "{}", stderr(&output));
    let dump = tracking.dump();
    assert_eq!(dump["owner"]["alive"], false);
    assert_eq!(dump["owner"]["pid"], tracking.pid());
    assert_eq!(dump["complete"], false);
    // As it left them.
    assert_eq!(
        dumped(&dump, worker.pid())[0].1,
        rig.mountpoint().join("clip")
    );

    let output = try_run(&rig.mountpoint(), &tracking.pin_dir, &[]);
    assert_eq!(lines(&output).last().unwrap()["event"], "summary");
    let warning = "warning: replaced the pins that a dead process had left at";
    assert!(stderr(&output).starts_with(warning), "{}", stderr(&output));
    assert!(!tracking.pin_dir.exists());
}

#[test]
fn a_dead_owner_is_dead_before_its_parent_has_looked() {
    let rig = clip_rig();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let pid = Pid::from_raw(tracking.pid() as i32);
    kill(pid, Signal::SIGKILL).unwrap();
    // Waits, and leaves it a zombie.
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(pid), flags).unwrap();
    assert_eq!(tracking.dump()["owner"]["alive"], false);
}

#[test]
fn dump_map_without_run_says_to_start_it() {
    let pins = PinDir::new("none");
    let output = dump_map(&pins.0, &[]);
    assert_fails(&output, 3, "start `vmafx-bypass run --prefix DIR` first");
    DirBuilder::new().mode(0o700).create(&pins.0).unwrap();
    assert_fails(
        &dump_map(&pins.0, &[]),
        3,
        "start `vmafx-bypass run --prefix DIR` first",
    );
}

#[test]
fn dump_map_shows_only_the_processes_it_is_asked_for() {
    let rig = clip_rig();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let workers = [0; 3].map(|_| Worker::start(&rig.mountpoint(), "os.open('clip',0)", &[]));
    let [first, second, _] = workers.each_ref().map(|worker| worker.pid().to_string());
    let shown = |arguments: &[&str]| {
        let output = dump_map(&tracking.pin_dir, arguments);
        let dump: Value = serde_json::from_slice(&output.stdout).unwrap();
        let entries = dump["entries"].as_array().unwrap().iter();
        entries
            .map(|entry| entry["pid"].to_string())
            .collect::<Vec<_>>()
    };
    let sorted = |mut pids: Vec<String>| {
        pids.sort_by_key(|pid| pid.parse::<u32>().unwrap());
        pids
    };
    let both = sorted(vec![first.clone(), second.clone()]);
    assert_eq!(shown(&[]).len(), 3);
    assert_eq!(shown(&["--pid", &second]), [second.as_str()]);
    assert_eq!(shown(&["--pid", &first, "--pid", &second]), both);
    assert_eq!(shown(&["--pid", &format!("{first},{second}")]), both);
    assert!(shown(&["--pid", "1"]).is_empty());
    tracking.end(Signal::SIGTERM);
}

#[test]
fn a_reader_that_goes_away_ends_run_in_good_order() {
    let rig = clip_rig();
    let pins = PinDir::new("closed");
    let mut words = arguments(&rig.mountpoint(), &pins.0);
    // Until the reader goes.
    let duration = words.iter().position(|word| word == "200ms").unwrap();
    words[duration] = "20s".into();
    let mut command = program();
    command
        .args(&words)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut head = BufReader::new(child.stdout.take().unwrap());
    // The schema, and what it attached to.
    for _ in 0..2 {
        head.read_line(&mut String::new()).unwrap();
    }
    drop(head);
    assert!(pins.0.exists() && child.try_wait().unwrap().is_none());
    fs::read(rig.mountpoint().join("clip")).unwrap();
    let started = std::time::Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(
        started.elapsed().as_secs() < 10,
        "it noticed at its next row"
    );
    assert_eq!(
        (output.status.code(), stderr(&output).as_str()),
        (Some(0), "")
    );
    assert!(!pins.0.exists());
}
