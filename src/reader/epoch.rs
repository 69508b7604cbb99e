//! One proof's life: the ranges that may be read from one data file while one
//! version of the metadata holds.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use rustix::fs::{Advice, fadvise};

use super::companion::Companion;
use super::origin::Origin;
use super::prove::check_read_only;
use super::pulled::Pulled;
use super::verify::{FileKey, check_quarantine};
use crate::cache::pieces::Pieces;
use crate::cache::proof::{Proof, Timestamp};
use crate::cache::ranges::{Place, Span, place};
use crate::mounts::Dev;
use crate::reason::{Reason, Refusal};
use crate::sys::coarse_ms;

/// A range is checked for holes, and the metadata looked at again, in pieces of
/// this size, bytes. Just after an open, when the metadata is fresh and has to
/// be read and not only looked at, a piece costs 12 us.
const WINDOW: u64 = 16 << 20;
/// The metadata is looked at again after this long, milliseconds.
const RECHECK_MS: u64 = 1_000;

/// Bytes read through FUSE at once where the kernel has pages of a range; those
/// behind them may have none.
const PAGES_READ: usize = 128 << 10;

/// What became of a read.
pub(super) enum Outcome {
    /// So many bytes came from the cache; never 0.
    Cache(usize),
    /// At most so many bytes are to be read through FUSE, for this reason.
    Fuse(usize, Reason),
}

/// What is known of a piece.
const UNCHECKED: u8 = 0;
const PRESENT: u8 = 1;
const HAS_HOLE: u8 = 2;

pub(super) struct Epoch {
    data: File,
    path: PathBuf,
    proof: Proof,
    pieces: Pieces,
    checked: Box<[AtomicU8]>,
    /// `None`: what is read through FUSE may not be in the data file.
    pulled: Option<Pulled>,
    /// Tells whether the metadata is still what was proven.
    origin: Origin,
    /// The superblock of the clip's mount.
    dev: Dev,
    key: FileKey,
    /// When all was last seen unchanged, [`coarse_ms`].
    seen_ms: AtomicU64,
    since: Instant,
    /// Whether the kernel was told to read ahead further.
    advised: AtomicBool,
}

impl Epoch {
    /// `caches_reads`: whether all that is read through FUSE goes into the data
    /// file. With other cache modes than `full`, a descriptor that was opened
    /// before the cache had the clip reads the remote past it.
    pub(super) fn new(
        proof: Proof,
        data: File,
        origin: Origin,
        path: PathBuf,
        caches_reads: bool,
        dev: Dev,
        key: FileKey,
    ) -> Self {
        let pieces = Pieces::of(&proof.ranges, WINDOW);
        Self {
            data,
            path,
            proof,
            checked: pieces.iter().map(|_| AtomicU8::new(UNCHECKED)).collect(),
            pieces,
            pulled: caches_reads.then(Pulled::default),
            origin,
            dev,
            key,
            seen_ms: AtomicU64::new(coarse_ms()),
            since: Instant::now(),
            advised: AtomicBool::new(false),
        }
    }

    /// Has the kernel read twice as far ahead, once: of a file that is not in memory,
    /// 100 MiB come in 66 ms from the disk instead of 73. To ask for parts of it
    /// beforehand (POSIX_FADV_WILLNEED) takes twice as long.
    pub(super) fn advise_in_order(&self) {
        if !self.advised.load(Ordering::Relaxed) && !self.advised.swap(true, Ordering::Relaxed) {
            // Advice.
            let _ = fadvise(&self.data, 0, None, Advice::Sequential);
        }
    }

    pub(super) fn proven_bytes(&self) -> u64 {
        self.proof.ranges.bytes()
    }

    pub(super) fn cache_path(&self) -> &Path {
        &self.path
    }

    pub(super) fn key(&self) -> &FileKey {
        &self.key
    }

    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// Reads from the piece that `offset` is in, or says how much to read
    /// through FUSE. An error: the proof does not hold any more, and nothing
    /// was read.
    pub(super) fn read(
        &self,
        buffer: &mut [u8],
        offset: u64,
        companion: &Companion,
    ) -> Result<Outcome, Refusal> {
        if coarse_ms().saturating_sub(self.seen_ms.load(Ordering::Relaxed)) >= RECHECK_MS {
            self.check_again(companion)?;
            self.origin.pin(&self.proof, companion);
        }
        let limit =
            |end: u64| usize::try_from(end - offset).map_or(buffer.len(), |n| n.min(buffer.len()));
        let index = match self.pieces.place(offset) {
            Place::In(index) => index,
            Place::Before(next) => return self.read_pulled(buffer, offset, next, companion),
        };
        if !self.check(index)? {
            return Ok(Outcome::Fuse(limit(self.pieces[index].end), Reason::Hole));
        }
        // Over as many pieces as are known to be present and adjoin.
        let mut end = self.pieces[index].end;
        for (next, state) in self.pieces[index + 1..]
            .iter()
            .zip(&self.checked[index + 1..])
        {
            if next.start != end
                || end - offset >= buffer.len() as u64
                || state.load(Ordering::Acquire) != PRESENT
            {
                break;
            }
            end = next.end;
        }
        let length = limit(end);
        self.take(&mut buffer[..length], offset, companion)
    }

    /// Reads where the metadata lists nothing up to `next`: what was pulled
    /// meanwhile.
    fn read_pulled(
        &self,
        buffer: &mut [u8],
        offset: u64,
        next: u64,
        companion: &Companion,
    ) -> Result<Outcome, Refusal> {
        let within =
            |end: u64| usize::try_from(end - offset).map_or(buffer.len(), |n| n.min(buffer.len()));
        let pulled = self.pulled.as_ref();
        let found = pulled.map_or(Err(u64::MAX), |p| p.find(offset, self.proof.block));
        let span = match found {
            Ok(span) => span,
            // Beyond the end only FUSE knows whether the file has grown.
            Err(sooner) => {
                let listed = place(self.proof.listed.spans(), offset);
                let reason = match listed {
                    Place::In(_) => Reason::Edge,
                    Place::Before(_) => Reason::Partial,
                };
                return Ok(Outcome::Fuse(within(next.min(sooner)), reason));
            }
        };
        let length = within(span.end.min(next));
        let end = offset + length as u64;
        // Each time, unlike a piece: what is there grows, and is not listed.
        if !self.is_present(Span { start: offset, end }, self.proof.block)? {
            return Ok(Outcome::Fuse(length, Reason::Hole));
        }
        self.take(&mut buffer[..length], offset, companion)
    }

    /// Notes what was just read through FUSE for want of a range: rclone has
    /// put it into the data file, if that still is the one it uses.
    pub(super) fn pulled(&self, span: Span) {
        if let Some(pulled) = &self.pulled
            && self.check_data().is_ok()
        {
            pulled.add(span);
        }
    }

    /// What a read would do with each range of the file: from the cache
    /// (`None`), or through FUSE and why. Neighbours differ.
    pub(super) fn map(&self) -> Result<Vec<(Span, Option<Reason>)>, Refusal> {
        let mut map: Vec<(Span, Option<Reason>)> = Vec::new();
        let mut add = |span: Span, reason| match map.last_mut() {
            Some((last, before)) if *before == reason => last.end = span.end,
            _ => map.push((span, reason)),
        };
        let mut start = 0;
        let mut pieces = self.pieces.iter().enumerate();
        while start < self.proof.size {
            let piece = pieces.next();
            let next = piece.map_or(self.proof.size, |(_, piece)| piece.start);
            while start < next {
                let (end, reason) = match place(self.proof.listed.spans(), start) {
                    Place::In(i) => (self.proof.listed.spans()[i].end, Reason::Edge),
                    Place::Before(listed) => (listed, Reason::Partial),
                };
                let end = end.min(next);
                add(Span { start, end }, Some(reason));
                start = end;
            }
            if let Some((index, piece)) = piece {
                add(*piece, (!self.check(index)?).then_some(Reason::Hole));
                start = piece.end;
            }
        }
        Ok(map)
    }

    /// Whether a piece may be read; an error where the proof has ended.
    fn check(&self, index: usize) -> Result<bool, Refusal> {
        let state = self.checked[index].load(Ordering::Acquire);
        if state != UNCHECKED {
            return Ok(state == PRESENT);
        }
        self.origin.check_lately()?;
        let margin = if self.proof.writable {
            self.proof.block
        } else {
            0
        };
        let present = self.is_present(self.pieces[index], margin)?;
        let state = if present { PRESENT } else { HAS_HOLE };
        self.checked[index].store(state, Ordering::Release);
        Ok(present)
    }

    /// Whether the data file has no hole in a span, nor in `margin` around it.
    fn is_present(&self, span: Span, margin: u64) -> Result<bool, Refusal> {
        let start = span.start.saturating_sub(margin);
        let end = (span.end + margin).min(self.proof.size);
        match lseek(&self.data, start as i64, Whence::SeekHole) {
            Ok(hole) => Ok(hole as u64 >= end),
            // Beyond the end: the file was cut.
            Err(Errno::ENXIO) => Err(changed("was truncated")),
            Err(e) => Err(self.failed("lseek", e.into())),
        }
    }

    /// Whether all that was proven is still so, looked at now.
    pub(super) fn check_now(&self, companion: &Companion) -> Result<(), Refusal> {
        self.check_data()?;
        self.check_again(companion)
    }

    /// What is looked at once a second: the metadata, whether the mount is still
    /// read-only, and FUSE's own view, which may have become another's without
    /// the cache having been touched.
    fn check_again(&self, companion: &Companion) -> Result<(), Refusal> {
        let now = coarse_ms();
        self.origin.check()?;
        if !self.proof.writable {
            check_read_only(self.dev)?;
        }
        match companion.metadata() {
            Ok(fuse)
                if fuse.len() == self.proof.size
                    && Timestamp::modified(&fuse) == self.proof.modified => {}
            Ok(_) => return Err(changed("is behind what FUSE shows")),
            // What a daemon that is gone had proven stays true as long as
            // nobody touches the metadata or the data file.
            Err(e) if is_without_daemon(&e) => {}
            Err(e) => {
                let what = "fstat of the clip through fuse";
                return Err(Refusal::from_io(what, &e, Reason::IoError));
            }
        }
        self.seen_ms.store(now, Ordering::Relaxed);
        Ok(())
    }

    /// Whether every byte of the clip is proven and present.
    pub(super) fn check_whole(&self) -> Result<(), Refusal> {
        let whole = Span {
            start: 0,
            end: self.proof.size,
        };
        if self.proof.ranges.spans() != [whole] {
            let (proven, size) = (self.proven_bytes(), self.proof.size);
            let detail = format!("{proven} of {size} bytes are proven");
            return Err(Refusal::new(Reason::Partial, detail));
        }
        if !self.is_present(whole, 0)? {
            let detail = format!("`{}` has a hole", self.path.display());
            return Err(Refusal::new(Reason::Hole, detail));
        }
        Ok(())
    }

    /// Whether the data file is still the clip's, in the version that was
    /// proven; rclone may have written the metadata again. Asks neither FUSE
    /// nor rclone.
    pub(super) fn check_version(&self) -> Result<(), Refusal> {
        check_quarantine(&self.key)?;
        check_read_only(self.dev)?;
        self.origin.check_version()?;
        // Last: before anyone gets a newer version through FUSE, rclone unlinks
        // the old one's file.
        self.check_data()
    }

    /// Whether another proof is of the same version in the same data file.
    pub(super) fn is_same(&self, other: &Self) -> Result<bool, Refusal> {
        let identity = |epoch: &Self| {
            let stat = rustix::fs::fstat(&epoch.data);
            let stat = stat.map_err(|e| epoch.failed("fstat", e.into()))?;
            Ok((stat.st_dev, stat.st_ino))
        };
        Ok(self.key == other.key
            && (self.proof.size, self.proof.modified) == (other.proof.size, other.proof.modified)
            && identity(self)? == identity(other)?
            && self.origin.is_same_version(&other.origin))
    }

    /// The clip's size, bytes, and its modification time.
    pub(super) fn version(&self) -> (u64, Timestamp) {
        (self.proof.size, self.proof.modified)
    }

    /// What tells versions of one size and time apart, if it can be told.
    #[cfg(feature = "mount")]
    pub(super) fn mark(&self) -> Option<u64> {
        self.origin.mark()
    }

    /// What is proven.
    pub(super) fn proof(&self) -> &Proof {
        &self.proof
    }

    /// Whether what is read through FUSE goes into the cache file.
    pub(super) fn caches_reads(&self) -> bool {
        self.pulled.is_some()
    }

    /// Tells a difference between the cache and FUSE to the server that gave
    /// the proof, if one did: it looks for itself, and warns its other clients.
    pub(super) fn tell_difference(&self, offset: u64, companion: &Companion) {
        self.origin.tell_difference(offset, companion);
    }

    /// The cache file; reading it gives none of this type's guarantees.
    pub(super) fn data(&self) -> &File {
        &self.data
    }

    /// Fills the buffer from the data file, of which all is proven.
    pub(super) fn read_whole(&self, buffer: &mut [u8], offset: u64) -> Result<(), Refusal> {
        self.pread(buffer, offset)
    }

    /// Fills the buffer from the data file, at a range that was proven. On a
    /// writable mount, what programs write is in the kernel's pages before rclone
    /// has it, for every reader through FUSE, and rclone marks it in the metadata
    /// after it has written it. A range with pages is FUSE's, which gives it
    /// without rclone.
    fn take(
        &self,
        buffer: &mut [u8],
        offset: u64,
        companion: &Companion,
    ) -> Result<Outcome, Refusal> {
        let length = buffer.len();
        if !self.proof.writable {
            self.pread(buffer, offset)?;
            return Ok(Outcome::Cache(length));
        }
        let has_pages = || companion.has_pages(offset, length as u64);
        let by_fuse = Ok(Outcome::Fuse(length.min(PAGES_READ), Reason::PageCache));
        if has_pages()? {
            return by_fuse;
        }
        self.read_again(buffer, offset)?;
        if has_pages()? {
            return by_fuse;
        }
        Ok(Outcome::Cache(length))
    }

    /// Fills the buffer from a range that was read before, to compare it.
    pub(super) fn read_again(&self, buffer: &mut [u8], offset: u64) -> Result<(), Refusal> {
        self.pread(buffer, offset)?;
        if self.proof.writable {
            self.origin.check_in_place()?;
        }
        Ok(())
    }

    /// Whether programs may change the clip through the mount.
    pub(super) fn is_writable(&self) -> bool {
        self.proof.writable
    }

    /// Reads, and only then looks whether the file was still the clip's: a
    /// linked inode's present bytes are never rewritten on a read-only mount,
    /// an unlinked one's may be, in place.
    fn pread(&self, buffer: &mut [u8], offset: u64) -> Result<(), Refusal> {
        let read = self.data.read_exact_at(buffer, offset);
        self.check_data()?;
        read.map_err(|e| self.failed("read", e))
    }

    pub(super) fn check_data(&self) -> Result<(), Refusal> {
        // Not `File::metadata`: its statx(2) costs a quarter more.
        let stat = rustix::fs::fstat(&self.data).map_err(|e| self.failed("fstat", e.into()))?;
        // A second link would hide that rclone has unlinked its own.
        if stat.st_nlink != 1 {
            return Err(changed("was unlinked"));
        }
        if stat.st_size as u64 != self.proof.size {
            return Err(changed("has another size"));
        }
        Ok(())
    }

    fn failed(&self, call: &str, error: io::Error) -> Refusal {
        Refusal::new(
            Reason::IoError,
            format!("{call} of `{}`: {error}", self.path.display()),
        )
    }
}

/// Whether FUSE answers so because nobody serves the mount any more.
fn is_without_daemon(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, NotConnected};
    matches!(error.kind(), NotConnected | ConnectionAborted)
}

pub(super) fn changed(what: &str) -> Refusal {
    Refusal::new(Reason::Changed, format!("the cache file {what}"))
}
