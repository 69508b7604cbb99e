//! Whole clips that are handed over: their bytes are a version's, and stay so.
//! Each test runs on every rclone program there is.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;

use common::clips::*;
use vmafx_bypass::Reason;
use vmafx_bypass::snapshot::{SnapshotKind, SnapshotMode, SnapshotOptions, Snapshots};

fn snapshots(mode: SnapshotMode, copy_budget: usize) -> Snapshots {
    Snapshots::new(SnapshotOptions {
        mode,
        copy_budget: copy_budget as u64,
    })
}

#[test]
fn a_clip_is_handed_over_whole() {
    each_rclone(8 * MIB, &[], |rig, bytes| {
        rig.cache_whole(CLIP.as_ref()).unwrap();
        let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
        let mut kinds = Vec::new();
        for turn in 0..3 {
            let fd = File::open(clip(rig)).unwrap();
            let start = std::time::Instant::now();
            let whole = snapshots.open(fd.as_fd()).unwrap();
            println!("{turn}: {:?} {:?}", start.elapsed(), whole);
            assert_eq!(whole.reused, turn > 0);
            assert_eq!(whole.size, bytes.len() as u64);
            kinds.push(whole.kind);
            let mut read = Vec::new();
            File::from(whole.fd).read_to_end(&mut read).unwrap();
            assert!(read == bytes);
        }
        assert_eq!(kinds, [SnapshotKind::Copy; 3]);
        let _ = (Reason::Budget, fs::metadata(clip(rig)));
    });
}
