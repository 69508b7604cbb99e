//! Small questions to the kernel that more than one module asks.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sched::{CloneFlags, setns, unshare};
use nix::time::{ClockId, clock_gettime};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::mounts::Dev;

/// The fields of `/proc/<pid>/stat` from the third on, the process's state.
fn stat(pid: u32) -> Option<String> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, may hold spaces and parentheses.
    let after_name = stat.iter().rposition(|&b| b == b')')? + 2;
    String::from_utf8(stat.get(after_name..)?.to_vec()).ok()
}

/// A process's state as a letter: `R`, `S`, `T` for stopped. `None` where there
/// is no such process.
#[must_use]
pub(crate) fn state(pid: u32) -> Option<char> {
    stat(pid)?.chars().next()
}

/// The pid of a process's parent. `None` where there is no such process.
#[must_use]
pub(crate) fn parent(pid: u32) -> Option<u32> {
    stat(pid)?.split(' ').nth(1)?.parse().ok()
}

/// Whether a thread has a signal to take, as soon as its system call ends; false
/// where there is no such thread.
#[must_use]
pub(crate) fn has_pending_signal(thread: u32) -> bool {
    let status = fs::read(format!("/proc/{thread}/status")).unwrap_or_default();
    let set = |name: &str| {
        let mut lines = status.split(|&b| b == b'\n');
        let line = lines.find_map(|line| line.strip_prefix(name.as_bytes()))?;
        u64::from_str_radix(std::str::from_utf8(line).ok()?.trim(), 16).ok()
    };
    let sets = [set("SigPnd:"), set("ShdPnd:"), set("SigBlk:")];
    matches!(sets, [Some(own), Some(shared), Some(blocked)] if (own | shared) & !blocked != 0)
}

/// Field 22 of `/proc/<pid>/stat`: when the process started, in clock ticks
/// since boot. With the pid it names this process and no later one. `None`
/// where there is no such process.
#[must_use]
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let text = stat(pid)?;
    let mut fields = text.split(' ');
    // A zombie does nothing any more, and holds nothing.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Whether a process is on its way out, its memory, arguments and folders perhaps
/// gone already; false where there is none.
#[must_use]
pub(crate) fn is_exiting(pid: u32) -> bool {
    /// Of field 9, the flags; include/linux/sched.h.
    const PF_EXITING: u64 = 4;
    let flags = stat(pid).and_then(|text| text.split(' ').nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_EXITING != 0)
}

/// A monotonic clock of a few milliseconds' grain that costs no system call.
#[must_use]
pub(crate) fn coarse_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(0, |t| {
        t.tv_sec() as u64 * 1_000 + t.tv_nsec() as u64 / 1_000_000
    })
}

/// The running kernel's version, major and minor; (0, 0) where its release
/// begins with none.
#[must_use]
pub(crate) fn kernel_version() -> (u32, u32) {
    let name = rustix::system::uname();
    parse_release(&name.release().to_string_lossy()).unwrap_or_default()
}

/// `6.18.44-cloud-amd64`, `6.1-rc1`.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.split_once('.')?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    Some((major.parse().ok()?, rest[..digits].parse().ok()?))
}

/// What cachestat(2) tells of the page cache (include/uapi/linux/mman.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CacheStat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Which bytes cachestat(2) is to look at; a length of 0 is up to the end.
#[repr(C)]
struct CacheStatRange {
    offset: u64,
    length: u64,
}

/// A file's pages in the kernel's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pages {
    /// All of them.
    pub(crate) cached: u64,
    /// Those that were changed and are not written yet: dirty, or under writeback.
    pub(crate) unwritten: u64,
}

/// The pages of a file's range; a length of 0 is up to the end. cachestat(2),
/// Linux 6.5.
///
/// # Errors
/// ENOSYS on older kernels; EPERM where the caller neither may write to the
/// file nor owns it (Linux 6.13).
pub(crate) fn pages(file: impl AsFd, offset: u64, length: u64) -> io::Result<Pages> {
    // The same number on every architecture (include/uapi/asm-generic/unistd.h).
    const SYS_CACHESTAT: nix::libc::c_long = 451;
    let range = CacheStatRange { offset, length };
    let mut stat = CacheStat::default();
    // SAFETY: the kernel reads one `range` and writes one `stat`, both alive
    // and laid out as in linux/mman.h; the descriptor is borrowed for the call.
    let result = unsafe {
        nix::libc::syscall(
            SYS_CACHESTAT,
            file.as_fd().as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    if result == 0 {
        Ok(Pages {
            cached: stat.cache,
            unwritten: stat.dirty + stat.writeback,
        })
    } else {
        Err(io::Error::last_os_error())
    }
}

/// How much the kernel reads ahead on a FUSE mount, KiB; 128 by default, which costs a
/// fast reader half of its speed.
///
/// # Errors
/// EACCES unless we are root.
pub(crate) fn set_read_ahead(dev: Dev, kib: u32) -> io::Result<()> {
    let path = format!(
        "/sys/class/bdi/{}:{}/read_ahead_kb",
        dev.major(),
        dev.minor()
    );
    fs::write(path, kib.to_string())
}

/// What mount_setattr(2) is to change (include/uapi/linux/mount.h).
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// A file opened anew, for reading, by a read-only mount of its own: nobody, root
/// included, can open it for writing by this descriptor and /proc, nor change its
/// mode, times or flags. The mount is in no namespace, where nobody can change it,
/// and lasts as long as the descriptor. Takes 16 us, and a thread where the file's
/// own mount is in the mount namespace of `other`, a process.
///
/// # Errors
/// EPERM unless we may mount; EINVAL where the file's mount is in neither.
pub(crate) fn open_on_read_only_mount(file: impl AsFd, other: Option<u32>) -> io::Result<OwnedFd> {
    let file = file.as_fd();
    let mount = match (clone_mount(file), other) {
        (Err(e), Some(pid)) if e.raw_os_error() == Some(nix::libc::EINVAL) => {
            clone_mount_of(file, pid)
        }
        (cloned, _) => cloned,
    }?;
    make_read_only(&mount)?;
    let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Makes a mount that is ours alone read-only, once and for all: mount_setattr(2).
///
/// # Errors
/// EBUSY while anybody has a file on it open for writing.
pub(crate) fn make_read_only(mount: &OwnedFd) -> io::Result<()> {
    // The same numbers on every architecture (include/uapi/asm-generic/unistd.h,
    // include/uapi/linux/mount.h).
    const SYS_MOUNT_SETATTR: nix::libc::c_long = 442;
    const MOUNT_ATTR_RDONLY: u64 = 1;
    let change = MountAttr {
        set: MOUNT_ATTR_RDONLY,
        clear: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the kernel reads one empty string and one `change` of the size given,
    // both alive; the descriptor is borrowed for the call.
    let result = unsafe {
        nix::libc::syscall(
            SYS_MOUNT_SETATTR,
            mount.as_raw_fd(),
            c"".as_ptr(),
            nix::libc::AT_EMPTY_PATH,
            &raw const change,
            size_of_val(&change),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A mount of nothing but a file.
fn clone_mount(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let flags = flags | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(file, c"", flags)?)
}

/// The same, from within the mount namespace of a process: by a thread that ends
/// with it.
fn clone_mount_of(file: BorrowedFd<'_>, pid: u32) -> io::Result<OwnedFd> {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
    std::thread::scope(|scope| {
        let cloning = std::thread::Builder::new().spawn_scoped(scope, || {
            // A thread that shares its root folder with others may not leave.
            unshare(CloneFlags::CLONE_FS)?;
            setns(namespace, CloneFlags::CLONE_NEWNS)?;
            clone_mount(file)
        })?;
        let panicked = |_| Err(io::Error::other("a thread has panicked"));
        cloning.join().unwrap_or_else(panicked)
    })
}

/// Who is at the other end of a Unix socket: as it was when that end connected,
/// or began to listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    /// In our pid namespace; 0 where it is not in it.
    pub(crate) pid: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// SO_PEERCRED. rustix has it with a pid that must not be 0, which it is for a
/// process that our pid namespace does not show.
///
/// # Errors
/// Those of getsockopt(2).
pub(crate) fn peer(socket: impl AsFd) -> io::Result<Peer> {
    let mut found = nix::libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = size_of_val(&found) as nix::libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `found` and the
    // length that it wrote into `length`; both are alive, and any bytes are a
    // valid `ucred`. The descriptor is borrowed for the call.
    let result = unsafe {
        nix::libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            nix::libc::SOL_SOCKET,
            nix::libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Peer {
        pid: found.pid.unsigned_abs(),
        uid: found.uid,
        gid: found.gid,
    })
}

/// A descriptor of our own for what one that was inherited is of.
///
/// # Errors
/// EBADF where that number is not open.
pub(crate) fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(nix::libc::EBADF));
    }
    // SAFETY: it is not negative, and borrowed for one fcntl(2), which fails where it
    // is not open.
    let inherited = unsafe { BorrowedFd::borrow_raw(number) };
    inherited.try_clone_to_owned()
}

/// Whether anyone has a file open for writing. Its owner may ask, or whoever
/// has CAP_LEASE.
///
/// # Errors
/// Those of fcntl(2), where the kernel does not tell.
pub(crate) fn is_open_to_write(file: impl AsFd) -> io::Result<bool> {
    lease(file.as_fd(), nix::libc::F_RDLCK)
}

/// Whether another description of a file exists than this one, which must be
/// read-only; a mapping counts. Its owner may ask, or whoever has CAP_LEASE.
///
/// # Errors
/// Those of fcntl(2), where the kernel does not tell.
pub(crate) fn is_open_elsewhere(file: impl AsFd) -> io::Result<bool> {
    lease(file.as_fd(), nix::libc::F_WRLCK)
}

/// Takes a lease and gives it back: the kernel refuses it where others have the
/// file open in ways that the lease would guard against.
fn lease(file: BorrowedFd<'_>, kind: nix::libc::c_int) -> io::Result<bool> {
    use nix::libc::{F_SETLEASE, F_UNLCK, SIGURG};
    // The same number on every architecture but the old 32-bit ones
    // (include/uapi/asm-generic/fcntl.h).
    const F_SETSIG: nix::libc::c_int = 10;
    let control = |command, argument: nix::libc::c_int| {
        // SAFETY: these commands take an integer; the descriptor is borrowed
        // for the call.
        let result = unsafe { nix::libc::fcntl(file.as_raw_fd(), command, argument) };
        if result == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // Whoever opens the file in the very moment breaks the lease, of which the
    // kernel tells by SIGIO, which would end the process; SIGURG is ignored
    // unless somebody asks for it.
    control(F_SETSIG, SIGURG)?;
    match control(F_SETLEASE, kind) {
        Ok(()) => {
            control(F_SETLEASE, F_UNLCK)?;
            Ok(false)
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_start_time_is_stable() {
        let own = std::process::id();
        assert!(start_time(own).is_some() && !is_exiting(own));
        assert_eq!(start_time(own), start_time(own));
        assert_eq!(start_time(u32::MAX), None);
        assert_eq!(parent(own), Some(std::os::unix::process::parent_id()));
    }

    #[test]
    fn the_peer_of_our_own_socket_is_us() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let found = peer(&one).unwrap();
        assert_eq!(found.pid, std::process::id());
        assert_eq!(found.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(found.gid, nix::unistd::getegid().as_raw());
        assert!(peer(std::fs::File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn kernel_releases_parse() {
        assert_eq!(parse_release("6.18.44-cloud-amd64"), Some((6, 18)));
        assert_eq!(parse_release("6.1-rc1"), Some((6, 1)));
        assert_eq!(parse_release("5.15"), Some((5, 15)));
        for bad in ["", "6", "x.1", "6."] {
            assert_eq!(parse_release(bad), None, "{bad}");
        }
        assert!(kernel_version() >= (5, 15));
    }

    #[test]
    fn changed_pages_are_counted_by_range() {
        use std::os::unix::fs::FileExt;
        // So far apart that no folio holds both.
        const FAR: u64 = 64 << 20;
        // On a disk: the pages of a tmpfs are never written.
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for offset in [0, FAR] {
            file.write_all_at(&[1; 4096], offset).unwrap();
        }
        file.sync_all().unwrap();
        if kernel_version() < (6, 5) {
            let error = pages(&file, 0, 0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            return;
        }
        let unwritten = |offset, length| pages(&file, offset, length).unwrap().unwritten;
        assert_eq!(unwritten(0, 0), 0);
        assert!(pages(&file, 0, 0).unwrap().cached >= 2);
        file.write_all_at(&[2; 1], FAR).unwrap();
        assert_eq!(unwritten(0, 4096), 0);
        assert!(unwritten(FAR, 1) > 0);
        assert!(unwritten(0, 0) > 0);
    }
}
