//! Copies of huge pages, each on a tmpfs of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use super::copy::fill;
use super::{dress, reopen};
use crate::reader::WholeClip;
use crate::reason::{Reason, Refusal};
use crate::sys;

/// How often, and after which time, a mount is tried again that somebody may write to:
/// a process that another thread of ours has just started, until it executes a program.
const TRIES: u32 = 100;
const AGAIN: Duration = Duration::from_millis(1);

/// A tmpfs whose files have huge pages as far as they fill them, mounted nowhere. The
/// host's setting for all others (`shmem_enabled`) is `never` by default.
///
/// # Errors
/// EPERM unless we may mount.
pub(super) fn tmpfs() -> io::Result<OwnedFd> {
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

fn create(tmpfs: &OwnedFd) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::EXCL | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(tmpfs, ".", flags, Mode::RUSR)?.into())
}

/// Ends all writing: the file's only mount, which nobody can reach but by the file,
/// becomes read-only, for which nobody may have it open for writing.
fn close(tmpfs: &OwnedFd, file: File) -> io::Result<OwnedFd> {
    let copy = reopen(&file)?;
    drop(file);
    let mut tries = 0;
    loop {
        match sys::make_read_only(tmpfs) {
            Ok(()) => return Ok(copy),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && tries < TRIES => {
                tries += 1;
                std::thread::sleep(AGAIN);
            }
            Err(e) => return Err(e),
        }
    }
}

/// As [`super::copy::of`], on such a mount.
pub(super) fn copy_of(clip: &WholeClip, tmpfs: &OwnedFd) -> Result<OwnedFd, Refusal> {
    let failed = |call: &str, e: io::Error| {
        Refusal::new(Reason::IoError, format!("{call} of a copy in memory: {e}"))
    };
    let file = create(tmpfs).map_err(|e| failed("making", e))?;
    // Known beforehand, the size lets the first write take a huge page.
    file.set_len(clip.size()).map_err(|e| failed("sizing", e))?;
    fill(&file, clip)?;
    dress(&file, clip)?;
    close(tmpfs, file).map_err(|e| failed("closing", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn its_file_is_on_a_tmpfs_that_has_no_place_and_cannot_be_written() {
        // Needs root; what comes of it without is that copies are of small pages.
        let Ok(tmpfs) = tmpfs() else {
            assert!(!nix::unistd::geteuid().is_root());
            return;
        };
        let file = create(&tmpfs).unwrap();
        file.write_all_at(b"abc", 0).unwrap();
        let writer = file.try_clone().unwrap();
        let busy = sys::make_read_only(&tmpfs).unwrap_err();
        assert_eq!(busy.raw_os_error(), Some(nix::libc::EBUSY));
        drop(writer);
        let copy = close(&tmpfs, file).unwrap();
        drop(tmpfs);
        assert_eq!(rustix::fs::fstat(&copy).unwrap().st_size, 3);
        let magic = rustix::fs::fstatfs(&copy).unwrap().f_type;
        assert_eq!(magic as u64, 0x0102_1994, "TMPFS_MAGIC");
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        for write in [File::options().write(true), File::options().append(true)] {
            let error = write.open(&path).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EROFS));
        }
        let flags = rustix::fs::ioctl_getflags(&copy);
        let set = flags.and_then(|flags| rustix::fs::ioctl_setflags(&copy, flags));
        assert!(set.is_err());
        assert!(rustix::fs::fchmod(&copy, Mode::RWXU).is_err());
        let mut read = [0; 3];
        File::from(reopen(&copy).unwrap())
            .read_exact_at(&mut read, 0)
            .unwrap();
        assert_eq!(&read, b"abc");
    }
}
