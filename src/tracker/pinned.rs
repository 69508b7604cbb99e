//! The pinned maps: written by the one that tracks, read by `dump-map`.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::fcntl::{Flock, FlockArg};

use super::abi::{self, RcloneBypassSkel, StoredPath, vb_fd, vb_fd_key, vb_meta};
use super::account::{self, Accounts};
use super::clock::{BootClock, boot_ns};
use super::{Losses, TrackerError, host};
use crate::mounts::Dev;
use crate::privileges::{self, Capabilities};
use crate::sys::start_time;

const META: &str = "meta";
const STATS: &str = "stats";
const FDS: &str = "fds";
const PATHS: &str = "paths";
const MARKS: &str = "marks";
const ACCOUNTS: &str = "accounts";
const READS: &str = "reads";
const CLIPS: &str = "clips";
const NAMES: [&str; 8] = [META, STATS, FDS, PATHS, MARKS, ACCOUNTS, READS, CLIPS];

/// A path reaches the map shortly after its descriptor: how long a dump waits
/// for the next of those that are missing, for all, and how often it looks.
const PATH_PATIENCE: Duration = Duration::from_millis(200);
const PATHS_PATIENCE: Duration = Duration::from_secs(5);
const PATH_INTERVAL: Duration = Duration::from_millis(10);

fn failed(dir: &Path, error: impl std::fmt::Display) -> TrackerError {
    TrackerError::Failed(format!("`{}`: {error}", dir.display()))
}

/// The folder of the pins, owned until it is dropped.
pub(super) struct Pins {
    dir: PathBuf,
    /// The folder itself. Its lock is held by the kernel until this process
    /// ends, however it does.
    lock: Flock<File>,
    /// Whether a process that died had left its pins here.
    pub(super) replaced: bool,
}

impl Pins {
    /// Makes the folder and takes it, replacing the pins of a dead owner.
    pub(super) fn claim(dir: &Path) -> Result<Self, TrackerError> {
        let dir = host::pin_folder(dir)?;
        loop {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
            made.map_err(|e| failed(&dir, e))?;
            let folder = File::open(&dir).map_err(|e| failed(&dir, e))?;
            let found = folder.metadata().map_err(|e| failed(&dir, e))?;
            // Who could remove our pins, or put others in their place.
            let (owner, own) = (found.uid(), rustix::process::geteuid().as_raw());
            if owner != own && owner != 0 {
                let why = format_args!("belongs to uid {owner}: choose another --pin-dir");
                return Err(failed(&dir, why));
            }
            // With the sticky bit, as a BPF file system's own folder, they could not.
            if found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0 {
                let why = "others may write to it: chmod 700, or choose another --pin-dir";
                return Err(failed(&dir, why));
            }
            let flock = Flock::lock(folder, FlockArg::LockExclusiveNonblock);
            let lock = flock.map_err(|(_, errno)| match read_meta(&dir) {
                Ok(meta) => TrackerError::InUse {
                    pid: meta.pid,
                    dir: dir.clone(),
                },
                Err(_) => failed(&dir, format_args!("another process starts here: {errno}")),
            })?;
            let mut pins = Self {
                dir: dir.clone(),
                lock,
                replaced: false,
            };
            // Its owner may have removed it between our open and our lock.
            if !pins.is_ours() {
                continue;
            }
            if NAMES.iter().any(|name| dir.join(name).exists()) {
                if read_meta(&dir).is_err() {
                    return Err(failed(&dir, "holds the pins of another program"));
                }
                pins.replaced = true;
                pins.remove_maps()?;
            }
            return Ok(pins);
        }
    }

    /// Whether the path still leads to the folder that we have locked.
    fn is_ours(&self) -> bool {
        let identity = |m: fs::Metadata| (m.dev(), m.ino());
        let path = fs::metadata(&self.dir).map(identity);
        path.is_ok_and(|path| self.lock.metadata().is_ok_and(|m| identity(m) == path))
    }

    /// Pins the maps and says whose they are.
    pub(super) fn publish(
        &self,
        skeleton: &mut RcloneBypassSkel<'_>,
        published: &mut Published,
        reads: Option<&[u32]>,
    ) -> Result<(), TrackerError> {
        let own = std::process::id();
        let identity = |meta: &mut vb_meta| {
            meta.since = boot_ns();
            meta.start_time = start_time(own).unwrap_or(0);
            meta.version = abi::VERSION;
            meta.pid = own;
            meta.account = reads.is_some().into();
            for (slot, id) in meta.read_programs.iter_mut().zip(reads.unwrap_or_default()) {
                *slot = *id;
            }
        };
        published
            .try_set(identity)
            .map_err(|e| failed(&self.dir, e))?;
        let maps = &mut skeleton.maps;
        // META last: who finds it finds the others.
        for (map, name) in [
            (&mut maps.stats, STATS),
            (&mut maps.fds, FDS),
            (&mut maps.paths, PATHS),
            (&mut maps.marks, MARKS),
            (&mut maps.accounts, ACCOUNTS),
            (&mut maps.reads, READS),
            (&mut maps.clips, CLIPS),
            (&mut maps.meta, META),
        ] {
            let path = self.dir.join(name);
            map.pin(&path).map_err(|e| failed(&path, e))?;
        }
        Ok(())
    }

    /// What it will take to remove them.
    pub(super) fn to_remove(&self) -> Capabilities {
        [Some(self.dir.as_path()), self.dir.parent()]
            .into_iter()
            .flatten()
            .fold(Capabilities::NONE, |all, folder| {
                all | privileges::to_remove_from(folder)
            })
    }

    /// Removes the pins and their folder, and tells of errors; dropping does
    /// the same, and does not.
    pub(super) fn remove(&self) -> Result<(), TrackerError> {
        // By hand, or by a later owner: then they are not ours to remove.
        if !self.is_ours() || read_meta(&self.dir).is_ok_and(|m| m.pid != std::process::id()) {
            return Ok(());
        }
        self.remove_maps()?;
        match fs::remove_dir(&self.dir) {
            // Something that is not ours is in it.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            removed => removed.map_err(|e| failed(&self.dir, e)),
        }
    }

    fn remove_maps(&self) -> Result<(), TrackerError> {
        for name in NAMES {
            let path = self.dir.join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(|e| failed(&path, e))?,
            }
        }
        Ok(())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // After `remove` there is nothing left, and the folder not ours;
        // elsewhere an error that matters more is on its way to the user.
        let _ = self.remove();
    }
}

const META_KEY: [u8; 4] = 0u32.to_ne_bytes();

/// The `meta` map, as this process has written it last.
pub(super) struct Published {
    map: MapHandle,
    meta: vb_meta,
}

impl Published {
    pub(super) fn new(map: MapHandle) -> Self {
        Self {
            map,
            meta: vb_meta::default(),
        }
    }

    /// Changes it; an error is the owner's to see in its own summary.
    pub(super) fn set(&mut self, change: impl FnOnce(&mut vb_meta)) {
        let _ = self.try_set(change);
    }

    fn try_set(&mut self, change: impl FnOnce(&mut vb_meta)) -> libbpf_rs::Result<()> {
        change(&mut self.meta);
        self.map
            .update(&META_KEY, abi::bytes(&self.meta), MapFlags::ANY)
    }
}

fn open_map(dir: &Path, name: &str) -> Result<MapHandle, DumpError> {
    let path = dir.join(name);
    match fs::metadata(&path) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(DumpError::NotRunning(dir.to_path_buf()));
        }
        Err(error) => return Err(DumpError::Unreadable { path, error }),
    }
    MapHandle::from_pinned_path(&path).map_err(|e| {
        let error = match e.kind() {
            libbpf_rs::ErrorKind::PermissionDenied => {
                io::Error::from(io::ErrorKind::PermissionDenied)
            }
            _ => io::Error::other(e.to_string()),
        };
        DumpError::Unreadable { path, error }
    })
}

fn read_meta(dir: &Path) -> Result<vb_meta, DumpError> {
    let map = open_map(dir, META)?;
    map.lookup(&META_KEY, MapFlags::ANY)
        .ok()
        .flatten()
        .and_then(|bytes| abi::value(&bytes))
        .ok_or_else(|| DumpError::Foreign(dir.to_path_buf()))
}

/// Why the maps cannot be shown.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DumpError {
    /// There are none.
    #[error("no map is pinned at `{}`: start `vmafx-bypass run --prefix DIR` first", .0.display())]
    NotRunning(PathBuf),
    /// They may not be opened.
    #[error("`{}`: {error}: run as the user who started `run`, or as root", path.display())]
    Unreadable {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// They are of another version, or of another program.
    #[error("the maps at `{}` are of another version of vmafx-bypass: use the same for both", .0.display())]
    Foreign(PathBuf),
}

/// Who owns the pinned maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Its pid.
    pub pid: u32,
    /// Whether it still runs; if not, the maps have been frozen since it died.
    pub alive: bool,
    /// Since when it tracks.
    pub since: SystemTime,
}

/// An entry of the pinned map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpEntry {
    /// The process.
    pub pid: u32,
    /// Its pid in its own pid namespace.
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
    /// The open flags.
    pub flags: u32,
    /// When it was made.
    pub opened_at: SystemTime,
    /// The file's size at its open, bytes.
    pub size: u64,
}

/// What the pinned maps hold.
#[derive(Debug, Clone)]
pub struct Dump {
    /// Who owns them.
    pub owner: Owner,
    /// Whether no reconciliation was under way.
    pub settled: bool,
    /// What got lost.
    pub losses: Losses,
    /// What is tracked, by pid and descriptor.
    pub entries: Vec<DumpEntry>,
    /// What reads cost; `None`: they are not counted.
    pub accounts: Option<Accounts>,
}

impl Dump {
    /// Whether the entries are all that there is: the owner runs, what it lost
    /// was made good, and every path has arrived.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.owner.alive
            && self.settled
            && self.losses.complete()
            && self.entries.iter().all(|entry| entry.path.is_some())
    }
}

/// Who owns the maps that are pinned there.
///
/// # Errors
/// As of [`dump`].
pub(super) fn owner(pin_dir: &Path) -> Result<Owner, DumpError> {
    let meta = read_meta(pin_dir)?;
    owner_of(&meta, pin_dir, &BootClock::now())
}

fn owner_of(meta: &vb_meta, pin_dir: &Path, clock: &BootClock) -> Result<Owner, DumpError> {
    if meta.version != abi::VERSION {
        return Err(DumpError::Foreign(pin_dir.to_path_buf()));
    }
    Ok(Owner {
        pid: meta.pid,
        alive: start_time(meta.pid) == Some(meta.start_time),
        since: clock.at(meta.since),
    })
}

/// Reads the pinned maps, while their owner goes on writing them.
///
/// # Errors
/// Where there are none, they may not be opened, or are of another version.
pub fn dump(pin_dir: &Path) -> Result<Dump, DumpError> {
    let clock = BootClock::now();
    let meta = read_meta(pin_dir)?;
    let owner = owner_of(&meta, pin_dir, &clock)?;
    let deadline = Instant::now() + PATH_PATIENCE;
    let fds = open_map(pin_dir, FDS)?;
    let settled = !owner.alive || wait_until_settled(pin_dir, deadline)?;
    let paths = open_map(pin_dir, PATHS)?;
    let open = read_fds(&fds).map_err(|error| DumpError::Unreadable {
        path: pin_dir.join(FDS),
        error,
    })?;
    // After the descriptors, so that it has what had arrived with them.
    let known = read_paths(&paths, open.len());
    let last = Instant::now() + PATHS_PATIENCE;
    let mut deadline = Instant::now() + PATH_PATIENCE;
    let mut entries = Vec::new();
    for (key, value) in open {
        let maps = (&fds, &paths, &known);
        let path = match wait_for_path(maps, key, &value, owner.alive.then_some(deadline)) {
            Found::Path(path) => {
                // Where one has come, the next is on its way.
                deadline = last.min(Instant::now() + PATH_PATIENCE);
                Some(path)
            }
            Found::Lost => None,
            Found::Outside | Found::Closed => continue,
        };
        entries.push(DumpEntry {
            pid: key.pid,
            own_pid: value.own_pid,
            fd: key.fd,
            comm: abi::comm(&value.comm),
            path,
            dev: Dev(value.dev),
            ino: value.ino,
            flags: value.flags,
            opened_at: clock.at(value.opened_at),
            size: value.size,
        });
    }
    entries.sort_by_key(|e| (e.pid, e.fd));
    let accounts = (meta.account != 0)
        .then(|| read_accounts(pin_dir))
        .transpose()?;
    // Last, so that they hold what got lost meanwhile.
    let mut losses = abi::Stats::new(open_map(pin_dir, STATS)?).losses();
    let meta = read_meta(pin_dir)?;
    losses.add(super::Loss::PathsFull, meta.loss_paths);
    losses.add(super::Loss::ReconcileFailed, meta.loss_reconcile);
    if owner.alive {
        let misses = host::recursion_misses(&owner.pid.to_string(), &meta.read_programs);
        losses.add(super::Loss::RecursionMisses, misses.tracking);
        let uncounted = losses.get(super::Loss::ReadUncounted) + misses.reads;
        losses.add(super::Loss::ReadUncounted, uncounted);
    }
    losses.healed = meta.healed;
    Ok(Dump {
        owner,
        settled,
        losses,
        entries,
        accounts,
    })
}

fn read_accounts(pin_dir: &Path) -> Result<Accounts, DumpError> {
    let maps = account::Maps {
        accounts: open_map(pin_dir, ACCOUNTS)?,
        reads: open_map(pin_dir, READS)?,
        clips: open_map(pin_dir, CLIPS)?,
    };
    maps.read().map_err(|error| DumpError::Unreadable {
        path: pin_dir.join(ACCOUNTS),
        error,
    })
}

/// Waits for processes that are to be reconciled; false where that takes too
/// long.
fn wait_until_settled(pin_dir: &Path, deadline: Instant) -> Result<bool, DumpError> {
    let marks = open_map(pin_dir, MARKS)?;
    loop {
        // In this order: the owner says that it is busy before it takes a mark.
        if marks.keys().next().is_none() && read_meta(pin_dir)?.busy == 0 {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(PATH_INTERVAL);
    }
}

/// The processes that the kernel's map has entries of; none where it cannot be
/// read.
pub(super) fn tracked_pids(fds: &MapHandle) -> BTreeSet<u32> {
    let entries = read_fds(fds).unwrap_or_default();
    entries.into_iter().map(|(key, _)| key.pid).collect()
}

fn read_fds(map: &MapHandle) -> io::Result<Vec<(vb_fd_key, vb_fd)>> {
    // In one call: the kernel ends a batch early where a hash bucket does not
    // fit, which libbpf-rs takes for the end.
    let elements = map
        .lookup_batch(map.max_entries(), MapFlags::ANY, MapFlags::ANY)
        .map_err(|e| io::Error::other(e.to_string()))?;
    Ok(elements
        .filter_map(|(key, value)| Some((abi::value(&key)?, abi::value(&value)?)))
        .collect())
}

/// What `paths` holds of so many descriptors, in few calls. Nothing rests on
/// all of it being here: a batch may end early, see [`read_fds`], and what is
/// missing is looked up.
pub(super) fn read_paths(map: &MapHandle, descriptors: usize) -> HashMap<Vec<u8>, Vec<u8>> {
    // Few paths need more than one element; no more memory than that takes.
    let room = (2 * descriptors as u64).min(u64::from(map.max_entries())) as u32;
    if room == 0 {
        return HashMap::new();
    }
    let elements = map.lookup_batch(room, MapFlags::ANY, MapFlags::ANY);
    elements.map(Iterator::collect).unwrap_or_default()
}

enum Found {
    Path(PathBuf),
    Outside,
    Closed,
    Lost,
}

fn wait_for_path(
    (fds, paths, known): (&MapHandle, &MapHandle, &HashMap<Vec<u8>, Vec<u8>>),
    key: vb_fd_key,
    value: &vb_fd,
    deadline: Option<Instant>,
) -> Found {
    let id = (key.pid, key.fd, value.opened_at);
    let mut stored = abi::load_path(|key| known.get(key), id);
    loop {
        if stored.is_none() {
            stored = abi::load_path(|key| paths.lookup(key, MapFlags::ANY).ok()?, id);
        }
        match stored.take() {
            Some(StoredPath::Known(path)) if !path.is_empty() => return Found::Path(path.into()),
            // Its path got lost on the way, which the losses tell.
            Some(StoredPath::Known(_)) => return Found::Lost,
            Some(StoredPath::Outside) => return Found::Outside,
            None => {}
        }
        let current = fds.lookup(abi::bytes(&key), MapFlags::ANY).ok().flatten();
        let current = current.and_then(|bytes| abi::value::<vb_fd>(&bytes));
        if current.is_none_or(|now| now.opened_at != value.opened_at) {
            return Found::Closed;
        }
        if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            return Found::Lost;
        }
        std::thread::sleep(PATH_INTERVAL);
    }
}
