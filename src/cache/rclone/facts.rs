//! Gathers the facts of a proof, in the order that the protocol asks for.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::OFlag;

use super::daemon::{denied, exited};
use super::locate::Located;
use super::metadata::{self, MetadataFile, read_metadata};
use super::names;
use crate::cache::proof::{Facts, Metadata, Tie, Timestamp, WritableFacts};
use crate::cache::ranges::Ranges;
use crate::cache::trail::{Gate, Trail};
use crate::reason::{Reason, Refusal};
use crate::sys::{Pages, coarse_ms};

/// The smallest unit in which file systems tell holes, bytes.
const MIN_BLOCK: u64 = 4096;

/// The clip that a proof is about.
pub(crate) struct Clip<'a> {
    pub(crate) located: &'a Located,
    /// By which FUSE shows it.
    pub(crate) path: &'a Path,
    /// Its path inside the mount.
    pub(crate) inside: &'a Path,
    /// An offset that the caller has read through FUSE already: rclone has it.
    pub(crate) pulled: Option<u64>,
    /// Whether nothing but the whole clip will do.
    pub(crate) whole: bool,
}

/// The caller's own descriptor of the clip, opened through FUSE.
pub(crate) trait FuseFile {
    /// Reads one byte at `offset` past the page cache, so that rclone checks
    /// the file's version and opens its cache file.
    fn prime(&self, offset: u64) -> io::Result<()>;
    /// Whether what a path leads to is this very file.
    fn is(&self, found: &fs::Metadata) -> bool;
    /// As of [`pages`](crate::sys::pages).
    fn pages(&self, offset: u64, length: u64) -> io::Result<Pages>;
}

/// A clip's facts, and the open files that they are about.
pub(crate) struct Gathered {
    pub(crate) facts: Facts,
    pub(crate) data: File,
    pub(crate) metadata: MetadataFile,
}

/// What the metadata lists before anything was primed: where a prime may read.
fn advisory(clip: &Clip<'_>, trail: &mut Trail) -> Result<Ranges, Refusal> {
    names::check(clip.inside)?;
    let path = clip.located.folders.metadata_path(clip.inside);
    let ranges = match read_metadata(&path) {
        Ok(file) => {
            check_owner(clip.located, "metadata", file.owner)?;
            let metadata = metadata::parse(&file.bytes)?;
            if metadata.dirty {
                // Each open of such a clip puts its upload off.
                let detail = "not uploaded yet, by its metadata";
                return trail.failure(Gate::Clean, Err(Refusal::new(Reason::Dirty, detail)));
            }
            let listed = metadata.ranges.bytes();
            if clip.whole && 0 < listed && listed < metadata.size {
                let detail = format!("the metadata lists {listed} of {} bytes", metadata.size);
                return Err(Refusal::new(Reason::Partial, detail));
            }
            metadata.ranges
        }
        Err(refusal) if refusal.reason == Reason::NoMetadata && clip.pulled.is_some() => {
            Ranges::default()
        }
        Err(refusal) => return Err(refusal),
    };
    if ranges.spans().is_empty() && clip.pulled.is_none() {
        return Err(Refusal::new(
            Reason::NoMetadata,
            format!("`{}`: no range is cached", path.display()),
        ));
    }
    Ok(ranges)
}

/// Gathers the facts of a clip, in the order that the protocol asks for.
///
/// # Errors
/// The first fact that cannot be had.
pub(crate) fn gather(
    clip: &Clip<'_>,
    file: &impl FuseFile,
    trail: &mut Trail,
) -> Result<Gathered, Refusal> {
    let cached = advisory(clip, trail);
    let cached = trail.step(Gate::Cached, cached, |ranges| {
        format!("{} bytes by the metadata", ranges.bytes())
    })?;
    // Where something is cached, so that rclone downloads nothing for it.
    let offset = cached.first().or(clip.pulled).unwrap_or(0);
    let primed = file.prime(offset).map_err(|e| {
        Refusal::from_io(
            format_args!("read of `{}` past the page cache", clip.path.display()),
            &e,
            Reason::IoError,
        )
    });
    trail.step(Gate::Prime, primed, |()| {
        format!("one byte at {offset} through fuse, past the page cache")
    })?;
    let mut view = View::take(clip, file, trail)?;
    let mut writable = None;
    if !clip.located.read_only {
        trail.failure(Gate::Settled, rename_barrier(clip.path))?;
        let again = View::take(clip, file, trail)?;
        let pages = file.pages(0, 0).map_err(no_cachestat);
        writable = Some(WritableFacts {
            settled: again.is_same(&view),
            unwritten_pages: trail.failure(Gate::PageCache, pages)?.unwritten,
        });
        view = again;
    }
    let file_system = nix::sys::statfs::fstatfs(&view.data)
        .map_err(|e| Refusal::new(Reason::IoError, format!("fstatfs of the cache file: {e}")));
    let file_system = trail.failure(Gate::FileSystem, file_system)?;
    Ok(Gathered {
        facts: Facts {
            mount: clip.located.mount_facts(),
            fuse_size: view.fuse.size(),
            fuse_modified: Timestamp::modified(&view.fuse),
            tie: view.tie,
            data_size: view.stat.size(),
            data_links: view.stat.nlink(),
            data_fs: file_system.filesystem_type().0,
            data_block: view.stat.blksize().max(MIN_BLOCK),
            metadata: view.parsed,
            pulled: clip.pulled.is_some(),
            writable,
        },
        data: view.data,
        metadata: view.metadata,
    })
}

/// The refusal that a failed cachestat(2) means.
pub(crate) fn no_cachestat(error: io::Error) -> Refusal {
    let otherwise = match error.kind() {
        io::ErrorKind::Unsupported => Reason::Unsupported,
        _ => Reason::IoError,
    };
    Refusal::from_io(
        "cachestat, which tells whether programs have changed the clip",
        &error,
        otherwise,
    )
}

/// Steps 4 to 6 of the protocol, once.
struct View {
    fuse: fs::Metadata,
    data: File,
    stat: fs::Metadata,
    tie: Tie,
    metadata: MetadataFile,
    parsed: Metadata,
}

impl View {
    fn take(clip: &Clip<'_>, file: &impl FuseFile, trail: &mut Trail) -> Result<Self, Refusal> {
        // By path, not by descriptor: only a lookup brings new attributes.
        let shown = format_args!("`{}`", clip.path.display()).to_string();
        let fuse = fs::metadata(clip.path)
            .map_err(|e| Refusal::from_io(&shown, &e, Reason::Changed))
            .and_then(|fuse| {
                if file.is(&fuse) {
                    Ok(fuse)
                } else {
                    let detail = format!("{shown} leads to another file by now");
                    Err(Refusal::new(Reason::Changed, detail))
                }
            });
        let fuse = trail.step(Gate::Identity, fuse, |fuse| {
            format!("{shown} is inode {}", fuse.ino())
        })?;
        let listed = names::check_listed(clip.path, clip.inside);
        trail.failure(Gate::Identity, listed)?;
        let path = clip.located.folders.data_path(clip.inside);
        let opened = open_data(clip.located, clip.inside).and_then(|(data, held)| {
            let found = data.metadata();
            let found = found
                .map_err(|e| Refusal::from_io("fstat of the cache file", &e, Reason::IoError))?;
            check_owner(clip.located, "cache file", found.uid())?;
            Ok((data, held))
        });
        let (data, held) = trail.step(Gate::DataFile, opened, |(_, held)| {
            let how = if *held {
                "held by"
            } else {
                "where its path says, of"
            };
            format!(
                "`{}`, {how} pid {}",
                path.display(),
                clip.located.daemon.pid
            )
        })?;
        // The metadata after the data: one written for a file that did not exist
        // yet would otherwise vouch for the empty file that came after it.
        let metadata_path = clip.located.folders.metadata_path(clip.inside);
        let metadata = read_metadata(&metadata_path).and_then(|file| {
            check_owner(clip.located, "metadata", file.owner)?;
            metadata::parse(&file.bytes).map(|parsed| (file, parsed))
        });
        let (metadata, parsed) = trail.step(Gate::Metadata, metadata, |(file, _)| {
            let path = metadata_path.display();
            format!("`{path}`, {} bytes, twice the same", file.bytes.len())
        })?;
        let stat = data.metadata().map_err(|e| {
            Refusal::from_io(format_args!("`{}`", path.display()), &e, Reason::IoError)
        });
        let stat = trail.failure(Gate::Links, stat)?;
        let tie = if held {
            Tie::HeldByDaemon
        } else if fs::metadata(&path).is_ok_and(|now| identity(&now) == identity(&stat)) {
            Tie::DerivedPath
        } else {
            Tie::PathMoved
        };
        Ok(Self {
            fuse,
            data,
            stat,
            tie,
            metadata,
            parsed,
        })
    }

    fn is_same(&self, other: &Self) -> bool {
        let fuse = |view: &Self| (view.fuse.size(), Timestamp::modified(&view.fuse));
        fuse(self) == fuse(other)
            && identity(&self.stat) == identity(&other.stat)
            && self.metadata.bytes == other.metadata.bytes
    }
}

fn identity(file: &fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Waits for a rename in the clip's folder to be over: between the renames of
/// data and metadata, one clip's metadata lies over another's data. rclone
/// answers the lookup of a name that nobody has asked for yet only then.
fn rename_barrier(path: &Path) -> Result<(), Refusal> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        ".vmafx-bypass-{}-{}-{}",
        std::process::id(),
        coarse_ms(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let path = path.with_file_name(name);
    let what = format!("rename barrier `{}`", path.display());
    match fs::symlink_metadata(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Refusal::from_io(what, &e, Reason::IoError)),
        Ok(_) => Err(Refusal::new(Reason::IoError, format!("{what} exists"))),
    }
}

/// Opens the clip's data file: the inode that the daemon itself has open for
/// this name, and `true`; where its descriptors may not be listed, the file at
/// the derived path, and `false`.
fn open_data(located: &Located, inside: &Path) -> Result<(File, bool), Refusal> {
    let daemon = located.daemon.pid;
    let path = located.folders.data_path(inside);
    let refuse = |reason, what| {
        let detail = format!("pid {daemon} {what} `{}`", path.display());
        Err(Refusal::new(reason, detail))
    };
    match held_by_daemon(located, inside) {
        Ok(Held::One(file)) => Ok((file, true)),
        Ok(Held::None) => refuse(Reason::NoCacheFile, "does not have open"),
        Ok(Held::Deleted) => refuse(Reason::Changed, "still reads a deleted"),
        Ok(Held::Several) => refuse(Reason::Ambiguous, "has several files named"),
        Err(e) if denied(&e) && located.hidden => {
            if !located.cache_mode_full {
                return refuse(Reason::Permission, "does not show whether it reads");
            }
            let missing = |e: io::Error| {
                let otherwise = match e.kind() {
                    io::ErrorKind::NotFound => Reason::NoCacheFile,
                    _ => Reason::IoError,
                };
                Refusal::from_io(format_args!("`{}`", path.display()), &e, otherwise)
            };
            Ok((open_read_only(&path).map_err(missing)?, false))
        }
        Err(e) => Err(Refusal::from_io(
            format_args!("descriptors of pid {daemon}"),
            &e,
            Reason::IoError,
        )),
    }
}

/// Refuses a file that its rclone's user may not be able to read. He can have his
/// rclone hold whatever there is (O_PATH), by any path (mount namespaces), and put
/// symlinks on the way to the metadata; and we may be root, and hand over to him, or
/// tell him, what we find.
fn check_owner(located: &Located, what: &str, owner: u32) -> Result<(), Refusal> {
    match located.user {
        Some(user) if user == 0 || user == owner => Ok(()),
        user => {
            let user = user.map_or("unknown".into(), |user| user.to_string());
            let detail = format!("the {what} is uid {owner}'s, the mount that of uid {user}");
            Err(Refusal::new(Reason::Unsupported, detail))
        }
    }
}

/// Only regular files are expected; should it be another, do not wait for it.
fn open_read_only(path: &Path) -> io::Result<File> {
    fs::OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path)
}

enum Held {
    None,
    One(File),
    Deleted,
    Several,
}

/// Looks for the data file among the daemon's descriptors: below a `vfs`
/// folder of the mount's own cache folder, whatever symlinks led there. Several
/// descriptors of one inode count as one.
///
/// Where the mount's source hides the remote, the folder below `vfs` is not
/// certain: any file there that ends in the clip's path may be the one, so that
/// there must be no other.
fn held_by_daemon(located: &Located, inside: &Path) -> io::Result<Held> {
    let folders = &located.folders;
    let tail = folders.tail(inside);
    let end = if folders.is_hidden() {
        names::in_cache(inside)
    } else {
        tail.clone()
    };
    let mut found: Option<(File, (u64, u64))> = None;
    for entry in fs::read_dir(format!("/proc/{}/fd", located.daemon.pid))? {
        let entry = entry?;
        let target = match fs::read_link(entry.path()) {
            // It was closed.
            Err(e) if exited(&e) => continue,
            target => target?,
        };
        let Some((folder, deleted)) = split_tail(&target, &end) else {
            continue;
        };
        let is_data = if folders.is_hidden() {
            folders.is_in_data_tree(&folder)
        } else {
            folders.is_cache(&folder)
        };
        let named = |e: io::Error| io::Error::new(e.kind(), format!("`{}`: {e}", folder.display()));
        if !is_data.map_err(named)? {
            continue;
        }
        if deleted {
            return Ok(Held::Deleted);
        }
        // Through /proc it is the file itself, whatever its path leads to by
        // now. The number may have been reused since, so ask what was opened.
        let file = match open_read_only(&entry.path()) {
            Err(e) if exited(&e) => continue,
            opened => opened?,
        };
        if fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))? != target {
            continue;
        }
        // Another's that only ends like it; there is but one at the tail.
        if split_tail(&target, &tail).is_none() {
            return Ok(Held::Several);
        }
        let own = identity(&file.metadata()?);
        match &found {
            Some((_, first)) if *first != own => return Ok(Held::Several),
            Some(_) => {}
            None => found = Some((file, own)),
        }
    }
    Ok(found.map_or(Held::None, |(file, _)| Held::One(file)))
}

/// The cache folder of a descriptor's target that ends in the clip's name, and
/// whether the file is deleted.
fn split_tail(target: &Path, tail: &Path) -> Option<(PathBuf, bool)> {
    let strip = |target: &[u8]| {
        let cache = target.strip_suffix(tail.as_os_str().as_bytes())?;
        let cache = cache.strip_suffix(b"/")?;
        Some(PathBuf::from(OsStr::from_bytes(cache)))
    };
    let bytes = target.as_os_str().as_bytes();
    let deleted = || Some((strip(bytes.strip_suffix(b" (deleted)")?)?, true));
    strip(bytes).map(|cache| (cache, false)).or_else(deleted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_whole_components() {
        let split = |target: &str| split_tail(Path::new(target), Path::new("vfs/web/a b"));
        let cache = |deleted| Some((PathBuf::from("/c"), deleted));
        assert_eq!(split("/c/vfs/web/a b"), cache(false));
        assert_eq!(split("/c/vfs/web/a b (deleted)"), cache(true));
        assert_eq!(split("/c/xvfs/web/a b"), None);
        assert_eq!(split("/c/vfs/web/xa b"), None);
        assert_eq!(split("/c/vfs/web/a b/c"), None);
        assert_eq!(split("socket:[1]"), None);
    }
}
