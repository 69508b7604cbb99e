//! A disk that takes its time, in a process of its own: every read is delayed, or
//! nothing is answered.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, mpsc};
use std::thread;

use common::bindfs::Bindfs;
use common::clips::*;
use common::snapshots::{ask, bytes_of, of_both};
use common::{content, eventually, need_root, put, rig_with};
use nix::mount::{MsFlags, mount};
use nix::unistd::{Pid, gettid};
use vmafx_bypass::cache::rclone::{Folders, Locator, estimate};
use vmafx_bypass::mounts::MountTable;
use vmafx_bypass::rig::Rig;
use vmafx_bypass::{BypassFile, Reason};

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

/// Clips of other mounts are opened while the cache of one is looked for in vain.
#[test]
fn a_dead_disk_holds_up_its_own_mount_alone() {
    let _one = ONE.lock();
    need_root();
    let rig_of = |seed| {
        rig_with(options(Path::new("rclone"), &[]), |source| {
            put(source, CLIP, &content(seed, MIB));
        })
    };
    let (stuck, rig) = (rig_of(1), rig_of(2));
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let disk = Bindfs::over(&stuck.cache(), &stuck.cache());
    disk.stop();
    let locator = Locator::now().unwrap();
    let found = locator.table().containing(&stuck.mountpoint());
    let found = found.unwrap().clone();
    let (tell, told) = mpsc::channel();
    let looks = thread::spawn(move || {
        tell.send(gettid()).unwrap();
        locator.locate(&found).map(drop)
    });
    let thread = told.recv().unwrap();
    eventually("a look at the dead disk", || waits_for_fuse(thread));
    let reads = |rig: &Rig| {
        let path = clip(rig);
        let reads = thread::spawn(move || {
            let file = BypassFile::open(path).unwrap();
            (file.refusal(), read_all(&file))
        });
        eventually("a clip of another mount", || reads.is_finished());
        reads.join().unwrap()
    };
    // One whose cache is known, and one whose cache is looked for.
    assert!(reads(&rig) == (None, content(2, MIB)));
    let late = rig_of(3);
    fs::read(clip(&late)).unwrap();
    let table = MountTable::read().unwrap();
    let folders = Folders::new(table.containing(&late.mountpoint()).unwrap(), late.cache());
    eventually("a cached clip", || {
        let estimate = estimate(&folders, Path::new(CLIP), MIB as u64);
        estimate.state.is_none()
    });
    let (refusal, bytes) = reads(&late);
    assert!(bytes == content(3, MIB));
    assert_eq!(refusal, None);
    assert!(waits_for_fuse(thread));
    // What it finds in the end is of a mount that is another by now.
    let nothing = None::<&str>;
    let remount = MsFlags::MS_REMOUNT;
    mount(nothing, &stuck.mountpoint(), nothing, remount, nothing).unwrap();
    disk.go_on();
    let refusal = looks.join().unwrap().unwrap_err();
    assert_eq!(refusal.reason, Reason::Changed, "{refusal}");
}

/// Whether a thread of this process waits for an answer of a FUSE daemon.
fn waits_for_fuse(thread: Pid) -> bool {
    let stack = fs::read_to_string(format!("/proc/self/task/{thread}/stack")).unwrap();
    stack.contains("fuse_simple_request") || stack.contains("request_wait_answer")
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
