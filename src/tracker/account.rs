//! What reads through FUSE cost, by process and clip: counted by the BPF programs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::abi::{self, StoredPath, vb_account, vb_account_key, vb_reads};
use super::pinned;
use super::table::TrackedFd;
use crate::mounts::Dev;

/// Read calls on tracked descriptors: read(2), pread(2), readv(2), preadv(2) and
/// preadv2(2). Not seen are mmap(2), splice(2), sendfile(2), copy_file_range(2) and
/// io_uring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadCost {
    /// Calls that returned, also with an error.
    pub reads: u64,
    /// Bytes that they returned.
    pub bytes: u64,
    /// Time spent in them, nanoseconds.
    pub ns: u64,
}

/// What a process has read of a clip, by whatever descriptors. A pid that was given
/// away again goes on with the account of the process before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The process, as [`TrackedFd::pid`].
    pub pid: u32,
    /// The process's name at its first read of the clip.
    pub comm: OsString,
    /// The superblock.
    pub dev: Dev,
    /// Which mount it was: numbered as they come, since device and inode may be those
    /// of another one after a remount.
    pub mount: u32,
    /// FUSE's inode number.
    pub ino: u64,
    /// Absolute, through the watched prefix; `None` where it got lost.
    pub path: Option<PathBuf>,
    /// The clip's size when the descriptor that was last read was opened, bytes.
    pub size: u64,
    /// What that cost.
    pub cost: ReadCost,
}

/// What was read since the tracking began.
#[derive(Debug, Clone, Default)]
pub struct Accounts {
    /// All reads on the watched mounts, also of clips beside the prefixes.
    pub total: ReadCost,
    /// Those below the prefixes, what took longest first.
    pub each: Vec<Account>,
    /// Accounts that had to make room for newer ones: they are in the total alone.
    /// About: some may be begun while this is read.
    pub forgotten: u64,
}

fn failed(error: libbpf_rs::Error) -> io::Error {
    io::Error::other(error.to_string())
}

/// The maps that hold it.
pub(super) struct Maps {
    pub(super) accounts: MapHandle,
    pub(super) reads: MapHandle,
    pub(super) clips: MapHandle,
}

impl Maps {
    /// Reads all of it.
    pub(super) fn read(&self) -> io::Result<Accounts> {
        // Before the accounts: those that are begun meanwhile were not forgotten.
        let begun = self.all_cpus().map_err(failed)?.accounts;
        let all = (self.accounts)
            .lookup_batch(self.accounts.max_entries(), MapFlags::ANY, MapFlags::ANY)
            .map_err(failed)?;
        let found: Vec<(vb_account_key, vb_account)> = all
            .filter_map(|(key, value)| Some((abi::value(&key)?, abi::value(&value)?)))
            .collect();
        let all = self.all_cpus().map_err(failed)?;
        let total = ReadCost {
            reads: all.reads,
            bytes: all.bytes,
            ns: all.ns,
        };
        let names = pinned::read_paths(&self.clips, found.len());
        let mut each = Vec::new();
        let forgotten = begun.saturating_sub(found.len() as u64);
        for (key, value) in found {
            let id = clip_id((key.mount, key.ino));
            let stored = abi::load_path(|key| names.get(key), id)
                .or_else(|| abi::load_path(|key| self.clips.lookup(key, MapFlags::ANY).ok()?, id));
            let path = match stored {
                Some(StoredPath::Outside) => continue,
                Some(StoredPath::Known(path)) => Some(path.into()),
                None => None,
            };
            each.push(Account {
                pid: key.pid,
                comm: abi::comm(&value.comm),
                dev: Dev(value.dev),
                mount: key.mount,
                ino: key.ino,
                path,
                size: value.size,
                cost: ReadCost::of(&value),
            });
        }
        each.sort_by(|a, b| b.cost.ns.cmp(&a.cost.ns).then(a.pid.cmp(&b.pid)));
        Ok(Accounts {
            total,
            each,
            forgotten,
        })
    }

    /// The totals of every CPU together.
    fn all_cpus(&self) -> libbpf_rs::Result<vb_reads> {
        let mut all = vb_reads::default();
        let cpus = self.reads.lookup_percpu(&[0; 4], MapFlags::ANY)?;
        for cpu in cpus.unwrap_or_default() {
            let part: vb_reads = abi::value(&cpu).unwrap_or_default();
            all.reads += part.reads;
            all.bytes += part.bytes;
            all.ns += part.ns;
            all.accounts += part.accounts;
        }
        Ok(all)
    }
}

/// The maps, and which mount is the latest of a device.
pub(super) struct Live {
    pub(super) maps: Arc<Maps>,
    pub(super) mounts: BTreeMap<Dev, u32>,
}

impl Live {
    /// What a process has read of a clip so far.
    pub(super) fn cost(&self, pid: u32, dev: Dev, ino: u64) -> Option<ReadCost> {
        let mount = *self.mounts.get(&dev)?;
        let key = vb_account_key { ino, mount, pid };
        let found = self.maps.accounts.lookup(abi::bytes(&key), MapFlags::ANY);
        let account: vb_account = abi::value(&found.ok()??)?;
        Some(ReadCost::of(&account))
    }
}

impl std::ops::AddAssign for ReadCost {
    fn add_assign(&mut self, other: Self) {
        self.reads += other.reads;
        self.bytes += other.bytes;
        self.ns += other.ns;
    }
}

impl ReadCost {
    fn of(account: &vb_account) -> Self {
        Self {
            reads: account.reads,
            bytes: account.bytes,
            ns: account.ns,
        }
    }
}

/// A clip: the mount's number and FUSE's inode.
type Clip = (u32, u64);

/// A clip's key in the map of paths, as that of an open: no process has pid 0.
fn clip_id((mount, ino): Clip) -> (u32, u32, u64) {
    (0, mount, ino)
}

/// Keeps where clips are, also when nobody has them open any more: bounded, the one
/// whose last open is the longest ago makes room.
pub(super) struct Names {
    map: MapHandle,
    known: BTreeMap<Clip, (Option<PathBuf>, u64)>,
    /// By the number of its last open.
    order: BTreeMap<u64, Clip>,
    opens: u64,
    limit: usize,
}

impl Names {
    pub(super) fn new(map: MapHandle, limit: u32) -> Self {
        Self {
            map,
            known: BTreeMap::new(),
            order: BTreeMap::new(),
            opens: 0,
            limit: limit as usize,
        }
    }

    /// Notes an open of a clip; one that is not `within` a prefix is not to be shown.
    /// False where there is no room for its path.
    pub(super) fn note(&mut self, mount: u32, fd: &TrackedFd, within: bool) -> bool {
        // One whose path got lost may have been seen before.
        if within && fd.path.is_none() {
            return true;
        }
        let clip = (mount, fd.ino);
        let path = fd.path.as_deref().filter(|_| within);
        self.opens += 1;
        let mut is_stored = false;
        if let Some((known, opened)) = self.known.remove(&clip) {
            self.order.remove(&opened);
            is_stored = known.as_deref() == path;
            if !is_stored {
                abi::delete_path(&self.map, clip_id(clip));
            }
        }
        while self.known.len() >= self.limit && self.forget_oldest() {}
        // Long paths take more room than was reckoned with.
        while !is_stored {
            is_stored = abi::store_path(&self.map, clip_id(clip), path);
            if !is_stored && !self.forget_oldest() {
                return false;
            }
        }
        let path = path.map(Path::to_path_buf);
        self.known.insert(clip, (path, self.opens));
        self.order.insert(self.opens, clip);
        true
    }

    fn forget_oldest(&mut self) -> bool {
        let Some((_, clip)) = self.order.pop_first() else {
            return false;
        };
        self.known.remove(&clip);
        abi::delete_path(&self.map, clip_id(clip));
        true
    }
}
