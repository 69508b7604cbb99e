//! The file system: the kernel's requests and their answers.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use fuser::{
    Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};

use super::shared::{Opened, Shared, TTL, lock};
use super::xattr;

/// For fuser, which wants to own it.
pub(super) struct Reexport(pub(super) Arc<Shared>);

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
        self.0.set_passes(passes);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.0.lookup(req.pid(), parent, name) {
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
        // A folder reads no bytes.
        self.0.opens.remove(number.0, |_| ());
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
