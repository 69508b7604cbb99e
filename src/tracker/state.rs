//! What the tracking thread keeps: applies the kernel's reports to the table,
//! tells subscribers, and follows the mounts that are watched.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLockWriteGuard};
use std::time::{Duration, Instant, SystemTime};

use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::abi::{self, Kind, RawEvent, vb_fd, vb_fd_key};
use super::account::Names;
use super::clock::BootClock;
use super::pinned::Published;
use super::table::{Agreed, Change, EventKind, Id, Report, Table, TrackedFd};
use super::watch::{self, Watch};
use super::{Shared, TrackerError, Update, failed};
use crate::mounts::Dev;

/// How long a close may come after the kernel's map has lost the entry; then
/// it has got lost, or was reported under another open's name.
const DOUBT: Duration = Duration::from_millis(20);

/// An entry that is not as in the kernel's map.
pub(super) struct Doubt {
    since: Instant,
    /// When the event was that tells so.
    at: SystemTime,
    /// Which open the entry is of: of another by now, events go on.
    opened_at: u64,
}

pub(super) struct State<'a> {
    pub(super) shared: &'a Shared,
    pub(super) watched: MapHandle,
    pub(super) watched_slots: MapHandle,
    pub(super) fds: MapHandle,
    pub(super) published: Published,
    /// Where pinned paths go; `None` without pins.
    pub(super) paths: Option<MapHandle>,
    /// How many mounts were watched so far, and the latest of each device.
    pub(super) mounts: (u32, BTreeMap<Dev, u32>),
    /// Where clips are that are read; `None`: reads are not counted.
    pub(super) names: Option<Names>,
    pub(super) watches: Vec<Watch>,
    /// Entries that the kernel's map does not have, or has by another open.
    pub(super) doubts: BTreeMap<(u32, u32), Doubt>,
    /// Whether a report said that a process is marked for reconciliation.
    pub(super) marked: bool,
    /// Processes with an entry that came without its path.
    pub(super) pathless: Vec<u32>,
}

impl State<'_> {
    /// Watches these mounts, and no others; tells subscribers of changes. Returns
    /// whether there were any.
    pub(super) fn watch(&mut self, watches: Vec<Watch>, tell: bool) -> Result<bool, TrackerError> {
        let watched = |list: &[Watch], watch: &Watch| {
            list.iter().any(|other| other.mount.dev == watch.mount.dev)
        };
        for gone in self.watches.iter().filter(|w| !watched(&watches, w)) {
            // Two prefixes may be on one mount: the second finds it removed.
            let _ = self.watched.delete(&gone.mount.dev.0.to_ne_bytes());
            let slot = abi::dev_slot(gone.mount.dev);
            if !watches.iter().any(|w| abi::dev_slot(w.mount.dev) == slot) {
                self.set_slot(slot, 0)?;
            }
        }
        self.number(&watches);
        for watch in &watches {
            let dev = watch.mount.dev;
            let number = self.mounts.1.get(&dev).copied().unwrap_or(0).to_ne_bytes();
            self.set_slot(abi::dev_slot(dev), 1)?;
            self.watched
                .update(&dev.0.to_ne_bytes(), &number, MapFlags::ANY)
                .map_err(|e| failed("watching a mount", e))?;
        }
        let before = std::mem::replace(&mut self.watches, watches.clone());
        let shown = &self.shared.watches;
        shown
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&watches);
        if !tell {
            return Ok(before != watches);
        }
        for gone in before.iter().filter(|w| !watches.contains(w)) {
            self.shared
                .publish(&Update::Unmounted(Box::new(gone.clone())));
        }
        for new in watches.iter().filter(|w| !before.contains(w)) {
            self.shared.publish(&Update::Mounted(Box::new(new.clone())));
        }
        Ok(before != watches)
    }

    /// Numbers mounts that are new: a device may be another mount's than before.
    fn number(&mut self, watches: &[Watch]) {
        let ids = |list: &[Watch], dev: Dev| -> Vec<u64> {
            let same = list.iter().filter(|watch| watch.mount.dev == dev);
            same.map(|watch| watch.mount.id).collect()
        };
        let devices: BTreeSet<Dev> = watches.iter().map(|watch| watch.mount.dev).collect();
        for dev in devices {
            let before = ids(&self.watches, dev);
            if !ids(watches, dev).iter().any(|id| before.contains(id)) {
                self.mounts.0 += 1;
                self.mounts.1.insert(dev, self.mounts.0);
            }
        }
        if let Some(live) = &mut *self.shared.lock_accounts() {
            live.mounts.clone_from(&self.mounts.1);
        }
    }

    fn set_slot(&self, slot: u32, value: u32) -> Result<(), TrackerError> {
        self.watched_slots
            .update(&slot.to_ne_bytes(), &value.to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| failed("watching a mount", e))
    }

    pub(super) fn apply(&mut self, records: Vec<RawEvent>) {
        if records.is_empty() {
            return;
        }
        let clock = BootClock::now();
        let mut touched = BTreeMap::new();
        let mut events = 0;
        for record in records {
            if record.kind == Kind::Mark {
                self.marked = true;
                continue;
            }
            events += 1;
            let exited = record.kind == Kind::Exit;
            touched.insert((record.pid, record.fd), clock.at(record.ts));
            let report = self.report(record, clock);
            if let Report::Made { id, fd, .. } = &report
                && fd.path.is_none()
                && !self.write_table().holds((id.pid, id.fd))
            {
                self.pathless.push(id.pid);
            }
            let changes = self.write_table().apply(report);
            for change in changes {
                if exited {
                    self.ensure_gone(change.id);
                }
                self.announce(change);
            }
        }
        self.shared.events.fetch_add(events, Ordering::Relaxed);
        for (key, at) in touched {
            self.agree(key, at, false);
        }
    }

    /// When to look at doubts again, if there are any.
    pub(super) fn doubt_due(&self) -> Option<Instant> {
        let since = self.doubts.values().map(|doubt| doubt.since).min()?;
        Some(since + DOUBT)
    }

    /// Looks again at entries whose close should have come by now.
    pub(super) fn settle_doubts(&mut self) {
        let due: Vec<_> = self
            .doubts
            .iter()
            .filter(|(_, doubt)| doubt.since.elapsed() >= DOUBT)
            .map(|(key, doubt)| (*key, doubt.at, doubt.opened_at))
            .collect();
        for (key, at, opened_at) in due {
            self.doubts.remove(&key);
            let is_of = self.shared.read_table().opened_at(key);
            self.agree(key, at, is_of == Some(opened_at));
        }
    }

    /// The kernel removes an exited process's entries by walking its map, and
    /// can miss one that moves meanwhile.
    fn ensure_gone(&self, id: Id) {
        let key = vb_fd_key {
            pid: id.pid,
            fd: id.fd,
        };
        let found = self.fds.lookup(abi::bytes(&key), MapFlags::ANY);
        let found = found.ok().flatten().and_then(|b| abi::value::<vb_fd>(&b));
        if found.is_some_and(|entry| entry.opened_at == id.opened_at) {
            // Gone in between is gone.
            let _ = self.fds.delete(abi::bytes(&key));
        }
    }

    pub(super) fn write_table(&self) -> RwLockWriteGuard<'_, Table> {
        self.shared
            .table
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&mut self, change: Change) {
        let made = change.event.kind != EventKind::Close;
        if let Some(names) = self.names.as_mut().filter(|_| made) {
            let fd = &change.event.fd;
            let mount = self.mounts.1.get(&fd.dev).copied().unwrap_or(0);
            if !names.note(mount, fd, change.within) {
                self.lose_path();
            }
        }
        self.store_path(change.id, made.then_some((change.within, &change.event.fd)));
        if change.within && !change.told {
            self.shared.publish(&Update::Fd(change.event));
        }
    }

    /// Looks up what the kernel has for a descriptor that events were about.
    /// An entry that it does not have goes if `for_good`, and one that it has by
    /// another open is that; else the events of it are probably on their way.
    pub(super) fn agree(&mut self, (pid, fd): (u32, u32), at: SystemTime, for_good: bool) {
        if !self.write_table().holds((pid, fd)) {
            return;
        }
        let key = vb_fd_key { pid, fd };
        // Where it cannot be read, the events have to do.
        let Ok(found) = self.fds.lookup(abi::bytes(&key), MapFlags::ANY) else {
            return;
        };
        let found = found.and_then(|bytes| abi::value::<vb_fd>(&bytes));
        let found = found.map(|entry| (entry.opened_at, entry.ino));
        let Some(opened_at) = self.shared.read_table().opened_at((pid, fd)) else {
            return;
        };
        if !for_good {
            let agrees = found.is_some_and(|(found, _)| found == opened_at);
            let known = self.doubts.get(&(pid, fd));
            if !agrees && known.is_none_or(|doubt| doubt.opened_at != opened_at) {
                let since = Instant::now();
                let doubt = Doubt {
                    since,
                    at,
                    opened_at,
                };
                self.doubts.insert((pid, fd), doubt);
            }
            return;
        }
        let agreed = self.write_table().agree((pid, fd), found, at);
        match agreed {
            Some(Agreed::Gone(change)) => self.announce(change),
            Some(Agreed::Renamed {
                old,
                new,
                within,
                fd,
            }) => {
                self.store_path(old, None);
                self.store_path(new, Some((within, &fd)));
            }
            None => {}
        }
    }

    fn report(&self, raw: RawEvent, clock: BootClock) -> Report {
        let id = Id {
            pid: raw.pid,
            fd: raw.fd,
            opened_at: raw.opened_at,
        };
        let at = clock.at(raw.ts);
        let kind = match raw.kind {
            Kind::Close => {
                return Report::Closed {
                    id,
                    tid: raw.tid,
                    at,
                };
            }
            Kind::Exit => {
                return Report::Exited {
                    pid: raw.pid,
                    tid: raw.tid,
                    ts: raw.ts,
                    at,
                };
            }
            Kind::Open => EventKind::Open,
            Kind::Dup => EventKind::Dup,
            Kind::Inherit => EventKind::Inherit,
            Kind::Receive => EventKind::Receive,
            Kind::Adopt | Kind::Mark => EventKind::Adopt,
        };
        let inside = raw.path.map(PathBuf::from);
        let path = inside
            .as_deref()
            .and_then(|inside| watch::show(&self.watches, raw.dev, raw.mount_id, inside));
        Report::Made {
            kind,
            tid: raw.tid,
            id,
            // What has lost its path may be below a prefix, and is shown.
            within: path.is_some() || inside.is_none(),
            fd: TrackedFd {
                pid: raw.pid,
                own_pid: raw.own_pid,
                fd: raw.fd,
                comm: raw.comm,
                path,
                dev: raw.dev,
                ino: raw.ino,
                flags: raw.flags,
                size: raw.size,
                opened_at: at,
                open_ns: (raw.open_ns > 0).then_some(raw.open_ns),
            },
        }
    }

    /// Keeps the pinned paths as the table is: stores a new descriptor's, or
    /// removes one's that is gone.
    fn store_path(&mut self, id: Id, made: Option<(bool, &Arc<TrackedFd>)>) {
        let Some(paths) = &self.paths else {
            return;
        };
        let key = (id.pid, id.fd, id.opened_at);
        let Some((within, fd)) = made else {
            abi::delete_path(paths, key);
            return;
        };
        let lost = std::path::Path::new("");
        let path = within.then(|| fd.path.as_deref().unwrap_or(lost));
        if !abi::store_path(paths, key, path) {
            self.lose_path();
        }
    }

    fn lose_path(&mut self) {
        let lost = self.shared.paths_full.fetch_add(1, Ordering::Relaxed) + 1;
        self.published.set(|meta| meta.loss_paths = lost);
    }
}
