//! Every system call of the reader, failed in turn.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used)]

mod common;
#[path = "faults/driver.rs"]
mod driver;
#[path = "faults/expect.rs"]
mod expect;
#[path = "faults/matrix.rs"]
mod matrix;
#[path = "faults/second.rs"]
mod second;
#[path = "faults/sites.rs"]
mod sites;
#[path = "faults/tracer.rs"]
mod tracer;
#[path = "faults/watchdog.rs"]
mod watchdog;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use common::alike::{Holder, becomes_bypassed, put_alike, remote};
use common::clips::*;
use common::{content, eventually, need_root, put, rclones, rig_with};
use driver::{BLOCK, Driver, PIECE};
use matrix::Verdicts;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use second::Second;
use serde_json::Value;
use tracer::{Fault, Kind, Traced};
use vmafx_bypass::mounts::MountTable;
use vmafx_bypass::rig::{Rig, RigOptions};

/// Set where this program was started again in namespaces of its own: to the
/// rclone to test with.
const ALONE: &str = "FAULTS_ALONE";

/// A time of the metadata, seconds from now: its stat then tells a change.
const A_MINUTE_AGO: i64 = -60;
/// Another: it counts as being written just now, so that its bytes are compared.
const IN_AN_HOUR: i64 = 3_600;

/// Runs a test once for each rclone, where no other process and no other mount
/// is seen: calls are then the same from run to run. All at once; whatever a
/// test leaves behind ends with its namespaces.
fn alone(test: &str, body: impl FnOnce(&Path)) {
    if let Some(rclone) = std::env::var_os(ALONE) {
        // The namespace began with a private copy of all mounts. That of another
        // test's mount would vanish at some time, which locates mounts anew.
        for mount in MountTable::read().unwrap().iter().filter(|m| m.is_rclone()) {
            umount2(&mount.point, MntFlags::MNT_DETACH).unwrap();
        }
        return body(Path::new(&rclone));
    }
    need_root();
    let program = std::env::current_exe().unwrap();
    let runs: Vec<_> = rclones()
        .into_iter()
        .map(|rclone| {
            let child = Command::new("setpriv")
                .args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid"])
                .args(["--fork", "--mount-proc", "--kill-child"])
                .arg(&program)
                .args(["--exact", test, "--nocapture", "--test-threads=1"])
                .env(ALONE, &rclone)
                .spawn()
                .unwrap();
            (rclone, child)
        })
        .collect();
    for (rclone, mut child) in runs {
        assert!(child.wait().unwrap().success(), "with {}", rclone.display());
    }
}

/// A clip of more than one piece, cached whole, and held open so that rclone
/// leaves its metadata alone.
fn cached(rclone: &Path) -> (Rig, File) {
    let bytes = content(1, PIECE + 2 * BLOCK + 77);
    let rig = rig_with(options(rclone, &[]), |s| put(s, CLIP, &bytes));
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let held = File::open(clip(&rig)).unwrap();
    held.read_exact_at(&mut [0], 0).unwrap();
    (rig, held)
}

/// As [`cached`], on a writable mount.
fn cached_writable(rclone: &Path) -> (Rig, File) {
    let bytes = content(1, PIECE + 2 * BLOCK + 77);
    let options = RigOptions {
        read_only: false,
        ..remote(rclone, ":local:{folder}/source", &[])
    };
    let rig = rig_with(options, |s| put(s, CLIP, &bytes));
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let held = File::open(clip(&rig)).unwrap();
    held.read_exact_at(&mut [0], 0).unwrap();
    (rig, held)
}

/// Sets the time of the clip's metadata, which ends its proofs: some seconds
/// ago, or in the future, where it counts as being written just now.
fn set_metadata_time(rig: &Rig, seconds: i64) {
    let metadata = File::options()
        .write(true)
        .open(cache_file(rig, "vfsMeta", CLIP))
        .unwrap();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let now = SystemTime::now();
    let time = if seconds < 0 {
        now - distance
    } else {
        now + distance
    };
    metadata.set_modified(time).unwrap();
}

/// How bytes come from a writable mount if no call fails: some through FUSE.
const ON_WRITABLE: &str = "edge";

/// Whether a call's failure is looked at for this way: that of locating a
/// mount's daemon is the same on a writable mount.
fn is_looked_at(way: &str, call: &str) -> bool {
    way != ON_WRITABLE || !call.contains("/proc") || call.contains("DATA")
}

/// Fails each call of `command` on a warm driver, and judges. `way`: how bytes
/// come if none fails.
fn fail_each_call(traced: &mut Traced, command: &str, way: &str, verdicts: &mut Verdicts) {
    let plain = traced.run(command, None);
    assert_eq!(matrix::outcome(&plain), way, "{}", plain.report);
    for fault in matrix::faults(&plain.calls, |call| is_looked_at(way, call)) {
        let mut episode = traced.run(command, Some(&fault));
        if episode.failed == 0 {
            // The fault before this one has made it locate the mount anew.
            episode = traced.run(command, Some(&fault));
        }
        verdicts.add(command, &fault, &episode, &plain, 0);
    }
}

/// As cargo runs it, it checks that the driver tells right from wrong bytes;
/// started by [`driver::Driver`], it is the driver.
#[test]
fn the_driver_runs_its_script() {
    if driver::run_if_started_as_one() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clip");
    let bytes = content(1, 8 * BLOCK);
    std::fs::write(&path, &bytes).unwrap();
    let report = driver::Script::new(&path, &bytes).execute("whole", 0);
    assert_eq!(report["by_reason"]["not_fuse"], report["bytes"]);
    assert!(report["wrong_at"].is_null() && report["error"].is_null());
    let mut other = bytes;
    other[BLOCK + 5] ^= 1;
    let report = driver::Script::new(&path, &other).execute("whole", 0);
    assert_eq!(report["wrong_at"], BLOCK);
}

#[test]
fn each_call_of_a_files_life_may_fail() {
    alone("each_call_of_a_files_life_may_fail", |rclone| {
        let (rig, _held) = cached(rclone);
        let mut traced = Traced::start(&rig);
        let mut verdicts = Verdicts::default();
        // The first one locates the mount, which the process then remembers.
        traced.run("whole", None);
        for time in [A_MINUTE_AGO, IN_AN_HOUR] {
            set_metadata_time(&rig, time);
            fail_each_call(&mut traced, "whole", "cache", &mut verdicts);
        }
        fail_each_call(&mut traced, "fd", "cache", &mut verdicts);
        fail_each_call(&mut traced, "fuse", "disabled", &mut verdicts);
        verdicts.conclude("a file's life", 1_500);
    });
}

#[test]
fn each_call_of_a_life_on_a_writable_mount_may_fail() {
    alone(
        "each_call_of_a_life_on_a_writable_mount_may_fail",
        |rclone| {
            let (rig, _held) = cached_writable(rclone);
            let mut traced = Traced::start(&rig);
            let mut verdicts = Verdicts::default();
            traced.run("whole", None);
            set_metadata_time(&rig, A_MINUTE_AGO);
            let plain = traced.run("whole", None);
            for call in [
                "open: statx BARRIER",
                "open: cachestat of CLIP",
                "read: cachestat of CLIP",
                "read: fstat of METADATA",
            ] {
                assert!(plain.calls.iter().any(|made| made == call), "{call}");
            }
            fail_each_call(&mut traced, "whole", ON_WRITABLE, &mut verdicts);
            fail_each_new_look(&mut traced, &rig, ON_WRITABLE, true, &mut verdicts);
            verdicts.conclude("a writable mount", 700);
        },
    );
}

#[test]
fn each_call_of_a_new_look_may_fail() {
    alone("each_call_of_a_new_look_may_fail", |rclone| {
        let (rig, _held) = cached(rclone);
        let mut traced = Traced::start(&rig);
        let mut verdicts = Verdicts::default();
        for touched in [false, true] {
            fail_each_new_look(&mut traced, &rig, "cache", touched, &mut verdicts);
        }
        verdicts.conclude("a new look", 600);
    });
}

/// Fails each call of a read of a file that was opened and read at once, a
/// second later: when its metadata is as it was, and when it was `touched`.
fn fail_each_new_look(
    traced: &mut Traced,
    rig: &Rig,
    way: &str,
    touched: bool,
    verdicts: &mut Verdicts,
) {
    let prepare = |traced: &mut Traced, count: usize| {
        set_metadata_time(rig, A_MINUTE_AGO);
        let report = traced.run(&format!("prepare {count}"), None).report;
        assert_eq!(report["refusals"], serde_json::json!([]));
        if touched {
            set_metadata_time(rig, A_MINUTE_AGO + 1);
        }
    };
    prepare(traced, 1);
    let plain = traced.run("again", None);
    assert_eq!(matrix::outcome(&plain), way, "{}", plain.report);
    let proven_anew = plain.calls.iter().any(|call| call.contains("DAEMON"));
    assert_eq!(proven_anew, touched, "{:?}", plain.calls);
    let faults = matrix::faults(&plain.calls, |call| is_looked_at(way, call));
    for batch in faults.chunks(150) {
        prepare(traced, batch.len());
        for (index, fault) in batch.iter().enumerate() {
            if fault.site.ends_with(": poll") {
                // The fault before this one may have closed what it asks.
                traced.run("open", None);
            }
            let episode = traced.run("again", Some(fault));
            let others = batch.len() - 1 - index;
            verdicts.add("again", fault, &episode, &plain, others);
        }
    }
}

#[test]
fn each_call_of_locating_a_mount_may_fail() {
    alone("each_call_of_locating_a_mount_may_fail", |rclone| {
        let (rig, _held) = cached(rclone);
        let mut traced = Traced::start(&rig);
        traced.run("whole", None);
        let warm: BTreeSet<String> = traced.run("whole", None).calls.into_iter().collect();
        let mut verdicts = Verdicts::default();
        forget_mounts(&mut traced);
        let plain = traced.run("whole", None);
        for fault in matrix::faults(&plain.calls, |call| !warm.contains(call)) {
            forget_mounts(&mut traced);
            let episode = traced.run("whole", Some(&fault));
            verdicts.add("whole", &fault, &episode, &plain, 0);
        }
        verdicts.conclude("locating", 500);
    });
}

/// Lets the driver forget which mounts it has located: it does when it cannot
/// ask the kernel whether they have changed.
fn forget_mounts(traced: &mut Traced) {
    let fault = Fault {
        site: "open: poll".into(),
        occurrence: 1,
        kind: Kind::Error(Errno::EIO),
    };
    let mut episode = traced.run("open", Some(&fault));
    if episode.failed == 0 {
        // It had forgotten already, and this open has located the mount again.
        episode = traced.run("open", Some(&fault));
    }
    assert_eq!(episode.failed, 1, "{:?}", episode.calls);
}

/// The `read` command under faults of all calls of one kind on one file, made
/// by strace: exit code, one line on standard error, and bytes.
#[test]
fn the_read_command_says_what_failed() {
    alone("the_read_command_says_what_failed", |rclone| {
        let (rig, _held) = cached(rclone);
        let expected = std::fs::read(rig.source().join(CLIP)).unwrap();
        let (clip, data) = (clip(&rig), cache_file(&rig, "vfs", CLIP));
        let metadata = cache_file(&rig, "vfsMeta", CLIP);
        for (file, call, error, engine, code, message) in [
            (&clip, "openat", "EIO", "auto", 1, "Input/output error"),
            (&clip, "openat", "EACCES", "auto", 1, "Permission denied"),
            (&clip, "openat", "ENOTCONN", "auto", 1, "not connected"),
            (&clip, "statx", "ESTALE", "auto", 1, "Stale file handle"),
            (&clip, "pread64", "EIO", "fuse", 1, "Input/output error"),
            (&clip, "pread64", "ENOTCONN", "auto", 0, "io_error"),
            (&data, "pread64", "EIO", "auto", 0, "io_error"),
            (&data, "lseek", "EIO", "auto", 0, "io_error"),
            (&data, "fstat", "ESTALE", "auto", 0, "io_error"),
            (&metadata, "openat", "EACCES", "auto", 0, "permission"),
            (&metadata, "openat", "ENOENT", "auto", 0, "no_metadata"),
            (&metadata, "openat", "EIO", "auto", 0, "io_error"),
        ] {
            let what = format!("{call} of {} with {error}", file.display());
            // A prime that fails once: then all else by the same call works.
            let when = if code == 0 && file == &clip {
                ":when=1"
            } else {
                ""
            };
            let output = Command::new("strace")
                .args(["-f", "-qq", "-o", "/dev/null", "-P"])
                .arg(file)
                .args(["-e", &format!("inject={call}:error={error}{when}")])
                .arg(env!("CARGO_BIN_EXE_vmafx-bypass"))
                .args(["read", "--engine", engine])
                .arg(&clip)
                .env_remove("VMAFX_EBPF_BYPASS")
                .output()
                .unwrap();
            let stderr = common::stderr(&output);
            assert_eq!(output.status.code(), Some(code), "{what}: {stderr}");
            assert_eq!(stderr.trim_end().lines().count(), 1, "{what}: {stderr}");
            assert!(stderr.contains(message), "{what}: {stderr}");
            assert!(stderr.contains(clip.to_str().unwrap()), "{what}: {stderr}");
            let wanted: &[u8] = if code == 0 { &expected } else { &[] };
            assert!(output.stdout == wanted, "{what}: other bytes");
        }
    });
}

/// The limit at which a process can open so many more descriptors.
fn limit_for(pid: u32, more: usize) -> usize {
    let open: BTreeSet<usize> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect();
    let free = (0..).filter(|number| !open.contains(number));
    free.take(more).last().map_or(0, |last| last + 1)
}

fn assert_right(report: &Value, what: &str) {
    assert!(report["wrong_at"].is_null(), "{what}: {report}");
    assert!(report["error"].is_null(), "{what}: {report}");
    let number = |name: &str| report[name].as_u64().unwrap();
    assert!(number("bytes") > 0, "{what}: {report}");
    assert_eq!(number("bytes"), number("cache") + number("fuse"), "{what}");
}

#[test]
fn without_descriptors_files_are_read_through_fuse() {
    alone(
        "without_descriptors_files_are_read_through_fuse",
        |rclone| {
            let (rig, _held) = cached(rclone);
            let mut driver = Driver::start(&clip(&rig), &rig.source().join(CLIP));
            let plenty = 1_000;
            let mut ways = Vec::new();
            for more in 0..12 {
                let limit = limit_for(driver.pid(), more);
                driver.ask(&format!("nofile {limit}"));
                let report = driver.ask("whole");
                if more == 0 {
                    let error = report["open_error"].as_str().unwrap();
                    assert!(error.ends_with("(os error 24)"), "{error}");
                    continue;
                }
                assert_right(&report, &format!("{more} descriptors"));
                ways.push(report["by_reason"].to_string());
                driver.ask(&format!("nofile {plenty}"));
            }
            println!("by descriptors left: {ways:?}");
            assert_ne!(ways.first().unwrap(), "{}");
            assert_eq!(ways.last().unwrap(), "{}", "{ways:?}");

            // And where a proof has to be made anew.
            set_metadata_time(&rig, A_MINUTE_AGO);
            driver.ask("prepare 1");
            set_metadata_time(&rig, A_MINUTE_AGO + 1);
            let limit = limit_for(driver.pid(), 0);
            driver.ask(&format!("nofile {limit}"));
            let report = driver.ask("reopen");
            assert_right(&report, "a new proof");
            assert_eq!(report["cache"], 0, "{report}");
            driver.ask(&format!("nofile {plenty}"));
            eventually("a new proof", || {
                let report = driver.ask("reopen");
                assert_right(&report, "after a new proof");
                report["fuse"] == 0
            });
        },
    );
}

#[test]
fn a_storm_of_signals_changes_no_byte() {
    alone("a_storm_of_signals_changes_no_byte", |rclone| {
        let (rig, _held) = cached(rclone);
        let mut driver = Driver::start(&clip(&rig), &rig.source().join(CLIP));
        for restart in [0, 1] {
            driver.ask(&format!("storm {restart}"));
            let mut signals = 0;
            while signals < 1_000 {
                for command in ["whole", "fd", "fuse"] {
                    let report = driver.ask(command);
                    assert_right(&report, command);
                    let way = report["by_reason"].as_object().unwrap();
                    let mut reasons = way.keys().map(String::as_str);
                    let fitting = if command == "fuse" {
                        "disabled"
                    } else {
                        "io_error"
                    };
                    assert!(reasons.all(|reason| reason == fitting), "{report}");
                }
                signals = driver.ask("signals")["signals"].as_u64().unwrap();
            }
            driver.ask("calm");
        }
    });
}

/// The daemon, halted until this is dropped.
struct Halted(Pid);

impl Halted {
    fn new(rig: &Rig) -> Self {
        let daemon = Pid::from_raw(rig.daemon().unwrap() as i32);
        kill(daemon, Signal::SIGSTOP).unwrap();
        let halted = Self(daemon);
        // Each of its threads has to come to it.
        eventually("the halt of the daemon", || {
            let tasks = std::fs::read_dir(format!("/proc/{daemon}/task")).unwrap();
            tasks.flatten().all(|task| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ").next().unwrap().starts_with('T')
            })
        });
        halted
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGCONT).unwrap();
    }
}

#[test]
fn a_halted_daemon_halts_no_proven_read() {
    alone("a_halted_daemon_halts_no_proven_read", |rclone| {
        let (rig, _held) = cached(rclone);
        let mut driver = Driver::start(&clip(&rig), &rig.source().join(CLIP));
        // Within a second of a proof nothing is asked of the daemon. On a busy
        // machine that second can be over before the read: then another try.
        let answered = (0..10).any(|_| {
            driver.ask("prepare 1");
            let halted = Halted::new(&rig);
            driver.send("proven");
            let answered = driver.answers(3_000);
            drop(halted);
            let report = driver.report();
            assert_right(&report, "while it is halted");
            assert_eq!(report["fuse"], 0, "{report}");
            answered
        });
        assert!(answered, "no proven read went on without the daemon");

        // Once a second FUSE's view is looked at, which may have to wait for
        // the daemon, and goes on when it does.
        let halted = Halted::new(&rig);
        driver.send("reopen");
        // The driver says so when it begins, after a while.
        driver.answers(3_000);
        std::thread::sleep(Duration::from_millis(500));
        drop(halted);
        let report = driver.report();
        assert_right(&report, "a look at fuse's view");
        assert_eq!(report["fuse"], 0, "{report}");

        // So does an open, as any open through FUSE.
        let halted = Halted::new(&rig);
        driver.send("life");
        assert!(!driver.answers(500), "an open without the daemon");
        drop(halted);
        let report = driver.report();
        assert_right(&report, "an open");
        assert_eq!(report["fuse"], 0, "{report}");
    });
}

/// Fails each call that a refusal, which begins so, may come from. A gate that
/// cannot be looked at is a gate that does not hold.
fn assert_no_failed_call_hides(rig: &Rig, refusal: &str, at_least: usize) {
    let mut traced = Traced::start(rig);
    let plain = traced.run("open", None);
    let found = plain.report["refusal"].as_str().unwrap();
    assert!(found.starts_with(refusal), "{found}");
    let mut hidden = BTreeSet::new();
    let mut tried = 0;
    let asks = |call: &str| call.contains("/proc") || call.contains("CACHE");
    for fault in matrix::faults(&plain.calls, asks) {
        // ENOENT is an answer: a process has ended, and shares nothing any
        // more. What is no refusal of access is all the same.
        if ![Errno::EIO, Errno::EACCES]
            .map(Kind::Error)
            .contains(&fault.kind)
        {
            continue;
        }
        forget_mounts(&mut traced);
        let episode = traced.run("open", Some(&fault));
        tried += episode.failed.min(1);
        let opened = episode.report["open_error"].is_null();
        if episode.failed > 0 && opened && episode.report["refusal"].is_null() {
            hidden.insert(format!("{fault:?}"));
        }
    }
    println!("{found}: {tried} faults");
    assert!(tried >= at_least, "{found}: only {tried} faults");
    assert!(hidden.is_empty(), "{found}, but bypassed: {hidden:#?}");
}

#[test]
fn no_failed_call_hides_that_a_cache_is_shared() {
    alone("no_failed_call_hides_that_a_cache_is_shared", |rclone| {
        for second in Second::kinds() {
            let (rig, _held) = cached(rclone);
            let _second = second(&rig, rclone);
            assert_no_failed_call_hides(&rig, "unsupported: another rclone", 200);
        }
    });
}

#[test]
fn no_failed_call_hides_that_a_clip_may_be_another() {
    alone(
        "no_failed_call_hides_that_a_clip_may_be_another",
        |rclone| {
            let name = "loc:{folder}/source";
            let options = remote(rclone, name, &["--devname=X"]);
            let rig = rig_with(options, |source| {
                put_alike(source, CLIP, 1);
                put_alike(source, "sub/clip", 2);
            });
            let sub = rig.mountpoint().join("sub/clip");
            becomes_bypassed(&clip(&rig), 1);
            becomes_bypassed(&sub, 2);
            let _holders = (Holder::of(&clip(&rig)), Holder::of(&sub));
            assert_no_failed_call_hides(&rig, "ambiguous", 100);
            drop(rig);

            let mut options = remote(rclone, name, &[]);
            let ignoring = ("RCLONE_VFS_CASE_INSENSITIVE".into(), "true".into());
            options.environment.push(ignoring);
            let rig = rig_with(options, |source| put_alike(source, CLIP, 1));
            let _holder = Holder::of(&clip(&rig));
            assert_no_failed_call_hides(&rig, "unsupported", 60);
        },
    );
}

/// poll(2) with a signal pending answers EINTR, even if it does not wait.
#[test]
fn an_interrupted_look_at_the_mount_table_is_made_again() {
    alone(
        "an_interrupted_look_at_the_mount_table_is_made_again",
        |rclone| {
            let (rig, _held) = cached(rclone);
            let mut traced = Traced::start(&rig);
            traced.run("open", None);
            let fault = Fault {
                site: "open: poll".into(),
                occurrence: 1,
                kind: Kind::Error(Errno::EINTR),
            };
            let episode = traced.run("whole", Some(&fault));
            assert_eq!(episode.failed, 1);
            assert_eq!(matrix::outcome(&episode), "cache", "{}", episode.report);
        },
    );
}
