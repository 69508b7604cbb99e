//! Processes in other pid and mount namespaces, one superblock at several
//! places, and `run` in a pid namespace of its own.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::fds::{dumped, end, path};
use common::{Tracking, Worker, content, program, put, rig};
use nix::sys::signal::Signal;
use serde_json::Value;
use vmafx_bypass::rig::Rig;

fn clips() -> Rig {
    rig(|source| put(source, "sub/clip", &content(1, 100)))
}

/// A bind mount, until it is dropped.
struct Bind(tempfile::TempDir);

impl Bind {
    fn of(folder: &Path) -> Self {
        let point = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.arg("--bind").arg(folder).arg(point.path());
        assert!(mount.status().unwrap().success());
        Self(point)
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// The one entry of a process with this command name.
fn entry(dump: &Value, comm: &str) -> Value {
    let entries = dump["entries"].as_array().unwrap().iter();
    let found: Vec<_> = entries.filter(|e| e["comm"] == comm).collect();
    assert_eq!(found.len(), 1, "{dump}");
    found[0].clone()
}

const NAMED: &str = "open('/proc/self/comm','w').write('in-a-container')\n";

#[test]
fn a_process_in_its_own_namespaces_has_the_host_s_pid_and_its_own() {
    let rig = clips();
    let mount = rig.mountpoint();
    // In its mount namespace the clip is elsewhere, and a covering mount is where
    // the prefix was.
    let script = format!(
        "{NAMED}import subprocess\n\
         os.makedirs('/tmp/{0}',exist_ok=True)\n\
         subprocess.run(['mount','--bind',sys.argv[1],'/tmp/{0}'],check=True)\n\
         subprocess.run(['mount','-t','tmpfs','none',sys.argv[1]],check=True)\n\
         fd=os.open('/tmp/{0}/sub/clip',0); print(os.getpid(),flush=True); sys.stdin.readline()",
        format_args!("vmafx-namespaces-{}", std::process::id())
    );
    let before = start(&script, &mount);
    let tracking = Tracking::start(&mount, &[]);
    let after = start(&script, &mount);
    let dump = tracking.dump();
    let entries = dump["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 2, "one adopted, one opened: {dump}");
    for entry in entries {
        let host = entry["pid"].as_u64().unwrap() as u32;
        assert_eq!(entry["own_pid"], 1);
        assert_eq!(path(entry), mount.join("sub/clip"), "by the prefix");
        let status = fs::read_to_string(format!("/proc/{host}/status")).unwrap();
        assert!(status.contains("in-a-container"), "{status}");
    }
    assert_eq!((before.line(), after.line()), ("1", "1"));
    before.end();
    after.end();
    assert_eq!(tracking.dump()["entries"], serde_json::json!([]));
    end(tracking);
}

fn start(script: &str, mount: &Path) -> Worker {
    let unshare = [
        "unshare",
        "--pid",
        "--mount",
        "--fork",
        "--kill-child",
        "python3",
    ];
    Worker::start_by(&unshare, Path::new("/"), script, &[mount.to_str().unwrap()])
}

#[test]
fn each_place_of_a_superblock_shows_its_own_prefix() {
    let rig = clips();
    let (mount, bind) = (rig.mountpoint(), Bind::of(&rig.mountpoint().join("sub")));
    let other = bind.0.path().canonicalize().unwrap();
    let prefix = format!("--prefix={}", other.display());
    let tracking = Tracking::start(&mount, &[&prefix]);
    let here = Worker::start(&mount, "fd=os.open('sub/clip',0)", &[]);
    let there = Worker::start(&other, "fd=os.open('clip',0)", &[]);
    let dump = tracking.dump();
    let paths = |worker: &Worker| -> Vec<PathBuf> {
        let open = dumped(&dump, worker.pid());
        open.into_iter().map(|(_, path)| path).collect()
    };
    assert_eq!(paths(&here), [mount.join("sub/clip")]);
    assert_eq!(paths(&there), [other.join("clip")]);
    here.end();
    there.end();
    end(tracking);
}

#[test]
fn a_place_without_a_prefix_is_shown_by_another() {
    let rig = clips();
    let bind = Bind::of(&rig.mountpoint().join("sub"));
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(bind.0.path(), "fd=os.open('clip',0)", &[]);
    let open = dumped(&tracking.dump(), worker.pid());
    assert_eq!(open[0].1, rig.mountpoint().join("sub/clip"));
    worker.end();
    end(tracking);
}

#[test]
fn in_a_pid_namespace_run_shows_what_is_in_it_and_says_so() {
    common::need_root();
    let rig = clips();
    let clip = rig.mountpoint().join("sub/clip");
    let outside = Worker::start(
        &rig.mountpoint(),
        &format!("{NAMED}fd=os.open('sub/clip',0)"),
        &[],
    );
    let pins = format!("/sys/fs/bpf/vmafx-pidns-{}", std::process::id());
    let script = format!(
        "exec 3<'{clip}'
         '{program}' run --enable --format json --duration 3s --pin-dir {pins} --prefix '{mount}' 3<&- &
         until [ -e {pins}/meta ]; do sleep 0.1; done
         exec 4<'{clip}'
         '{program}' dump-map --format json --pin-dir {pins} >&2 3<&- 4<&-
         echo $$ >&2; wait",
        clip = clip.display(),
        program = program().get_program().display(),
        mount = rig.mountpoint().display(),
    );
    let output = Command::new("unshare")
        .args([
            "--pid",
            "--mount",
            "--fork",
            "--mount-proc",
            "bash",
            "-c",
            &script,
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = common::stderr(&output);
    assert!(text.contains("in a pid namespace of its own"), "{text}");
    let dump = text.lines().find(|line| line.starts_with('{')).unwrap();
    let dump: Value = serde_json::from_str(dump).unwrap();
    assert_eq!(dump["complete"], true, "{dump}");
    // The shell, which is pid 1 there, and nobody else.
    let entries = dump["entries"].as_array().unwrap().iter();
    let open: Vec<_> = entries
        .map(|e| ["pid", "own_pid", "fd"].map(|field| e[field].as_u64().unwrap()))
        .collect();
    assert_eq!(open, [[1, 1, 3], [1, 1, 4]], "{dump}");
    let lines = String::from_utf8(output.stdout).unwrap();
    for line in lines.lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        assert_ne!(event["comm"], "in-a-container", "{event}");
    }
    outside.end();
}

#[test]
fn descriptors_on_a_mount_that_went_are_let_go() {
    let rig = clips();
    let mut tracking = Tracking::start(&rig.mountpoint(), &["--wait"]);
    let worker = Worker::start(
        &rig.mountpoint(),
        &format!("{NAMED}fd=os.open('sub/clip',0)"),
        &[],
    );
    assert_eq!(
        entry(&tracking.dump(), "in-a-container")["pid"],
        worker.pid()
    );
    let mut umount = Command::new("umount");
    assert!(
        umount
            .arg("-l")
            .arg(rig.mountpoint())
            .status()
            .unwrap()
            .success()
    );
    tracking.next_where(|line| line["event"] == "unmount");
    tracking.next_where(|line| line["event"] == "close" && line["pid"] == worker.pid());
    assert_eq!(tracking.dump()["entries"], serde_json::json!([]));
    drop(worker);
    tracking.end(Signal::SIGTERM);
}
