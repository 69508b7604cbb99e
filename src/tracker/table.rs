//! The table of tracked descriptors, pure: events in, changes out.
//!
//! A [`Tracker`](super::Tracker) keeps one for its users. One of one's own needs no
//! kernel and no rights: `make bench-micro` measures its updates.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use crate::mounts::Dev;

/// An open descriptor below a watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackedFd {
    /// The process; for a thread with a descriptor table of its own
    /// (unshare(2)), the thread.
    pub pid: u32,
    /// The process's pid in its own pid namespace.
    pub own_pid: u32,
    /// The descriptor's number in it.
    pub fd: u32,
    /// The thread's name when it made the descriptor.
    pub comm: OsString,
    /// Absolute, through the watched prefix; `None` where it got lost.
    pub path: Option<PathBuf>,
    /// The superblock.
    pub dev: Dev,
    /// FUSE's inode number.
    pub ino: u64,
    /// The open flags: `O_RDONLY` and so on.
    pub flags: u32,
    /// The file's size at its open, bytes.
    pub size: u64,
    /// When it was made.
    pub opened_at: SystemTime,
    /// Time spent in the open call, nanoseconds; `None`: a dup, or not seen.
    pub open_ns: Option<u64>,
}

/// What happened to a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// An open call made it.
    Open,
    /// A dup call made it.
    Dup,
    /// A fork copied it from the parent.
    Inherit,
    /// Another process passed it, or it was taken from one: SCM_RIGHTS,
    /// pidfd_getfd(2), a seccomp(2) supervisor.
    Receive,
    /// It was found open: from before the start, or no call told of it.
    Adopt,
    /// It was closed or replaced, or its process has exited.
    Close,
}

impl EventKind {
    /// Every kind, in declaration order: the order of counters.
    pub const ALL: [Self; 6] = [
        Self::Open,
        Self::Dup,
        Self::Inherit,
        Self::Receive,
        Self::Adopt,
        Self::Close,
    ];

    /// The contract's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Dup => "dup",
            Self::Inherit => "inherit",
            Self::Receive => "receive",
            Self::Adopt => "adopt",
            Self::Close => "close",
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// When.
    pub at: SystemTime,
    /// The thread whose call it was.
    pub tid: u32,
    /// To which descriptor.
    pub fd: Arc<TrackedFd>,
}

/// What an event of the kernel says, with the path already made absolute.
#[derive(Debug, Clone)]
pub enum Report {
    /// A descriptor is there.
    Made {
        /// How it came; not [`EventKind::Close`].
        kind: EventKind,
        /// The thread whose call it was.
        tid: u32,
        /// Which open it is.
        id: Id,
        /// What is shown of it.
        fd: TrackedFd,
        /// Whether it is below a watched prefix.
        within: bool,
    },
    /// The descriptor that was made at this time is gone.
    Closed {
        /// Which open it was.
        id: Id,
        /// The thread whose call it was.
        tid: u32,
        /// When.
        at: SystemTime,
    },
    /// A process is gone, and every descriptor it had by then.
    Exited {
        /// The process.
        pid: u32,
        /// Its thread that ended last.
        tid: u32,
        /// When, CLOCK_BOOTTIME, nanoseconds: what is newer stays.
        ts: u64,
        /// The same as a time of day.
        at: SystemTime,
    },
}

/// One open of a descriptor, for good: numbers are reused, times are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id {
    /// As [`TrackedFd::pid`].
    pub pid: u32,
    /// The descriptor's number.
    pub fd: u32,
    /// CLOCK_BOOTTIME, nanoseconds.
    pub opened_at: u64,
}

struct Entry {
    opened_at: u64,
    within: bool,
    fd: Arc<TrackedFd>,
}

/// A change that a report made.
#[derive(Debug, Clone)]
pub struct Change {
    pub(super) id: Id,
    pub(super) within: bool,
    /// Subscribers know of it: its path alone is new.
    pub(super) told: bool,
    /// What subscribers are told, unless the path alone is new or it is not below
    /// a watched prefix.
    pub event: Event,
}

/// What agreeing with the kernel's map has changed.
#[derive(Debug)]
pub(super) enum Agreed {
    /// The entry is gone.
    Gone(Change),
    /// The entry has another id.
    Renamed {
        old: Id,
        new: Id,
        within: bool,
        fd: Arc<TrackedFd>,
    },
}

/// Every tracked descriptor, by pid and number.
#[derive(Default)]
pub struct Table(BTreeMap<(u32, u32), Entry>);

impl Table {
    /// The descriptor `fd` of process `pid`, if it is below a watched prefix.
    #[must_use]
    pub fn get(&self, pid: u32, fd: u32) -> Option<Arc<TrackedFd>> {
        let entry = self.0.get(&(pid, fd)).filter(|e| e.within)?;
        Some(Arc::clone(&entry.fd))
    }

    pub(super) fn entries(&self) -> Vec<Arc<TrackedFd>> {
        self.0
            .values()
            .filter(|e| e.within)
            .map(|e| Arc::clone(&e.fd))
            .collect()
    }

    pub(super) fn len(&self) -> usize {
        self.0.values().filter(|e| e.within).count()
    }

    /// Applies a report; returns what changed, in order. One that comes late, or
    /// again, changes nothing that is newer.
    pub fn apply(&mut self, report: Report) -> Vec<Change> {
        let mut changes = Vec::new();
        match report {
            Report::Made {
                kind,
                tid,
                id,
                fd,
                within,
            } => {
                let at = fd.opened_at;
                let fd = Arc::new(fd);
                if let Some(known) = self.0.get_mut(&(id.pid, id.fd))
                    && known.opened_at == id.opened_at
                {
                    // Told again, perhaps with the path that it had lacked.
                    if known.fd.path.is_some() || fd.path.is_none() {
                        return changes;
                    }
                    known.within = within;
                    known.fd = Arc::clone(&fd);
                    changes.push(Change {
                        id,
                        within,
                        told: true,
                        event: Event { kind, at, tid, fd },
                    });
                    return changes;
                }
                let newer = self.0.get(&(id.pid, id.fd));
                if newer.is_some_and(|e| e.opened_at > id.opened_at) {
                    // Threads that race report in any order: this one has
                    // been replaced already.
                    for kind in [kind, EventKind::Close] {
                        let fd = Arc::clone(&fd);
                        changes.push(Change {
                            id,
                            within,
                            told: false,
                            event: Event { kind, at, tid, fd },
                        });
                    }
                    return changes;
                }
                // A close that was not seen: the number is in use again.
                changes.extend(self.remove((id.pid, id.fd), tid, at));
                let entry = Entry {
                    opened_at: id.opened_at,
                    within,
                    fd: Arc::clone(&fd),
                };
                self.0.insert((id.pid, id.fd), entry);
                changes.push(Change {
                    id,
                    within,
                    told: false,
                    event: Event { kind, at, tid, fd },
                });
            }
            Report::Closed { id, tid, at } => {
                let key = (id.pid, id.fd);
                // Threads that race report in any order: an older close must
                // not remove a newer open.
                if self
                    .0
                    .get(&key)
                    .is_some_and(|e| e.opened_at == id.opened_at)
                {
                    changes.extend(self.remove(key, tid, at));
                }
            }
            Report::Exited { pid, tid, ts, at } => {
                let keys: Vec<_> = self
                    .0
                    .range((pid, 0)..=(pid, u32::MAX))
                    .filter(|(_, e)| e.opened_at <= ts)
                    .map(|(key, _)| *key)
                    .collect();
                for key in keys {
                    changes.extend(self.remove(key, tid, at));
                }
            }
        }
        changes
    }

    /// Whether there is an entry, shown or not.
    pub(super) fn holds(&self, key: (u32, u32)) -> bool {
        self.0.contains_key(&key)
    }

    /// Every process with an entry.
    pub(super) fn pids(&self) -> std::collections::BTreeSet<u32> {
        self.0.keys().map(|(pid, _)| *pid).collect()
    }

    /// The key of every entry of these processes, shown or not.
    pub(super) fn keys(&self, pids: std::ops::RangeInclusive<u32>) -> Vec<(u32, u32)> {
        let range = (*pids.start(), 0)..=(*pids.end(), u32::MAX);
        self.0.range(range).map(|(key, _)| *key).collect()
    }

    /// Which open an entry is of.
    pub(super) fn opened_at(&self, key: (u32, u32)) -> Option<u64> {
        self.0.get(&key).map(|entry| entry.opened_at)
    }

    /// Makes an entry agree with the kernel's map, which is the truth: events
    /// of threads that race for one number need not tell how it ended. `found`
    /// is what the map has: when it was made, and its inode.
    pub(super) fn agree(
        &mut self,
        key: (u32, u32),
        found: Option<(u64, u64)>,
        at: SystemTime,
    ) -> Option<Agreed> {
        let entry = self.0.get_mut(&key)?;
        match found {
            None => self.remove(key, key.0, at).map(Agreed::Gone),
            // The same clip under another thread's name for it.
            Some((opened_at, ino)) if opened_at != entry.opened_at && ino == entry.fd.ino => {
                let id = |opened_at| Id {
                    pid: key.0,
                    fd: key.1,
                    opened_at,
                };
                let old = std::mem::replace(&mut entry.opened_at, opened_at);
                Some(Agreed::Renamed {
                    old: id(old),
                    new: id(opened_at),
                    within: entry.within,
                    fd: Arc::clone(&entry.fd),
                })
            }
            // Another clip: its event is on its way.
            Some(_) => None,
        }
    }

    fn remove(&mut self, key: (u32, u32), tid: u32, at: SystemTime) -> Option<Change> {
        let entry = self.0.remove(&key)?;
        Some(Change {
            id: Id {
                pid: key.0,
                fd: key.1,
                opened_at: entry.opened_at,
            },
            within: entry.within,
            told: false,
            event: Event {
                kind: EventKind::Close,
                at,
                tid,
                fd: entry.fd,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn made(pid: u32, fd: u32, opened_at: u64) -> Report {
        Report::Made {
            kind: EventKind::Open,
            tid: pid,
            id: Id { pid, fd, opened_at },
            fd: TrackedFd {
                pid,
                own_pid: pid,
                fd,
                comm: "c".into(),
                path: None,
                dev: Dev::new(0, 39),
                ino: 1,
                flags: 0,
                size: 0,
                opened_at: UNIX_EPOCH + Duration::from_nanos(opened_at),
                open_ns: None,
            },
            within: true,
        }
    }

    fn closed(pid: u32, fd: u32, opened_at: u64) -> Report {
        Report::Closed {
            id: Id { pid, fd, opened_at },
            tid: pid,
            at: UNIX_EPOCH,
        }
    }

    fn kinds(changes: &[Change]) -> Vec<EventKind> {
        changes.iter().map(|c| c.event.kind).collect()
    }

    #[test]
    fn a_late_close_leaves_the_newer_open() {
        let mut table = Table::default();
        table.apply(made(1, 3, 10));
        assert_eq!(
            kinds(&table.apply(made(1, 3, 20))),
            [EventKind::Close, EventKind::Open]
        );
        assert!(table.apply(closed(1, 3, 10)).is_empty());
        assert!(table.get(1, 3).is_some());
        assert_eq!(kinds(&table.apply(closed(1, 3, 20))), [EventKind::Close]);
        assert!(table.get(1, 3).is_none());
    }

    #[test]
    fn an_exit_takes_all_of_one_process_but_not_a_reused_pid() {
        let mut table = Table::default();
        table.apply(made(1, 3, 10));
        table.apply(made(1, u32::MAX, 11));
        table.apply(made(2, 3, 12));
        table.apply(made(1, 4, 30));
        let exited = Report::Exited {
            pid: 1,
            tid: 1,
            ts: 20,
            at: UNIX_EPOCH,
        };
        assert_eq!(table.apply(exited).len(), 2);
        let left: Vec<_> = table.entries().iter().map(|f| (f.pid, f.fd)).collect();
        assert_eq!(left, [(1, 4), (2, 3)]);
    }

    #[test]
    fn what_is_outside_a_prefix_is_kept_but_not_shown() {
        let mut table = Table::default();
        let Report::Made {
            kind, tid, id, fd, ..
        } = made(1, 3, 10)
        else {
            unreachable!()
        };
        let report = Report::Made {
            kind,
            tid,
            id,
            fd,
            within: false,
        };
        assert!(!table.apply(report)[0].within);
        assert!(table.get(1, 3).is_none() && table.entries().is_empty());
        assert_eq!(table.apply(closed(1, 3, 10)).len(), 1);
    }

    #[test]
    fn an_open_that_comes_late_does_not_replace_a_newer_one() {
        let mut table = Table::default();
        table.apply(made(1, 3, 20));
        let late = kinds(&table.apply(made(1, 3, 10)));
        assert_eq!(late, [EventKind::Open, EventKind::Close]);
        assert_eq!(kinds(&table.apply(closed(1, 3, 20))), [EventKind::Close]);
    }

    #[test]
    fn the_kernel_s_map_has_the_last_word() {
        let mut table = Table::default();
        table.apply(made(1, 3, 10));
        assert!(table.agree((1, 3), Some((10, 1)), UNIX_EPOCH).is_none());
        assert!(table.agree((1, 3), Some((11, 2)), UNIX_EPOCH).is_none());
        let renamed = table.agree((1, 3), Some((11, 1)), UNIX_EPOCH);
        assert!(matches!(renamed, Some(Agreed::Renamed { new, .. }) if new.opened_at == 11));
        assert!(table.apply(closed(1, 3, 10)).is_empty());
        let gone = table.agree((1, 3), None, UNIX_EPOCH);
        assert!(matches!(gone, Some(Agreed::Gone(_))));
        assert!(!table.holds((1, 3)));
        assert!(table.agree((1, 3), None, UNIX_EPOCH).is_none());
    }

    proptest! {
        /// Whatever comes, each open has one close, or is in the table.
        #[test]
        fn opens_and_closes_pair(
            ops in prop::collection::vec((0u32..3, 0u32..3, 0u64..6, 0u8..3), 0..200),
        ) {
            let mut table = Table::default();
            let mut open = std::collections::BTreeSet::new();
            for (pid, fd, time, op) in ops {
                let report = match op {
                    0 => made(pid, fd, time),
                    1 => closed(pid, fd, time),
                    _ => Report::Exited { pid, tid: pid, ts: time, at: UNIX_EPOCH },
                };
                for change in table.apply(report) {
                    match change.event.kind {
                        EventKind::Close => prop_assert!(open.remove(&change.id)),
                        _ => prop_assert!(open.insert(change.id)),
                    }
                }
                let shown: std::collections::BTreeSet<_> = table
                    .0
                    .iter()
                    .map(|(key, e)| Id { pid: key.0, fd: key.1, opened_at: e.opened_at })
                    .collect();
                prop_assert_eq!(&shown, &open);
            }
        }
    }
}
