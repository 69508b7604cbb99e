//! What a process asks for: the path in its memory, and the file that the path
//! leads to when that process resolves it.

use std::ffi::CStr;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::{self, c_long, seccomp_data};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};

use super::filter::MAY_SUBSTITUTE;

/// The longest path that the kernel takes, its end included.
const PATH_MAX: usize = 4096;
/// What is read of a path at first: most are shorter.
const FIRST: usize = 256;
/// Room for `/proc/<tid>/fd/<n>/` before a path.
const PREFIX: usize = 64;
/// Flags of openat2's `resolve` that can be kept.
const KEPT: ResolveFlags = ResolveFlags::NO_SYMLINKS
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::BENEATH)
    .union(ResolveFlags::IN_ROOT);

/// An open as it was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) thread: u32,
    folder: i32,
    path: u64,
    pub(super) flags: u32,
    /// Of openat2.
    resolve: ResolveFlags,
}

impl Asked {
    /// What the call's arguments say; `None` where the open must go on.
    pub(super) fn parse(thread: u32, data: &seccomp_data) -> Option<Self> {
        let nr = c_long::from(data.nr);
        let [first, second, third, fourth, ..] = data.args;
        #[cfg(target_arch = "x86_64")]
        if nr == libc::SYS_open {
            return Some(Self {
                thread,
                folder: libc::AT_FDCWD,
                path: first,
                flags: second as u32,
                resolve: ResolveFlags::empty(),
            });
        }
        let (flags, resolve) = if nr == libc::SYS_openat {
            (third as u32, ResolveFlags::empty())
        } else if nr == libc::SYS_openat2 {
            how(thread, third, fourth)?
        } else {
            return None;
        };
        Some(Self {
            thread,
            folder: first as i32,
            path: second,
            flags,
            resolve,
        })
    }

    /// Whether a descriptor is to be closed when the process executes another program.
    pub(super) fn cloexec(&self) -> bool {
        self.flags & libc::O_CLOEXEC as u32 != 0
    }

    pub(super) fn nonblocking(&self) -> bool {
        self.flags & libc::O_NONBLOCK as u32 != 0
    }

    fn nofollow(&self) -> bool {
        self.flags & libc::O_NOFOLLOW as u32 != 0
    }
}

/// The third and fourth argument of openat2: flags that the filter could not see.
fn how(thread: u32, address: u64, size: u64) -> Option<(u32, ResolveFlags)> {
    let mut bytes = [0; 24];
    // A longer structure may ask for what this program does not know.
    if size != bytes.len() as u64 || read(thread, address, &mut bytes).ok()? != bytes.len() {
        return None;
    }
    let word = |i: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[8 * i..8 * i + 8]);
        u64::from_ne_bytes(word)
    };
    let (flags, mode, resolve) = (word(0), word(1), word(2));
    let flags = u32::try_from(flags)
        .ok()
        .filter(|f| f & !MAY_SUBSTITUTE == 0)?;
    let resolve = ResolveFlags::from_bits(resolve).filter(|r| KEPT.contains(*r))?;
    (mode == 0).then_some((flags, resolve))
}

/// Reads memory of a process; what can be had of it.
fn read(thread: u32, address: u64, buffer: &mut [u8]) -> nix::Result<usize> {
    let remote = RemoteIoVec {
        base: usize::try_from(address).map_err(|_| Errno::EFAULT)?,
        len: buffer.len(),
    };
    let mut local = [IoSliceMut::new(buffer)];
    process_vm_readv(Pid::from_raw(thread as i32), &mut local, &[remote])
}

/// The path of an open, with room before it.
pub(super) struct PathBuffer {
    bytes: [u8; PREFIX + PATH_MAX],
    /// Bytes of the path, without its end.
    length: usize,
}

impl PathBuffer {
    pub(super) fn new() -> Self {
        Self {
            bytes: [0; PREFIX + PATH_MAX],
            length: 0,
        }
    }

    /// Reads the path page by page, as far as it goes.
    ///
    /// Another thread may change it meanwhile. What is read here once is all
    /// that is resolved, as in the kernel.
    ///
    /// # Errors
    /// EPERM where the memory of the process is closed to this one; others where
    /// there is no path, or no end of it, and the kernel has the right error.
    pub(super) fn fill(&mut self, asked: &Asked) -> nix::Result<()> {
        const PAGE: u64 = 4096;
        self.length = 0;
        while self.length < PATH_MAX {
            let address = asked.path.checked_add(self.length as u64);
            let address = address.ok_or(Errno::EFAULT)?;
            let in_page = (PAGE - address % PAGE) as usize;
            let step = if self.length == 0 { FIRST } else { PATH_MAX };
            let want = in_page.min(step).min(PATH_MAX - self.length);
            let start = PREFIX + self.length;
            let got = read(asked.thread, address, &mut self.bytes[start..start + want])?;
            let new = &self.bytes[start..start + got];
            if let Some(end) = new.iter().position(|&b| b == 0) {
                self.length += end;
                return Ok(());
            }
            if got == 0 {
                return Err(Errno::EFAULT);
            }
            self.length += got;
        }
        Err(Errno::ENAMETOOLONG)
    }

    fn is_absolute(&self) -> bool {
        self.length > 0 && self.bytes[PREFIX] == b'/'
    }

    /// The path as it was given.
    fn path(&self) -> Option<&CStr> {
        self.after(PREFIX)
    }

    /// From here to its end.
    fn after(&self, start: usize) -> Option<&CStr> {
        CStr::from_bytes_with_nul(&self.bytes[start..=PREFIX + self.length]).ok()
    }

    /// A path by which this process probably finds the same file.
    fn guess(&mut self, asked: &Asked) -> Option<&CStr> {
        if self.is_absolute() {
            return self.path();
        }
        let mut prefix = [0; PREFIX];
        let mut rest = &mut prefix[..];
        let thread = asked.thread;
        match asked.folder {
            libc::AT_FDCWD => write!(rest, "/proc/{thread}/cwd/").ok()?,
            fd => write!(rest, "/proc/{thread}/fd/{fd}/").ok()?,
        }
        let used = PREFIX - rest.len();
        self.bytes[PREFIX - used..PREFIX].copy_from_slice(&prefix[..used]);
        self.after(PREFIX - used)
    }

    /// What the path probably leads to, by one system call and without asking
    /// its file system. It decides nothing but that an open goes on.
    pub(super) fn glance(&mut self, asked: &Asked) -> Option<Statx> {
        let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
        rustix::fs::statx(CWD, self.guess(asked)?, flags, StatxFlags::TYPE).ok()
    }
}

/// Where a root folder is: its mount and its inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Root {
    mount: u64,
    device: (u32, u32),
    inode: u64,
}

impl Root {
    /// The calling process's own.
    pub(super) fn own() -> io::Result<Self> {
        Ok(Self::of(&folder("/proc/self/root")?)?)
    }

    fn of(folder: &OwnedFd) -> rustix::io::Result<Self> {
        let stat = look(folder.as_fd())?;
        Ok(Self {
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
        })
    }
}

fn folder(path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// What a file is, without asking its file system.
pub(super) fn look(file: BorrowedFd<'_>) -> rustix::io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
    rustix::fs::statx(file, c"", flags, wanted)
}

/// Whether what was looked at is a regular file.
pub(super) fn is_regular(stat: &Statx) -> bool {
    FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile
}

/// Resolves the path as the caller would, by its root, folder and mounts, and
/// opens what it leads to with O_PATH: nothing is read or waited for.
///
/// # Errors
/// Those of openat2; also where this process could resolve the path otherwise
/// than the caller, as through magic links of /proc. The open then goes on.
pub(super) fn resolve(asked: &Asked, path: &PathBuffer, own: Root) -> rustix::io::Result<OwnedFd> {
    let thread = asked.thread;
    let path_is_absolute = path.is_absolute();
    let path = path.path().ok_or(rustix::io::Errno::INVAL)?;
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    if asked.nofollow() {
        flags |= OFlags::NOFOLLOW;
    }
    let open = |from: BorrowedFd<'_>, resolve: ResolveFlags| {
        let resolve = resolve | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(from, path, flags, Mode::empty(), resolve)
    };
    let root = || folder(&format!("/proc/{thread}/root"));
    let start = || match asked.folder {
        libc::AT_FDCWD => folder(&format!("/proc/{thread}/cwd")),
        fd => folder(&format!("/proc/{thread}/fd/{fd}")),
    };
    if asked
        .resolve
        .intersects(ResolveFlags::BENEATH | ResolveFlags::IN_ROOT)
    {
        return open(start()?.as_fd(), asked.resolve);
    }
    if path_is_absolute {
        return open(root()?.as_fd(), asked.resolve | ResolveFlags::IN_ROOT);
    }
    let start = start()?;
    match open(start.as_fd(), asked.resolve | ResolveFlags::BENEATH) {
        // By `..` or an absolute symlink it leaves its folder: followed by this
        // process, it stops at, or starts from, this process's root.
        Err(rustix::io::Errno::XDEV) if Root::of(&root()?)? == own => {
            open(start.as_fd(), asked.resolve)
        }
        result => result,
    }
}
