//! Gathers the facts of a proof, in the order that the protocol asks for.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

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
    let file = read_metadata(&located.metadata_path(inside))?;
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
/// opens its cache file.
///
/// # Errors
/// The first fact that cannot be had.
pub(crate) fn gather(
    located: &Located,
    path: &Path,
    inside: &Path,
    prime: impl FnOnce(u64) -> io::Result<()>,
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
    let (data, held) = open_data(located, inside)?;
    // The metadata after the data: one written for a file that did not exist
    // yet would otherwise vouch for the empty file that came after it.
    let metadata = read_metadata(&located.metadata_path(inside))?;
    let stat = data_stat(&data, &located.data_path(inside))?;
    let tie = if held {
        Tie::HeldByDaemon
    } else if fs::metadata(located.data_path(inside))
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
            shared_cache: located.shared_cache,
            fuse_size: fuse.size(),
            fuse_modified: Timestamp {
                seconds: fuse.mtime(),
                nanos: fuse.mtime_nsec() as u32,
            },
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
    let wanted = located.daemon_data_path(inside);
    let refuse = |reason, what| {
        let detail = format!("pid {daemon} {what} `{}`", wanted.display());
        Err(Refusal::new(reason, detail))
    };
    match held_by_daemon(daemon, &wanted) {
        Ok(Held::One(file)) => Ok((file, true)),
        Ok(Held::None) => refuse(Reason::NoCacheFile, "does not have open"),
        Ok(Held::Deleted) => refuse(Reason::Changed, "still reads a deleted"),
        Ok(Held::Several) => refuse(Reason::Ambiguous, "has several files named"),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            let path = located.data_path(inside);
            open_read_only(&path)
                .map(|file| (file, false))
                .map_err(|e| {
                    let otherwise = match e.kind() {
                        io::ErrorKind::NotFound => Reason::NoCacheFile,
                        _ => Reason::IoError,
                    };
                    Refusal::from_io(format_args!("`{}`", path.display()), &e, otherwise)
                })
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

/// Looks for the data file among the daemon's descriptors. Several descriptors
/// of one inode count as one.
fn held_by_daemon(pid: u32, wanted: &Path) -> io::Result<Held> {
    let mut found: Option<(File, (u64, u64))> = None;
    let mut deleted = wanted.as_os_str().to_os_string();
    deleted.push(" (deleted)");
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        if target.as_os_str() == deleted {
            return Ok(Held::Deleted);
        }
        if target != wanted {
            continue;
        }
        // Through /proc it is the file itself, whatever its path leads to by
        // now. The number may have been reused since, so ask what was opened.
        let file = match open_read_only(&entry.path()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            opened => opened?,
        };
        if fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))? != wanted {
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
