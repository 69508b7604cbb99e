//! Folders: their entries, with attributes or without.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use fuser::{FileAttr, Generation, INodeNo, ReplyDirectoryPlus};
use rustix::fs::{AtFlags, RawDir};

use super::attr;
use super::opens::{Entry, Open};
use super::shared::{NO_TTL, Shared, errno, lock};
use super::source::join;

/// Bytes of a folder's entries that are read at once.
const LISTED: usize = 64 << 10;

impl Shared {
    pub(super) fn open_folder(&self, id: INodeNo) -> io::Result<u64> {
        // Read when its first entries are asked for.
        self.source.list(&self.path(id)?)?;
        Ok(self.opens.add(Open::Folder(Mutex::new(None))))
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
    pub(super) fn entries(
        &self,
        id: INodeNo,
        number: u64,
        offset: u64,
    ) -> io::Result<Arc<[Entry]>> {
        let open = self
            .opens
            .get(number)
            .ok_or_else(|| errno(nix::libc::EBADF))?;
        let Open::Folder(entries) = &*open else {
            return Err(errno(nix::libc::ENOTDIR));
        };
        let mut entries = lock(entries);
        if let Some(entries) = entries.as_ref().filter(|_| offset > 0) {
            return Ok(Arc::clone(entries));
        }
        let listed = self.list(&self.path(id)?)?;
        *entries = Some(Arc::clone(&listed));
        Ok(listed)
    }

    /// Adds entries with their attributes until the reply is full.
    pub(super) fn add_plus(
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
            let (attr, ttl) = if is_dots {
                // Of these the kernel takes no attributes.
                (entry_attr(entry), NO_TTL)
            } else {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                let inside = join(&path, &entry.name);
                match rustix::fs::statat(&folder, &entry.name, flags) {
                    // Gone meanwhile.
                    Err(rustix::io::Errno::NOENT) => continue,
                    Ok(stat) if stat.st_dev == dev => {
                        self.enter(&inside, &attr::of_stat(&stat), false)
                    }
                    // Another mount's, which may be dead: a name, as by readdir.
                    _ => {
                        let named = self.enter(&inside, &entry_attr(entry), false);
                        (named.0, NO_TTL)
                    }
                }
            };
            let name = &entry.name;
            if reply.add(attr.ino, next, name, &ttl, &attr, Generation(0)) {
                if !is_dots {
                    lock(&self.nodes).forget(attr.ino.0, 1);
                }
                break;
            }
        }
        Ok(())
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
