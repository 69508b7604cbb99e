//! Reads what is missing of one clip through FUSE.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};

use super::find::Clip;
use super::{Progress, State};
use crate::aligned::AlignedBuffer;
use crate::cache::ranges::Span;
use crate::reason::{Reason, Refusal};

/// Bytes read at once.
const BLOCK: usize = 1 << 20;
/// Bytes read before it is known that the daemon caches them: one request of
/// the kernel's to rclone.
const FIRST: u64 = 128 << 10;

/// One worker's buffer.
pub(super) struct Buffer(AlignedBuffer);

impl Default for Buffer {
    fn default() -> Self {
        Self(AlignedBuffer::new(BLOCK))
    }
}

/// How the reading of a clip ended.
#[derive(Debug)]
pub(super) enum End {
    /// Nothing was missing, or nothing is to be had by reading.
    Unread,
    /// Read to its end, and closed after this time.
    Read(SystemTime),
    /// Not read to its end.
    Not(State, Option<Refusal>),
}

/// What was read of a clip.
#[derive(Debug)]
pub(super) struct Filled {
    pub(super) read_bytes: u64,
    pub(super) end: End,
}

/// Reads what is missing of a clip, unless `stop` says to leave it.
pub(super) fn fill(
    clip: &Clip,
    buffer: &mut Buffer,
    progress: &(dyn Fn(Progress<'_>) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
) -> Filled {
    let expected = clip.missing_bytes();
    let mut filling = Filling {
        clip,
        buffer: &mut buffer.0,
        read_bytes: 0,
        progress,
        stop,
    };
    let end = if expected == 0 {
        End::Unread
    } else if clip.is_hidden() {
        End::Not(State::Refused, clip.refusal.clone())
    } else if clip.is_unknown() {
        End::Not(State::Failed, clip.refusal.clone())
    } else {
        match filling.fill() {
            Ok(true) => End::Read(SystemTime::now()),
            Ok(false) => End::Not(State::Stopped, None),
            Err(refusal) => match clip.site.caches_nothing.get() {
                Some(of_the_mount) => End::Not(State::Refused, Some(of_the_mount.clone())),
                None => End::Not(State::Failed, Some(refusal)),
            },
        }
    };
    let read_bytes = filling.read_bytes;
    let spared = match end {
        End::Read(_) => expected.saturating_sub(read_bytes),
        _ => 0,
    };
    progress(Progress::End { spared });
    Filled { read_bytes, end }
}

struct Filling<'a> {
    clip: &'a Clip,
    buffer: &'a mut [u8],
    read_bytes: u64,
    progress: &'a (dyn Fn(Progress<'_>) + Sync),
    stop: &'a (dyn Fn() -> bool + Sync),
}

impl Filling<'_> {
    /// Reads all that is missing, and closes the clip; false when it was stopped.
    fn fill(&mut self) -> Result<bool, Refusal> {
        let clip = self.clip;
        if (self.stop)() {
            return Ok(false);
        }
        if let Some(refusal) = clip.site.caches_nothing.get() {
            return Err(refusal.clone());
        }
        let missing = clip.present.missing(clip.size);
        let mut room = Room::take(clip, missing.bytes())?;
        (self.progress)(Progress::Begin(&clip.path));
        let file = open(clip)?;
        let Some(start) = missing.first() else {
            return Ok(true);
        };
        let first = Span {
            start,
            end: missing.spans()[0].end.min(start + FIRST),
        };
        if !self.read(&file, first, &mut room)? {
            return Ok(false);
        }
        self.check_cached(first)?;
        // Opened first by us, rclone has compared the clip's version with its
        // own by now, and written what it has. Opened before by another, it
        // has not: then some is read that is cached, and is not downloaded.
        let (mut present, _) = clip.present(clip.size, clip.modified);
        present.insert(first);
        for span in present.missing(clip.size).spans() {
            if !self.read(&file, *span, &mut room)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads a span whole; false when it was stopped.
    fn read(&mut self, file: &File, span: Span, room: &mut Room) -> Result<bool, Refusal> {
        let mut offset = span.start;
        while offset < span.end {
            if (self.stop)() {
                return Ok(false);
            }
            let length = (span.end - offset).min(self.buffer.len() as u64) as usize;
            match file.read_at(&mut self.buffer[..length], offset) {
                Ok(0) => {
                    let path = self.clip.path.display();
                    let detail = format!("`{path}` ends at offset {offset} by now; run again");
                    return Err(Refusal::new(Reason::Changed, detail));
                }
                Ok(n) => {
                    offset += n as u64;
                    self.read_bytes += n as u64;
                    room.fill(n as u64);
                    (self.progress)(Progress::Read(n as u64));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.unreadable(offset, &e)),
            }
        }
        Ok(true)
    }

    fn unreadable(&self, offset: u64, error: &io::Error) -> Refusal {
        let path = self.clip.path.display();
        let free = self.clip.site.free_bytes();
        // rclone 1.75 answers EIO when its cache's disk is full.
        let hint = match free {
            Some(free) if free < BLOCK as u64 => "; the cache's disk is full",
            _ => "; rclone's log tells more",
        };
        let what = format_args!("reading `{path}` at offset {offset}");
        let mut refusal = Refusal::from_io(what, error, Reason::IoError);
        refusal.detail.push_str(hint);
        refusal
    }

    /// Whether what was read came into the cache file: rclone writes it there
    /// before it answers. Without that, gigabytes would be read in vain.
    fn check_cached(&self, span: Span) -> Result<(), Refusal> {
        let clip = self.clip;
        let data = clip.site.located.folders.data_path(&clip.inside);
        if holds(&data, span)? {
            return Ok(());
        }
        let pid = clip.site.located.daemon.pid;
        let what = format!("pid {pid} does not put what is read into its cache");
        if !clip.site.located.says_it_caches_reads() {
            let point = clip.site.point.display();
            let detail = format!("`{point}`: {what}; mount with --vfs-cache-mode full");
            let refusal = Refusal::new(Reason::NoCacheFile, detail);
            // Another clip may have told first.
            let _ = clip.site.caches_nothing.set(refusal);
        }
        let detail = format!("{what}: nothing came into `{}`", data.display());
        Err(Refusal::new(Reason::NoCacheFile, detail))
    }
}

/// Room on the cache's disk for what is still to be read of a clip. A disk that
/// fills up must not be tried: rclone 1.60 then never answers the read, and a
/// process that waits for it cannot be killed.
struct Room<'a> {
    under_way: &'a Mutex<u64>,
    left: u64,
}

impl<'a> Room<'a> {
    fn take(clip: &'a Clip, bytes: u64) -> Result<Self, Refusal> {
        let under_way = &clip.site.under_way;
        let mut others = lock(under_way);
        match clip.site.free_bytes() {
            Some(free) if free.saturating_sub(*others) < bytes => Err(Refusal::new(
                Reason::IoError,
                format!(
                    "`{}` does not fit: {bytes} bytes are missing, the cache's disk has {free} \
                     left, and {others} are being read",
                    clip.path.display()
                ),
            )),
            _ => {
                *others += bytes;
                Ok(Self {
                    under_way,
                    left: bytes,
                })
            }
        }
    }

    fn fill(&mut self, bytes: u64) {
        let filled = bytes.min(self.left);
        self.left -= filled;
        *lock(self.under_way) -= filled;
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        *lock(self.under_way) -= self.left;
    }
}

/// A number is whole, whoever panicked while it was locked.
fn lock(number: &Mutex<u64>) -> MutexGuard<'_, u64> {
    number.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens a clip past the page cache: only what is asked for is read, all of it
/// reaches rclone, and the clip does not fill memory twice.
fn open(clip: &Clip) -> Result<File, Refusal> {
    let shown = clip.path.display();
    let fail = |e: io::Error| Refusal::from_io(format_args!("`{shown}`"), &e, Reason::IoError);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_DIRECT | OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(&clip.path)
        .map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() || metadata.size() != clip.size {
        let detail = format!("`{shown}` has changed since it was listed; run again");
        return Err(Refusal::new(Reason::Changed, detail));
    }
    Ok(file)
}

/// Opens and reads a byte of a clip that is cached, so that rclone compares its
/// version once more and writes its metadata.
pub(super) fn touch(clip: &Clip) {
    // What came of it, the metadata shows.
    let _ = open(clip).map(|file| file.read_at(&mut [0], 0));
}

/// Whether a cache file has no hole in a span; false also where there is none.
/// File systems that do not report holes have none.
pub(super) fn holds(data: &Path, span: Span) -> Result<bool, Refusal> {
    let fail = |e: io::Error| {
        let what = format_args!("`{}`", data.display());
        Err(Refusal::from_io(what, &e, Reason::IoError))
    };
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(data);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return fail(e),
    };
    match lseek(file.as_fd(), span.start as i64, Whence::SeekHole) {
        Ok(hole) => Ok(hole as u64 >= span.end),
        Err(Errno::ENXIO) => Ok(false),
        Err(e) => fail(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_file_holds_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let holds = |start, end| holds(&path, Span { start, end }).unwrap();
        assert!(!holds(0, 1));
        let file = File::create(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        assert!(!holds(0, 1));
        file.write_all_at(&vec![1; 1 << 20], 1 << 20).unwrap();
        assert!(!holds(0, 2 << 20) && !holds(1 << 20, 4 << 20));
        assert!(holds(1 << 20, 2 << 20) && holds((1 << 20) + 5, 2 << 20));
        assert!(!holds(4 << 20, 5 << 20) && !holds(9 << 20, 10 << 20));
    }
}
