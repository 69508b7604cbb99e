//! The file as FUSE shows it: permission check, fallback, and the prime.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::fs::{AtFlags, StatxFlags};

use crate::reason::{Reason, Refusal};

/// The descriptor opened through FUSE, and the path the kernel gives for it.
pub(super) struct Companion {
    file: File,
    path: PathBuf,
    flags: OFlag,
}

impl Companion {
    /// Opens a regular file read-only.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // O_NONBLOCK: opening a FIFO by mistake must not hang.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
            .open(path)?;
        Self::new(file)
    }

    /// Takes a descriptor of a regular file that is open for reading.
    pub(super) fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Self::new(File::from(fd))
    }

    fn new(file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if kind.is_dir() {
            return Err(io::Error::from(io::ErrorKind::IsADirectory));
        }
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        let readable = flags & OFlag::O_ACCMODE != OFlag::O_WRONLY;
        if !kind.is_file() || !readable || flags.contains(OFlag::O_PATH) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file that is open for reading",
            ));
        }
        let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Self { file, path, flags })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_writable(&self) -> bool {
        self.flags & OFlag::O_ACCMODE != OFlag::O_RDONLY
    }

    pub(super) fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// The id of the mount that the descriptor was opened on.
    pub(super) fn mount_id(&self) -> Result<u64, Refusal> {
        let stat = rustix::fs::statx(&self.file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
            .map_err(|e| Refusal::new(Reason::IoError, format!("statx: {e}")))?;
        // Linux 5.8; the floor is 5.15.
        if StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::MNT_ID) {
            Ok(stat.stx_mnt_id)
        } else {
            Err(Refusal::new(
                Reason::Unsupported,
                "the kernel does not tell which mount a file is on; linux 5.15 or newer is needed",
            ))
        }
    }

    /// Reads one byte past the page cache, so that rclone compares the remote's
    /// version with its own and opens the cache file. A buffered read could be
    /// answered by the kernel alone.
    pub(super) fn prime(&self, offset: u64) -> io::Result<()> {
        let set = |flags: OFlag| fcntl(&self.file, FcntlArg::F_SETFL(flags));
        set(self.flags | OFlag::O_DIRECT)?;
        let read = self.read_at(&mut [0], offset);
        set(self.flags)?;
        read.map(drop)
    }

    /// pread(2), again when a signal interrupts it.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.file.read_at(buffer, offset) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_only_readable_regular_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "abc").unwrap();
        let open = |flags: OFlag, write: bool| {
            let file = OpenOptions::new()
                .read(!write)
                .write(write)
                .custom_flags(flags.bits())
                .open(&path)
                .unwrap();
            Companion::from_fd(file.into())
        };
        assert!(open(OFlag::empty(), false).is_ok());
        assert!(open(OFlag::empty(), true).is_err());
        assert!(open(OFlag::O_PATH, false).is_err());
        let pipe = std::io::pipe().unwrap().0;
        assert!(Companion::from_fd(pipe.into()).is_err());
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(Companion::open(&fifo).is_err());
    }

    #[test]
    fn a_prime_leaves_the_flags_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "abc").unwrap();
        let companion = Companion::open(&path).unwrap();
        // Whether a local file system takes a 1-byte direct read differs.
        let _ = companion.prime(0);
        let flags = OFlag::from_bits_retain(fcntl(&companion.file, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_DIRECT));
    }
}
