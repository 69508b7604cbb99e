//! `BypassFile::verifying`: a clip that changes is no difference. (True ones are
//! found in `difference.rs`: they would end every bypass of this process.)
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::clips::*;
use common::{Worker, content};
use vmafx_bypass::rig::Rig;
use vmafx_bypass::{Reason, Verify};

/// Reads again and again, all of it verified, while `change` is called; no
/// change is taken for a difference.
fn no_alarm(rig: &Rig, change: impl Fn(u32)) {
    let file = open(rig).verifying(Verify::Full);
    read_all(&file);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                read_all(&file);
                assert_eq!(file.mismatch(), None, "{file:?}");
                read_all(&open(rig).verifying(Verify::Sample));
            }
        });
        for round in 0..12 {
            change(round);
            if reader.is_finished() {
                break;
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
    assert!(file.stats().verified_bytes > 0, "{file:?}");
    let reason = file.refusal().map(|refusal| refusal.reason);
    assert_ne!(reason, Some(Reason::Quarantined));
}

#[test]
fn a_clip_that_changes_at_the_remote_is_no_difference() {
    let soon = ["--dir-cache-time=200ms", "--attr-timeout=100ms"];
    each_rclone(2 * MIB, &soon, |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        no_alarm(rig, |round| {
            let new = content(round + 2, bytes.len());
            replace_remote(rig, &new, &format!("2031-01-01 00:00:{round:02} UTC"));
        });
    });
}

#[test]
fn an_eviction_is_no_difference() {
    each_rclone(2 * MIB, &[], |rig, _| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        no_alarm(rig, |_| {
            for kind in ["vfs", "vfsMeta"] {
                // Gone already, or not there yet.
                let _ = fs::remove_file(cache_file(rig, kind, CLIP));
            }
        });
    });
}

#[test]
fn a_write_through_the_mount_is_no_difference() {
    each_writable(2 * MIB, &["--vfs-write-back=100ms"], |rig, _| {
        no_alarm(rig, |round| {
            let writer = fs::OpenOptions::new().write(true).open(clip(rig)).unwrap();
            for at in (0..2 * MIB as u64).step_by(50_000) {
                writer.write_all_at(&[round as u8; 3000], at).unwrap();
            }
        });
    });
}

#[test]
fn a_shared_store_is_no_difference() {
    each_writable(2 * MIB, &[], |rig, bytes| {
        let script = "import mmap
clip = mmap.mmap(os.open('clip', os.O_RDWR), 0)
step()
seen = clip[(1 << 20) - 1]
step()
clip[(1 << 20) - 1] = ord('s')";
        let mut mapper = Worker::start(&rig.mountpoint(), script, &[]);
        let file = open(rig).verifying(Verify::Full);
        assert_eq!(file.refusal(), None);
        mapper.proceed();
        // What is compared takes seconds to come from the daemon, but for the
        // last page: it is stored into before the comparison comes to it.
        let slow = Slow::start(rig.daemon().unwrap(), "pread64:delay_enter=300000");
        let mut read = vec![0; MIB];
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| file.read_at(&mut read, 0).unwrap());
            std::thread::sleep(Duration::from_millis(450));
            mapper.proceed();
            assert!(!reader.is_finished(), "nothing was slow");
            assert_eq!(reader.join().unwrap(), MIB);
        });
        drop(slow);
        assert_eq!(file.mismatch(), None, "{file:?}");
        assert!(read[..MIB - 1] == bytes[..MIB - 1]);
        assert_eq!(read[MIB - 1], b's');
    });
}
