//! What tracking can lose: counted, and made good.

use std::collections::BTreeMap;

macro_rules! losses {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $exact:literal;)*) => {
        /// What can get lost while tracking; each is counted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Loss {
            $($(#[$doc])* $variant,)*
        }

        impl Loss {
            /// Every cause, those of the kernel first and in the order of
            /// `enum vb_loss`.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name in summaries and JSON, `snake_case`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Whether the table may differ from the truth after it.
            #[must_use]
            pub fn breaks_table(self) -> bool {
                match self {
                    $(Self::$variant => !$exact,)*
                }
            }
        }
    };
}

losses! {
    /// More descriptors than `max_fds`: some are not tracked.
    FdsFull = "fds_full", false;
    /// More processes than `max_fds`: likewise.
    ProcsFull = "procs_full", false;
    /// Too many processes were to be reconciled at once.
    MarksFull = "marks_full", false;
    /// The ring buffer was full: an event is missing.
    RingFull = "ring_full", false;
    /// A path of over 4,095 bytes, or one that could not be read: the entry has
    /// none.
    PathUnreadable = "path_unreadable", true;
    /// No scratch buffer was free: an event came without its path, which is
    /// asked for again.
    ScratchBusy = "scratch_busy", true;
    /// Threads changed one descriptor faster than it could be followed: the
    /// process was reconciled.
    Unstable = "unstable", true;
    /// An entry of an exited process could not be removed.
    DeleteFailed = "delete_failed", false;
    /// The start of an open call was not seen: its duration is unknown.
    OpenUntimed = "open_untimed", true;
    /// A read call was not counted: it was under way when tracking began, there was
    /// no room for it, or a program that counts reads did not run.
    ReadUncounted = "read_uncounted", true;
    /// A program did not run, because another BPF program or bpf(2) call was
    /// under way on the CPU. Counted by the kernel, for tracepoints since 6.7,
    /// in each program's fdinfo.
    RecursionMisses = "recursion_misses", false;
    /// The processes could not be listed, or one not be reconciled.
    ReconcileFailed = "reconcile_failed", false;
    /// More path bytes than the pinned map holds: `dump-map` misses a path.
    PathsFull = "paths_full", true;
    /// A subscriber was too slow: it missed an event, the table did not.
    SubscriberLagged = "subscriber_lagged", true;
}

/// How often each thing got lost, and whether that was made good.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Losses {
    counts: BTreeMap<Loss, u64>,
    /// Of those that break the table, how many were followed by a look at every
    /// descriptor during which nothing got lost.
    pub(super) healed: u64,
}

impl Losses {
    /// The count of one cause.
    #[must_use]
    pub fn get(&self, loss: Loss) -> u64 {
        self.counts.get(&loss).copied().unwrap_or(0)
    }

    /// Every cause with its count, zeros included, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Loss::ALL.iter().map(|loss| (loss.name(), self.get(*loss)))
    }

    /// All losses together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Whether the table is exact: nothing was lost, or all was made good.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.breaking() == self.healed
    }

    /// Losses of causes that break the table.
    pub(super) fn breaking(&self) -> u64 {
        let breaking = self.counts.iter().filter(|(loss, _)| loss.breaks_table());
        breaking.map(|(_, count)| count).sum()
    }

    pub(super) fn add(&mut self, loss: Loss, count: u64) {
        self.counts.insert(loss, count);
    }
}

impl FromIterator<(Loss, u64)> for Losses {
    fn from_iter<T: IntoIterator<Item = (Loss, u64)>>(counts: T) -> Self {
        Self {
            counts: counts.into_iter().collect(),
            healed: 0,
        }
    }
}
