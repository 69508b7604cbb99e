//! The files that the kernel knows, and how each is open: pure.
//!
//! The kernel wants all opens of an inode that it serves from a backing file to
//! have the same one, none of them cached pages beside it, and shows one size for
//! all; what one of them reads into the page cache, all read. So all that have a
//! node open have it open in one way, from the same bytes. Each version of a file
//! has a node of its own, since nobody can tell when the kernel comes to note what
//! it was answered; and so has each way of opening it. Whoever
//! opens a node that is not the right one gets ESTALE, upon which the kernel looks
//! the name up again, and finds another. fs/fuse/iomode.c, Linux 6.9.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{FileAttr, FileType};

use super::attr::Version;
use crate::reader::Edition;

/// The root's number, which the kernel has from the start.
pub(super) const ROOT: u64 = 1;
/// Numbers from here on are made up.
///
/// rclone makes its own by hashing paths, to all of 64 bits: few come to be here.
const MADE_UP: u64 = u64::MAX << 40;

/// A whole clip's snapshot: its device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SnapshotId {
    pub(super) dev: u64,
    pub(super) ino: u64,
}

/// How a node is to be opened.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wanted {
    /// By the kernel, from a snapshot.
    Whole(SnapshotId),
    /// By ranges, with cached pages.
    Ranges(Edition),
    /// By ranges, without any, but for what programs map: of whichever version.
    Direct,
}

/// The kernel's cached pages of a node that is open by ranges.
#[derive(Debug)]
pub(super) struct Pages {
    /// Whether those of earlier opens are gone or of the same bytes: an open that
    /// is to drop them does so after it was answered, when others may be at work.
    clean: AtomicBool,
    /// Whether one is not certain to be of the edition.
    tainted: AtomicBool,
}

impl Pages {
    /// One that was to drop them as it opened the node has come to read: it has.
    pub(super) fn were_dropped(&self) {
        self.clean.store(true, Ordering::Release);
    }

    /// One is not certain to be of the edition: no later open is to find it.
    pub(super) fn taint(&self) {
        self.tainted.store(true, Ordering::Release);
    }

    fn is_clean(&self) -> bool {
        self.clean.load(Ordering::Acquire) && !self.tainted.load(Ordering::Acquire)
    }
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Admission<B> {
    Whole(Arc<B>),
    Ranges {
        /// Whether pages of earlier opens are of the same bytes.
        keep: bool,
        pages: Arc<Pages>,
    },
    Direct,
    /// The name has to be looked up again.
    Stale,
}

#[derive(Debug)]
enum State<B> {
    Closed {
        /// What the cached pages are of.
        pages: Option<Edition>,
    },
    Whole {
        id: SnapshotId,
        backing: Arc<B>,
        opens: u32,
    },
    Ranges {
        edition: Edition,
        pages: Arc<Pages>,
        opens: u32,
    },
    /// To its end, also when nobody has it open.
    Direct { opens: u32 },
}

#[derive(Debug)]
struct Node<B> {
    /// Below the source.
    path: Arc<Path>,
    /// Names that the kernel has found it by.
    lookups: u64,
    /// As it was last shown; its inode number is the source's.
    attr: FileAttr,
    state: State<B>,
}

impl<B> Node<B> {
    fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed { .. })
    }

    /// Whether it shows what was opened until it is closed.
    fn is_frozen(&self) -> bool {
        matches!(self.state, State::Whole { .. } | State::Ranges { .. })
    }

    /// Whether it can be what its path shows now, and notes that. What programs may
    /// write is of whichever version.
    fn takes(&mut self, attr: &FileAttr) -> bool {
        if (self.attr.ino, self.attr.kind) != (attr.ino, attr.kind) {
            return false;
        }
        let any = attr.kind != FileType::RegularFile || matches!(self.state, State::Direct { .. });
        if !any && Version::of_attr(&self.attr) != Version::of_attr(attr) {
            return false;
        }
        if !self.is_frozen() {
            self.attr = *attr;
        }
        true
    }

    /// See [`Nodes::admit`].
    fn admit<E>(
        &mut self,
        version: Option<Version>,
        wanted: Wanted,
        back: impl FnOnce() -> Result<B, E>,
    ) -> Result<Admission<B>, E> {
        let shown = version.is_none_or(|version| Version::of_attr(&self.attr) == version);
        match (&mut self.state, wanted) {
            _ if !shown => {}
            (State::Closed { .. }, Wanted::Whole(snapshot)) => {
                let backing = Arc::new(back()?);
                self.state = State::Whole {
                    id: snapshot,
                    backing: Arc::clone(&backing),
                    opens: 1,
                };
                return Ok(Admission::Whole(backing));
            }
            (State::Closed { pages: left }, Wanted::Ranges(edition)) => {
                let keep = edition.is_certain() && *left == Some(edition);
                let pages = Arc::new(Pages {
                    clean: AtomicBool::new(keep),
                    tainted: AtomicBool::new(false),
                });
                self.state = State::Ranges {
                    edition,
                    pages: Arc::clone(&pages),
                    opens: 1,
                };
                return Ok(Admission::Ranges { keep, pages });
            }
            (State::Closed { .. }, Wanted::Direct) => {
                self.state = State::Direct { opens: 1 };
                return Ok(Admission::Direct);
            }
            (State::Whole { id, backing, opens }, Wanted::Whole(snapshot)) if *id == snapshot => {
                *opens += 1;
                return Ok(Admission::Whole(Arc::clone(backing)));
            }
            (
                State::Ranges {
                    edition: open,
                    pages,
                    opens,
                },
                Wanted::Ranges(edition),
            ) if *open == edition => {
                *opens += 1;
                let keep = edition.is_certain() && pages.is_clean();
                let pages = Arc::clone(pages);
                return Ok(Admission::Ranges { keep, pages });
            }
            (State::Direct { opens }, Wanted::Direct) => {
                *opens += 1;
                return Ok(Admission::Direct);
            }
            _ => {}
        }
        Ok(Admission::Stale)
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Nodes<B> {
    by_id: HashMap<u64, Node<B>>,
    /// Which one a path leads to.
    current: HashMap<Arc<Path>, u64>,
    next: u64,
}

impl<B> Nodes<B> {
    pub(super) fn new() -> Self {
        Self {
            by_id: HashMap::new(),
            current: HashMap::new(),
            next: MADE_UP,
        }
    }

    /// The number of the node that a path leads to now that it shows these
    /// attributes; the kernel knows it once more. `alone`: one that no other finds
    /// before it is open, for who must not come too late again.
    pub(super) fn enter(&mut self, path: &Path, attr: &FileAttr, alone: bool) -> u64 {
        let own = attr.ino.0;
        let has_own = own > ROOT && own < MADE_UP && !self.by_id.contains_key(&own);
        if !alone
            && let Some(&id) = self.current.get(path)
            && let Some(node) = self.by_id.get_mut(&id)
            // Made up for want of the file's own, which is free by now.
            && !(has_own && node.is_closed())
            && node.takes(attr)
        {
            node.lookups += 1;
            return id;
        }
        let id = if has_own {
            own
        } else {
            self.next += 1;
            self.next
        };
        let path: Arc<Path> = match self.current.get_key_value(path) {
            Some((path, _)) => Arc::clone(path),
            None => path.into(),
        };
        if !alone {
            self.current.insert(Arc::clone(&path), id);
        }
        let node = Node {
            path,
            lookups: 1,
            attr: *attr,
            state: State::Closed { pages: None },
        };
        self.by_id.insert(id, node);
        id
    }

    /// The kernel has forgotten a node so many times.
    pub(super) fn forget(&mut self, id: u64, lookups: u64) {
        let Some(node) = self.by_id.get_mut(&id) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0
            && let Some(node) = self.by_id.remove(&id)
            && self.current.get(&node.path) == Some(&id)
        {
            self.current.remove(&node.path);
        }
    }

    /// Where a node is, below the source.
    pub(super) fn path(&self, id: u64) -> Option<Arc<Path>> {
        if id == ROOT {
            return Some(Path::new("").into());
        }
        self.by_id.get(&id).map(|node| Arc::clone(&node.path))
    }

    /// What an open node shows until it is closed.
    pub(super) fn frozen(&self, id: u64) -> Option<FileAttr> {
        let node = self.by_id.get(&id)?;
        node.is_frozen().then_some(node.attr)
    }

    /// Notes what a node's path leads to now, and what the node is to show then;
    /// `None` where that is another file, or another version.
    pub(super) fn show(&mut self, id: u64, attr: &FileAttr) -> Option<FileAttr> {
        let Some(node) = self.by_id.get_mut(&id) else {
            // The root, which is what it is.
            return Some(*attr);
        };
        node.takes(attr).then_some(node.attr)
    }

    /// Whether a node is open to be read by the kernel.
    pub(super) fn is_whole(&self, id: u64) -> bool {
        let node = self.by_id.get(&id);
        node.is_some_and(|node| matches!(node.state, State::Whole { .. }))
    }

    /// Opens a node, if what is `wanted` of this version (`None`: of any) goes with
    /// what the kernel was told of it, and with those who have it open. Where it
    /// does not, the path leads to another node from the next lookup on. `back`
    /// registers a backing file.
    ///
    /// # Errors
    /// Those of `back`.
    pub(super) fn admit<E>(
        &mut self,
        id: u64,
        version: Option<Version>,
        wanted: Wanted,
        back: impl FnOnce() -> Result<B, E>,
    ) -> Result<Admission<B>, E> {
        let Some(node) = self.by_id.get_mut(&id) else {
            return Ok(Admission::Stale);
        };
        let admitted = node.admit(version, wanted, back)?;
        let current = self.current.get(&node.path);
        if matches!(admitted, Admission::Stale) {
            // The next lookup has to find another node.
            if current == Some(&id) {
                self.current.remove(&node.path);
            }
        } else if current.is_none() {
            self.current.insert(Arc::clone(&node.path), id);
        }
        Ok(admitted)
    }

    /// One who had a node open has closed it. What is handed back is to be dropped
    /// without the lock.
    pub(super) fn close(&mut self, id: u64) -> Option<Arc<B>> {
        let node = self.by_id.get_mut(&id)?;
        let opens = match &mut node.state {
            State::Whole { opens, .. } | State::Ranges { opens, .. } | State::Direct { opens } => {
                opens
            }
            State::Closed { .. } => return None,
        };
        *opens = opens.saturating_sub(1);
        if *opens > 0 {
            return None;
        }
        let pages = match &node.state {
            State::Ranges { edition, pages, .. } if pages.is_clean() => Some(*edition),
            _ => None,
        };
        let closed = match &node.state {
            State::Direct { .. } => State::Direct { opens: 0 },
            _ => State::Closed { pages },
        };
        match std::mem::replace(&mut node.state, closed) {
            State::Whole { backing, .. } => Some(backing),
            _ => None,
        }
    }

    /// How many the kernel knows.
    #[cfg(test)]
    fn len(&self) -> usize {
        assert!(self.current.len() <= self.by_id.len());
        self.by_id.len()
    }
}

#[cfg(test)]
#[path = "nodes_model.rs"]
mod model;

#[cfg(test)]
#[path = "nodes_tests.rs"]
mod tests;
