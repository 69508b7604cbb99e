//! Gathers the facts of a proof, in the order that the protocol asks for.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::locate::Located;
use super::metadata::{self, MetadataFile, read_metadata};
use super::names;
use crate::cache::proof::{Facts, Tie, Timestamp};
use crate::cache::ranges::Ranges;
use crate::reason::{Reason, Refusal};

/// A clip's facts, and the open files that they are about.
pub(crate) struct Gathered {
    pub(crate) facts: Facts,
    pub(crate) data: File,
    pub(crate) metadata: MetadataFile,
}

/// What the metadata lists before anything was primed: where a prime may read.
///
/// # Errors
/// [`Reason::NoMetadata`] where nothing is cached, and those of reading it.
pub(super) fn advisory(located: &Located, inside: &Path) -> Result<Ranges, Refusal> {
    names::check(inside)?;
    let file = read_metadata(&located.folders.metadata_path(inside))?;
    let ranges = metadata::parse(&file.bytes)?.ranges;
    if ranges.spans().is_empty() {
        return Err(Refusal::new(
            Reason::NoMetadata,
            format!("`{}`: no range is cached", inside.display()),
        ));
    }
    Ok(ranges)
}

/// Gathers the facts of a clip: `path` by which FUSE shows it, `inside` its
/// path inside the mount. `prime` reads one byte at the given offset through
/// FUSE, past the page cache, so that rclone checks the file's version and
/// opens its cache file; `is_companion` tells whether what `path` leads to is
/// the file that the caller reads.
///
/// # Errors
/// The first fact that cannot be had.
pub(crate) fn gather(
    located: &Located,
    path: &Path,
    inside: &Path,
    prime: impl FnOnce(u64) -> io::Result<()>,
    is_companion: impl FnOnce(&fs::Metadata) -> bool,
) -> Result<Gathered, Refusal> {
    let offset = advisory(located, inside)?.first().unwrap_or(0);
    prime(offset).map_err(|e| {
        Refusal::from_io(
            format_args!("read of `{}` past the page cache", path.display()),
            &e,
            Reason::IoError,
        )
    })?;
    // By path, not by descriptor: only a lookup brings new attributes.
    let fuse = fs::metadata(path)
        .map_err(|e| Refusal::from_io(format_args!("`{}`", path.display()), &e, Reason::Changed))?;
    if !is_companion(&fuse) {
        return Err(Refusal::new(
            Reason::Changed,
            format!("`{}` leads to another file by now", path.display()),
        ));
    }
    let (data, held) = open_data(located, inside)?;
    // The metadata after the data: one written for a file that did not exist
    // yet would otherwise vouch for the empty file that came after it.
    let metadata = read_metadata(&located.folders.metadata_path(inside))?;
    let stat = data_stat(&data, &located.folders.data_path(inside))?;
    let tie = if held {
        Tie::HeldByDaemon
    } else if fs::metadata(located.folders.data_path(inside))
        .is_ok_and(|now| (now.dev(), now.ino()) == (stat.dev(), stat.ino()))
    {
        Tie::DerivedPath
    } else {
        Tie::PathMoved
    };
    let file_system = nix::sys::statfs::fstatfs(&data)
        .map_err(|e| Refusal::new(Reason::IoError, format!("cache file: {e}")))?;
    Ok(Gathered {
        facts: Facts {
            read_only: located.read_only,
            shared_with: located.shared_with.clone(),
            fuse_size: fuse.size(),
            fuse_modified: Timestamp::modified(&fuse),
            tie,
            data_size: stat.size(),
            data_links: stat.nlink(),
            data_fs: file_system.filesystem_type().0,
            metadata: metadata::parse(&metadata.bytes)?,
        },
        data,
        metadata,
    })
}

fn data_stat(data: &File, path: &Path) -> Result<fs::Metadata, Refusal> {
    data.metadata()
        .map_err(|e| Refusal::from_io(format_args!("`{}`", path.display()), &e, Reason::IoError))
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
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
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
fn held_by_daemon(located: &Located, inside: &Path) -> io::Result<Held> {
    let tail = located.folders.tail(inside);
    let mut found: Option<(File, (u64, u64))> = None;
    for entry in fs::read_dir(format!("/proc/{}/fd", located.daemon.pid))?.flatten() {
        let target = match fs::read_link(entry.path()) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(e),
            // It was closed.
            Err(_) => continue,
            Ok(target) => target,
        };
        let Some((cache, deleted)) = split_tail(&target, &tail) else {
            continue;
        };
        if !located.folders.is_cache(&cache) {
            continue;
        }
        if deleted {
            return Ok(Held::Deleted);
        }
        // Through /proc it is the file itself, whatever its path leads to by
        // now. The number may have been reused since, so ask what was opened.
        let file = match open_read_only(&entry.path()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            opened => opened?,
        };
        if fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))? != target {
            continue;
        }
        let stat = file.metadata()?;
        let identity = (stat.dev(), stat.ino());
        match &found {
            Some((_, first)) if *first != identity => return Ok(Held::Several),
            Some(_) => {}
            None => found = Some((file, identity)),
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
