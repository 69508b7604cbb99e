//! The check against FUSE itself: what no proof can replace.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::companion::{self, Companion};
use super::epoch::Epoch;
use crate::cache::rclone::Daemon;
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
    /// FUSE does not answer: its error is the caller's to see.
    Unknown,
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
            if read_fuse(&mut fuse, offset, epoch, companion).is_err() {
                return Ok(Verdict::Unknown);
            }
            let Some(at) = cache.iter().zip(&fuse).position(|(a, b)| a != b) else {
                self.verified.fetch_add(length as u64, Ordering::Relaxed);
                return Ok(Verdict::Same);
            };
            differs = offset + at as u64;
            // The clip may have changed between the two reads.
            epoch.check_now(companion)?;
            epoch.read_again(&mut cache, offset)?;
        }
        // Of several threads, the first to find one tells.
        let _ = self.mismatch.set(differs);
        quarantine(epoch.key());
        epoch.tell_difference(differs, companion);
        Err(Refusal::new(
            Reason::Quarantined,
            format!(
                "`{}`: the cache and fuse differ at offset {differs}",
                companion.path().display()
            ),
        ))
    }
}

/// Reads what FUSE has. On a writable mount from rclone itself: the kernel's
/// pages may be newer, and reading them in would take the range from the bypass.
fn read_fuse(
    buffer: &mut [u8],
    offset: u64,
    epoch: &Epoch,
    companion: &Companion,
) -> io::Result<()> {
    let direct = epoch
        .is_writable()
        .then(|| companion.open_direct())
        .transpose()?;
    let mut done = 0;
    while done < buffer.len() {
        let (rest, at) = (&mut buffer[done..], offset + done as u64);
        let n = match &direct {
            Some(file) => companion::read_at(file, rest, at)?,
            None => companion.read_at(rest, at)?,
        };
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        done += n;
    }
    Ok(())
}

/// A file as its rclone has it, by whichever path: the daemon, and device and
/// inode of the superblock that it serves, which another may have after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileKey {
    /// `None` where it is hidden from us.
    daemon: Option<Daemon>,
    identity: (u64, u64),
}

impl FileKey {
    pub(super) fn new(daemon: Option<Daemon>, identity: (u64, u64)) -> Self {
        Self { daemon, identity }
    }

    /// Whether both may be of one file: a daemon that is hidden may be any.
    fn may_be(&self, other: &Self) -> bool {
        let (own, its) = (&self.daemon, &other.daemon);
        self.identity == other.identity && (own == its || own.is_none() || its.is_none())
    }

    /// The daemon's pid.
    pub(super) fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(|daemon| daemon.pid)
    }

    /// Device and inode, as FUSE shows them.
    pub(super) fn identity(&self) -> (u64, u64) {
        self.identity
    }
}

/// Files in which a difference was found, in this process.
static QUARANTINED: Mutex<Vec<FileKey>> = Mutex::new(Vec::new());
/// How many there are: every read asks.
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// So many end every bypass in the process.
const BREAKER: usize = 2;

fn quarantine(file: &FileKey) {
    let mut files = QUARANTINED.lock().unwrap_or_else(PoisonError::into_inner);
    if !files.iter().any(|found| found.may_be(file)) {
        files.push(file.clone());
    }
    COUNT.store(files.len(), Ordering::Release);
}

/// Whether a file may still be bypassed in this process.
pub(super) fn check_quarantine(file: &FileKey) -> Result<(), Refusal> {
    let refuse = |detail| Err(Refusal::new(Reason::Quarantined, detail));
    match COUNT.load(Ordering::Acquire) {
        0 => Ok(()),
        count if count >= BREAKER => refuse(format!(
            "the cache and fuse differed in {count} files: nothing is bypassed any more"
        )),
        _ => {
            let files = QUARANTINED.lock().unwrap_or_else(PoisonError::into_inner);
            if files.iter().any(|found| found.may_be(file)) {
                return refuse("the cache and fuse differed in this file before".into());
            }
            Ok(())
        }
    }
}
