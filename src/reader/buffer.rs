//! The buffer that makes small sequential reads cheap.

use std::io;
use std::sync::atomic::Ordering;

use super::BypassFile;
use super::epoch::Outcome;
use crate::aligned::AlignedBuffer;
use crate::sys::coarse_ms;

/// Bytes read ahead. Larger ones fall out of the CPU's second-level cache.
const CAPACITY: usize = 256 << 10;
/// Reads of at least this many bytes gain nothing: the copy costs them more than
/// a pread(2) and fstat(2) of their own. At 32 KiB the buffer gains a fifth, at
/// 64 KiB it loses a sixth.
const SMALL: usize = 64 << 10;
/// Bytes that `BufRead` reads at once where it does not go on from the last read,
/// and through FUSE: what nobody may want.
const UNASKED: usize = 64 << 10;
/// Buffered bytes are not returned once they are this old, milliseconds. A
/// program that reads fast has used them up long before; for one that reads
/// slowly, to read them again costs a thousandth of its time.
const MAX_AGE_MS: u64 = 20;

/// Bytes of the cache that were read ahead, each under its proof.
#[derive(Default)]
pub(super) struct ReadAhead {
    bytes: AlignedBuffer,
    /// File offset of the first byte.
    start: u64,
    /// Valid bytes.
    length: usize,
    filled_ms: u64,
    /// The file's state that it was read under.
    generation: u64,
    /// Where the last read ended: a read from there on is sequential.
    next: u64,
    /// Whether the bytes came through FUSE; they are counted then, and for
    /// `BufRead` alone.
    by_fuse: bool,
}

impl ReadAhead {
    /// Reads at `position`: from the buffer, by filling it, or directly.
    pub(super) fn read(
        &mut self,
        file: &BypassFile,
        out: &mut [u8],
        position: u64,
    ) -> io::Result<usize> {
        if self.generation != file.generation.load(Ordering::Acquire) {
            self.length = 0;
        }
        let mut n = if self.by_fuse {
            0
        } else {
            self.copy(out, position)
        };
        if n > 0 {
            file.counters.add_cache(n);
        } else {
            if position == self.next && position > 0 {
                file.advise_in_order();
            }
            if out.len() < SMALL
                && position == self.next
                && file.may_read_ahead()
                && self.fill(file, position, CAPACITY)
            {
                n = self.copy(out, position);
                file.counters.add_cache(n);
            }
            // Also where the disk took so long that what was read ahead is too
            // old by now: no byte of it is not the file's end.
            if n == 0 {
                n = file.read_once(out, position)?;
            }
        }
        self.next = position + n as u64;
        Ok(n)
    }

    /// Has bytes from `position` on, unless the file ends there: for
    /// [`rest`](Self::rest).
    pub(super) fn have(&mut self, file: &BypassFile, position: u64) -> io::Result<()> {
        if self.generation != file.generation.load(Ordering::Acquire) {
            self.length = 0;
        }
        if !self.rest(position).is_empty() && !self.is_old() {
            return Ok(());
        }
        let goes_on = position == self.next;
        if goes_on && position > 0 {
            file.advise_in_order();
        }
        let wanted = if goes_on { CAPACITY } else { UNASKED };
        if file.may_read_ahead() && self.fill(file, position, wanted) {
            return Ok(());
        }
        self.begin(file, position);
        self.by_fuse = true;
        // One range of it may be proven by now, and is counted as such.
        self.length = file.read_once(&mut self.bytes[..UNASKED], position)?;
        Ok(())
    }

    /// What there is from `position` on, however old.
    pub(super) fn rest(&self, position: u64) -> &[u8] {
        let skip = position.checked_sub(self.start).map(|n| n as usize);
        let rest = skip.and_then(|skip| self.bytes.get(skip..self.length));
        rest.unwrap_or_default()
    }

    /// So many bytes from `position` on were used.
    pub(super) fn used(&mut self, file: &BypassFile, position: u64, n: usize) {
        if !self.by_fuse {
            file.counters.add_cache(n);
        }
        self.next = position + n as u64;
    }

    fn is_old(&self) -> bool {
        coarse_ms().saturating_sub(self.filled_ms) >= MAX_AGE_MS
    }

    /// Copies what the buffer has from `position` on.
    fn copy(&self, out: &mut [u8], position: u64) -> usize {
        let rest = self.rest(position);
        if rest.is_empty() || self.is_old() {
            return 0;
        }
        let n = out.len().min(rest.len());
        out[..n].copy_from_slice(&rest[..n]);
        n
    }

    /// Empties it, to be filled at `position`.
    fn begin(&mut self, file: &BypassFile, position: u64) {
        if self.bytes.is_empty() {
            self.bytes = AlignedBuffer::new(CAPACITY);
        }
        self.length = 0;
        self.filled_ms = coarse_ms();
        self.generation = file.generation.load(Ordering::Acquire);
        self.start = position;
        self.by_fuse = false;
    }

    /// Fills the buffer if the cache is proven at `position`. What is not is
    /// left to FUSE in the caller's own sizes: to read ahead there could make
    /// rclone download what nobody asked for.
    fn fill(&mut self, file: &BypassFile, position: u64, wanted: usize) -> bool {
        self.begin(file, position);
        if let Outcome::Cache(n) = file.read_proven(&mut self.bytes[..wanted], position) {
            self.length = n;
        }
        self.length > 0
    }
}
