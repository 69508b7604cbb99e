//! `warm` on real rclone mounts: completes clips, reads no more than is
//! missing, and says only what it knows. Each test runs on every rclone
//! program there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use common::clips::*;
use common::{
    assert_fails, content, eventually, fuse_range, need_root, program, put, rclones, rig_of,
    rig_with, run, stderr,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use vmafx_bypass::rig::{Rig, RigOptions};

fn warm(args: &[&str], paths: &[&Path]) -> Output {
    let mut command = program();
    command.arg("warm").args(args).args(paths);
    command.stdin(Stdio::null()).output().unwrap()
}

/// Runs it with JSON; its exit code and document.
fn json(args: &[&str], paths: &[&Path]) -> (i32, Value) {
    let output = warm(&[&["--format", "json"], args].concat(), paths);
    let text = stderr(&output);
    let document = serde_json::from_slice(&output.stdout).expect(&text);
    (output.status.code().unwrap(), document)
}

/// Runs it on one clip.
fn one(args: &[&str], path: &Path) -> (i32, Value) {
    let (code, document) = json(args, &[path]);
    assert_eq!(document["totals"]["clips"], 1, "{document}");
    (code, document["clips"][0].clone())
}

fn number(row: &Value, field: &str) -> u64 {
    row[field]
        .as_u64()
        .unwrap_or_else(|| panic!("{field}: {row}"))
}

/// The pid of the rig's `rclone serve`.
fn server(rig: &Rig) -> u32 {
    let source = rig.source();
    let serves = |pid: &u32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments: Vec<_> = arguments.split(|&b| b == 0).collect();
        arguments.contains(&&b"serve"[..])
            && arguments.contains(&source.as_os_str().as_encoded_bytes())
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(serves).unwrap()
}

/// What the server has written, most of it to rclone.
fn served(rig: &Rig) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", server(rig))).unwrap();
    let written = io.lines().find_map(|line| line.strip_prefix("wchar: "));
    written.unwrap().parse().unwrap()
}

fn start(args: &[&str], path: &Path) -> Child {
    let mut command = program();
    command.args(["warm", "--format=json"]).args(args).arg(path);
    command.stdout(Stdio::piped()).spawn().unwrap()
}

/// Waits for its end; its exit code and the row of its one clip.
fn end(child: Child) -> (i32, Value) {
    let output = child.wait_with_output().unwrap();
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    (output.status.code().unwrap(), document["clips"][0].clone())
}

/// Bytes that a clip's cache file takes on its disk.
fn allocated(rig: &Rig) -> u64 {
    fs::metadata(cache_file(rig, "vfs", CLIP)).map_or(0, |found| found.blocks() * 512)
}

#[test]
fn a_partly_cached_clip_is_completed_and_no_more_is_read() {
    let size = 48 * MIB + 77;
    each_rclone(
        size,
        &[
            "--buffer-size=0",
            "--vfs-read-chunk-size=1M",
            "--vfs-read-chunk-size-limit=1M",
        ],
        |rig, bytes| {
            // Two parts, the clip's end among what is missing.
            fuse_range(&clip(rig), 0, 9 * MIB + 5);
            fuse_range(&clip(rig), 20 * MIB as u64, 10 * MIB);
            eventually("metadata of both parts", || {
                number(&one(&["--check"], &clip(rig)).1, "cached_bytes_before") >= 19 * MIB as u64
            });
            let before = served(rig);
            // The kill switch is for what bypasses FUSE.
            let output = program()
                .env("VMAFX_EBPF_BYPASS", "0")
                .args(["warm", "--format=json"])
                .arg(clip(rig))
                .output()
                .unwrap();
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            let document: Value = serde_json::from_slice(&output.stdout).unwrap();
            let row = &document["clips"][0];
            assert_eq!(row["state"], "cached", "{row}");
            let cached = number(row, "cached_bytes_before");
            assert!(cached >= 19 * MIB as u64 && cached < size as u64, "{row}");
            let missing = size as u64 - cached;
            assert_eq!(number(row, "read_bytes"), missing);
            assert_eq!(number(row, "cached_bytes_after"), size as u64);
            let sent = served(rig) - before;
            assert!(
                sent >= missing,
                "the server must count: {sent} of {missing}"
            );
            assert!(sent < missing + 4 * MIB as u64, "{sent} for {missing}");
            // Again, there is nothing to do.
            let (code, row) = one(&[], &clip(rig));
            assert_eq!((code, number(&row, "read_bytes")), (0, 0));
            assert_eq!(served(rig), before + sent);
            assert!(read_all(&open_cached(rig)) == bytes);
        },
    );
}

#[test]
fn a_signal_stops_it_and_another_run_goes_on() {
    for (signal, exit) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        each_rclone(
            24 * MIB,
            &["--buffer-size=0", "--bwlimit=6M"],
            |rig, bytes| {
                let child = start(&[], &clip(rig));
                eventually("a download", || allocated(rig) >= MIB as u64);
                kill(Pid::from_raw(child.id() as i32), signal).unwrap();
                let (code, first) = end(child);
                assert_eq!(
                    (code, &first["state"]),
                    (exit, &"stopped".into()),
                    "{first}"
                );
                assert!(number(&first, "read_bytes") < bytes.len() as u64, "{first}");
                let mut cached = 0;
                eventually("metadata of what is cached", || {
                    let row = one(&["--check"], &clip(rig)).1;
                    cached = number(&row, "cached_bytes_before");
                    cached >= number(&first, "read_bytes").max(1)
                });
                let (code, second) = one(&[], &clip(rig));
                assert_eq!((code, &second["state"]), (0, &"cached".into()), "{second}");
                assert_eq!(number(&second, "cached_bytes_before"), cached);
                assert_eq!(number(&second, "read_bytes"), bytes.len() as u64 - cached);
                assert!(read_all(&open_cached(rig)) == bytes);
            },
        );
    }
}

#[test]
fn a_check_opens_no_clip() {
    need_root();
    for rclone in rclones() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let log_file = format!("--log-file={}", log.display());
        let rig = rig_with(options(&rclone, &["-vv", &log_file]), |source| {
            put(source, CLIP, &content(1, 3 * MIB));
        });
        let opens = || {
            fs::read_to_string(&log)
                .unwrap()
                .matches(" clip: Open: ")
                .count()
        };
        let (code, row) = one(&["--check"], &clip(&rig));
        assert_eq!((code, &row["state"]), (1, &"incomplete".into()), "{row}");
        assert_eq!(row["reason"], "no_metadata");
        assert_eq!(number(&row, "read_bytes"), 0);
        assert_eq!(opens(), 0);
        assert_eq!(one(&[], &clip(&rig)).0, 0);
        let warmed = opens();
        assert!(warmed > 0, "the log must tell of opens");
        assert_eq!(one(&["--check"], &clip(&rig)).0, 0);
        assert_eq!(opens(), warmed);
        // Metadata of a file that is not there shows nothing.
        fs::remove_file(cache_file(&rig, "vfs", CLIP)).unwrap();
        let (code, row) = one(&["--check"], &clip(&rig));
        assert_eq!(
            (code, &row["reason"]),
            (1, &"no_cache_file".into()),
            "{row}"
        );
    }
}

#[test]
fn a_folder_is_completed_in_parallel_each_clip_once() {
    need_root();
    for rclone in rclones() {
        // With rclone's own time to keep clips open.
        let rig = rig_of(&rclone, |source| {
            for n in 0..40 {
                put(
                    source,
                    &format!("a/{n:02}"),
                    &content(n, 300_000 + n as usize),
                );
            }
            put(source, "b/c/large", &content(99, 9 * MIB));
            put(source, "b/tiny", b"0123456789");
            put(source, "empty", b"");
        });
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink(rig.mountpoint().join("b/tiny"), &link).unwrap();
        let (code, document) = json(&["-j3"], &[&rig.mountpoint(), &rig.mountpoint(), &link]);
        assert_eq!(code, 0, "{document}");
        assert_eq!(document["schema"], 1);
        assert_eq!(document["check"], false);
        let totals = &document["totals"];
        let bytes: u64 = (0..40).map(|n| 300_000 + n).sum::<u64>() + 9 * MIB as u64 + 10;
        assert_eq!(totals["states"]["cached"], 43, "{totals}");
        assert_eq!(totals["states"]["failed"], 0, "{totals}");
        for (field, wanted) in [
            ("clips", 43),
            ("bytes", bytes),
            ("cached_bytes_before", 0),
            ("cached_bytes_after", bytes),
            ("read_bytes", bytes),
        ] {
            assert_eq!(number(totals, field), wanted, "{field}");
        }
        let rows = document["clips"].as_array().unwrap();
        let path = |row: &Value| PathBuf::from(row["path"].as_str().unwrap());
        let paths: Vec<_> = rows.iter().map(path).collect();
        assert_eq!(paths[0], rig.mountpoint().join("empty"));
        assert!(paths[1..41].is_sorted(), "{paths:?}");
        assert!(paths[42].ends_with("b/c/large"), "{paths:?}");
        let fields: Vec<_> = rows[0].as_object().unwrap().keys().collect();
        assert_eq!(
            fields,
            [
                "cached_bytes_after",
                "cached_bytes_before",
                "error",
                "path",
                "read_bytes",
                "reason",
                "size",
                "state"
            ]
        );
        // For people: a header, a line a clip, a summary.
        let output = warm(&["--check"], &[&rig.mountpoint()]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.lines().count(), 45);
        assert!(text.starts_with("STATE "));
        assert!(
            text.lines()
                .last()
                .unwrap()
                .starts_with("43 clips: 43 cached; ")
        );
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn a_mount_that_caches_nothing_is_refused_before_much_is_read() {
    need_root();
    for rclone in rclones() {
        for mode in ["--vfs-cache-mode=off", "--vfs-cache-mode=writes"] {
            let rig = rig_with(options(&rclone, &[mode]), |source| {
                for n in 0..6 {
                    put(source, &format!("{n}"), &content(n, 3 * MIB));
                }
            });
            let output = warm(&["--jobs=2"], &[&rig.mountpoint()]);
            assert_fails(&output, 3, "mount with --vfs-cache-mode full");
            let (code, document) = json(&["--jobs=2"], &[&rig.mountpoint()]);
            assert_eq!(code, 3);
            assert_eq!(document["totals"]["states"]["refused"], 6, "{document}");
            // A first request of each job.
            assert!(number(&document["totals"], "read_bytes") <= 2 * 131_072);
            assert_eq!(document["clips"][5]["reason"], "no_cache_file");
        }
    }
}

#[test]
fn what_another_mount_left_in_the_cache_does_not_deceive() {
    need_root();
    for rclone in rclones() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        put(&source, CLIP, &content(1, 40 * MIB));
        let cache = format!("--cache-dir={}", dir.path().join("cache").display());
        let start = |arguments: &[&str]| {
            let remote = RigOptions {
                remote: Some(source.to_str().unwrap().into()),
                ..options(&rclone, arguments)
            };
            rig_with(remote, |_| ())
        };
        let rig = start(&[&cache, "--buffer-size=0", "--vfs-read-chunk-size=1M"]);
        fuse_range(&clip(&rig), 0, MIB);
        let mut cached = 0;
        eventually("metadata of a part", || {
            cached = number(&one(&["--check"], &clip(&rig)).1, "cached_bytes_before");
            cached > 0
        });
        assert!(cached < 30 * MIB as u64, "{cached}");
        drop(rig);
        let rig = start(&[&cache, "--vfs-cache-mode=off"]);
        let (code, row) = one(&[], &clip(&rig));
        assert_eq!((code, &row["state"]), (3, &"refused".into()), "{row}");
        assert_eq!(number(&row, "cached_bytes_after"), cached);
        assert!(number(&row, "read_bytes") <= 131_072, "{row}");
    }
}

#[test]
fn a_clip_that_another_holds_open_is_unconfirmed_until_it_is_closed() {
    each_rclone(4 * MIB, &[], |rig, bytes| {
        let mut held = File::open(clip(rig)).unwrap();
        held.read_exact(&mut [0]).unwrap();
        let (code, row) = one(&["--wait=300ms"], &clip(rig));
        assert_eq!((code, &row["state"]), (0, &"unconfirmed".into()), "{row}");
        assert_eq!(number(&row, "read_bytes"), bytes.len() as u64);
        assert!(
            row["error"]
                .as_str()
                .unwrap()
                .contains("no program has the clip open")
        );
        let (code, row) = one(&["--check"], &clip(rig));
        assert_eq!((code, &row["state"]), (1, &"incomplete".into()), "{row}");
        drop(held);
        eventually("metadata of the whole clip", || {
            one(&["--check"], &clip(rig)).0 == 0
        });
        // Nothing is waited for where nothing was read.
        assert_eq!(one(&["--wait=none"], &clip(rig)).0, 0);
    });
}

#[test]
fn a_clip_that_is_evicted_again_is_not_called_cached() {
    each_rclone(4 * MIB, &[], |rig, _| {
        // Held open, so that it waits.
        let mut held = File::open(clip(rig)).unwrap();
        held.read_exact(&mut [0]).unwrap();
        let child = start(&["--wait=3s"], &clip(rig));
        eventually("a whole cache file", || allocated(rig) >= 4 * MIB as u64);
        fs::remove_file(cache_file(rig, "vfs", CLIP)).unwrap();
        fs::remove_file(cache_file(rig, "vfsMeta", CLIP)).unwrap();
        let (code, row) = end(child);
        assert_eq!((code, &row["state"]), (1, &"incomplete".into()), "{row}");
        assert!(
            row["error"]
                .as_str()
                .unwrap()
                .contains("is the cache too small")
        );
        assert_eq!(number(&row, "cached_bytes_after"), 0);
    });
}

#[test]
fn a_cache_that_cannot_keep_all_clips_is_told() {
    let limit = ["--vfs-cache-max-size=5M", "--vfs-cache-poll-interval=1s"];
    each_rclone(4 * MIB, &limit, |rig, _| {
        put(&rig.source(), "other", &content(2, 4 * MIB));
        // Each for itself fits.
        assert_eq!(one(&[], &clip(rig)).0, 0);
        eventually("the other clip", || rig.mountpoint().join("other").exists());
        let output = warm(&[], &[&rig.mountpoint()]);
        assert_eq!(output.status.code(), Some(1));
        let text = stderr(&output);
        assert!(text.contains("raise --vfs-cache-max-size"), "{text}");
        eventually("an eviction", || {
            let (code, document) = json(&["--check"], &[&rig.mountpoint()]);
            code == 1 && number(&document["totals"]["states"], "incomplete") > 0
        });
    });
}

/// A small disk for a cache; unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = Some("size=16m");
        mount(
            Some("none"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            size,
        )
        .unwrap();
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Where it fails, the temporary folder tells by staying.
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_clip_that_the_caches_disk_cannot_hold_is_not_begun() {
    need_root();
    for rclone in rclones() {
        let disk = SmallDisk::new();
        let cache = format!("--cache-dir={}", disk.0.path().display());
        let rig = rig_with(options(&rclone, &[&cache]), |source| {
            put(source, "a", &content(1, 20 * MIB));
            put(source, "b", &content(2, 3 * MIB));
        });
        let (code, document) = json(&[], &[&rig.mountpoint()]);
        assert_eq!(code, 1);
        let (large, small) = (&document["clips"][0], &document["clips"][1]);
        assert_eq!(large["state"], "failed", "{document}");
        assert!(large["error"].as_str().unwrap().contains("does not fit"));
        assert_eq!(number(large, "read_bytes"), 0);
        assert_eq!(small["state"], "cached", "{document}");
        drop(rig);
    }
}

#[test]
fn a_new_version_at_the_remote_is_read_anew() {
    each_rclone(3 * MIB, &["--dir-cache-time=0s"], |rig, bytes| {
        assert_eq!(one(&[], &clip(rig)).0, 0);
        let other = content(9, bytes.len());
        replace_remote(rig, &other, "2030-01-01");
        // Until the kernel's view of the clip has aged.
        eventually("the new version", || {
            one(&["--check"], &clip(rig)).1["reason"] == "stale_metadata"
        });
        let (code, row) = one(&[], &clip(rig));
        assert_eq!((code, &row["state"]), (0, &"cached".into()), "{row}");
        assert_eq!(number(&row, "read_bytes"), bytes.len() as u64);
        assert!(read_all(&open_cached(rig)) == other);
    });
}

#[test]
fn errors_on_one_path_do_not_stop_the_others() {
    need_root();
    for rclone in rclones() {
        let rig = rig_with(options(&rclone, &[]), |source| {
            put(source, CLIP, &content(1, MIB));
            put(source, "folder/clip", &content(2, MIB));
        });
        let dir = tempfile::tempdir().unwrap();
        let paths = [
            dir.path(),
            Path::new("/no/such"),
            Path::new("/proc/version"),
            &clip(&rig),
        ];
        let (code, document) = json(&[], &paths);
        assert_eq!(code, 1);
        let rows = document["clips"].as_array().unwrap();
        let told: Vec<_> = rows
            .iter()
            .map(|row| (row["state"].as_str().unwrap(), row["reason"].as_str()))
            .collect();
        assert_eq!(
            told,
            [
                ("cached", None),
                ("failed", Some("not_fuse")),
                ("failed", Some("io_error")),
                ("failed", Some("not_fuse")),
            ]
        );
        assert_eq!(rows[1]["size"], Value::Null);
        // A folder that cannot be listed, since nobody serves it any more.
        kill(Pid::from_raw(server(&rig) as i32), Signal::SIGKILL).unwrap();
        let (code, document) = json(&[], &[&clip(&rig), &rig.mountpoint().join("folder")]);
        let states = &document["totals"]["states"];
        assert_eq!(code, 1, "{document}");
        assert_eq!(
            (&states["cached"], &states["failed"]),
            (&1.into(), &1.into()),
            "{document}"
        );
    }
}

#[test]
fn progress_is_for_terminals_alone() {
    each_rclone(2 * MIB, &[], |rig, _| {
        let binary = env!("CARGO_BIN_EXE_vmafx-bypass");
        let on_a_terminal = |arguments: &str| {
            let line = format!("{binary} {arguments} warm --check {}", clip(rig).display());
            let output = Command::new("script")
                .args(["-qec", &line, "/dev/null"])
                .env("TERM", "xterm")
                .stdin(Stdio::null())
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let shown = on_a_terminal("");
        assert!(shown.contains("looking for clips"), "{shown:?}");
        // No colours, whether or not NO_COLOR is set.
        assert!(!shown.contains("\x1b[3"), "{shown:?}");
        assert!(!on_a_terminal("-q").contains("looking for clips"));
        assert!(warm(&[], &[&clip(rig)]).stderr.is_empty());
    });
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in [
        &["warm"][..],
        &["warm", "f", "-j0"],
        &["warm", "f", "--wait=soon"],
    ] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn every_state_is_documented() {
    let reference = include_str!("../docs/REFERENCE.md");
    for state in vmafx_bypass::warm::State::ALL {
        let name = state.name();
        assert_eq!(serde_json::to_value(state).unwrap(), name);
        assert!(reference.contains(&format!("\n| `{name}` | ")), "{name}");
    }
}
