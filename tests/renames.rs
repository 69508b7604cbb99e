//! Renames through a writable mount: rclone moves the data, then the metadata,
//! and an item that was renamed over may still write metadata of its own. Each
//! test runs on every rclone program there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::clips::*;
use common::{content, eventually, need_root, put, rclones, rig_with};
use vmafx_bypass::rig::{Rig, RigOptions};
use vmafx_bypass::{BypassFile, Reason};

const SIZE: usize = 8 * MIB;
/// rclone fetches little more than what is asked for.
const LITTLE: [&str; 2] = ["--buffer-size=0", "--vfs-read-chunk-size=128k"];

/// Two clips of one size: `clip`, and `other`, which takes its place.
struct Two {
    rig: Rig,
    clip: PathBuf,
    other: PathBuf,
    old: Vec<u8>,
    new: Vec<u8>,
    _remote: tempfile::TempDir,
}

impl Two {
    /// `times`: when each was changed.
    fn start(rclone: &Path, arguments: &[&str], times: [&str; 2]) -> Self {
        let remote = tempfile::tempdir().unwrap();
        let (old, new) = (content(1, SIZE), content(2, SIZE));
        for ((name, bytes), time) in [(CLIP, &old), ("other", &new)].into_iter().zip(times) {
            put(remote.path(), name, bytes);
            set_time(&remote.path().join(name), time);
        }
        let options = RigOptions {
            rclone: rclone.into(),
            read_only: false,
            remote: Some(remote.path().to_str().unwrap().into()),
            mount_arguments: arguments.iter().map(|&a| a.to_owned()).collect(),
            ..RigOptions::default()
        };
        let rig = rig_with(options, |_| ());
        Self {
            clip: clip(&rig),
            other: rig.mountpoint().join("other"),
            rig,
            old,
            new,
            _remote: remote,
        }
    }

    fn cache(&self, name: &str) {
        self.rig.cache_whole(Path::new(name)).unwrap();
    }
}

const SAME: [&str; 2] = ["2020-01-01"; 2];
const APART: [&str; 2] = ["2020-01-01", "2021-01-01"];

/// Runs a test on each rclone; `closed_at_once`: a newer one, too, writes its
/// metadata at the last close.
fn each_two(times: [&str; 2], more: &[&str], closed_at_once: bool, test: impl Fn(Two)) {
    need_root();
    for rclone in rclones() {
        let mut arguments = [&LITTLE[..], more].concat();
        if rclone.is_absolute() && closed_at_once {
            arguments.push("--vfs-handle-caching=0s");
        }
        test(Two::start(&rclone, &arguments, times));
    }
}

/// `other` over the open clip; then the dead item writes its metadata.
fn zombie(times: [&str; 2]) {
    each_two(times, &[], true, |two| {
        two.cache(CLIP);
        let dead = hold(&two.clip, 0, 1);
        drop(hold(&two.other, 0, 160 << 10));
        let metadata = cache_file(&two.rig, "vfsMeta", "other");
        eventually("metadata of a part", || {
            fs::read_to_string(&metadata).unwrap().contains("Pos")
        });
        let _alive = hold(&two.other, 0, 1);
        fs::rename(&two.other, &two.clip).unwrap();
        let file = BypassFile::open(&two.clip).unwrap();
        assert!(
            file.refusal().is_some(),
            "the dead item's file is still open"
        );
        let mut start = [0; 4096];
        file.read_at(&mut start, 0).unwrap();
        assert!(start == two.new[..4096]);
        drop(file);
        drop(dead);
        let metadata = cache_file(&two.rig, "vfsMeta", CLIP);
        let data = cache_file(&two.rig, "vfs", CLIP);
        eventually("the dead item's metadata", || {
            fs::read_to_string(&metadata)
                .unwrap()
                .contains("\"Size\": 8388608\n\t\t}")
        });
        assert!(fs::read(data).unwrap() != two.new, "nothing is missing");
        let file = BypassFile::open(&two.clip).unwrap();
        assert!(read_all(&file) == two.new);
        let expected = if times == SAME {
            Reason::Hole
        } else {
            Reason::StaleMetadata
        };
        let stats = file.stats();
        assert!(stats.by_reason.contains_key(&expected), "{stats:?}");
    });
}

#[test]
fn metadata_of_a_dead_item_is_of_another_version() {
    zombie(APART);
}

#[test]
fn metadata_of_a_dead_item_that_was_alike() {
    zombie(SAME);
}

#[test]
fn a_clip_that_was_renamed_over_just_after_its_close() {
    each_two(SAME, &[], false, |two| {
        two.cache(CLIP);
        drop(hold(&two.clip, 0, 1));
        let _alive = hold(&two.other, 0, 160 << 10);
        fs::rename(&two.other, &two.clip).unwrap();
        // A newer rclone closes the dead item 5 seconds after its last reader.
        for _ in 0..7 {
            let file = BypassFile::open(&two.clip).unwrap();
            let mut start = vec![0; 200 << 10];
            file.read_at(&mut start, 0).unwrap();
            assert!(start == two.new[..200 << 10], "{file:?}");
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
        let file = BypassFile::open(&two.clip).unwrap();
        assert!(read_all(&file) == two.new, "{file:?}");
    });
}

#[test]
fn a_rename_that_is_under_way() {
    // Alike: else the prime makes rclone drop what it has.
    each_two(SAME, &["--attr-timeout=1h"], true, |two| {
        two.cache(CLIP);
        two.cache("other");
        let held = hold(&two.clip, 0, 1);
        // So that the kernel asks rclone for neither during the rename.
        assert!(two.clip.exists() && two.other.exists());
        let data = cache_file(&two.rig, "vfs", "other");
        let metadata = cache_file(&two.rig, "vfsMeta", "other");
        let daemon = two.rig.daemon().unwrap();
        let slow = Slow::start(daemon, "/^rename:delay_enter=1500000");
        std::thread::scope(|scope| {
            let renamed = scope.spawn(|| fs::rename(&two.other, &two.clip));
            eventually("the data's rename", || !data.exists());
            assert!(metadata.exists(), "the metadata was renamed already");
            // Its data is found by its path: the other's, under the clip's metadata.
            let (read, stats) = read_without_ptrace(&two.clip);
            assert!(read == two.old || read == two.new, "mixed: {stats}");
            renamed.join().unwrap().unwrap();
        });
        drop(slow);
        drop(held);
        let file = BypassFile::open(&two.clip).unwrap();
        assert!(read_all(&file) == two.new);
    });
}

#[test]
fn a_clip_that_is_renamed_over_while_it_is_read() {
    each_two(APART, &[], true, |two| {
        two.cache(CLIP);
        two.cache("other");
        let file = BypassFile::open(&two.clip).unwrap();
        assert_eq!(file.refusal(), None);
        assert!(read_all(&file) == two.old);
        let through_fuse = fs::File::open(&two.clip).unwrap();
        fs::rename(&two.other, &two.clip).unwrap();
        // An open file stays what it is.
        for at in (0..SIZE).step_by(MIB) {
            use std::os::unix::fs::FileExt;
            let (mut own, mut expected) = (vec![0; 4096], vec![0; 4096]);
            file.read_at(&mut own, at as u64).unwrap();
            through_fuse
                .read_exact_at(&mut expected, at as u64)
                .unwrap();
            assert!(own == expected, "at {at}");
        }
        assert!(read_all(&BypassFile::open(&two.clip).unwrap()) == two.new);
    });
}

#[test]
fn a_clip_that_is_renamed_away_and_back() {
    each_two(APART, &[], true, |two| {
        two.cache(CLIP);
        two.cache("other");
        let file = BypassFile::open(&two.clip).unwrap();
        assert!(read_all(&file) == two.old);
        let away = two.rig.mountpoint().join("away");
        fs::rename(&two.clip, &away).unwrap();
        assert!(read_all(&file) == two.old);
        fs::rename(&two.other, &two.clip).unwrap();
        assert!(read_all(&file) == two.old);
        assert!(read_all(&BypassFile::open(&two.clip).unwrap()) == two.new);
        fs::rename(&two.clip, &two.other).unwrap();
        fs::rename(&away, &two.clip).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1_100));
        assert!(read_all(&file) == two.old);
        assert!(read_all(&BypassFile::open(&two.other).unwrap()) == two.new);
        let again = BypassFile::open(&two.clip).unwrap();
        assert!(read_all(&again) == two.old);
        assert!(again.stats().cache_bytes > 0, "{again:?}");
    });
}

#[test]
fn a_deleted_clip_is_not_the_one_that_is_named_deleted() {
    each_two(SAME, &[], true, |two| {
        // What the kernel calls a clip that was renamed over.
        let named = two.rig.mountpoint().join("clip (deleted)");
        fs::rename(&two.other, &named).unwrap();
        two.cache(CLIP);
        two.cache("clip (deleted)");
        let _held = hold(&named, 0, 1);
        let own = fs::File::open(&two.clip).unwrap();
        put(&two.rig.mountpoint(), "third", b"third");
        fs::rename(two.rig.mountpoint().join("third"), &two.clip).unwrap();
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&own));
        assert_eq!(fs::read_link(link).unwrap(), named);
        let file = BypassFile::from_fd(own.into()).unwrap();
        let refusal = file.refusal().unwrap();
        assert_eq!(refusal.reason, Reason::Changed, "{refusal}");
        let mut block = vec![0; MIB];
        // rclone may not read it any more; what it reads is its own.
        if let Ok(n) = file.read_at(&mut block, 2 * MIB as u64) {
            assert!(block[..n] == two.old[2 * MIB..2 * MIB + n]);
        }
    });
}
