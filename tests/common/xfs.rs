//! A file system of one's own with reflinks: xfs, in an image on a loop device.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tempfile::TempDir;

use super::need_root;

/// A mounted xfs; unmounted and gone when dropped.
pub struct Xfs {
    folder: TempDir,
}

impl Xfs {
    /// Makes one of 512 MiB, of which the host's disk has what is written.
    pub fn new() -> Self {
        need_root();
        make_devices();
        let folder = tempfile::Builder::new().prefix("vmafx-xfs-").tempdir();
        let xfs = Self {
            folder: folder.unwrap(),
        };
        let image = xfs.folder.path().join("image");
        File::create(&image).unwrap().set_len(512 << 20).unwrap();
        fs::create_dir(xfs.path()).unwrap();
        let run = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments).arg(&image);
            if program == "mount" {
                command.arg(xfs.path());
            }
            let output = command.output();
            let output = output.expect("xfsprogs is installed by scripts/setup.sh");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{program}: {said}");
        };
        run("mkfs.xfs", &["-q", "-m", "reflink=1"]);
        run("mount", &["-t", "xfs", "-o", "loop"]);
        xfs
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("xfs")
    }

    /// Puts the cache of a rig here, that is just being started and has this
    /// served folder: to be called where that is filled.
    pub fn take_cache(&self, source: &Path) {
        let cache = source.parent().unwrap().join("cache");
        fs::remove_dir(&cache).unwrap();
        std::os::unix::fs::symlink(self.path(), cache).unwrap();
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        // Lazily: where the test has failed, files may still be open.
        let unmounted = Command::new("umount").arg("-l").arg(self.path()).status();
        assert!(unmounted.is_ok_and(|s| s.success()) || std::thread::panicking());
    }
}

/// Loop devices, where nobody has made them: in containers.
fn make_devices() {
    let make = |name: &str, kind, major, minor| {
        let path = Path::new("/dev").join(name);
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        match mknod(&path, kind, mode, makedev(major, minor)) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(e) => panic!("mknod `{}`: {e}", path.display()),
        }
    };
    make("loop-control", SFlag::S_IFCHR, 10, 237);
    for minor in 0..8 {
        make(&format!("loop{minor}"), SFlag::S_IFBLK, 7, minor);
    }
}
