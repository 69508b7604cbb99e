//! Which file systems are watched: a set of device numbers that follows the
//! mount table.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, Statx};

use crate::mounts::{Dev, Mount, MountTable};

/// Folders below which clips are watched, by their paths inside a superblock.
type Folders = Vec<PathBuf>;

/// The watched superblocks. Cheap to ask for every open.
pub(super) struct Watched {
    /// As given, absolute; none: every rclone mount.
    prefixes: Vec<PathBuf>,
    now: ArcSwap<Now>,
}

#[derive(Default)]
struct Now {
    devices: HashMap<Dev, Folders>,
    table: MountTable,
}

impl Watched {
    /// Looks at the mount table for the first time.
    ///
    /// # Errors
    /// Where a prefix is not on an rclone mount.
    pub(super) fn new(prefixes: &[PathBuf]) -> Result<Self, String> {
        let mut watched = Self {
            prefixes: Vec::new(),
            now: ArcSwap::default(),
        };
        for prefix in prefixes {
            let shown = prefix.display();
            let absolute = fs::canonicalize(prefix).map_err(|e| format!("`{shown}`: {e}"))?;
            watched.prefixes.push(absolute);
        }
        let now = watched
            .look()
            .map_err(|e| format!("`/proc/self/mountinfo`: {e}"))?;
        for (prefix, given) in watched.prefixes.iter().zip(prefixes) {
            if rclone_mount(&now.table, prefix).is_none() {
                let shown = given.display();
                return Err(format!(
                    "`{shown}` is not on an rclone mount; leave --prefix out to watch all of them"
                ));
            }
        }
        watched.now.store(Arc::new(now));
        Ok(watched)
    }

    fn look(&self) -> std::io::Result<Now> {
        let table = MountTable::read()?;
        let mut devices: HashMap<Dev, Folders> = HashMap::new();
        if self.prefixes.is_empty() {
            let rclone = table.iter().filter(|mount| mount.is_rclone());
            devices.extend(rclone.map(|mount| (mount.dev, vec![PathBuf::new()])));
        }
        for prefix in &self.prefixes {
            // One that is not mounted at the moment may come back.
            if let Some((mount, inside)) = rclone_mount(&table, prefix) {
                devices.entry(mount.dev).or_default().push(inside);
            }
        }
        Ok(Now { devices, table })
    }

    /// Whether a device is a watched superblock.
    pub(super) fn has(&self, major: u32, minor: u32) -> bool {
        self.now
            .load()
            .devices
            .contains_key(&Dev::new(major, minor))
    }

    /// A file on a watched superblock, below one of the prefixes, by a mount of
    /// this process's own. `None`: it is to be left alone.
    pub(super) fn own(&self, thread: u32, file: OwnedFd, stat: &Statx) -> Option<OwnedFd> {
        let now = self.now.load();
        let dev = Dev::new(stat.stx_dev_major, stat.stx_dev_minor);
        let folders = now.devices.get(&dev)?;
        let watches_all = folders.iter().any(|folder| folder.as_os_str().is_empty());
        let is_of = |mount: &&Mount| mount.dev == dev;
        let own = now.table.by_id(stat.stx_mnt_id).filter(is_of);
        if own.is_some() && watches_all {
            return Some(file);
        }
        let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        let inside = if let Some(mount) = own {
            mount.inside(&path)?
        } else {
            // A mount of the caller's namespace, where the path is of.
            let table = fs::read(format!("/proc/{thread}/mountinfo")).ok()?;
            let table = MountTable::parse(&table);
            table.by_id(stat.stx_mnt_id).filter(is_of)?.inside(&path)?
        };
        if !watches_all && !folders.iter().any(|folder| inside.starts_with(folder)) {
            return None;
        }
        if own.is_some() {
            return Some(file);
        }
        let mut mounts = now.table.iter().filter(is_of);
        mounts.find_map(|mount| same(&mount.outside(&inside)?, stat))
    }

    /// Follows the mount table; does not return but on an error.
    pub(super) fn follow(&self) -> std::io::Result<()> {
        let table = File::open("/proc/self/mountinfo")?;
        loop {
            // A change between the first look and this open is seen by the first look here.
            if let Ok(now) = self.look() {
                self.now.store(Arc::new(now));
            }
            let mut fds = [PollFd::new(table.as_fd(), PollFlags::POLLPRI)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// The rclone mount that a path is on, and the path inside its superblock. The
/// folder is looked at without asking its file system, which may hang.
fn rclone_mount<'a>(table: &'a MountTable, path: &Path) -> Option<(&'a Mount, PathBuf)> {
    let mount = table.containing(path).filter(|mount| mount.is_rclone())?;
    mount.inside(path).map(|inside| (mount, inside))
}

/// Opens a path with O_PATH, if it is that of the same inode.
fn same(path: &Path, stat: &Statx) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve).ok()?;
    let found = super::target::look(file.as_fd()).ok()?;
    let identity = |s: &Statx| (s.stx_dev_major, s.stx_dev_minor, s.stx_ino);
    (identity(&found) == identity(stat)).then_some(file)
}
