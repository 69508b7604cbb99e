//! SIGINT and SIGTERM, taken by one thread so that the others can clean up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

use vmafx_bypass::privileges::{self, Capabilities};

use crate::exit::Exit;

/// How long a command that has nothing to show for it may take to clean up before
/// the process ends without.
const GRACE: Duration = Duration::from_secs(5);
/// A signal that follows so soon is the same one: timeout(1) sends it to the
/// process and to its group.
const SAME: Duration = Duration::from_millis(200);

/// Signals that are blocked and wait to be taken.
pub struct Signals {
    set: SigSet,
    before: SigSet,
    powerless: bool,
}

impl Signals {
    /// Blocks both signals in this thread and in all that it starts.
    pub fn block() -> Self {
        let set = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        // Only an invalid set makes it fail.
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let before = before.unwrap_or(SigSet::empty());
        Self {
            set,
            before,
            powerless: false,
        }
    }

    /// Blocks and takes some more; before any thread is started.
    #[cfg(any(feature = "mount", feature = "top"))]
    pub fn also(&mut self, signals: impl IntoIterator<Item = Signal>) {
        self.set.extend(signals);
        // As in `block`.
        let _ = self.set.thread_block();
    }

    /// Whoever takes them gives up every capability: what it does at a signal
    /// needs none.
    #[cfg(feature = "ebpf")]
    pub fn powerless(mut self) -> Self {
        self.powerless = true;
        self
    }

    /// What was blocked before: the mask that this program was started with.
    pub fn mask_before(&self) -> SigSet {
        self.before
    }

    /// Calls `on_signal` at the first signal. A second one, or the end of the
    /// time that a command has to clean up, ends the process.
    pub fn watch(self, on_signal: impl FnOnce() + Send + 'static) -> Interrupted {
        let interrupted = Interrupted::default();
        let flag = interrupted.clone();
        let (set, powerless) = (self.set, self.powerless);
        let spawned = std::thread::Builder::new()
            .name("vmafx-signals".into())
            .spawn(move || {
                if powerless {
                    // Nothing that it does depends on it.
                    let _ = privileges::keep(Capabilities::NONE);
                }
                let Ok(signal) = set.wait() else { return };
                let first = Instant::now();
                flag.0.signal.store(signal as u8, Ordering::SeqCst);
                let late = flag.clone();
                std::thread::spawn(move || {
                    on_signal();
                    let mut before = None;
                    loop {
                        let now = late.0.progress.load(Ordering::SeqCst);
                        if before.replace(now) == Some(now) {
                            std::process::exit(late.code(signal));
                        }
                        std::thread::sleep(GRACE);
                    }
                });
                while let Ok(second) = set.wait() {
                    if first.elapsed() >= SAME {
                        std::process::exit(flag.code(second));
                    }
                }
            });
        if spawned.is_err() {
            // Without the thread the signals end the process, as by default.
            let _ = set.thread_unblock();
        }
        interrupted
    }

    /// Lets both signals end the process, as by default.
    pub fn unblock(self) {
        // As in `block`.
        let _ = self.set.thread_unblock();
    }
}

/// Whether a signal has come.
#[derive(Debug, Clone, Default)]
pub struct Interrupted(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Its number; 0: none has come.
    signal: AtomicU8,
    /// Whether the command has told its result.
    told: AtomicBool,
    /// Changes while the command still tells something.
    progress: AtomicU64,
}

impl Interrupted {
    /// The exit code that the signal asks for, once it has come.
    pub fn exit(&self) -> Option<Exit> {
        match self.0.signal.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(Exit::Signal(signal)),
        }
    }

    /// The command tells something: it has more time to come to its end.
    #[cfg(feature = "ebpf")]
    pub fn note_progress(&self) {
        self.0.progress.fetch_add(1, Ordering::SeqCst);
    }

    /// The command has told its result, a good one, and removed what it had made:
    /// whatever ends it from now on, its exit code is 0.
    #[cfg(feature = "ebpf")]
    pub fn note_told(&self) {
        self.0.told.store(true, Ordering::SeqCst);
    }

    fn code(&self, signal: Signal) -> i32 {
        if self.0.told.load(Ordering::SeqCst) {
            0
        } else {
            128 + signal as i32
        }
    }
}
