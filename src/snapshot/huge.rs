//! Copies of huge pages, on a tmpfs of our own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use super::copy::fill;
use super::{dress, make_immutable, reopen};
use crate::reader::WholeClip;
use crate::reason::{Reason, Refusal};

/// A tmpfs whose files have huge pages as far as they fill them, mounted nowhere.
/// The host's setting for all others (`shmem_enabled`) is `never` by default.
pub(super) struct Folder {
    tmpfs: OwnedFd,
    /// Whether its files can be made immutable: from Linux 6.6 on.
    immutable: bool,
}

impl Folder {
    /// # Errors
    /// EPERM unless we may mount.
    pub(super) fn new() -> io::Result<Self> {
        let tmpfs = tmpfs()?;
        let probe = create(&tmpfs)?;
        Ok(Self {
            immutable: make_immutable(&probe).is_ok(),
            tmpfs,
        })
    }

    /// Whether nobody can write to a copy that is made, as if it were sealed; but
    /// root could take the attribute off.
    pub(super) fn makes_immutable(&self) -> bool {
        self.immutable
    }
}

fn create(tmpfs: &OwnedFd) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::EXCL | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(tmpfs, ".", flags, Mode::RUSR)?.into())
}

fn tmpfs() -> io::Result<OwnedFd> {
    let new = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // The budget limits it, and what memory there is.
    for (name, value) in [("huge", "within_size"), ("size", "0"), ("mode", "0700")] {
        fsconfig_set_string(new.as_fd(), name, value)?;
    }
    fsconfig_create(new.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(
        new.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// As [`super::copy::of`].
pub(super) fn copy_of(clip: &WholeClip, folder: &Folder) -> Result<OwnedFd, Refusal> {
    let failed = |call: &str, e: io::Error| {
        Refusal::new(Reason::IoError, format!("{call} of a copy in memory: {e}"))
    };
    let file = create(&folder.tmpfs).map_err(|e| failed("making", e))?;
    // Known beforehand, the size lets the first write take a huge page.
    file.set_len(clip.size()).map_err(|e| failed("sizing", e))?;
    fill(&file, clip)?;
    dress(&file, clip)?;
    let copy = reopen(&file).map_err(|e| failed("reopening", e))?;
    // Against root, too, who could open a mapping of it for writing by /proc.
    if folder.immutable {
        make_immutable(&file).map_err(|e| failed("making immutable", e))?;
    }
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn its_files_are_on_a_tmpfs_that_has_no_place() {
        // Needs root; what comes of it without is that copies are of small pages.
        let Ok(folder) = Folder::new() else {
            assert!(!nix::unistd::geteuid().is_root());
            return;
        };
        let file = create(&folder.tmpfs).unwrap();
        file.set_len(1 << 20).unwrap();
        let again = reopen(&file).unwrap();
        assert_eq!(rustix::fs::fstat(&again).unwrap().st_size, 1 << 20);
        let magic = rustix::fs::fstatfs(&again).unwrap().f_type;
        assert_eq!(magic as u64, 0x0102_1994, "TMPFS_MAGIC");
        assert_eq!(make_immutable(&file).is_ok(), folder.makes_immutable());
        let path = format!("/proc/self/fd/{}", again.as_raw_fd());
        let written = File::options().write(true).open(path);
        assert_eq!(written.is_err(), folder.makes_immutable());
    }
}
