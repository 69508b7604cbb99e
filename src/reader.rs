//! Files that read from rclone's cache where it is proven, and through FUSE
//! where it is not.

mod buffer;
mod companion;
#[cfg(feature = "mount")]
mod edition;
mod epoch;
mod explain;
mod lease;
mod options;
mod origin;
mod prove;
mod pulled;
mod remote;
mod state;
mod stats;
mod verify;
mod whole;

use std::fmt;
use std::io::{self, BufRead, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use arc_swap::ArcSwap;
#[cfg(feature = "mount")]
pub(crate) use edition::Edition;
pub use explain::Explanation;
pub(crate) use lease::Proven;
pub use options::BypassOptions;
pub use stats::ReadStats;

use crate::cache::ranges::Span;
use crate::optin::{self, OptIn};
use crate::reason::{Reason, Refusal};
use buffer::ReadAhead;
use companion::Companion;
use epoch::{Epoch, Outcome};
use remote::Via;
pub(crate) use remote::{by_either, is_root};
use state::{RETRY_AFTER, State, never, state_of};
use stats::Counters;
pub use verify::Verify;
use verify::{Verdict, Verifier};
pub(crate) use whole::{Shown, Vigil, WholeClip};

/// States that one read looks at before it goes through FUSE: a proof that
/// has ended, what came in its place, and once more.
const STATES_PER_READ: u32 = 4;
/// Nothing was read through FUSE yet.
const NOT_PULLED: u64 = u64::MAX;

/// A file on an rclone mount that is read past FUSE where that is proven to
/// give the same bytes.
///
/// It holds a *companion*, the file opened through FUSE, which checks
/// permissions, keeps rclone aware of the reader and serves every byte that is
/// not proven; and, where the cache has the clip, the cache's own file. Any
/// path may be opened: on other file systems, and wherever something is in
/// doubt, every read simply goes through the companion, and
/// [`refusal`](Self::refusal) says why.
///
/// ```no_run
/// use std::io::Read;
/// use vmafx_bypass::BypassFile;
///
/// # fn main() -> std::io::Result<()> {
/// let mut clip = BypassFile::open("/rclone-mount/clip.y4m")?;
/// let mut bytes = Vec::new();
/// clip.read_to_end(&mut bytes)?;
/// let stats = clip.stats();
/// eprintln!("{} bytes from the cache, {} through FUSE", stats.cache_bytes, stats.fuse_bytes());
/// if let Some(refusal) = clip.refusal() {
///     eprintln!("not bypassed now: {refusal}; {}", refusal.reason.remedy());
/// }
/// # Ok(())
/// # }
/// ```
///
/// [`read_at`](Self::read_at) takes `&self`: any number of threads may read at
/// once. [`Read`] and [`Seek`] have a position, and a buffer that makes small
/// sequential reads cheap; [`BufRead`] lends it.
pub struct BypassFile {
    companion: Companion,
    /// Who may prove it, if we may not.
    via: Via,
    state: ArcSwap<State>,
    /// Held while a proof is gathered, so that one thread does it.
    proving: Mutex<()>,
    /// Proofs in a row that could not be had.
    failures: AtomicU32,
    /// An offset that was read through FUSE, so that rclone has it;
    /// [`NOT_PULLED`] at first.
    pulled: AtomicU64,
    verifier: Verifier,
    /// Counts the states: what was read ahead under an older one is dropped.
    generation: AtomicU64,
    counters: Counters,
    position: u64,
    ahead: ReadAhead,
}

impl BypassFile {
    /// Opens a file for reading. Where its cache may not be opened, a handover
    /// server is asked, if `VMAFX_BYPASS_SOCKET` names one; see
    /// [`BypassOptions`].
    ///
    /// # Errors
    /// Those of open(2) on the path itself. That it cannot be bypassed is no error.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        BypassOptions::new().open(path)
    }

    /// Takes a descriptor that the caller has opened through FUSE, and reads
    /// past FUSE from now on. The descriptor's own offset and flags are neither
    /// used nor changed; where it was open already, its file is opened anew.
    ///
    /// # Errors
    /// Where the descriptor is not of a regular file that is open for reading.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        BypassOptions::new().from_fd(fd)
    }

    /// Opens a file to be read through FUSE alone, for comparison.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub fn open_fuse_only(path: impl AsRef<Path>) -> io::Result<Self> {
        let companion = Companion::open(path.as_ref())?;
        let refusal = Refusal::new(Reason::Disabled, "the caller asked for fuse alone");
        Ok(Self::unproven(companion, Via::default(), refusal))
    }

    fn new(companion: Companion, via: Via) -> Self {
        if optin::from_env() == OptIn::Killed {
            let refusal = Refusal::new(Reason::Disabled, format!("{}=0", optin::VARIABLE));
            return Self::unproven(companion, via, refusal);
        }
        Self::proven(companion, via)
    }

    /// Also where the opt-in switches every bypass off.
    fn proven(companion: Companion, via: Via) -> Self {
        let failures = AtomicU32::new(0);
        let state = state_of(&companion, &via, None, &failures);
        Self::with_state(companion, via, state, failures)
    }

    fn unproven(companion: Companion, via: Via, refusal: Refusal) -> Self {
        Self::with_state(companion, via, never(refusal), AtomicU32::new(0))
    }

    fn with_state(companion: Companion, via: Via, state: State, failures: AtomicU32) -> Self {
        Self {
            companion,
            via,
            state: ArcSwap::from_pointee(state),
            proving: Mutex::new(()),
            failures,
            pulled: AtomicU64::new(NOT_PULLED),
            verifier: Verifier::default(),
            generation: AtomicU64::new(0),
            counters: Counters::default(),
            position: 0,
            ahead: ReadAhead::default(),
        }
    }

    /// The file's absolute path, without symlinks.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.companion.path()
    }

    /// The file's size as FUSE shows it now, bytes.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn size(&self) -> io::Result<u64> {
        Ok(self.companion.metadata()?.len())
    }

    /// Why reads go through FUSE at the moment; `None` while proven ranges are
    /// read from the cache.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        match &**self.state.load() {
            State::Active(_) => None,
            State::Fuse { refusal, .. } => Some(refusal.clone()),
        }
    }

    /// Bytes of the file that the current proof covers; 0 while there is none.
    #[must_use]
    pub fn proven_bytes(&self) -> u64 {
        match &**self.state.load() {
            State::Active(epoch) => epoch.proven_bytes(),
            State::Fuse { .. } => 0,
        }
    }

    /// Has the kernel read further ahead where the cache file is not in memory: for
    /// who reads in order by [`read_at`](Self::read_at). [`Read`] and [`BufRead`] do it
    /// by themselves.
    pub fn advise_in_order(&self) {
        if let State::Active(epoch) = &**self.state.load() {
            epoch.advise_in_order();
        }
    }

    /// Whether bytes may be kept for a while once they were read.
    fn may_read_ahead(&self) -> bool {
        match &**self.state.load() {
            State::Active(epoch) => !epoch.is_writable(),
            State::Fuse { .. } => false,
        }
    }

    /// Where the cache file can be opened from here, for display and for
    /// measuring; reading it gives none of this type's guarantees. `None`
    /// while there is no proof.
    #[must_use]
    pub fn cache_path(&self) -> Option<PathBuf> {
        match &**self.state.load() {
            State::Active(epoch) => Some(epoch.cache_path().to_path_buf()),
            State::Fuse { .. } => None,
        }
    }

    /// What was read so far, and by which way.
    #[must_use]
    pub fn stats(&self) -> ReadStats {
        ReadStats {
            verified_bytes: self.verifier.verified_bytes(),
            ..self.counters.snapshot()
        }
    }

    /// Compares what is read from the cache with FUSE's bytes from now on. A
    /// difference that stays yields FUSE's bytes and takes the file out of the
    /// bypass, for the whole process; a second such file ends every bypass in
    /// it. Both are [`Reason::Quarantined`].
    #[must_use]
    pub fn verifying(mut self, verify: Verify) -> Self {
        self.verifier = Verifier::new(verify);
        self
    }

    /// Where the first byte was found that the cache had otherwise than FUSE.
    #[must_use]
    pub fn mismatch(&self) -> Option<u64> {
        self.verifier.mismatch()
    }

    /// Reads at an offset, whichever ranges it crosses, until `buffer` is full
    /// or the file ends. Returns the bytes read.
    ///
    /// # Errors
    /// Those of reading through FUSE, where nothing was read before the error.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        // No file goes beyond: pread(2) would answer EINVAL.
        let limit = (i64::MAX as u64).saturating_sub(offset);
        let length = buffer
            .len()
            .min(usize::try_from(limit).unwrap_or(usize::MAX));
        let buffer = &mut buffer[..length];
        let mut done = 0;
        while done < buffer.len() {
            match self.read_once(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                // The bytes before it are good; the next call meets it again.
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// Reads from one range: proven, or not.
    fn read_once(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        // No file goes beyond: pread(2) would answer EINVAL.
        let limit = (i64::MAX as u64).saturating_sub(offset);
        let length = buffer
            .len()
            .min(usize::try_from(limit).unwrap_or(usize::MAX));
        let buffer = &mut buffer[..length];
        if buffer.is_empty() {
            return Ok(0);
        }
        match self.read_proven(buffer, offset) {
            Outcome::Cache(n) => {
                self.counters.add_cache(n);
                Ok(n)
            }
            Outcome::Fuse(n, reason) => self.read_fuse(&mut buffer[..n], offset, reason),
        }
    }

    /// Reads through FUSE, which brings a missing range into the cache.
    fn read_fuse(&self, buffer: &mut [u8], offset: u64, reason: Reason) -> io::Result<usize> {
        let before = self.state.load_full();
        let n = if reason.is_benign() {
            self.companion.read_without_ahead(buffer, offset)?
        } else {
            self.companion.read_at(buffer, offset)?
        };
        self.counters.add_fuse(n, reason);
        if n == 0 {
            return Ok(0);
        }
        match &*before {
            State::Active(epoch) if reason == Reason::Partial => {
                let end = offset + n as u64;
                epoch.pulled(Span { start: offset, end });
            }
            State::Active(_) => {}
            State::Fuse { refusal, .. } => {
                let first = self.pulled.swap(offset, Ordering::Relaxed) == NOT_PULLED;
                // Now that rclone has some of the clip, a proof may be had,
                // and what is pulled from now on is known to be there.
                if first && refusal.reason == Reason::NoMetadata {
                    self.prove_again(&before);
                }
            }
        }
        Ok(n)
    }

    /// Reads at most one proven range; nothing through FUSE, but to verify.
    fn read_proven(&self, buffer: &mut [u8], offset: u64) -> Outcome {
        for _ in 0..STATES_PER_READ {
            let state = self.state.load();
            let epoch = match &**state {
                State::Active(epoch) => epoch,
                State::Fuse { refusal, again } => {
                    let due = again.is_some_and(|again| Instant::now() >= again);
                    if due && self.prove_again(&state) {
                        continue;
                    }
                    return Outcome::Fuse(buffer.len(), refusal.reason);
                }
            };
            match self.read_verified(epoch, buffer, offset) {
                Ok(outcome) => return outcome,
                Err(refusal) => {
                    // At once for a new proof, since a metadata file that was
                    // merely rewritten is the common case; but one that lasted
                    // less than the interval waits as long.
                    let again = (refusal.reason != Reason::Quarantined)
                        .then(|| epoch.since() + RETRY_AFTER);
                    let ended = Arc::new(State::Fuse { refusal, again });
                    // Before, for who reads by the new state; and after, for who
                    // has begun to read ahead by the old one.
                    self.generation.fetch_add(1, Ordering::Release);
                    // Where it fails, another thread has seen the end, too.
                    self.state.compare_and_swap(&*state, ended);
                    self.generation.fetch_add(1, Ordering::Release);
                }
            }
        }
        Outcome::Fuse(buffer.len(), Reason::Changed)
    }

    /// Reads under a proof, and compares with FUSE what is to be verified.
    fn read_verified(
        &self,
        epoch: &Epoch,
        buffer: &mut [u8],
        offset: u64,
    ) -> Result<Outcome, Refusal> {
        verify::check_quarantine(epoch.key())?;
        let outcome = epoch.read(buffer, offset, &self.companion)?;
        let Outcome::Cache(n) = outcome else {
            return Ok(outcome);
        };
        match self
            .verifier
            .verify(&buffer[..n], offset, epoch, &self.companion)?
        {
            Verdict::Same => Ok(outcome),
            Verdict::Unknown => Ok(Outcome::Fuse(n, Reason::IoError)),
        }
    }

    /// Gathers another proof in place of `old`, unless another thread is at
    /// it, which is not waited for. Whether the state has changed.
    fn prove_again(&self, old: &Arc<State>) -> bool {
        let Ok(_proving) = self.proving.try_lock() else {
            return false;
        };
        if Arc::ptr_eq(&self.state.load(), old) {
            let pulled = self.pulled.load(Ordering::Relaxed);
            let pulled = (pulled != NOT_PULLED).then_some(pulled);
            let state = state_of(&self.companion, &self.via, pulled, &self.failures);
            self.generation.fetch_add(1, Ordering::Release);
            self.state.store(Arc::new(state));
        }
        true
    }
}

impl Read for BypassFile {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        let mut ahead = std::mem::take(&mut self.ahead);
        let result = ahead.read(self, out, self.position);
        self.ahead = ahead;
        let n = result?;
        self.position += n as u64;
        Ok(n)
    }
}

/// Without a copy: what is read ahead is lent as it is. Bytes that were lent are of
/// the moment when they were read, at most 20 ms before the call that lent them.
impl BufRead for BypassFile {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let mut ahead = std::mem::take(&mut self.ahead);
        let result = ahead.have(self, self.position);
        self.ahead = ahead;
        result?;
        Ok(self.ahead.rest(self.position))
    }

    fn consume(&mut self, n: usize) {
        let n = n.min(self.ahead.rest(self.position).len());
        let mut ahead = std::mem::take(&mut self.ahead);
        ahead.used(self, self.position, n);
        self.ahead = ahead;
        self.position += n as u64;
    }
}

impl Seek for BypassFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(delta) => self.position.checked_add_signed(delta),
            SeekFrom::End(delta) => self.size()?.checked_add_signed(delta),
        };
        self.position = target.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "seek to a negative or overflowing position",
            )
        })?;
        Ok(self.position)
    }
}

impl fmt::Debug for BypassFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BypassFile")
            .field("path", &self.path())
            .field("refusal", &self.refusal())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_send_sync<T: Send + Sync>() {}

    #[test]
    fn is_send_and_sync() {
        assert_send_sync::<BypassFile>();
    }

    #[test]
    fn a_local_file_is_read_plainly() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let content: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let mut file = BypassFile::open(&path).unwrap();
        assert_eq!(file.refusal().unwrap().reason, Reason::NotFuse);
        let mut read = Vec::new();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, content);
        let mut some = [0; 10];
        assert_eq!(file.read_at(&mut some, 99_995).unwrap(), 5);
        assert_eq!(file.read_at(&mut some, 100_000).unwrap(), 0);
        for far in [i64::MAX as u64 - 5, i64::MAX as u64, u64::MAX] {
            assert_eq!(file.read_at(&mut some, far).unwrap(), 0);
        }
        assert_eq!(file.read_at(&mut [], 0).unwrap(), 0);
        assert_eq!(file.seek(SeekFrom::End(-3)).unwrap(), 99_997);
        assert_eq!(file.read(&mut some).unwrap(), 3);
        assert_eq!(some[..3], content[99_997..]);
        assert!(file.seek(SeekFrom::Current(-200_000)).is_err());
        let stats = file.stats();
        assert_eq!(stats.cache_bytes, 0);
        assert_eq!(stats.fuse_bytes(), 100_008);
    }

    #[test]
    fn folders_and_missing_files_are_errors() {
        assert!(BypassFile::open("/").is_err());
        assert!(BypassFile::open("/no/such/file").is_err());
    }
}
