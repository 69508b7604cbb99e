//! The file as FUSE shows it: permission check, fallback, and the prime.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};
use rustix::fs::{AtFlags, CWD, StatxFlags};

#[cfg(feature = "mount")]
use crate::cache::proof::Timestamp;
use crate::cache::rclone::{FuseFile, no_cachestat};
use crate::reason::{Reason, Refusal};
use crate::sys::{Pages, pages};

/// The descriptor opened through FUSE. Each proof but the first opens the same
/// file anew, since rclone looks at the remote's version when a new handle is
/// first read, and takes that one from then on.
pub(super) struct Companion {
    file: ArcSwap<File>,
    /// As the kernel gave it when the file was opened: for display.
    path: PathBuf,
    /// Whether the kernel gave none; `path` is then what the caller said.
    nameless: bool,
    writable: bool,
    /// Whether nobody has read through `file`, nor shares its description.
    fresh: AtomicBool,
}

impl Companion {
    /// Opens a regular file read-only.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // O_NONBLOCK: opening a FIFO by mistake must not hang.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
            .open(path)?;
        Self::new(file, path, true)
    }

    /// Takes a descriptor of a regular file that is open for reading.
    pub(super) fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let link = link(&file);
        Self::new(file, &link, false)
    }

    /// The same, of a descriptor that nobody shares or has read through.
    #[cfg(feature = "mount")]
    pub(super) fn from_new_fd(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let link = link(&file);
        Self::new(file, &link, true)
    }

    fn new(file: File, path: &Path, fresh: bool) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if kind.is_dir() {
            return Err(io::Error::from(io::ErrorKind::IsADirectory));
        }
        let flags = flags(&file)?;
        let readable = flags & OFlag::O_ACCMODE != OFlag::O_WRONLY;
        if !kind.is_file() || !readable || flags.contains(OFlag::O_PATH) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file that is open for reading",
            ));
        }
        // It has none where /proc is missing or the path is over long; the
        // file is then read through FUSE alone, under the name given.
        let name = fs::read_link(link(&file));
        Ok(Self {
            nameless: name.is_err(),
            path: name.unwrap_or_else(|_| path.to_path_buf()),
            writable: flags & OFlag::O_ACCMODE != OFlag::O_RDONLY,
            file: ArcSwap::from_pointee(file),
            fresh: AtomicBool::new(fresh),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the file is now: mounts move, and so do folders.
    pub(super) fn current_path(&self) -> Result<PathBuf, Refusal> {
        if self.nameless {
            let detail = format!("`{}`: the kernel gave no path for it", self.path.display());
            return Err(Refusal::new(Reason::IoError, detail));
        }
        let link = link(&self.file.load());
        fs::read_link(&link).map_err(|e| {
            Refusal::from_io(format_args!("`{}`", link.display()), &e, Reason::IoError)
        })
    }

    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether nobody has read through the descriptor, nor shares it.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh.load(Ordering::Relaxed)
    }

    pub(super) fn metadata(&self) -> io::Result<fs::Metadata> {
        self.file.load().metadata()
    }

    /// Its size, bytes, and modification time, as rclone has them now: the kernel
    /// may have older ones.
    #[cfg(feature = "mount")]
    pub(super) fn version_now(&self) -> io::Result<(u64, Timestamp)> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
        let wanted = StatxFlags::SIZE | StatxFlags::MTIME;
        let stat = rustix::fs::statx(&**self.file.load(), "", flags, wanted)?;
        let modified = Timestamp {
            seconds: stat.stx_mtime.tv_sec,
            nanos: stat.stx_mtime.tv_nsec,
        };
        Ok((stat.stx_size, modified))
    }

    /// The file's device and inode.
    pub(super) fn identity(&self) -> io::Result<(u64, u64)> {
        self.metadata().map(|m| (m.dev(), m.ino()))
    }

    /// The id of the mount that the descriptor was opened on.
    pub(super) fn mount_id(&self) -> Result<u64, Refusal> {
        let file = self.file.load();
        let stat = rustix::fs::statx(&**file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID);
        mount_id(&stat)
    }

    /// The descriptor, to be sent to another process: its flags are not ours
    /// alone to change any more.
    pub(super) fn share(&self) -> Arc<File> {
        self.fresh.store(false, Ordering::Relaxed);
        self.file.load_full()
    }

    /// Opens the file anew, for a proof after another: a handle that was read
    /// through before may be of an older version.
    pub(super) fn renew(&self) -> io::Result<()> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
            .open(link(&self.file.load()))?;
        self.file.store(Arc::new(file));
        Ok(())
    }

    /// Whether the kernel has pages of a range. They may be newer than what
    /// rclone has: changed by a program, on their way, or not taken by rclone.
    pub(super) fn has_pages(&self, offset: u64, length: u64) -> Result<bool, Refusal> {
        let pages = self.pages(offset, length);
        pages.map(|pages| pages.cached > 0).map_err(no_cachestat)
    }

    /// As [`read_at`](Self::read_at), without the kernel reading ahead: on a
    /// writable mount, what it has pages of is not bypassed.
    pub(super) fn read_without_ahead(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let file = self.file.load();
        // Advice: where it is not taken, more goes through FUSE.
        let _ = posix_fadvise(&**file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
        let read = read_at(&file, buffer, offset);
        let _ = posix_fadvise(&**file, 0, 0, PosixFadviseAdvice::POSIX_FADV_NORMAL);
        read
    }

    /// The file opened anew, to be read past the page cache.
    pub(super) fn open_direct(&self) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_DIRECT).bits())
            .open(link(&self.file.load()))
    }

    /// pread(2), again when a signal interrupts it.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.fresh.store(false, Ordering::Relaxed);
        read_at(&self.file.load(), buffer, offset)
    }
}

impl FuseFile for Companion {
    /// Opens the file anew and reads one byte past the page cache, so that
    /// rclone compares the remote's version with its own and opens the cache
    /// file; a buffered read could be answered by the kernel alone.
    fn prime(&self, offset: u64) -> io::Result<()> {
        let file = if self.fresh.swap(false, Ordering::Relaxed) {
            // Not shared yet: its flags are ours to change.
            let file = self.file.load_full();
            set_direct(&file, true)?;
            file
        } else {
            Arc::new(self.open_direct()?)
        };
        let read = read_at(&file, &mut [0], offset);
        set_direct(&file, false)?;
        if read? != 1 {
            let error = "the file ends before what the cache has of it";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, error));
        }
        self.file.store(file);
        Ok(())
    }

    fn is(&self, found: &fs::Metadata) -> bool {
        self.identity()
            .is_ok_and(|own| own == (found.dev(), found.ino()))
    }

    fn pages(&self, offset: u64, length: u64) -> io::Result<Pages> {
        pages(&**self.file.load(), offset, length)
    }
}

/// The id of the mount that an absolute path leads to, without asking FUSE.
pub(super) fn mount_id_of(path: &Path) -> Result<u64, Refusal> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    mount_id(&rustix::fs::statx(CWD, path, flags, StatxFlags::MNT_ID))
}

fn mount_id(stat: &rustix::io::Result<rustix::fs::Statx>) -> Result<u64, Refusal> {
    let stat = stat
        .as_ref()
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

fn link(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn flags(file: &File) -> io::Result<OFlag> {
    Ok(OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?))
}

fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let mut flags = flags(file)?;
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match file.read_at(buffer, offset) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
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
    fn a_prime_leaves_no_direct_flag_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "abc").unwrap();
        let shared = File::open(&path).unwrap();
        let own = Companion::open(&path).unwrap();
        let taken = Companion::from_fd(shared.try_clone().unwrap().into()).unwrap();
        for companion in [&own, &taken, &own] {
            // Whether a local file system takes a 1-byte direct read differs.
            let _ = companion.prime(0);
            let direct = |file: &File| flags(file).unwrap().contains(OFlag::O_DIRECT);
            assert!(!direct(&companion.file.load()) && !direct(&shared));
        }
    }

    #[test]
    fn the_path_follows_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        fs::write(&old, "abc").unwrap();
        let companion = Companion::open(&old).unwrap();
        fs::rename(&old, &new).unwrap();
        fs::write(&old, "other").unwrap();
        let path = companion.current_path().unwrap();
        assert!(path.ends_with("new"));
        assert!(companion.is(&fs::metadata(&new).unwrap()));
        assert!(!companion.is(&fs::metadata(&old).unwrap()));
    }
}
