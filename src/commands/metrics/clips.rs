//! How the clips that are open could be read, by rclone's metadata. There may be tens
//! of thousands, each a file to read, and a scrape comes every few seconds: so an
//! estimate is kept for a while, and none is made once a scrape has taken its time.

use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmafx_bypass::Reason;
use vmafx_bypass::tracker::TrackedFd;

use crate::commands::estimate::{self, Estimator};

/// How long an estimate is good.
const FRESH: Duration = Duration::from_secs(10);
/// How long the estimates of one scrape may take.
pub const BUDGET: Duration = Duration::from_millis(250);
/// The state of a clip that no scrape has come to.
const NOT_YET: &str = "unknown";

/// A clip, by what an estimate depends on.
struct Clip(Arc<TrackedFd>);

impl PartialEq for Clip {
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (&self.0, &other.0);
        (a.dev, a.size, &a.path) == (b.dev, b.size, &b.path)
    }
}

impl Eq for Clip {}

impl Hash for Clip {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.0.dev, self.0.size, &self.0.path).hash(state);
    }
}

#[derive(Clone, Copy)]
struct Estimated {
    at: Instant,
    state: &'static str,
    cached: u64,
}

/// The estimates of clips that are open.
pub struct Clips {
    estimator: Estimator,
    known: HashMap<Clip, Estimated>,
}

/// Open clips at one moment.
#[derive(Default)]
pub struct Sample {
    by_state: HashMap<&'static str, u64>,
    pub size: u64,
    pub cached: u64,
}

impl Clips {
    pub fn new(cache_dir: Option<PathBuf>) -> Self {
        Self {
            estimator: Estimator::new(cache_dir),
            known: HashMap::new(),
        }
    }

    /// Looks at the clips of these descriptors, each counted once; makes no estimate
    /// after this time.
    pub fn sample(&mut self, entries: &[Arc<TrackedFd>], budget: Duration) -> Sample {
        let open: HashSet<Clip> = entries.iter().map(|fd| Clip(Arc::clone(fd))).collect();
        self.known.retain(|clip, _| open.contains(clip));
        self.refresh(&open, Instant::now() + budget);
        let mut sample = Sample::default();
        for clip in &open {
            let known = self.known.get(clip);
            let state = known.map_or(NOT_YET, |known| known.state);
            *sample.by_state.entry(state).or_default() += 1;
            sample.size += clip.0.size;
            sample.cached += known.map_or(0, |known| known.cached);
        }
        sample
    }

    /// What has no estimate, and then what has an old one, the oldest first.
    fn due<'a>(&self, open: &'a HashSet<Clip>) -> Vec<&'a Clip> {
        let at = |clip: &&Clip| self.known.get(clip).map(|known| known.at);
        let is_due = |clip: &&Clip| at(clip).is_none_or(|at| at.elapsed() >= FRESH);
        let mut due: Vec<&Clip> = open.iter().filter(is_due).collect();
        due.sort_by_cached_key(at);
        due
    }

    fn refresh(&mut self, open: &HashSet<Clip>, deadline: Instant) {
        for Clip(fd) in self.due(open) {
            if Instant::now() >= deadline {
                return;
            }
            let path = fd.path.as_deref();
            let estimate = self.estimator.estimate(fd.dev, path, fd.size);
            let estimated = Estimated {
                at: Instant::now(),
                state: estimate::state(&estimate),
                cached: estimate.cached_bytes.unwrap_or(0),
            };
            self.known.insert(Clip(Arc::clone(fd)), estimated);
        }
    }
}

impl Sample {
    /// Every state there is, with its clips.
    pub fn states(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let reasons = Reason::ALL.iter().map(|reason| reason.name());
        let states = ["active", NOT_YET].into_iter().chain(reasons);
        states.map(|state| (state, self.by_state.get(state).copied().unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use vmafx_bypass::mounts::Dev;

    use super::*;

    /// On no mount that there is.
    fn fd(number: u32, path: &str, size: u64) -> Arc<TrackedFd> {
        Arc::new(TrackedFd {
            pid: 1,
            own_pid: 1,
            fd: number,
            comm: "c".into(),
            path: Some(path.into()),
            dev: Dev::new(4095, 1),
            ino: 1,
            flags: 0,
            size,
            opened_at: UNIX_EPOCH,
            open_ns: None,
        })
    }

    fn states(sample: &Sample) -> Vec<(&'static str, u64)> {
        sample.states().filter(|(_, n)| *n > 0).collect()
    }

    #[test]
    fn a_clip_counts_once_and_is_unknown_until_there_is_time_for_it() {
        let mut clips = Clips::new(None);
        let open = [fd(3, "/m/a", 5), fd(4, "/m/a", 5), fd(5, "/m/b", 7)];
        let sample = clips.sample(&open, Duration::ZERO);
        assert_eq!(states(&sample), [("unknown", 2)]);
        assert_eq!((sample.size, sample.cached), (12, 0));
        let sample = clips.sample(&open, PLENTY);
        assert_eq!(states(&sample), [("not_rclone", 2)]);
        // An estimate is kept, as long as the clip is open.
        let sample = clips.sample(&open[..1], Duration::ZERO);
        assert_eq!(states(&sample), [("not_rclone", 1)]);
        let sample = clips.sample(&open, Duration::ZERO);
        assert_eq!(states(&sample), [("unknown", 1), ("not_rclone", 1)]);
        assert_eq!(states(&clips.sample(&[], PLENTY)), []);
        assert!(clips.known.is_empty());
    }

    #[test]
    fn what_is_older_is_looked_at_first() {
        let mut clips = Clips::new(None);
        let open = [fd(3, "/m/a", 5), fd(4, "/m/b", 5), fd(5, "/m/c", 7)];
        clips.sample(&open[..2], PLENTY);
        // As if made long ago, the first one's longer.
        for (clip, known) in &mut clips.known {
            let ago = if clip.0.fd == 3 { FRESH * 3 } else { FRESH * 2 };
            known.at -= ago;
        }
        let all: HashSet<Clip> = open.iter().map(|fd| Clip(Arc::clone(fd))).collect();
        let due: Vec<u32> = clips.due(&all).iter().map(|clip| clip.0.fd).collect();
        assert_eq!(due, [5, 3, 4]);
    }

    const PLENTY: Duration = Duration::from_secs(60);
}
