//! Joins the tracker and the cache: how much of a tracked clip is cached.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmafx_bypass::cache::proof::check_mount;
use vmafx_bypass::cache::rclone::{Estimate, Folders, Locator, estimate, mount_facts};
use vmafx_bypass::cache::trail::Trail;
use vmafx_bypass::mounts::{Dev, Mount, MountTable};
use vmafx_bypass::{Reason, Refusal};

/// How long a mount whose cache could not be located is left alone.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Where a clip is cached.
struct Found {
    folders: Folders,
    /// Its path inside the mount.
    inside: PathBuf,
    /// Why nothing on its mount is bypassed, if so.
    mount: Option<Reason>,
}

/// Estimates by the metadata alone; opens nothing through FUSE.
#[derive(Default)]
pub struct Estimator {
    /// Where the user says that the cache is.
    cache_dir: Option<PathBuf>,
    failures: HashMap<Dev, (Instant, Refusal)>,
}

impl Estimator {
    /// Estimates by this cache folder, or by the one that the daemon shows.
    pub fn new(cache_dir: Option<PathBuf>) -> Self {
        Self {
            cache_dir,
            failures: HashMap::new(),
        }
    }

    /// Estimates for a file at `path` on the superblock `dev`.
    pub fn estimate(&mut self, dev: Dev, path: Option<&Path>, size: u64) -> Estimate {
        let found = path
            .ok_or_else(|| Refusal::new(Reason::IoError, "its path got lost"))
            .and_then(|path| self.locate(dev, path));
        match found {
            Ok(found) => {
                let estimate = estimate(&found.folders, &found.inside, size);
                Estimate {
                    state: found.mount.or(estimate.state),
                    ..estimate
                }
            }
            Err(refusal) => Estimate::unknown(refusal.reason),
        }
    }

    fn locate(&mut self, dev: Dev, path: &Path) -> Result<Found, Refusal> {
        if let Some((at, refusal)) = self.failures.get(&dev)
            && at.elapsed() < RETRY_AFTER
        {
            return Err(refusal.clone());
        }
        let found = Locator::now().map(|locator| {
            let place = on_rclone(locator.table(), dev, path);
            place.map(|(mount, inside)| self.in_cache(&locator, mount, inside))
        });
        let found = match found {
            Ok(Some(found)) => found,
            // Not kept: the device may be a new mount's at once.
            Ok(None) => return Err(Refusal::new(Reason::NotRclone, "its mount is gone")),
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = &found {
            self.failures.insert(dev, (Instant::now(), refusal.clone()));
        }
        found
    }

    fn in_cache(
        &self,
        locator: &Arc<Locator>,
        mount: &Mount,
        inside: PathBuf,
    ) -> Result<Found, Refusal> {
        let (folders, facts) = if let Some(cache_dir) = &self.cache_dir {
            // With the cache named, the daemon need not be found.
            let folders = Folders::new(mount, cache_dir.clone());
            (folders, mount_facts(mount.read_only, None))
        } else {
            let located = locator.locate(mount)?;
            let facts = located.mount_facts();
            (located.folders, facts)
        };
        let refusal = check_mount(&facts, &mut Trail::off()).err();
        Ok(Found {
            folders,
            inside,
            mount: refusal.map(|refusal| refusal.reason),
        })
    }
}

/// The rclone mount that a path of a superblock is on, and where in it: by way of
/// the folder that a mount of ours shows again, if it is on such a one.
fn on_rclone<'a>(table: &'a MountTable, dev: Dev, path: &Path) -> Option<(&'a Mount, PathBuf)> {
    let mounts = table.iter().filter(|mount| mount.dev == dev);
    let (mount, inside) = mounts
        .filter_map(|mount| Some((mount, mount.inside(path)?)))
        .next_back()?;
    if mount.is_rclone() {
        return Some((mount, inside));
    }
    let source = mount.is_reexport().then(|| Path::new(&mount.source))?;
    let source = source.join(inside);
    let mount = table.containing(&source).filter(|m| m.is_rclone())?;
    Some((mount, mount.inside(&source)?))
}

/// The contract's word for an estimate.
pub fn state(estimate: &Estimate) -> &'static str {
    word(estimate.state)
}

/// The contract's word for a state.
pub fn word(state: Option<Reason>) -> &'static str {
    state.map_or("active", Reason::name)
}
