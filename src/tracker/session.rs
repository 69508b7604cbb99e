//! The tracking thread: loads, attaches, and waits for events and commands.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{MapHandle, RingBuffer, RingBufferBuilder};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::abi::{self, OpenRcloneBypassSkel, RawEvent, RcloneBypassSkelBuilder};
use super::account;
use super::attach::{self, AttachMode, Kernel};
use super::pinned::{Pins, Published};
use super::reconcile::Reconciler;
use super::state::State;
use super::watch::{Prefix, Watch};
use super::{Command, Log, Shared, TrackerError, TrackerOptions, failed, host};
use crate::mounts::MountTable;
use crate::privileges;

/// Records taken from the ring before commands are looked at again.
const RECORDS_AT_ONCE: usize = 4_096;
/// The smallest record in the ring, its header included, bytes.
const RECORD_BYTES: usize = 104;

/// Events that follow one another faster are taken together: a wakeup for each
/// would cost the host more than the events do.
const TOGETHER: Duration = Duration::from_millis(1);

/// How long a prefix may take to resolve at the start, if it must be there; if not,
/// tracking need not wait for a daemon that hangs, and does not once it has begun.
const MUST: Duration = Duration::from_secs(10);
const MAY: Duration = Duration::from_secs(1);
const LATER: Duration = Duration::from_millis(50);

const RING: u64 = 0;
const MOUNTS: u64 = 1;
const WAKE: u64 = 2;

/// What a session has from its start on, whatever way it attaches.
struct Setup<'a> {
    options: &'a TrackerOptions,
    shared: &'a Arc<Shared>,
    commands: &'a Receiver<Command>,
    ready: &'a SyncSender<()>,
    mountinfo: File,
    prefixes: Vec<Prefix>,
    watches: Vec<Watch>,
    pins: Option<Pins>,
}

/// Why a mode was left: another may do.
enum Ended {
    NotHere(TrackerError),
    Failed(TrackerError),
}

impl From<TrackerError> for Ended {
    fn from(error: TrackerError) -> Self {
        Self::Failed(error)
    }
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
    let patience = if options.allow_missing { MAY } else { MUST };
    let watches = find_watches(&mut prefixes, options.allow_missing, patience, shared)?;
    let pins = options.pin_dir.as_deref().map(Pins::claim).transpose()?;
    set_log(options.log);
    let mut setup = Setup {
        options,
        shared,
        commands,
        ready,
        mountinfo,
        prefixes,
        watches,
        pins,
    };
    let modes: &[AttachMode] = match &options.attach {
        Some(mode) => std::slice::from_ref(mode),
        None => &AttachMode::ALL,
    };
    let mut refused = Vec::new();
    for mode in modes {
        match track(&mut setup, *mode) {
            Ok(()) => return Ok(()),
            Err(Ended::Failed(error)) => return Err(error),
            Err(Ended::NotHere(error)) => {
                shared.note_refused(*mode, &error);
                refused.push(error);
            }
        }
    }
    match refused.pop() {
        Some(error) if refused.is_empty() => Err(error),
        // Each names its mode.
        last => {
            let all: Vec<_> = refused
                .iter()
                .chain(&last)
                .map(ToString::to_string)
                .collect();
            Err(TrackerError::Environment(all.join("; ")))
        }
    }
}

/// Whether the programs of a mode load here, all of them, and attach: one of each
/// kind, since to detach them can take a tenth of a second each.
pub(super) fn probe(mode: AttachMode, log: Option<Log>) -> Result<(), TrackerError> {
    set_log(log);
    let mut storage = MaybeUninit::uninit();
    let open = open(&mut storage, &TrackerOptions::default(), mode)?;
    let mut skeleton = open.load().map_err(|e| load_error(mode, &e))?;
    let mut links = BTreeMap::new();
    for program in skeleton.object_mut().progs_mut() {
        let section = program.section().to_string_lossy();
        // Without a target it is run by user space.
        let Some((kind, _)) = section.split_once('/') else {
            continue;
        };
        if program.autoload() && !links.contains_key(kind) {
            let kind = kind.to_owned();
            let link = program.attach().map_err(|e| attach_error(mode, &e))?;
            links.insert(kind, link);
        }
    }
    Ok(())
}

/// The caller prints, not libbpf.
fn set_log(log: Option<Log>) {
    libbpf_rs::set_print(log.map(|log| (libbpf_rs::PrintLevel::Warn, log)));
}

fn open<'obj>(
    storage: &'obj mut MaybeUninit<libbpf_rs::OpenObject>,
    options: &TrackerOptions,
    mode: AttachMode,
) -> Result<OpenRcloneBypassSkel<'obj>, TrackerError> {
    if mode == AttachMode::Tracepoint {
        host::need_tracefs()?;
    }
    let mut open = RcloneBypassSkelBuilder::default()
        .open(storage)
        .map_err(|e| failed("opening the BPF object", e))?;
    configure(&mut open, options).map_err(|e| failed("configuring the BPF maps", e))?;
    // Read again for each mode: some megabytes that are let go at once.
    attach::select(&mut open, mode, options.account, &Kernel::read()?);
    Ok(open)
}

/// Loads and attaches in one mode, and tracks.
fn track(setup: &mut Setup<'_>, mode: AttachMode) -> Result<(), Ended> {
    let (options, shared) = (setup.options, setup.shared);
    let mut storage = MaybeUninit::uninit();
    let open = open(&mut storage, options, mode).map_err(Ended::NotHere)?;
    let mut skeleton = open
        .load()
        .map_err(|e| Ended::NotHere(load_error(mode, &e)))?;

    let handle =
        |map: &libbpf_rs::MapMut<'_>| MapHandle::try_from(map).map_err(|e| failed("BPF map", e));
    let maps = &skeleton.maps;
    let ring_map = handle(&maps.events)?;
    let paths = setup.pins.as_ref().map(|_| handle(&maps.paths));
    *shared.kernel.lock().unwrap_or_else(PoisonError::into_inner) =
        Some(abi::Stats::new(handle(&maps.stats)?));
    let names = options.account.then(|| handle(&maps.clips)).transpose()?;
    if options.account {
        let maps = account::Maps {
            accounts: handle(&maps.accounts)?,
            reads: handle(&maps.reads)?,
            clips: handle(&maps.clips)?,
        };
        let live = account::Live {
            maps: Arc::new(maps),
            mounts: BTreeMap::new(),
        };
        *shared.lock_accounts() = Some(live);
    }
    let mut state = State {
        shared,
        watched: handle(&maps.watched)?,
        watched_slots: handle(&maps.watched_slots)?,
        fds: handle(&maps.fds)?,
        published: Published::new(handle(&maps.meta)?),
        paths: paths.transpose()?,
        mounts: (0, BTreeMap::new()),
        names: names.map(|map| account::Names::new(map, options.max_fds)),
        watches: Vec::new(),
        doubts: BTreeMap::new(),
        marked: false,
        pathless: Vec::new(),
    };
    let reconciled = [
        handle(&maps.marks)?,
        handle(&maps.procs)?,
        handle(&maps.sweeping)?,
    ];

    let records = RefCell::new(Vec::new());
    let mut builder = RingBufferBuilder::new();
    builder
        .add(&ring_map, |record| {
            records.borrow_mut().extend(RawEvent::decode(record));
            0
        })
        .map_err(|e| failed("ring buffer", e))?;
    let ring = builder.build().map_err(|e| failed("ring buffer", e))?;
    let source = Source {
        ring: &ring,
        records: &records,
        // Enough to take the whole ring at once, and no more, so that commands
        // and mounts get their turn while events keep coming.
        rounds: options.ring_bytes as usize / RECORD_BYTES / RECORDS_AT_ONCE + 1,
    };

    skeleton
        .attach()
        .map_err(|e| Ended::NotHere(attach_error(mode, &e)))?;
    shared.note_mode(mode);
    let reads = options.account.then(|| read_programs(&mut skeleton));
    if let Some(reads) = &reads {
        // One session, as with the mode.
        let _ = shared.read_programs.set(reads.clone());
    }
    // Not before: what is seen to be opened is to be seen closed.
    state.watch(std::mem::take(&mut setup.watches), false)?;
    if let Some(pins) = &setup.pins {
        pins.publish(&mut skeleton, &mut state.published, reads.as_deref())?;
        if pins.replaced {
            shared.replaced_pins.store(true, Ordering::Relaxed);
        }
    }
    if let Some(keep) = setup.options.keep {
        let to_remove = setup.pins.as_ref().map(Pins::to_remove);
        let needs = keep | privileges::for_maps() | to_remove.unwrap_or_default();
        privileges::keep(needs).map_err(|e| failed("giving up capabilities", e))?;
    }
    let reconciler = Reconciler::new(skeleton.progs.reconcile, reconciled, source);
    let result = Loop {
        shared,
        commands: setup.commands,
        ready: setup.ready,
        ring_map: &ring_map,
        mountinfo: &setup.mountinfo,
    }
    .run(&mut state, reconciler, &mut setup.prefixes);
    shared.note_recursion_misses();
    let removed = setup.pins.as_ref().map_or(Ok(()), Pins::remove);
    // Nothing more will come. After this the programs go, which takes Linux 6.1 and
    // 6.12 a tenth of a second for each function that one of fentry is at.
    shared.end_subscriptions();
    Ok(result.and(removed)?)
}

/// The ids of the programs that count reads, and do nothing else.
fn read_programs(skeleton: &mut abi::RcloneBypassSkel<'_>) -> Vec<u32> {
    let programs = skeleton.object_mut().progs_mut();
    let reads =
        programs.filter(|program| attach::counts_reads(&program.section().to_string_lossy()));
    reads
        .filter_map(|program| host::program_id(program.as_fd()))
        .collect()
}

/// Where events come from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    ring: &'a RingBuffer<'a>,
    records: &'a RefCell<Vec<RawEvent>>,
    /// Times to take [`RECORDS_AT_ONCE`] before anything else gets its turn.
    rounds: usize,
}

impl Source<'_> {
    /// Applies what there is.
    pub(super) fn drain(&self, state: &mut State<'_>) {
        for _ in 0..self.rounds {
            let taken = self.ring.consume_raw_n(RECORDS_AT_ONCE);
            state.apply(self.records.take());
            if taken < RECORDS_AT_ONCE as i32 {
                break;
            }
        }
    }
}

/// What the event loop waits for.
struct Loop<'a> {
    shared: &'a Arc<Shared>,
    commands: &'a Receiver<Command>,
    ready: &'a SyncSender<()>,
    ring_map: &'a MapHandle,
    mountinfo: &'a File,
}

impl Loop<'_> {
    /// Tracks until it is told to stop.
    fn run(
        &self,
        state: &mut State<'_>,
        mut reconciler: Reconciler<'_>,
        prefixes: &mut [Prefix],
    ) -> Result<(), TrackerError> {
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
        reconciler.adopt(state)?;
        // The one who waits may have given up.
        let _ = self.ready.send(());

        let mut events = [EpollEvent::empty(); 3];
        let mut taken = Instant::now();
        // What was mounted since the start, epoll may not tell of any more.
        let mut look = true;
        loop {
            self.shared.beat();
            let due = state
                .doubt_due()
                .map_or(reconciler.next_due(), |due| due.min(reconciler.next_due()));
            let now = Instant::now();
            let wait = if look {
                Duration::ZERO
            } else {
                due.saturating_duration_since(now)
            };
            // Rounded up: not to come again and again just before it is due.
            let wait = EpollTimeout::try_from(wait.as_millis() + 1).unwrap_or(EpollTimeout::MAX);
            let count = match epoll.wait(&mut events, wait) {
                Err(Errno::EINTR) => continue,
                result => result.map_err(|e| failed("epoll", e))?,
            };
            let woken_by = |what| events[..count].iter().any(|e| e.data() == what);
            if woken_by(WAKE) {
                // Which commands there are, the channel tells.
                let _ = self.shared.wake.read();
            }
            if woken_by(RING) && !woken_by(WAKE) && taken.elapsed() < TOGETHER {
                std::thread::sleep(TOGETHER);
            }
            taken = Instant::now();
            let pending: Vec<Command> = self.commands.try_iter().collect();
            reconciler.source.drain(state);
            state.settle_doubts();
            // After the events of before: they are about the mounts of before.
            if (woken_by(MOUNTS) || std::mem::take(&mut look))
                && let Ok(watches) = find_watches(prefixes, true, LATER, self.shared)
                && state.watch(watches, true)?
            {
                // What was opened before it was watched, and what is not any more.
                reconciler.adopt(state)?;
            }
            reconciler.work(state)?;
            for command in pending {
                match command {
                    Command::Stop => return Ok(()),
                    Command::Look => look = true,
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
    if options.account {
        maps.accounts.set_max_entries(options.max_fds)?;
        maps.clips.set_max_entries(2 * options.max_fds)?;
        maps.readings.set_max_entries(options.max_fds)?;
    } else {
        maps.accounts.set_max_entries(1)?;
        maps.clips.set_max_entries(1)?;
        maps.readings.set_max_entries(1)?;
    }
    if let Some(rodata) = maps.rodata_data.as_deref_mut() {
        rodata.scratch_count = scratches;
        rodata.ring_limit = options.ring_bytes / 2;
        rodata.pidns_inum = host::pid_namespace().unwrap_or(0);
    }
    Ok(())
}

fn load_error(mode: AttachMode, error: &libbpf_rs::Error) -> TrackerError {
    let name = mode.name();
    TrackerError::Environment(match error.kind() {
        libbpf_rs::ErrorKind::PermissionDenied => format!(
            "the kernel refuses to load BPF programs (--attach {name}): {error}; run as root, or \
             with CAP_BPF and CAP_PERFMON, outside of lockdown, or choose another --attach"
        ),
        _ => format!(
            "loading the BPF programs failed (--attach {name}): {error}; linux 5.15 or newer with \
             BTF is needed"
        ),
    })
}

fn attach_error(mode: AttachMode, error: &libbpf_rs::Error) -> TrackerError {
    TrackerError::Environment(format!(
        "attaching failed (--attach {}): {error}; root or CAP_PERFMON is needed",
        mode.name()
    ))
}

/// The prefixes that are on an rclone mount; unless some may be missing, an
/// error for the first that is not.
fn find_watches(
    prefixes: &mut [Prefix],
    allow_missing: bool,
    patience: Duration,
    shared: &Arc<Shared>,
) -> Result<Vec<Watch>, TrackerError> {
    let table = MountTable::read().map_err(|e| failed("mountinfo", e))?;
    let mut watches = Vec::new();
    for prefix in prefixes {
        let shared = Arc::clone(shared);
        match prefix.find(&table, patience, move || shared.send(Command::Look)) {
            Ok(watch) => watches.push(watch),
            Err(error) if !allow_missing => return Err(error.into()),
            Err(_) => {}
        }
    }
    Ok(watches)
}
