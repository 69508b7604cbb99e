//! The store of snapshots: one for each clip, within a budget, for no longer than
//! it is of use.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use common::clips::*;
use common::snapshots::*;
use common::{content, eventually, put};
use vmafx_bypass::Reason;
use vmafx_bypass::snapshot::{SnapshotKind, SnapshotMode, Whole};

#[test]
fn many_threads_get_one_snapshot() {
    each_place(WHOLE, &[], |rig, kind| {
        let bytes = content(1, 8 * MIB);
        let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
        let (path, barrier) = (clip(rig), Barrier::new(16));
        let wholes: Vec<_> = std::thread::scope(|scope| {
            let one = || {
                barrier.wait();
                ask(&snapshots, &path).unwrap()
            };
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(wholes.iter().filter(|w| !w.reused).count(), 1);
        let inode = |w: &Whole| rustix::fs::fstat(&w.fd).unwrap().st_ino;
        for whole in &wholes {
            assert_eq!((whole.kind, inode(whole)), (kind, inode(&wholes[0])));
            assert!(bytes_of(&whole.fd) == bytes);
        }
    });
}

#[test]
fn one_clip_does_not_wait_for_another() {
    each_rclone(MIB, &[], |rig, _| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let other = common::rig(|source| put(source, CLIP, &content(2, MIB)));
        other.cache_whole(Path::new(CLIP)).unwrap();
        let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
        // Before its daemon hangs: afterwards not even a path is looked up.
        let hangs = path_only(&clip(rig));
        let daemon = nix::unistd::Pid::from_raw(rig.daemon().unwrap() as i32);
        nix::sys::signal::kill(daemon, nix::sys::signal::SIGSTOP).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| snapshots.open(hangs.as_fd()));
            std::thread::sleep(Duration::from_millis(100));
            let got = ask(&snapshots, &clip(&other));
            let waiting = !waits.is_finished();
            nix::sys::signal::kill(daemon, nix::sys::signal::SIGCONT).unwrap();
            assert!(waiting && bytes_of(got.unwrap().fd) == content(2, MIB));
            assert!(bytes_of(waits.join().unwrap().unwrap().fd) == content(1, MIB));
        });
    });
}

#[test]
fn reflinks_leave_nothing_behind() {
    each_place(&[(CLIP, 32 * MIB)], &[], |rig, kind| {
        if kind != SnapshotKind::Reflink {
            return;
        }
        let cache = rig.cache();
        let used = || {
            let found = nix::sys::statvfs::statvfs(&cache).unwrap();
            (found.blocks() - found.blocks_free()) as usize * found.fragment_size() as usize
        };
        let snapshots = snapshots(SnapshotMode::Auto, 0);
        let whole = ask(&snapshots, &clip(rig)).unwrap();
        assert!(used() > 32 * MIB);
        for tree in ["vfs", "vfsMeta"] {
            fs::remove_file(cache_file(rig, tree, CLIP)).unwrap();
        }
        rig.unmount();
        // Asked for anything at all, a second later.
        std::thread::sleep(Duration::from_millis(1_100));
        let _ = snapshots.open(File::open(rig.folder()).unwrap().as_fd());
        let _ = snapshots.open(File::open("/proc/version").unwrap().as_fd());
        assert!(bytes_of(&whole.fd) == content(1, 32 * MIB));
        drop(whole);
        eventually("its blocks freed", || used() < 32 * MIB);
    });
}

#[test]
fn copies_stay_within_their_budget() {
    each_rclone(MIB, QUICK, |rig, _| {
        for (seed, name) in [(2, "b"), (3, "c"), (4, "large")] {
            let size = if name == "large" { 3 * MIB } else { MIB };
            put(&rig.source(), name, &content(seed, size));
        }
        let path = |name: &str| rig.mountpoint().join(name);
        for name in [CLIP, "b", "c", "large"] {
            eventually("a new clip", || path(name).exists());
            rig.cache_whole(Path::new(name)).unwrap();
        }
        let snapshots = snapshots(SnapshotMode::Auto, 2 * MIB + MIB / 2);
        let reused = |name| ask(&snapshots, &path(name)).unwrap().reused;
        assert!(!reused(CLIP) && !reused("b") && reused(CLIP));
        // b was used the longest ago.
        assert!(!reused("c") && reused(CLIP) && reused("c"));
        assert!(!reused("b"));
        assert_eq!(reason(ask(&snapshots, &path("large"))), Reason::Budget);
        // What others have open takes memory, whether we have it or not.
        let held = [CLIP, "b"].map(|name| ask(&snapshots, &path(name)).unwrap());
        assert_eq!(reason(ask(&snapshots, &path("c"))), Reason::Budget);
        // A mapping, too.
        let [first, second] = held;
        let map = Map::of(&first.fd);
        drop(first);
        assert_eq!(reason(ask(&snapshots, &path("c"))), Reason::Budget);
        drop(map);
        assert!(!reused("c"));
        // So does a version that is gone.
        let newer = content(5, MIB);
        fs::write(rig.source().join("b"), &newer).unwrap();
        set_time(&rig.source().join("b"), LATER);
        let got = || ask(&snapshots, &path("b")).is_ok_and(|w| bytes_of(w.fd) == newer);
        eventually("the new b", || {
            fs::read(path("b")).is_ok_and(|read| read == newer)
        });
        rig.cache_whole(Path::new("b")).unwrap();
        assert!(got());
        let third = ask(&snapshots, &path("b")).unwrap();
        assert_eq!(reason(ask(&snapshots, &path("c"))), Reason::Budget);
        assert!(bytes_of(&second.fd) == content(2, MIB));
        drop((second, third));
        assert!(!reused("c"));
    });
}

/// Prints it: no time is asserted.
#[test]
fn what_a_snapshot_costs() {
    each_place(&[(CLIP, 100 * MIB)], &[], |rig, kind| {
        let snapshots = snapshots(SnapshotMode::Auto, 256 * MIB);
        let path = clip(rig);
        let start = Instant::now();
        let whole = ask(&snapshots, &path).unwrap();
        let first = start.elapsed();
        assert!(bytes_of(whole.fd) == content(1, 100 * MIB));
        let clip = path_only(&path);
        let mut times: Vec<Duration> = (0..2_000)
            .map(|_| {
                let start = Instant::now();
                let whole = snapshots.open(clip.as_fd()).unwrap();
                let time = start.elapsed();
                assert!(whole.reused);
                time
            })
            .collect();
        times.sort();
        std::thread::sleep(Duration::from_millis(1_100));
        let start = Instant::now();
        assert!(ask(&snapshots, &path).unwrap().reused);
        println!(
            "{}: first {first:?}, again p50 {:?}, p99 {:?}, after a second {:?}",
            kind.name(),
            times[times.len() / 2],
            times[times.len() * 99 / 100],
            start.elapsed(),
        );
    });
}
