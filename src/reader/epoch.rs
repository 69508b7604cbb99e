//! One proof's life: the ranges that may be read from one data file while one
//! version of the metadata holds.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::companion::Companion;
use crate::cache::proof::{Proof, Timestamp};
use crate::cache::ranges::{Place, Span, place};
use crate::cache::rclone::MetadataFile;
use crate::reason::{Reason, Refusal};
use crate::sys::coarse_ms;

/// A range is checked for holes, and the metadata looked at again, in pieces of
/// this size, bytes. Just after an open, when the metadata is fresh and has to
/// be read and not only looked at, a piece costs 12 us.
const WINDOW: u64 = 16 << 20;
/// The metadata is looked at again after this long, milliseconds.
const RECHECK_MS: u64 = 1_000;

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
    size: u64,
    modified: Timestamp,
    bytes: u64,
    pieces: Box<[Span]>,
    checked: Box<[AtomicU8]>,
    metadata: Mutex<MetadataFile>,
    /// When all was last seen unchanged, [`coarse_ms`].
    seen_ms: AtomicU64,
    since: Instant,
}

impl Epoch {
    pub(super) fn new(proof: Proof, data: File, metadata: MetadataFile, path: PathBuf) -> Self {
        let pieces = proof.ranges.pieces(WINDOW).into_boxed_slice();
        Self {
            data,
            path,
            size: proof.size,
            modified: proof.modified,
            bytes: proof.ranges.bytes(),
            checked: pieces.iter().map(|_| AtomicU8::new(UNCHECKED)).collect(),
            pieces,
            metadata: Mutex::new(metadata),
            seen_ms: AtomicU64::new(coarse_ms()),
            since: Instant::now(),
        }
    }

    pub(super) fn proven_bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn cache_path(&self) -> &Path {
        &self.path
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
        let limit =
            |end: u64| usize::try_from(end - offset).map_or(buffer.len(), |n| n.min(buffer.len()));
        let index = match place(&self.pieces, offset) {
            Place::In(index) => index,
            // Beyond the end only FUSE knows whether the file has grown.
            Place::Before(next) => return Ok(Outcome::Fuse(limit(next), Reason::Partial)),
        };
        if !self.check(index, companion)? {
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
        self.pread(&mut buffer[..length], offset)?;
        Ok(Outcome::Cache(length))
    }

    /// Whether a piece may be read; an error where the proof has ended.
    fn check(&self, index: usize, companion: &Companion) -> Result<bool, Refusal> {
        if coarse_ms().saturating_sub(self.seen_ms.load(Ordering::Relaxed)) >= RECHECK_MS {
            self.check_again(companion)?;
        }
        let state = self.checked[index].load(Ordering::Acquire);
        if state != UNCHECKED {
            return Ok(state == PRESENT);
        }
        self.check_metadata()?;
        let span = self.pieces[index];
        let hole = match lseek(&self.data, span.start as i64, Whence::SeekHole) {
            Ok(hole) => hole as u64,
            // Beyond the end: the file was cut.
            Err(Errno::ENXIO) => return Err(changed("was truncated")),
            Err(e) => return Err(self.failed("lseek", e.into())),
        };
        let present = hole >= span.end;
        let state = if present { PRESENT } else { HAS_HOLE };
        self.checked[index].store(state, Ordering::Release);
        Ok(present)
    }

    /// What is looked at once a second: the metadata, and FUSE's own view,
    /// which may have become another's without the cache having been touched.
    fn check_again(&self, companion: &Companion) -> Result<(), Refusal> {
        let now = coarse_ms();
        self.check_metadata()?;
        // An error means that the daemon is gone. What it had proven stays
        // true as long as nobody touches the metadata or the data file.
        if let Ok(fuse) = companion.metadata()
            && (fuse.len() != self.size || Timestamp::modified(&fuse) != self.modified)
        {
            return Err(changed("is behind what FUSE shows"));
        }
        self.seen_ms.store(now, Ordering::Relaxed);
        Ok(())
    }

    fn check_metadata(&self) -> Result<(), Refusal> {
        let mut metadata = self.metadata.lock().unwrap_or_else(PoisonError::into_inner);
        if !metadata.unchanged() {
            return Err(changed("has new metadata"));
        }
        Ok(())
    }

    /// Fills the buffer from the data file, and only then looks whether it was
    /// still the clip's: a linked inode's present bytes are never rewritten on
    /// a read-only mount, an unlinked one's may be, in place.
    fn pread(&self, buffer: &mut [u8], offset: u64) -> Result<(), Refusal> {
        let read = self.data.read_exact_at(buffer, offset);
        // Not `File::metadata`: its statx(2) costs a quarter more.
        let stat = rustix::fs::fstat(&self.data).map_err(|e| self.failed("fstat", e.into()))?;
        // A second link would hide that rclone has unlinked its own.
        if stat.st_nlink != 1 {
            return Err(changed("was unlinked"));
        }
        if stat.st_size as u64 != self.size {
            return Err(changed("has another size"));
        }
        read.map_err(|e| self.failed("read", e))
    }

    fn failed(&self, call: &str, error: io::Error) -> Refusal {
        Refusal::new(
            Reason::IoError,
            format!("{call} of `{}`: {error}", self.path.display()),
        )
    }
}

fn changed(what: &str) -> Refusal {
    Refusal::new(Reason::Changed, format!("the cache file {what}"))
}
