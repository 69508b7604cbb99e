//! From prefixes to superblocks: which mounts to watch, pure but for symlinks.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::Duration;

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
    /// The file system that it is on does not answer.
    #[error("prefix `{}` does not answer: does rclone hang? start it again, or start with --wait", .0.display())]
    Silent(PathBuf),
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
#[derive(Debug)]
pub(super) struct Prefix {
    given: PathBuf,
    resolved: Option<PathBuf>,
    /// The answer of a thread that resolves it and took too long.
    asked: Option<Receiver<Result<PathBuf, PrefixError>>>,
}

/// What follows symlinks; it waits for the file systems that are on the way.
fn resolve(path: PathBuf) -> Result<PathBuf, PrefixError> {
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
    Ok(resolved)
}

impl Prefix {
    pub(super) fn new(given: &Path) -> io::Result<Self> {
        Ok(Self {
            given: std::path::absolute(given)?,
            resolved: None,
            asked: None,
        })
    }

    /// Resolves it, in a thread that waits for daemons that hang; `told` is called if it
    /// is done after so long.
    fn ask(
        &mut self,
        patience: Duration,
        told: impl FnOnce() + Send + 'static,
    ) -> Result<PathBuf, PrefixError> {
        if let Some(asked) = self.asked.take() {
            match asked.try_recv() {
                Err(TryRecvError::Empty) => {
                    self.asked = Some(asked);
                    return Err(PrefixError::Silent(self.given.clone()));
                }
                Ok(Ok(resolved)) => return Ok(resolved),
                // Of before: it may have been mounted meanwhile.
                Ok(Err(_)) | Err(TryRecvError::Disconnected) => {}
            }
        }
        let (sender, answer) = mpsc::sync_channel(1);
        // Nobody waits for the answer any more.
        let late = Arc::new(AtomicBool::new(false));
        let (path, is_late) = (self.given.clone(), Arc::clone(&late));
        let work = move || {
            // Whoever asked may have ended.
            let _ = sender.send(resolve(path));
            if is_late.load(Ordering::SeqCst) {
                told();
            }
        };
        let thread = thread::Builder::new().name("vmafx-prefix".into());
        thread.spawn(work).map_err(|e| PrefixError::Unreadable {
            path: self.given.clone(),
            error: format!("thread: {e}"),
        })?;
        let mut result = answer.recv_timeout(patience);
        if result == Err(RecvTimeoutError::Timeout) {
            late.store(true, Ordering::SeqCst);
            // What came before it could see that.
            result = answer.try_recv().map_err(|_| RecvTimeoutError::Timeout);
        }
        result.unwrap_or_else(|_| {
            self.asked = Some(answer);
            Err(PrefixError::Silent(self.given.clone()))
        })
    }

    /// Finds the mount that the prefix is on. Waits so long for it to resolve, and calls
    /// `told` if it has resolved after that.
    pub(super) fn find(
        &mut self,
        table: &MountTable,
        patience: Duration,
        told: impl FnOnce() + Send + 'static,
    ) -> Result<Watch, PrefixError> {
        let path = self.given.clone();
        // Once: a mount whose daemon is dead does not resolve, and one whose
        // daemon hangs would hang us.
        let resolved = if let Some(resolved) = &self.resolved {
            resolved.clone()
        } else {
            let resolved = self.ask(patience, told)?;
            self.resolved.insert(resolved).clone()
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

    const PLENTY: Duration = Duration::from_secs(60);

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
        let watch = [prefix.find(&table, PLENTY, || ()).unwrap()];
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
        assert!(prefix.find(&table, Duration::ZERO, || ()).is_ok());
    }

    /// A folder that is there, as a prefix.
    fn folder() -> (tempfile::TempDir, PathBuf, Prefix) {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let prefix = Prefix::new(&root).unwrap();
        (dir, root, prefix)
    }

    /// A table in which a mount of this type is there.
    fn mounted(point: &Path, fstype: &str) -> MountTable {
        let line = format!("1 0 0:5 / {} rw - {fstype} d rw", point.display());
        MountTable::parse(line.as_bytes())
    }

    #[test]
    fn a_prefix_that_does_not_answer_is_silent_until_it_does() {
        let (_dir, root, mut prefix) = folder();
        let table = mounted(&root, "fuse.rclone");
        // As if a thread waited for its file system.
        let (sender, answer) = mpsc::sync_channel(1);
        prefix.asked = Some(answer);
        for _ in 0..2 {
            let found = prefix.find(&table, Duration::ZERO, || unreachable!());
            assert_eq!(found, Err(PrefixError::Silent(root.clone())));
        }
        sender.send(Ok(root.clone())).unwrap();
        let found = prefix.find(&table, Duration::ZERO, || unreachable!());
        assert_eq!(found.unwrap().prefix, root);
    }

    #[test]
    fn an_old_answer_that_there_is_none_is_asked_for_again() {
        let (_dir, root, mut prefix) = folder();
        let table = mounted(&root, "fuse.rclone");
        let (sender, answer) = mpsc::sync_channel(1);
        sender.send(Err(PrefixError::Missing(root))).unwrap();
        prefix.asked = Some(answer);
        assert!(prefix.find(&table, PLENTY, || ()).is_ok());
    }

    #[test]
    fn who_has_not_waited_is_told() {
        let mut prefix = Prefix::new(Path::new("/")).unwrap();
        let table = mounted(Path::new("/"), "fuse.rclone");
        let (told, tells) = mpsc::channel();
        for _ in 0..100 {
            prefix.resolved = None;
            let told = told.clone();
            let found = prefix.find(&table, Duration::ZERO, move || told.send(()).unwrap());
            if found == Err(PrefixError::Silent("/".into())) {
                tells
                    .recv_timeout(PLENTY)
                    .expect("it is told when it has resolved");
                assert!(prefix.find(&table, Duration::ZERO, || ()).is_ok());
            }
        }
        // Who was in time is not told.
        prefix.resolved = None;
        let late = told.clone();
        prefix
            .find(&table, PLENTY, move || late.send(()).unwrap())
            .unwrap();
        drop(told);
        assert!(tells.recv_timeout(PLENTY).is_err());
    }

    #[test]
    fn wrong_prefixes_are_told_apart() {
        let (_dir, root, _) = folder();
        fs::write(root.join("file"), "").unwrap();
        let find = |path: &Path, fstype: &str| {
            let table = mounted(&root, fstype);
            Prefix::new(path)
                .unwrap()
                .find(&table, PLENTY, || ())
                .unwrap_err()
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
