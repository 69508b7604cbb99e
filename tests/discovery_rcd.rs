//! One `rclone rcd` with several mounts: each clip's bytes are its own.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::alike::*;
use common::clips::CLIP;
use common::{content, eventually};
use vmafx_bypass::Reason;

/// One `rclone rcd`, mounts made over its socket; gone when dropped.
struct Rcd {
    rclone: PathBuf,
    folder: tempfile::TempDir,
    address: String,
    daemon: Child,
}

impl Rcd {
    fn start(rclone: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b", "m", "n"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        put_alike(folder.path(), "a/clip", 1);
        put_alike(folder.path(), "b/clip", 2);
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = port.local_addr().unwrap().to_string();
        drop(port);
        let daemon = Command::new(rclone)
            .args([
                "--config=",
                "rcd",
                "--rc-no-auth",
                "--rc-addr",
                &address,
                "--cache-dir",
            ])
            .arg(folder.path().join("cache"))
            .current_dir(folder.path())
            .envs(["A", "B"].map(|name| (format!("RCLONE_CONFIG_{name}_TYPE"), "local")))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("rcd", || std::net::TcpStream::connect(&address).is_ok());
        Self {
            rclone: rclone.into(),
            folder,
            address,
            daemon,
        }
    }

    /// Mounts `remote` at folder `point`, with more mount options (JSON).
    fn mount(&self, remote: &str, point: &str, options: &str) -> PathBuf {
        let point = self.folder.path().join(point);
        let status = Command::new(&self.rclone)
            .args(["--config=", "rc", "--url"])
            .arg(format!("http://{}/", self.address))
            .arg("mount/mount")
            .arg(format!("fs={remote}"))
            .arg(format!("mountPoint={}", point.display()))
            .arg(r#"vfsOpt={"CacheMode": 3, "ReadOnly": true, "HandleCaching": 0}"#)
            .arg(format!("mountOpt={{{options}}}"))
            .output()
            .unwrap();
        assert!(status.status.success(), "{}", common::stderr(&status));
        point.join(CLIP)
    }

    fn source(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn unmount(&self, point: &str) {
        let status = Command::new("umount")
            .arg("-l")
            .arg(self.folder.path().join(point))
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Rcd {
    fn drop(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
        for point in ["m", "n"] {
            let point = self.folder.path().join(point);
            // It is not mounted in every test.
            let unmounted = Command::new("umount").arg("-lq").arg(point).output();
            assert!(unmounted.is_ok());
        }
    }
}

#[test]
fn two_remotes_of_one_daemon_are_each_their_own() {
    each(|rclone| {
        let rcd = Rcd::start(rclone);
        let a = rcd.mount(&format!("a:{}", rcd.source("a")), "m", "");
        let b = rcd.mount(&format!("b:{}", rcd.source("b")), "n", "");
        becomes_bypassed(&a, 1);
        becomes_bypassed(&b, 2);
        both_bypassed(&a, &b);
    });
}

#[test]
fn a_daemon_with_a_mount_that_says_to_be_another_is_refused() {
    each(|rclone| {
        let rcd = Rcd::start(rclone);
        let name = format!("a:{}", rcd.source("a"));
        let a = rcd.mount(&name, "m", "");
        becomes_bypassed(&a, 1);
        let lie = format!(r#""DeviceName": "{name}""#);
        let b = rcd.mount(&format!("b:{}", rcd.source("b")), "n", &lie);
        let _holders = (Holder::of(&a), Holder::of(&b));
        assert_eq!(read(&b, 2), Some(Reason::Unsupported));
        assert_eq!(read(&a, 1), Some(Reason::Unsupported));
        // Detached, and still in use: nothing of it is in the mount table.
        rcd.unmount("m");
        assert_eq!(read(&b, 2), Some(Reason::Ambiguous));
    });
}

#[test]
fn a_daemons_mount_of_a_name_of_nothing_is_refused() {
    each(|rclone| {
        let rcd = Rcd::start(rclone);
        let b = rcd.mount(&rcd.source("b"), "n", r#""DeviceName": "X""#);
        let _holder = Holder::of(&b);
        assert_eq!(read(&b, 2), Some(Reason::NoMetadata));
    });
}

#[test]
fn a_local_folder_that_looks_like_a_remote_is_not_taken_for_it() {
    each(|rclone| {
        let rcd = Rcd::start(rclone);
        put_alike(rcd.folder.path(), "x/clip", 1);
        put_alike(rcd.folder.path(), "a:x/clip", 2);
        // In 1.75 the source of both is `a:x`.
        let a = rcd.mount("a:x", "m", "");
        becomes_bypassed(&a, 1);
        let local = rcd.mount("./a:x", "n", "");
        let _holders = (Holder::of(&a), Holder::of(&local));
        // And 1.75 itself shows the one for the other.
        let seen = if fs::read(&local).unwrap() == content(2, SIZE) {
            2
        } else {
            1
        };
        read(&a, 1);
        read(&local, seen);
        rcd.unmount("m");
        assert_eq!(read(&local, seen), Some(Reason::Ambiguous));
    });
    each(|rclone| {
        let rcd = Rcd::start(rclone);
        put_alike(rcd.folder.path(), "a:x/clip", 2);
        let local = rcd.mount("./a:x", "n", "");
        fs::read(&local).unwrap();
        let refusal = read(&local, 2);
        let expected = rclone.is_absolute().then_some(Reason::Ambiguous);
        assert!(
            refusal == expected || refusal == Some(Reason::NoMetadata),
            "{refusal:?}"
        );
    });
}
