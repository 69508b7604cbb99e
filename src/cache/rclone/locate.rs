//! From a mount to its cache folders.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::daemon::{Daemon, Start};
use crate::mounts::{Dev, Mount, MountTable, split_source};
use crate::reason::{Reason, Refusal};

/// Where a mount's cache is.
#[derive(Debug, Clone)]
pub struct Located {
    /// The process that serves the mount.
    pub daemon: Daemon,
    /// Whether the mount's superblock is read-only.
    pub read_only: bool,
    /// Whether another rclone mount uses the same cache folders.
    pub shared_cache: bool,
    /// What comes before the daemon's absolute paths to reach them from here.
    daemon_root: PathBuf,
    /// The cache folder in the daemon's eyes.
    cache: PathBuf,
    /// `<Name>/<Root>`, below `vfs` and `vfsMeta`.
    remote: PathBuf,
}

impl Located {
    /// Locates the cache of an rclone mount.
    ///
    /// # Errors
    /// Where the daemon cannot be found, or does not show which cache it uses.
    pub fn find(mount: &Mount, table: &MountTable) -> Result<Self, Refusal> {
        let daemon = Daemon::find(mount)?;
        let start = start_of(&daemon)?;
        if start.option("devname").is_some() {
            return Err(Refusal::new(
                Reason::Unsupported,
                format!(
                    "`{}`: --devname hides which remote pid {} mounts",
                    mount.point.display(),
                    daemon.pid
                ),
            ));
        }
        let cache = start.cache_folder()?;
        let daemon_root = daemon.root();
        let (name, _) = split_source(&mount.source);
        let shared_cache = shares_cache(mount, table, &name, &under(&daemon_root, &cache));
        Ok(Self {
            read_only: mount.read_only,
            shared_cache,
            daemon_root,
            cache,
            remote: remote_folder(mount),
            daemon,
        })
    }

    /// The data file of a clip as the daemon names it. `inside` is its path
    /// inside the mount.
    pub(super) fn daemon_data_path(&self, inside: &Path) -> PathBuf {
        self.cache.join("vfs").join(&self.remote).join(inside)
    }

    /// The data file of a clip, as it can be opened here.
    #[must_use]
    pub fn data_path(&self, inside: &Path) -> PathBuf {
        under(&self.daemon_root, &self.daemon_data_path(inside))
    }

    /// The metadata file of a clip, as it can be opened here.
    #[must_use]
    pub fn metadata_path(&self, inside: &Path) -> PathBuf {
        let tail = self.cache.join("vfsMeta").join(&self.remote).join(inside);
        under(&self.daemon_root, &tail)
    }
}

fn start_of(daemon: &Daemon) -> Result<Start, Refusal> {
    daemon.start().map_err(|e| {
        Refusal::from_io(
            format_args!("arguments of pid {}", daemon.pid),
            &e,
            Reason::IoError,
        )
    })
}

/// `<Name>/<Root>` of a mount's source; Root's own slashes at both ends go.
fn remote_folder(mount: &Mount) -> PathBuf {
    let (name, root) = split_source(&mount.source);
    let root = root.strip_prefix("/").unwrap_or(&root);
    let mut folder = PathBuf::from(name);
    folder.extend(root.components());
    folder
}

fn under(root: &Path, path: &Path) -> PathBuf {
    if root.as_os_str().is_empty() {
        path.to_path_buf()
    } else {
        root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

/// Whether another rclone superblock has the same remote in the same cache
/// folder; a mount of which that cannot be said counts as one that does.
fn shares_cache(mount: &Mount, table: &MountTable, name: &OsString, cache: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let own = identity(cache);
    table
        .iter()
        .filter(|other| other.is_rclone() && other.dev != mount.dev)
        .any(|other| {
            let Ok((daemon, start)) =
                Daemon::find(other).and_then(|d| start_of(&d).map(|start| (d, start)))
            else {
                return split_source(&other.source).0 == *name;
            };
            if start.option("devname").is_none() && split_source(&other.source).0 != *name {
                return false;
            }
            match start.cache_folder() {
                Ok(folder) => own.is_none() || identity(&under(&daemon.root(), &folder)) == own,
                Err(_) => true,
            }
        })
}

/// The mount table and what was located on it, kept until the table changes or
/// a daemon exits. Opening a clip then costs one poll(2) instead of a search.
pub struct Locator {
    changes: File,
    table: Arc<MountTable>,
    located: HashMap<Dev, Located>,
}

impl Locator {
    fn new() -> std::io::Result<Self> {
        let changes = File::open("/proc/self/mountinfo")?;
        Ok(Self {
            changes,
            table: Arc::new(MountTable::read()?),
            located: HashMap::new(),
        })
    }

    /// Runs `f` on this process's locator, refreshed.
    ///
    /// # Errors
    /// [`Reason::IoError`] where /proc is not mounted.
    pub fn with<T>(f: impl FnOnce(&mut Self) -> Result<T, Refusal>) -> Result<T, Refusal> {
        static SHARED: OnceLock<Mutex<Option<Locator>>> = OnceLock::new();
        let mut shared = SHARED
            .get_or_init(Mutex::default)
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let no_proc = |e| Refusal::from_io("`/proc/self/mountinfo`", &e, Reason::IoError);
        let locator = match &mut *shared {
            Some(locator) => {
                locator.refresh().map_err(no_proc)?;
                locator
            }
            empty => empty.insert(Self::new().map_err(no_proc)?),
        };
        f(locator)
    }

    /// Reads the table again if the kernel says that it has changed: mountinfo
    /// is then readable with priority (proc_pid_mountinfo(5)).
    fn refresh(&mut self) -> std::io::Result<()> {
        let mut fds = [PollFd::new(self.changes.as_fd(), PollFlags::POLLPRI)];
        if poll(&mut fds, PollTimeout::ZERO)? > 0 {
            *self = Self::new()?;
        }
        Ok(())
    }

    /// The mount table.
    #[must_use]
    pub fn table(&self) -> Arc<MountTable> {
        Arc::clone(&self.table)
    }

    /// Where the cache of a mount is.
    ///
    /// # Errors
    /// As of [`Located::find`].
    pub fn locate(&mut self, mount: &Mount) -> Result<Located, Refusal> {
        if let Some(located) = self.located.get(&mount.dev)
            && located.daemon.is_alive()
        {
            return Ok(located.clone());
        }
        let located = Located::find(mount, &self.table)?;
        self.located.insert(mount.dev, located.clone());
        Ok(located)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remotes_lie_where_rclone_puts_them() {
        for (source, folder) in [
            ("web:sub", "web/sub"),
            (":http{5WsJu}:", ":http{5WsJu}"),
            (":local:/p", ":local/p"),
            ("loc{yKcAd}:/p/", "loc{yKcAd}/p"),
            ("/data/src", "local/data/src"),
            ("src/sub", "local/src/sub"),
            ("cr:", "cr"),
        ] {
            let line = format!("42 27 0:39 / /m ro - fuse.rclone {source} ro");
            let table = MountTable::parse(line.as_bytes());
            let mount = table.by_id(42).unwrap();
            assert_eq!(remote_folder(mount), Path::new(folder), "{source}");
        }
    }

    #[test]
    fn paths_of_another_root_go_through_proc() {
        assert_eq!(under(Path::new(""), Path::new("/c/d")), Path::new("/c/d"));
        assert_eq!(
            under(Path::new("/proc/1/root"), Path::new("/c/d")),
            Path::new("/proc/1/root/c/d")
        );
    }
}
