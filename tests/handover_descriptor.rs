//! The descriptors that a handover server gives: nobody, root included, can make
//! one of them that writes. Each test runs on every rclone program there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::SystemTime;

use common::clips::*;
use common::handover::*;
use common::{content, eventually, need_root, put, rclones};
use vmafx_bypass::handover::protocol::Answer;

/// As root of a container would, who sees nothing of the cache.
fn cannot_be_written(socket: &Path, clip: &Path, bytes: &[u8]) {
    let (answer, fds) = Raw::connect(socket).ask(RANGES, &[File::open(clip).unwrap().as_fd()]);
    assert!(matches!(answer, Answer::Ranges { .. }), "{answer:?}");
    let data = File::from(fds.into_iter().next().unwrap());
    let mut read = vec![0; bytes.len()];
    data.read_exact_at(&mut read, 0).unwrap();
    assert!(read == bytes);
    assert!(data.write_at(b"x", 0).is_err());
    let anew = format!("/proc/self/fd/{}", data.as_raw_fd());
    assert!(File::options().write(true).open(&anew).is_err());
    let mode = data.metadata().unwrap().permissions();
    assert!(data.set_permissions(mode).is_err());
    assert!(data.set_modified(SystemTime::now()).is_err());
    // Nor by a mount that is made of it.
    let writable = Command::new("mount")
        .args(["-o", "remount,bind,rw", &anew])
        .stderr(Stdio::null())
        .status();
    assert!(!writable.unwrap().success());
    assert!(File::options().write(true).open(&anew).is_err());
}

#[test]
fn root_cannot_open_a_descriptor_for_writing() {
    each_rclone(MIB, &["--allow-other"], |rig, bytes| {
        let served = Served::of(rig);
        rig.cache_whole(Path::new(CLIP)).unwrap();
        cannot_be_written(&served.socket(), &clip(rig), bytes);
    });
}

/// rclone in a mount namespace of its own, and a mount that comes to us.
#[test]
fn nor_one_of_a_cache_in_another_mount_namespace() {
    need_root();
    for rclone in rclones() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = content(1, MIB);
        put(folder.path(), "source/clip", &bytes);
        fs::create_dir(folder.path().join("shared")).unwrap();
        fs::create_dir(folder.path().join("hidden")).unwrap();
        let run = |script: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-ec", script]).current_dir(folder.path());
            assert!(shell.status().unwrap().success(), "{script}");
        };
        run("mount -t tmpfs none shared && mount --make-shared shared && mkdir shared/mount");
        let quick = rclone.is_absolute().then_some("--vfs-handle-caching=0s");
        let mut daemon = Command::new("unshare")
            .args(["-m", "--propagation", "unchanged", "sh", "-ec"])
            .arg(
                "mount --make-private -t tmpfs none hidden\n\
                 exec \"$0\" --config= mount :local:source shared/mount --read-only \
                 --vfs-cache-mode=full --cache-dir=hidden/cache --allow-other \"$@\"",
            )
            .arg(&rclone)
            .args(quick)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mount = folder.path().join("shared/mount");
        let clip = mount.join("clip");
        eventually("the mount", || clip.exists());
        let served = Served::new(&[&mount]);
        eventually("a clip that is handed over", || {
            assert!(fs::read(&clip).unwrap() == bytes);
            served.open(&clip).refusal().is_none()
        });
        cannot_be_written(&served.socket(), &clip, &bytes);
        drop(served);
        run("umount shared/mount");
        daemon.wait().unwrap();
        run("umount shared");
    }
}
