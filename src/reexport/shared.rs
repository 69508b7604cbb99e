//! What requests work on, and what they do.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuser::{BackingId, FileAttr, INodeNo, ReplyOpen};

use super::attr::{self, Version};
use super::nodes::{Admission, Nodes, SnapshotId, Wanted};
use super::opens::{Open, Opens, Paged, Retries, Seats};
use super::source::{Source, join};
use super::stats::{Counters, Stats, Way};
use super::xattr;
use crate::BypassOptions;
use crate::reason::{Reason, Refusal};
use crate::snapshot::Snapshots;

/// How long the kernel may keep names and attributes: as long as rclone lets it
/// keep its own by default, `--attr-timeout`.
pub(super) const TTL: Duration = Duration::from_secs(1);
/// Of a node with a number that is made up: the kernel asks each time, and gets
/// the source's number, which a lookup's answer has no other place for.
pub(super) const NO_TTL: Duration = Duration::ZERO;
/// What requests work on, and whoever mounted looks at.
pub(super) struct Shared {
    pub(super) source: Source,
    pub(super) nodes: Mutex<Nodes<BackingId>>,
    pub(super) opens: Opens,
    counters: Counters,
    retries: Retries,
    seats: Seats,
    /// `None`: no clip is passed through.
    pub(super) snapshots: Option<Snapshots>,
    /// The kernel's protocol has it, once it has said so.
    passes: AtomicU64,
    pub(super) threads: usize,
}

/// Values of `passes`.
const UNKNOWN: u64 = 0;
const PASSES: u64 = 1;
const PASSES_NOT: u64 = 2;

/// How a clip was opened.
pub(super) enum Opened {
    Passed(u64, Arc<BackingId>),
    Kept(u64),
    Dropped(u64),
    Direct(u64),
}

thread_local! {
    /// What a thread reads into.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(source: Source, snapshots: Option<Snapshots>, threads: usize) -> Self {
        Self {
            source,
            nodes: Mutex::new(Nodes::new()),
            opens: Opens::default(),
            counters: Counters::default(),
            retries: Retries::default(),
            // Some are left for whoever does not wait.
            seats: Seats::new((threads * 3 / 4).max(1)),
            snapshots,
            passes: AtomicU64::new(UNKNOWN),
            threads,
        }
    }

    /// Notes whether the kernel passes reads through.
    pub(super) fn set_passes(&self, passes: bool) {
        let passes = if passes { PASSES } else { PASSES_NOT };
        self.passes.store(passes, Ordering::Release);
    }

    /// Whether the kernel passes reads through.
    pub(super) fn passes(&self) -> bool {
        self.passes.load(Ordering::Acquire) == PASSES
    }

    pub(super) fn stats(&self) -> Stats {
        let open = self.opens.list();
        let files = open.iter().filter_map(|open| open.file());
        self.counters.snapshot(files.map(crate::BypassFile::stats))
    }

    pub(super) fn path(&self, id: INodeNo) -> io::Result<Arc<Path>> {
        let path = lock(&self.nodes).path(id.0);
        path.ok_or_else(|| errno(nix::libc::ESTALE))
    }

    /// The attributes that the kernel is told, with the node's number in place of
    /// the file's, and for how long they hold.
    pub(super) fn enter(&self, path: &Path, found: &FileAttr) -> (FileAttr, Duration) {
        let id = lock(&self.nodes).enter(path, found);
        let ttl = if id == found.ino.0 { TTL } else { NO_TTL };
        let ino = INodeNo(id);
        (FileAttr { ino, ..*found }, ttl)
    }

    pub(super) fn lookup(&self, parent: INodeNo, name: &OsStr) -> io::Result<(FileAttr, Duration)> {
        let path = join(&self.path(parent)?, name);
        let found = attr::of(self.source.at(&path)?)?;
        Ok(self.enter(&path, &found))
    }

    pub(super) fn attributes(&self, id: INodeNo) -> io::Result<FileAttr> {
        if let Some(frozen) = lock(&self.nodes).frozen(id.0) {
            return Ok(frozen);
        }
        let found = attr::of(self.source.at(&self.path(id)?)?)?;
        if lock(&self.nodes).show(id.0, &found) {
            Ok(found)
        } else {
            Err(errno(nix::libc::ESTALE))
        }
    }

    pub(super) fn open(&self, thread: u32, id: INodeNo, reply: &ReplyOpen) -> io::Result<Opened> {
        let path = self.path(id)?;
        let last = self.retries.take(thread, &path);
        let opened = self.open_at(id, &path, last, reply);
        match &opened {
            // Looked up anew, it will be there.
            Err(e) if !last && e.raw_os_error() == Some(nix::libc::ESTALE) => {
                self.retries.add(thread, &path);
            }
            Err(_) => self.counters.failed(),
            Ok(_) => {}
        }
        opened
    }

    fn open_at(
        &self,
        id: INodeNo,
        path: &Path,
        last: bool,
        reply: &ReplyOpen,
    ) -> io::Result<Opened> {
        let writable = self.source.is_writable()?;
        let mut direct = writable;
        if !writable && self.passes() {
            match self.open_whole(id, path, last, reply) {
                Ok(Some(opened)) => return Ok(opened),
                Ok(None) => direct = true,
                Err(Failure::Refused(refusal)) => self.counters.refused(&refusal),
                Err(Failure::Stale) => return Err(errno(nix::libc::ESTALE)),
            }
        }
        let file = BypassOptions::new().take_new_fd(self.source.read(path)?)?;
        if direct {
            self.counters.opened(Way::Direct);
            return Ok(Opened::Direct(self.opens.add(Open::Direct(file))));
        }
        let (edition, generation) = file.edition()?;
        let version = Version {
            size: edition.size(),
            modified: edition.modified(),
        };
        let none = || Err::<BackingId, _>(());
        let wanted = Wanted::Ranges(edition);
        let admitted = lock(&self.nodes).admit(id.0, version, wanted, last, none);
        match admitted {
            Ok(Admission::Ranges { keep, tainted }) => {
                self.counters.opened(Way::Ranges);
                let generation = AtomicU64::new(generation);
                let number = self.opens.add(Open::Paged(Paged {
                    file,
                    edition,
                    generation,
                    tainted,
                }));
                Ok(if keep {
                    Opened::Kept(number)
                } else {
                    Opened::Dropped(number)
                })
            }
            Ok(Admission::Direct) => {
                self.counters.opened(Way::Direct);
                Ok(Opened::Direct(self.opens.add(Open::Direct(file))))
            }
            Ok(Admission::Stale | Admission::Whole(_)) | Err(()) => Err(errno(nix::libc::ESTALE)),
        }
    }

    /// Opens a clip to be read by the kernel; `None`: it is to be read directly.
    fn open_whole(
        &self,
        id: INodeNo,
        path: &Path,
        last: bool,
        reply: &ReplyOpen,
    ) -> Result<Option<Opened>, Failure> {
        let Some(snapshots) = &self.snapshots else {
            return Err(Failure::Refused(Refusal::new(
                Reason::Disabled,
                "passthrough is off",
            )));
        };
        let Some(_seat) = self.seats.take() else {
            let detail = "others wait for snapshots, and some threads have to go on serving";
            return Err(Failure::Refused(Refusal::new(Reason::Busy, detail)));
        };
        let io = |what: &str, e: &io::Error| {
            Failure::Refused(Refusal::from_io(what, e, Reason::IoError))
        };
        let clip = self.source.at(path).map_err(|e| io("the clip", &e))?;
        let whole = snapshots.open(clip.as_fd()).map_err(Failure::Refused)?;
        let stat = rustix::fs::fstat(&whole.fd).map_err(|e| io("a snapshot", &e.into()))?;
        let snapshot = SnapshotId {
            dev: stat.st_dev,
            ino: stat.st_ino,
        };
        let version = Version::of_stat(&stat);
        let back = || reply.open_backing(&whole.fd);
        let wanted = Wanted::Whole(snapshot);
        let admitted = lock(&self.nodes).admit(id.0, version, wanted, last, back);
        match admitted {
            Ok(Admission::Whole(backing)) => {
                self.counters.opened(Way::Passthrough(whole.kind));
                let number = self.opens.add(Open::Whole);
                Ok(Some(Opened::Passed(number, backing)))
            }
            Ok(Admission::Direct) => Ok(None),
            Ok(Admission::Stale | Admission::Ranges { .. }) => Err(Failure::Stale),
            // A cache on a stacked file system, say.
            Err(e) => Err(io("registering a snapshot with the kernel", &e)),
        }
    }

    pub(super) fn release(&self, id: INodeNo, number: u64) {
        let open = self.opens.remove(number);
        if let Some(file) = open.as_ref().and_then(|open| open.file()) {
            self.counters.read(&file.stats());
        }
        match open.as_deref() {
            Some(Open::Whole | Open::Paged(_)) => {
                let backing = lock(&self.nodes).close(id.0);
                // Without the lock: it gives a snapshot's memory back.
                drop(backing);
            }
            Some(Open::Direct(_) | Open::Folder(_)) | None => {}
        }
    }

    /// Reads into the thread's buffer, and hands what was read to `send`.
    pub(super) fn read(
        &self,
        number: u64,
        offset: u64,
        size: usize,
        send: impl FnOnce(io::Result<&[u8]>),
    ) {
        let Some(open) = self.opens.get(number) else {
            return send(Err(errno(nix::libc::EBADF)));
        };
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let buffer = &mut buffer[..size];
            let read = match &*open {
                Open::Paged(paged) => {
                    let left = paged.edition.size().saturating_sub(offset);
                    let n = usize::try_from(left).map_or(size, |left| left.min(size));
                    paged.read(&mut buffer[..n], offset).map(|()| n)
                }
                Open::Direct(file) => file.read_at(buffer, offset),
                // The kernel reads these by itself.
                Open::Whole | Open::Folder(_) => Err(errno(nix::libc::EIO)),
            };
            if read.is_err() {
                self.counters.failed_read();
            }
            send(read.map(|n| &buffer[..n]));
        });
    }

    pub(super) fn link(&self, id: INodeNo) -> io::Result<Vec<u8>> {
        let link = self.source.at(&self.path(id)?)?;
        Ok(rustix::fs::readlinkat(link, "", Vec::new())?.into_bytes())
    }

    pub(super) fn xattr(&self, id: INodeNo, name: &OsStr) -> io::Result<Vec<u8>> {
        let path = self.path(id)?;
        if let Some(wanted) = xattr::Own::named(name) {
            return Ok(match wanted {
                xattr::Own::Source => {
                    let path = join_absolute(self.source.path(), &path);
                    path.into_os_string().into_encoded_bytes()
                }
                xattr::Own::Stats => serde_json::to_vec(&self.stats())?,
            });
        }
        xattr::get(self.source.at(&path)?, name)
    }
}

/// What stands in the way of the kernel's reading a clip.
enum Failure {
    Refused(Refusal),
    Stale,
}

/// A folder's path, with nothing added for the folder itself.
fn join_absolute(folder: &Path, inside: &Path) -> std::path::PathBuf {
    if inside.as_os_str().is_empty() {
        folder.to_path_buf()
    } else {
        folder.join(inside)
    }
}
