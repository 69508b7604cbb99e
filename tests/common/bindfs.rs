//! FUSE mounts that are not rclone's.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::eventually;

/// A folder that is shown at another place, or at its own, without the kernel keeping
/// anything of it; until dropped.
pub struct Bindfs {
    daemon: Child,
    point: PathBuf,
}

impl Bindfs {
    pub fn over(point: &Path, source: &Path) -> Self {
        let dev = || fs::metadata(point).unwrap().dev();
        let before = dev();
        let mut command = Command::new("bindfs");
        command.args(["-f", "-o", "attr_timeout=0,entry_timeout=0"]);
        let daemon = command.arg(source).arg(point).spawn();
        let daemon = daemon.expect("the Debian package bindfs is installed");
        eventually("the mount of bindfs", || dev() != before);
        Self {
            daemon,
            point: point.to_owned(),
        }
    }

    /// Has it not answer any more.
    pub fn stop(&self) {
        self.send(Signal::SIGSTOP);
    }

    /// Has it answer again.
    pub fn go_on(&self) {
        self.send(Signal::SIGCONT);
    }

    fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.daemon.id() as i32), signal).unwrap();
    }
}

impl Drop for Bindfs {
    fn drop(&mut self) {
        // Who waits for it gets an error.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = umount2(&self.point, MntFlags::MNT_DETACH);
    }
}
