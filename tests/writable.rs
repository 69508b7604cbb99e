//! Writable mounts: what programs do to clips through the mount, under a
//! `BypassFile`. Each test runs on every rclone program there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::time::Duration;

use common::clips::*;
use common::{Worker, fuse_range};
use vmafx_bypass::{BypassFile, Reason};

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
        wait_for_upload(rig);
        let file = open(rig);
        assert!(read_all(&file) == expected);
        assert!(file.stats().cache_bytes > 0, "{file:?}");
        assert!(fuse_range(&clip(rig), 0, expected.len()) == expected);
    });
}

/// A program that maps a clip shared, and stores into it.
const MAPPER: &str = "import mmap
clip = mmap.mmap(os.open('clip', os.O_RDWR), 0)
def store(at, text):
    clip[at:at + len(text)] = text
";

/// Reads the same at each of these offsets as FUSE.
fn assert_as_fuse(file: &BypassFile, through_fuse: &fs::File, offsets: &[u64]) {
    for &offset in offsets {
        let (mut own, mut expected) = (vec![0; 20_000], vec![0; 20_000]);
        let n = file.read_at(&mut own, offset).unwrap();
        let m = through_fuse.read_at(&mut expected, offset).unwrap();
        assert!(own[..n] == expected[..m], "at {offset}");
    }
}

#[test]
fn shared_stores_are_seen_before_they_are_flushed() {
    each_writable(4 * MIB, &[], |rig, bytes| {
        let steps =
            "sum(clip[1 << 20:2 << 20])\nstep()\nstore(1 << 20, b'a' * 100)\nstep()\nclip.flush()";
        let mut mapper = Worker::start(&rig.mountpoint(), &format!("{MAPPER}{steps}"), &[]);
        let mut expected = bytes.to_vec();
        let file = open(rig);
        // Before the stores: a child that closes a descriptor of the clip flushes it.
        let cache = cache_file(rig, "vfs", CLIP);
        assert_bypassed(&file, &expected);
        mapper.proceed();
        let mut block = vec![0; 8192];
        file.read_at(&mut block, MIB as u64).unwrap();
        let data = fs::read(&cache).unwrap();
        assert!(data == expected, "flushed already");
        expected[MIB..MIB + 100].fill(b'a');
        assert!(block == expected[MIB..MIB + 8192]);
        assert_eq!(file.stats().by_reason[&Reason::PageCache], 8192);
        // Other pages are read from the cache as before.
        let before = file.stats().cache_bytes;
        file.read_at(&mut block, 3 * MIB as u64).unwrap();
        assert!(block == bytes[3 * MIB..3 * MIB + 8192]);
        assert!(file.stats().cache_bytes > before);
        mapper.proceed();
        assert!(read_all(&file) == expected);
    });
}

#[test]
fn what_a_write_back_cache_holds_is_seen() {
    each_writable(4 * MIB, &["--write-back-cache"], |rig, bytes| {
        // Reading as well: the kernel reads the rest of a page that is written in part.
        let writer = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(clip(rig))
            .unwrap();
        let mut expected = bytes.to_vec();
        let file = open(rig);
        let cache = cache_file(rig, "vfs", CLIP);
        assert_bypassed(&file, &expected);
        for at in [MIB, 2 * MIB + 77] {
            writer.write_all_at(&[b'w'; 9000], at as u64).unwrap();
            let mut read = vec![0; 20_000];
            file.read_at(&mut read, at as u64 - 5000).unwrap();
            let data = fs::read(&cache).unwrap();
            assert!(data == expected, "flushed already");
            let mut seen = expected[at - 5000..at + 15_000].to_vec();
            seen[5000..14_000].fill(b'w');
            assert!(read == seen, "at {at}");
        }
        for at in [MIB, 2 * MIB + 77] {
            expected[at..at + 9000].fill(b'w');
        }
        writer.sync_all().unwrap();
        assert!(read_all(&file) == expected);
    });
}

#[test]
fn a_file_that_a_program_has_written_and_not_closed() {
    each_writable(4 * MIB, &[], |rig, bytes| {
        let file = open(rig);
        assert_bypassed(&file, bytes);
        let writer = fs::OpenOptions::new().write(true).open(clip(rig)).unwrap();
        let mut expected = bytes.to_vec();
        expected[MIB..MIB + 100].fill(b'd');
        writer
            .write_all_at(&expected[MIB..MIB + 100], MIB as u64)
            .unwrap();
        assert!(read_all(&file) == expected);
        let late = open(rig);
        assert_eq!(late.refusal().unwrap().reason, Reason::Dirty);
        assert!(read_all(&late) == expected);
        assert_eq!(late.stats().cache_bytes, 0);
    });
}

#[test]
fn a_clip_cut_in_place_and_grown_again_has_zeros() {
    each_writable(4 * MIB, &[], |rig, bytes| {
        let file = open(rig);
        assert_bypassed(&file, bytes);
        let writer = fs::OpenOptions::new().write(true).open(clip(rig)).unwrap();
        writer.set_len(2 * MIB as u64).unwrap();
        let mut block = vec![1; 8192];
        assert_eq!(file.read_at(&mut block, 3 * MIB as u64).unwrap(), 0);
        writer.set_len(4 * MIB as u64).unwrap();
        let mut expected = bytes[..2 * MIB].to_vec();
        expected.resize(4 * MIB, 0);
        assert!(read_all(&file) == expected);
        // Both at once, under a new proof.
        drop(writer);
        drop(file);
        wait_for_upload(rig);
        let file = open(rig);
        assert_eq!(file.refusal(), None);
        assert!(read_all(&file) == expected);
        let writer = fs::OpenOptions::new().write(true).open(clip(rig)).unwrap();
        writer.set_len(0).unwrap();
        writer.set_len(4 * MIB as u64).unwrap();
        assert!(read_all(&file) == vec![0; 4 * MIB]);
    });
}

#[test]
fn small_sequential_reads_see_each_write() {
    each_writable(4 * MIB, &[], |rig, bytes| {
        let writer = fs::OpenOptions::new().write(true).open(clip(rig)).unwrap();
        let mut file = open(rig);
        assert_eq!(file.refusal(), None);
        file.seek(SeekFrom::Start(MIB as u64)).unwrap();
        let mut block = [0; 4096];
        for _ in 0..3 {
            file.read_exact(&mut block).unwrap();
        }
        assert!(block == bytes[MIB + 8192..MIB + 12_288] && file.stats().cache_bytes > 0);
        // Ahead of the position, and where a buffer would have it.
        writer
            .write_all_at(&[b'n'; 4096], MIB as u64 + 12_288)
            .unwrap();
        file.read_exact(&mut block).unwrap();
        assert!(block == [b'n'; 4096]);
    });
}

#[test]
fn every_read_looks_at_the_metadata() {
    each_writable(4 * MIB, &[], |rig, bytes| {
        let file = open(rig);
        assert_bypassed(&file, bytes);
        let before = file.stats();
        edit_metadata(rig, CLIP, |text| {
            text.replace("\"Dirty\": false", "\"Dirty\": true")
        });
        let mut block = vec![0; MIB];
        file.read_at(&mut block, MIB as u64).unwrap();
        assert!(block == bytes[MIB..2 * MIB]);
        assert_eq!(file.stats().cache_bytes, before.cache_bytes);
    });
}

#[test]
fn a_block_that_is_there_in_part_is_left_to_fuse() {
    // The clip's second window begins in a block of which the first 100 bytes
    // are not there.
    const START: u64 = 16 << 20;
    each_remote(40 * MIB, &["--buffer-size=0"], |rig, _, bytes| {
        let direct = fs::OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_DIRECT)
            .open(clip(rig))
            .unwrap();
        let mut end = START + 100;
        let mut block = vec![0; 1 << 17];
        while end < bytes.len() as u64 {
            end += direct.read_at(&mut block, end).unwrap() as u64;
        }
        let data = fs::read(cache_file(rig, "vfs", CLIP)).unwrap();
        let start = START as usize;
        assert!(
            data[start..start + 100] == [0; 100] && data[start + 100..] == bytes[start + 100..]
        );
        // As a zombie item leaves it: all of it is listed.
        edit_metadata(rig, CLIP, |text| {
            let mut info: serde_json::Value = serde_json::from_str(&text).unwrap();
            let time = fs::metadata(clip(rig)).unwrap().modified().unwrap();
            info["Fingerprint"] = fingerprint(bytes.len(), time).into();
            listing_all(&info.to_string(), bytes.len())
        });
        let file = open(rig);
        assert_eq!(file.refusal(), None);
        let mut read = vec![0; 20 * MIB];
        file.read_at(&mut read, START).unwrap();
        assert!(read == bytes[start..start + 20 * MIB]);
        let stats = file.stats();
        assert_eq!(stats.by_reason[&Reason::Hole], 16 * MIB as u64, "{stats:?}");
    });
}

#[test]
fn ranges_that_end_within_a_block() {
    each_remote(
        4 * MIB,
        &["--buffer-size=0", "--vfs-write-back=1s"],
        |rig, _, bytes| {
            let through_fuse = fs::File::open(clip(rig)).unwrap();
            let direct = fs::OpenOptions::new()
                .read(true)
                .custom_flags(nix::libc::O_DIRECT)
                .open(clip(rig))
                .unwrap();
            direct.read_at(&mut [0; 100], 2 * MIB as u64 + 5).unwrap();
            let writer = fs::OpenOptions::new().write(true).open(clip(rig)).unwrap();
            writer.write_all_at(&[b'x'; 100], MIB as u64 + 7).unwrap();
            let offsets = [
                0,
                7,
                MIB as u64 - 10_000,
                MIB as u64 + 7,
                2 * MIB as u64 - 9000,
                2 * MIB as u64,
                2 * MIB as u64 + 5,
            ];
            let file = open(rig);
            assert_as_fuse(&file, &through_fuse, &offsets);
            // Not whole: what the metadata lists ends where the write did.
            edit_metadata(rig, CLIP, |text| {
                text.replace("\"Dirty\": true", "\"Dirty\": false")
            });
            let late = open(rig);
            assert_as_fuse(&late, &through_fuse, &offsets);
            drop((writer, file, late));
            let mut expected = bytes.to_vec();
            expected[MIB + 7..MIB + 107].fill(b'x');
            assert!(read_all(&open(rig)) == expected);
        },
    );
}
