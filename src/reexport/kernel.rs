//! Mounting, and what else only the kernel does.
//!
//! Not by fuser: at its end a session of its own unmounts whatever is then at the
//! mount point, which may be its successor.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount as mount_call, umount2};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::source::{mount_id, unique_mount_id};
use crate::mounts::{Dev, Mount, MountTable};

/// The mount options that are flags of mount(2).
const FLAGS: &[(&str, MsFlags)] = &[
    ("ro", MsFlags::MS_RDONLY),
    ("nosuid", MsFlags::MS_NOSUID),
    ("nodev", MsFlags::MS_NODEV),
    ("noexec", MsFlags::MS_NOEXEC),
    ("exec", MsFlags::empty()),
    ("noatime", MsFlags::MS_NOATIME),
    ("nodiratime", MsFlags::MS_NODIRATIME),
    ("relatime", MsFlags::MS_RELATIME),
];
/// Options that would make it what it is not.
const REFUSED: &[&str] = &["rw", "suid", "dev", "fsname", "subtype", "auto_unmount"];
/// Options that are this program's to give.
const OURS: &[&str] = &["fd", "rootmode", "user_id", "group_id"];
/// Options that are more than one for the kernel.
const ALLOW: &[&str] = &["allow_other", "allow_root"];
/// An option that it has anyway.
const GIVEN: &str = "default_permissions";
/// The subtype of `fuse.vmafx-bypass`.
const SUBTYPE: &str = "vmafx-bypass";

/// What is mounted, and how.
pub(super) struct Mounting<'a> {
    pub(super) point: &'a Path,
    /// What the mount table shows as the source.
    pub(super) source: &'a Path,
    pub(super) allow_other: bool,
    pub(super) options: &'a [String],
}

/// Why an option is not taken; `None`: it is, or the kernel will tell.
pub(super) fn refused(option: &str) -> Option<&'static str> {
    let name = option.split('=').next().unwrap_or_default();
    if REFUSED.contains(&name) {
        Some("the mount is read-only, nosuid and nodev")
    } else if OURS.contains(&name) {
        Some("it is given already")
    } else if ALLOW.contains(&name) {
        Some("use --allow-other")
    } else {
        None
    }
}

impl Mounting<'_> {
    /// Mounts, by fusermount3 where we may not ourselves.
    pub(super) fn mount(&self) -> io::Result<OwnedFd> {
        match self.mount_here() {
            Err(e) if e.raw_os_error() == Some(nix::libc::EPERM) => self.by_fusermount(),
            mounted => mounted,
        }
    }

    fn mount_here(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = rustix::fs::open("/dev/fuse", flags, Mode::empty())?;
        let mut flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let mut data = format!(
            "fd={},rootmode=40000,user_id={},group_id={},{GIVEN}",
            device.as_raw_fd(),
            nix::unistd::geteuid(),
            nix::unistd::getegid()
        );
        if self.allow_other {
            data.push_str(",allow_other");
        }
        for option in self.options {
            if let Some((_, flag)) = FLAGS.iter().find(|(name, _)| name == option) {
                flags |= *flag;
            } else if option != GIVEN {
                data.push(',');
                data.push_str(option);
            }
        }
        let fstype = Some(crate::mounts::REEXPORT_FSTYPE);
        mount_call(Some(self.source), self.point, fstype, flags, Some(&*data))?;
        Ok(device)
    }

    /// fusermount3(1) mounts for other users than root, and hands the device over
    /// by a socket.
    fn by_fusermount(&self) -> io::Result<OwnedFd> {
        let (ours, its) = UnixStream::pair()?;
        rustix::io::fcntl_setfd(&its, rustix::io::FdFlags::empty())?;
        let mut options = OsString::from("ro,nosuid,nodev,default_permissions,subtype=");
        options.push(SUBTYPE);
        options.push(",fsname=");
        options.push(escaped(self.source.as_os_str()));
        if self.allow_other {
            options.push(",allow_other");
        }
        for option in self.options {
            options.push(",");
            options.push(option);
        }
        let output = Command::new("fusermount3")
            .arg("-o")
            .arg(options)
            .arg("--")
            .arg(self.point)
            .env("_FUSE_COMMFD", its.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .output()
            .map_err(|e| io::Error::new(e.kind(), format!("fusermount3: {e}; install fuse3")))?;
        drop(its);
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(io::Error::other(text.trim().replace('\n', "; ")));
        }
        receive(&ours)
    }
}

/// For the option parser of fusermount3.
fn escaped(text: &OsStr) -> OsString {
    let mut out = Vec::new();
    for &byte in text.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            out.push(b'\\');
        }
        out.push(byte);
    }
    OsStr::from_bytes(&out).to_owned()
}

fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.ok_or_else(|| io::Error::other("fusermount3 gave no device"))
}

/// One mount, told from all that come after it: device numbers are used again as
/// soon as they are free.
#[derive(Debug, Clone)]
pub(super) struct Place {
    dev: Dev,
    point: PathBuf,
    /// As the mount table has it: a later mount may have it, too.
    id: u64,
    /// No later one has it. `None` before Linux 6.8.
    unique: Option<u64>,
}

impl Place {
    /// What was mounted last at a path, if it is one of ours.
    pub(super) fn at(point: &Path) -> Option<Self> {
        let table = MountTable::read().ok()?;
        let last = table.iter().rfind(|m| m.point == point)?;
        last.is_reexport().then(|| Self {
            dev: last.dev,
            point: point.to_path_buf(),
            id: last.id,
            unique: unique_at(point),
        })
    }

    pub(super) fn dev(&self) -> Dev {
        self.dev
    }

    /// Whether it is still mounted, here or elsewhere.
    pub(super) fn is_mounted(&self) -> io::Result<bool> {
        let table = MountTable::read()?;
        let reached = self.ours(&table).any(|m| self.is_at(&m.point));
        Ok(reached || self.is_covered(&table))
    }

    /// The mounts of what is served here: it, and its bind mounts.
    fn ours<'a>(&self, table: &'a MountTable) -> impl Iterator<Item = &'a Mount> {
        let dev = self.dev;
        table
            .iter()
            .filter(move |m| m.is_reexport() && m.dev == dev)
    }

    /// Whether it is there, and its path leads to another mount, above it.
    fn is_covered(&self, table: &MountTable) -> bool {
        let own = self.ours(table).find(|m| m.id == self.id);
        own.is_some_and(|m| id_at(&m.point).is_some_and(|id| id != self.id))
    }

    /// Unmounts it, and what is bound to it elsewhere; `lazily` also while files
    /// are open.
    ///
    /// # Errors
    /// Those of umount(2); where it is covered by another mount, or another is
    /// mounted below it, which would go with it.
    pub(super) fn unmount(&self, lazily: bool) -> io::Result<()> {
        let busy = |what: String| io::Error::new(io::ErrorKind::ResourceBusy, what);
        let table = MountTable::read()?;
        let mut points: Vec<_> = self.ours(&table).map(|m| m.point.as_path()).collect();
        points.reverse();
        if !points.iter().any(|point| self.is_at(point)) {
            if self.is_covered(&table) {
                return Err(busy("another mount covers it".into()));
            }
            return Ok(());
        }
        let below = |m: &&Mount| {
            m.dev != self.dev
                && points
                    .iter()
                    .any(|p| m.point != *p && m.point.starts_with(p))
        };
        if lazily && let Some(other) = table.iter().find(below) {
            let point = other.point.display();
            return Err(busy(format!("`{point}` is mounted below it")));
        }
        for point in points {
            if Self::at(point).is_some_and(|last| last.dev == self.dev) {
                unmount_at(point, lazily)?;
            }
        }
        Ok(())
    }

    fn is_at(&self, point: &Path) -> bool {
        match self.unique {
            Some(unique) => unique_at(point) == Some(unique),
            None => self.point == point && id_at(point) == Some(self.id),
        }
    }
}

/// Held by who mounts at a path: no other of us does meanwhile.
///
/// # Errors
/// EWOULDBLOCK where another does.
pub(super) fn reserve(point: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(point, flags, Mode::empty())?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    Ok(folder)
}

fn root_at(point: &Path) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(point, flags, Mode::empty()).ok()
}

fn unique_at(point: &Path) -> Option<u64> {
    unique_mount_id(root_at(point)?).ok()?
}

/// As the mount table has it.
fn id_at(point: &Path) -> Option<u64> {
    mount_id(root_at(point)?).ok()
}

fn unmount_at(point: &Path, lazily: bool) -> io::Result<()> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    flags.set(MntFlags::MNT_DETACH, lazily);
    match umount2(point, flags) {
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(Errno::EPERM) => {
            let flags = if lazily { "-uz" } else { "-u" };
            let mut command = Command::new("fusermount3");
            command.arg(flags).arg("--").arg(point);
            let output = command.stdin(Stdio::null()).output()?;
            if output.status.success() {
                return Ok(());
            }
            let text = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(text.trim().replace('\n', "; ")))
        }
        Err(e) => Err(e.into()),
    }
}

/// Whether this process may register backing files: CAP_SYS_ADMIN, which the
/// kernel wants in the first user namespace (fs/fuse/backing.c).
pub(super) fn may_back() -> bool {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = line.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    set.is_some_and(|set| set & CAP_SYS_ADMIN != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_would_make_it_something_else_are_refused() {
        for option in ["rw", "suid", "dev", "fsname=x", "subtype=y", "fd=7"] {
            assert!(refused(option).is_some(), "{option}");
        }
        assert_eq!(refused("allow_other"), Some("use --allow-other"));
        for option in ["ro", "noexec", "context=x", "max_read=4096"] {
            assert_eq!(refused(option), None);
        }
    }

    #[test]
    fn commas_and_backslashes_are_escaped() {
        assert_eq!(escaped(OsStr::new("/a,b\\c d")), "/a\\,b\\\\c d");
    }

    #[test]
    fn one_at_a_time_mounts_at_a_path() {
        let dir = tempfile::tempdir().unwrap();
        let held = reserve(dir.path()).unwrap();
        let error = reserve(dir.path()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EWOULDBLOCK));
        drop(held);
        assert!(reserve(dir.path()).is_ok());
    }

    #[test]
    fn what_is_not_ours_is_not_found() {
        assert!(Place::at(Path::new("/")).is_none());
        assert!(Place::at(Path::new("/no/such")).is_none());
    }
}
