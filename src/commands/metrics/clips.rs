//! How the clips that are open, and those that were read, could be read by the bypass,
//! by rclone's metadata. There may be tens of thousands, each a file to read, and a
//! scrape comes every few seconds: so an estimate is kept for a while, and none is made
//! once a scrape has taken its time.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmafx_bypass::Reason;
use vmafx_bypass::cache::rclone::Estimate;
use vmafx_bypass::mounts::Dev;
use vmafx_bypass::tracker::{Account, TrackedFd};

use crate::commands::estimate::{self, Estimator};

/// How long an estimate is good.
const FRESH: Duration = Duration::from_secs(10);
/// How long the estimates of one scrape may take.
pub const BUDGET: Duration = Duration::from_millis(250);
/// The state of a clip that no scrape has come to.
const NOT_YET: &str = "unknown";

/// A clip, and what an estimate of it depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Clip {
    dev: Dev,
    ino: u64,
    size: u64,
    path: Option<PathBuf>,
}

impl From<&TrackedFd> for Clip {
    fn from(fd: &TrackedFd) -> Self {
        Self {
            dev: fd.dev,
            ino: fd.ino,
            size: fd.size,
            path: fd.path.clone(),
        }
    }
}

impl From<&Account> for Clip {
    fn from(account: &Account) -> Self {
        Self {
            dev: account.dev,
            ino: account.ino,
            size: account.size,
            path: account.path.clone(),
        }
    }
}

/// The clips of descriptors, each once: with the size and path of its last open.
pub fn open_clips(entries: &[Arc<TrackedFd>]) -> HashSet<Clip> {
    let mut last: HashMap<(Dev, u64), &TrackedFd> = HashMap::new();
    for fd in entries {
        let known = last.entry((fd.dev, fd.ino)).or_insert(fd);
        if fd.opened_at > known.opened_at {
            *known = fd;
        }
    }
    last.into_values().map(Clip::from).collect()
}

struct Known {
    at: Instant,
    estimate: Estimate,
}

/// The estimates of clips.
pub struct Clips {
    estimator: Estimator,
    known: HashMap<Clip, Known>,
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

    /// Looks at clips, and forgets all others; makes no estimate after this time.
    pub fn refresh(&mut self, clips: &HashSet<Clip>, budget: Duration) {
        let deadline = Instant::now() + budget;
        self.known.retain(|clip, _| clips.contains(clip));
        for clip in self.due(clips) {
            if Instant::now() >= deadline {
                return;
            }
            let path = clip.path.as_deref();
            let estimate = self.estimator.estimate(clip.dev, path, clip.size);
            let at = Instant::now();
            self.known.insert(clip.clone(), Known { at, estimate });
        }
    }

    /// What has no estimate, and then what has an old one, the oldest first.
    fn due<'a>(&self, clips: &'a HashSet<Clip>) -> Vec<&'a Clip> {
        let at = |clip: &&Clip| self.known.get(clip).map(|known| known.at);
        let is_due = |clip: &&Clip| at(clip).is_none_or(|at| at.elapsed() >= FRESH);
        let mut due: Vec<&Clip> = clips.iter().filter(is_due).collect();
        due.sort_by_cached_key(at);
        due
    }

    /// The last estimate of a clip; `None`: no scrape has come to it.
    pub fn estimate(&self, clip: &Clip) -> Option<&Estimate> {
        self.known.get(clip).map(|known| &known.estimate)
    }

    /// Sums these clips up.
    pub fn sample(&self, open: &HashSet<Clip>) -> Sample {
        let mut sample = Sample::default();
        for clip in open {
            let estimate = self.estimate(clip);
            let state = estimate.map_or(NOT_YET, estimate::state);
            *sample.by_state.entry(state).or_default() += 1;
            sample.size += clip.size;
            sample.cached += estimate.and_then(|e| e.cached_bytes).unwrap_or(0);
        }
        sample
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

    use super::*;

    /// On no mount that there is.
    fn clip(path: &str, size: u64) -> Clip {
        Clip {
            dev: Dev::new(4095, 1),
            ino: 1,
            size,
            path: Some(path.into()),
        }
    }

    #[test]
    fn a_clip_counts_once_as_it_was_at_its_last_open() {
        let fd = |fd, ino, path: Option<&str>, size, at| {
            Arc::new(TrackedFd {
                pid: 1,
                own_pid: 1,
                fd,
                comm: "c".into(),
                path: path.map(Into::into),
                dev: Dev::new(4095, 1),
                ino,
                flags: 0,
                size,
                opened_at: UNIX_EPOCH + Duration::from_secs(at),
                open_ns: None,
            })
        };
        let entries = [
            fd(3, 1, Some("/m/a"), 5, 1),
            fd(4, 1, Some("/other/a"), 7, 3),
            fd(5, 1, Some("/m/a"), 6, 2),
            fd(6, 2, None, 5, 1),
            fd(7, 3, None, 5, 1),
        ];
        let clips = open_clips(&entries);
        assert_eq!(clips.len(), 3);
        assert!(clips.contains(&Clip::from(&*entries[1])));
    }

    fn states(sample: &Sample) -> Vec<(&'static str, u64)> {
        sample.states().filter(|(_, n)| *n > 0).collect()
    }

    #[test]
    fn a_clip_is_unknown_until_there_is_time_for_it() {
        let mut clips = Clips::new(None);
        let both = HashSet::from([clip("/m/a", 5), clip("/m/b", 7)]);
        let one = HashSet::from([clip("/m/a", 5)]);
        let mut look = |open: &HashSet<Clip>, budget| {
            clips.refresh(open, budget);
            let sample = clips.sample(open);
            (states(&sample), sample.size, sample.cached)
        };
        assert_eq!(look(&both, Duration::ZERO), (vec![("unknown", 2)], 12, 0));
        assert_eq!(look(&both, PLENTY), (vec![("not_rclone", 2)], 12, 0));
        // An estimate is kept, as long as somebody asks for the clip.
        assert_eq!(look(&one, Duration::ZERO).0, [("not_rclone", 1)]);
        let some = [("unknown", 1), ("not_rclone", 1)];
        assert_eq!(look(&both, Duration::ZERO).0, some);
        assert_eq!(look(&HashSet::new(), PLENTY).0, []);
        assert!(clips.known.is_empty());
    }

    #[test]
    fn what_is_older_is_looked_at_first() {
        let mut clips = Clips::new(None);
        let [first, second, third] = ["/m/a", "/m/b", "/m/c"].map(|path| clip(path, 5));
        clips.refresh(&HashSet::from([first.clone(), second.clone()]), PLENTY);
        // As if made long ago, the first one's longer.
        for (clip, known) in &mut clips.known {
            let ago = if *clip == first { FRESH * 3 } else { FRESH * 2 };
            known.at -= ago;
        }
        let all = HashSet::from([first.clone(), second.clone(), third.clone()]);
        assert_eq!(clips.due(&all), [&third, &first, &second]);
    }

    const PLENTY: Duration = Duration::from_secs(60);
}
