//! Copies of huge pages, on a tmpfs of our own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{IFlags, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use super::copy::fill;
use super::{dress, reopen};
use crate::reader::WholeClip;
use crate::reason::{Reason, Refusal};

/// A tmpfs whose files have huge pages as far as they fill them, mounted nowhere.
/// The host's setting for all others (`shmem_enabled`) is `never` by default.
///
/// # Errors
/// EPERM unless we may mount.
pub(super) fn folder() -> io::Result<OwnedFd> {
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

/// As [`super::copy::of`]. Nothing but the kernel is given it.
pub(super) fn copy_of(clip: &WholeClip, folder: &OwnedFd) -> Result<OwnedFd, Refusal> {
    let failed = |call: &str, e: io::Error| {
        Refusal::new(Reason::IoError, format!("{call} of a copy in memory: {e}"))
    };
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, ".", flags, Mode::RUSR);
    let file = File::from(file.map_err(|e| failed("making", e.into()))?);
    // Known beforehand, the size lets the first write take a huge page.
    file.set_len(clip.size()).map_err(|e| failed("sizing", e))?;
    fill(&file, clip)?;
    dress(&file, clip)?;
    let copy = reopen(&file).map_err(|e| failed("reopening", e))?;
    // Against root, too, who could open a mapping of it for writing by /proc.
    // tmpfs has it from Linux 6.6 on.
    if let Ok(flags) = rustix::fs::ioctl_getflags(&file) {
        let _ = rustix::fs::ioctl_setflags(&file, flags | IFlags::IMMUTABLE);
    }
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_files_are_on_a_tmpfs_that_has_no_place() {
        // Needs root; what comes of it without is that copies are of small pages.
        let Ok(folder) = folder() else {
            assert!(!nix::unistd::geteuid().is_root());
            return;
        };
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&folder, ".", flags, Mode::RUSR).unwrap());
        file.set_len(1 << 20).unwrap();
        let again = reopen(&file).unwrap();
        assert_eq!(rustix::fs::fstat(&again).unwrap().st_size, 1 << 20);
        let magic = rustix::fs::fstatfs(&again).unwrap().f_type;
        assert_eq!(magic as u64, 0x0102_1994, "TMPFS_MAGIC");
    }
}
