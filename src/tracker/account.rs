//! What reads through FUSE cost, by process and clip: counted by the BPF programs.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

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
    pub forgotten: u64,
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
        let failed = |e: libbpf_rs::Error| io::Error::other(e.to_string());
        let all = (self.accounts)
            .lookup_batch(self.accounts.max_entries(), MapFlags::ANY, MapFlags::ANY)
            .map_err(failed)?;
        let found: Vec<(vb_account_key, vb_account)> = all
            .filter_map(|(key, value)| Some((abi::value(&key)?, abi::value(&value)?)))
            .collect();
        // After the accounts, which later ones only add to.
        let cpus = self.reads.lookup_percpu(&[0; 4], MapFlags::ANY);
        let mut begun = 0;
        let mut total = ReadCost::default();
        for cpu in cpus.map_err(failed)?.unwrap_or_default() {
            let part: vb_reads = abi::value(&cpu).unwrap_or_default();
            total.add(part.reads, part.bytes, part.ns);
            begun += part.accounts;
        }
        let names = pinned::read_paths(&self.clips, found.len());
        let mut each = Vec::new();
        let forgotten = begun.saturating_sub(found.len() as u64);
        for (key, value) in found {
            let (dev, id) = (Dev(key.dev), (0, key.dev, key.ino));
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
                dev,
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

    /// What a process has read of a clip so far.
    pub(super) fn cost(&self, pid: u32, dev: Dev, ino: u64) -> Option<ReadCost> {
        let key = vb_account_key {
            ino,
            dev: dev.0,
            pid,
        };
        let found = self.accounts.lookup(abi::bytes(&key), MapFlags::ANY);
        let account: vb_account = abi::value(&found.ok()??)?;
        Some(ReadCost::of(&account))
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

    fn add(&mut self, reads: u64, bytes: u64, ns: u64) {
        self.reads += reads;
        self.bytes += bytes;
        self.ns += ns;
    }
}

/// Keeps where clips are, also when nobody has them open any more: bounded, the one
/// that was opened first makes room.
pub(super) struct Names {
    map: MapHandle,
    known: BTreeMap<(u32, u64), Option<PathBuf>>,
    order: VecDeque<(u32, u64)>,
    limit: usize,
}

impl Names {
    pub(super) fn new(map: MapHandle, limit: u32) -> Self {
        Self {
            map,
            known: BTreeMap::new(),
            order: VecDeque::new(),
            limit: limit as usize,
        }
    }

    /// Notes a descriptor's clip; one that is not `within` a prefix is not to be shown.
    pub(super) fn note(&mut self, fd: &TrackedFd, within: bool) {
        let key = (fd.dev.0, fd.ino);
        // One whose path got lost may have been seen before.
        if within && fd.path.is_none() {
            return;
        }
        let path = fd.path.as_deref().filter(|_| within);
        match self.known.get(&key) {
            Some(known) if known.as_deref() == path => return,
            Some(_) => self.forget(key),
            None => {
                while self.known.len() >= self.limit {
                    let Some(oldest) = self.order.pop_front() else {
                        break;
                    };
                    self.forget(oldest);
                    self.known.remove(&oldest);
                }
                self.order.push_back(key);
            }
        }
        self.known.insert(key, path.map(Path::to_path_buf));
        // One that finds no room is shown without its path.
        abi::store_path(&self.map, Self::id(key), path);
    }

    fn forget(&self, key: (u32, u64)) {
        abi::delete_path(&self.map, Self::id(key));
    }

    /// As the key of an open: no process has pid 0.
    fn id((dev, ino): (u32, u64)) -> (u32, u32, u64) {
        (0, dev, ino)
    }
}
