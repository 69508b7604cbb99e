//! Whole clips, handed over as descriptors whose bytes never change.
//!
//! Whoever gets a descriptor of the cache file itself cannot check after each
//! read whether the file still is the clip's; and rclone, when a clip changes at
//! the remote while anyone has it open, writes the new bytes into the old,
//! unlinked file. So a clip is handed over as a *snapshot*: a reflink beside
//! the cache file, or a copy in memory that nobody can change. See `docs/SEMANTICS.md`.

mod copy;
mod huge;
mod live;
mod map;
mod memory;
mod reflink;
mod store;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags};

use crate::cache::proof::Timestamp;
use crate::optin::{self, OptIn};
use crate::reader::{Shown, Vigil, WholeClip};
use crate::reason::{Reason, Refusal};
pub use map::Mapped;
pub use reflink::has_reflinks;
pub(crate) use store::descriptors;
use store::{Charge, Slot, Store};

/// rclone itself is asked again whether a clip is still the same after this
/// long, milliseconds.
const PROVE_AGAIN_MS: u64 = 1_000;

/// How a whole clip is handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotMode {
    /// As a reflink where the cache's file system can, else as a copy in memory.
    Auto,
    /// The same; whoever asks for it takes no other way where that fails.
    Require,
    /// As a reflink alone: where there is none, nothing is handed over.
    Reflink,
    /// The cache file itself, while nobody else has it open: for remotes whose
    /// clips never change.
    Off,
}

/// What was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotKind {
    /// A file of its own, which shares the cache file's blocks.
    Reflink,
    /// A copy in memory that nobody can change.
    Copy,
    /// The cache file itself: its bytes may change when the remote's do.
    Live,
}

impl SnapshotKind {
    /// Every kind, in declaration order: the order of counters.
    pub const ALL: &'static [Self] = &[Self::Reflink, Self::Copy, Self::Live];

    /// The contract's name, `snake_case`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::Copy => "copy",
            Self::Live => "live",
        }
    }

    /// [`name`](Self::name) as C reads it.
    #[must_use]
    pub fn name_c(self) -> &'static CStr {
        match self {
            Self::Reflink => c"reflink",
            Self::Copy => c"copy",
            Self::Live => c"live",
        }
    }
}

/// A whole clip, handed over.
#[derive(Debug)]
pub struct Whole {
    /// An open file description of its own, read-only, close-on-exec, at offset 0.
    pub fd: OwnedFd,
    /// What it is of.
    pub kind: SnapshotKind,
    /// Bytes.
    pub size: u64,
    /// The clip's modification time, which its snapshot's file system may not have
    /// room for.
    #[cfg_attr(not(feature = "mount"), allow(dead_code))]
    pub(crate) modified: Timestamp,
    /// Whether the snapshot existed already.
    pub reused: bool,
}

/// How snapshots are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// Which kinds.
    pub mode: SnapshotMode,
    /// Bytes that copies may take at once. What was handed over counts
    /// as long as anyone has it open, also after its clip has changed.
    pub copy_budget: u64,
}

/// The snapshots of a process, one for each clip and version, shared by all
/// that open it.
///
/// A clip's snapshot is kept, with three descriptors, until the clip changes or
/// is evicted from rclone's cache, or others need its room. Descriptors that
/// were handed over stay valid whatever becomes of it.
///
/// ```no_run
/// use std::fs::File;
/// use std::os::fd::AsFd;
/// use vmafx_bypass::snapshot::{SnapshotMode, SnapshotOptions, Snapshots};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let snapshots = Snapshots::new(SnapshotOptions {
///     mode: SnapshotMode::Auto,
///     copy_budget: 4 << 30,
/// });
/// let clip = File::open("/rclone-mount/clip.y4m")?;
/// let whole = snapshots.open(clip.as_fd())?;
/// // Not needed any more: while it is open, rclone makes no new cache file.
/// drop(clip);
/// eprintln!("{} bytes as a {}", whole.size, whole.kind.name());
/// let clip = File::from(whole.fd);
/// # Ok(())
/// # }
/// ```
pub struct Snapshots {
    options: SnapshotOptions,
    /// Whether copies are of huge pages, where they can be.
    huge: bool,
    store: Store,
    /// Bytes of the copies that are being made.
    filling: AtomicU64,
}

/// A clip's snapshot, and what tells whether it is current.
struct Kept {
    vigil: Vigil,
    /// `None`: handed over as it is.
    object: Option<Object>,
}

/// What snapshots are descriptors of.
struct Object {
    /// Read-only; nobody has it open for writing.
    fd: OwnedFd,
    kind: SnapshotKind,
    /// Of a sealed copy: its room in the budget.
    charge: Option<Charge>,
}

impl Object {
    /// Bytes of memory.
    fn memory(&self) -> u64 {
        self.charge.as_ref().map_or(0, Charge::bytes)
    }

    /// Whether others have it open, as far as the kernel tells.
    fn in_use(&self) -> bool {
        crate::sys::is_open_elsewhere(&self.fd).unwrap_or(false)
    }

    /// Another description of it.
    fn open(&self) -> Result<OwnedFd, Refusal> {
        reopen(&self.fd)
            .map_err(|e| Refusal::new(Reason::IoError, format!("opening a snapshot anew: {e}")))
    }
}

impl Snapshots {
    /// None yet.
    #[must_use]
    pub fn new(options: SnapshotOptions) -> Self {
        Self {
            options,
            huge: false,
            store: Store::new(options.copy_budget),
            filling: AtomicU64::new(0),
        }
    }

    /// As [`new`](Self::new), with copies of huge pages where this process may mount
    /// (root): they are made and read in half the time, and mapped with one fault for 2
    /// MiB. They are not sealed, which a [handover](crate::handover) client would ask
    /// for: each is a file without a name on a read-only tmpfs that is mounted nowhere.
    /// Elsewhere copies are sealed, of small pages.
    #[must_use]
    pub fn of_huge_pages(options: SnapshotOptions) -> Self {
        Self {
            huge: true,
            ..Self::new(options)
        }
    }

    /// Hands a clip over, whole. `clip` is any descriptor of it: O_PATH, or
    /// opened read-only through FUSE. Whether whoever it is for may read the
    /// clip is for the caller to know.
    ///
    /// The bytes are those of the version that a program would read which
    /// opened the clip through FUSE now. Two that ask for one clip at once get
    /// one snapshot; nobody waits for another clip's.
    ///
    /// # Errors
    /// Why the clip is to be read through FUSE: it is not whole in the cache, or
    /// not proven to be the clip's; its mount is writable; there is no room.
    pub fn open(&self, clip: BorrowedFd<'_>) -> Result<Whole, Refusal> {
        if optin::from_env() == OptIn::Killed {
            let detail = format!("{}=0", optin::VARIABLE);
            return Err(Refusal::new(Reason::Disabled, detail));
        }
        self.store.sweep();
        let shown = Shown::by(clip)?;
        let slot = self.store.slot(&shown);
        let result = self.open_in(&slot, clip, &shown);
        self.store.leave(&shown, slot);
        result
    }

    /// Once a second at most: lets go of snapshots of clips that are gone, as each
    /// [`open`](Self::open) does.
    #[cfg(feature = "mount")]
    pub(crate) fn sweep(&self) {
        self.store.sweep();
    }

    /// As [`open`](Self::open), if that can be told without a proof, and without
    /// waiting for who makes one.
    #[cfg(feature = "mount")]
    pub(crate) fn current(&self, clip: BorrowedFd<'_>) -> Option<Whole> {
        if optin::from_env() == OptIn::Killed {
            return None;
        }
        let slot = self.store.find(&Shown::by(clip).ok()?)?;
        let kept = slot.try_lock()?;
        reuse(kept.as_ref()).ok()?
    }

    fn open_in(&self, slot: &Slot, clip: BorrowedFd<'_>, shown: &Shown) -> Result<Whole, Refusal> {
        let mut kept = slot.lock();
        if self.options.mode == SnapshotMode::Off {
            return live::open(&mut kept, clip, shown);
        }
        if let Some(whole) = reuse(kept.as_ref())? {
            return Ok(whole);
        }
        let proven = match WholeClip::prove(clip, shown.clone()) {
            Ok(proven) => proven,
            Err(refusal) => {
                // It may be well again later; but not from an unlinked file.
                if kept.as_ref().is_some_and(|k| !k.vigil.is_linked()) {
                    self.store.retire(kept.take());
                }
                return Err(refusal);
            }
        };
        if let Some(kept) = &mut *kept
            && kept.vigil.is_same(&proven)
            && let Some(object) = &kept.object
        {
            kept.vigil = proven.close();
            return whole(object, &kept.vigil, true);
        }
        self.store.retire(kept.take());
        let object = self.make(&proven)?;
        let vigil = proven.close();
        let whole = whole(&object, &vigil, false)?;
        *kept = Some(Kept {
            vigil,
            object: Some(object),
        });
        Ok(whole)
    }

    /// Makes a snapshot of a clip that is proven.
    fn make(&self, clip: &WholeClip) -> Result<Object, Refusal> {
        // Where it cannot be had, a copy needs nothing but memory.
        if let Some(fd) = reflink::of(clip)? {
            return Ok(Object {
                fd,
                kind: SnapshotKind::Reflink,
                charge: None,
            });
        }
        if self.options.mode == SnapshotMode::Reflink {
            let detail = "the cache's file system makes no reflink for us";
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        let size = clip.size();
        let charge = self.store.reserve(size)?;
        // Those that are being filled do not show in the available memory yet.
        let others = self.filling.fetch_add(size, Ordering::AcqRel);
        let filled = memory::check(size.saturating_add(others)).and_then(|()| self.copy(clip));
        self.filling.fetch_sub(size, Ordering::AcqRel);
        Ok(Object {
            fd: filled?,
            kind: SnapshotKind::Copy,
            charge: Some(charge),
        })
    }
}

impl Snapshots {
    /// A copy, of huge pages if they were asked for and are to be had.
    fn copy(&self, clip: &WholeClip) -> Result<OwnedFd, Refusal> {
        if self.huge
            && let Ok(tmpfs) = huge::tmpfs()
        {
            return huge::copy_of(clip, &tmpfs);
        }
        copy::of(clip)
    }
}

/// A snapshot that is current, if that can be told without asking rclone.
fn reuse(kept: Option<&Kept>) -> Result<Option<Whole>, Refusal> {
    let Some(kept) = kept else { return Ok(None) };
    let Some(object) = &kept.object else {
        return Ok(None);
    };
    if kept.vigil.age_ms() >= PROVE_AGAIN_MS || kept.vigil.check().is_err() {
        return Ok(None);
    }
    whole(object, &kept.vigil, true).map(Some)
}

fn whole(object: &Object, vigil: &Vigil, reused: bool) -> Result<Whole, Refusal> {
    let (size, modified) = vigil.version();
    Ok(Whole {
        fd: object.open()?,
        kind: object.kind,
        size,
        modified,
        reused,
    })
}

/// The same file, opened anew and read-only.
fn reopen(file: impl AsFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// What a snapshot's file shows of the clip besides its bytes: who may read it,
/// and its time.
fn dress(file: impl AsFd, clip: &WholeClip) -> Result<(), Refusal> {
    let failed = |call: &str, e: rustix::io::Errno| {
        Refusal::new(Reason::IoError, format!("{call} of a snapshot: {e}"))
    };
    let time = clip.modified();
    let time = rustix::fs::Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanos.into(),
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::futimens(&file, &times).map_err(|e| failed("futimens", e))?;
    // Its owner could open it for writing, by /proc, with any more.
    let mode = Mode::from_raw_mode(clip.permissions()? & 0o444 | 0o400);
    rustix::fs::fchmod(&file, mode).map_err(|e| failed("fchmod", e))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_send_sync<T: Send + Sync>() {}

    #[test]
    fn is_send_and_sync() {
        assert_send_sync::<Snapshots>();
    }

    #[test]
    fn what_is_no_clip_is_refused() {
        let snapshots = Snapshots::new(SnapshotOptions {
            mode: SnapshotMode::Auto,
            copy_budget: 1 << 20,
        });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "abc").unwrap();
        let reason = |file: &dyn AsRawFdOf| snapshots.open(file.get()).unwrap_err().reason;
        let read = std::fs::File::open(&path).unwrap();
        assert_eq!(reason(&read), Reason::NotFuse);
        let write = std::fs::File::options().append(true).open(&path).unwrap();
        assert_eq!(reason(&write), Reason::WriteOpen);
        let folder = std::fs::File::open(dir.path()).unwrap();
        assert_eq!(reason(&folder), Reason::Unsupported);
        let pipe = std::io::pipe().unwrap().0;
        assert_eq!(reason(&pipe), Reason::Unsupported);
        assert!(snapshots.store.is_empty());
    }

    trait AsRawFdOf {
        fn get(&self) -> BorrowedFd<'_>;
    }

    impl<T: AsFd> AsRawFdOf for T {
        fn get(&self) -> BorrowedFd<'_> {
            self.as_fd()
        }
    }
}
