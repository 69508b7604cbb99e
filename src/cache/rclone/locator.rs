//! The mount table and what was located on it, kept while they hold.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::locate::Located;
use crate::mounts::{Dev, Mount, MountTable};
use crate::reason::{Reason, Refusal};

/// After this long a cache that was shared is looked at again: the other
/// rclone may have ended, of which the mount table need not tell.
const SHARED_AGAIN: Duration = Duration::from_secs(1);
/// Looks for a cache, each while the rclone mounts changed, before it is given up.
const TRIES: u32 = 8;

fn no_mountinfo(error: io::Error) -> Refusal {
    Refusal::from_io("`/proc/self/mountinfo`", &error, Reason::IoError)
}

/// Whose mount table it is. A child of fork(2) shares the open mountinfo with its
/// parent, and each would take changes from the other; one that was opened in
/// another mount namespace tells of that one's changes.
#[derive(PartialEq)]
struct Owner {
    pid: u32,
    namespace: (u64, u64),
}

impl Owner {
    fn now() -> Result<Self, Refusal> {
        let path = "/proc/self/ns/mnt";
        let namespace = fs::metadata(path)
            .map_err(|e| Refusal::from_io(format_args!("`{path}`"), &e, Reason::IoError))?;
        Ok(Self {
            pid: std::process::id(),
            namespace: (namespace.dev(), namespace.ino()),
        })
    }
}

/// The mount table as it was read, and what was located on it. Opening a clip then
/// costs one poll(2) instead of a search.
pub struct Locator {
    table: MountTable,
    /// Also the next locator's, as long as the rclone mounts are the same: most
    /// changes are of other mounts.
    located: Arc<Mutex<HashMap<Dev, Slot>>>,
}

/// One mount's; locked while its daemon is looked for, so that one thread does it and
/// who asks of other mounts does not wait: a cache's disk may never answer.
type Slot = Arc<Mutex<Option<(Instant, Located)>>>;

impl Locator {
    /// With the mount table as the kernel says that it is.
    ///
    /// # Errors
    /// [`Reason::IoError`] where /proc is not mounted.
    pub fn now() -> Result<Arc<Self>, Refusal> {
        Shared::locator(false)
    }

    /// With the mount table read again: a mount point moves without notice when a
    /// folder above it is renamed.
    ///
    /// # Errors
    /// As of [`now`](Self::now).
    pub fn anew() -> Result<Arc<Self>, Refusal> {
        Shared::locator(true)
    }

    /// The mount table.
    #[must_use]
    pub fn table(&self) -> &MountTable {
        &self.table
    }

    /// Where the cache of a mount of the table is; kept until the rclone mounts
    /// change, or its daemon exits.
    ///
    /// # Errors
    /// As of [`Located::find`], and [`Reason::Changed`] where the rclone mounts have
    /// changed meanwhile, and this one with them.
    pub fn locate(self: &Arc<Self>, mount: &Mount) -> Result<Located, Refusal> {
        let mut locator = Arc::clone(self);
        for _ in 0..TRIES {
            let (located, at_once) = locator.look(mount)?;
            if at_once {
                return Ok(located);
            }
            // While it was looked for, another rclone may have come to the same cache.
            let now = Self::now()?;
            if Arc::ptr_eq(&now.located, &locator.located) {
                return Ok(located);
            }
            if !now.table.iter().any(|m| m == mount) {
                break;
            }
            locator = now;
        }
        let detail = format!(
            "`{}`: rclone mounts changed while its cache was looked for",
            mount.point.display()
        );
        Err(Refusal::new(Reason::Changed, detail))
    }

    /// What is kept, or found, and whether that took no time.
    fn look(&self, mount: &Mount) -> Result<(Located, bool), Refusal> {
        let slot = Arc::clone(lock(&self.located).entry(mount.dev).or_default());
        let (mut slot, at_once) = match slot.try_lock() {
            Ok(slot) => (slot, true),
            Err(_) => (lock(&slot), false),
        };
        if let Some((at, located)) = &*slot
            && located.daemon.is_alive()
            && (located.shared_with.is_none() || at.elapsed() < SHARED_AGAIN)
        {
            return Ok((located.clone(), at_once));
        }
        let located = Located::find(mount, &self.table)?;
        *slot = Some((Instant::now(), located.clone()));
        Ok((located, false))
    }

    fn has_the_rclones_of(&self, table: &MountTable) -> bool {
        let rclones = |table: &MountTable| -> Vec<Mount> {
            table.iter().filter(|m| m.is_rclone()).cloned().collect()
        };
        rclones(table) == rclones(&self.table)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This process's locator, and how it hears of changes.
struct Shared {
    owner: Owner,
    changes: File,
    locator: Arc<Locator>,
}

impl Shared {
    fn new() -> Result<Self, Refusal> {
        let owner = Owner::now()?;
        let changes = File::open("/proc/self/mountinfo").map_err(no_mountinfo)?;
        let locator = Arc::new(Locator {
            table: MountTable::read().map_err(no_mountinfo)?,
            located: Arc::default(),
        });
        Ok(Self {
            owner,
            changes,
            locator,
        })
    }

    fn locator(reread: bool) -> Result<Arc<Locator>, Refusal> {
        static SHARED: Mutex<Option<Shared>> = Mutex::new(None);
        let mut kept = lock(&SHARED);
        // Taken out while it is refreshed: asking for changes consumes them,
        // so that a table which then could not be read must not come back.
        let shared = match kept.take() {
            Some(mut shared) if Owner::now().is_ok_and(|now| now == shared.owner) => {
                if shared.has_changed()? || reread {
                    shared.reread()?;
                }
                shared
            }
            _ => Self::new()?,
        };
        Ok(Arc::clone(&kept.insert(shared).locator))
    }

    /// Whether the kernel says that the table has changed: mountinfo is then
    /// readable with priority (proc_pid_mountinfo(5)).
    fn has_changed(&self) -> Result<bool, Refusal> {
        let mut fds = [PollFd::new(self.changes.as_fd(), PollFlags::POLLPRI)];
        loop {
            match poll(&mut fds, PollTimeout::ZERO) {
                // A pending signal interrupts it even where it does not wait.
                Err(Errno::EINTR) => {}
                result => return result.map(|n| n > 0).map_err(|e| no_mountinfo(e.into())),
            }
        }
    }

    fn reread(&mut self) -> Result<(), Refusal> {
        let table = MountTable::read().map_err(no_mountinfo)?;
        let located = if self.locator.has_the_rclones_of(&table) {
            Arc::clone(&self.locator.located)
        } else {
            Arc::default()
        };
        self.locator = Arc::new(Locator { table, located });
        Ok(())
    }
}
