//! What is open.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use fuser::FileType;

use super::nodes::Pages;
use super::shared::lock;
use crate::BypassFile;
use crate::reader::Edition;

/// A clip that is read by ranges with cached pages: all that are read into them
/// have to be of one version.
pub(super) struct Paged {
    pub(super) file: BypassFile,
    pub(super) edition: Edition,
    /// The file's generation up to which its bytes are known to be of the edition.
    pub(super) generation: AtomicU64,
    /// Shared by all that have the node open.
    pub(super) pages: Arc<Pages>,
    /// Whether the kernel was to drop them.
    pub(super) drops: bool,
}

impl Paged {
    /// Fills the buffer, which does not go beyond the end.
    ///
    /// # Errors
    /// Those of the source; ESTALE where the clip has become another version.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.drops {
            self.pages.were_dropped();
        }
        let before = self.file.fuse_bytes();
        let n = self.file.read_at(buffer, offset)?;
        if self.file.fuse_bytes() != before {
            // While a clip changes, rclone's own mount has pages that are of neither
            // version, zeros too, until somebody opens the clip: nor do ours last.
            self.pages.taint();
        }
        self.check()?;
        if n == buffer.len() {
            return Ok(());
        }
        // Less is what was read before an error, which comes again; or an end that
        // is none of this version's, which the kernel would believe.
        self.file.read_at(&mut buffer[n..], offset + n as u64)?;
        Err(io::Error::from_raw_os_error(nix::libc::ESTALE))
    }

    /// Whether what was read just now was of the edition. Also what came through
    /// FUSE: before anyone gets a newer version there, the proof's file is unlinked.
    fn check(&self) -> io::Result<()> {
        if self.edition.is_certain()
            && self.file.generation() == self.generation.load(Ordering::Acquire)
            && self.file.is_proven_still()
        {
            return Ok(());
        }
        let (now, generation) = self.file.edition()?;
        if now == self.edition && now.is_certain() {
            self.generation.store(generation, Ordering::Release);
            return Ok(());
        }
        self.pages.taint();
        if now.is_same_version(&self.edition) {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(nix::libc::ESTALE))
    }
}

/// An entry of a folder.
pub(super) struct Entry {
    pub(super) name: OsString,
    pub(super) ino: u64,
    pub(super) kind: FileType,
}

/// An open file or folder.
pub(super) enum Open {
    /// Read by the kernel.
    Whole,
    Paged(Paged),
    /// Read as asked for, each time.
    Direct(BypassFile),
    /// As it was listed when it was read from its start.
    Folder(Mutex<Option<Arc<[Entry]>>>),
}

impl Open {
    pub(super) fn file(&self) -> Option<&BypassFile> {
        match self {
            Self::Paged(paged) => Some(&paged.file),
            Self::Direct(file) => Some(file),
            Self::Whole | Self::Folder(_) => None,
        }
    }
}

/// All of it, by the numbers that the kernel was given.
#[derive(Default)]
pub(super) struct Opens {
    next: AtomicU64,
    all: RwLock<HashMap<u64, Arc<Open>>>,
}

impl Opens {
    pub(super) fn add(&self, open: Open) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        all.insert(number, Arc::new(open));
        number
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<Open>> {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        all.get(&number).cloned()
    }

    /// Removes one; `count` sees it while nobody [looks](Self::look), who would else
    /// count it twice or not at all.
    pub(super) fn remove(&self, number: u64, count: impl FnOnce(&Open)) -> Option<Arc<Open>> {
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        let removed = all.remove(&number);
        if let Some(open) = &removed {
            count(open);
        }
        removed
    }

    /// Looks at all of them while none is removed.
    pub(super) fn look<T>(&self, look: impl FnOnce(&mut dyn Iterator<Item = &Open>) -> T) -> T {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        look(&mut all.values().map(Arc::as_ref))
    }
}

/// Who was told to look a name up again, and does so once.
#[derive(Default)]
pub(super) struct Retries(Mutex<HashMap<(u32, Arc<Path>), Instant>>);

/// The kernel comes back at once.
const COMES_BACK_WITHIN: Duration = Duration::from_secs(1);
/// Threads that have not come back are forgotten from so many on.
const MANY: usize = 256;

impl Retries {
    /// Notes that a thread is told.
    pub(super) fn add(&self, thread: u32, path: &Arc<Path>) {
        let mut all = lock(&self.0);
        if all.len() >= MANY {
            all.retain(|_, at| at.elapsed() < COMES_BACK_WITHIN);
        }
        all.insert((thread, Arc::clone(path)), Instant::now());
    }

    /// Whether a thread was told.
    pub(super) fn has(&self, thread: u32, path: &Path) -> bool {
        let all = lock(&self.0);
        !all.is_empty()
            && all
                .get(&(thread, path.into()))
                .is_some_and(|at| at.elapsed() < COMES_BACK_WITHIN)
    }

    /// Whether a thread comes back.
    pub(super) fn take(&self, thread: u32, path: &Arc<Path>) -> bool {
        let mut all = lock(&self.0);
        all.remove(&(thread, Arc::clone(path)))
            .is_some_and(|at| at.elapsed() < COMES_BACK_WITHIN)
    }
}

/// Threads that may wait for a snapshot at once; others have to go on serving.
pub(super) struct Seats {
    free: Mutex<usize>,
    given_back: Condvar,
}

/// One of them.
pub(super) struct Seat<'a>(&'a Seats);

impl Seats {
    pub(super) fn new(seats: usize) -> Self {
        Self {
            free: Mutex::new(seats),
            given_back: Condvar::new(),
        }
    }

    /// `None` where all are taken.
    pub(super) fn take(&self) -> Option<Seat<'_>> {
        let mut free = lock(&self.free);
        *free = free.checked_sub(1)?;
        Some(Seat(self))
    }

    /// Waits for one.
    pub(super) fn wait(&self) -> Seat<'_> {
        let free = lock(&self.free);
        let free = self.given_back.wait_while(free, |free| *free == 0);
        *free.unwrap_or_else(PoisonError::into_inner) -= 1;
        Seat(self)
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        *lock(&self.0.free) += 1;
        self.0.given_back.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_comes_back_once() {
        let retries = Retries::default();
        let path: Arc<Path> = Path::new("a").into();
        let other: Arc<Path> = Path::new("b").into();
        assert!(!retries.take(1, &path));
        retries.add(1, &path);
        assert!(!retries.take(2, &path) && !retries.take(1, &other));
        assert!(retries.has(1, &path) && !retries.has(2, &path));
        assert!(retries.take(1, &path));
        assert!(!retries.take(1, &path) && !retries.has(1, &path));
    }

    #[test]
    fn nobody_looks_between_a_removal_and_its_count() {
        let opens = Opens::default();
        let number = opens.add(Open::Whole);
        let (seen, looked) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let removed = opens.remove(number, |_| {
                scope.spawn(|| seen.send(opens.look(|all| all.count())));
                let early = looked.recv_timeout(Duration::from_millis(50));
                assert!(early.is_err(), "looked before it was counted");
            });
            assert!(removed.is_some());
            assert_eq!(looked.recv(), Ok(0));
        });
    }

    #[test]
    fn seats_are_given_back() {
        let seats = Seats::new(1);
        let seat = seats.take();
        assert!(seat.is_some() && seats.take().is_none());
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| drop(seats.wait()));
            drop(seat);
            waits.join().unwrap();
        });
        assert!(seats.take().is_some());
    }
}
