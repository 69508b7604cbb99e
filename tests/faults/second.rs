//! Another rclone on the same cache.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use vmafx_bypass::rig::Rig;

use crate::common::eventually;

/// Another rclone that has the same remote in the same cache; killed when dropped.
pub struct Second(Child);

impl Second {
    /// One of each kind that is looked for in a way of its own.
    pub fn kinds() -> [fn(&Rig, &Path) -> Self; 3] {
        [Self::serving, Self::mounting_here, Self::mounting_elsewhere]
    }

    /// Serves what the rig's mount has as its remote.
    fn serving(rig: &Rig, rclone: &Path) -> Self {
        let remote = remote_of(rig);
        let mut command = Command::new(rclone);
        command.args(["--config=", "serve", "http"]).arg(remote);
        command.args(["--addr=127.0.0.1:0", "--read-only"]);
        let second = Self::start(rig, command);
        let comm = format!("/proc/{}/comm", second.0.id());
        eventually("a second rclone", || {
            std::fs::read_to_string(&comm).is_ok_and(|name| name == "rclone\n")
        });
        second
    }

    /// Mounts it here, and hides that by what it calls the mount and the remote.
    fn mounting_here(rig: &Rig, rclone: &Path) -> Self {
        let mut command = Command::new(rclone);
        command.args(["--devname=X"]);
        Self::mounting(rig, command, "self")
    }

    /// Mounts it in another namespace, under another name.
    fn mounting_elsewhere(rig: &Rig, rclone: &Path) -> Self {
        let mut command = Command::new("unshare");
        command.args(["-m", "--propagation", "private"]).arg(rclone);
        Self::mounting(rig, command, "PID")
    }

    fn mounting(rig: &Rig, mut command: Command, namespace: &str) -> Self {
        let point = rig.cache().with_file_name("second");
        std::fs::create_dir_all(&point).unwrap();
        command.args(["--config=", "mount", "al:"]).arg(&point);
        command.arg("--read-only");
        command.env("RCLONE_CONFIG_AL_TYPE", "alias");
        command.env("RCLONE_CONFIG_AL_REMOTE", remote_of(rig));
        let second = Self::start(rig, command);
        let pid = second.0.id().to_string();
        let namespace = namespace.replace("PID", &pid);
        eventually("a second mount", || {
            let table = std::fs::read_to_string(format!("/proc/{namespace}/mountinfo"));
            table.unwrap().contains(point.to_str().unwrap())
        });
        second
    }

    fn start(rig: &Rig, mut command: Command) -> Self {
        command.args(["--vfs-cache-mode=full", "--cache-dir"]);
        command.arg(rig.cache()).stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

/// What the rig's mount has as its remote.
fn remote_of(rig: &Rig) -> OsString {
    let daemon = rig.daemon().unwrap();
    let arguments = std::fs::read(format!("/proc/{daemon}/cmdline")).unwrap();
    let remote = arguments
        .split(|&byte| byte == 0)
        .find(|argument| argument.starts_with(b":http"))
        .unwrap();
    OsStr::from_bytes(remote).to_os_string()
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
