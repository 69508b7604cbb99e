//! The tracking thread: loads, attaches, and turns events into the table.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, PoisonError, RwLockWriteGuard};
use std::time::{Duration, Instant, SystemTime};

use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle, RingBuffer, RingBufferBuilder};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::abi::{
    self, Kind, OpenRcloneBypassSkel, RawEvent, RcloneBypassSkelBuilder, vb_fd, vb_fd_key,
};
use super::clock::BootClock;
use super::pinned::{self, Pins};
use super::table::{Agreed, Change, EventKind, Id, Report, Table, TrackedFd};
use super::watch::{self, Prefix, Watch};
use super::{Command, Loss, Shared, TrackerError, TrackerOptions, Update, host};
use crate::mounts::MountTable;

/// Records taken from the ring before commands are looked at again.
const RECORDS_AT_ONCE: usize = 4_096;
/// The smallest record in the ring, its header included, bytes.
const RECORD_BYTES: usize = 96;
/// How long a close may come after the kernel's map has lost the entry; then
/// it has got lost, or was reported under another open's name.
const DOUBT: Duration = Duration::from_millis(20);

const RING: u64 = 0;
const MOUNTS: u64 = 1;
const WAKE: u64 = 2;

fn failed(what: &str, error: impl std::fmt::Display) -> TrackerError {
    TrackerError::Failed(format!("{what}: {error}"))
}

/// Tracks until it is told to stop. Sends to `ready` once it does.
pub(super) fn run(
    options: &TrackerOptions,
    shared: &Arc<Shared>,
    commands: &Receiver<Command>,
    ready: &SyncSender<()>,
) -> Result<(), TrackerError> {
    check_options(options)?;
    host::check()?;
    let mountinfo = File::open("/proc/self/mountinfo").map_err(|e| failed("mountinfo", e))?;
    let mut prefixes = Vec::new();
    for given in &options.prefixes {
        prefixes.push(Prefix::new(given).map_err(|e| failed("prefix", e))?);
    }
    let watches = find_watches(&mut prefixes, options.allow_missing)?;
    let pins = options.pin_dir.as_deref().map(Pins::claim).transpose()?;

    // The caller prints, not libbpf.
    libbpf_rs::set_print(None);
    let mut storage = MaybeUninit::uninit();
    let mut open = RcloneBypassSkelBuilder::default()
        .open(&mut storage)
        .map_err(|e| failed("opening the BPF object", e))?;
    configure(&mut open, options).map_err(|e| failed("configuring the BPF maps", e))?;
    let mut skeleton = open.load().map_err(load_error)?;

    let handle =
        |map: &libbpf_rs::MapMut<'_>| MapHandle::try_from(map).map_err(|e| failed("BPF map", e));
    let watched = handle(&skeleton.maps.watched)?;
    let meta = handle(&skeleton.maps.meta)?;
    let ring_map = handle(&skeleton.maps.events)?;
    let paths = match &pins {
        Some(_) => Some(handle(&skeleton.maps.paths)?),
        None => None,
    };
    *shared.kernel.lock().unwrap_or_else(PoisonError::into_inner) =
        Some(abi::Stats::new(handle(&skeleton.maps.stats)?));

    let records = RefCell::new(Vec::new());
    let mut builder = RingBufferBuilder::new();
    builder
        .add(&ring_map, |record| {
            records.borrow_mut().extend(RawEvent::decode(record));
            0
        })
        .map_err(|e| failed("ring buffer", e))?;
    let ring = builder.build().map_err(|e| failed("ring buffer", e))?;

    let mut state = State {
        shared,
        watched,
        fds: handle(&skeleton.maps.fds)?,
        meta,
        paths,
        watches: Vec::new(),
        doubts: BTreeMap::new(),
        ring_full: 0,
    };
    skeleton.attach().map_err(|e| {
        TrackerError::Environment(format!(
            "attaching to tracepoints failed: {e}; root or CAP_PERFMON, and tracefs, are needed"
        ))
    })?;
    // Not before: what is seen to be opened is to be seen closed.
    state.watch(watches, false)?;
    if let Some(pins) = &pins {
        pins.publish(&mut skeleton)?;
        if pins.replaced {
            shared.replaced_pins.store(true, Ordering::Relaxed);
        }
    }

    let result = Loop {
        shared,
        commands,
        ready,
        ring: &ring,
        ring_map: &ring_map,
        records: &records,
        mountinfo: &mountinfo,
        // Enough to take the whole ring at once, and no more, so that commands
        // and mounts get their turn while events keep coming.
        rounds: options.ring_bytes as usize / RECORD_BYTES / RECORDS_AT_ONCE + 1,
    }
    .run(&mut state, &mut prefixes);
    shared.note_recursion_misses();
    let removed = pins.as_ref().map_or(Ok(()), Pins::remove);
    result.and(removed)
}

/// What the event loop waits for and takes from.
struct Loop<'a> {
    shared: &'a Shared,
    commands: &'a Receiver<Command>,
    ready: &'a SyncSender<()>,
    ring: &'a RingBuffer<'a>,
    ring_map: &'a MapHandle,
    records: &'a RefCell<Vec<RawEvent>>,
    mountinfo: &'a File,
    /// Times to take [`RECORDS_AT_ONCE`] before anything else gets its turn.
    rounds: usize,
}

impl Loop<'_> {
    /// Tracks until it is told to stop.
    fn run(&self, state: &mut State<'_>, prefixes: &mut [Prefix]) -> Result<(), TrackerError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| failed("epoll", e))?;
        let add = |fd: std::os::fd::BorrowedFd<'_>, flags, data| {
            epoll
                .add(fd, EpollEvent::new(flags, data))
                .map_err(|e| failed("epoll", e))
        };
        add(self.ring_map.as_fd(), EpollFlags::EPOLLIN, RING)?;
        // Readable with priority after every change (proc_pid_mountinfo(5)).
        add(self.mountinfo.as_fd(), EpollFlags::EPOLLPRI, MOUNTS)?;
        add(self.shared.wake.as_fd(), EpollFlags::EPOLLIN, WAKE)?;
        // The one who waits may have given up.
        let _ = self.ready.send(());

        let mut events = [EpollEvent::empty(); 3];
        loop {
            let count = match epoll.wait(&mut events, state.timeout()) {
                Err(Errno::EINTR) => continue,
                result => result.map_err(|e| failed("epoll", e))?,
            };
            let woken_by = |what| events[..count].iter().any(|e| e.data() == what);
            if woken_by(WAKE) {
                // Which commands there are, the channel tells.
                let _ = self.shared.wake.read();
            }
            let pending: Vec<Command> = self.commands.try_iter().collect();
            for _ in 0..self.rounds {
                let taken = self.ring.consume_raw_n(RECORDS_AT_ONCE);
                state.apply(self.records.take());
                if taken < RECORDS_AT_ONCE as i32 {
                    break;
                }
            }
            state.settle_doubts();
            // After the events of before: they are about the mounts of before.
            if woken_by(MOUNTS)
                && let Ok(watches) = find_watches(prefixes, true)
            {
                state.watch(watches, true)?;
            }
            for command in pending {
                match command {
                    Command::Stop => return Ok(()),
                    // The one who asked may have given up.
                    Command::Flush(done) => drop(done.send(())),
                }
            }
        }
    }
}

fn check_options(options: &TrackerOptions) -> Result<(), TrackerError> {
    if options.prefixes.is_empty() {
        return Err(TrackerError::Failed("no prefix to watch".into()));
    }
    if options.max_fds == 0 || options.max_fds > 1 << 22 {
        return Err(TrackerError::Failed(
            "the number of tracked descriptors must be 1 to 4194304".into(),
        ));
    }
    if !options.ring_bytes.is_power_of_two() || options.ring_bytes < 4096 {
        return Err(TrackerError::Failed(
            "the ring buffer's size must be a power of two of at least 4096".into(),
        ));
    }
    Ok(())
}

fn configure(
    open: &mut OpenRcloneBypassSkel<'_>,
    options: &TrackerOptions,
) -> libbpf_rs::Result<()> {
    let scratches = 2 * libbpf_rs::num_possible_cpus()? as u32;
    let maps = &mut open.maps;
    maps.fds.set_max_entries(options.max_fds)?;
    maps.procs.set_max_entries(options.max_fds)?;
    maps.events.set_max_entries(options.ring_bytes)?;
    maps.scratches.set_max_entries(scratches)?;
    // Most paths take one chunk or two.
    let chunks = options.pin_dir.as_ref().map_or(1, |_| 2 * options.max_fds);
    maps.paths.set_max_entries(chunks)?;
    if let Some(rodata) = maps.rodata_data.as_deref_mut() {
        rodata.scratch_count = scratches;
    }
    let programs = &mut open.progs;
    for (program, call) in [
        (&mut programs.tp_enter_open, "open"),
        (&mut programs.tp_exit_open, "open"),
        (&mut programs.tp_enter_creat, "creat"),
        (&mut programs.tp_exit_creat, "creat"),
        (&mut programs.tp_exit_dup2, "dup2"),
    ] {
        program.set_autoload(host::has_syscall(call));
    }
    Ok(())
}

fn load_error(error: libbpf_rs::Error) -> TrackerError {
    match error.kind() {
        libbpf_rs::ErrorKind::PermissionDenied => TrackerError::Environment(format!(
            "the kernel refuses to load BPF programs: {error}; run as root, or with CAP_BPF and \
             CAP_PERFMON, and outside of lockdown"
        )),
        _ => TrackerError::Environment(format!(
            "loading the BPF programs failed: {error}; linux 5.15 or newer with BTF is needed"
        )),
    }
}

/// The prefixes that are on an rclone mount; unless some may be missing, an
/// error for the first that is not.
fn find_watches(prefixes: &mut [Prefix], allow_missing: bool) -> Result<Vec<Watch>, TrackerError> {
    let table = MountTable::read().map_err(|e| failed("mountinfo", e))?;
    let mut watches = Vec::new();
    for prefix in prefixes {
        match prefix.find(&table) {
            Ok(watch) => watches.push(watch),
            Err(error) if !allow_missing => return Err(error.into()),
            Err(_) => {}
        }
    }
    Ok(watches)
}

struct State<'a> {
    shared: &'a Shared,
    watched: MapHandle,
    fds: MapHandle,
    meta: MapHandle,
    /// Where pinned paths go; `None` without pins.
    paths: Option<MapHandle>,
    watches: Vec<Watch>,
    /// Entries that the kernel's map does not have, since when, and when the
    /// event that tells so was.
    doubts: BTreeMap<(u32, u32), (Instant, SystemTime)>,
    /// Events that the ring had no room for, at the last look.
    ring_full: u64,
}

impl State<'_> {
    /// Watches these mounts, and no others; tells subscribers of changes.
    fn watch(&mut self, watches: Vec<Watch>, tell: bool) -> Result<(), TrackerError> {
        let watched = |list: &[Watch], watch: &Watch| {
            list.iter().any(|other| other.mount.dev == watch.mount.dev)
        };
        for gone in self.watches.iter().filter(|w| !watched(&watches, w)) {
            // Two prefixes may be on one mount: the second finds it removed.
            let _ = self.watched.delete(&gone.mount.dev.0.to_ne_bytes());
        }
        for watch in &watches {
            let one = 1u32.to_ne_bytes();
            self.watched
                .update(&watch.mount.dev.0.to_ne_bytes(), &one, MapFlags::ANY)
                .map_err(|e| failed("watching a mount", e))?;
        }
        let before = std::mem::replace(&mut self.watches, watches.clone());
        let shown = &self.shared.watches;
        shown
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&watches);
        if !tell {
            return Ok(());
        }
        for gone in before.iter().filter(|w| !watches.contains(w)) {
            self.shared.publish(&Update::Unmounted(gone.clone()));
        }
        for new in watches.iter().filter(|w| !before.contains(w)) {
            self.shared.publish(&Update::Mounted(new.clone()));
        }
        Ok(())
    }

    fn apply(&mut self, records: Vec<RawEvent>) {
        if records.is_empty() {
            return;
        }
        let counter = &self.shared.events;
        counter.fetch_add(records.len() as u64, Ordering::Relaxed);
        let clock = BootClock::now();
        let mut touched = BTreeMap::new();
        for record in records {
            let exited = record.kind == Kind::Exit;
            touched.insert((record.pid, record.fd), clock.at(record.ts));
            let report = self.report(record, clock);
            let changes = self.write_table().apply(report);
            for change in changes {
                if exited {
                    self.ensure_gone(change.id);
                }
                self.announce(change);
            }
        }
        let ring_full = self.shared.kernel_losses().get(Loss::RingFull);
        if ring_full > self.ring_full {
            // Any close may be among what got lost.
            self.ring_full = ring_full;
            let now = SystemTime::now();
            let all = self.write_table().keys();
            touched.extend(all.into_iter().map(|key| (key, now)));
        }
        for (key, at) in touched {
            self.agree(key, at, false);
        }
    }

    /// How long to wait for events.
    fn timeout(&self) -> EpollTimeout {
        if self.doubts.is_empty() {
            EpollTimeout::NONE
        } else {
            EpollTimeout::from(DOUBT.as_millis() as u8)
        }
    }

    /// Looks again at entries whose close should have come by now.
    fn settle_doubts(&mut self) {
        let due: Vec<_> = self
            .doubts
            .iter()
            .filter(|(_, (since, _))| since.elapsed() >= DOUBT)
            .map(|(key, (_, at))| (*key, *at))
            .collect();
        for (key, at) in due {
            self.doubts.remove(&key);
            self.agree(key, at, true);
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

    fn write_table(&self) -> RwLockWriteGuard<'_, Table> {
        self.shared
            .table
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self, change: Change) {
        let made = change.event.kind != EventKind::Close;
        self.store_path(change.id, made.then_some((change.within, &change.event.fd)));
        if change.within {
            self.shared.publish(&Update::Fd(change.event));
        }
    }

    /// Looks up what the kernel has for a descriptor that events were about.
    /// An entry that it does not have goes if `for_good`; else its close is
    /// probably on its way.
    fn agree(&mut self, (pid, fd): (u32, u32), at: SystemTime, for_good: bool) {
        if !self.write_table().holds((pid, fd)) {
            return;
        }
        let key = vb_fd_key { pid, fd };
        // Where it cannot be read, the events have to do.
        let Ok(found) = self.fds.lookup(abi::bytes(&key), MapFlags::ANY) else {
            return;
        };
        let found = found.and_then(|bytes| abi::value::<vb_fd>(&bytes));
        if found.is_none() && !for_good {
            self.doubts.entry((pid, fd)).or_insert((Instant::now(), at));
            return;
        }
        let found = found.map(|entry| (entry.opened_at, entry.ino));
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
        };
        let inside = raw.path.map(PathBuf::from);
        let path = inside
            .as_deref()
            .and_then(|inside| watch::show(&self.watches, raw.dev, inside));
        Report::Made {
            kind,
            tid: raw.tid,
            id,
            // What has lost its path may be below a prefix, and is shown.
            within: path.is_some() || inside.is_none(),
            fd: TrackedFd {
                pid: raw.pid,
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
    fn store_path(&self, id: Id, made: Option<(bool, &Arc<TrackedFd>)>) {
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
            let counter = &self.shared.paths_full;
            let before = counter.fetch_add(1, Ordering::Relaxed);
            pinned::set_loss_paths(&self.meta, before + 1);
        }
    }
}
