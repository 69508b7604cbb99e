//! An rclone mount, shown again: read-only, and past FUSE where it is cached.
//!
//! For programs that nobody changes and nobody wraps. A clip that lies whole in
//! rclone's cache is read by the kernel itself, from a snapshot that never changes
//! (FUSE passthrough, Linux 6.9); all else by proven ranges, as
//! [`BypassFile`](crate::BypassFile) reads it, the kernel keeping the pages.
//! `docs/MOUNT.md` has the whole of it.

mod attr;
mod filesystem;
mod folders;
mod kernel;
mod nodes;
mod opens;
mod shared;
mod source;
mod stats;
mod xattr;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::{Config, Session, SessionACL};

use crate::cache::rclone::Locator;
use crate::mounts::MountTable;
use crate::optin::{self, OptIn};
use crate::reason::{Reason, Refusal};
use crate::snapshot::{SnapshotMode, SnapshotOptions, Snapshots, has_reflinks};
use crate::sys::kernel_version;
use filesystem::Reexport;
use shared::Shared;
use source::Source;
pub use stats::{Stats, Way};

/// Threads that serve, by default: each may wait for rclone.
pub const THREADS: usize = 64;
/// The most that the kernel asks for at once, KiB.
const READ_AHEAD_KIB: u32 = 1024;
/// The first kernel that passes reads through.
const PASSTHROUGH_SINCE: (u32, u32) = (6, 9);

/// Whether the kernel is to read whole clips by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passthrough {
    /// Where it can.
    Auto,
    /// By ranges alone.
    Never,
    /// Without it, nothing is mounted.
    Require,
}

/// What to mount, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// A folder on an rclone mount.
    pub source: PathBuf,
    /// Where it is to be shown again: a folder.
    pub mountpoint: PathBuf,
    /// Whether the kernel reads whole clips by itself.
    pub passthrough: Passthrough,
    /// What from: [`SnapshotMode::Reflink`] makes no copies.
    pub snapshots: SnapshotOptions,
    /// Whether other users may use it: the kernel's permission checks go by the
    /// owners and modes that rclone shows.
    pub allow_other: bool,
    /// Threads that serve, at least 2.
    pub threads: usize,
    /// Further mount options, as of mount(8).
    pub options: Vec<String>,
}

/// Why nothing is mounted, or not any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Here it cannot be had.
    #[error("{0}")]
    Environment(String),
    /// A system call failed.
    #[error("{0}")]
    Failed(String),
}

/// A mount, to be served.
pub struct Mounted {
    session: Session<Reexport>,
    shared: Arc<Shared>,
    source: PathBuf,
    point: PathBuf,
    /// Dropped, it unmounts: served no more, the mount would be there and dead.
    end: Ends,
    refusal: Option<Refusal>,
}

struct Ends(Unmounter);

impl Drop for Ends {
    fn drop(&mut self) {
        // Gone already, in most cases.
        let _ = self.0.unmount();
    }
}

/// Ends a mount from another thread.
#[derive(Debug, Clone)]
pub struct Unmounter {
    place: kernel::Place,
}

/// The counts of a mount, from another thread.
#[derive(Clone)]
pub struct Watch(Arc<Shared>);

impl Watch {
    /// The counts up to now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// To be called now and then, and does something once a second at most: lets go
    /// of snapshots of clips that are gone, which keep blocks of unlinked cache
    /// files, and of memory that nobody uses any more.
    pub fn sweep(&self) {
        if let Some(snapshots) = &self.0.snapshots {
            snapshots.sweep();
        }
    }
}

impl Unmounter {
    /// Unmounts; where files are open, lazily: nobody can open others, and those
    /// who have some may go on as long as it is served. Whether that was so.
    ///
    /// # Errors
    /// Those of umount(2), or of fusermount3; where it is covered by another mount,
    /// or in use and another is mounted below it: it is then still there.
    pub fn unmount(&self) -> io::Result<bool> {
        match self.place.unmount(false) {
            Ok(()) => Ok(false),
            Err(_) => self.place.unmount(true).map(|()| true),
        }
    }
}

impl Mounted {
    /// Mounts. Nothing answers before [`serve`](Self::serve).
    ///
    /// # Errors
    /// [`Error::Usage`] where the folders are not there or not what they should
    /// be; [`Error::Environment`] where it cannot be done here, passthrough
    /// included if it is required.
    pub fn mount(options: &Options) -> Result<Self, Error> {
        let source = folder(&options.source)?;
        let point = folder(&options.mountpoint)?;
        let reserved = kernel::reserve(&point).map_err(|e| cannot_mount(&point, &e))?;
        check_options(options, &source, &point)?;
        let mut refusal = why_not(options, &source)?;
        let snapshots = refusal
            .is_none()
            .then(|| Snapshots::of_huge_pages(options.snapshots));
        let shared = Arc::new(Shared::new(
            Source::new(source.clone()),
            snapshots,
            options.threads,
        ));
        let mounting = kernel::Mounting {
            point: &point,
            source: &source,
            allow_other: options.allow_other,
            options: &options.options,
        };
        let device = mounting.mount().map_err(|e| cannot_mount(&point, &e))?;
        let failed = |what: &str| {
            let point = point.display();
            Error::Failed(format!("`{point}`: {what}"))
        };
        let place = kernel::Place::at(&point).ok_or_else(|| failed("was unmounted at once"))?;
        drop(reserved);
        let dev = place.dev();
        let end = Ends(Unmounter { place });
        let acl = if options.allow_other {
            SessionACL::All
        } else {
            SessionACL::Owner
        };
        let mut config = Config::default();
        config.acl = acl;
        config.n_threads = Some(options.threads);
        let reexport = Reexport(Arc::clone(&shared));
        let session = Session::from_fd(reexport, device, acl, config)
            .map_err(|e| failed(&format!("the kernel's first request: {e}")))?;
        if refusal.is_none() && !shared.passes() {
            let detail = "the kernel's fuse has no passthrough: CONFIG_FUSE_PASSTHROUGH is not set";
            let found = Refusal::new(Reason::Unsupported, detail);
            if options.passthrough == Passthrough::Require {
                return Err(required(&found));
            }
            refusal = Some(found);
        }
        // Where we may not set it, it stays.
        let _ = crate::sys::set_read_ahead(dev, READ_AHEAD_KIB);
        Ok(Self {
            session,
            shared,
            source,
            point,
            end,
            refusal,
        })
    }

    /// The folder that is shown again: absolute, without symlinks.
    #[must_use]
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Where: absolute, without symlinks.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.point
    }

    /// Why the kernel reads no clip by itself; `None`: it does those that are
    /// proven whole.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_ref()
    }

    /// To end it.
    #[must_use]
    pub fn unmounter(&self) -> Unmounter {
        self.end.0.clone()
    }

    /// To look at its counts while it is served.
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.shared))
    }

    /// Serves until it is unmounted and nobody has a file open on it any more.
    ///
    /// # Errors
    /// Where the kernel's requests cannot be read, or somebody aborts the
    /// connection; the mount is then gone.
    pub fn serve(self) -> Result<Stats, Error> {
        let failed = |what: String| Error::Failed(format!("`{}`: {what}", self.point.display()));
        self.session.run().map_err(|e| failed(e.to_string()))?;
        if self.end.0.place.is_mounted().unwrap_or(false) {
            let what = "its connection was aborted; it is unmounted, if it can be: start anew";
            return Err(failed(what.to_owned()));
        }
        Ok(self.shared.stats())
    }
}

/// A folder's absolute path, without symlinks.
fn folder(path: &Path) -> Result<PathBuf, Error> {
    let shown = path.display();
    let failed = |e: io::Error| match e.raw_os_error() {
        Some(nix::libc::ENOTCONN) => Error::Environment(format!(
            "`{shown}`: {e}: who served it is gone; unmount it by `fusermount3 -u`"
        )),
        _ => Error::Usage(format!("`{shown}`: {e}")),
    };
    let found = fs::canonicalize(path).map_err(failed)?;
    if fs::metadata(&found).map_err(failed)?.is_dir() {
        return Ok(found);
    }
    Err(Error::Usage(format!("`{shown}` is no folder")))
}

fn check_options(options: &Options, source: &Path, point: &Path) -> Result<(), Error> {
    let usage = |text: String| Err(Error::Usage(text));
    let refused = |o: &String| kernel::refused(o).map(|why| format!("-o {o}: {why}"));
    if let Some(text) = options.options.iter().find_map(refused) {
        return usage(text);
    }
    if options.threads < 2 {
        return usage("--threads: at least 2".into());
    }
    let (shown, at) = (source.display(), point.display());
    if point.starts_with(source) || source.starts_with(point) {
        return usage(format!(
            "`{at}` and `{shown}`: neither may be within the other; choose another mount point"
        ));
    }
    let table = MountTable::read().map_err(|e| Error::Environment(format!("/proc: {e}")))?;
    let on = table.containing(source);
    if on.is_some_and(crate::mounts::Mount::is_reexport) {
        return usage(format!("`{shown}` is on a mount of vmafx-bypass already"));
    }
    if !on.is_some_and(crate::mounts::Mount::is_rclone) {
        return Err(Error::Environment(format!(
            "`{shown}` is on no rclone mount: start `rclone mount` first"
        )));
    }
    if table.iter().any(|m| m.point == point) {
        return usage(format!("`{at}` is a mount point already: unmount it first"));
    }
    Ok(())
}

/// Why the kernel cannot read clips by itself.
fn why_not(options: &Options, source: &Path) -> Result<Option<Refusal>, Error> {
    let disabled = |detail: &str| Err(Refusal::new(Reason::Disabled, detail));
    let found = if optin::from_env() == OptIn::Killed {
        disabled(&format!("{}=0", optin::VARIABLE))
    } else if options.passthrough == Passthrough::Never {
        disabled("--passthrough never")
    } else {
        check_passthrough(options.snapshots.mode, source)
    };
    match found {
        Err(refusal) if options.passthrough == Passthrough::Require => Err(required(&refusal)),
        found => Ok(found.err()),
    }
}

fn required(refusal: &Refusal) -> Error {
    Error::Environment(format!(
        "--passthrough require: {refusal}; without `require` clips are read in other ways"
    ))
}

fn check_passthrough(mode: SnapshotMode, source: &Path) -> Result<(), Refusal> {
    let unsupported = |detail: String| Err(Refusal::new(Reason::Unsupported, detail));
    let (major, minor) = kernel_version();
    if (major, minor) < PASSTHROUGH_SINCE {
        let (first, second) = PASSTHROUGH_SINCE;
        return unsupported(format!(
            "linux {major}.{minor} has no fuse passthrough: {first}.{second} or newer does"
        ));
    }
    if !kernel::may_back() {
        let detail = "the kernel wants CAP_SYS_ADMIN to read clips by itself";
        return Err(Refusal::new(Reason::Permission, detail));
    }
    let locator = Locator::now()?;
    let mount = locator.table().containing(source);
    let mount = mount.ok_or_else(|| Refusal::new(Reason::NotRclone, "its mount is gone"))?;
    if !mount.read_only {
        let point = mount.point.display();
        return unsupported(format!(
            "`{point}` is writable: who reads a snapshot would not see what is written"
        ));
    }
    if mode == SnapshotMode::Reflink
        // Where it cannot be told now, each open finds out for itself.
        && let Ok(cache) = locator.locate(mount).map(|located| located.cache_folder())
        && !has_reflinks(&cache)
    {
        return unsupported(format!(
            "`{}` makes no reflinks for us: keep the cache on xfs or btrfs, or use --snapshot copy",
            cache.display()
        ));
    }
    Ok(())
}

fn cannot_mount(point: &Path, error: &io::Error) -> Error {
    let point = point.display();
    let what = match error.raw_os_error() {
        Some(nix::libc::ENOENT) => ": is the fuse module loaded? try `modprobe fuse`",
        Some(nix::libc::EINVAL) => ": the kernel does not know an option given by -o",
        Some(nix::libc::EACCES) => ": it is not yours",
        Some(nix::libc::EWOULDBLOCK) => ": another process mounts there at the moment",
        _ => "",
    };
    let text = format!("`{point}`: mounting failed: {error}{what}");
    match error.raw_os_error() {
        Some(nix::libc::EINVAL) => Error::Usage(text),
        _ => Error::Environment(text),
    }
}

/// Where a file that is shown again is on the rclone mount, and `None` where the
/// path is on no mount of ours.
///
/// # Errors
/// Those of getxattr(2): the file is not there, or nobody serves it.
pub fn source_of(path: &Path) -> io::Result<Option<PathBuf>> {
    use std::os::unix::ffi::OsStrExt;
    let real = fs::canonicalize(path)?;
    let table = MountTable::read()?;
    if !table
        .containing(&real)
        .is_some_and(crate::mounts::Mount::is_reexport)
    {
        return Ok(None);
    }
    let mut value = vec![0; 64 << 10];
    let length = rustix::fs::getxattr(&real, xattr::SOURCE, &mut value[..])?;
    Ok(Some(PathBuf::from(OsStr::from_bytes(&value[..length]))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(source: &Path, mountpoint: &Path) -> Options {
        Options {
            source: source.into(),
            mountpoint: mountpoint.into(),
            passthrough: Passthrough::Auto,
            snapshots: SnapshotOptions {
                mode: SnapshotMode::Reflink,
                copy_budget: 0,
            },
            allow_other: false,
            threads: 2,
            options: Vec::new(),
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_is_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let (source, point) = (dir.path().join("source"), dir.path().join("point"));
        fs::create_dir(&source).unwrap();
        fs::create_dir(&point).unwrap();
        let error = |options: &Options| Mounted::mount(options).err().unwrap();
        let text = |options: &Options| error(options).to_string();
        assert!(text(&options(&source, &dir.path().join("no"))).contains("No such file"));
        assert!(text(&options(&source, &source)).contains("within the other"));
        let within = source.join("in");
        fs::create_dir(&within).unwrap();
        assert!(text(&options(&source, &within)).contains("within the other"));
        let found = error(&options(&source, &point));
        assert!(matches!(&found, Error::Environment(text) if text.contains("on no rclone mount")));
        let writable = Options {
            options: vec!["noexec".into(), "rw".into()],
            ..options(&source, &point)
        };
        assert!(text(&writable).contains("-o rw"));
        fs::write(dir.path().join("f"), "").unwrap();
        assert!(text(&options(&source, &dir.path().join("f"))).contains("no folder"));
    }

    #[test]
    fn other_mounts_have_no_source() {
        assert_eq!(source_of(Path::new("/")).unwrap(), None);
    }
}
