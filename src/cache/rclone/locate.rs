//! From a mount to its cache folders.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::daemon::{Daemon, Start, all_rclones, base_name};
use super::names;
use crate::cache::proof::MountFacts;
use crate::mounts::{Dev, Mount, MountTable, split_source};
use crate::reason::{Reason, Refusal};
use crate::sys::kernel_version;

/// The cache folders of one mount.
#[derive(Debug, Clone)]
pub struct Folders {
    /// What comes before the daemon's absolute paths to reach them from here.
    daemon_root: PathBuf,
    /// The cache folder in the daemon's eyes.
    cache: PathBuf,
    /// `<Name>/<Root>`, below `vfs` and `vfsMeta`, in the cache's encoding.
    remote: PathBuf,
}

impl Folders {
    /// The folders of a mount in a cache folder that is known, seen from here.
    pub fn new(mount: &Mount, cache: PathBuf) -> Self {
        Self {
            daemon_root: PathBuf::new(),
            cache,
            remote: remote_folder(mount),
        }
    }

    /// The data file of a clip below the cache folder.
    pub(super) fn tail(&self, inside: &Path) -> PathBuf {
        self.in_tree("vfs", inside)
    }

    fn in_tree(&self, tree: &str, inside: &Path) -> PathBuf {
        Path::new(tree)
            .join(&self.remote)
            .join(names::in_cache(inside))
    }

    /// Whether a folder, in the daemon's eyes, is the cache folder.
    pub(super) fn is_cache(&self, folder: &Path) -> bool {
        let own = identity(&under(&self.daemon_root, &self.cache));
        own.is_some() && identity(&under(&self.daemon_root, folder)) == own
    }

    /// The data file of a clip, as it can be opened here. `inside` is its path
    /// inside the mount.
    #[must_use]
    pub fn data_path(&self, inside: &Path) -> PathBuf {
        under(&self.daemon_root, &self.cache.join(self.tail(inside)))
    }

    /// The metadata file of a clip, as it can be opened here.
    #[must_use]
    pub fn metadata_path(&self, inside: &Path) -> PathBuf {
        let tail = self.in_tree("vfsMeta", inside);
        under(&self.daemon_root, &self.cache.join(tail))
    }
}

/// A mount's daemon and its cache.
#[derive(Debug, Clone)]
pub struct Located {
    /// The process that serves the mount.
    pub daemon: Daemon,
    /// Whether the mount's superblock is read-only.
    pub read_only: bool,
    /// Which other rclone uses the same cache for the same remote.
    pub shared_with: Option<String>,
    /// Where the cache is.
    pub folders: Folders,
    /// Whether the daemon was started with `--vfs-cache-mode full`.
    pub(super) cache_mode_full: bool,
}

impl Located {
    /// What the proof's first gates are about.
    #[must_use]
    pub fn mount_facts(&self) -> MountFacts {
        mount_facts(self.read_only, self.shared_with.clone())
    }

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
        names::check(&name_and_root(mount))?;
        let folders = Folders {
            daemon_root: daemon.root(),
            ..Folders::new(mount, start.cache_folder()?)
        };
        let cache = under(&folders.daemon_root, &folders.cache);
        let mode = start.option("vfs-cache-mode");
        Ok(Self {
            read_only: mount.read_only,
            shared_with: shares_cache(mount, table, &daemon, &cache)?,
            cache_mode_full: mode.is_some_and(|mode| mode.eq_ignore_ascii_case("full")),
            folders,
            daemon,
        })
    }
}

/// What the proof's first gates are about, on the running kernel.
#[must_use]
pub fn mount_facts(read_only: bool, shared_with: Option<String>) -> MountFacts {
    MountFacts {
        read_only,
        shared_with,
        kernel: kernel_version(),
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

/// `<Name>/<Root>` of a mount's source, in rclone's Standard encoding; Root's
/// own slashes at both ends go.
fn name_and_root(mount: &Mount) -> PathBuf {
    let (name, root) = split_source(&mount.source);
    Path::new(&name).join(root.strip_prefix("/").unwrap_or(&root))
}

/// The same in the cache's encoding.
fn remote_folder(mount: &Mount) -> PathBuf {
    names::in_cache(&name_and_root(mount))
}

fn under(root: &Path, path: &Path) -> PathBuf {
    if root.as_os_str().is_empty() {
        path.to_path_buf()
    } else {
        root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

/// Which other rclone has the same remote in the same cache folder: one whose
/// mount is seen here and whose folder in the cache lies in ours or ours in its,
/// or any process that names the remote among its arguments (`serve`, or a
/// mount in another namespace). One of which that cannot be said counts as one
/// that does.
///
/// # Errors
/// Where the question cannot be asked, which must not look like a no.
fn shares_cache(
    mount: &Mount,
    table: &MountTable,
    own: &Daemon,
    cache: &Path,
) -> Result<Option<String>, Refusal> {
    let own_cache = match fs::metadata(cache) {
        Ok(folder) => (folder.dev(), folder.ino()),
        // Nothing to share; a later step tells.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => {
            let what = format_args!("`{}`", cache.display());
            return Err(Refusal::from_io(what, &e, Reason::IoError));
        }
    };
    let same_cache = |daemon: &Daemon, start: &Start| {
        let Ok(folder) = start.cache_folder() else {
            return daemon.is_alive();
        };
        match fs::metadata(under(&daemon.root(), &folder)) {
            Ok(other) => (other.dev(), other.ino()) == own_cache,
            // Ours exists; a folder that does not is another's. Nor does a
            // process share it that has exited meanwhile.
            Err(e) => e.kind() != io::ErrorKind::NotFound && daemon.is_alive(),
        }
    };
    // One that has exited shares nothing.
    let started = |daemon: &Daemon| match start_of(daemon) {
        Ok(start) => Ok(Some(start)),
        Err(_) if !daemon.is_alive() => Ok(None),
        Err(refusal) => Err(refusal),
    };
    let folder = remote_folder(mount);
    for other in table.iter().filter(|m| m.is_rclone() && m.dev != mount.dev) {
        let its = remote_folder(other);
        let overlaps = its.starts_with(&folder) || folder.starts_with(&its);
        let point = other.point.display();
        let servers = match Daemon::candidates(other) {
            Ok(servers) => servers,
            Err(refusal) if overlaps => return Ok(Some(format!("perhaps `{point}`: {refusal}"))),
            Err(_) => continue,
        };
        // Of several that may serve it, each counts; and so does our own, which
        // may keep two caches of one remote under different options.
        for daemon in &servers {
            if let Some(start) = started(daemon)?
                && (overlaps || start.option("devname").is_some())
                && same_cache(daemon, &start)
            {
                return Ok(Some(format!("pid {} at `{point}`", daemon.pid)));
            }
        }
    }
    let (name, _) = split_source(&mount.source);
    let name = base_name(name.as_bytes());
    for daemon in all_rclones()? {
        if daemon != *own
            && let Some(start) = started(&daemon)?
            && start.remotes().any(|remote| remote == name)
            && same_cache(&daemon, &start)
            && !daemon.is_forked_from(own)
        {
            return Ok(Some(format!("pid {}", daemon.pid)));
        }
    }
    Ok(None)
}

/// A folder's device and inode, by whichever path it is reached.
fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// After this long a cache that was shared is looked at again: the other
/// rclone may have ended, of which the mount table need not tell.
const SHARED_AGAIN: Duration = Duration::from_secs(1);

fn no_mountinfo(error: std::io::Error) -> Refusal {
    Refusal::from_io("`/proc/self/mountinfo`", &error, Reason::IoError)
}

/// The mount table and what was located on it, kept until the table changes or
/// a daemon exits. Opening a clip then costs one poll(2) instead of a search.
pub struct Locator {
    changes: File,
    table: Arc<MountTable>,
    located: HashMap<Dev, (Instant, Located)>,
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
    /// [`Reason::IoError`] where /proc is not mounted, and those of `f`.
    pub fn with<T>(f: impl FnOnce(&mut Self) -> Result<T, Refusal>) -> Result<T, Refusal> {
        static SHARED: OnceLock<Mutex<Option<Locator>>> = OnceLock::new();
        let mut shared = SHARED
            .get_or_init(Mutex::default)
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // Taken out while it is refreshed: asking for changes consumes them,
        // so that a table which then could not be read must not come back.
        let locator = match shared.take() {
            Some(mut locator) => locator.refresh().map(|()| locator),
            None => Self::new().map_err(no_mountinfo),
        }?;
        f(shared.insert(locator))
    }

    /// Reads the table again if the kernel says that it has changed: mountinfo
    /// is then readable with priority (proc_pid_mountinfo(5)).
    fn refresh(&mut self) -> Result<(), Refusal> {
        let mut fds = [PollFd::new(self.changes.as_fd(), PollFlags::POLLPRI)];
        let changed = loop {
            match poll(&mut fds, PollTimeout::ZERO) {
                // A pending signal interrupts it even where it does not wait.
                Err(Errno::EINTR) => {}
                result => break result.map_err(|e| no_mountinfo(e.into()))?,
            }
        };
        if changed > 0 { self.reread() } else { Ok(()) }
    }

    /// Reads the table again. What was located stays as long as the rclone
    /// mounts are the same: most changes are of other mounts.
    ///
    /// # Errors
    /// [`Reason::IoError`] where /proc is not mounted.
    pub fn reread(&mut self) -> Result<(), Refusal> {
        let table = MountTable::read().map_err(no_mountinfo)?;
        let rclones = |table: &MountTable| -> Vec<Mount> {
            table.iter().filter(|m| m.is_rclone()).cloned().collect()
        };
        if rclones(&table) != rclones(&self.table) {
            self.located.clear();
        }
        self.table = Arc::new(table);
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
        if let Some((at, located)) = self.located.get(&mount.dev)
            && located.daemon.is_alive()
            && (located.shared_with.is_none() || at.elapsed() < SHARED_AGAIN)
        {
            return Ok(located.clone());
        }
        let located = Located::find(mount, &self.table)?;
        let entry = (Instant::now(), located.clone());
        self.located.insert(mount.dev, entry);
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
            ("web:a␊b//c", "web/a\nb/c"),
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
