//! What the mutators did, and when: evidence for findings, and the few things
//! that bytes alone cannot tell.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::time::{ClockId, clock_gettime};

use crate::cells::{CELL, Stamp, content, hex};
use crate::judge::{Fault, Wrong};
use crate::told::Suspect;

/// Mutations that are kept: far more than a read can overlap with.
const KEPT: usize = 4_000;
/// How long after it a change at the remote may still come through, ns.
const REMOTE_LAG: u64 = 4_000_000_000;

/// Monotonic time, nanoseconds: the same clock in every process.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}

/// What a mutation can make visible for a moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Effects {
    /// Zeros that were never written.
    pub zeros: bool,
    /// Another size than before and after it.
    pub resized: bool,
    /// Another file's bytes at this path.
    pub brings: Option<u16>,
    /// It comes from the remote: later than it was done.
    pub remote: bool,
    /// Size and time at the remote, whole seconds.
    pub fingerprint: Option<(u64, u64)>,
}

#[derive(Debug, Clone)]
struct Event {
    clip: String,
    kind: &'static str,
    detail: String,
    effects: Effects,
    stamp: Stamp,
    begin: u64,
    end: Option<u64>,
    error: Option<String>,
}

#[derive(Default)]
pub struct Journal {
    version: AtomicU32,
    events: Mutex<(u64, VecDeque<Event>)>,
    counts: Mutex<BTreeMap<&'static str, u64>>,
    failures: Mutex<BTreeMap<String, u64>>,
}

impl Journal {
    /// A version that is newer than all before it.
    pub fn stamp(&self, file: u16) -> Stamp {
        let version = self.version.fetch_add(1, Ordering::SeqCst) + 1;
        Stamp { version, file }
    }

    /// Counts something that was seen, and done by nobody here.
    pub fn count(&self, kind: &'static str) {
        *self.counts.lock().unwrap().entry(kind).or_default() += 1;
    }

    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.counts.lock().unwrap().clone()
    }

    pub fn failures(&self) -> BTreeMap<String, u64> {
        self.failures.lock().unwrap().clone()
    }

    /// Does `work` to a clip, and writes it down, from before it begins.
    pub fn record(
        &self,
        clip: &str,
        kind: &'static str,
        stamp: Stamp,
        effects: Effects,
        detail: String,
        work: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let number = {
            let mut events = self.events.lock().unwrap();
            let (dropped, kept) = &mut *events;
            if kept.len() == KEPT {
                kept.pop_front();
                *dropped += 1;
            }
            kept.push_back(Event {
                clip: clip.into(),
                kind,
                detail,
                effects,
                stamp,
                begin: now(),
                end: None,
                error: None,
            });
            *dropped + kept.len() as u64 - 1
        };
        let result = work();
        let mut events = self.events.lock().unwrap();
        let (dropped, kept) = &mut *events;
        if let Some(event) = number
            .checked_sub(*dropped)
            .and_then(|n| kept.get_mut(n as usize))
        {
            event.end = Some(now());
            event.error = result.as_ref().err().map(ToString::to_string);
        }
        drop(events);
        match &result {
            Ok(()) => self.count(kind),
            Err(e) => {
                let mut failures = self.failures.lock().unwrap();
                *failures.entry(format!("{kind}: {e}")).or_default() += 1;
            }
        }
        result
    }

    /// Whether what the judge could not account for is the passing state of a
    /// mutation that overlaps with the read: zeros of a truncated file, a size,
    /// another file's bytes after a rename, a version that a read of less than
    /// a cell cannot name. Never an older version, nor another offset.
    pub fn excuses(&self, suspect: &Suspect) -> bool {
        let events = self.events.lock().unwrap();
        let floor = floor(&events.1, suspect);
        let near: Vec<&Event> = events
            .1
            .iter()
            .filter(|event| event.clip == suspect.clip && overlaps(event, suspect))
            .collect();
        let above = |wrong: &Wrong| {
            let stamp = wrong
                .stamp
                .or_else(|| whose(&events.1, &suspect.clip, wrong));
            let by_floor =
                suspect.floor > 0 && matches!(wrong.fault, Fault::Older | Fault::Garbage);
            by_floor && stamp.is_some_and(|stamp| stamp.version >= floor)
        };
        suspect
            .wrong
            .iter()
            .all(|wrong| near.iter().any(|event| excuse(event, wrong)) || above(wrong))
    }

    /// Which mutation of a clip wrote these bytes, where the judge cannot tell.
    pub fn whose(&self, clip: &str, wrong: &Wrong) -> Option<Stamp> {
        whose(&self.events.lock().unwrap().1, clip, wrong)
    }

    /// The last mutations of a clip up to the end of a read, as text.
    pub fn tail(&self, suspect: &Suspect) -> String {
        let events = self.events.lock().unwrap();
        let end = suspect.read[1];
        let mut of_clip: Vec<&Event> = events
            .1
            .iter()
            .rev()
            .filter(|event| event.begin <= end + REMOTE_LAG)
            .filter(|event| event.clip == suspect.clip || event.clip == "*")
            .take(12)
            .collect();
        of_clip.reverse();
        let mut text = String::new();
        for event in of_clip {
            let ms = |at: u64| (at as f64 - suspect.read[0] as f64) / 1e6;
            let _ = writeln!(
                text,
                "    {:>10.1} to {:>10.1} ms: {} {} version {}{}",
                ms(event.begin),
                event.end.map_or(f64::INFINITY, ms),
                event.kind,
                event.detail,
                event.stamp.version,
                event
                    .error
                    .as_ref()
                    .map_or(String::new(), |e| format!(": {e}")),
            );
        }
        text
    }
}

fn overlaps(event: &Event, suspect: &Suspect) -> bool {
    let lag = if event.effects.remote { REMOTE_LAG } else { 0 };
    let end = event.end.map_or(u64::MAX, |end| end.saturating_add(lag));
    event.begin <= suspect.read[1] && end >= suspect.before
}

fn excuse(event: &Event, wrong: &Wrong) -> bool {
    match wrong.fault {
        Fault::Zeros => event.effects.zeros,
        Fault::Length => event.effects.resized,
        Fault::Foreign => {
            let file = wrong.stamp.map(|stamp| stamp.file);
            event.effects.brings.is_some() && event.effects.brings == file
        }
        Fault::Garbage => wrong.length < CELL as u64 && begins_with(event.stamp, wrong),
        Fault::Elsewhere | Fault::Older | Fault::Newer | Fault::Mixture => false,
    }
}

/// Which mutation of a clip wrote these bytes.
fn whose(events: &VecDeque<Event>, clip: &str, wrong: &Wrong) -> Option<Stamp> {
    let mut stamps = events.iter().filter(|e| e.clip == clip).map(|e| e.stamp);
    stamps.find(|stamp| begins_with(*stamp, wrong))
}

/// The version that no byte may be older than, by what FUSE showed of the file
/// before a byte elsewhere was read through it: the first of that size and
/// time. Until rclone notices a swap it fetches the new version's bytes beside
/// the old one's; then it drops these.
fn floor(events: &VecDeque<Event>, suspect: &Suspect) -> u32 {
    let shown = |event: &&Event| {
        event.clip == suspect.clip
            && event.effects.fingerprint.is_some()
            && event.effects.fingerprint == suspect.shown
    };
    events
        .iter()
        .find(shown)
        .map_or(0, |event| event.stamp.version)
}

/// Whether the first wrong bytes are of this stamp.
fn begins_with(stamp: Stamp, wrong: &Wrong) -> bool {
    let length = wrong.length.min(CELL as u64) as usize;
    wrong.hex[0].starts_with(&hex(&content(stamp, wrong.offset, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspect(fault: Fault, file: u16, before: u64, read: [u64; 2]) -> Suspect {
        Suspect {
            clip: "a".into(),
            before,
            read,
            wrong: vec![Wrong {
                offset: 0,
                length: 64,
                fault,
                stamp: Some(Stamp { version: 1, file }),
                hex: Default::default(),
            }],
            ..Suspect::default()
        }
    }

    #[test]
    fn a_floor_counts_from_the_version_that_fuse_had_noticed() {
        let journal = Journal::default();
        let mut put = |fingerprint| {
            let effects = Effects {
                fingerprint: Some(fingerprint),
                ..Effects::default()
            };
            let stamp = journal.stamp(1);
            let done = journal.record("a", "swap", stamp, effects, String::new(), || Ok(()));
            done.unwrap();
            stamp.version
        };
        // The third swap cannot be noticed.
        let versions = [(9, 1), (9, 2), (9, 2)].map(&mut put);
        assert_eq!(versions, [1, 2, 3]);
        let holds = |version, shown| {
            let mut suspect = suspect(Fault::Older, 1, 1, [2, 3]);
            suspect.wrong[0].stamp = Some(Stamp { version, file: 1 });
            (suspect.floor, suspect.shown) = (3, Some(shown));
            !journal.excuses(&suspect)
        };
        assert!(holds(1, (9, 2)), "dropped when the second was noticed");
        assert!(!holds(2, (9, 2)), "the third's equal");
        assert!(!holds(1, (9, 1)), "not noticed yet");
        assert!(!holds(1, (8, 1)), "of a moment between");
    }

    #[test]
    fn only_passing_states_are_excused_and_only_while_they_pass() {
        let journal = Journal::default();
        let effects = Effects {
            zeros: true,
            brings: Some(7),
            ..Effects::default()
        };
        let start = now();
        journal
            .record(
                "a",
                "truncate",
                journal.stamp(1),
                effects,
                String::new(),
                || Ok(()),
            )
            .unwrap();
        let end = now();
        let during = |fault, file| journal.excuses(&suspect(fault, file, start, [start, end]));
        assert!(during(Fault::Zeros, 1) && during(Fault::Foreign, 7));
        assert!(!during(Fault::Foreign, 8) && !during(Fault::Length, 1));
        for never in [
            Fault::Older,
            Fault::Newer,
            Fault::Elsewhere,
            Fault::Mixture,
            Fault::Garbage,
        ] {
            assert!(!during(never, 1), "{never:?}");
        }
        let at = |before, read| journal.excuses(&suspect(Fault::Zeros, 1, before, read));
        assert!(!at(end + 1, [end + 2, end + 3]), "FUSE was read after it");
        assert!(!at(start - 3, [start - 2, start - 1]), "not begun yet");
        let mut other = suspect(Fault::Zeros, 1, start, [start, end]);
        other.clip = "b".into();
        assert!(!journal.excuses(&other), "another clip");
        assert_eq!(journal.counts()["truncate"], 1);
    }
}
