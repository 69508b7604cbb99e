//! However descriptors come and go, the tracker's table is the kernel's at each
//! quiet moment. See docs/TESTING.md.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../torture/random.rs"]
mod random;

mod calls;
mod control;
mod family;
mod kinds;
mod ops;
mod passing;
mod supervised;
mod truth;
mod uring;
mod worker;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use common::{Tracking, content, need_root, put, rig};
use family::{Family, pace};
use kinds::{ALL, Kind};
use ops::CLIPS;
use truth::{Difference, Reader};

/// Clips, in folders; by names of any kind.
const NAMES: [&str; 7] = [
    "clip.y4m",
    "other clip.y4m",
    "a/clip.y4m",
    "a/b/clip.y4m",
    "a/b/c/d/klip \u{e4}\n.y4m",
    "a/clip.y4m (deleted)",
    "z/empty",
];
/// Differences shown of one checkpoint.
const SHOWN: usize = 12;
/// By then /proc and the dump agree; the goal is 100 ms, where nothing else runs.
const QUIET: Duration = Duration::from_secs(2);
const NEVER: Duration = Duration::from_secs(8);

fn setting<T: FromStr>(name: &str, otherwise: T) -> T {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .ok()
            .unwrap_or_else(|| panic!("{name}: a number")),
        Err(_) => otherwise,
    }
}

/// Kinds of operations to make, by FDLIFE_ONLY and FDLIFE_EXCEPT.
fn weights() -> Vec<u32> {
    let names = |name| std::env::var(name).unwrap_or_default();
    let (only, except) = (names("FDLIFE_ONLY"), names("FDLIFE_EXCEPT"));
    let lists = |list: &str, name: &str| list.split(',').any(|one| one == name);
    let all = || ALL.iter().map(|(_, name, _)| *name);
    for one in only
        .split(',')
        .chain(except.split(','))
        .filter(|one| !one.is_empty())
    {
        assert!(
            all().any(|name| name == one),
            "no {one}; there are {:?}",
            all().collect::<Vec<_>>()
        );
    }
    // That mode does not see 32-bit programs, and says so: src/tracker/attach.rs.
    let blind = std::env::var_os("TEST_ATTACH").is_some_and(|mode| mode == "tracepoint");
    let weight = |(kind, name, weight): &(Kind, &str, u32)| {
        let usual = only.is_empty() && !(blind && kind.is_compat());
        let made = (usual || lists(&only, name)) && !lists(&except, name);
        if made { *weight } else { 0 }
    };
    ALL.iter().map(weight).collect()
}

/// How it went.
#[derive(Default)]
struct Course {
    checkpoints: u64,
    /// How long after the last call the table was equal, each time.
    lags: Vec<Duration>,
    descriptors: usize,
    most: usize,
    losses: Value,
}

#[test]
fn the_table_is_the_kernels_at_each_quiet_moment() {
    need_root();
    let seed = setting("FDLIFE_SEED", {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_nanos() as u64 >> 10
    });
    eprintln!("FDLIFE_SEED={seed}");
    let rig = rig(|source| {
        for (index, name) in NAMES.iter().enumerate() {
            let size = if name.ends_with("empty") { 0 } else { 10_000 };
            put(source, name, &content(index as u32, size));
        }
    });
    let mount = rig.mountpoint();
    let tracking = Tracking::start(&mount, &[]);
    let ending = End(tracking.pid());
    let pin_dir = tracking.pin_dir.clone();
    // `run` halts where nobody takes what it tells.
    let (faults, summary) = thread::scope(|scope| {
        let fuzzing = scope.spawn(|| {
            let _ending = ending;
            fuzz(&mount, &pin_dir, seed)
        });
        let summary = last_line(tracking);
        (fuzzing.join().unwrap(), summary)
    });
    assert!(faults.is_none(), "FDLIFE_SEED={seed}: {}", faults.unwrap());
    assert_eq!(summary["event"], "summary");
    assert_eq!(summary["complete"], true, "{summary}");
    assert_eq!(summary["tracked"], 0, "{summary}");
}

/// Ends a `run`.
struct End(u32);

impl Drop for End {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0 as i32);
        // Gone already, where it has failed.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM);
    }
}

/// From the first worker to the end of the last; what is wrong.
fn fuzz(mount: &Path, pin_dir: &Path, seed: u64) -> Option<String> {
    let mut family = Family::new(mount, &NAMES, &weights(), seed);
    let reader = Reader::new(mount);
    let dump = || family::dump(pin_dir);
    let begin = Instant::now();
    let mut course = Course::default();
    let result = run(&mut family, &reader, &dump, &mut course);
    let faults = result.and_then(|()| end(&mut family, &reader, &dump)).err();
    eprintln!("{}", report(&course, begin.elapsed(), &family));
    faults.map(|faults| {
        let records = family.write_records();
        let at = course.checkpoints;
        format!(
            "checkpoint {at}: {faults}the last calls: {}",
            records.display()
        )
    })
}

/// Takes what `run` tells until its end, which is the summary.
fn last_line(mut tracking: Tracking) -> Value {
    let mut last = String::new();
    while let Some(line) = tracking.next_line() {
        last = line;
    }
    serde_json::from_str(&last).expect("a line of JSON")
}

fn run(
    family: &mut Family,
    reader: &Reader,
    dump: &dyn Fn() -> Value,
    course: &mut Course,
) -> Result<(), String> {
    let checkpoints = setting("FDLIFE_CHECKPOINTS", 120u64);
    let calls = setting("FDLIFE_OPS", 40_000u64);
    let until = Instant::now() + Duration::from_secs(setting("FDLIFE_SECONDS", 86_400));
    while course.checkpoints < checkpoints && Instant::now() < until {
        family.begin();
        let next = family.control.calls.load(SeqCst) + calls / checkpoints;
        family.run_until(next, until)?;
        family.park()?;
        let at_rest = Instant::now();
        let lag = agree(family, reader, dump, at_rest, course)?;
        course.lags.push(lag);
        course.checkpoints += 1;
        family.resume();
    }
    let complete = course.checkpoints == checkpoints;
    missing(
        family,
        complete && std::env::var_os("FDLIFE_ONLY").is_none(),
    )
}

/// Kinds that never succeeded, in a run that is long enough for each.
fn missing(family: &Family, complete: bool) -> Result<(), String> {
    const LONG: u64 = 30_000;
    let long = complete && family.control.calls.load(SeqCst) >= LONG;
    let never = |(kind, name, _): &(Kind, &'static str, u32)| {
        let done = family.control.counts[*kind as usize][0].load(SeqCst);
        let wanted = family.control.weights[*kind as usize].load(SeqCst) > 0;
        (long && wanted && !kind.is_optional() && done == 0).then_some(*name)
    };
    let missing: Vec<_> = ALL.iter().filter_map(never).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!("never done: {missing:?}\n"))
}

/// Looks until /proc and the dump agree; how long after `since` they did. Where
/// that is too late, it looks on for a while, to tell late from never.
fn agree(
    family: &Family,
    reader: &Reader,
    dump: &dyn Fn() -> Value,
    since: Instant,
    course: &mut Course,
) -> Result<Duration, String> {
    let mut late: Option<String> = None;
    loop {
        let dumped = dump();
        // As a user has it: with the dump's own time, and what it waits for.
        let lag = since.elapsed();
        let truth = reader.truth(&family.sessions);
        let table = truth::dumped(&dumped);
        let differences: Vec<Difference> = truth.differences(&table);
        let complete = dumped["complete"] == true;
        course.losses = dumped["losses"].clone();
        if differences.is_empty() && complete {
            course.descriptors += truth.descriptors();
            course.most = course.most.max(truth.descriptors());
            return match late {
                Some(late) => Err(format!("equal after {lag:.1?} only, before:\n{late}")),
                None => Ok(lag),
            };
        }
        if lag < pace(QUIET) {
            continue;
        }
        let text = late.get_or_insert_with(|| {
            family.note(&differences);
            format!(
                "{} differences, complete {complete}, losses {}\n{}",
                differences.len(),
                dumped["losses"],
                truth::describe(&differences, SHOWN),
            )
        });
        if lag > pace(NEVER) {
            return Err(text.clone());
        }
    }
}

/// Ends all workers: no entry is left.
fn end(family: &mut Family, reader: &Reader, dump: &dyn Fn() -> Value) -> Result<(), String> {
    family.stop()?;
    let mut course = Course::default();
    agree(family, reader, dump, Instant::now(), &mut course)?;
    match course.most {
        0 => Ok(()),
        left => Err(format!(
            "{left} descriptors are left after the end of all workers\n"
        )),
    }
}

fn report(course: &Course, took: Duration, family: &Family) -> String {
    let calls = family.control.calls.load(SeqCst);
    let mut lags = course.lags.clone();
    lags.sort();
    let at = |percent: usize| lags.get((lags.len() * percent / 100).min(lags.len().max(1) - 1));
    let mut text = format!(
        "{calls} operations, {} checkpoints in {took:.1?}; {} descriptors compared, at most {} at once\n\
         equal after p50 {:.1?}, p99 {:.1?}, at most {:.1?}; losses {}\n",
        course.checkpoints,
        course.descriptors,
        course.most,
        at(50).unwrap_or(&Duration::ZERO),
        at(99).unwrap_or(&Duration::ZERO),
        at(100).unwrap_or(&Duration::ZERO),
        course.losses,
    );
    for ((_, name, _), counts) in ALL.iter().zip(&family.control.counts) {
        let [done, failed] = counts.each_ref().map(|count| count.load(SeqCst));
        if done + failed > 0 {
            let _ = write!(text, "{name} {done}+{failed} ");
        }
    }
    text
}

/// Paths for all workers: clips, and what is none of the mount's.
fn scratch(folder: &Path, mount: &Path) -> [std::path::PathBuf; 3] {
    let paths = ["scratch", "missing", "link"].map(|name| folder.join(name));
    fs::write(&paths[0], "scratch").unwrap();
    std::os::unix::fs::symlink(mount.join(NAMES[2]), &paths[2]).unwrap();
    paths
}

const _: () = assert!(NAMES.len() <= CLIPS);
