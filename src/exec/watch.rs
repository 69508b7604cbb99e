//! Which file systems are watched: a set of device numbers that follows the
//! mount table.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

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

    /// Whether a file on a watched superblock is below one of the prefixes.
    pub(super) fn covers(
        &self,
        major: u32,
        minor: u32,
        mount_id: u64,
        file: BorrowedFd<'_>,
    ) -> bool {
        let now = self.now.load();
        let Some(folders) = now.devices.get(&Dev::new(major, minor)) else {
            return false;
        };
        if folders.iter().any(|folder| folder.as_os_str().is_empty()) {
            return true;
        }
        // The path as seen from a mount of ours; through another namespace's
        // mount nobody can say.
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let Ok(path) = fs::read_link(link) else {
            return false;
        };
        let Some(mount) = now.table.by_id(mount_id) else {
            return false;
        };
        let inside = mount.inside(&path);
        inside.is_some_and(|inside| folders.iter().any(|folder| inside.starts_with(folder)))
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
