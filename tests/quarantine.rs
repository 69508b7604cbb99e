//! Quarantine lasts for a process, which this test therefore has to itself.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use common::clips::*;
use common::snapshots::{ask, snapshots};
use common::{content, put, rig};
use vmafx_bypass::snapshot::SnapshotMode;
use vmafx_bypass::{BypassFile, Reason, Verify};

/// A difference that verification has found stays known by any path.
#[test]
fn a_quarantined_clip_is_quarantined_by_each_path() {
    // One file: two would end every bypass of this process.
    let bytes = content(1, 4 * MIB);
    let rig = &rig(|source| put(source, CLIP, &bytes));
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let data = cache_file(rig, "vfs", CLIP);
    let bind = tempfile::tempdir().unwrap();
    let mut mount = Command::new("mount");
    mount.arg("--bind").arg(rig.mountpoint()).arg(bind.path());
    assert!(mount.status().unwrap().success());
    // Two openers' kernel pages have the right bytes; the cache has not.
    let file = open(rig).verifying(Verify::Full);
    let mut block = vec![0; 4096];
    let plain = fs::File::open(clip(rig)).unwrap();
    plain.read_exact_at(&mut block, MIB as u64).unwrap();
    let damaged = fs::OpenOptions::new().write(true).open(&data).unwrap();
    let _ = file.refusal();
    damaged.write_all_at(b"damage", MIB as u64).unwrap();
    file.read_at(&mut block, MIB as u64).unwrap();
    println!("{:?} {:?}", file.mismatch(), file.refusal());
    // Nor is it handed over whole.
    let snapshots = snapshots(SnapshotMode::Auto, 64 * MIB);
    let handed = [rig.mountpoint(), bind.path().into()].map(|m| ask(&snapshots, &m.join(CLIP)));
    for handed in handed {
        assert_eq!(handed.unwrap_err().reason, Reason::Quarantined);
    }
    let other = BypassFile::open(bind.path().join(CLIP)).unwrap();
    let refusal = other.refusal();
    drop(other);
    let mut unmount = Command::new("umount");
    assert!(unmount.arg(bind.path()).status().unwrap().success());
    assert!(file.mismatch().is_some());
    println!("by the bind: {refusal:?}");
    assert!(refusal.is_some(), "bypassed again by another path");
}
