//! Attributes, as the source shows them.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use rustix::fs::{RawMode, Stat};

use crate::cache::proof::Timestamp;

/// What tells one version of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    /// Bytes.
    pub(super) size: u64,
    pub(super) modified: Timestamp,
}

impl Version {
    pub(super) fn of_attr(attr: &FileAttr) -> Self {
        Self {
            size: attr.size,
            modified: timestamp(attr.mtime),
        }
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Timestamp {
            seconds: since.as_secs() as i64,
            nanos: since.subsec_nanos(),
        },
        Err(before) => {
            let before = before.duration();
            let nanos = before.subsec_nanos();
            Timestamp {
                seconds: -(before.as_secs() as i64) - i64::from(nanos > 0),
                nanos: (1_000_000_000 - nanos) % 1_000_000_000,
            }
        }
    }
}

fn time(seconds: i64, nanos: u64) -> SystemTime {
    let nanos = Duration::from_nanos(nanos);
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    time.and_then(|time| time.checked_add(nanos))
        .unwrap_or(UNIX_EPOCH)
}

fn kind(mode: RawMode) -> FileType {
    kind_of(rustix::fs::FileType::from_raw_mode(mode))
}

/// A kind of file; a regular one where it is none that is known.
pub(super) fn kind_of(found: rustix::fs::FileType) -> FileType {
    use rustix::fs::FileType as Found;
    match found {
        Found::Directory => FileType::Directory,
        Found::Symlink => FileType::Symlink,
        Found::Fifo => FileType::NamedPipe,
        Found::CharacterDevice => FileType::CharDevice,
        Found::BlockDevice => FileType::BlockDevice,
        Found::Socket => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

/// What FUSE shows of an open file, or of what an O_PATH descriptor refers to.
pub(super) fn of(file: impl AsFd) -> io::Result<FileAttr> {
    Ok(of_stat(&rustix::fs::fstat(file)?))
}

/// What stat(2) tells.
// Widths differ on arm64.
#[allow(clippy::unnecessary_cast)]
pub(super) fn of_stat(stat: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo(stat.st_ino),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec as u64),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec as u64),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec as u64),
        crtime: UNIX_EPOCH,
        kind: kind(stat.st_mode),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_come_back_also_those_before_1970() {
        for (seconds, nanos) in [(0, 0), (5, 7), (-1, 0), (-1, 999_999_999), (-100, 1)] {
            let back = timestamp(time(seconds, nanos));
            let nanos = nanos as u32;
            assert_eq!(back, Timestamp { seconds, nanos });
        }
    }

    #[test]
    fn files_are_shown_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "abc").unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let attr = of(&file).unwrap();
        assert_eq!((attr.size, attr.kind), (3, FileType::RegularFile));
        let modified = Timestamp::modified(&file.metadata().unwrap());
        assert_eq!(Version::of_attr(&attr), Version { size: 3, modified });
        let folder = std::fs::File::open(dir.path()).unwrap();
        assert_eq!(of(&folder).unwrap().kind, FileType::Directory);
    }
}
