//! From prefixes to superblocks: which mounts to watch, pure but for symlinks.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::mounts::{Dev, Mount, MountTable};

/// Why a prefix cannot be watched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrefixError {
    /// There is no such folder.
    #[error("prefix `{}` does not exist: mount it first, or start with --wait", .0.display())]
    Missing(PathBuf),
    /// It is a file.
    #[error("prefix `{}` is not a folder: name the mount point or a folder below it", .0.display())]
    NotFolder(PathBuf),
    /// It cannot be looked at.
    #[error("prefix `{}`: {error}", path.display())]
    Unreadable {
        /// The prefix.
        path: PathBuf,
        /// What the kernel said.
        error: String,
    },
    /// It is on a file system that is not FUSE.
    #[error("prefix `{}` is on {fstype}, not on an rclone mount: mount it first, or start with --wait", path.display())]
    NotFuse {
        /// The prefix.
        path: PathBuf,
        /// What it is on.
        fstype: String,
    },
    /// It is on a FUSE mount of another kind.
    #[error("prefix `{}` is on {fstype}, which is FUSE but not rclone: only rclone mounts can be watched", path.display())]
    NotRclone {
        /// The prefix.
        path: PathBuf,
        /// What it is on.
        fstype: String,
    },
}

/// A prefix that is on an rclone mount now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// The prefix: absolute, without symlinks.
    pub prefix: PathBuf,
    /// The mount it is on.
    pub mount: Mount,
    /// The prefix inside the mount's superblock.
    inside: PathBuf,
}

impl Watch {
    /// Where a path inside the superblock is below the prefix, absolute.
    fn show(&self, dev: Dev, inside: &Path) -> Option<PathBuf> {
        if self.mount.dev != dev {
            return None;
        }
        let below = inside.strip_prefix(&self.inside).ok()?;
        Some(self.prefix.join(below))
    }
}

/// The absolute path of a file on a watched superblock, through the mount that
/// it was opened through if a prefix is on it, else (another place of the same
/// superblock, or another mount namespace) the first prefix that it is below.
pub(super) fn show(watches: &[Watch], dev: Dev, mount_id: u64, inside: &Path) -> Option<PathBuf> {
    let (through, others): (Vec<_>, Vec<_>) = watches.iter().partition(|w| w.mount.id == mount_id);
    let mut best = through.into_iter().chain(others);
    best.find_map(|w| w.show(dev, inside))
}

/// A prefix as it was given, and as it resolved last.
#[derive(Debug, Clone)]
pub(super) struct Prefix {
    given: PathBuf,
    resolved: Option<PathBuf>,
}

impl Prefix {
    pub(super) fn new(given: &Path) -> io::Result<Self> {
        Ok(Self {
            given: std::path::absolute(given)?,
            resolved: None,
        })
    }

    fn resolve(&mut self) -> Result<PathBuf, PrefixError> {
        let path = self.given.clone();
        let resolved = match fs::canonicalize(&path) {
            Ok(resolved) => resolved,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(PrefixError::Missing(path));
            }
            Err(e) => {
                let error = e.to_string();
                return Err(PrefixError::Unreadable { path, error });
            }
        };
        if fs::metadata(&resolved).is_ok_and(|m| !m.is_dir()) {
            return Err(PrefixError::NotFolder(path));
        }
        self.resolved = Some(resolved.clone());
        Ok(resolved)
    }

    /// Finds the mount that the prefix is on.
    pub(super) fn find(&mut self, table: &MountTable) -> Result<Watch, PrefixError> {
        let path = self.given.clone();
        // Once: a mount whose daemon is dead does not resolve, and one whose
        // daemon hangs would hang us.
        let resolved = match &self.resolved {
            Some(resolved) => resolved.clone(),
            None => self.resolve()?,
        };
        let mount = table.containing(&resolved);
        let fstype = |m: Option<&Mount>| m.map_or_else(String::new, |m| m.fstype.clone());
        match mount {
            Some(mount) if mount.is_rclone() || mount.is_reexport() => Ok(Watch {
                inside: mount.inside(&resolved).unwrap_or_default(),
                prefix: resolved,
                mount: mount.clone(),
            }),
            Some(mount) if mount.is_fuse() => Err(PrefixError::NotRclone {
                path,
                fstype: fstype(Some(mount)),
            }),
            other => Err(PrefixError::NotFuse {
                path,
                fstype: fstype(other),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_show_through_the_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let point = dir.path().join("mnt");
        fs::create_dir_all(point.join("sub")).unwrap();
        let point = fs::canonicalize(point).unwrap();
        let line = format!(
            "1 0 0:5 / / rw - ext4 d rw\n2 1 0:39 /bind {} ro - fuse.rclone web: ro",
            point.display()
        );
        let table = MountTable::parse(line.as_bytes());
        let mut prefix = Prefix::new(&point.join("sub")).unwrap();
        let watch = [prefix.find(&table).unwrap()];
        let dev = Dev::new(0, 39);
        let shown = show(&watch, dev, 1, Path::new("bind/sub/a/b"));
        assert_eq!(shown, Some(point.join("sub/a/b")));
        assert_eq!(show(&watch, dev, 1, Path::new("bind/other")), None);
        assert_eq!(show(&watch, dev, 1, Path::new("bind/subway")), None);
        assert_eq!(
            show(&watch, Dev::new(0, 40), 1, Path::new("bind/sub/a")),
            None
        );
        // Dead: it does not resolve any more but is still known.
        fs::remove_dir_all(&point).unwrap();
        assert!(prefix.find(&table).is_ok());
    }

    #[test]
    fn wrong_prefixes_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::write(root.join("file"), "").unwrap();
        let find = |path: &Path, fstype: &str| {
            let line = format!("1 0 0:5 / {} rw - {fstype} d rw", root.display());
            let table = MountTable::parse(line.as_bytes());
            Prefix::new(path).unwrap().find(&table).unwrap_err()
        };
        assert!(matches!(
            find(&root.join("no"), "ext4"),
            PrefixError::Missing(_)
        ));
        assert!(matches!(
            find(&root.join("file"), "ext4"),
            PrefixError::NotFolder(_)
        ));
        assert!(matches!(find(&root, "ext4"), PrefixError::NotFuse { .. }));
        assert!(matches!(
            find(&root, "fuse.sshfs"),
            PrefixError::NotRclone { .. }
        ));
    }
}
