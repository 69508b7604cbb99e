//! `BypassFile` and `read` on real read-only rclone mounts: whatever happens,
//! the bytes are FUSE's. Each test runs on every rclone program there is.

mod common;

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{content, eventually, fuse_range, need_root, put, rclones, rig_with};
use vmafx_bypass::cache::rclone::parse_metadata;
use vmafx_bypass::rig::{Rig, RigOptions};
use vmafx_bypass::{BypassFile, Reason};

const MIB: usize = 1 << 20;
const CLIP: &str = "clip";

/// Options for a program; a newer rclone would keep a clip open for 5 seconds
/// after its last close, and tests would wait for it.
fn options(rclone: &Path, arguments: &[&str]) -> RigOptions {
    let mut mount_arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
    if rclone.is_absolute() {
        mount_arguments.push("--vfs-handle-caching=0s".into());
    }
    RigOptions {
        rclone: rclone.into(),
        mount_arguments,
        ..RigOptions::default()
    }
}

/// Runs a test on each rclone, with a clip of so many bytes.
fn each_rclone(size: usize, arguments: &[&str], test: impl Fn(&mut Rig, &[u8])) {
    need_root();
    for rclone in rclones() {
        let bytes = content(1, size);
        let mut rig = rig_with(options(&rclone, arguments), |s| put(s, CLIP, &bytes));
        test(&mut rig, &bytes);
    }
}

fn clip(rig: &Rig) -> PathBuf {
    rig.mountpoint().join(CLIP)
}

fn open(rig: &Rig) -> BypassFile {
    BypassFile::open(clip(rig)).unwrap()
}

/// Caches the clip whole and opens it: bypassed.
fn open_cached(rig: &Rig) -> BypassFile {
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let file = open(rig);
    assert_eq!(file.refusal(), None);
    file
}

fn read_all(file: &BypassFile) -> Vec<u8> {
    let mut bytes = vec![0; file.size().unwrap() as usize + 1];
    let n = file.read_at(&mut bytes, 0).unwrap();
    bytes.truncate(n);
    bytes
}

/// The one file below `vfs` or `vfsMeta` of this name.
fn cache_file(rig: &Rig, kind: &str, name: &str) -> PathBuf {
    let found = Command::new("find")
        .arg(rig.cache().join(kind))
        .args(["-type", "f", "-name", name])
        .output()
        .unwrap();
    PathBuf::from(String::from_utf8(found.stdout).unwrap().trim_end())
}

/// Replaces the clip at the remote, with a time of its own.
fn replace_remote(rig: &Rig, bytes: &[u8], time: &str) {
    let path = rig.source().join(CLIP);
    fs::write(&path, bytes).unwrap();
    let touched = Command::new("touch").args(["-d", time]).arg(&path).status();
    assert!(touched.unwrap().success());
}

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
                assert!(n > 0);
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
    need_root();
    const FAR: u64 = 5 << 30;
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

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            files.extend(walk(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files
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
fn a_writable_mount_is_refused_as_a_whole() {
    need_root();
    for rclone in rclones() {
        let bytes = content(4, MIB);
        let options = RigOptions {
            read_only: false,
            ..options(&rclone, &[])
        };
        let rig = rig_with(options, |s| put(s, CLIP, &bytes));
        fuse_range(&clip(&rig), 0, MIB);
        // Also where it is mounted once more, read-only: the superblock counts.
        let bind = tempfile::tempdir().unwrap();
        let script = r#"mount --bind "$1" "$2" && mount -o remount,bind,ro "$2""#;
        let mut bound = Command::new("sh");
        bound
            .args(["-ec", script, "sh"])
            .arg(rig.mountpoint())
            .arg(bind.path());
        assert!(bound.status().unwrap().success());
        eventually("metadata", || {
            cache_file(&rig, "vfsMeta", CLIP).exists()
                && open(&rig).refusal().unwrap().reason == Reason::Unsupported
        });
        let file = BypassFile::open(bind.path().join(CLIP)).unwrap();
        let (refusal, read) = (file.refusal(), read_all(&file));
        drop(file);
        assert!(
            Command::new("umount")
                .arg(bind.path())
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(refusal.unwrap().reason, Reason::Unsupported);
        assert!(read == bytes);
    }
}

#[test]
fn a_clip_replaced_at_the_remote_is_never_mixed_with_the_old_cache() {
    each_rclone(
        8 * MIB,
        &["--dir-cache-time=1s", "--attr-timeout=1s"],
        |rig, old| {
            let file = open_cached(rig);
            assert!(read_all(&file) == old);
            let new = content(2, old.len() + MIB);
            replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
            // What FUSE shows is the measure: wait until it has noticed.
            eventually("the new clip through FUSE", || {
                fuse_range(&clip(rig), 0, 16) == new[..16]
            });
            let mut start = vec![0; MIB];
            for _ in 0..20 {
                // The old data file is unlinked, and rclone writes the new bytes
                // into it as long as anyone has it open.
                assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
                let through_fuse = fuse_range(&clip(rig), 0, MIB);
                assert!(start == old[..MIB] || start == new[..MIB], "mixed bytes");
                assert!(start == through_fuse, "behind FUSE");
            }
            drop(file);
            let fresh = open(rig);
            assert!(read_all(&fresh) == new);
        },
    );
}

#[test]
fn an_evicted_clip_reads_on() {
    each_rclone(8 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        let mut start = vec![0; MIB];
        file.read_at(&mut start, 0).unwrap();
        // As rclone's own eviction: data first, then metadata.
        fs::remove_file(cache_file(rig, "vfs", CLIP)).unwrap();
        fs::remove_file(cache_file(rig, "vfsMeta", CLIP)).unwrap();
        let before = file.stats().cache_bytes;
        assert_eq!(file.read_at(&mut start, 4 * MIB as u64).unwrap(), MIB);
        assert!(start == bytes[4 * MIB..5 * MIB]);
        assert_eq!(
            file.stats().cache_bytes,
            before,
            "an unlinked file is not read"
        );
        assert_ne!(file.refusal(), None);
    });
}

#[test]
fn a_hole_under_full_metadata_is_left_to_fuse() {
    each_rclone(12 * MIB, &[], |rig, _| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        // What a power loss leaves on ext4 (the size stays).
        let punched = Command::new("fallocate")
            .args(["--punch-hole", "--offset=5MiB", "--length=64KiB"])
            .arg(cache_file(rig, "vfs", CLIP))
            .status();
        assert!(punched.unwrap().success());
        let file = open(rig);
        assert_eq!(file.refusal(), None);
        // rclone itself serves zeros here: FUSE is the measure.
        assert!(read_all(&file) == fs::read(clip(rig)).unwrap());
        assert_eq!(file.stats().by_reason[&Reason::Hole], 4 * MIB as u64);
    });
}

/// Edits the metadata of a cached clip while rclone has it closed.
fn with_metadata(edit: impl Fn(String) -> String, expected: Reason) {
    each_rclone(MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let path = cache_file(rig, "vfsMeta", CLIP);
        // Opened by us once more, rclone rewrites what it has in memory; so
        // the edit comes between the prime and the second look.
        let file = open(rig);
        assert_eq!(file.refusal(), None);
        let text = fs::read_to_string(&path).unwrap();
        parse_metadata(text.as_bytes()).unwrap();
        fs::write(&path, edit(text)).unwrap();
        std::thread::sleep(Duration::from_millis(1_100));
        assert!(read_all(&file) == bytes);
        let stats = file.stats();
        assert_eq!(stats.cache_bytes, 0, "{stats:?}");
        assert!(stats.by_reason.contains_key(&expected), "{stats:?}");
    });
}

#[test]
fn torn_metadata_ends_the_proof() {
    with_metadata(
        |text| text[..text.len() / 2].to_owned(),
        Reason::BadMetadata,
    );
}

#[test]
fn dirty_metadata_ends_the_proof() {
    with_metadata(
        |text| text.replace("\"Dirty\": false", "\"Dirty\": true"),
        Reason::Dirty,
    );
}

#[test]
fn metadata_of_another_version_ends_the_proof() {
    let older = |text: String| {
        text.replace(
            "\"Fingerprint\": \"1048576,20",
            "\"Fingerprint\": \"1048576,19",
        )
    };
    with_metadata(older, Reason::StaleMetadata);
}

#[test]
fn two_mounts_on_one_cache_are_refused() {
    each_rclone(MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let second = tempfile::tempdir().unwrap();
        let daemon = rig.daemon().unwrap();
        let arguments = fs::read(format!("/proc/{daemon}/cmdline")).unwrap();
        let text = String::from_utf8(arguments).unwrap();
        let own = rig.mountpoint().to_str().unwrap().to_owned();
        let arguments = text.split_terminator('\0').map(|a| {
            if a == own {
                second.path().to_str().unwrap()
            } else {
                a
            }
        });
        let mut arguments = arguments.map(str::to_owned);
        let mut other = Command::new(arguments.next().unwrap())
            .args(arguments)
            .spawn()
            .unwrap();
        eventually("a second mount", || second.path().join(CLIP).exists());
        let file = open(rig);
        let (refusal, read) = (file.refusal(), read_all(&file));
        drop(file);
        assert!(
            Command::new("umount")
                .arg(second.path())
                .status()
                .unwrap()
                .success()
        );
        other.wait().unwrap();
        assert_eq!(refusal.unwrap().reason, Reason::Unsupported);
        assert!(read == bytes);
    });
}

#[test]
fn a_killed_daemon_leaves_what_is_proven_and_a_clear_error() {
    each_rclone(
        64 * MIB,
        &["--buffer-size=0", "--vfs-read-chunk-size=1M"],
        |rig, bytes| {
            fuse_range(&clip(rig), 0, 2 * MIB);
            let mut file = open(rig);
            eventually("an active clip", || {
                file = open(rig);
                file.refusal().is_none()
            });
            let mut start = vec![0; MIB];
            assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
            rig.kill_daemon();
            assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
            assert!(start == bytes[..MIB]);
            let error = file.read_at(&mut start, 60 * MIB as u64).unwrap_err();
            assert_eq!(
                error.raw_os_error(),
                Some(nix::errno::Errno::ENOTCONN as i32)
            );
            // One call over both: what is proven, and then the error.
            let mut all = vec![0; 64 * MIB];
            let n = file.read_at(&mut all, 0).unwrap();
            assert!(n >= MIB && n < all.len() && all[..n] == bytes[..n]);
        },
    );
}

#[test]
fn a_mount_that_is_gone_does_not_hang_a_reader() {
    each_rclone(4 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        rig.unmount();
        let mut start = vec![0; MIB];
        // The data file is as proven as before; the companion is dead.
        assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
        assert!(start == bytes[..MIB]);
        // A mount that comes back does not bring the companion back to life.
        rig.mount().unwrap();
        assert!(read_all(&open_cached(rig)) == bytes);
    });
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
            put(s, CLIP, &bytes)
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
fn a_file_that_moved_with_its_mount_is_still_itself() {
    need_root();
    for rclone in rclones() {
        // Alike to the byte in size and time; the folder's is another clip.
        let (outer, inner) = (content(10, 4 * MIB), content(11, 4 * MIB));
        let rig = rig_with(options(&rclone, &[]), |source| {
            put(source, CLIP, &outer);
            put(source, "x/clip", &inner);
            let times = ["clip", "x/clip"].map(|name| source.join(name));
            let touched = Command::new("touch")
                .args(["-d", "2020-01-01"])
                .args(times)
                .status();
            assert!(touched.unwrap().success());
        });
        rig.cache_whole(Path::new(CLIP)).unwrap();
        rig.cache_whole(Path::new("x/clip")).unwrap();
        // At P/x the mount shows the outer clip as P/x/clip; moved to P, that
        // path is the inner one's.
        let place = tempfile::tempdir().unwrap();
        let sub = place.path().join("x");
        let script = r#"mount --make-private "$1"; mkdir "$2"; mount --move "$1" "$2""#;
        let mut moved = Command::new("sh");
        moved
            .args(["-ec", script, "sh"])
            .arg(rig.mountpoint())
            .arg(&sub);
        let status = moved.output().unwrap();
        assert!(status.status.success(), "{}", common::stderr(&status));
        let file = BypassFile::open(sub.join(CLIP)).unwrap();
        assert_eq!(file.refusal(), None);
        let mut start = vec![0; MIB];
        file.read_at(&mut start, 0).unwrap();
        assert!(start == outer[..MIB]);
        let mut again = Command::new("mount");
        again.arg("--move").arg(&sub).arg(place.path());
        assert!(again.status().unwrap().success());
        let _held = fuse_range(&sub.join(CLIP), 0, 16);
        // A rewrite of its metadata asks for another proof.
        let metadata = walk(&rig.cache().join("vfsMeta"));
        for path in metadata {
            assert!(Command::new("touch").arg(path).status().unwrap().success());
        }
        std::thread::sleep(Duration::from_millis(1_200));
        let read = read_all(&file);
        drop(file);
        assert!(
            Command::new("umount")
                .arg(place.path())
                .status()
                .unwrap()
                .success()
        );
        assert!(read == outer, "another clip's bytes");
    }
}

#[test]
fn a_remount_as_writable_is_noticed() {
    need_root();
    for rclone in rclones() {
        let bytes = content(12, MIB);
        let mut rig = rig_with(options(&rclone, &[]), |s| put(s, CLIP, &bytes));
        drop(open_cached(&rig));
        rig.unmount();
        rig.set_read_only(false);
        rig.mount().unwrap();
        let file = open(&rig);
        assert_eq!(file.refusal().unwrap().reason, Reason::Unsupported);
        assert!(read_all(&file) == bytes);
    }
}

#[test]
fn a_second_link_of_the_cache_file_is_refused() {
    each_rclone(MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        let data = cache_file(rig, "vfs", CLIP);
        fs::hard_link(&data, rig.cache().join("link")).unwrap();
        // An unlink by rclone would leave a link: the reader could not see it.
        assert!(read_all(&file) == bytes);
        assert_eq!(file.stats().cache_bytes, 0);
        assert_eq!(open(rig).refusal().unwrap().reason, Reason::Unsupported);
    });
}

#[test]
fn a_clip_that_shrinks_at_the_remote_ends_where_fuse_says() {
    each_rclone(
        8 * MIB,
        &["--dir-cache-time=1s", "--attr-timeout=1s"],
        |rig, old| {
            let file = open_cached(rig);
            let mut tail = vec![0; 4096];
            assert_eq!(file.read_at(&mut tail, 7 * MIB as u64).unwrap(), 4096);
            let new = content(13, 4 * MIB);
            replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
            // Somebody looks at it, and nobody opens it.
            eventually("the new size", || {
                fs::metadata(clip(rig)).unwrap().len() == new.len() as u64
            });
            std::thread::sleep(Duration::from_millis(2_200));
            assert_eq!(file.read_at(&mut tail, 7 * MIB as u64).unwrap(), 0);
            drop(file);
            assert!(read_all(&open(rig)) == new && old.len() > new.len());
        },
    );
}

#[test]
fn a_rewritten_metadata_file_costs_no_fuse_read() {
    each_rclone(4 * MIB, &[], |rig, bytes| {
        let file = open_cached(rig);
        // A proof that is younger than a second is not renewed at once.
        std::thread::sleep(Duration::from_millis(1_100));
        let path = cache_file(rig, "vfsMeta", CLIP);
        assert!(Command::new("touch").arg(path).status().unwrap().success());
        assert!(read_all(&file) == bytes);
        assert_eq!(file.stats().fuse_bytes(), 0, "{:?}", file.stats());
    });
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
fn an_rclone_of_another_namespace_on_the_same_cache_is_seen() {
    each_rclone(MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let other = tempfile::tempdir().unwrap();
        let daemon = rig.daemon().unwrap();
        let text = String::from_utf8(fs::read(format!("/proc/{daemon}/cmdline")).unwrap()).unwrap();
        let own = rig.mountpoint().to_str().unwrap().to_owned();
        let arguments = text
            .split_terminator('\0')
            .filter(|&a| a != "--read-only")
            .map(|a| {
                if a == own {
                    other.path().to_str().unwrap()
                } else {
                    a
                }
            });
        let mut hidden = Command::new("unshare")
            .args(["-m", "--propagation", "private"])
            .args(arguments)
            .spawn()
            .unwrap();
        let seen = || fs::read_to_string(format!("/proc/{}/mountinfo", hidden.id()));
        let point = other.path().to_str().unwrap().to_owned();
        eventually("a hidden mount", || seen().unwrap().contains(&point));
        // What was located before it came is looked at again with the table.
        rig.unmount();
        rig.mount().unwrap();
        let file = open(rig);
        let (refusal, read) = (file.refusal(), read_all(&file));
        hidden.kill().unwrap();
        hidden.wait().unwrap();
        assert_eq!(refusal.unwrap().reason, Reason::Unsupported);
        assert!(read == bytes);
    });
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
