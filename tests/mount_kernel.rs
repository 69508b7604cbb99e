//! `mount` on each kernel of the matrix: by passthrough where the kernel has it,
//! by ranges where not, and the same bytes always. Without a program that a small
//! guest lacks.
#![cfg(feature = "mount")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use common::clips::{CLIP, MIB, cache_file, clip, each_rclone, set_time};
use common::reexport::*;
use common::snapshots::{LATER, Map, QUICK};
use common::{assert_fails, content, eventually, fuse_range};

const SIZE: usize = 2 * MIB;

/// Whether this kernel passes reads through.
fn passes() -> bool {
    let release = nix::sys::utsname::uname().unwrap();
    let release = release.release().to_str().unwrap().to_owned();
    let mut parts = release.split(['.', '-']).map(str::parse::<u32>);
    let (major, minor) = (
        parts.next().unwrap().unwrap(),
        parts.next().unwrap().unwrap(),
    );
    (major, minor) >= (6, 9)
}

fn way() -> &'static str {
    if passes() { "copy" } else { "ranges" }
}

#[test]
fn clips_are_read_as_this_kernel_can() {
    each_rclone(
        SIZE,
        &["--buffer-size=0", "--vfs-read-chunk-size=128k"],
        |rig, bytes| {
            fuse_range(&clip(rig), 0, 4096);
            let shown = Reexport::start(&rig.mountpoint(), PASSED);
            assert_eq!(shown.mounted["passthrough"], passes(), "{}", shown.mounted);
            let path = shown.join(CLIP);
            let status = fs::metadata(&path).unwrap();
            assert_eq!(status.ino(), fs::metadata(clip(rig)).unwrap().ino());
            // Partly there, and then whole: rclone says so when nobody has it open.
            let mut part = vec![0; MIB];
            let held = File::open(&path).unwrap();
            assert_eq!(shown.opens("ranges"), 1, "{}", shown.stats());
            held.read_exact_at(&mut part, 5).unwrap();
            assert!(part == bytes[5..][..MIB]);
            drop(held);
            rig.cache_whole(Path::new(CLIP)).unwrap();
            assert!(fs::read(&path).unwrap() == bytes);
            assert!(fuse_range(&path, 100_000, MIB) == bytes[100_000..][..MIB]);
            let files: Vec<_> = (0..10).map(|_| File::open(&path).unwrap()).collect();
            assert!(shown.opens(way()) >= 10, "{}", shown.stats());
            let maps: Vec<_> = files.iter().map(Map::of).collect();
            drop(maps);
            for file in &files {
                file.read_exact_at(&mut part, 77).unwrap();
                assert!(part == bytes[77..][..MIB]);
            }
            let stats = shown.stats();
            assert_eq!(
                (&stats["failed"], &stats["failed_reads"]),
                (&0.into(), &0.into())
            );
        },
    );
}

#[test]
fn what_is_required_and_missing_is_said() {
    each_rclone(1000, &[], |rig, _| {
        let require = ["--snapshot=copy", "--passthrough=require"];
        if passes() {
            let shown = Reexport::start(&rig.mountpoint(), &require);
            assert_eq!(shown.mounted["passthrough"], true);
            return;
        }
        let point = tempfile::tempdir().unwrap();
        let refused = mount(&rig.mountpoint(), point.path(), &require).output();
        assert_fails(
            &refused.unwrap(),
            3,
            "has no fuse passthrough: 6.9 or newer",
        );
    });
}

#[test]
fn versions_are_kept_apart() {
    each_rclone(SIZE, QUICK, |rig, old| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let shown = Reexport::start(&rig.mountpoint(), PASSED);
        let path = shown.join(CLIP);
        let held = File::open(&path).unwrap();
        assert_eq!(shown.opens(way()), 1, "{}", shown.stats());
        let mut part = [0; 1000];
        held.read_exact_at(&mut part, 0).unwrap();
        assert_eq!(part, old[..1000]);
        let new = content(2, SIZE + MIB);
        fs::write(rig.folder().join("new"), &new).unwrap();
        set_time(&rig.folder().join("new"), LATER);
        fs::rename(rig.folder().join("new"), rig.source().join(CLIP)).unwrap();
        eventually("the new clip", || {
            fs::read(&path).is_ok_and(|bytes| bytes == new)
        });
        if passes() {
            held.read_exact_at(&mut part, 1_000_000).unwrap();
            assert_eq!(part, old[1_000_000..][..1000]);
            assert_eq!(held.metadata().unwrap().len(), SIZE as u64);
        }
        drop(held);
        rig.cache_whole(Path::new(CLIP)).unwrap();
        for tree in ["vfs", "vfsMeta"] {
            let removed = fs::remove_file(cache_file(rig, tree, CLIP));
            // rclone may have been faster, where a machine is slow.
            let gone = removed
                .as_ref()
                .is_err_and(|e| e.kind() == ErrorKind::NotFound);
            assert!(removed.is_ok() || gone, "{removed:?}");
        }
        assert!(fs::read(&path).unwrap() == new);
        assert!(fs::read(&path).unwrap() == new);
    });
}
