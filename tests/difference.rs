//! `BypassFile::verifying`: a true difference is told and ends the bypass of the
//! clip; in a process of its own, where it ends nobody else's.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use common::clips::*;
use vmafx_bypass::rig::Rig;
use vmafx_bypass::{BypassFile, Reason, Verify};

/// A cached clip of which the kernel's pages have the bytes, and the cache file
/// gets others in place: as no proof can see.
fn damaged(rig: &Rig, from: usize, to: usize) -> BypassFile {
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let file = open(rig).verifying(Verify::Full);
    assert_eq!(file.refusal(), None);
    // By another descriptor, through FUSE.
    fs::read(clip(rig)).unwrap();
    let data = cache_file(rig, "vfs", CLIP);
    let data = fs::OpenOptions::new().write(true).open(data).unwrap();
    data.write_all_at(&vec![b'!'; to - from], from as u64)
        .unwrap();
    file
}

#[test]
fn a_difference_is_told_and_ends_the_bypass() {
    each_rclone(4 * MIB, &[], |rig, bytes| {
        let file = damaged(rig, 3 * MIB + 5, 3 * MIB + 100);
        let mut first = vec![0; 2 * MIB];
        file.read_at(&mut first, 0).unwrap();
        assert!(first == bytes[..2 * MIB]);
        let stats = file.stats();
        assert_eq!(stats.verified_bytes, 2 * MIB as u64);
        assert_eq!(stats.cache_bytes, 2 * MIB as u64);
        assert_eq!(file.mismatch(), None);
        // FUSE's bytes, not the cache's.
        assert!(read_all(&file) == bytes);
        assert_eq!(file.mismatch(), Some(3 * MIB as u64 + 5));
        let refusal = file.refusal().unwrap();
        assert_eq!(refusal.reason, Reason::Quarantined);
        assert!(refusal.detail.contains("3145733"), "{refusal}");
        // For good, also for those that verify nothing.
        let other = open(rig);
        assert_eq!(other.refusal().unwrap().reason, Reason::Quarantined);
        other.read_at(&mut first, 0).unwrap();
        assert!(first == bytes[..2 * MIB] && other.stats().cache_bytes == 0);
        std::thread::sleep(Duration::from_millis(1_100));
        let before = file.stats().cache_bytes;
        file.read_at(&mut first, 0).unwrap();
        assert_eq!(file.stats().cache_bytes, before);
    });
}
