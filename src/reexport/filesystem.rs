//! The file system: from the kernel's requests to the source.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuser::{
    BackingId, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use rustix::fs::{AtFlags, RawDir};

use super::attr::{self, Version};
use super::nodes::{Admission, Nodes, SnapshotId, Wanted};
use super::opens::{Entry, Open, Opens, Paged, Retries, Seats};
use super::source::{Source, join};
use super::stats::{Counters, Stats, Way};
use super::xattr;
use crate::BypassOptions;
use crate::reason::{Reason, Refusal};
use crate::snapshot::Snapshots;

/// How long the kernel may keep names and attributes: as long as rclone lets it
/// keep its own by default, `--attr-timeout`.
const TTL: Duration = Duration::from_secs(1);
/// Of a node with a number that is made up: the kernel asks each time, and gets
/// the source's number, which a lookup's answer has no other place for.
const NO_TTL: Duration = Duration::ZERO;
/// Bytes of a folder's entries that are read at once.
const LISTED: usize = 64 << 10;

/// What requests work on, and whoever mounted looks at.
pub(super) struct Shared {
    pub(super) source: Source,
    nodes: Mutex<Nodes<BackingId>>,
    opens: Opens,
    counters: Counters,
    retries: Retries,
    seats: Seats,
    /// `None`: no clip is passed through.
    snapshots: Option<Snapshots>,
    /// The kernel's protocol has it, once it has said so.
    passes: AtomicU64,
    threads: usize,
}

/// Values of `passes`.
const UNKNOWN: u64 = 0;
const PASSES: u64 = 1;
const PASSES_NOT: u64 = 2;

/// For fuser, which wants to own it.
pub(super) struct Reexport(pub(super) Arc<Shared>);

/// How a clip was opened.
enum Opened {
    Passed(u64, Arc<BackingId>),
    Kept(u64),
    Dropped(u64),
    Direct(u64),
}

thread_local! {
    /// What a thread reads into.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

    /// Whether the kernel passes reads through.
    pub(super) fn passes(&self) -> bool {
        self.passes.load(Ordering::Acquire) == PASSES
    }

    pub(super) fn stats(&self) -> Stats {
        let open = self.opens.list();
        let files = open.iter().filter_map(|open| open.file());
        self.counters.snapshot(files.map(crate::BypassFile::stats))
    }

    fn path(&self, id: INodeNo) -> io::Result<Arc<Path>> {
        let path = lock(&self.nodes).path(id.0);
        path.ok_or_else(|| errno(nix::libc::ESTALE))
    }

    /// The attributes that the kernel is told, with the node's number in place of
    /// the file's, and for how long they hold.
    fn enter(&self, path: &Path, found: &FileAttr) -> (FileAttr, Duration) {
        let id = lock(&self.nodes).enter(path, found);
        let ttl = if id == found.ino.0 { TTL } else { NO_TTL };
        let ino = INodeNo(id);
        (FileAttr { ino, ..*found }, ttl)
    }

    fn lookup(&self, parent: INodeNo, name: &OsStr) -> io::Result<(FileAttr, Duration)> {
        let path = join(&self.path(parent)?, name);
        let found = attr::of(self.source.at(&path)?)?;
        Ok(self.enter(&path, &found))
    }

    fn attributes(&self, id: INodeNo) -> io::Result<FileAttr> {
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

    fn open(&self, thread: u32, id: INodeNo, reply: &ReplyOpen) -> io::Result<Opened> {
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

    fn release(&self, id: INodeNo, number: u64) {
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
    fn read(&self, number: u64, offset: u64, size: usize, send: impl FnOnce(io::Result<&[u8]>)) {
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

    fn open_folder(&self, id: INodeNo) -> io::Result<u64> {
        let entries = self.list(&self.path(id)?)?;
        Ok(self.opens.add(Open::Folder(Mutex::new(entries))))
    }

    fn list(&self, path: &Path) -> io::Result<Arc<[Entry]>> {
        let folder = self.source.list(path)?;
        let mut space = Vec::with_capacity(LISTED);
        let mut entries = Vec::new();
        let mut found = RawDir::new(&folder, space.spare_capacity_mut());
        while let Some(entry) = found.next() {
            let entry = entry?;
            entries.push(Entry {
                name: OsStr::from_bytes(entry.file_name().to_bytes()).to_owned(),
                ino: entry.ino(),
                kind: attr::kind_of(entry.file_type()),
            });
        }
        Ok(entries.into())
    }

    /// The entries of an open folder from one on; read anew from the start, as
    /// rewinddir(3) wants.
    fn entries(&self, id: INodeNo, number: u64, offset: u64) -> io::Result<Arc<[Entry]>> {
        let open = self
            .opens
            .get(number)
            .ok_or_else(|| errno(nix::libc::EBADF))?;
        let Open::Folder(entries) = &*open else {
            return Err(errno(nix::libc::ENOTDIR));
        };
        let mut entries = lock(entries);
        if offset == 0 {
            *entries = self.list(&self.path(id)?)?;
        }
        Ok(Arc::clone(&entries))
    }

    /// Adds entries with their attributes until the reply is full.
    fn add_plus(
        &self,
        id: INodeNo,
        number: u64,
        offset: u64,
        reply: &mut ReplyDirectoryPlus,
    ) -> io::Result<()> {
        let entries = self.entries(id, number, offset)?;
        let path = self.path(id)?;
        let folder = self.source.list(&path)?;
        let dev = rustix::fs::fstat(&folder)?.st_dev;
        for (index, entry) in entries.iter().enumerate().skip(offset as usize) {
            let next = index as u64 + 1;
            let is_dots = matches!(entry.name.as_bytes(), b"." | b"..");
            let shown = if is_dots {
                // Of these the kernel takes no attributes.
                Some((entry_attr(entry), NO_TTL))
            } else {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                match rustix::fs::statat(&folder, &entry.name, flags) {
                    // Gone meanwhile.
                    Err(rustix::io::Errno::NOENT) => continue,
                    // Another mount's, which is not shown.
                    Ok(stat) if stat.st_dev != dev => None,
                    Ok(stat) => {
                        let found = attr::of_stat(&stat);
                        Some(self.enter(&join(&path, &entry.name), &found))
                    }
                    Err(_) => None,
                }
            };
            let known = shown.is_some() && !is_dots;
            // Without a number the kernel looks it up when it is asked for.
            let none = FileAttr {
                ino: INodeNo(0),
                ..entry_attr(entry)
            };
            let (attr, ttl) = shown.unwrap_or((none, NO_TTL));
            let name = &entry.name;
            if reply.add(attr.ino, next, name, &ttl, &attr, Generation(0)) {
                if known {
                    lock(&self.nodes).forget(attr.ino.0, 1);
                }
                break;
            }
        }
        Ok(())
    }

    fn link(&self, id: INodeNo) -> io::Result<Vec<u8>> {
        let link = self.source.at(&self.path(id)?)?;
        Ok(rustix::fs::readlinkat(link, "", Vec::new())?.into_bytes())
    }

    fn xattr(&self, id: INodeNo, name: &OsStr) -> io::Result<Vec<u8>> {
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

fn entry_attr(entry: &Entry) -> FileAttr {
    let zero = std::time::UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(entry.ino),
        size: 0,
        blocks: 0,
        atime: zero,
        mtime: zero,
        ctime: zero,
        crtime: zero,
        kind: entry.kind,
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

impl Filesystem for Reexport {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ] {
            // An older kernel does without.
            let _ = config.add_capabilities(wanted);
        }
        // What the kernel reads ahead is not to take all threads: it waits for
        // the source, while others wait for what is in the cache.
        let background = u16::try_from(self.0.threads / 2).unwrap_or(u16::MAX);
        let _ = config.set_max_background(background.max(1));
        let passes = self.0.snapshots.is_some()
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok();
        let passes = if passes { PASSES } else { PASSES_NOT };
        self.0.passes.store(passes, Ordering::Release);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.0.lookup(parent, name) {
            Ok((attr, ttl)) => reply.entry_with_ttls(&ttl, &TTL, &attr, Generation(0)),
            Err(e) => reply.error(e.into()),
        }
    }

    fn forget(&self, _req: &Request, id: INodeNo, lookups: u64) {
        lock(&self.0.nodes).forget(id.0, lookups);
    }

    fn getattr(&self, _req: &Request, id: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.attributes(id) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(e.into()),
        }
    }

    fn readlink(&self, _req: &Request, id: INodeNo, reply: ReplyData) {
        match self.0.link(id) {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(e.into()),
        }
    }

    fn open(&self, req: &Request, id: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        // The kernel need not tell when a descriptor is closed.
        let base = FopenFlags::FOPEN_NOFLUSH;
        match self.0.open(req.pid(), id, &reply) {
            Ok(Opened::Passed(number, backing)) => {
                reply.opened_passthrough(FileHandle(number), base, &backing);
            }
            Ok(Opened::Kept(number)) => {
                reply.opened(FileHandle(number), base | FopenFlags::FOPEN_KEEP_CACHE);
            }
            Ok(Opened::Dropped(number)) => reply.opened(FileHandle(number), base),
            Ok(Opened::Direct(number)) => {
                reply.opened(FileHandle(number), base | FopenFlags::FOPEN_DIRECT_IO);
            }
            Err(e) => reply.error(e.into()),
        }
    }

    fn read(
        &self,
        _req: &Request,
        _id: INodeNo,
        number: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.0
            .read(number.0, offset, size as usize, |read| match read {
                Ok(bytes) => reply.data(bytes),
                Err(e) => reply.error(e.into()),
            });
    }

    fn release(
        &self,
        _req: &Request,
        id: INodeNo,
        number: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.0.release(id, number.0);
        reply.ok();
    }

    fn opendir(&self, _req: &Request, id: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.0.open_folder(id) {
            Ok(number) => reply.opened(FileHandle(number), FopenFlags::empty()),
            Err(e) => reply.error(e.into()),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        id: INodeNo,
        number: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.0.entries(id, number.0, offset) {
            Ok(entries) => {
                for (index, entry) in entries.iter().enumerate().skip(offset as usize) {
                    let next = index as u64 + 1;
                    if reply.add(INodeNo(entry.ino), next, entry.kind, &entry.name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(e) => reply.error(e.into()),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        id: INodeNo,
        number: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        match self.0.add_plus(id, number.0, offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e.into()),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        _id: INodeNo,
        number: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.0.opens.remove(number.0);
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _id: INodeNo, reply: ReplyStatfs) {
        let root = self.0.source.root();
        match root.and_then(|root| Ok(rustix::fs::fstatvfs(root)?)) {
            Ok(s) => reply.statfs(
                s.f_blocks,
                s.f_bfree,
                s.f_bavail,
                s.f_files,
                s.f_ffree,
                s.f_bsize as u32,
                s.f_namemax as u32,
                s.f_frsize as u32,
            ),
            Err(e) => reply.error(e.into()),
        }
    }

    fn getxattr(&self, _req: &Request, id: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        send(self.0.xattr(id, name), size, reply);
    }

    fn listxattr(&self, _req: &Request, id: INodeNo, size: u32, reply: ReplyXattr) {
        let path = self.0.path(id);
        let listed = path.and_then(|path| xattr::list(self.0.source.at(&path)?));
        send(listed, size, reply);
    }
}

/// Answers as getxattr(2) does: the size alone where none is given.
fn send(value: io::Result<Vec<u8>>, size: u32, reply: ReplyXattr) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() <= size as usize => reply.data(&value),
        Ok(_) => reply.error(Errno::ERANGE),
        Err(e) => reply.error(e.into()),
    }
}

/// Opens what an O_PATH descriptor refers to by its name in /proc.
pub(super) fn proc_path(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}
