//! Whole clips that are handed over: their bytes are one version's, and stay so.
//! Each test runs on every rclone program there is.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::clips::*;
use common::snapshots::*;
use common::{content, eventually, fuse_range, put, stderr};
use rustix::fs::{IFlags, SealFlags};
use vmafx_bypass::Reason;
use vmafx_bypass::snapshot::{SnapshotKind, SnapshotMode};

#[test]
fn a_whole_clip_is_mapped_and_stays_as_it_was() {
    each_place(WHOLE, &[], |rig, kind| {
        let bytes = content(1, 8 * MIB);
        let maps = of_both(64 * MIB).map(|snapshots| {
            let whole = ask(&snapshots, &clip(rig)).unwrap();
            assert_eq!(whole.kind, kind);
            let map = whole.map().unwrap();
            assert!(*map == bytes[..]);
            map
        });
        // Cut, changed, evicted: whoever reads the mapping is not told.
        let cached = cache_file(rig, "vfs", CLIP);
        fs::write(&cached, "short").unwrap();
        fs::remove_file(&cached).unwrap();
        for map in &maps {
            assert!(**map == bytes[..]);
        }
    });
    each_rclone(MIB, &[], |rig, _| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let off = snapshots(SnapshotMode::Off, 0);
        let mut live = None;
        // rclone may still have it open.
        eventually("the cache file itself", || {
            live = ask(&off, &clip(rig)).ok();
            live.is_some()
        });
        assert_eq!(live.unwrap().map().unwrap_err().reason, Reason::Live);
    });
}

#[test]
fn a_clip_is_handed_over_whole() {
    each_place(WHOLE, &[], |rig, kind| {
        let bytes = content(1, 8 * MIB);
        let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
        let shown = fs::metadata(clip(rig)).unwrap();
        let mut inodes = Vec::new();
        for turn in 0..3 {
            // Either kind of descriptor.
            let whole = if turn == 1 {
                snapshots.open(File::open(clip(rig)).unwrap().as_fd())
            } else {
                ask(&snapshots, &clip(rig))
            };
            let whole = whole.unwrap();
            assert_eq!((whole.kind, whole.reused), (kind, turn > 0));
            assert_eq!(whole.size, bytes.len() as u64);
            let flags = rustix::fs::fcntl_getfl(&whole.fd).unwrap();
            assert_eq!(
                flags & rustix::fs::OFlags::RWMODE,
                rustix::fs::OFlags::RDONLY
            );
            assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
            let mut file = File::from(whole.fd);
            // At the start, whatever others have read.
            assert_eq!(file.stream_position().unwrap(), 0);
            let mut read = Vec::new();
            file.read_to_end(&mut read).unwrap();
            assert!(read == bytes);
            let own = file.metadata().unwrap();
            assert_eq!(own.modified().unwrap(), shown.modified().unwrap());
            assert_eq!(own.mode() & 0o7777, shown.mode() & 0o444);
            inodes.push((own.dev(), own.ino()));
        }
        assert!(inodes.iter().all(|i| *i == inodes[0]));
    });
}

#[test]
fn a_slow_reader_of_a_clip_that_is_replaced_sees_the_old_bytes_whole() {
    each_place(WHOLE, QUICK, |rig, kind| {
        let (old, new) = (content(1, 8 * MIB), content(2, 17 * MIB));
        let path = clip(rig);
        let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
        let whole = ask(&snapshots, &path).unwrap();
        assert_eq!(whole.kind, kind);
        let slow = File::from(whole.fd);
        // With this, rclone writes the new clip into the old cache file.
        let held = hold(&path, 0, 16);
        let mut read = vec![0; old.len()];
        let step = old.len() / 4;
        slow.read_exact_at(&mut read[..step], 0).unwrap();
        replace_remote(rig, &new, LATER);
        std::thread::scope(|scope| {
            let others: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        eventually("the new clip through FUSE", || {
                            fs::read(&path).is_ok_and(|read| read == new)
                        });
                    })
                })
                .collect();
            let mut reads = 0;
            while reads < 3
                || !others
                    .iter()
                    .all(std::thread::ScopedJoinHandle::is_finished)
            {
                let part = step * (1 + reads % 3);
                slow.read_exact_at(&mut read[part..part + step], part as u64)
                    .unwrap();
                assert!(read[part..part + step] == old[part..part + step]);
                reads += 1;
                // Whoever asks now gets one of the two, or none.
                if let Ok(other) = ask(&snapshots, &path) {
                    let got = bytes_of(other.fd);
                    assert!(got == old || got == new, "neither the old nor the new");
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        assert!(read == old && bytes_of(&slow) == old);
        drop(held);
        assert!(bytes_of(&slow) == old);
        // What the last close says to be cached may be in the unlinked file.
        let mut fresh = None;
        eventually("a snapshot of the new clip", || {
            rig.cache_whole(Path::new(CLIP)).unwrap();
            fresh = ask(&snapshots, &path).ok();
            fresh.is_some()
        });
        let fresh = fresh.unwrap();
        assert_eq!(fresh.kind, kind);
        assert!(bytes_of(fresh.fd) == new && bytes_of(&slow) == old);
    });
}

#[test]
fn without_a_snapshot_a_reader_sees_what_never_was() {
    each_rclone(8 * MIB, QUICK, |rig, old| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let snapshots = snapshots(SnapshotMode::Off, 0);
        let whole = ask(&snapshots, &clip(rig)).unwrap();
        assert_eq!(whole.kind, SnapshotKind::Live);
        assert!(bytes_of(&whole.fd) == old);
        let held = hold(&clip(rig), 0, 16);
        let new = content(2, 17 * MIB);
        replace_remote(rig, &new, LATER);
        eventually("the new clip through FUSE", || {
            fuse_range(&clip(rig), 0, 16) == new[..16]
        });
        // The documented risk: rclone writes the new clip into this inode.
        eventually("bytes of no version", || {
            let read = bytes_of(&whole.fd);
            read != old && read != new[..read.len().min(new.len())]
        });
        let read = bytes_of(&whole.fd);
        let zeros = read.chunks(4096).filter(|b| b.iter().all(|b| *b == 0));
        println!("{} bytes, {} blocks of zeros", read.len(), zeros.count());
        drop(held);
    });
}

#[test]
fn a_live_clip_is_open_nowhere_else() {
    each_rclone(MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let snapshots = snapshots(SnapshotMode::Off, 0);
        let held = hold(&clip(rig), 0, 16);
        assert_eq!(reason(ask(&snapshots, &clip(rig))), Reason::Busy);
        drop(held);
        eventually("a live clip", || ask(&snapshots, &clip(rig)).is_ok());
        // Asked for again, rclone is not made to open it.
        let whole = ask(&snapshots, &clip(rig)).unwrap();
        assert_eq!((whole.kind, whole.reused), (SnapshotKind::Live, true));
        assert!(bytes_of(whole.fd) == bytes);
        let other = common::snapshots::snapshots(SnapshotMode::Off, 0);
        assert!(ask(&other, &clip(rig)).is_ok(), "readers do no harm");
    });
}

#[test]
fn what_keeps_clips_open_for_seconds_makes_live_ones_wait() {
    common::need_root();
    let Some(newest) = std::env::var_os("RCLONE_NEW") else {
        panic!("RCLONE_NEW is not set: run `make test`");
    };
    let options = vmafx_bypass::rig::RigOptions {
        rclone: newest.into(),
        ..Default::default()
    };
    let rig = common::rig_with(options, |s| put(s, CLIP, &content(1, MIB)));
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let snapshots = snapshots(SnapshotMode::Off, 0);
    assert_eq!(reason(ask(&snapshots, &clip(&rig))), Reason::Busy);
    eventually("a live clip", || ask(&snapshots, &clip(&rig)).is_ok());
}

#[test]
fn a_new_version_is_a_new_snapshot() {
    each_place(&[(CLIP, MIB)], QUICK, |rig, kind| {
        let snapshots = snapshots(SnapshotMode::Require, 64 * MIB);
        let path = clip(rig);
        let mut handed = vec![(1, ask(&snapshots, &path).unwrap())];
        for seed in 2..5 {
            // Of equal size: only the time tells.
            let new = content(seed, MIB);
            replace_remote(rig, &new, &format!("203{seed}-01-01 00:00:00 UTC"));
            eventually("a snapshot of the new clip", || {
                // Never behind what FUSE has shown before.
                let shown = fs::read(&path).unwrap_or_default();
                match ask(&snapshots, &path) {
                    Ok(whole) => {
                        let got = bytes_of(&whole.fd);
                        assert!(shown != new || got == new, "behind FUSE");
                        got == new
                    }
                    Err(_) => false,
                }
            });
            let whole = ask(&snapshots, &path).unwrap();
            assert_eq!((whole.kind, whole.reused), (kind, true));
            handed.push((seed, whole));
        }
        for (seed, whole) in &handed {
            assert!(bytes_of(&whole.fd) == content(*seed, MIB), "version {seed}");
        }
    });
}

#[test]
fn a_clip_that_is_not_whole_is_refused() {
    each_rclone(
        36 * MIB,
        &["--buffer-size=0", "--vfs-read-chunk-size=1M"],
        |rig, bytes| {
            let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
            let path = clip(rig);
            assert_eq!(reason(ask(&snapshots, &path)), Reason::NoMetadata);
            fuse_range(&path, 0, 2 * MIB);
            eventually("a part in the metadata", || {
                reason(ask(&snapshots, &path)) == Reason::Partial
            });
            rig.cache_whole(Path::new(CLIP)).unwrap();
            let whole = ask(&snapshots, &path).unwrap();
            assert!(bytes_of(&whole.fd) == bytes);
            let held = hold(&path, 0, 16);
            let fresh = common::snapshots::snapshots(SnapshotMode::Auto, 64 * MIB);
            edit_metadata(rig, CLIP, |text| {
                text.replace("\"Dirty\": false", "\"Dirty\": true")
            });
            for snapshots in [&snapshots, &fresh] {
                assert_eq!(reason(ask(snapshots, &path)), Reason::Dirty);
            }
            drop(held);
            eventually("metadata by rclone", || ask(&fresh, &path).is_ok());
            let fresh = common::snapshots::snapshots(SnapshotMode::Auto, 64 * MIB);
            let punched = Command::new("fallocate")
                .args(["--punch-hole", "--offset=20MiB", "--length=64KiB"])
                .arg(cache_file(rig, "vfs", CLIP))
                .status();
            assert!(punched.unwrap().success());
            assert_eq!(reason(ask(&fresh, &path)), Reason::Hole);
            assert!(bytes_of(&whole.fd) == bytes);
        },
    );
}

#[test]
fn an_evicted_or_renamed_clip_is_another() {
    each_place(WHOLE, QUICK, |rig, _| {
        let bytes = content(1, 8 * MIB);
        let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
        let path = clip(rig);
        let whole = ask(&snapshots, &path).unwrap();
        for tree in ["vfs", "vfsMeta"] {
            fs::remove_file(cache_file(rig, tree, CLIP)).unwrap();
        }
        let refused = reason(ask(&snapshots, &path));
        assert!(matches!(refused, Reason::NoMetadata), "{refused}");
        rig.unmount();
        rig.mount().unwrap();
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let again = ask(&snapshots, &path).unwrap();
        assert!(!again.reused);
        let named = path_only(&path);
        fs::rename(rig.source().join(CLIP), rig.source().join("other")).unwrap();
        let other = rig.mountpoint().join("other");
        eventually("the new name", || other.exists() && !path.exists());
        let refused = reason(snapshots.open(named.as_fd()));
        assert!(matches!(refused, Reason::Changed | Reason::NoMetadata));
        rig.cache_whole(Path::new("other")).unwrap();
        let other = ask(&snapshots, &other).unwrap();
        assert!(!other.reused);
        for whole in [whole, again, other] {
            assert!(bytes_of(whole.fd) == bytes);
        }
    });
}

#[test]
fn clips_on_writable_mounts_are_refused() {
    each_writable(MIB, &[], |rig, _| {
        let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
        let refusal = ask(&snapshots, &clip(rig)).unwrap_err();
        assert_eq!(refusal.reason, Reason::Unsupported);
        assert!(refusal.detail.contains("is writable"), "{refusal}");
    });
}

#[test]
fn a_remount_as_writable_ends_snapshots() {
    each_place(&[(CLIP, MIB)], &[], |rig, _| {
        let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
        assert!(ask(&snapshots, &clip(rig)).is_ok());
        rig.unmount();
        rig.set_read_only(false);
        rig.mount().unwrap();
        assert_eq!(reason(ask(&snapshots, &clip(rig))), Reason::Unsupported);
    });
}

#[test]
fn a_receiver_cannot_write() {
    each_place(WHOLE, &[], |rig, kind| {
        for snapshots in of_both(64 * MIB) {
            let file = File::from(ask(&snapshots, &clip(rig)).unwrap().fd);
            assert!(file.write_at(b"x", 0).is_err());
            let refused = |result: std::io::Result<()>| {
                let error = result.unwrap_err();
                let refusals = [Some(nix::libc::EPERM), Some(nix::libc::EROFS)];
                assert!(refusals.contains(&error.raw_os_error()), "{error}");
            };
            // Root can get around all but this.
            let sealed = rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| {
                seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW)
            });
            match writable(&file) {
                Ok(again) => {
                    assert!(sealed && kind == SnapshotKind::Copy);
                    refused(again.write_at(b"x", 0).map(|_| ()));
                    refused(again.set_len(0));
                    refused(again.set_len(9 * MIB as u64));
                    let more = rustix::fs::fcntl_add_seals(&again, SealFlags::FUTURE_WRITE);
                    refused(more.map_err(Into::into));
                }
                Err(e) => {
                    assert!(!sealed);
                    refused(Err(e));
                    if kind == SnapshotKind::Copy {
                        // Nor its attributes, by which it could become writable.
                        let mode = rustix::fs::Mode::RWXU;
                        refused(rustix::fs::fchmod(&file, mode).map_err(Into::into));
                        assert!(rustix::fs::ioctl_setflags(&file, IFlags::empty()).is_err());
                    }
                }
            }
            assert!(bytes_of(&file) == content(1, 8 * MIB));
        }
    });
}

#[test]
fn the_kill_switch_ends_snapshots() {
    let own = std::env::current_exe().unwrap();
    let output = Command::new(own)
        .args(["--exact", "with_the_kill_switch", "--ignored"])
        .env("VMAFX_EBPF_BYPASS", "0")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}

#[test]
#[ignore = "run by the one above, in an environment of its own"]
fn with_the_kill_switch() {
    each_rclone(MIB, &[], |rig, _| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
        assert_eq!(reason(ask(&snapshots, &clip(rig))), Reason::Disabled);
    });
}
