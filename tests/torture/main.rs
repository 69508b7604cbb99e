//! Whatever rclone, its users and the kernel do to the cache: a bypassed read
//! returns what FUSE would have returned. See docs/TESTING.md.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod arena;
mod cells;
mod fuse;
mod journal;
mod judge;
#[cfg(test)]
mod judge_tests;
mod mutate;
mod processes;
mod random;
mod reader;
mod told;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arena::{Outcome, Variant};
use common::{need_root, rclones};

/// How long the test lasts, unless `TORTURE_SECONDS` says otherwise.
const SECONDS: u64 = 60;
/// At least this share of the bytes must come from the cache, percent: a
/// torture that never bypasses proves nothing. Measured: see docs/TESTING.md.
const LEAST_SHARE_READ_ONLY: u64 = 5;
/// The same on writable mounts; asserted where a quiet, cached clip of one is
/// bypassed at all.
const LEAST_SHARE_WRITABLE: u64 = 1;

/// Three kinds of mounts of each rclone, two of different programs at a time.
fn variants() -> Vec<Vec<Variant>> {
    let of = |rclone: &PathBuf| {
        let variant = |name, read_only, http, arguments| Variant {
            name,
            rclone: rclone.clone(),
            read_only,
            http,
            arguments,
        };
        [
            variant("ro", true, true, &[][..]),
            variant("rw", false, false, &["--vfs-write-back=0s"]),
            variant(
                "rw --write-back-cache",
                false,
                false,
                &["--vfs-write-back=1s", "--write-back-cache"],
            ),
        ]
    };
    let kinds: Vec<[Variant; 3]> = rclones().iter().map(of).collect();
    (0..3)
        .map(|shift| {
            let at = |(index, kinds): (usize, &[Variant; 3])| kinds[(index + shift) % 3].clone();
            kinds.iter().enumerate().map(at).collect()
        })
        .collect()
}

fn duration() -> Duration {
    let text = std::env::var("TORTURE_SECONDS").unwrap_or_default();
    match text.as_str() {
        "" => Duration::from_secs(SECONDS),
        text => text.parse().map_or_else(
            |_| humantime::parse_duration(text).expect("TORTURE_SECONDS: 60, or 30m"),
            Duration::from_secs,
        ),
    }
}

fn seed() -> u64 {
    std::env::var("TORTURE_SEED").map_or_else(
        |_| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap()
                .as_nanos() as u64
                >> 10
        },
        |text| text.parse().expect("TORTURE_SEED: a number"),
    )
}

#[test]
fn bypassed_reads_are_fuses() {
    need_root();
    let seed = seed();
    eprintln!("TORTURE_SEED={seed}");
    let rounds = variants();
    let each = duration() / rounds.len() as u32;
    let only = std::env::var("TORTURE_ONLY").ok();
    let mut outcomes: Vec<Outcome> = Vec::new();
    for (round, variants) in rounds.into_iter().enumerate() {
        std::thread::scope(|scope| {
            let threads: Vec<_> = variants
                .into_iter()
                .filter(|v| only.as_ref().is_none_or(|o| v.name == o))
                .enumerate()
                .map(|(index, variant)| {
                    let seed = seed.wrapping_add((round * 16 + index) as u64);
                    scope.spawn(move || arena::torture(&variant, each, seed))
                })
                .collect();
            outcomes.extend(threads.into_iter().map(|thread| thread.join().unwrap()));
        });
    }
    let mut faults = String::new();
    for outcome in &outcomes {
        eprintln!("{}", report(outcome));
        check(outcome, &mut faults);
    }
    assert!(faults.is_empty(), "TORTURE_SEED={seed}\n{faults}");
}

fn report(outcome: &Outcome) -> String {
    let tally = &outcome.tally;
    let mib = |bytes: u64| bytes >> 20;
    let mut text = format!(
        "{}: {} reads of {} MiB judged; {} MiB from the cache\n  \
         right at once {}, by a later look {}, excused by a mutation {}, \
         unjudged {}, FUSE's own {}; findings {}\n",
        outcome.title,
        tally.reads,
        mib(tally.bytes),
        mib(tally.cache_bytes),
        tally.right,
        tally.right_later,
        outcome.excused,
        tally.unjudged,
        tally.fuse_alone,
        outcome.findings.len(),
    );
    let _ = writeln!(
        text,
        "  from the cache by kind: {:?}",
        tally.cache_bytes_by_kind
    );
    let _ = writeln!(
        text,
        "  from the cache by clip: {:?}",
        tally.cache_bytes_by_clip
    );
    let _ = writeln!(
        text,
        "  through FUSE by reason: {:?}",
        tally.fuse_bytes_by_reason
    );
    let _ = writeln!(
        text,
        "  opens {}, refused: {:?}",
        tally.opens, tally.refused_opens
    );
    let _ = writeln!(text, "  errors: {:?}", tally.errors);
    let _ = writeln!(text, "  mutations: {:?}", outcome.mutations);
    let _ = write!(text, "  failed: {:?}", outcome.failed);
    text
}

fn check(outcome: &Outcome, faults: &mut String) {
    for finding in &outcome.findings {
        let _ = writeln!(faults, "{finding}");
    }
    let mut require = |holds: bool, what: String| {
        if !holds {
            let _ = writeln!(faults, "{}: {what}", outcome.title);
        }
    };
    let tally = &outcome.tally;
    require(tally.reads > 0, "nothing was read".into());
    let read = tally.cache_bytes + tally.fuse_bytes_by_reason.values().sum::<u64>();
    let share = 100 * tally.cache_bytes / read.max(1);
    let least = if outcome.read_only {
        require(
            outcome.bypasses,
            "a quiet, cached clip was not bypassed".into(),
        );
        LEAST_SHARE_READ_ONLY
    } else if outcome.bypasses {
        LEAST_SHARE_WRITABLE
    } else {
        0
    };
    require(
        share >= least,
        format!("{share} % came from the cache, {least} must"),
    );
    for kind in arena::expected(outcome.read_only) {
        let count = outcome.mutations.get(kind).copied().unwrap_or_default();
        require(count > 0, format!("no {kind}"));
    }
}

/// What a process of readers is; by itself, the readers on a folder of files.
#[test]
fn readers() {
    if let Ok(task) = std::env::var(processes::TASK) {
        processes::be_readers(serde_json::from_str(&task).unwrap());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let clip = told::Clip {
        name: "clip".into(),
        file: 1,
        dozes: false,
    };
    let stamp = cells::Stamp {
        version: 1,
        file: 1,
    };
    std::fs::write(
        folder.path().join("clip"),
        cells::content(stamp, 0, 300_000),
    )
    .unwrap();
    let (send, told) = std::sync::mpsc::channel();
    let task = told::Task {
        folder: folder.path().into(),
        clips: vec![clip],
        groups: Vec::new(),
        seed: 1,
        threads: 2,
        writable: false,
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (task, stop) = (&task, &stop);
        scope.spawn(move || reader::run(task, stop, &send));
        std::thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::Relaxed);
    });
    let tally = told.iter().find_map(|one| match one {
        told::Told::Done(tally) => Some(tally),
        told::Told::Suspect(suspect) => panic!("{suspect:?}"),
        told::Told::Doing(..) => None,
    });
    let tally = tally.expect("readers must tell what they did");
    assert!(tally.reads > 0 && tally.right == tally.reads, "{tally:?}");
}
