//! What requests work on, and what they do.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
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
use crate::aligned::AlignedBuffer;
use crate::reason::{Reason, Refusal};
use crate::snapshot::{Snapshots, Whole};

/// How long the kernel may keep names and attributes: as long as rclone lets it
/// keep its own by default, `--attr-timeout`.
pub(super) const TTL: Duration = Duration::from_secs(1);
/// Of a node with a number that is made up: the kernel asks each time, and gets
/// the source's number, which a lookup's answer has no other place for.
pub(super) const NO_TTL: Duration = Duration::ZERO;
/// The thread of a request that comes from another pid namespace.
const NOBODY: u32 = 0;

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
    static BUFFER: RefCell<AlignedBuffer> = RefCell::default();
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
        self.opens.look(|open| {
            let files = open.filter_map(Open::file);
            self.counters.snapshot(files.map(crate::BypassFile::stats))
        })
    }

    pub(super) fn path(&self, id: INodeNo) -> io::Result<Arc<Path>> {
        let path = lock(&self.nodes).path(id.0);
        path.ok_or_else(|| errno(nix::libc::ESTALE))
    }

    /// The attributes that the kernel is told, with the node's number in place of
    /// the file's, and for how long they hold.
    pub(super) fn enter(&self, path: &Path, found: &FileAttr, alone: bool) -> (FileAttr, Duration) {
        let id = lock(&self.nodes).enter(path, found, alone);
        let ttl = if id == found.ino.0 { TTL } else { NO_TTL };
        let ino = INodeNo(id);
        (FileAttr { ino, ..*found }, ttl)
    }

    pub(super) fn lookup(
        &self,
        thread: u32,
        parent: INodeNo,
        name: &OsStr,
    ) -> io::Result<(FileAttr, Duration)> {
        let path = join(&self.path(parent)?, name);
        let found = attr::of(self.source.at(&path)?)?;
        // Who comes back gets a node that no other opens before.
        let alone = self.retries.has(thread, &path);
        Ok(self.enter(&path, &found, alone))
    }

    pub(super) fn attributes(&self, id: INodeNo) -> io::Result<FileAttr> {
        if let Some(frozen) = lock(&self.nodes).frozen(id.0) {
            return Ok(frozen);
        }
        let found = attr::of(self.source.at(&self.path(id)?)?)?;
        let shown = lock(&self.nodes).show(id.0, &found);
        shown.ok_or_else(|| errno(nix::libc::ESTALE))
    }

    pub(super) fn open(&self, thread: u32, id: INodeNo, reply: &ReplyOpen) -> io::Result<Opened> {
        let path = self.path(id)?;
        // Whom we cannot tell from others may have come back.
        let last = thread == NOBODY || self.retries.take(thread, &path);
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

    /// Opens a clip; `last`: who fails now fails for good.
    fn open_at(
        &self,
        id: INodeNo,
        path: &Path,
        last: bool,
        reply: &ReplyOpen,
    ) -> io::Result<Opened> {
        if self.source.is_writable()? {
            return self.open_direct(id, path);
        }
        if self.passes() {
            match self.open_whole(id, path, reply) {
                Ok(opened) => return Ok(opened),
                Err(Failure::Refused(refusal)) => self.counters.refused(&refusal),
                Err(Failure::Stale) if last => {
                    let detail = "others have it open by ranges";
                    let refusal = Refusal::new(Reason::Busy, detail);
                    self.counters.refused(&refusal);
                }
                Err(Failure::Stale) => return Err(errno(nix::libc::ESTALE)),
            }
        }
        self.open_ranges(id, path)
    }

    /// Opens a clip to be read anew each time, since programs may write it.
    fn open_direct(&self, id: INodeNo, path: &Path) -> io::Result<Opened> {
        let file = BypassOptions::new().take_new_fd(self.source.read(path)?)?;
        match self.admit(id, None, Wanted::Direct, no_backing)? {
            Admission::Direct => {
                self.counters.opened(Way::Direct);
                Ok(Opened::Direct(self.opens.add(Open::Direct(file))))
            }
            _ => Err(errno(nix::libc::ESTALE)),
        }
    }

    fn open_ranges(&self, id: INodeNo, path: &Path) -> io::Result<Opened> {
        let file = BypassOptions::new().take_new_fd(self.source.read(path)?)?;
        let (edition, generation) = file.edition()?;
        let version = Version {
            size: edition.size(),
            modified: edition.modified(),
        };
        let wanted = Wanted::Ranges(edition);
        match self.admit(id, Some(version), wanted, no_backing)? {
            Admission::Ranges { keep, pages } => {
                self.counters.opened(Way::Ranges);
                let number = self.opens.add(Open::Paged(Paged {
                    file,
                    edition,
                    generation: AtomicU64::new(generation),
                    pages,
                    drops: !keep,
                }));
                Ok(if keep {
                    Opened::Kept(number)
                } else {
                    Opened::Dropped(number)
                })
            }
            _ => Err(errno(nix::libc::ESTALE)),
        }
    }

    /// Opens a clip to be read by the kernel.
    fn open_whole(&self, id: INodeNo, path: &Path, reply: &ReplyOpen) -> Result<Opened, Failure> {
        let io = |what: &str, e: &io::Error| {
            Failure::Refused(Refusal::from_io(what, e, Reason::IoError))
        };
        let clip = self.source.at(path).map_err(|e| io("the clip", &e))?;
        let whole = self.snapshot(id, &clip).map_err(Failure::Refused)?;
        let stat = rustix::fs::fstat(&whole.fd).map_err(|e| io("a snapshot", &e.into()))?;
        let snapshot = SnapshotId {
            dev: stat.st_dev,
            ino: stat.st_ino,
        };
        let version = Version {
            size: whole.size,
            modified: whole.modified,
        };
        let back = || reply.open_backing(&whole.fd);
        match self.admit(id, Some(version), Wanted::Whole(snapshot), back) {
            Ok(Admission::Whole(backing)) => {
                self.counters.opened(Way::Passthrough(whole.kind));
                let number = self.opens.add(Open::Whole);
                Ok(Opened::Passed(number, backing))
            }
            Ok(_) => Err(Failure::Stale),
            // A cache on a stacked file system, say.
            Err(e) => Err(io("registering a snapshot with the kernel", &e)),
        }
    }

    fn snapshot(&self, id: INodeNo, clip: &OwnedFd) -> Result<Whole, Refusal> {
        let Some(snapshots) = &self.snapshots else {
            return Err(Refusal::new(Reason::Disabled, "passthrough is off"));
        };
        if let Some(whole) = snapshots.current(clip.as_fd()) {
            return Ok(whole);
        }
        let seat = self.seats.take();
        // Where others have it open by the kernel it cannot be read otherwise.
        let seat = seat.or_else(|| {
            let whole = lock(&self.nodes).is_whole(id.0);
            whole.then(|| self.seats.wait())
        });
        if seat.is_none() {
            let detail = "others wait for snapshots, and some threads have to go on serving";
            return Err(Refusal::new(Reason::Busy, detail));
        }
        snapshots.open(clip.as_fd())
    }

    fn admit(
        &self,
        id: INodeNo,
        version: Option<Version>,
        wanted: Wanted,
        back: impl FnOnce() -> io::Result<BackingId>,
    ) -> io::Result<Admission<BackingId>> {
        lock(&self.nodes).admit(id.0, version, wanted, back)
    }

    pub(super) fn release(&self, id: INodeNo, number: u64) {
        let open = self.opens.remove(number, |open| {
            if let Some(file) = open.file() {
                self.counters.read(&file.stats());
            }
        });
        match open.as_deref() {
            Some(Open::Whole | Open::Paged(_) | Open::Direct(_)) => {
                let backing = lock(&self.nodes).close(id.0);
                // Without the lock: it gives a snapshot's memory back.
                drop(backing);
            }
            Some(Open::Folder(_)) | None => {}
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
                *buffer = AlignedBuffer::new(size);
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

/// For who is not read by the kernel.
fn no_backing() -> io::Result<BackingId> {
    Err(errno(nix::libc::EINVAL))
}

/// A folder's path, with nothing added for the folder itself.
fn join_absolute(folder: &Path, inside: &Path) -> std::path::PathBuf {
    if inside.as_os_str().is_empty() {
        folder.to_path_buf()
    } else {
        folder.join(inside)
    }
}
