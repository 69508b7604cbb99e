//! rclone of a user who is not root, and readers who are.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::clips::*;
use common::{content, eventually, need_root, put, rclones};
use vmafx_bypass::{BypassFile, Reason};

const NOBODY: u32 = 65534;

/// A mount of nobody's that root may read, which takes a line in fuse.conf.
#[test]
fn a_cache_file_of_another_user_than_the_mounts_is_refused() {
    need_root();
    for rclone in rclones() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let run = |script: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-ec", script]).current_dir(folder.path());
            assert!(shell.status().unwrap().success(), "{script}");
        };
        let bytes = content(1, MIB);
        put(folder.path(), "source/clip", &bytes);
        run("chmod 755 . && mkdir shared && mount -t tmpfs none shared
             mount --make-shared shared && mkdir shared/mount shared/cache
             chown -R 65534:65534 shared && echo user_allow_other >fuse.conf");
        let quick = rclone.is_absolute().then_some("--vfs-handle-caching=0s");
        let mut daemon = Command::new("unshare")
            .args(["-m", "--propagation", "unchanged", "sh", "-ec"])
            .arg(
                "mount --make-private / && mount --bind fuse.conf /etc/fuse.conf\n\
                 exec setpriv --reuid=65534 --regid=65534 --clear-groups \
                 \"$0\" --config= mount :local:source shared/mount --read-only \
                 --vfs-cache-mode=full --cache-dir=shared/cache --allow-other \"$@\"",
            )
            .arg(&rclone)
            .args(quick)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let clip = path("shared/mount/clip");
        eventually("the mount", || clip.exists());
        let mut file = None;
        eventually("a clip that is bypassed", || {
            assert!(fs::read(&clip).unwrap() == bytes);
            file = BypassFile::open(&clip).ok();
            file.as_ref().is_some_and(|f| f.refusal().is_none())
        });
        // While it is open, rclone does not open its cache file again.
        let first = file.unwrap();
        let cached = first.cache_path().unwrap();
        assert!(cached.starts_with("/proc"), "{}", cached.display());
        // As if the daemon held what its user may not read.
        std::os::unix::fs::chown(&cached, Some(0), None).unwrap();
        let file = BypassFile::open(&clip).unwrap();
        let refusal = file.refusal().unwrap();
        assert_eq!(refusal.reason, Reason::Unsupported, "{refusal}");
        assert!(refusal.detail.contains("uid 0's"), "{refusal}");
        assert!(read_all(&file) == bytes);
        assert_eq!(file.stats().cache_bytes, 0);
        std::os::unix::fs::chown(&cached, Some(NOBODY), None).unwrap();
        assert_eq!(BypassFile::open(Path::new(&clip)).unwrap().refusal(), None);
        // Nor is what another's file says believed, or told.
        let metadata = cached.to_str().unwrap().replace("/vfs/", "/vfsMeta/");
        std::os::unix::fs::chown(&metadata, Some(0), None).unwrap();
        let refusal = BypassFile::open(&clip).unwrap().refusal().unwrap();
        assert_eq!(refusal.reason, Reason::Unsupported, "{refusal}");
        assert!(
            refusal.detail.contains("the metadata is uid 0's"),
            "{refusal}"
        );
        std::os::unix::fs::chown(&metadata, Some(NOBODY), None).unwrap();
        let aside = format!("{metadata}.aside");
        fs::rename(&metadata, &aside).unwrap();
        std::os::unix::fs::symlink(&aside, &metadata).unwrap();
        let refusal = BypassFile::open(&clip).unwrap().refusal().unwrap();
        assert_eq!(refusal.reason, Reason::IoError, "{refusal}");
        fs::rename(&aside, &metadata).unwrap();
        assert_eq!(BypassFile::open(&clip).unwrap().refusal(), None);
        drop((first, file));
        run("umount shared/mount");
        daemon.wait().unwrap();
        run("umount shared");
    }
}
