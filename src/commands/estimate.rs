//! Joins the tracker and the cache: how much of a tracked clip is cached.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use vmafx_bypass::cache::rclone::{Estimate, Located, Locator, estimate};
use vmafx_bypass::mounts::Dev;
use vmafx_bypass::{Reason, Refusal};

/// How long a mount whose cache could not be located is left alone.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Estimates by the metadata alone; opens nothing through FUSE.
#[derive(Default)]
pub struct Estimator {
    failures: HashMap<Dev, (Instant, Refusal)>,
}

impl Estimator {
    /// Estimates for a file at `path` on the superblock `dev`.
    pub fn estimate(&mut self, dev: Dev, path: Option<&Path>, size: u64) -> Estimate {
        let found = path
            .ok_or_else(|| Refusal::new(Reason::IoError, "its path got lost"))
            .and_then(|path| self.locate(dev, path));
        match found {
            Ok((located, inside)) => estimate(&located, &inside, size),
            Err(refusal) => Estimate::unknown(refusal.reason),
        }
    }

    fn locate(&mut self, dev: Dev, path: &Path) -> Result<(Located, std::path::PathBuf), Refusal> {
        if let Some((at, refusal)) = self.failures.get(&dev)
            && at.elapsed() < RETRY_AFTER
        {
            return Err(refusal.clone());
        }
        let found = Locator::with(|locator| {
            let table = locator.table();
            let mounts = table.iter().filter(|m| m.dev == dev && m.is_rclone());
            let (mount, inside) = mounts
                .filter_map(|mount| Some((mount, mount.inside(path)?)))
                .next_back()
                .ok_or_else(|| Refusal::new(Reason::NotRclone, "its mount is gone"))?;
            Ok((locator.locate(mount)?, inside))
        });
        if let Err(refusal) = &found {
            self.failures.insert(dev, (Instant::now(), refusal.clone()));
        }
        found
    }
}

/// The contract's word for an estimate.
pub fn state(estimate: &Estimate) -> &'static str {
    estimate.state.map_or("active", Reason::name)
}
