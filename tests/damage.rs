//! Caches that are not what their metadata says, as crashes, remote changes and
//! other programs leave them. Each test runs on every rclone program there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use common::clips::*;
use common::{content, eventually, fuse_range, need_root, put, rclones, rig_with};
use vmafx_bypass::Reason;
use vmafx_bypass::cache::rclone::{Folders, estimate};
use vmafx_bypass::mounts::MountTable;

/// Changes at the remote are noticed soon.
const SOON: [&str; 2] = ["--dir-cache-time=1s", "--attr-timeout=1s"];

/// Gives a file another inode of the same size and time, with no byte in it.
fn replace_by_holes(path: &Path) {
    let old = fs::metadata(path).unwrap();
    fs::remove_file(path).unwrap();
    let new = fs::File::create(path).unwrap();
    new.set_len(old.len()).unwrap();
    new.set_modified(old.modified().unwrap()).unwrap();
}

#[test]
fn metadata_without_data_is_not_believed() {
    each_rclone(8 * MIB, &SOON, |rig, old| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let held = hold(&clip(rig), 0, 1);
        let new = content(2, old.len());
        replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
        let metadata = cache_file(rig, "vfsMeta", CLIP);
        let data = cache_file(rig, "vfs", CLIP);
        eventually("the new clip through FUSE", || {
            fuse_range(&clip(rig), 0, old.len()) == new
        });
        // Into the unlinked file; the last close writes metadata of no file.
        drop(held);
        eventually("metadata without data", || {
            metadata.exists() && !data.exists()
        });
        // rclone writes it in two steps: cut, and filled.
        let mut orphan = String::new();
        eventually("whole metadata", || {
            orphan = fs::read_to_string(&metadata).unwrap();
            orphan.trim_end().ends_with('}')
        });
        let file = open(rig);
        assert!(read_all(&file) == new);
        drop(file);
        eventually("a closed clip", || {
            fs::read_to_string(&metadata).unwrap() != orphan
        });
        // As one finds it who read the metadata before the file came.
        fs::remove_file(&data).unwrap();
        fs::remove_file(&metadata).unwrap();
        let _held = hold(&clip(rig), 0, 1);
        let stat = fs::metadata(&data).unwrap();
        let time = fs::metadata(clip(rig)).unwrap().modified().unwrap();
        assert_eq!(stat.len(), new.len() as u64);
        fs::write(&metadata, claim(&orphan, new.len(), time)).unwrap();
        let punched = Command::new("fallocate")
            .args(["--punch-hole", "--offset=2MiB", "--length=6MiB"])
            .arg(&data)
            .status();
        assert!(punched.unwrap().success());
        let file = open(rig);
        assert_eq!(file.refusal(), None);
        assert!(read_all(&file) == fuse_range(&clip(rig), 0, new.len()));
        assert_eq!(file.stats().cache_bytes, 0);
    });
}

/// Metadata that claims all of a version.
fn claim(text: &str, size: usize, time: SystemTime) -> String {
    let mut info: serde_json::Value = serde_json::from_str(text).unwrap();
    info["Fingerprint"] = fingerprint(size, time).into();
    info["Size"] = size.into();
    info["Dirty"] = false.into();
    listing_all(&info.to_string(), size)
}

#[test]
fn a_power_loss_leaves_holes() {
    each_rclone(36 * MIB, &[], |rig, bytes| {
        for from in [20 * MIB, 0] {
            rig.cache_whole(Path::new(CLIP)).unwrap();
            rig.unmount();
            let data = cache_file(rig, "vfs", CLIP);
            let time = fs::metadata(&data).unwrap().modified().unwrap();
            let file = fs::OpenOptions::new().write(true).open(&data).unwrap();
            file.set_len(from as u64).unwrap();
            file.set_len(bytes.len() as u64).unwrap();
            file.set_modified(time).unwrap();
            // It trusts its metadata and serves zeros: FUSE is the measure.
            rig.mount().unwrap();
            let file = open(rig);
            assert_eq!(file.refusal(), None);
            let read = read_all(&file);
            assert!(read == fs::read(clip(rig)).unwrap());
            let stats = file.stats();
            let hole = bytes.len() - from / (16 * MIB) * 16 * MIB;
            assert_eq!(stats.by_reason[&Reason::Hole], hole as u64, "{stats:?}");
        }
    });
}

#[test]
fn a_reset_leaves_an_empty_file_under_full_metadata() {
    each_rclone(8 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        assert!(read_all(&file) == bytes);
        let before = file.stats().cache_bytes;
        replace_by_holes(&cache_file(rig, "vfs", CLIP));
        for _ in 0..3 {
            assert!(read_all(&file) == bytes);
            assert!(read_all(&open(rig)) == bytes);
            // Where the daemon's descriptors are hidden, its path leads to it.
            let (read, stats) = read_without_ptrace(&clip(rig));
            assert!(read == bytes, "{stats}");
            std::thread::sleep(Duration::from_millis(500));
        }
        assert_eq!(file.stats().cache_bytes, before);
        // The daemon's own is gone; another one of its name is not taken.
        assert_eq!(file.refusal().unwrap().reason, Reason::Changed);
    });
}

#[test]
fn each_piece_looks_at_the_metadata() {
    each_rclone(40 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        let mut block = vec![0; MIB];
        file.read_at(&mut block, 0).unwrap();
        let before = file.stats().cache_bytes;
        assert_eq!(before, MIB as u64);
        edit_metadata(rig, CLIP, |text| {
            text.replace("\"Dirty\": false", "\"Dirty\": true")
        });
        file.read_at(&mut block, 20 * MIB as u64).unwrap();
        assert!(block == bytes[20 * MIB..21 * MIB]);
        assert_eq!(file.stats().cache_bytes, before);
    });
}

#[test]
fn metadata_is_looked_at_once_a_second() {
    each_rclone(MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        let mut block = vec![0; 4096];
        file.read_at(&mut block, 0).unwrap();
        edit_metadata(rig, CLIP, |text| {
            text.replace("\"Dirty\": false", "\"Dirty\": true")
        });
        std::thread::sleep(Duration::from_millis(1_100));
        // A piece that was checked before.
        file.read_at(&mut block, 4096).unwrap();
        assert!(block == bytes[4096..8192]);
        assert_eq!(file.stats().cache_bytes, 4096);
    });
}

/// A file system whose times are those of the last tick, for the metadata.
struct Coarse(PathBuf);

impl Coarse {
    fn mount(folder: &Path) -> Self {
        let mut mount = Command::new("mount");
        mount.args(["-t", "ramfs", "none"]).arg(folder);
        assert!(mount.status().unwrap().success());
        Self(folder.to_path_buf())
    }
}

impl Drop for Coarse {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn metadata_of_two_versions_is_none() {
    /// Ranges.
    const COUNT: u64 = 5_000;
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let coarse = Coarse::mount(folder.path());
    let table = MountTable::parse(b"42 27 0:39 / /m ro - fuse.rclone web: ro");
    let folders = Folders::new(table.by_id(42).unwrap(), folder.path().into());
    let path = folders.metadata_path(Path::new(CLIP));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    // Of equal size; a mixture of both would parse.
    let version = |length: u64| {
        let ranges: Vec<String> = (0..COUNT)
            .map(|i| format!("{{\"Pos\":{},\"Size\":{length}}}", 1_000_000 + i * 10))
            .collect();
        format!(
            "{{\"ModTime\":\"\",\"ATime\":\"\",\"Size\":9000000,\"Rs\":[{}],\"Fingerprint\":\"\",\"Dirty\":false}}",
            ranges.join(",")
        )
    };
    let versions = [version(1), version(2)];
    fs::write(&path, &versions[0]).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for text in versions.iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                fs::write(&path, text).unwrap();
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let (mut seen, mut mixed) = ([0; 2], None);
        while mixed.is_none() && seen.iter().any(|&count| count < 300) {
            match estimate(&folders, Path::new(CLIP), 9_000_000).cached_bytes {
                Some(COUNT) => seen[0] += 1,
                Some(bytes) if bytes == 2 * COUNT => seen[1] += 1,
                // Kept changing.
                None => {}
                other => mixed = other,
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(mixed, None, "after {seen:?}");
    });
    drop(coarse);
}

#[test]
fn metadata_that_changed_within_one_tick() {
    need_root();
    for rclone in rclones() {
        let bytes = content(1, 40 * MIB);
        let mut rig = rig_with(options(&rclone, &[]), |s| put(s, CLIP, &bytes));
        rig.unmount();
        let folder = rig.cache().join("vfsMeta");
        fs::create_dir_all(&folder).unwrap();
        let coarse = Coarse::mount(&folder);
        rig.mount().unwrap();
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let path = cache_file(&rig, "vfsMeta", CLIP);
        let held = hold(&clip(&rig), 0, 1);
        let clean = fs::read_to_string(&path).unwrap();
        // As long, and of another version.
        let other = clean.replace(
            "\"Fingerprint\": \"41943040,20",
            "\"Fingerprint\": \"41943040,19",
        );
        assert!(other != clean && other.len() == clean.len());
        let stamp = || {
            use std::os::unix::fs::MetadataExt;
            let found = fs::metadata(&path).unwrap();
            (
                found.ctime(),
                found.ctime_nsec(),
                found.mtime_nsec(),
                found.ino(),
            )
        };
        let mut same = 0;
        let mut block = vec![0; 4096];
        eventually("a change within a tick", || {
            for _ in 0..20 {
                fs::write(&path, &clean).unwrap();
                let before = stamp();
                let file = open(&rig);
                fs::write(&path, &other).unwrap();
                if stamp() != before || file.refusal().is_some() {
                    continue;
                }
                same += 1;
                file.read_at(&mut block, 20 * MIB as u64).unwrap();
                assert!(block == bytes[20 * MIB..20 * MIB + 4096]);
                assert_eq!(file.stats().cache_bytes, 0);
            }
            same >= 3
        });
        drop(held);
        rig.unmount();
        drop(coarse);
    }
}

#[test]
fn a_cache_that_is_not_used_any_more_is_not_read() {
    each_rclone(4 * MIB, &[], |rig, old| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let time = fs::metadata(rig.source().join(CLIP)).unwrap().modified();
        // Alike in size and time, so that only the daemon knows better.
        let new = content(2, old.len());
        put(&rig.source(), CLIP, &new);
        let source = fs::OpenOptions::new()
            .write(true)
            .open(rig.source().join(CLIP))
            .unwrap();
        source.set_modified(time.unwrap()).unwrap();
        let mounted = Mounted::instead(rig, |arguments| {
            let mode = arguments.iter().position(|a| a == "full").unwrap();
            arguments[mode] = "off".into();
        });
        let file = open(rig);
        assert_eq!(file.refusal().unwrap().reason, Reason::NoCacheFile);
        assert!(read_all(&file) == new);
        let (read, stats) = read_without_ptrace(&clip(rig));
        assert!(read == new, "{stats}");
        assert_eq!(stats["state"], "permission", "{stats}");
        drop((file, mounted));
    });
}

#[test]
fn a_daemon_that_is_killed_and_started_again() {
    each_rclone(8 * MIB, &SOON, |rig, bytes| {
        let file = open_cached(rig);
        let mut block = vec![0; MIB];
        file.read_at(&mut block, 0).unwrap();
        rig.kill_daemon();
        let mut unmount = Command::new("umount");
        assert!(
            unmount
                .arg("-l")
                .arg(rig.mountpoint())
                .status()
                .unwrap()
                .success()
        );
        rig.mount().unwrap();
        // The same clip, in the same cache, by another daemon.
        assert!(read_all(&open_cached(rig)) == bytes);
        // What was opened on the dead mount has the old bytes, until the new
        // daemon's metadata is seen; then none.
        let mut read_old = |at: usize| match file.read_at(&mut block, at as u64) {
            Ok(n) => assert!(block[..n] == bytes[at..at + n]),
            Err(e) => assert_eq!(e.raw_os_error(), Some(nix::libc::ENOTCONN)),
        };
        read_old(MIB);
        let new = content(2, bytes.len());
        replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
        eventually("the new clip through FUSE", || {
            fuse_range(&clip(rig), 0, new.len()) == new
        });
        read_old(2 * MIB);
        assert!(read_all(&open(rig)) == new);
    });
}

#[test]
fn what_another_version_of_rclone_left() {
    need_root();
    let programs = rclones();
    for (first, second) in [(0, programs.len() - 1), (programs.len() - 1, 0)] {
        let bytes = content(1, 8 * MIB);
        let rclone = &programs[first];
        let mut rig = rig_with(options(rclone, &SOON), |s| put(s, CLIP, &bytes));
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let program = programs[second].to_str().unwrap().to_owned();
        let _mounted = Mounted::instead(&mut rig, |arguments| {
            arguments[0].clone_from(&program);
            arguments.retain(|a| !a.starts_with("--vfs-handle-caching"));
        });
        let file = open(&rig);
        assert_eq!(file.refusal(), None);
        assert!(read_all(&file) == bytes);
        assert_eq!(file.stats().fuse_bytes(), 0);
        let new = content(2, 9 * MIB);
        replace_remote(&rig, &new, "2031-01-01 00:00:00 UTC");
        eventually("the new clip through FUSE", || {
            fuse_range(&clip(&rig), 0, 16) == new[..16]
        });
        let through_fuse = fs::File::open(clip(&rig)).unwrap();
        let (mut own, mut expected) = (vec![0; MIB], vec![0; MIB]);
        file.read_at(&mut own, 0).unwrap();
        through_fuse.read_exact_at(&mut expected, 0).unwrap();
        assert!(own == expected && own == new[..MIB]);
    }
}

#[test]
fn what_was_read_once_comes_from_the_cache() {
    each_rclone(4 * MIB + 10, &SOON, |rig, bytes| {
        let file = open(rig);
        assert_eq!(file.refusal().unwrap().reason, Reason::NoMetadata);
        let mut first = vec![0; 64 << 10];
        file.read_at(&mut first, 0).unwrap();
        assert!(read_all(&file) == bytes);
        let before = file.stats();
        assert!(read_all(&file) == bytes);
        let after = file.stats();
        let grown = after.cache_bytes - before.cache_bytes;
        assert!(
            grown >= 3 * MIB as u64,
            "{before:?} {after:?} {:?}",
            file.refusal()
        );
        let listed = fs::read_to_string(cache_file(rig, "vfsMeta", CLIP)).unwrap();
        assert!(
            !listed.contains("4194314}"),
            "rclone lists it already: {listed}"
        );
        // Evicted, and another version in its place.
        let new = content(2, bytes.len());
        replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
        eventually("the new clip through FUSE", || {
            fuse_range(&clip(rig), 0, new.len()) == new
        });
        assert!(read_all(&file) == new);
    });
}

#[test]
fn a_pulled_range_is_looked_at_for_holes() {
    each_rclone(
        8 * MIB,
        &["--buffer-size=0", "--attr-timeout=1h"],
        |rig, bytes| {
            let file = open(rig);
            let mut block = vec![0; MIB];
            file.read_at(&mut block, 0).unwrap();
            assert_eq!(file.refusal(), None);
            // The kernel's pages have it all, the cache file loses some: a block
            // at its edge is there in part.
            let cache = cache_file(rig, "vfs", CLIP);
            let held = hold(&clip(rig), 0, bytes.len());
            let punched = Command::new("fallocate")
                .args(["--punch-hole", "--offset=4194404", "--length=1MiB"])
                .arg(&cache)
                .status();
            assert!(punched.unwrap().success());
            for _ in 0..2 {
                for at in (0..bytes.len()).step_by(4096) {
                    let mut block = [0; 4096];
                    file.read_at(&mut block, at as u64).unwrap();
                    assert!(block == bytes[at..at + 4096], "at {at}");
                }
            }
            assert!(file.stats().cache_bytes > MIB as u64, "{file:?}");
            drop(held);
        },
    );
}
