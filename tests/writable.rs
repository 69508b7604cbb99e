//! Writable mounts: what programs do to clips through the mount, under a
//! `BypassFile`. Each test runs on every rclone program there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::clips::*;
use common::{content, eventually, fuse_range, need_root, put, rclones, rig_with};
use vmafx_bypass::rig::{Rig, RigOptions};
use vmafx_bypass::{BypassFile, Reason};

/// Runs a test on each rclone, on a writable mount of a local folder with one
/// cached clip.
fn each_writable(size: usize, arguments: &[&str], test: impl Fn(&mut Rig, &[u8])) {
    need_root();
    for rclone in rclones() {
        let bytes = content(1, size);
        let remote = tempfile::tempdir().unwrap();
        put(remote.path(), CLIP, &bytes);
        let options = RigOptions {
            read_only: false,
            remote: Some(remote.path().to_str().unwrap().into()),
            ..options(&rclone, arguments)
        };
        let mut rig = rig_with(options, |_| ());
        rig.cache_whole(Path::new(CLIP)).unwrap();
        test(&mut rig, &bytes);
    }
}

/// All but the edges comes from the cache.
fn assert_bypassed(file: &BypassFile, bytes: &[u8]) {
    let before = file.stats();
    assert!(read_all(file) == bytes);
    let after = file.stats();
    let fuse = after.fuse_bytes() - before.fuse_bytes();
    assert!(fuse <= 16 << 10, "{after:?}, {:?}", file.refusal());
    assert!(
        after.by_reason.keys().all(|r| *r == Reason::Edge),
        "{after:?}"
    );
}

#[test]
fn a_quiet_clip_is_bypassed_but_for_its_edges() {
    each_writable(36 * MIB + 5, &[], |rig, bytes| {
        assert_bypassed(&open(rig), bytes);
    });
}

#[test]
fn a_read_only_bind_of_a_writable_mount_is_writable() {
    each_writable(MIB, &[], |rig, bytes| {
        let bind = tempfile::tempdir().unwrap();
        let script = r#"mount --bind "$1" "$2" && mount -o remount,bind,ro "$2""#;
        let mut bound = Command::new("sh");
        bound
            .args(["-ec", script, "sh"])
            .arg(rig.mountpoint())
            .arg(bind.path());
        assert!(bound.status().unwrap().success());
        let file = BypassFile::open(bind.path().join(CLIP)).unwrap();
        let read = read_all(&file);
        let stats = file.stats();
        drop(file);
        let mut unmount = Command::new("umount");
        assert!(unmount.arg(bind.path()).status().unwrap().success());
        assert!(read == bytes);
        // The superblock counts: the gates of a writable mount apply.
        assert!(stats.by_reason.contains_key(&Reason::Edge), "{stats:?}");
    });
}

#[test]
fn what_is_written_through_the_mount_is_read_at_once() {
    each_writable(4 * MIB, &["--vfs-write-back=1s"], |rig, bytes| {
        let file = open(rig);
        assert_bypassed(&file, bytes);
        // A proof that is younger than a second is not renewed at once.
        std::thread::sleep(Duration::from_millis(1_100));
        let mut expected = bytes.to_vec();
        for round in 0..20u8 {
            let at = usize::from(round) * 150_001;
            expected[at..at + 1000].fill(round);
            let writer = fs::OpenOptions::new().write(true).open(clip(rig)).unwrap();
            writer
                .write_all_at(&expected[at..at + 1000], at as u64)
                .unwrap();
            let mut read = vec![0; 3000];
            file.read_at(&mut read, at as u64).unwrap();
            assert!(read == expected[at..at + 3000], "round {round}");
        }
        assert!(
            file.stats().by_reason.contains_key(&Reason::Dirty),
            "{file:?}"
        );
        assert!(read_all(&file) == expected);
        drop(file);
        // Each open of a changed clip puts its upload off: look at it only.
        let metadata = cache_file(rig, "vfsMeta", CLIP);
        eventually("an upload", || {
            fs::read_to_string(&metadata)
                .unwrap()
                .contains("\"Dirty\": false")
        });
        let file = open(rig);
        assert!(read_all(&file) == expected);
        assert!(file.stats().cache_bytes > 0, "{file:?}");
        assert!(fuse_range(&clip(rig), 0, expected.len()) == expected);
    });
}
