//! The tracker under load, among other owners of its pins, and with daemons
//! that hang.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::fds::{dumped, lost, truth};
use common::{
    Tracking, Worker, assert_fails, content, eventually, need_root, program, put, rig, stderr,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use vmafx_bypass::rig::Rig;

#[test]
fn more_descriptors_than_one_batch_are_all_dumped() {
    let rig = rig(|source| put(source, "clip", &content(1, 100)));
    let tracking = Tracking::start(&rig.mountpoint(), &["--ring-size=16MiB"]);
    let worker = Worker::start(
        &rig.mountpoint(),
        "import resource; hard=resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n\
         resource.setrlimit(resource.RLIMIT_NOFILE,(hard,hard))\n\
         fd=os.open('clip',os.O_RDONLY)\n\
         for number in range(100,10100): os.dup2(fd,number)",
        &[],
    );
    let dump = tracking.dump();
    let open = truth(worker.pid(), &rig.mountpoint());
    assert_eq!(open.len(), 10_001);
    assert_eq!(dumped(&dump, worker.pid()), open);
    assert_eq!(dump["complete"], true, "{:?}", lost(&dump));
    worker.kill();
    assert_eq!(tracking.dump()["entries"], json!([]));
}

#[test]
fn long_paths_that_no_batch_has_room_for_are_dumped() {
    // Each path takes eleven elements of the map, where a dump reckons with two.
    let folder = ["x".repeat(200).as_str(); 12].join("/");
    let clip = format!("{folder}/clip");
    let rig = rig(|source| {
        put(source, &clip, &content(1, 100));
        put(source, "short", &content(2, 100));
    });
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(
        &rig.mountpoint(),
        "long=os.open(sys.argv[1],os.O_RDONLY); short=os.open('short',os.O_RDONLY)\n\
         for number in range(100,600): os.dup2(long if number%2 else short,number)",
        &[&clip],
    );
    let dump = tracking.dump();
    let open = truth(worker.pid(), &rig.mountpoint());
    assert_eq!(open.len(), 502);
    assert_eq!(dumped(&dump, worker.pid()), open);
    assert_eq!(dump["complete"], true, "{:?}", lost(&dump));
}

#[test]
fn threads_that_dup_and_close_one_file_leave_nothing_behind() {
    let rig = rig(|source| put(source, "clip", &content(1, 100)));
    let tracking = Tracking::start(&rig.mountpoint(), &["--ring-size=64MiB"]);
    for _ in 0..4 {
        let mut worker = Worker::start(
            &rig.mountpoint(),
            "import ctypes; libc=ctypes.CDLL(None)\n\
             base=os.open('clip',os.O_RDONLY); stop=threading.Event()\n\
             def churn():\n \
               while not stop.is_set(): libc.close(libc.dup(base))\n\
             threads=[threading.Thread(target=churn) for _ in range(8)]\n\
             for thread in threads: thread.start()\n\
             time.sleep(1); stop.set()\n\
             for thread in threads: thread.join()\n\
             step(); os.close(base)",
            &[],
        );
        let pid = worker.pid();
        let open = truth(pid, &rig.mountpoint());
        assert_eq!(dumped(&tracking.dump(), pid), open);
        worker.proceed();
        assert_eq!(dumped(&tracking.dump(), pid), []);
        worker.end();
        assert_eq!(tracking.dump()["entries"], json!([]));
    }
}

/// A `run` whose pins others meddle with.
fn run_at(pin_dir: &Path, prefix: &Path, args: &[&str]) -> Child {
    let before = fs::metadata(pin_dir.join("meta")).is_ok();
    let child = program()
        .args(["run", "--enable", "-q", "--prefix"])
        .arg(prefix)
        .arg("--pin-dir")
        .arg(pin_dir)
        .args(args)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    eventually("its pins", || {
        before || fs::metadata(pin_dir.join("meta")).is_ok()
    });
    child
}

fn end(mut child: Child) {
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

fn pin_dir(name: &str) -> PathBuf {
    PathBuf::from(format!("/sys/fs/bpf/vmafx-{name}-{}", std::process::id()))
}

#[test]
fn pins_of_a_later_owner_stay() {
    need_root();
    let rig = rig(|source| put(source, "clip", &content(1, 100)));
    let pins = pin_dir("later");
    let first = run_at(&pins, &rig.mountpoint(), &[]);
    fs::remove_dir_all(&pins).unwrap();
    let second = run_at(&pins, &rig.mountpoint(), &[]);
    end(first);
    let dump = program()
        .args(["dump-map", "--format=json", "--pin-dir"])
        .arg(&pins)
        .output()
        .unwrap();
    let owner: serde_json::Value = serde_json::from_slice(&dump.stdout).unwrap();
    assert_eq!(owner["owner"]["pid"], second.id());
    end(second);
    assert!(!pins.exists());
}

#[test]
fn pins_removed_by_hand_or_joined_by_others_are_no_error() {
    need_root();
    let rig = rig(|source| put(source, "clip", &content(1, 100)));
    let pins = pin_dir("hand");
    let removed = run_at(&pins, &rig.mountpoint(), &[]);
    fs::remove_dir_all(&pins).unwrap();
    end(removed);
    let joined = run_at(&pins, &rig.mountpoint(), &[]);
    fs::create_dir(pins.join("other")).unwrap();
    end(joined);
    assert!(!pins.join("meta").exists() && pins.join("other").exists());
    fs::remove_dir_all(&pins).unwrap();
}

#[test]
fn a_daemon_that_hangs_does_not_hang_run() {
    need_root();
    let rig = rig(|source| put(source, "clip", &content(1, 100)));
    let pins = pin_dir("hang");
    let run = run_at(&pins, &rig.mountpoint(), &[]);
    let daemon = Pid::from_raw(rig.daemon().unwrap() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    // A change of the mount table makes it look at its prefixes.
    let other = tempfile::tempdir().unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "tmpfs"]).arg(other.path());
    assert!(mount.status().unwrap().success());
    let mut run = run;
    kill(Pid::from_raw(run.id() as i32), Signal::SIGTERM).unwrap();
    let code = run.wait().unwrap().code();
    kill(daemon, Signal::SIGCONT).unwrap();
    let mut umount = Command::new("umount");
    assert!(umount.arg(other.path()).status().unwrap().success());
    assert_eq!(code, Some(0));
    assert!(!pins.exists());
}

#[test]
fn a_prefix_that_becomes_a_file_leaves_the_others_watched() {
    let rig = rig(|source| put(source, "clip", &content(1, 100)));
    let folder = tempfile::tempdir().unwrap();
    let odd = folder.path().join("odd");
    let prefix = format!("--prefix={}", odd.display());
    let mut tracking = Tracking::start(&rig.mountpoint(), &["--wait", &prefix]);
    fs::write(&odd, "a file").unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "tmpfs"]).arg(folder.path());
    assert!(mount.status().unwrap().success());
    let mut umount = Command::new("umount");
    assert!(umount.arg(folder.path()).status().unwrap().success());
    fs::read(rig.mountpoint().join("clip")).unwrap();
    let event = tracking.next_where(|line| line["event"] != "attach");
    assert_eq!(event["event"], "open", "{event}");
}

/// Stops a mount's daemon until it is dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(rig: &Rig) -> Self {
        let pid = Pid::from_raw(rig.daemon().unwrap() as i32);
        kill(pid, Signal::SIGSTOP).unwrap();
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

#[test]
fn a_prefix_that_hangs_keeps_no_other_from_being_tracked() {
    let healthy = rig(|source| put(source, "clip", b"clip"));
    let hangs = rig(|source| put(source, "sub/clip", b"clip"));
    let (point, below) = (healthy.mountpoint(), hangs.mountpoint().join("sub"));
    // Nobody has looked at it yet, so that the kernel knows nothing of it.
    let stopped = Stopped::new(&hangs);
    let both = ["--prefix", below.to_str().unwrap()];
    // Where all must be there it says which is not.
    let output = program()
        .args(["run", "--enable", "--prefix", point.to_str().unwrap()])
        .args(both)
        .output()
        .unwrap();
    assert_fails(&output, 3, "does not answer: does rclone hang?");
    assert!(stderr(&output).contains(below.to_str().unwrap()));

    let mut tracking = Tracking::start(&point, &["--wait", both[0], both[1]]);
    let open = |folder: &Path| Worker::start(folder, "os.open('clip',os.O_RDONLY)", &[]);
    let worker = open(&point);
    assert_eq!(
        dumped(&tracking.dump(), worker.pid()),
        truth(worker.pid(), &point)
    );
    // Mounts that come and go are looked at meanwhile.
    let other = rig(|source| put(source, "clip", b"clip"));
    drop(other);
    worker.kill();
    tracking.next_where(|line| line["event"] == "close");

    drop(stopped);
    let mounted = tracking.next_where(|line| line["event"] == "mount");
    assert_eq!(mounted["path"], json!(below));
    let worker = open(&below);
    assert_eq!(
        dumped(&tracking.dump(), worker.pid()),
        truth(worker.pid(), &below)
    );
    worker.kill();
    tracking.end(Signal::SIGTERM);
}
