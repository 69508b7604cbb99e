//! Waits until rclone's metadata shows what was read, and judges.

use std::fs;
use std::io;
use std::time::{Duration, Instant, SystemTime};

use super::fill::{End, Filled, holds, touch};
use super::find::Clip;
use super::{Progress, Report, State};
use crate::cache::proof::Timestamp;
use crate::cache::ranges::Span;
use crate::reason::{Reason, Refusal};

/// How often to look at the metadata.
const INTERVAL: Duration = Duration::from_millis(100);

/// What the metadata says of a clip; nothing is read.
#[must_use]
pub fn check(clip: &Clip) -> Report {
    let state = match &clip.refusal {
        None => State::Cached,
        Some(_) if clip.is_hidden() => State::Refused,
        Some(_) if clip.is_unknown() => State::Failed,
        Some(_) => State::Incomplete,
    };
    let cached = clip.present.bytes();
    Report {
        path: clip.path.clone(),
        state,
        size: Some(clip.size),
        cached_before: cached,
        cached_after: cached,
        read_bytes: 0,
        refusal: clip.refusal.clone(),
    }
}

/// Waits for the clips that were read, and reports on all.
pub(super) fn confirm(
    filled: Vec<(&Clip, Filled)>,
    wait: Option<Duration>,
    progress: &(dyn Fn(Progress<'_>) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
) -> Vec<Report> {
    let deadline = Instant::now() + wait.unwrap_or_default();
    let read = filled.iter().filter(|(_, f)| matches!(f.end, End::Read(_)));
    let mut waiting: Vec<(&Clip, bool)> = read.map(|(clip, _)| (*clip, false)).collect();
    loop {
        waiting.retain_mut(|(clip, asked)| {
            let refusal = clip.present(clip.size, clip.modified).1;
            // rclone 1.60 writes a new version's metadata without its
            // fingerprint, until the clip is opened once more.
            let stale = |refusal: &Refusal| refusal.reason == Reason::StaleMetadata;
            if refusal.as_ref().is_some_and(stale) && !*asked {
                *asked = true;
                touch(clip);
            }
            refusal.is_some()
        });
        if waiting.is_empty() || Instant::now() >= deadline || stop() {
            break;
        }
        progress(Progress::Waiting(waiting.len()));
        std::thread::sleep(INTERVAL);
    }
    // Only now, also for those that were cached at first: what came after
    // them may have displaced them.
    let report = |(clip, filled)| report(clip, filled, stop());
    filled.into_iter().map(report).collect()
}

fn report(clip: &Clip, filled: Filled, stopped: bool) -> Report {
    // FUSE may be slow to answer one who wants to stop.
    let now = if stopped {
        Ok((clip.size, clip.modified))
    } else {
        fs::metadata(&clip.path).map(|m| (m.len(), Timestamp::modified(&m)))
    };
    let mut report = Report {
        read_bytes: filled.read_bytes,
        ..check(clip)
    };
    let (size, modified) = match now {
        Ok(now) => now,
        Err(e) => {
            report.cached_after = 0;
            (report.state, report.refusal) = (State::Failed, Some(unreadable(clip, &e)));
            return report;
        }
    };
    let (present, refusal) = clip.present(size, modified);
    report.size = Some(size);
    report.cached_after = present.bytes();
    (report.state, report.refusal) = match filled.end {
        _ if refusal.is_none() => (State::Cached, None),
        End::Not(state, why) => (state, why.or(refusal)),
        _ if (size, modified) != (clip.size, clip.modified) => {
            let detail = format!("`{}` changed meanwhile; run again", clip.path.display());
            let changed = Refusal::new(Reason::Changed, detail);
            (State::Incomplete, Some(changed))
        }
        End::Unread => (State::Incomplete, refusal),
        End::Read(closed_at) => judge(Look::at(clip, closed_at), refusal),
    };
    report
}

fn unreadable(clip: &Clip, error: &io::Error) -> Refusal {
    let what = format_args!("`{}`", clip.path.display());
    Refusal::from_io(what, error, Reason::IoError)
}

/// What is left in the cache of a clip that was read to its end and does not
/// show whole.
#[derive(Debug, Clone, Copy)]
struct Look {
    /// Whether rclone has written the metadata after the clip was closed.
    written: bool,
    /// Whether the cache file is there and has no hole.
    whole: bool,
}

impl Look {
    fn at(clip: &Clip, closed_at: SystemTime) -> Self {
        let folders = &clip.site.located.folders;
        // The kernel stamps files by a clock that is some milliseconds late:
        // what seems written after, was.
        let written = fs::metadata(folders.metadata_path(&clip.inside))
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|at| at >= closed_at);
        let span = Span {
            start: 0,
            end: clip.size,
        };
        Self {
            written,
            whole: holds(&folders.data_path(&clip.inside), span).unwrap_or(false),
        }
    }
}

/// Read to its end, but not shown: lost again, or only not told yet?
fn judge(look: Look, refusal: Option<Refusal>) -> (State, Option<Refusal>) {
    let gone = |refusal: &Refusal| refusal.reason == Reason::NoMetadata;
    let lost = look.written || !look.whole || refusal.as_ref().is_some_and(gone);
    let (state, why) = if lost {
        (
            State::Incomplete,
            "is the cache too small (--vfs-cache-max-size), or its disk full?",
        )
    } else {
        (
            State::Unconfirmed,
            "rclone writes its metadata when no program has the clip open any more",
        )
    };
    let refusal = refusal.map(|refusal| Refusal {
        detail: format!("{}, but it was read to its end; {why}", refusal.detail),
        ..refusal
    });
    (state, refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_be_told_is_unconfirmed() {
        let judge = |written, whole, reason| {
            judge(
                Look { written, whole },
                Some(Refusal::new(reason, "detail")),
            )
            .0
        };
        let partial = Reason::Partial;
        assert_eq!(judge(false, true, partial), State::Unconfirmed);
        assert_eq!(judge(true, true, partial), State::Incomplete);
        assert_eq!(judge(false, false, partial), State::Incomplete);
        assert_eq!(judge(false, true, Reason::NoMetadata), State::Incomplete);
        assert_eq!(judge(false, true, Reason::BadMetadata), State::Unconfirmed);
    }
}
