//! Looks at what a running `run` has: its pinned maps, and rclone's metadata.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use vmafx_bypass::mounts::{Dev, MountTable};
use vmafx_bypass::tracker::{Accounts, Dump, DumpEntry, DumpError, Losses, Owner, dump};

use super::model::{ClipId, Facts, Fd, Meter, Picture, Sample};
use crate::commands::estimate::{self, Estimator};
use crate::output::escape;

/// How old an estimate may be.
const ESTIMATE_AGE: Duration = Duration::from_secs(2);
/// How long a look may estimate: of many clips the others have to wait for the
/// next one.
const ESTIMATE_TIME: Duration = Duration::from_millis(250);

/// What was seen.
#[derive(Debug, Clone)]
pub struct Look {
    pub at: SystemTime,
    pub owner: Owner,
    pub complete: bool,
    /// Whether no reconciliation was under way.
    pub settled: bool,
    pub losses: Losses,
    /// Where there are open clips.
    pub mounts: Vec<PathBuf>,
    pub picture: Picture,
}

/// A clip that was seen at the last look.
#[derive(Debug)]
struct Known {
    facts: Facts,
    /// When the descriptor was made that told the size last.
    opened_at: SystemTime,
    estimated: Option<Instant>,
    seen: u64,
}

/// Clips that somebody looks at: they are estimated before others.
pub type Watched = Arc<Mutex<HashSet<ClipId>>>;

/// Looks, and keeps what the next look needs.
pub struct Looker {
    pin_dir: PathBuf,
    estimator: Estimator,
    meter: Meter,
    known: HashMap<ClipId, Known>,
    looks: u64,
    watched: Watched,
}

impl Looker {
    pub fn new(pin_dir: PathBuf, watched: Watched) -> Self {
        Self {
            pin_dir,
            watched,
            estimator: Estimator::default(),
            meter: Meter::default(),
            known: HashMap::new(),
            looks: 0,
        }
    }

    /// Looks once. 100,000 descriptors take a third of a second.
    pub fn look(&mut self) -> Result<Look, DumpError> {
        let mut dump = dump(&self.pin_dir)?;
        let at = Instant::now();
        self.looks += 1;
        let fds = dump.entries.iter().map(|entry| Fd {
            pid: entry.pid,
            comm: escape(&entry.comm),
            clip: ClipId {
                dev: entry.dev,
                ino: entry.ino,
            },
        });
        let fds: Vec<Fd> = fds.collect();
        let sample = Sample {
            at,
            owner: dump.owner.pid,
            fds,
            accounts: dump.accounts.take(),
        };
        let mut picture = self.meter.picture(&sample);
        self.learn(&dump.entries, sample.accounts.as_ref(), &picture);
        self.estimate();
        for clip in &mut picture.clips {
            if let Some(known) = self.known.get(&clip.id) {
                clip.facts = known.facts.clone();
            }
        }
        Ok(Look {
            at: SystemTime::now(),
            complete: dump.complete(),
            settled: dump.settled,
            mounts: mounts(&dump),
            owner: dump.owner,
            losses: dump.losses,
            picture,
        })
    }

    /// Takes clips from what is open or was just read, and forgets all others.
    fn learn(&mut self, open: &[DumpEntry], accounts: Option<&Accounts>, picture: &Picture) {
        for entry in open {
            let id = ClipId {
                dev: entry.dev,
                ino: entry.ino,
            };
            let known = self.known.entry(id).or_insert_with(Known::new);
            known.seen = self.looks;
            if known.facts.path.is_none() {
                known.facts.path.clone_from(&entry.path);
            }
            // The last open tells the size as it is now.
            if known.facts.size.is_none() || entry.opened_at > known.opened_at {
                if known.facts.size != Some(entry.size) {
                    known.estimated = None;
                }
                known.facts.size = Some(entry.size);
                known.opened_at = entry.opened_at;
            }
        }
        let closed = picture.clips.iter().filter(|clip| clip.fds == 0);
        let closed: HashSet<ClipId> = closed.map(|clip| clip.id).collect();
        for account in accounts.iter().flat_map(|accounts| &accounts.each) {
            let id = ClipId::of(account);
            if closed.contains(&id) {
                let known = self.known.entry(id).or_insert_with(Known::new);
                known.seen = self.looks;
                known.facts.path = known.facts.path.take().or_else(|| account.path.clone());
                known.facts.size = known.facts.size.or(Some(account.size));
            }
        }
        self.known.retain(|_, known| known.seen == self.looks);
    }

    /// Estimates those that were not for longest, as long as there is time; those
    /// that are watched first.
    fn estimate(&mut self) {
        let started = Instant::now();
        let is_due = |known: &Known| {
            known
                .estimated
                .is_none_or(|at| at.elapsed() >= ESTIMATE_AGE)
        };
        let mut due: Vec<_> = self.known.iter_mut().filter(|(_, k)| is_due(k)).collect();
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        due.sort_by_key(|(id, known)| (!watched.contains(id), known.estimated));
        drop(watched);
        for (id, known) in due {
            let (path, size) = (known.facts.path.as_deref(), known.facts.size.unwrap_or(0));
            let estimate = self.estimator.estimate(id.dev, path, size);
            known.facts.cached = estimate.cached_bytes;
            known.facts.state = estimate::state(&estimate);
            known.estimated = Some(Instant::now());
            if started.elapsed() >= ESTIMATE_TIME {
                return;
            }
        }
    }
}

impl Known {
    fn new() -> Self {
        Self {
            facts: Facts::default(),
            opened_at: SystemTime::UNIX_EPOCH,
            estimated: None,
            seen: 0,
        }
    }
}

/// Where the superblocks that have open clips are mounted.
fn mounts(dump: &Dump) -> Vec<PathBuf> {
    let mut clips: BTreeMap<Dev, &Path> = BTreeMap::new();
    for entry in &dump.entries {
        if let Some(path) = &entry.path {
            clips.entry(entry.dev).or_insert(path);
        }
    }
    // Without a table there is no mount to name.
    let table = MountTable::read().unwrap_or_default();
    let of = |(dev, path): (Dev, &Path)| {
        let mut mounts = table.iter().filter(|mount| mount.dev == dev);
        let mount = mounts.rfind(|mount| path.starts_with(&mount.point))?;
        Some(mount.point.clone())
    };
    clips.into_iter().filter_map(of).collect()
}
