//! A disk that takes its time, in a process of its own: every read is delayed.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;

use common::clips::*;
use common::eventually;
use common::snapshots::{ask, bytes_of, of_both};
use vmafx_bypass::Reason;
use vmafx_bypass::rig::Rig;

/// A process has one tracer.
static ONE: Mutex<()> = Mutex::new(());

/// What is read ahead is old by the time that it is there.
#[test]
fn a_slow_disk_does_not_end_a_file() {
    let _one = ONE.lock();
    each_rclone(MIB, &[], |rig, bytes| {
        let mut file = open_cached(rig);
        let slow = Slow::start(std::process::id(), "pread64:delay_exit=50ms");
        let mut read = Vec::new();
        let mut buffer = [0; 4096];
        while read.len() < 20 * buffer.len() {
            let n = file.read(&mut buffer).unwrap();
            assert!(n > 0, "end at {}: {:?}", read.len(), file.stats());
            read.extend_from_slice(&buffer[..n]);
        }
        drop(slow);
        assert!(read == bytes[..read.len()]);
        assert_eq!(file.stats().fuse_bytes(), 0);
    });
}

/// A copy counts only if all was the clip's when its last byte was there.
#[test]
fn a_clip_that_changes_while_it_is_copied_is_not_handed_over() {
    type Change = fn(&Rig);
    let _one = ONE.lock();
    let changes: [(&str, Change); 3] = [
        ("nothing", |_| ()),
        ("its cache file is removed", |rig| {
            fs::remove_file(cache_file(rig, "vfs", CLIP)).unwrap();
        }),
        ("its metadata names another version", |rig| {
            edit_metadata(rig, CLIP, |text| {
                text.replace("\"Fingerprint\": \"", "\"Fingerprint\": \"1")
            });
        }),
    ];
    for (huge, (what, change)) in changes.iter().flat_map(|c| [(0, *c), (1, *c)]) {
        each_rclone(16 * MIB, &[], |rig, bytes| {
            rig.cache_whole(Path::new(CLIP)).unwrap();
            let [sealed, of_huge_pages] = of_both(64 * MIB);
            let snapshots = if huge == 1 { of_huge_pages } else { sealed };
            let path = clip(rig);
            let slow = Slow::start(std::process::id(), "pread64:delay_exit=50ms");
            let result = std::thread::scope(|scope| {
                let asks = scope.spawn(|| ask(&snapshots, &path));
                eventually("a copy begun", copies);
                change(rig);
                asks.join().unwrap()
            });
            drop(slow);
            match result {
                Ok(whole) => {
                    assert_eq!(what, "nothing");
                    assert!(bytes_of(whole.fd) == bytes);
                }
                Err(refusal) => {
                    assert_ne!(what, "nothing", "{refusal}");
                    assert_eq!(refusal.reason, Reason::Changed, "{what}: {refusal}");
                }
            }
            drop(snapshots);
            assert!(!copies(), "a descriptor is left");
        });
    }
}

/// Whether this process has a copy of a clip open.
fn copies() -> bool {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter_map(|fd| fs::read_link(fd.path()).ok())
        .any(|target| {
            let target = target.to_string_lossy();
            // Sealed; or without a name in the root of a tmpfs, which is nowhere.
            target.contains("memfd:vmafx-bypass-clip")
                || (target.starts_with("/#") && target.ends_with(" (deleted)"))
        })
}
