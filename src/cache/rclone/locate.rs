//! From a mount to its cache folders.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::daemon::{Daemon, denied};
use super::start::{Start, base_name};
use super::{hidden, names, sharing};
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
    /// Whether the mount's source does not say which remote it is.
    hidden: bool,
}

impl Folders {
    /// The folders of a mount in a cache folder that is known, seen from here.
    pub fn new(mount: &Mount, cache: PathBuf) -> Self {
        Self {
            daemon_root: PathBuf::new(),
            cache,
            remote: remote_folder(mount),
            hidden: false,
        }
    }

    /// The cache folder, as it can be opened here.
    pub(super) fn cache_folder(&self) -> PathBuf {
        under(&self.daemon_root, &self.cache)
    }

    /// The remote's folder in the cache, `<Name>/<Root>`.
    pub(super) fn remote(&self) -> &Path {
        &self.remote
    }

    /// Whether only what the daemon has open tells which file is the clip's.
    pub(super) fn is_hidden(&self) -> bool {
        self.hidden
    }

    /// Whether a path, in the daemon's eyes, is in the cache folder's data tree.
    pub(super) fn is_in_data_tree(&self, path: &Path) -> io::Result<bool> {
        let trees = path
            .ancestors()
            .filter(|a| a.file_name() == Some("vfs".as_ref()));
        for cache in trees.filter_map(Path::parent) {
            if self.is_cache(cache)? {
                return Ok(true);
            }
        }
        Ok(false)
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
    pub(super) fn is_cache(&self, folder: &Path) -> io::Result<bool> {
        let own = identity(&self.cache_folder())?;
        Ok(own.is_some() && identity(&under(&self.daemon_root, folder))? == own)
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
    /// The user who has mounted it, where the kernel tells.
    pub user: Option<u32>,
    /// Which other rclone uses the same cache for the same remote.
    pub shared_with: Option<String>,
    /// Where the cache is.
    pub folders: Folders,
    /// Whether the daemon was started with `--vfs-cache-mode full`.
    pub(super) cache_mode_full: bool,
    /// Whether its descriptors may not be listed.
    pub(super) hidden: bool,
}

impl Located {
    /// The cache folder, as it can be opened here.
    #[must_use]
    pub fn cache_folder(&self) -> PathBuf {
        self.folders.cache_folder()
    }

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
        let mode = start.option("vfs-cache-mode");
        let cache_mode_full = mode.is_some_and(|mode| mode.eq_ignore_ascii_case("full"));
        let mut folders = Folders {
            daemon_root: daemon.root(&start).map_err(|e| {
                let what = format_args!("root folder of pid {}", daemon.pid);
                Refusal::from_io(what, &e, Reason::IoError)
            })?,
            ..Folders::new(mount, start.cache_folder()?)
        };
        check_connections(mount, table, &daemon, &start)?;
        if start.is_on("vfs-case-insensitive") {
            let point = mount.point.display();
            let detail = format!("`{point}`: --vfs-case-insensitive finds clips by other names");
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        if start.option("devname").is_some() {
            folders.hidden = true;
            folders.remote = hidden_remote(mount, table, &daemon, &start, &folders)?;
            if !cache_mode_full {
                return Err(hidden_by_devname(
                    mount,
                    "and not all reads go through its cache",
                ));
            }
        } else {
            names::check(&name_and_root(mount))?;
            check_source(mount, &folders)?;
            if !start.tells_devname(first_name(&folders.remote)) {
                return Err(Refusal::new(
                    Reason::Permission,
                    format!(
                        "the environment of pid {} may not be read, and so not whether it hides its remote",
                        daemon.pid
                    ),
                ));
            }
        }
        Ok(Self {
            read_only: mount.read_only,
            user: mount.user,
            shared_with: sharing::shares_cache(mount, table, &daemon, &folders)?,
            cache_mode_full,
            hidden: start.is_hidden(),
            folders,
            daemon,
        })
    }
}

/// A daemon may serve several mounts (`rclone rcd`). One that is not in our
/// table, because it is in another namespace or was detached while in use, may
/// be of the very remote that this one only says to be.
fn check_connections(
    mount: &Mount,
    table: &MountTable,
    daemon: &Daemon,
    start: &Start,
) -> Result<(), Refusal> {
    let connections = match daemon.connections() {
        // The path alone is left.
        Err(e) if denied(&e) && start.is_hidden() => return Ok(()),
        connections => connections.map_err(|e| no_descriptors(daemon, &e))?,
    };
    let is_seen = |minor: u32| table.iter().any(|m| m.dev == Dev::new(0, minor));
    let unseen = connections
        .iter()
        .flatten()
        .filter(|&&c| !is_seen(c))
        .count();
    let unknown = connections.iter().filter(|c| c.is_none()).count();
    if unseen == 0 && unknown <= 1 {
        return Ok(());
    }
    Err(Refusal::new(
        Reason::Ambiguous,
        format!(
            "`{}`: pid {} also serves mounts that are not seen here",
            mount.point.display(),
            daemon.pid
        ),
    ))
}

/// A source `a:b` is the remote `a:`, or a local folder that was mounted as
/// `./a:b` (1.75): rclone has made a cache folder for whichever it is.
fn check_source(mount: &Mount, folders: &Folders) -> Result<(), Refusal> {
    let Some(local) = local_folder(mount) else {
        return Ok(());
    };
    let local = folders.cache.join("vfs").join(local);
    let exists = under(&folders.daemon_root, &local).try_exists();
    let what = format_args!("`{}`", local.display());
    if !exists.map_err(|e| Refusal::from_io(what, &e, Reason::IoError))? {
        return Ok(());
    }
    Err(Refusal::new(
        Reason::Ambiguous,
        format!(
            "`{}`: `{}` may be a remote or the local folder of `{}`",
            mount.point.display(),
            Path::new(&mount.source).display(),
            local.display()
        ),
    ))
}

/// The cache folder of a source that looks like a remote's, were it a local
/// path; `None` where it cannot be one.
pub(super) fn local_folder(mount: &Mount) -> Option<PathBuf> {
    let (name, _) = split_source(&mount.source);
    (name != "local" && !name.as_bytes().starts_with(b":"))
        .then(|| names::in_cache(&Path::new("local").join(&mount.source)))
}

fn hidden_by_devname(mount: &Mount, what: &str) -> Refusal {
    let point = mount.point.display();
    let detail = format!("`{point}`: --devname hides which remote it is, {what}");
    Refusal::new(Reason::Unsupported, detail)
}

/// The remote's folder in the cache, under `--devname`: where the daemon's
/// arguments lead to a cache folder. Only for a daemon that serves this one
/// mount and nothing else: all that it has open in the cache is then of it.
fn hidden_remote(
    mount: &Mount,
    table: &MountTable,
    daemon: &Daemon,
    start: &Start,
    folders: &Folders,
) -> Result<PathBuf, Refusal> {
    let open = daemon
        .connections()
        .map_err(|e| no_descriptors(daemon, &e))?;
    if open.len() != 1 || start.may_serve_more() {
        return Err(hidden_by_devname(mount, "and its rclone may serve others"));
    }
    let points: Vec<&Path> = table
        .iter()
        .filter(|m| m.dev == mount.dev && m.root == Path::new("/"))
        .map(|m| m.point.as_path())
        .collect();
    let arguments = start.arguments();
    let is_point = |argument: &OsStr| points.contains(&start.resolve(argument).as_path());
    let vfs = under(&folders.daemon_root, &folders.cache.join("vfs"));
    let mut found = BTreeSet::new();
    for remote in hidden::remotes(&arguments, is_point) {
        let existing = hidden::folders(&vfs, remote, start.working_folder()).map_err(|e| {
            Refusal::from_io(format_args!("`{}`", vfs.display()), &e, Reason::NoCacheFile)
        })?;
        found.extend(existing);
    }
    if found.len() > 1 {
        // The same remote with and without options, or by two rclones in turn.
        let open = daemon
            .open_files()
            .map_err(|e| no_descriptors(daemon, &e))?;
        let existing = std::mem::take(&mut found);
        for remote in existing {
            let cache = open.iter().flat_map(|file| file.ancestors().skip(1));
            let tail = Path::new("vfs").join(&remote);
            let parents: BTreeSet<PathBuf> = cache.filter_map(|a| strip_end(a, &tail)).collect();
            for parent in parents {
                let is_cache = folders.is_cache(&parent).map_err(|e| {
                    let what = format_args!("`{}`", parent.display());
                    Refusal::from_io(what, &e, Reason::IoError)
                });
                if is_cache? {
                    found.insert(remote);
                    break;
                }
            }
        }
        if found.len() != 1 {
            return Err(Refusal::new(
                Reason::Ambiguous,
                format!(
                    "`{}`: --devname hides which of several cache folders is its own",
                    mount.point.display()
                ),
            ));
        }
    }
    found
        .pop_first()
        .ok_or_else(|| hidden_by_devname(mount, "and no argument leads to a cache folder"))
}

fn no_descriptors(daemon: &Daemon, error: &io::Error) -> Refusal {
    let what = format_args!("descriptors of pid {}", daemon.pid);
    Refusal::from_io(what, error, Reason::IoError)
}

/// A path without the components at its end.
fn strip_end(path: &Path, end: &Path) -> Option<PathBuf> {
    let length = end.components().count();
    path.ends_with(end)
        .then(|| path.ancestors().nth(length).map(Path::to_path_buf))
        .flatten()
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

pub(super) fn start_of(daemon: &Daemon) -> Result<Start, Refusal> {
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
pub(super) fn name_and_root(mount: &Mount) -> PathBuf {
    let (name, root) = split_source(&mount.source);
    Path::new(&name).join(root.strip_prefix("/").unwrap_or(&root))
}

/// The same in the cache's encoding.
pub(super) fn remote_folder(mount: &Mount) -> PathBuf {
    names::in_cache(&name_and_root(mount))
}

pub(super) fn under(root: &Path, path: &Path) -> PathBuf {
    if root.as_os_str().is_empty() {
        path.to_path_buf()
    } else {
        root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

/// The remote's name, without a hash, of its folder in the cache.
pub(super) fn first_name(remote: &Path) -> &[u8] {
    let name = remote.iter().next().unwrap_or_default();
    base_name(name.as_bytes())
}

/// A folder's device and inode, by whichever path it is reached; `None` where
/// there is none.
fn identity(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match fs::metadata(path) {
        Ok(folder) => Ok(Some((folder.dev(), folder.ino()))),
        Err(e) if names_nothing(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether an error means that nothing is at a path.
pub(super) fn names_nothing(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
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
