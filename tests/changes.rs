//! What happens to clips, caches, daemons and mounts under a `BypassFile`: the
//! bytes stay FUSE's. Each test runs on every rclone program there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::clips::*;
use common::{content, eventually, fuse_range, need_root, put, rclones, rig_with};
use vmafx_bypass::cache::rclone::parse_metadata;
use vmafx_bypass::{BypassFile, Reason};

#[test]
fn a_clip_replaced_at_the_remote_is_never_mixed_with_the_old_cache() {
    each_rclone(
        8 * MIB,
        &["--dir-cache-time=1s", "--attr-timeout=1s"],
        |rig, old| {
            let file = open_cached(rig);
            assert!(read_all(&file) == old);
            let new = content(2, old.len() + MIB);
            replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
            // What FUSE shows is the measure: wait until it has noticed.
            eventually("the new clip through FUSE", || {
                fuse_range(&clip(rig), 0, 16) == new[..16]
            });
            let mut start = vec![0; MIB];
            for _ in 0..20 {
                // The old data file is unlinked, and rclone writes the new bytes
                // into it as long as anyone has it open.
                assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
                let through_fuse = fuse_range(&clip(rig), 0, MIB);
                assert!(start == old[..MIB] || start == new[..MIB], "mixed bytes");
                assert!(start == through_fuse, "behind FUSE");
            }
            drop(file);
            let fresh = open(rig);
            assert!(read_all(&fresh) == new);
        },
    );
}

#[test]
fn an_evicted_clip_reads_on() {
    each_rclone(8 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        let mut start = vec![0; MIB];
        file.read_at(&mut start, 0).unwrap();
        // As rclone's own eviction: data first, then metadata.
        fs::remove_file(cache_file(rig, "vfs", CLIP)).unwrap();
        fs::remove_file(cache_file(rig, "vfsMeta", CLIP)).unwrap();
        let before = file.stats().cache_bytes;
        assert_eq!(file.read_at(&mut start, 4 * MIB as u64).unwrap(), MIB);
        assert!(start == bytes[4 * MIB..5 * MIB]);
        assert_eq!(
            file.stats().cache_bytes,
            before,
            "an unlinked file is not read"
        );
        assert_ne!(file.refusal(), None);
    });
}

#[test]
fn a_hole_under_full_metadata_is_left_to_fuse() {
    each_rclone(36 * MIB, &[], |rig, _| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        // What a power loss leaves on ext4 (the size stays).
        let punched = Command::new("fallocate")
            .args(["--punch-hole", "--offset=20MiB", "--length=64KiB"])
            .arg(cache_file(rig, "vfs", CLIP))
            .status();
        assert!(punched.unwrap().success());
        let file = open(rig);
        assert_eq!(file.refusal(), None);
        // rclone itself serves zeros here: FUSE is the measure.
        assert!(read_all(&file) == fs::read(clip(rig)).unwrap());
        assert_eq!(file.stats().by_reason[&Reason::Hole], 16 * MIB as u64);
    });
}

/// Edits the metadata of a cached clip while rclone has it closed.
fn with_metadata(edit: impl Fn(String) -> String, expected: Reason) {
    each_rclone(MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let path = cache_file(rig, "vfsMeta", CLIP);
        // Opened by us once more, rclone rewrites what it has in memory; so
        // the edit comes between the prime and the second look.
        let file = open(rig);
        assert_eq!(file.refusal(), None);
        let text = fs::read_to_string(&path).unwrap();
        parse_metadata(text.as_bytes()).unwrap();
        fs::write(&path, edit(text)).unwrap();
        std::thread::sleep(Duration::from_millis(1_100));
        assert!(read_all(&file) == bytes);
        let stats = file.stats();
        assert_eq!(stats.cache_bytes, 0, "{stats:?}");
        assert!(stats.by_reason.contains_key(&expected), "{stats:?}");
    });
}

#[test]
fn torn_metadata_ends_the_proof() {
    with_metadata(
        |text| text[..text.len() / 2].to_owned(),
        Reason::BadMetadata,
    );
}

#[test]
fn empty_metadata_ends_the_proof() {
    with_metadata(|_| String::new(), Reason::BadMetadata);
}

#[test]
fn metadata_of_another_size_ends_the_proof() {
    let shorter = |text: String| text.replacen("\"Size\": 1048576", "\"Size\": 1048575", 1);
    with_metadata(shorter, Reason::SizeMismatch);
    let version =
        |text: String| text.replace("\"Fingerprint\": \"1048576,", "\"Fingerprint\": \"1048575,");
    with_metadata(version, Reason::StaleMetadata);
}

#[test]
fn dirty_metadata_ends_the_proof() {
    with_metadata(
        |text| text.replace("\"Dirty\": false", "\"Dirty\": true"),
        Reason::Dirty,
    );
}

#[test]
fn metadata_of_another_version_ends_the_proof() {
    // A time that is one: of the decade before.
    let older = |text: String| {
        text.replace(
            "\"Fingerprint\": \"1048576,202",
            "\"Fingerprint\": \"1048576,201",
        )
    };
    with_metadata(older, Reason::StaleMetadata);
}

#[test]
fn two_mounts_on_one_cache_are_refused() {
    each_rclone(MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let second = tempfile::tempdir().unwrap();
        let daemon = rig.daemon().unwrap();
        let arguments = fs::read(format!("/proc/{daemon}/cmdline")).unwrap();
        let text = String::from_utf8(arguments).unwrap();
        let own = rig.mountpoint().to_str().unwrap().to_owned();
        let arguments = text.split_terminator('\0').map(|a| {
            if a == own {
                second.path().to_str().unwrap()
            } else {
                a
            }
        });
        let mut arguments = arguments.map(str::to_owned);
        let mut other = Command::new(arguments.next().unwrap())
            .args(arguments)
            .spawn()
            .unwrap();
        eventually("a second mount", || second.path().join(CLIP).exists());
        let file = open(rig);
        let (refusal, read) = (file.refusal(), read_all(&file));
        drop(file);
        assert!(
            Command::new("umount")
                .arg(second.path())
                .status()
                .unwrap()
                .success()
        );
        other.wait().unwrap();
        assert_eq!(refusal.unwrap().reason, Reason::Unsupported);
        assert!(read == bytes);
    });
}

#[test]
fn a_killed_daemon_leaves_what_is_proven_and_a_clear_error() {
    each_rclone(
        64 * MIB,
        &["--buffer-size=0", "--vfs-read-chunk-size=1M"],
        |rig, bytes| {
            fuse_range(&clip(rig), 0, 2 * MIB);
            let mut file = open(rig);
            eventually("an active clip", || {
                file = open(rig);
                file.refusal().is_none()
            });
            let mut start = vec![0; MIB];
            assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
            rig.kill_daemon();
            assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
            assert!(start == bytes[..MIB]);
            let error = file.read_at(&mut start, 60 * MIB as u64).unwrap_err();
            assert_eq!(
                error.raw_os_error(),
                Some(nix::errno::Errno::ENOTCONN as i32)
            );
            // One call over both: what is proven, and then the error.
            let mut all = vec![0; 64 * MIB];
            let n = file.read_at(&mut all, 0).unwrap();
            assert!(n >= MIB && n < all.len() && all[..n] == bytes[..n]);
        },
    );
}

#[test]
fn a_mount_that_is_gone_does_not_hang_a_reader() {
    each_rclone(4 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        rig.unmount();
        let mut start = vec![0; MIB];
        // The data file is as proven as before; the companion is dead.
        assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
        assert!(start == bytes[..MIB]);
        // A mount that comes back does not bring the companion back to life.
        rig.mount().unwrap();
        assert!(read_all(&open_cached(rig)) == bytes);
    });
}

#[test]
fn a_file_that_moved_with_its_mount_is_still_itself() {
    need_root();
    for rclone in rclones() {
        // Alike to the byte in size and time; the folder's is another clip.
        let (outer, inner) = (content(10, 4 * MIB), content(11, 4 * MIB));
        let rig = rig_with(options(&rclone, &[]), |source| {
            put(source, CLIP, &outer);
            put(source, "x/clip", &inner);
            let times = ["clip", "x/clip"].map(|name| source.join(name));
            let touched = Command::new("touch")
                .args(["-d", "2020-01-01"])
                .args(times)
                .status();
            assert!(touched.unwrap().success());
        });
        rig.cache_whole(Path::new(CLIP)).unwrap();
        rig.cache_whole(Path::new("x/clip")).unwrap();
        // At P/x the mount shows the outer clip as P/x/clip; moved to P, that
        // path is the inner one's.
        let place = tempfile::tempdir().unwrap();
        let sub = place.path().join("x");
        let script = r#"mount --make-private "$1"; mkdir "$2"; mount --move "$1" "$2""#;
        let mut moved = Command::new("sh");
        moved
            .args(["-ec", script, "sh"])
            .arg(rig.mountpoint())
            .arg(&sub);
        let status = moved.output().unwrap();
        assert!(status.status.success(), "{}", common::stderr(&status));
        let file = BypassFile::open(sub.join(CLIP)).unwrap();
        assert_eq!(file.refusal(), None);
        let mut start = vec![0; MIB];
        file.read_at(&mut start, 0).unwrap();
        assert!(start == outer[..MIB]);
        let mut again = Command::new("mount");
        again.arg("--move").arg(&sub).arg(place.path());
        assert!(again.status().unwrap().success());
        let _held = fuse_range(&sub.join(CLIP), 0, 16);
        // A rewrite of its metadata asks for another proof.
        let metadata = walk(&rig.cache().join("vfsMeta"));
        for path in metadata {
            assert!(Command::new("touch").arg(path).status().unwrap().success());
        }
        std::thread::sleep(Duration::from_millis(1_200));
        let read = read_all(&file);
        drop(file);
        assert!(
            Command::new("umount")
                .arg(place.path())
                .status()
                .unwrap()
                .success()
        );
        assert!(read == outer, "another clip's bytes");
    }
}

#[test]
fn a_remount_as_writable_is_noticed() {
    need_root();
    for rclone in rclones() {
        let bytes = content(12, MIB);
        let mut rig = rig_with(options(&rclone, &[]), |s| put(s, CLIP, &bytes));
        drop(open_cached(&rig));
        rig.unmount();
        rig.set_read_only(false);
        rig.mount().unwrap();
        let file = open(&rig);
        assert!(read_all(&file) == bytes);
        // As such a mount is read: not at the edges.
        assert!(file.stats().by_reason[&Reason::Edge] > 0, "{file:?}");
    }
}

#[test]
fn a_second_link_of_the_cache_file_is_refused() {
    each_rclone(MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        let data = cache_file(rig, "vfs", CLIP);
        fs::hard_link(&data, rig.cache().join("link")).unwrap();
        // An unlink by rclone would leave a link: the reader could not see it.
        assert!(read_all(&file) == bytes);
        assert_eq!(file.stats().cache_bytes, 0);
        assert_eq!(open(rig).refusal().unwrap().reason, Reason::Unsupported);
    });
}

#[test]
fn a_clip_that_shrinks_at_the_remote_ends_where_fuse_says() {
    each_rclone(
        8 * MIB,
        &["--dir-cache-time=1s", "--attr-timeout=1s"],
        |rig, old| {
            let file = open_cached(rig);
            let mut tail = vec![0; 4096];
            assert_eq!(file.read_at(&mut tail, 7 * MIB as u64).unwrap(), 4096);
            let new = content(13, 4 * MIB);
            replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
            // Somebody looks at it, and nobody opens it.
            eventually("the new size", || {
                fs::metadata(clip(rig)).unwrap().len() == new.len() as u64
            });
            std::thread::sleep(Duration::from_millis(2_200));
            assert_eq!(file.read_at(&mut tail, 7 * MIB as u64).unwrap(), 0);
            drop(file);
            assert!(read_all(&open(rig)) == new && old.len() > new.len());
        },
    );
}

#[test]
fn a_rewritten_metadata_file_costs_no_fuse_read() {
    each_rclone(4 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        // A proof that is younger than a second is not renewed at once.
        std::thread::sleep(Duration::from_millis(1_100));
        let path = cache_file(rig, "vfsMeta", CLIP);
        assert!(Command::new("touch").arg(path).status().unwrap().success());
        assert!(read_all(&file) == bytes);
        assert_eq!(file.stats().fuse_bytes(), 0, "{:?}", file.stats());
    });
}

#[test]
fn an_rclone_of_another_namespace_on_the_same_cache_is_seen() {
    each_rclone(MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let other = tempfile::tempdir().unwrap();
        let daemon = rig.daemon().unwrap();
        let text = String::from_utf8(fs::read(format!("/proc/{daemon}/cmdline")).unwrap()).unwrap();
        let own = rig.mountpoint().to_str().unwrap().to_owned();
        let arguments = text
            .split_terminator('\0')
            .filter(|&a| a != "--read-only")
            .map(|a| {
                if a == own {
                    other.path().to_str().unwrap()
                } else {
                    a
                }
            });
        let mut hidden = Command::new("unshare")
            .args(["-m", "--propagation", "private"])
            .args(arguments)
            .spawn()
            .unwrap();
        let seen = || fs::read_to_string(format!("/proc/{}/mountinfo", hidden.id()));
        let point = other.path().to_str().unwrap().to_owned();
        eventually("a hidden mount", || seen().unwrap().contains(&point));
        // What was located before it came is looked at again with the table.
        rig.unmount();
        rig.mount().unwrap();
        let file = open(rig);
        let (refusal, read) = (file.refusal(), read_all(&file));
        hidden.kill().unwrap();
        hidden.wait().unwrap();
        assert_eq!(refusal.unwrap().reason, Reason::Unsupported);
        assert!(read == bytes);
    });
}

#[test]
fn a_cache_file_of_another_size_is_not_read() {
    each_rclone(2 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        let mut start = vec![0; MIB];
        assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
        let before = file.stats().cache_bytes;
        let data = fs::OpenOptions::new()
            .write(true)
            .open(cache_file(rig, "vfs", CLIP))
            .unwrap();
        data.set_len(3 * MIB as u64).unwrap();
        // rclone itself may call it corrupted; then so do we.
        if let Ok(n) = file.read_at(&mut start, 0) {
            assert!(start[..n] == bytes[..n]);
        }
        assert_eq!(file.stats().cache_bytes, before);
    });
}

#[test]
fn what_was_read_ahead_does_not_outlive_its_proof() {
    each_rclone(4 * MIB, &[], |rig, bytes| {
        let mut file = open_cached(rig);
        let mut block = [0; 4096];
        file.read_exact(&mut block).unwrap();
        fs::remove_file(cache_file(rig, "vfs", CLIP)).unwrap();
        fs::remove_file(cache_file(rig, "vfsMeta", CLIP)).unwrap();
        assert_eq!(file.read_at(&mut block, 2 * MIB as u64).unwrap(), 4096);
        let before = file.stats();
        assert!(before.fuse_bytes() > 0);
        // Well within the second that the buffer may be old.
        file.read_exact(&mut block).unwrap();
        assert!(block == bytes[4096..8192]);
        assert_eq!(file.stats().cache_bytes, before.cache_bytes);
    });
}
