//! `BypassFile` and `read` on real read-only rclone mounts: the bytes are
//! FUSE's. Each test runs on every rclone program there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{BufRead, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::clips::*;
use common::{content, eventually, fuse_range, need_root, put, rclones, rig_with};
use vmafx_bypass::{BypassFile, Reason};

#[test]
fn a_cached_clip_comes_from_the_cache_alone() {
    each_rclone(9 * MIB + 123, &[], |rig, bytes| {
        let mut file = open_cached(rig);
        assert_eq!(file.proven_bytes(), bytes.len() as u64);
        assert!(read_all(&file) == bytes);
        // Blocks that cross pieces, and small ones that the buffer serves.
        for block in [1, 4096, 5000, 65_536, 3 * MIB + 1] {
            file.rewind().unwrap();
            let mut read = Vec::new();
            let mut buffer = vec![0; block];
            while read.len() < bytes.len() {
                let n = file.read(&mut buffer).unwrap();
                assert!(n > 0, "end at {}: {:?}", read.len(), file.stats());
                read.extend_from_slice(&buffer[..n]);
                if block == 1 && read.len() == 10_000 {
                    break;
                }
            }
            assert!(read == bytes[..read.len()], "blocks of {block}");
        }
        assert_eq!(file.stats().fuse_bytes(), 0);
        assert!(file.stats().cache_bytes > 4 * bytes.len() as u64);
        file.seek(SeekFrom::End(-5)).unwrap();
        let mut tail = Vec::new();
        file.read_to_end(&mut tail).unwrap();
        assert_eq!(tail, bytes[bytes.len() - 5..]);
    });
}

#[test]
fn what_is_lent_is_what_is_read() {
    let options = ["--buffer-size=0", "--vfs-read-chunk-size=128k"];
    each_rclone(3 * MIB + 77, &options, |rig, bytes| {
        // A part of it in the cache, more by reading it, and all.
        fuse_range(&clip(rig), MIB as u64, MIB + MIB / 2);
        for whole in [false, true] {
            if whole {
                rig.cache_whole(Path::new(CLIP)).unwrap();
            }
            let mut file = open(rig);
            let mut at = 0_usize;
            let mut step = 1;
            loop {
                let lent = file.fill_buf().unwrap();
                if lent.is_empty() {
                    break;
                }
                // Again it is the same, and no more is used than was said.
                let n = lent.len().min(step);
                assert!(lent[..n] == bytes[at..at + n], "{at}");
                file.consume(n);
                at += n;
                step = step * 5 % 99_991 + 1;
                if step % 7 == 0 {
                    // A plain read goes on where that was.
                    let mut part = [0; 300];
                    let n = file.read(&mut part).unwrap();
                    assert!(part[..n] == bytes[at..at + n], "{at}");
                    at += n;
                }
            }
            assert_eq!(at, bytes.len());
            let stats = file.stats();
            if whole {
                assert_eq!((stats.fuse_bytes(), stats.cache_bytes), (0, at as u64));
            } else {
                assert!(stats.fuse_bytes() > 0 && stats.cache_bytes > MIB as u64);
            }
            // Anywhere, and at the end.
            for offset in [2 * MIB + 5, 17, bytes.len() - 9, bytes.len(), 1 << 40] {
                file.seek(SeekFrom::Start(offset as u64)).unwrap();
                let lent = file.fill_buf().unwrap();
                let there = bytes.get(offset..).unwrap_or_default();
                assert_eq!(lent.is_empty(), there.is_empty(), "{offset}");
                assert!(lent == &there[..lent.len()]);
            }
            file.rewind().unwrap();
            let lines = file.by_ref().lines().take(20_000).map(Result::unwrap);
            let text: String = lines.map(|line| line + "\n").collect();
            assert!(text.as_bytes() == &bytes[..text.len()] && text.len() == 320_000);
        }
    });
}

#[test]
fn offsets_at_and_beyond_the_end_read_nothing() {
    each_rclone(MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        let mut buffer = [0; 16];
        assert_eq!(file.read_at(&mut buffer, MIB as u64 - 3).unwrap(), 3);
        assert_eq!(buffer[..3], bytes[MIB - 3..]);
        for offset in [
            MIB as u64,
            MIB as u64 + 1,
            1 << 40,
            i64::MAX as u64,
            u64::MAX,
        ] {
            assert_eq!(file.read_at(&mut buffer, offset).unwrap(), 0, "{offset}");
        }
        assert_eq!(file.read_at(&mut [], 0).unwrap(), 0);
    });
}

#[test]
fn an_uncached_clip_comes_through_fuse_and_then_from_the_cache() {
    each_rclone(2 * MIB, &[], |rig, bytes| {
        let file = open(rig);
        assert_eq!(file.refusal().unwrap().reason, Reason::NoMetadata);
        assert!(read_all(&file) == bytes);
        assert_eq!(
            file.stats().by_reason[&Reason::NoMetadata],
            bytes.len() as u64
        );
        drop(file);
        assert!(read_all(&open_cached(rig)) == bytes);
    });
}

#[test]
fn a_partly_cached_clip_mixes_both_in_one_call() {
    each_rclone(
        64 * MIB,
        &["--buffer-size=0", "--vfs-read-chunk-size=1M"],
        |rig, bytes| {
            // Two islands; how much more rclone fetches around them is its own.
            for start in [8 * MIB, 40 * MIB] {
                fuse_range(&clip(rig), start as u64, MIB);
            }
            let mut file = open(rig);
            eventually("an active clip", || {
                file = open(rig);
                file.refusal().is_none()
            });
            let cached = file.proven_bytes();
            assert!(cached > 0 && cached < bytes.len() as u64, "{cached}");
            let mut middle = vec![0; 40 * MIB];
            assert_eq!(
                file.read_at(&mut middle, 4 * MIB as u64).unwrap(),
                middle.len()
            );
            assert!(middle == bytes[4 * MIB..44 * MIB]);
            let stats = file.stats();
            assert!(stats.cache_bytes >= MIB as u64, "{stats:?}");
            assert!(stats.by_reason[&Reason::Partial] >= MIB as u64, "{stats:?}");
            assert_eq!(stats.cache_bytes + stats.fuse_bytes(), middle.len() as u64);
        },
    );
}

#[test]
fn offsets_past_4_gib_are_right() {
    const FAR: u64 = 5 << 30;
    need_root();
    for rclone in rclones() {
        let marks = content(7, MIB);
        let rig = rig_with(options(&rclone, &["--vfs-read-chunk-size=1M"]), |source| {
            let file = fs::File::create(source.join(CLIP)).unwrap();
            file.write_all_at(&marks, FAR).unwrap();
        });
        assert!(fuse_range(&clip(&rig), FAR, MIB) == marks);
        let mut file = open(&rig);
        eventually("an active clip", || {
            file = open(&rig);
            file.refusal().is_none()
        });
        let mut read = vec![0; MIB];
        file.seek(SeekFrom::Start(FAR)).unwrap();
        file.read_exact(&mut read).unwrap();
        assert!(read == marks);
        assert!(
            file.stats().cache_bytes >= MIB as u64 / 2,
            "{:?}",
            file.stats()
        );
    }
}

#[test]
fn every_name_reads_right() {
    need_root();
    let long = "é".repeat(127) + "x";
    let deep = format!("{}/end", ["folder with a longish name"; 30].join("/"));
    let names = [
        " a b ",
        "quote'\"quote",
        "日本語 e\u{301}",
        "back\\slash",
        "tab\there",
        "new\nline",
        "\u{1}ctl",
        "-dash",
        "$(echo x)`*?",
        "␊shown",
        "．．",
        &long,
        &deep,
    ];
    for rclone in rclones() {
        let rig = rig_with(options(&rclone, &[]), |source| {
            for (seed, name) in names.iter().enumerate() {
                put(source, name, &content(seed as u32, 50_000));
            }
            put(source, "empty", b"");
        });
        let shown: Vec<PathBuf> = walk(&rig.mountpoint());
        assert_eq!(shown.len(), names.len() + 1, "{shown:?}");
        for path in shown {
            let through_fuse = fs::read(&path).unwrap();
            // Twice: before and after it is cached.
            for _ in 0..2 {
                let output = common::run(&["-q", "read", "--", path.to_str().unwrap()]);
                assert!(output.status.success(), "{}", common::stderr(&output));
                assert!(output.stdout == through_fuse, "{}", path.display());
            }
        }
    }
}

#[test]
fn many_threads_read_one_file() {
    each_rclone(16 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let file = &file;
                scope.spawn(move || {
                    let mut buffer = vec![0; 100_000];
                    for i in 0..200 {
                        let offset = (thread * 7_919 + i * 104_729) % bytes.len() as u64;
                        let n = file.read_at(&mut buffer, offset).unwrap();
                        assert!(buffer[..n] == bytes[offset as usize..offset as usize + n]);
                    }
                });
            }
        });
        assert_eq!(file.stats().fuse_bytes(), 0);
    });
}

#[test]
fn a_descriptor_of_the_caller_is_taken_over() {
    each_rclone(2 * MIB, &[], |rig, bytes| {
        drop(open_cached(rig));
        let mut own = fs::File::open(clip(rig)).unwrap();
        own.seek(SeekFrom::Start(100)).unwrap();
        let other = own.try_clone().unwrap();
        let file = BypassFile::from_fd(OwnedFd::from(own)).unwrap();
        assert_eq!(file.refusal(), None);
        assert!(read_all(&file) == bytes);
        assert_eq!(file.stats().fuse_bytes(), 0);
        // The shared description's offset has not moved.
        assert_eq!((&other).stream_position().unwrap(), 100);
    });
}

#[test]
fn a_bind_mount_of_a_folder_leads_to_the_cache() {
    need_root();
    for rclone in rclones() {
        let bytes = content(3, MIB);
        let rig = rig_with(options(&rclone, &[]), |s| put(s, "a/b/clip", &bytes));
        rig.cache_whole(Path::new("a/b/clip")).unwrap();
        let bind = tempfile::tempdir().unwrap();
        let mount = |args: &[&std::ffi::OsStr]| {
            assert!(Command::new("mount").args(args).status().unwrap().success());
        };
        let from = rig.mountpoint().join("a");
        mount(&["--bind".as_ref(), from.as_ref(), bind.path().as_ref()]);
        let file = BypassFile::open(bind.path().join("b/clip")).unwrap();
        let (refusal, read) = (file.refusal(), read_all(&file));
        drop(file);
        assert!(
            Command::new("umount")
                .arg(bind.path())
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(refusal, None);
        assert!(read == bytes);
    }
}

#[test]
fn no_descriptor_is_left_behind() {
    each_rclone(MIB, &[], |rig, _| {
        drop(open_cached(rig));
        let count = || fs::read_dir("/proc/self/fd").unwrap().count();
        // Other tests of this process open files as well: take the least.
        let least = |n: usize| {
            (0..n)
                .map(|_| {
                    drop(open(rig));
                    count()
                })
                .min()
                .unwrap()
        };
        let before = least(20);
        let after = least(200);
        assert!(after <= before + 1, "{before} descriptors, then {after}");
    });
}

#[test]
fn a_user_who_may_not_read_the_cache_gets_the_bytes_through_fuse() {
    need_root();
    for rclone in rclones() {
        let bytes = content(5, MIB);
        let rig = rig_with(options(&rclone, &["--allow-other"]), |s| {
            put(s, CLIP, &bytes);
        });
        rig.cache_whole(Path::new(CLIP)).unwrap();
        // Where nobody may go to: the temporary folder is root's own.
        let public = tempfile::Builder::new()
            .prefix("vmafx-public-")
            .tempdir()
            .unwrap();
        let script = r#"chmod 755 "$1" "$(dirname "$2")" && cp "$3" "$1/program""#;
        let mut prepared = Command::new("sh");
        prepared
            .args(["-ec", script, "sh"])
            .arg(public.path())
            .arg(rig.mountpoint());
        prepared.arg(env!("CARGO_BIN_EXE_vmafx-bypass"));
        assert!(prepared.status().unwrap().success());
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(public.path().join("program"))
            .args(["read", "--stats=json"])
            .arg(clip(&rig))
            .output()
            .unwrap();
        let text = common::stderr(&output);
        assert!(output.status.success(), "{text}");
        assert!(output.stdout == bytes);
        assert!(
            text.contains("\"bytes_by_reason\":{\"permission\":1048576}"),
            "{text}"
        );
        assert!(text.contains("came through FUSE: permission"), "{text}");
    }
}

#[test]
fn a_symlink_to_the_cache_folder_is_followed() {
    need_root();
    for rclone in rclones() {
        let bytes = content(14, MIB);
        let real = tempfile::tempdir().unwrap();
        let rig = rig_with(options(&rclone, &[]), |source| {
            put(source, CLIP, &bytes);
            let cache = source.parent().unwrap().join("cache");
            fs::remove_dir(&cache).unwrap();
            std::os::unix::fs::symlink(real.path(), cache).unwrap();
        });
        let file = open_cached(&rig);
        assert!(read_all(&file) == bytes);
        assert_eq!(file.stats().fuse_bytes(), 0);
    }
}

#[test]
fn a_user_without_ptrace_rights_reads_by_the_derived_path() {
    each_rclone(MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let output = Command::new("setpriv")
            .args(["--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"])
            .arg(env!("CARGO_BIN_EXE_vmafx-bypass"))
            .args(["read", "--stats=json"])
            .arg(clip(rig))
            .output()
            .unwrap();
        let text = common::stderr(&output);
        assert!(output.status.success(), "{text}");
        assert!(output.stdout == bytes);
        assert!(text.contains("\"cache_bytes\":1048576"), "{text}");
    });
}

#[test]
fn a_full_disk_leaves_no_output_behind() {
    each_rclone(4 * MIB, &[], |rig, _| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let disk = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(disk.path());
        assert!(mount.status().unwrap().success());
        let target = disk.path().join("out");
        fs::write(&target, "before").unwrap();
        let output = common::run(&[
            "read",
            clip(rig).to_str().unwrap(),
            "-o",
            target.to_str().unwrap(),
        ]);
        let (kept, left) = (
            fs::read(&target).unwrap(),
            fs::read_dir(disk.path()).unwrap().count(),
        );
        assert!(
            Command::new("umount")
                .arg(disk.path())
                .status()
                .unwrap()
                .success()
        );
        common::assert_fails(&output, 1, "No space left on device");
        assert_eq!((kept, left), (b"before".to_vec(), 1));
    });
}
