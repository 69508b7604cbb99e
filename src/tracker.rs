//! Knows, host-wide, which descriptors on watched rclone mounts are open.
//!
//! BPF programs on tracepoints keep a hash map of `(pid, fd)` and tell user
//! space by ring buffer; one thread keeps a table from these events. What is
//! tracked: descriptors of regular files on a watched superblock, open for
//! reading or writing; no O_PATH, no folders.

mod abi;
mod account;
mod attach;
mod clock;
mod doctor;
mod host;
mod losses;
mod observer;
mod pinned;
mod reconcile;
mod session;
mod shared;
mod state;
pub mod table;
mod watch;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};

pub use abi::RawEvent;
pub(crate) use abi::libbpf_version;
pub use account::{Account, Accounts, ReadCost};
pub use attach::AttachMode;
pub use doctor::{Check, checks};
pub use losses::{Loss, Losses};
pub use observer::Observer;
pub use pinned::{Dump, DumpEntry, DumpError, Owner, dump};
pub use shared::{Subscription, Update};
pub use table::{Event, EventKind, TrackedFd};
pub use watch::{PrefixError, Watch};

use shared::{Command, EndSubscriptions, Shared};

use crate::mounts::Dev;
use crate::privileges::Capabilities;
use crate::sys::coarse_ms;

/// Where maps are pinned unless told otherwise.
pub const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/vmafx-bypass";

/// Why tracking could not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackerError {
    /// The host, or this process's rights, do not allow it.
    #[error("{0}")]
    Environment(String),
    /// A prefix is not on an rclone mount.
    #[error(transparent)]
    Prefix(#[from] PrefixError),
    /// Another live process owns the pins.
    #[error("`{}` is in use by pid {pid}: stop it, or choose another --pin-dir", dir.display())]
    InUse {
        /// The folder of the pins.
        dir: PathBuf,
        /// The owner.
        pid: u32,
    },
    /// A system call or libbpf failed.
    #[error("{0}")]
    Failed(String),
}

fn failed(what: &str, error: impl std::fmt::Display) -> TrackerError {
    TrackerError::Failed(format!("{what}: {error}"))
}

/// Takes a message of libbpf's.
pub type Log = fn(libbpf_rs::PrintLevel, String);

/// How to track.
#[derive(Debug, Clone)]
pub struct TrackerOptions {
    /// Folders on rclone mounts; descriptors below them are tracked.
    pub prefixes: Vec<PathBuf>,
    /// Start although a prefix is not mounted yet, and watch for it.
    pub allow_missing: bool,
    /// How to come to system calls; `None`: as costs the host least, of what
    /// works here.
    pub attach: Option<AttachMode>,
    /// Takes what libbpf says while it loads and attaches, the verifier's log of a
    /// program that was refused among it; `None`: nobody.
    pub log: Option<Log>,
    /// Pin the maps here, on a BPF file system; `None`: no pins, this process only.
    pub pin_dir: Option<PathBuf>,
    /// Descriptors tracked at once, at most.
    pub max_fds: u32,
    /// Size of the ring buffer, bytes: a power of two, and whole pages.
    pub ring_bytes: u32,
    /// Count reads through tracked descriptors, and the time they take.
    pub account: bool,
    /// Once attached, the tracking thread gives up every capability but these, and
    /// those that it goes on to need; `None`: it keeps all.
    pub keep: Option<Capabilities>,
}

impl TrackerOptions {
    /// Tracks below one prefix, without pins, with the defaults of `run`.
    pub fn new(prefix: impl Into<PathBuf>) -> Self {
        Self {
            prefixes: vec![prefix.into()],
            ..Self::default()
        }
    }
}

impl Default for TrackerOptions {
    fn default() -> Self {
        Self {
            prefixes: Vec::new(),
            allow_missing: false,
            attach: None,
            log: None,
            pin_dir: None,
            max_fds: 65_536,
            ring_bytes: 4 << 20,
            account: false,
            keep: None,
        }
    }
}

/// Tracks descriptors from its start until it is dropped.
///
/// Needs root, or CAP_BPF and CAP_PERFMON. The table lags the system calls by
/// the time that an event takes to this process, well under a millisecond;
/// [`flush`](Self::flush) waits for it.
///
/// ```no_run
/// use std::os::fd::{AsRawFd, OwnedFd};
/// use vmafx_bypass::{BypassFile, Tracker, TrackerOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let tracker = Tracker::start(TrackerOptions::new("/rclone-mount"))?;
///
/// // Some code opens a clip, as it always did …
/// let file = std::fs::File::open("/rclone-mount/clip.y4m")?;
///
/// // … and the worker turns the descriptor into a bypassed one, if it is on the mount.
/// tracker.flush()?;
/// if let Some(tracked) = tracker.lookup(std::process::id(), file.as_raw_fd() as u32) {
///     println!("{:?} has {} bytes", tracked.path, tracked.size);
///     let clip = BypassFile::from_fd(OwnedFd::from(file))?;
///     let mut first = [0; 4096];
///     clip.read_at(&mut first, 0)?;
/// }
/// # Ok(())
/// # }
/// ```
pub struct Tracker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), TrackerError>>>,
}

impl Tracker {
    /// Loads and attaches the BPF programs, and starts to track.
    ///
    /// # Errors
    /// Where the host or this process's rights do not allow it, a prefix is not
    /// on an rclone mount, or the pins are another's.
    pub fn start(options: TrackerOptions) -> Result<Self, TrackerError> {
        Self::start_subscribed(options).map(|(tracker, _)| tracker)
    }

    /// As [`start`](Self::start), with a subscription that misses no update.
    ///
    /// # Errors
    /// Likewise.
    pub fn start_subscribed(options: TrackerOptions) -> Result<(Self, Subscription), TrackerError> {
        let failed = |e| TrackerError::Failed(format!("eventfd: {e}"));
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_flags(flags).map_err(failed)?;
        let (commands, inbox) = mpsc::channel();
        let shared = Arc::new(Shared {
            table: RwLock::default(),
            watches: RwLock::default(),
            subscribers: Mutex::default(),
            lagged: AtomicU64::new(0),
            paths_full: AtomicU64::new(0),
            reconcile_failed: AtomicU64::new(0),
            healed: AtomicU64::new(0),
            events: AtomicU64::new(0),
            told: Default::default(),
            beat_ms: AtomicU64::new(coarse_ms()),
            ended: AtomicBool::new(false),
            recursion_misses: AtomicU64::new(0),
            read_misses: AtomicU64::new(0),
            read_programs: OnceLock::new(),
            replaced_pins: AtomicBool::new(false),
            mode: OnceLock::new(),
            refused: Mutex::default(),
            kernel: Mutex::default(),
            accounts: Mutex::default(),
            commands: Mutex::new(commands),
            wake,
        });
        let subscription = shared.subscribe();
        let (ready, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("vmafx-tracker".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || {
                    let _ended = EndSubscriptions(&shared);
                    session::run(&options, &shared, &inbox, &ready)
                }
            })
            .map_err(|e| TrackerError::Failed(format!("thread: {e}")))?;
        let mut tracker = Self {
            shared,
            thread: Some(thread),
        };
        match started.recv() {
            Ok(()) => Ok((tracker, subscription)),
            // It ended before it was ready.
            Err(_) => match tracker.join() {
                Err(error) => Err(error),
                Ok(()) => Err(TrackerError::Failed("the tracker ended at once".into())),
            },
        }
    }

    /// The descriptor `fd` of process `pid`, if it is open below a prefix.
    #[must_use]
    pub fn lookup(&self, pid: u32, fd: u32) -> Option<Arc<TrackedFd>> {
        self.shared.read_table().get(pid, fd)
    }

    /// Everything that is open below the prefixes, by pid and descriptor.
    #[must_use]
    pub fn entries(&self) -> Vec<Arc<TrackedFd>> {
        self.shared.read_table().entries()
    }

    /// Every update from now on. A subscriber that lags by 65,536 updates misses
    /// some, which [`losses`](Self::losses) counts.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        self.shared.subscribe()
    }

    /// Waits until every event that the kernel had sent is in the table.
    ///
    /// # Errors
    /// Where tracking has ended.
    pub fn flush(&self) -> Result<(), TrackerError> {
        self.shared.flush()
    }

    /// What got lost so far.
    #[must_use]
    pub fn losses(&self) -> Losses {
        self.shared.losses()
    }

    /// What reads cost so far; `None`: they are not counted
    /// ([`TrackerOptions::account`]).
    ///
    /// # Errors
    /// Where the maps cannot be read.
    pub fn accounts(&self) -> std::io::Result<Option<Accounts>> {
        self.shared.accounts()
    }

    /// What a process has read of a clip so far; `None`: nothing, or it is not
    /// counted.
    #[must_use]
    pub fn read_cost(&self, pid: u32, dev: Dev, ino: u64) -> Option<ReadCost> {
        self.shared.lock_accounts().as_ref()?.cost(pid, dev, ino)
    }

    /// Events received so far.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.shared.events.load(Ordering::Relaxed)
    }

    /// Whether pins of a process that had died were replaced.
    #[must_use]
    pub fn replaced_pins(&self) -> bool {
        self.shared.replaced_pins.load(Ordering::Relaxed)
    }

    /// How it has attached; `None` before it has.
    #[must_use]
    pub fn attach_mode(&self) -> Option<AttachMode> {
        self.shared.mode.get().copied()
    }

    /// The modes that were tried before and do not work here, and why.
    #[must_use]
    pub fn refused_modes(&self) -> Vec<(AttachMode, String)> {
        let refused = self.shared.refused.lock();
        refused.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether this process is in a pid namespace of its own: processes outside
    /// of it are not tracked, and pids are those of the namespace.
    #[must_use]
    pub fn in_pid_namespace(&self) -> bool {
        host::pid_namespace().is_some()
    }

    /// The mounts that are watched at the moment.
    #[must_use]
    pub fn watches(&self) -> Vec<Watch> {
        self.shared.watches()
    }

    /// A handle that reads from another thread, and for as long as it is kept.
    #[must_use]
    pub fn observer(&self) -> Observer {
        Observer(Arc::clone(&self.shared))
    }

    /// A handle that ends the tracking from another thread.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Ends the tracking, removes the pins and detaches: last, since in mode
    /// [`Fentry`](AttachMode::Fentry) that takes Linux 6.1 and 6.12 about 5 seconds;
    /// subscriptions end before it.
    ///
    /// # Errors
    /// Where the tracking had failed before, or the pins could not be removed.
    pub fn stop(mut self) -> Result<(), TrackerError> {
        self.shared.send(Command::Stop);
        self.join()
    }

    fn join(&mut self) -> Result<(), TrackerError> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        thread
            .join()
            .unwrap_or_else(|_| Err(TrackerError::Failed("the tracker's thread panicked".into())))
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.shared.send(Command::Stop);
        // `stop` reports what is dropped here.
        let _ = self.join();
    }
}

/// Ends a [`Tracker`]'s tracking, and with it every subscription.
#[derive(Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Asks for the end and does not wait for it.
    pub fn stop(&self) {
        self.0.send(Command::Stop);
    }
}
