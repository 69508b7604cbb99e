//! Quarantine lasts for a process, which this test therefore has to itself.
#![cfg(feature = "ebpf")]
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

use common::clips::*;
use common::handover::*;
use nix::sys::signal::Signal;
use vmafx_bypass::{BypassFile, BypassOptions, Reason, Verify};

/// A difference that one client finds is looked at by the server, which then
/// gives the clip to nobody.
#[test]
fn a_difference_takes_the_clip_from_all_clients() {
    let (rig, _folder, socket, run) = serving("differs", &["--socket-mode", "0666"]);
    let options = BypassOptions::new().socket(&socket).socket_alone();
    // Through FUSE the kernel has the right bytes.
    let bytes = fs::read(clip(&rig)).unwrap();
    let named = ["--socket", socket.to_str().unwrap()];
    let (_, stats) = read_by(&NOBODY, &clip(&rig), &named);
    assert_eq!(stats["state"], "active", "{stats}");
    let file = options.open(clip(&rig)).unwrap();
    let other = options.open(clip(&rig)).unwrap();
    assert_eq!((file.refusal(), other.refusal()), (None, None));
    let file = file.verifying(Verify::Full);
    // Only the kernel's pages have other bytes than the cache now: rclone itself
    // would serve what is in the cache.
    let plain = File::open(clip(&rig)).unwrap();
    plain.read_exact_at(&mut vec![0; 2 * MIB], 0).unwrap();
    let cached = cache_file(&rig, "vfs", CLIP);
    let time = fs::metadata(&cached).unwrap().modified().unwrap();
    let damaged = OpenOptions::new().write(true).open(&cached).unwrap();
    damaged.write_all_at(b"damage", MIB as u64).unwrap();
    // rclone shows this time, and the kernel drops its pages when it changes.
    damaged.set_modified(time).unwrap();
    let mut block = vec![0; 4096];
    file.read_at(&mut block, MIB as u64).unwrap();
    assert!(block == bytes[MIB..MIB + 4096], "FUSE's bytes are returned");
    assert_eq!(file.mismatch(), Some(MIB as u64));
    assert_eq!(file.refusal().unwrap().reason, Reason::Quarantined);
    // In this process nobody reads it from the cache any more.
    other.read_at(&mut block, 4096).unwrap();
    assert_eq!(other.stats().cache_bytes, 0);
    // By whichever way it is proven.
    let own = BypassFile::open(clip(&rig)).unwrap();
    assert_eq!(own.refusal().unwrap().reason, Reason::Quarantined);
    // Nor in any other that asks the server.
    let (_, stats) = read_by(&NOBODY, &clip(&rig), &named);
    assert_eq!(stats["state"], "quarantined", "{stats}");
    let explained = explain_by(&NOBODY, &rig, &named);
    assert_eq!(explained["state"], "quarantined", "{explained}");
    let lines = run.end(Signal::SIGTERM);
    let handover = &lines.last().unwrap()["handover"];
    assert_eq!(handover["ended"]["quarantined"], 1, "{handover}");
    assert_eq!(handover["refused"]["quarantined"], 2, "{handover}");
}
