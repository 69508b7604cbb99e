//! `mount` where it is hard: what is reached without a name, mounts below mounts,
//! and starts and ends that go wrong.
#![cfg(feature = "mount")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::clips::{CLIP, cache_file, options};
use common::exec::{bytes_of, clips, each};
use common::reexport::*;
use common::{assert_fails, content, eventually, program, put, rig_with, stderr};
use nix::libc::{ESTALE, EXDEV};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmafx_bypass::rig::RigOptions;

/// Opens anew what a descriptor refers to, whatever its name leads to.
fn again(file: &File) -> std::io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn is_right(file: &File, bytes: &[u8]) {
    for offset in [0, bytes.len() / 2, bytes.len() - 5000] {
        let mut part = vec![0; 5000];
        file.read_exact_at(&mut part, offset as u64).unwrap();
        assert!(part == bytes[offset..][..5000]);
    }
}

#[test]
fn what_is_reached_without_its_name_is_the_same_version_or_stale() {
    const OTHER: &str = "sub/deep/other";
    each(|rig| {
        let bytes = bytes_of(OTHER);
        // Not for both of them.
        let args = ["--snapshot=copy", "--copy-budget=3020000"];
        let shown = Reexport::start(&rig.mountpoint(), &args);
        let first = File::open(shown.join(CLIP)).unwrap();
        let ranges = File::open(shown.join(OTHER)).unwrap();
        assert_eq!(shown.stats()["by_reason"]["budget"], 1, "{}", shown.stats());
        is_right(&again(&ranges).unwrap(), &bytes);
        assert_eq!((shown.opens("ranges"), shown.opens("copy")), (2, 1));
        drop(first);
        eventually("passed through", || {
            drop(File::open(shown.join(OTHER)).unwrap());
            shown.opens("copy") == 2
        });
        let whole = File::open(shown.join(OTHER)).unwrap();
        // By the descriptor's own node it cannot be.
        let before = shown.opens("ranges");
        is_right(&again(&ranges).unwrap(), &bytes);
        is_right(&again(&whole).unwrap(), &bytes);
        assert_eq!(
            (shown.opens("ranges"), shown.opens("copy")),
            (before + 1, 4)
        );
        assert_eq!(shown.stats()["by_reason"]["busy"], 1, "{}", shown.stats());
        drop(ranges);
        for tree in ["vfs", "vfsMeta"] {
            fs::remove_file(cache_file(rig, tree, "other")).unwrap();
        }
        // Once a second it is proven anew.
        std::thread::sleep(Duration::from_millis(1100));
        match again(&whole) {
            Ok(file) => is_right(&file, &bytes),
            Err(e) => assert_eq!(e.raw_os_error(), Some(ESTALE)),
        }
        is_right(&whole, &bytes);
        is_right(&File::open(shown.join(OTHER)).unwrap(), &bytes);
    });
}

#[test]
fn a_source_that_becomes_writable_is_read_anew_each_time() {
    let mut rig = clips();
    let shown = Reexport::start(&rig.mountpoint(), PASSED);
    let held = File::open(shown.join(CLIP)).unwrap();
    let bytes = bytes_of(CLIP);
    rig.unmount();
    rig.set_read_only(false);
    rig.mount().unwrap();
    eventually("the clip again", || {
        File::open(shown.join(CLIP)).is_ok_and(|file| {
            is_right(&file, &bytes);
            true
        })
    });
    is_right(&held, &bytes);
    let error = again(&held).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(ESTALE));
    assert_eq!(shown.opens("copy"), 1);
    assert!(shown.opens("direct") >= 1);
    // Mapped for others to see, it keeps nobody from being passed through later.
    let direct = File::open(shown.join(CLIP)).unwrap();
    let map = common::snapshots::Map::of(&direct);
    rig.unmount();
    rig.set_read_only(true);
    rig.mount().unwrap();
    eventually("passed through again", || {
        File::open(shown.join(CLIP)).is_ok_and(|file| {
            is_right(&file, &bytes);
            shown.opens("copy") >= 2
        })
    });
    drop(map);
}

#[test]
fn what_is_mounted_below_the_source_is_a_name_alone() {
    let rig = clips();
    let shown = Reexport::start(&rig.mountpoint(), PASSED);
    let sub = rig.mountpoint().join("sub");
    let mut mounted = Command::new("mount");
    mounted.args(["-t", "tmpfs", "below"]).arg(&sub);
    assert!(mounted.status().unwrap().success());
    let names = |script: &str| {
        let output = shell(&shown.path(), script);
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    // With attributes, and without.
    let listed = [
        names("ls -1"),
        names("python3 -c 'import os; print(*sorted(os.listdir()),sep=chr(10))'"),
        names("ls -1f | grep -v '^\\.' | LC_ALL=C sort"),
    ];
    let error = fs::metadata(shown.join("sub")).unwrap_err();
    let inside = fs::metadata(shown.join("sub/deep")).unwrap_err();
    let unmounted = Command::new("umount").arg(&sub).status().unwrap();
    assert!(unmounted.success());
    for listed in listed {
        assert_eq!(listed, "b\nclip\npartial\nsub\n");
    }
    assert_eq!(error.raw_os_error(), Some(EXDEV));
    assert_eq!(inside.raw_os_error(), Some(EXDEV));
    eventually("the folder itself", || {
        fs::read(shown.join("sub/deep/other")).is_ok_and(|b| b == bytes_of("sub/deep/other"))
    });
}

/// A folder to mount at.
fn point() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let point = folder.path().join("m");
    fs::create_dir(&point).unwrap();
    (folder, point)
}

fn mounts_at(point: &Path) -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.matches(&format!(" {} ", point.display())).count()
}

#[test]
fn what_cannot_be_told_leaves_no_dead_mount() {
    let rig = clips();
    let (_folder, point) = point();
    let mut command = mount(&rig.mountpoint(), &point, PASSED);
    command.stdout(File::options().write(true).open("/dev/full").unwrap());
    assert_fails(&command.output().unwrap(), 1, "No space left");
    assert_eq!(mounts_at(&point), 0);
    // Nobody reads it: it is served.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = mount(&rig.mountpoint(), &point, PASSED);
    let mut child = command.stdout(writer).spawn().unwrap();
    eventually("the clip", || {
        fs::read(point.join(CLIP)).is_ok_and(|bytes| bytes == bytes_of(CLIP))
    });
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(mounts_at(&point), 0);
}

#[test]
fn a_terminals_signals_unmount_and_an_aborted_connection_is_told() {
    let rig = clips();
    for signal in [Signal::SIGHUP, Signal::SIGQUIT] {
        let mut shown = Reexport::start(&rig.mountpoint(), PASSED);
        fs::read(shown.join(CLIP)).unwrap();
        shown.signal(signal);
        let (status, _) = shown.wait();
        assert_eq!(status.code(), Some(0));
        assert!(!shown.is_mounted());
    }
    let control = tempfile::tempdir().unwrap();
    let mut mounted = Command::new("mount");
    mounted.args(["-t", "fusectl", "none"]).arg(control.path());
    assert!(mounted.status().unwrap().success());
    let mut shown = Reexport::start(&rig.mountpoint(), PASSED);
    let dev = std::os::unix::fs::MetadataExt::dev(&fs::metadata(shown.path()).unwrap());
    let abort = control
        .path()
        .join(format!("{}/abort", rustix::fs::minor(dev)));
    fs::write(abort, "1").unwrap();
    let (status, _) = shown.wait();
    let unmounted = Command::new("umount").arg(control.path()).status();
    assert!(unmounted.unwrap().success());
    assert_eq!(status.code(), Some(1));
    assert!(!shown.is_mounted());
}

#[test]
fn in_the_background_it_takes_nothing_along() {
    let rig = clips();
    let (folder, point) = point();
    let program = env!("CARGO_BIN_EXE_vmafx-bypass");
    // `--` ends the options; and whoever waits for descriptor 9 does not wait for it.
    let script = format!(
        "{{ {program} mount -- {} {} 9>&1 >/dev/null; }} | cat; echo done",
        rig.mountpoint().display(),
        point.display()
    );
    let began = Instant::now();
    let mut bash = Command::new("timeout");
    bash.args(["60", "bash", "-c", &script]);
    let output = bash.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.stdout, b"done\n", "{}", stderr(&output));
    assert!(began.elapsed() < Duration::from_secs(50));
    assert!(fs::read(point.join(CLIP)).unwrap() == bytes_of(CLIP));
    let unmounted = Command::new("fusermount3").arg("-u").arg(&point).status();
    assert!(unmounted.unwrap().success());
    drop(folder);
}

#[test]
fn a_source_that_hangs_at_the_start_can_be_left() {
    let rig = clips();
    let (_folder, point) = point();
    let daemon = Pid::from_raw(rig.daemon().unwrap() as i32);
    // Not in the kernel's memory by now: rclone has to be asked.
    std::thread::sleep(Duration::from_millis(1500));
    kill(daemon, Signal::SIGSTOP).unwrap();
    let mut child = mount(&rig.mountpoint().join("sub"), &point, PASSED)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let mut ended = None;
    let began = Instant::now();
    while ended.is_none() && began.elapsed() < Duration::from_secs(30) {
        ended = child.try_wait().unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    kill(daemon, Signal::SIGCONT).unwrap();
    let _ = child.wait();
    assert_eq!(ended.expect("it must end").code(), Some(143));
    assert_eq!(mounts_at(&point), 0);
}

#[test]
fn of_many_that_mount_at_one_place_one_does() {
    let rig = clips();
    let (_folder, point) = point();
    let children: Vec<_> = (0..8)
        .map(|_| {
            let mut command = program();
            command.arg("mount").args([&rig.mountpoint(), &point]);
            command.stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let outputs = children.into_iter().map(|c| c.wait_with_output().unwrap());
    let mut mounted = 0;
    for output in outputs {
        match output.status.code() {
            Some(0) => mounted += 1,
            Some(2) => assert!(stderr(&output).contains("is a mount point already")),
            Some(3) => assert!(stderr(&output).contains("mounts there at the moment")),
            code => panic!("{code:?}: {}", stderr(&output)),
        }
    }
    assert_eq!((mounted, mounts_at(&point)), (1, 1));
    let unmounted = Command::new("fusermount3").arg("-u").arg(&point).status();
    assert!(unmounted.unwrap().success());
    assert_eq!(mounts_at(&point), 0);
}

#[test]
fn mounts_of_others_are_not_unmounted_but_waited_for() {
    let rig = clips();
    let tmpfs = |point: &Path| {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "another"]).arg(point);
        assert!(mount.status().unwrap().success());
    };
    let umount = |point: &Path| {
        let status = Command::new("umount").arg(point).status();
        assert!(status.unwrap().success());
    };
    // Above it, and below it.
    for below in ["", "sub"] {
        let mut shown = Reexport::start(&rig.mountpoint(), PASSED);
        let other = if below.is_empty() {
            shown.path()
        } else {
            shown.join(below)
        };
        tmpfs(&other);
        fs::write(other.join("data"), "x").unwrap();
        let held = File::open(other.join("data")).unwrap();
        shown.signal(Signal::SIGTERM);
        // Longer than what is open may keep it.
        std::thread::sleep(Duration::from_secs(2));
        assert!(shown.is_mounted());
        assert_eq!(fs::read(other.join("data")).unwrap(), b"x");
        drop(held);
        umount(&other);
        let (status, _) = shown.wait();
        assert_eq!(status.code(), Some(0));
        assert!(!shown.is_mounted());
    }
}

#[test]
fn what_is_evicted_is_let_go_also_when_nobody_opens_anything() {
    let rig = clips();
    let shown = Reexport::start(&rig.mountpoint(), PASSED);
    for name in [CLIP, "b", "sub/deep/other"] {
        fs::read(shown.join(name)).unwrap();
    }
    let deleted = || {
        let folder = format!("/proc/{}/fd", shown.pid());
        let links = fs::read_dir(folder).unwrap();
        links
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .filter(|target| target.to_string_lossy().contains("vfs"))
            .count()
    };
    assert!(deleted() >= 6, "{}", deleted());
    for tree in ["vfs", "vfsMeta"] {
        fs::remove_dir_all(rig.cache().join(tree)).unwrap();
    }
    eventually("nothing is held", || deleted() == 0);
}

/// Sets a flag, also when a test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn clips_that_change_while_they_are_listed_are_read_to_their_end() {
    let remote = tempfile::tempdir().unwrap();
    for n in 0..200 {
        put(remote.path(), &format!("f{n}"), b"x");
    }
    let size_of = |n: u32| 100_000 + n as usize % 7 * 30_000;
    let write = |n: u32| {
        let new = remote.path().join(".new");
        fs::write(&new, content(n, size_of(n))).unwrap();
        fs::rename(new, remote.path().join(CLIP)).unwrap();
    };
    write(0);
    let arguments = ["--attr-timeout=0s", "--dir-cache-time=100ms"];
    let options = RigOptions {
        remote: Some(remote.path().to_str().unwrap().into()),
        ..options(Path::new("rclone"), &arguments)
    };
    let rig = rig_with(options, |_| ());
    for args in [PASSED, RANGES] {
        let shown = Reexport::start(&rig.mountpoint(), args);
        let stop = AtomicBool::new(false);
        let goes_on = || !stop.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            let _stop = Stop(&stop);
            scope.spawn(|| {
                while goes_on() {
                    shell(&shown.path(), "ls -l >/dev/null");
                }
            });
            scope.spawn(|| {
                for n in (0..7).cycle() {
                    if !goes_on() {
                        break;
                    }
                    write(n);
                    std::thread::sleep(Duration::from_millis(300));
                }
            });
            let began = Instant::now();
            let mut opens = 0;
            while began.elapsed() < Duration::from_secs(6) {
                let Ok(file) = File::open(shown.join(CLIP)) else {
                    continue;
                };
                let size = file.metadata().unwrap().len() as usize;
                let mut bytes = Vec::new();
                if (&file).read_to_end(&mut bytes).is_ok() {
                    assert_eq!(bytes.len(), size, "an end that is none");
                    let version = (0..7).find(|n| size_of(*n) == size).unwrap();
                    assert!(bytes == content(version, size), "another version's bytes");
                    opens += 1;
                }
            }
            assert!(opens > 20, "only {opens}");
        });
    }
}
