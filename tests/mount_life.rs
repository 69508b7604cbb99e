//! `mount`: from its first refusal to its end, whatever ends it.
#![cfg(feature = "mount")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::clips::{CLIP, MIB, each_writable};
use common::exec::{PARTIAL, WHOLE, bytes_of, clips, each};
use common::reexport::*;
use common::{Tracking, Worker, assert_fails, eventually, fds, program, put, stderr};
use nix::libc::{ECONNABORTED, ENOTCONN};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Runs `mount` where it must not come to serve.
fn refused(source: &Path, point: &Path, args: &[&str], code: i32, message: &str) {
    assert_fails(&mount(source, point, args).output().unwrap(), code, message);
    let mut background = program();
    background.arg("mount").args(args).args([source, point]);
    assert_fails(&background.output().unwrap(), code, message);
}

#[test]
fn what_cannot_be_mounted_is_refused_with_the_reason() {
    let rig = clips();
    let source = rig.mountpoint();
    let folder = tempfile::tempdir().unwrap();
    let point = folder.path().join("m");
    refused(&source, &point, &[], 2, "m`: No such file");
    fs::create_dir(&point).unwrap();
    put(folder.path(), "file", b"x");
    refused(&source.join("no"), &point, &[], 2, "no`: No such file");
    refused(&source.join(CLIP), &point, &[], 2, "is no folder");
    refused(&source, &folder.path().join("file"), &[], 2, "is no folder");
    refused(folder.path(), &point, &[], 2, "within the other");
    refused(&source, &source.join("sub"), &[], 2, "within the other");
    refused(Path::new("/usr"), &point, &[], 3, "is on no rclone mount");
    refused(
        &source,
        &point,
        &["-o", "noexec,rw"],
        2,
        "-o rw: the mount is read-only",
    );
    refused(
        &source,
        &point,
        &["-o", "nonsense"],
        2,
        "an option given by -o",
    );
    let refuse = ["--passthrough=require", "--snapshot=auto"];
    refused(&source, &point, &refuse, 3, "makes no reflinks");
    let shown = Reexport::start(&source, &[]);
    refused(&source, &shown.path(), &[], 2, "is a mount point already");
    refused(
        &shown.path(),
        &point,
        &[],
        2,
        "is on a mount of vmafx-bypass already",
    );
    // Without the right to have the kernel read by itself.
    let mut few = Command::new("setpriv");
    few.args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"])
        .arg(env!("CARGO_BIN_EXE_vmafx-bypass"))
        .args(["mount", "-f", "--snapshot=copy", "--passthrough=require"])
        .args([&source, &point]);
    assert_fails(&few.output().unwrap(), 3, "CAP_SYS_ADMIN");
}

#[test]
fn a_writable_source_cannot_be_passed_through() {
    each_writable(MIB, &[], |rig, _| {
        let point = tempfile::tempdir().unwrap();
        let require = ["--passthrough=require", "--snapshot=copy"];
        refused(&rig.mountpoint(), point.path(), &require, 3, "is writable");
    });
}

#[test]
fn in_the_background_it_serves_until_it_is_unmounted() {
    let rig = clips();
    let point = tempfile::tempdir().unwrap();
    let (folder, log) = (point.path().join("m"), point.path().join("log"));
    fs::create_dir(&folder).unwrap();
    for unmount in ["umount", "fusermount3 -u", "umount -l"] {
        // Its own pipe is closed: who waits for its end does not wait for ours.
        let mut command = program();
        command.args(["mount", "--snapshot=copy"]);
        let output = command.args([&rig.mountpoint(), &folder]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!((output.stdout.len(), output.stderr.len()), (0, 0));
        assert!(fs::read(folder.join(CLIP)).unwrap() == bytes_of(CLIP));
        let script = format!("pgrep -f 'mount .*{}' >{}", folder.display(), log.display());
        assert!(shell(Path::new("/"), &script).status.success());
        let pids = fs::read_to_string(&log).unwrap();
        let unmounted = shell(Path::new("/"), &format!("{unmount} {}", folder.display()));
        assert!(unmounted.status.success(), "{}", stderr(&unmounted));
        let pid = pids.lines().next().unwrap();
        eventually("its end", || !Path::new("/proc").join(pid).exists());
        assert!(!folder.join(CLIP).exists());
    }
}

#[test]
fn signals_unmount_also_what_is_in_use() {
    let rig = clips();
    for args in [PASSED, RANGES] {
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let mut shown = Reexport::start(&rig.mountpoint(), args);
            fs::read(shown.join(CLIP)).unwrap();
            shown.signal(signal);
            let (status, summary) = shown.wait();
            assert_eq!(status.code(), Some(0));
            assert_eq!(summary["event"], "summary", "{summary}");
            assert!(!shown.is_mounted());
        }
        // timeout(1) tells both the process and its group: that is one signal.
        let mut shown = Reexport::start(&rig.mountpoint(), args);
        shown.signal(Signal::SIGINT);
        shown.signal(Signal::SIGTERM);
        let (status, summary) = shown.wait();
        assert_eq!(status.code(), Some(0));
        assert_eq!(summary["event"], "summary", "{summary}");
        // One has a clip open, and may go on for a second.
        let mut shown = Reexport::start(&rig.mountpoint(), args);
        let held = File::open(shown.join(CLIP)).unwrap();
        shown.signal(Signal::SIGTERM);
        eventually("it is unmounted", || !shown.is_mounted());
        let mut byte = [0];
        // Whether in time or not: right, or told.
        match held.read_exact_at(&mut byte, 100_000) {
            Ok(()) => assert_eq!(byte[0], bytes_of(CLIP)[100_000]),
            Err(e) => assert!(is_gone(&e), "{e}"),
        }
        let (status, summary) = shown.wait();
        assert_eq!(status.code(), Some(0));
        assert_eq!(summary["event"], "summary", "{summary}");
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(ENOTCONN | ECONNABORTED))
}

#[test]
fn when_it_is_killed_the_mount_is_dead_and_can_be_made_again() {
    let rig = clips();
    for args in [PASSED, RANGES] {
        let mut shown = Reexport::start(&rig.mountpoint(), args);
        let held = File::open(shown.join(CLIP)).unwrap();
        let mut bytes = [0; 16];
        held.read_exact_at(&mut bytes, 0).unwrap();
        shown.kill();
        // The kernel notices when the last of its threads is gone.
        eventually("a dead mount", || {
            fs::metadata(shown.join("b")).is_err_and(|e| is_gone(&e))
        });
        if let Err(e) = held.read_exact_at(&mut bytes, 2_000_000) {
            assert!(is_gone(&e), "{e}");
        } else {
            assert_eq!(bytes[..], bytes_of(CLIP)[2_000_000..][..16]);
        }
        refused(&rig.mountpoint(), &shown.path(), args, 3, "fusermount3 -u");
        drop(held);
        let unmounted = shell(
            Path::new("/"),
            &format!("fusermount3 -u {}", shown.path().display()),
        );
        assert!(unmounted.status.success(), "{}", stderr(&unmounted));
        let mut again = program();
        again.arg("mount").args(args);
        again.args([&rig.mountpoint(), &shown.path()]);
        assert!(again.status().unwrap().success());
        assert!(fs::read(shown.join(CLIP)).unwrap() == bytes_of(CLIP));
    }
}

#[test]
fn it_outlives_its_source_and_finds_it_again() {
    for args in [PASSED, RANGES] {
        for killed in [false, true] {
            let mut rig = clips();
            let shown = Reexport::start(&rig.mountpoint(), args);
            let held = File::open(shown.join(CLIP)).unwrap();
            if killed {
                rig.kill_daemon();
            } else {
                rig.unmount();
            }
            let gone = |name: &str| fs::read(shown.join(name)).is_err_and(|e| is_gone(&e));
            eventually("an error", || gone("b"));
            assert!(fs::read_dir(shown.path()).is_err_and(|e| is_gone(&e)));
            // What is proven needs rclone no more.
            let mut bytes = vec![0; 10_000];
            held.read_exact_at(&mut bytes, 1_000_000).unwrap();
            assert!(bytes == bytes_of(CLIP)[1_000_000..][..10_000]);
            rig.unmount();
            rig.mount().unwrap();
            eventually("the clips again", || {
                fs::read(shown.join("b")).is_ok_and(|bytes| bytes == bytes_of("b"))
            });
            for (name, _) in WHOLE {
                assert!(fs::read(shown.join(name)).unwrap() == bytes_of(name));
            }
            drop(held);
            let stats = shown.end();
            let way = if args == PASSED { "copy" } else { "ranges" };
            assert!(stats["opens"][way].as_u64() >= Some(2), "{stats}");
        }
    }
}

#[test]
fn readers_that_wait_for_the_source_hold_up_no_other() {
    for args in [PASSED, RANGES] {
        each(|rig| {
            let shown = Reexport::start(&rig.mountpoint(), args);
            let daemon = Pid::from_raw(rig.daemon().unwrap() as i32);
            // By ranges rclone is asked once a second whether a clip is current: on a
            // busy machine that may come in between.
            let tries = (0..10).map(|n| not_held_up(&shown, daemon, n));
            assert_eq!(tries.into_iter().find(|good| *good), Some(true));
        });
    }
}

/// Whether a clip is read while many readers of another wait for rclone; of the
/// other each time another part.
fn not_held_up(shown: &Reexport, daemon: Pid, n: usize) -> bool {
    let expected = bytes_of(PARTIAL);
    let held = File::open(shown.join(CLIP)).unwrap();
    held.read_exact_at(&mut [0], 0).unwrap();
    // Known to the kernel: rclone need not be asked for their names.
    let partial: Vec<_> = (0..20)
        .map(|_| File::open(shown.join(PARTIAL)).unwrap())
        .collect();
    kill(daemon, Signal::SIGSTOP).unwrap();
    let (right, waited) = std::thread::scope(|scope| {
        let waiting: Vec<_> = partial
            .iter()
            .enumerate()
            .map(|(k, file)| {
                let offset = expected.len() - (k + 1) * 200_000 - (n + 1) * 16_384;
                scope.spawn(move || {
                    let mut bytes = vec![0; 4096];
                    file.read_exact_at(&mut bytes, offset as u64).unwrap();
                    (offset, bytes)
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(200));
        let reader = scope.spawn(|| {
            let mut bytes = vec![0; 100_000];
            held.read_exact_at(&mut bytes, 2_000_000).unwrap();
            bytes == bytes_of(CLIP)[2_000_000..][..100_000]
        });
        std::thread::sleep(Duration::from_millis(500));
        let in_time = reader.is_finished();
        let waited = waiting.iter().filter(|thread| !thread.is_finished());
        let waited = waited.count();
        kill(daemon, Signal::SIGCONT).unwrap();
        assert!(reader.join().unwrap(), "wrong bytes");
        for thread in waiting {
            let (offset, bytes) = thread.join().unwrap();
            assert!(bytes == expected[offset..][..4096]);
        }
        (in_time, waited)
    });
    right && waited > 10
}

#[test]
fn descriptors_and_memory_stay_as_they_are() {
    let rig = clips();
    for args in [PASSED, RANGES] {
        let shown = Reexport::start(&rig.mountpoint(), args);
        let opens = |count: usize| {
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let shown = &shown;
                    scope.spawn(move || {
                        for n in 0..count / 4 {
                            let (name, size) = WHOLE[(n + thread) % 3];
                            let file = File::open(shown.join(name)).unwrap();
                            let mut byte = [0];
                            file.read_exact_at(&mut byte, (n * 31 % size) as u64)
                                .unwrap();
                        }
                    });
                }
            });
        };
        opens(4_000);
        // Releases come after close(2).
        let settled = || {
            eventually("all closed", || shown.descriptors() < 200);
            (shown.descriptors(), shown.resident())
        };
        let (descriptors, resident) = settled();
        opens(12_000);
        let (after, memory) = settled();
        assert!(after <= descriptors + 20, "{descriptors} {after}");
        assert!(memory < resident + (8 << 20), "{resident} {memory}");
        let stats = shown.end();
        assert_eq!(stats["failed"], 0, "{stats}");
    }
}

#[test]
fn only_its_own_mount_is_unmounted() {
    let rig = clips();
    let mut shown = Reexport::start(&rig.mountpoint(), RANGES);
    // In use, it goes on being served when it is in nobody's tree any more.
    let held = File::open(shown.join(CLIP)).unwrap();
    let point = shown.path().display().to_string();
    let script =
        format!("umount -l {point} && mount -t tmpfs another {point} && touch {point}/here");
    let output = shell(Path::new("/"), &script);
    assert!(output.status.success(), "{}", stderr(&output));
    let mut bytes = [0; 16];
    held.read_exact_at(&mut bytes, 1_000_000).unwrap();
    assert_eq!(bytes[..], bytes_of(CLIP)[1_000_000..][..16]);
    shown.signal(Signal::SIGTERM);
    let (status, _) = shown.wait();
    assert_eq!(status.code(), Some(0));
    assert!(shown.join("here").exists(), "another's mount stays");
}

#[test]
fn a_service_manager_is_told() {
    let rig = clips();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("notify");
    let messages = UnixDatagram::bind(&socket).unwrap();
    let mut buffer = [0; 100];
    let mut told = |wanted: &str| {
        messages.set_read_timeout(Some(common::patience())).unwrap();
        let n = messages.recv(&mut buffer).unwrap();
        assert_eq!(std::str::from_utf8(&buffer[..n]).unwrap().trim(), wanted);
    };
    let shown = Reexport::start_by(&rig.mountpoint(), PASSED, |command| {
        command.env("NOTIFY_SOCKET", &socket);
    });
    told("READY=1");
    shown.end();
    told("STOPPING=1");
}

#[test]
fn the_other_commands_know_it() {
    let rig = clips();
    let shown = Reexport::start(&rig.mountpoint(), PASSED);
    for name in [CLIP, PARTIAL] {
        let mut explain = program();
        explain
            .args(["explain", "--format=json"])
            .arg(shown.join(name));
        let output = explain.output().unwrap();
        let told: Value = serde_json::from_slice(&output.stdout).expect("a report");
        assert_eq!(told["reexport"]["path"], json!(shown.join(name)), "{told}");
        assert_eq!(told["path"], json!(rig.mountpoint().join(name)), "{told}");
    }
    // Who has clips open here is tracked as on any mount.
    let tracking = Tracking::start(&shown.path(), &[]);
    let worker = Worker::start(&shown.path(), "fd=os.open('clip',os.O_RDONLY)", &[]);
    let dump = tracking.dump();
    let open = fds::dumped(&dump, worker.pid());
    assert_eq!(open, [(3, shown.join(CLIP))], "{dump}");
    worker.end();
    tracking.end(Signal::SIGTERM);
    let read = program()
        .args(["-q", "read"])
        .arg(shown.join(CLIP))
        .output()
        .unwrap();
    assert!(read.stdout == bytes_of(CLIP), "{}", stderr(&read));
}
