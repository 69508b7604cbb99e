//! The check against FUSE itself: what no proof can replace.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::companion::Companion;
use super::epoch::{Epoch, Outcome};
use crate::reason::{Reason, Refusal};

/// How much of what is read from the cache is read through FUSE, too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verify {
    /// Nothing.
    #[default]
    Off,
    /// Up to 4 KiB of the first read from the cache and of every 64th.
    Sample,
    /// Every byte.
    Full,
}

/// One read in so many is sampled.
const SAMPLE_EVERY: u64 = 64;
/// Bytes of a sample.
const SAMPLE: usize = 4096;
/// Comparisons before a difference is one: a program may just be writing.
const TRIES: u32 = 3;

/// What came of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// No difference, or nothing was to be compared.
    Same,
    /// To be read through FUSE, for this reason: it does not answer, and its
    /// error is the caller's to see; or a program is changing the range.
    Fuse(Reason),
}

/// Compares a file's reads, and remembers what was found.
#[derive(Default)]
pub(super) struct Verifier {
    verify: Verify,
    reads: AtomicU64,
    verified: AtomicU64,
    mismatch: OnceLock<u64>,
}

impl Verifier {
    pub(super) fn new(verify: Verify) -> Self {
        Self {
            verify,
            ..Self::default()
        }
    }

    pub(super) fn verified_bytes(&self) -> u64 {
        self.verified.load(Ordering::Relaxed)
    }

    pub(super) fn mismatch(&self) -> Option<u64> {
        self.mismatch.get().copied()
    }

    /// Compares `bytes`, which the cache has at `offset`, with FUSE's, as much
    /// as is to be.
    ///
    /// An error: they differ for good, or the proof has ended meanwhile.
    pub(super) fn verify(
        &self,
        bytes: &[u8],
        offset: u64,
        epoch: &Epoch,
        companion: &Companion,
    ) -> Result<Verdict, Refusal> {
        let (start, length) = match self.verify {
            Verify::Off => return Ok(Verdict::Same),
            Verify::Full => (0, bytes.len()),
            Verify::Sample => {
                let count = self.reads.fetch_add(1, Ordering::Relaxed);
                if !count.is_multiple_of(SAMPLE_EVERY) {
                    return Ok(Verdict::Same);
                }
                let length = bytes.len().min(SAMPLE);
                // Somewhere in it, at another place each time.
                let places = (bytes.len() - length + 1) as u64;
                let place = (offset ^ count).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
                ((place % places) as usize, length)
            }
        };
        let offset = offset + start as u64;
        let mut cache = bytes[start..start + length].to_vec();
        let mut fuse = vec![0; length];
        let mut differs = 0;
        for _ in 0..TRIES {
            if read_whole(companion, &mut fuse, offset).is_err() {
                return Ok(Verdict::Fuse(Reason::IoError));
            }
            let Some(at) = cache.iter().zip(&fuse).position(|(a, b)| a != b) else {
                self.verified.fetch_add(length as u64, Ordering::Relaxed);
                return Ok(Verdict::Same);
            };
            differs = offset + at as u64;
            // The clip may have changed between the two reads.
            epoch.check_now(companion)?;
            // A store that is not flushed yet is in the kernel's pages alone.
            if let Outcome::Fuse(_, reason) = epoch.take(&mut cache, offset, companion)? {
                return Ok(Verdict::Fuse(reason));
            }
        }
        // Of several threads, the first to find one tells.
        let _ = self.mismatch.set(differs);
        quarantine(companion.path());
        Err(Refusal::new(
            Reason::Quarantined,
            format!(
                "`{}`: the cache and fuse differ at offset {differs}",
                companion.path().display()
            ),
        ))
    }
}

fn read_whole(companion: &Companion, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match companion.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}

/// Files in which a difference was found, in this process.
static QUARANTINED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// How many there are: every read asks.
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// So many end every bypass in the process.
const BREAKER: usize = 2;

fn quarantine(path: &Path) {
    let mut files = QUARANTINED.lock().unwrap_or_else(PoisonError::into_inner);
    if !files.iter().any(|file| file == path) {
        files.push(path.to_path_buf());
    }
    COUNT.store(files.len(), Ordering::Release);
}

/// Whether a file may still be bypassed in this process.
pub(super) fn check_quarantine(path: &Path) -> Result<(), Refusal> {
    let refuse = |detail| Err(Refusal::new(Reason::Quarantined, detail));
    match COUNT.load(Ordering::Acquire) {
        0 => Ok(()),
        count if count >= BREAKER => refuse(format!(
            "the cache and fuse differed in {count} files: nothing is bypassed any more"
        )),
        _ => {
            let files = QUARANTINED.lock().unwrap_or_else(PoisonError::into_inner);
            if files.iter().any(|file| file == path) {
                return refuse(format!(
                    "`{}`: the cache and fuse differed before",
                    path.display()
                ));
            }
            Ok(())
        }
    }
}
