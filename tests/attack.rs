//! What reviewers broke, or tried to. FUSE is the judge: what a read through it
//! gives directly before or after. Each test runs on every rclone program.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::time::Duration;

use common::clips::*;
use common::{Worker, content, fuse_range};

fn direct_writable(rig: &vmafx_bypass::rig::Rig) -> fs::File {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(clip(rig))
        .unwrap()
}

/// With `--vfs-cache-mode writes`, a descriptor that was opened before the clip
/// was cached reads the remote, not the cache: what it has pulled is not there.
/// A block that is there in part has no hole.
fn pulled_past_the_cache(mode: &str) {
    let mode = format!("--vfs-cache-mode={mode}");
    let arguments = [mode.as_str(), "--buffer-size=0"];
    each_remote(8 * MIB, &arguments, |rig, _, bytes| {
        let file = open(rig);
        // Another program reads through the cache, and not from a block's start.
        let other = direct_writable(rig);
        let mut block = vec![0; 4096];
        other.read_exact_at(&mut block, MIB as u64 + 5).unwrap();
        let data = cache_file(rig, "vfs", CLIP);
        // Its download ends after 5 seconds without readers, somewhere.
        let end = |from: usize| {
            let cached = fs::read(&data).unwrap();
            let mut at = from;
            while at < cached.len() && cached[at] == bytes[at] {
                at += 1;
            }
            at
        };
        std::thread::sleep(Duration::from_secs(7));
        let gap = end(MIB + 5);
        println!("download ended at {gap}, {} in its block", gap % 4096);
        assert!(gap % 4096 > 0 && gap % 4096 < 4000 && gap < 7 * MIB);
        other.read_exact_at(&mut block, gap as u64 + 50).unwrap();
        let cached = fs::read(&data).unwrap();
        assert!(cached[gap..gap + 50] == [0; 50]);
        assert!(cached[gap + 50..gap + 100] == bytes[gap + 50..gap + 100]);
        // Twice: what the first has pulled, the second has from the cache.
        let at = (gap - gap % 4096 - (16 << 10)) as u64;
        let mut read = vec![0; 48 << 10];
        let through_fuse = |read: &[u8], round| {
            let wrong = (0..read.len()).find(|&i| read[i] != bytes[at as usize + i]);
            println!(
                "round {round}: first wrong byte {wrong:?}, gap {}; {:?} {:?}",
                gap as u64 - at,
                file.stats(),
                file.refusal()
            );
            wrong
        };
        let mut wrong = None;
        for round in 0..4 {
            file.read_at(&mut read, at).unwrap();
            wrong = wrong.or(through_fuse(&read, round));
        }
        assert_eq!(wrong, None, "zeros where fuse has the clip");
        assert!(fuse_range(&clip(rig), at, read.len()) == read);
    });
}

#[test]
fn what_is_pulled_past_the_cache_is_not_in_it() {
    pulled_past_the_cache("writes");
}

#[test]
fn what_is_pulled_past_the_cache_is_not_in_it_minimal() {
    pulled_past_the_cache("minimal");
}

/// Small sequential reads come from a buffer of up to 20 ms' age.
#[test]
fn a_buffered_read_is_not_behind_fuse() {
    each_rclone(
        8 * MIB,
        &["--dir-cache-time=1s", "--attr-timeout=1s"],
        |rig, old| {
            let mut file = open_cached(rig);
            let plain = hold(&clip(rig), 0, 4096);
            let new = content(2, old.len());
            replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
            std::thread::sleep(Duration::from_millis(2_500));
            // Nobody has looked at the path: FUSE's descriptors have the old.
            let mut block = [0; 4096];
            file.read_exact(&mut block).unwrap();
            assert!(block == old[..4096]);
            assert!(fuse_range(&clip(rig), 4096, 4096) == new[4096..8192]);
            let mut same_age = [0; 4096];
            plain.read_exact_at(&mut same_age, 4096).unwrap();
            assert!(same_age == new[4096..8192]);
            // So long may what was read ahead be behind.
            std::thread::sleep(Duration::from_millis(30));
            file.read_exact(&mut block).unwrap();
            assert!(
                block == new[4096..8192],
                "behind fuse; is old: {}",
                block == old[4096..8192]
            );
        },
    );
}

/// A program's store between the read and its comparison is no difference. The
/// reader stands still at its third pread(2) of FUSE's file: the first was the
/// prime, the second an edge, this one verifies what has come from the cache.
#[test]
fn a_store_while_verifying_is_no_alarm() {
    each_writable(4 * MIB, &[], |rig, _| {
        let script = "import mmap
clip = mmap.mmap(os.open('clip', os.O_RDWR), 0)
x = sum(clip[0:1 << 20])
step()
for at in range(8192, 1 << 20, 4096): clip[at] = 0
";
        let mut mapper = Worker::start(&rig.mountpoint(), script, &[]);
        let mut reader = Command::new("strace");
        reader
            .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=pread64"])
            .args(["-e", "inject=pread64:delay_enter=6s:when=3", "-P"])
            .arg(clip(rig))
            .arg(env!("CARGO_BIN_EXE_vmafx-bypass"))
            .args([
                "read",
                "--verify",
                "full",
                "--stats=json",
                "-o",
                "/dev/null",
            ])
            .arg(clip(rig));
        let reader = reader.stderr(std::process::Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(3_500));
        mapper.proceed();
        let output = reader.wait_with_output().unwrap();
        mapper.kill();
        println!("{:?} {}", output.status.code(), common::stderr(&output));
        assert_eq!(output.status.code(), Some(0), "a false alarm");
    });
}

/// What rclone would not take stays in the kernel's pages, where FUSE reads it.
#[test]
fn a_failed_write_back_stays_in_the_page_cache() {
    each_writable(4 * MIB, &[], |rig, bytes| {
        let steps = "import mmap
clip = mmap.mmap(os.open('clip', os.O_RDWR), 0)
sum(clip[1 << 20:(1 << 20) + 65536])
step()
clip[1 << 20:(1 << 20) + 100] = b'a' * 100
try:
    clip.flush()
except OSError as e:
    print(e, file=sys.stderr)
";
        let plain = fs::File::open(clip(rig)).unwrap();
        let mut mapper = Worker::start(&rig.mountpoint(), steps, &[]);
        let file = open(rig);
        assert_eq!(file.refusal(), None);
        let mut own = vec![0; 8192];
        file.read_at(&mut own, MIB as u64).unwrap();
        let slow = Slow::start(rig.daemon().unwrap(), "pwrite64:error=EIO");
        mapper.proceed();
        drop(slow);
        let mut fuse = vec![0; 8192];
        let before = file.stats().cache_bytes;
        file.read_at(&mut own, MIB as u64).unwrap();
        plain.read_exact_at(&mut fuse, MIB as u64).unwrap();
        println!(
            "fuse has the store: {}, bypass has the old: {}, from cache {}",
            fuse[..100] == [b'a'; 100],
            own == bytes[MIB..MIB + 8192],
            file.stats().cache_bytes - before
        );
        mapper.kill();
        assert!(own == fuse, "not what fuse has");
    });
}

/// A proof of a read-only superblock, which is then made writable.
#[test]
fn a_superblock_made_writable_under_a_proof() {
    each_writable(4 * MIB, &[], |rig, _| {
        let remount = |how: &str| {
            let mut mount = Command::new("mount");
            mount.args(["-i", "-o", how]).arg(rig.mountpoint());
            assert!(mount.status().unwrap().success());
        };
        remount("remount,ro");
        let file = open(rig);
        println!("{:?}", file.refusal());
        let mut own = vec![0; 8192];
        file.read_at(&mut own, MIB as u64).unwrap();
        let cached = file.stats().cache_bytes;
        remount("remount,rw");
        let steps = "import mmap
clip = mmap.mmap(os.open('clip', os.O_RDWR), 0)
sum(clip[1 << 20:(1 << 20) + 65536])
step()
clip[1 << 20:(1 << 20) + 100] = b'a' * 100
";
        let mut mapper = Worker::start(&rig.mountpoint(), steps, &[]);
        mapper.proceed();
        // It is looked at once a second.
        std::thread::sleep(Duration::from_millis(1_100));
        file.read_at(&mut own, MIB as u64).unwrap();
        let stats = file.stats();
        mapper.kill();
        println!("{cached} {stats:?}");
        assert!(own[..100] == [b'a'; 100], "older than fuse");
    });
}

/// A write is in the kernel's pages, for every reader through FUSE, before
/// rclone has it: neither dirty nor under writeback.
#[test]
fn a_write_on_its_way_is_seen_as_fuse_shows_it() {
    each_writable(4 * MIB, &[], |rig, bytes| {
        let writer = fs::OpenOptions::new().write(true).open(clip(rig)).unwrap();
        let file = open(rig);
        assert_eq!(file.refusal(), None);
        let plain = fs::File::open(clip(rig)).unwrap();
        let (mut own, mut fuse) = (vec![0; 8192], vec![0; 8192]);
        plain.read_exact_at(&mut fuse, MIB as u64).unwrap();
        file.read_at(&mut own, MIB as u64).unwrap();
        let slow = Slow::start(rig.daemon().unwrap(), "pwrite64:delay_enter=4s");
        let (first, same, cached) = std::thread::scope(|scope| {
            let write = scope.spawn(|| writer.write_all_at(&[b'w'; 8192], MIB as u64));
            std::thread::sleep(Duration::from_secs(1));
            plain.read_exact_at(&mut fuse, MIB as u64).unwrap();
            let before = file.stats().cache_bytes;
            file.read_at(&mut own, MIB as u64).unwrap();
            let cached = file.stats().cache_bytes - before;
            let written = write.is_finished();
            println!("write returned: {written}");
            write.join().unwrap().unwrap();
            (fuse[0], own == fuse, cached)
        });
        drop(slow);
        println!(
            "fuse had {:?}, same {same}, {cached} from the cache; old {}",
            first as char,
            own == bytes[MIB..MIB + 8192]
        );
        assert!(same, "older than what fuse gave just before");
    });
}
