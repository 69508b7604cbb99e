//! The folder on an rclone mount that is shown again.
//!
//! Nothing of it is held between requests: rclone may unmount at any time, and
//! mount again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use crate::cache::rclone::Locator;
use crate::mounts::Mount;

/// No mount has been seen yet; the kernel's ids begin at 1.
const NONE: u64 = 0;
/// statx(2) gives mount ids that are never used again, Linux 6.8.
const MNT_ID_UNIQUE: u32 = 0x4000;
/// Attempts at a path that others rename meanwhile.
const TRIES: usize = 16;

pub(super) struct Source {
    /// Absolute, without symlinks.
    path: PathBuf,
    /// The unique id of the rclone mount that it was last found on.
    mount: AtomicU64,
}

impl Source {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            mount: AtomicU64::new(NONE),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The folder itself.
    ///
    /// # Errors
    /// ENOTCONN where it is on no rclone mount any more, or not yet again.
    pub(super) fn root(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, &self.path, flags, Mode::empty());
        let root = root.map_err(|e| if e == Errno::NOENT { Errno::NOTCONN } else { e })?;
        self.check_mount(&root)?;
        Ok(root)
    }

    /// The table is looked at for a mount that is new, and before Linux 6.8, where
    /// ids come again, each time.
    fn check_mount(&self, root: impl AsFd) -> io::Result<()> {
        let id = unique_mount_id(&root)?.unwrap_or(NONE);
        if id == NONE || self.mount.load(Ordering::Relaxed) != id {
            Self::mount_of(root)?;
            self.mount.store(id, Ordering::Relaxed);
        }
        Ok(())
    }

    fn mount_of(root: impl AsFd) -> io::Result<Mount> {
        let id = mount_id(root)?;
        let locator = Locator::now().map_err(|e| io::Error::other(e.to_string()))?;
        let mount = locator.table().by_id(id).filter(|mount| mount.is_rclone());
        mount.cloned().ok_or_else(|| Errno::NOTCONN.into())
    }

    /// Whether programs may change the clips by rclone's mount.
    ///
    /// # Errors
    /// As of [`root`](Self::root).
    pub(super) fn is_writable(&self) -> io::Result<bool> {
        let root = self.root()?;
        Ok(!Self::mount_of(&root)?.read_only)
    }

    /// What is at a path below it, a symlink itself included, as an O_PATH
    /// descriptor.
    pub(super) fn at(&self, inside: &Path) -> io::Result<OwnedFd> {
        self.open(inside, OFlags::PATH | OFlags::NOFOLLOW)
    }

    /// A folder below it, to be listed.
    pub(super) fn list(&self, inside: &Path) -> io::Result<OwnedFd> {
        self.open(inside, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// A regular file below it, for reading.
    pub(super) fn read(&self, inside: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        self.open(inside, flags)
    }

    /// Opens what is at a path below it, through no symlink: a folder that was
    /// looked up may have become one. Nor on another mount: what a mount in
    /// mid-tree shows is not rclone's.
    fn open(&self, inside: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let root = self.root()?;
        let path = if inside.as_os_str().is_empty() {
            Path::new(".")
        } else {
            inside
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = flags | OFlags::CLOEXEC;
        for _ in 0..TRIES {
            match rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                // A folder on its way is a symlink by now.
                Err(Errno::LOOP) => return Err(Errno::NOENT.into()),
                opened => return Ok(opened?),
            }
        }
        Err(Errno::AGAIN.into())
    }
}

/// The id of the mount that a file is on, as the mount table has it.
pub(super) fn mount_id(file: impl AsFd) -> io::Result<u64> {
    Ok(statx(file, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// The id of the mount that a file is on, which no other gets; `None` before
/// Linux 6.8.
pub(super) fn unique_mount_id(file: impl AsFd) -> io::Result<Option<u64>> {
    let unique = StatxFlags::from_bits_retain(MNT_ID_UNIQUE);
    let stat = statx(file, unique)?;
    let is_unique = StatxFlags::from_bits_retain(stat.stx_mask).contains(unique);
    Ok(is_unique.then_some(stat.stx_mnt_id))
}

/// Asks the kernel alone.
fn statx(file: impl AsFd, wanted: StatxFlags) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    Ok(rustix::fs::statx(file, "", flags, wanted)?)
}

/// A path below a folder, by the name of what is in it.
pub(super) fn join(folder: &Path, name: &std::ffi::OsStr) -> PathBuf {
    let mut path = Vec::with_capacity(folder.as_os_str().len() + 1 + name.len());
    if !folder.as_os_str().is_empty() {
        path.extend_from_slice(folder.as_os_str().as_bytes());
        path.push(b'/');
    }
    path.extend_from_slice(name.as_bytes());
    PathBuf::from(std::ffi::OsStr::from_bytes(&path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_no_rclone_mount_is_not_connected() {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::new(dir.path().to_path_buf());
        let error = source.root().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ENOTCONN));
        let gone = Source::new(dir.path().join("gone"));
        let error = gone.at(Path::new("x")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ENOTCONN));
    }

    #[test]
    fn paths_below_the_root_have_no_leading_slash() {
        assert_eq!(join(Path::new(""), "a".as_ref()), Path::new("a"));
        assert_eq!(join(Path::new("a/b"), "c".as_ref()), Path::new("a/b/c"));
    }
}
