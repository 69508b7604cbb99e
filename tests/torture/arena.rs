//! One mount under torture: its rclone, its mutators, its readers.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmafx_bypass::BypassFile;
use vmafx_bypass::rig::{Rig, RigOptions};

use crate::cells::content;
use crate::journal::{Effects, Journal};
use crate::mutate::{MOUNT_KINDS, REMOTE_KINDS, World, seconds};
use crate::processes::{PATIENCE, Readers, Watchdog};
use crate::random::Random;
use crate::told::{Clip, Suspect, Tally, Task};

/// Processes of readers for each mount, and threads in each.
const PROCESSES: u64 = 2;
const THREADS: u64 = 3;
/// How much longer than asked for it goes on where a kind of mutation has not
/// happened yet: on a busy machine.
const EXTENSION: Duration = Duration::from_secs(60);
const KILL: &str = "kill and restart";
const REMOUNT: &str = "graceful remount";
/// Clips live in a folder, which is not there while nothing is mounted: what is
/// written then must not land below the mount.
const FOLDER: &str = "clips";

/// Everything is noticed, dropped and fetched soon, and in small pieces.
const ARGUMENTS: [&str; 8] = [
    "--dir-cache-time=400ms",
    "--attr-timeout=100ms",
    "--poll-interval=0",
    "--vfs-cache-max-age=6s",
    "--vfs-cache-max-size=9M",
    "--vfs-cache-poll-interval=1s",
    "--vfs-read-chunk-size=128k",
    "--buffer-size=0",
];

/// What kind of mount.
#[derive(Debug, Clone)]
pub struct Variant {
    pub name: &'static str,
    pub rclone: PathBuf,
    pub read_only: bool,
    /// Over HTTP, from `rclone serve`; else a folder.
    pub http: bool,
    pub arguments: &'static [&'static str],
}

impl Variant {
    pub fn title(&self) -> String {
        format!("{} {}", self.rclone.display(), self.name)
    }
}

/// What came of it.
pub struct Outcome {
    pub title: String,
    pub read_only: bool,
    /// Whether a quiet, cached clip was bypassed before it began.
    pub bypasses: bool,
    pub tally: Tally,
    pub mutations: BTreeMap<&'static str, u64>,
    /// Mutations that failed, and how.
    pub failed: BTreeMap<String, u64>,
    /// Suspects that the journal excuses.
    pub excused: u64,
    /// What is wrong, complete.
    pub findings: Vec<String>,
}

/// The clips of a mount, by what happens to them.
struct Cast {
    /// Evicted, and nothing else; the first one dozes.
    quiet: Vec<Clip>,
    /// Changed at the remote.
    swapped: Vec<Clip>,
    /// Changed through the mount, where it is writable.
    written: Vec<Clip>,
    both: Vec<Clip>,
    /// Renamed over others.
    spare: Clip,
}

impl Cast {
    fn new() -> Self {
        let clip = |prefix: &str, file| Clip {
            name: format!("{prefix}{file}"),
            file,
            dozes: file == 1,
        };
        let clips = |prefix, files: Range<u16>| files.map(|file| clip(prefix, file)).collect();
        Self {
            quiet: clips("quiet", 1..4),
            swapped: clips("swapped", 4..6),
            written: clips("written", 6..8),
            both: clips("both", 8..9),
            spare: clip("spare", 9),
        }
    }

    /// Those that are changed: at the remote, and through the mount.
    fn groups(&self, read_only: bool) -> Vec<Vec<Clip>> {
        let (swapped, written, both) = (&self.swapped[..], &self.written[..], &self.both[..]);
        if read_only {
            vec![[swapped, written, both].concat()]
        } else {
            vec![[swapped, both].concat(), [written, both].concat()]
        }
    }

    /// All that readers read.
    fn all(&self) -> Vec<Clip> {
        [&self.quiet[..], &self.swapped, &self.written, &self.both].concat()
    }
}

/// Fills a remote below `folder` and mounts it.
fn mount(variant: &Variant, cast: &Cast, folder: &Path, seed: u64) -> (Rig, World) {
    let origin = folder.join("origin");
    let staging = folder.join("staging");
    fs::create_dir(&origin).unwrap();
    fs::create_dir(&staging).unwrap();
    let mut arguments: Vec<&str> = ARGUMENTS.into();
    arguments.extend(variant.arguments);
    if knows(&variant.rclone, "--vfs-handle-caching") {
        arguments.push("--vfs-handle-caching=200ms");
    }
    let options = RigOptions {
        rclone: variant.rclone.clone(),
        remote: (!variant.http).then(|| origin.to_str().unwrap().to_owned()),
        mount_arguments: arguments.into_iter().map(str::to_owned).collect(),
        read_only: variant.read_only,
        ..RigOptions::default()
    };
    let mut random = Random::new(seed);
    let journal = Journal::default();
    let mut fill = |source: &Path| {
        fs::create_dir(source.join(FOLDER))?;
        for clip in cast.all() {
            let size = random.between(200_000, 1_500_000);
            let path = source.join(FOLDER).join(&clip.name);
            let stamp = journal.stamp(clip.file);
            fs::write(&path, content(stamp, 0, size as usize))?;
            let effects = Effects {
                fingerprint: Some((size, seconds(fs::metadata(&path)?.modified()?))),
                ..Effects::default()
            };
            let detail = format!("{size} bytes");
            journal.record(&clip.name, "put", stamp, effects, detail, || Ok(()))?;
        }
        Ok(())
    };
    let rig = if variant.http {
        Rig::start(options, fill)
    } else {
        Rig::start(options, |_| fill(&origin))
    }
    .expect("rclone must mount");
    let source = if variant.http { rig.source() } else { origin };
    let world = World {
        source: source.join(FOLDER),
        staging,
        folder: rig.mountpoint().join(FOLDER),
        journal,
        stop: AtomicBool::new(false),
    };
    (rig, world)
}

/// Tortures one mount for a while.
pub fn torture(variant: &Variant, lasts: Duration, seed: u64) -> Outcome {
    let watchdog = Watchdog::start(variant.title(), lasts + EXTENSION + 3 * PATIENCE);
    let folder = tempfile::Builder::new()
        .prefix("vmafx-torture-")
        .tempdir()
        .unwrap();
    let cast = Cast::new();
    let (mut rig, world) = mount(variant, &cast, folder.path(), seed);
    watch(&watchdog.daemon, &rig);
    let steady = &cast.quiet[1].name;
    rig.cache_whole(&Path::new(FOLDER).join(steady)).unwrap();
    let file = BypassFile::open(world.folder.join(steady)).unwrap();
    let bypasses = file.refusal().is_none();
    drop(file);
    let groups = cast.groups(variant.read_only);
    let mut readers: Vec<Readers> = (0..PROCESSES)
        .map(|process| {
            Readers::start(&Task {
                folder: world.folder.clone(),
                clips: cast.all(),
                groups: groups.clone(),
                seed: seed ^ (process + 1) << 16,
                threads: THREADS,
                writable: !variant.read_only,
            })
        })
        .collect();
    let title = variant.title();
    let (mut tally, mut excused, mut findings) = (Tally::default(), 0, Vec::new());
    thread::scope(|scope| {
        let world = &world;
        let (groups, spare) = (&groups, &cast.spare);
        scope.spawn(move || world.change_remote(&groups[0], seed ^ 0xa));
        if let Some(by_mount) = groups.get(1) {
            scope.spawn(move || world.change_by_mount(by_mount, spare, seed ^ 0xb));
        }
        let daemon = &*watchdog.daemon;
        let keeper = scope.spawn(|| keep(&mut rig, world, daemon, &cast.quiet, lasts));
        let title = title.as_str();
        // They read until these are closed.
        let inputs: Vec<_> = readers.iter_mut().map(|r| r.child.stdin.take()).collect();
        let following: Vec<_> = readers
            .into_iter()
            .map(|readers| scope.spawn(move || readers.follow(world, title)))
            .collect();
        let begin = Instant::now();
        let complete = || {
            let counts = world.journal.counts();
            expected(variant.read_only).all(|kind| counts.contains_key(kind))
        };
        while begin.elapsed() < lasts || !complete() && begin.elapsed() < lasts + EXTENSION {
            thread::sleep(Duration::from_millis(100));
        }
        drop(inputs);
        for readers in following {
            let (done, by_mutation, found) = readers.join().unwrap();
            tally.add(done);
            excused += by_mutation;
            findings.extend(found);
        }
        world.stop.store(true, Ordering::Relaxed);
        keeper.join().unwrap();
    });
    findings.extend(watchdog.told.try_iter());
    Outcome {
        title,
        read_only: variant.read_only,
        bypasses,
        tally,
        mutations: world.journal.counts(),
        failed: world.journal.failures(),
        excused,
        findings,
    }
}

/// What must have happened to a mount at least once.
pub fn expected(read_only: bool) -> impl Iterator<Item = &'static str> {
    let by_mount: &[&str] = if read_only { &[] } else { &MOUNT_KINDS };
    let always = ["eviction", KILL, REMOUNT];
    let kinds = always.iter().chain(&REMOTE_KINDS).chain(by_mount);
    kinds.copied().collect::<Vec<_>>().into_iter()
}

fn knows(rclone: &Path, option: &str) -> bool {
    let help = Command::new(rclone).args(["mount", "--help"]).output();
    let help = help.expect("rclone must run").stdout;
    String::from_utf8_lossy(&help).contains(option)
}

/// Tells the watchdog which daemon is the arena's at the moment.
fn watch(daemon: &AtomicU32, rig: &Rig) {
    daemon.store(rig.daemon().unwrap_or_default(), Ordering::Relaxed);
}

/// Kills and restarts rclone, remounts in good order, and counts evictions.
fn keep(rig: &mut Rig, world: &World, daemon: &AtomicU32, quiet: &[Clip], lasts: Duration) {
    // Thrice in a short run, and every ten seconds in a long one.
    let every = (lasts / 4).min(Duration::from_secs(10));
    let mut next = Instant::now() + every;
    let mut inodes: HashMap<String, u64> = HashMap::new();
    let (mut graceful, mut failures) = (false, 0);
    while !world.stopped() {
        count_evictions(rig, world, quiet, &mut inodes);
        world.pause(100);
        if world.stopped() || Instant::now() < next {
            continue;
        }
        let kind = if graceful { REMOUNT } else { KILL };
        let stamp = world.journal.stamp(0);
        let done =
            world
                .journal
                .record("*", kind, stamp, Effects::default(), String::new(), || {
                    if kind == KILL {
                        rig.kill_daemon();
                    }
                    rig.unmount();
                    let mounted = rig.mount();
                    watch(daemon, rig);
                    mounted
                });
        match done {
            Ok(()) => {
                graceful = !graceful;
                failures = 0;
                next = Instant::now() + every;
            }
            Err(e) => {
                failures += 1;
                // 1.60.1 does not start on a cache with a clip that was extended
                // and not uploaded, over a shorter one at the remote: it tries
                // for ever to fetch what is beyond its end.
                rig.unmount();
                for part in ["vfs", "vfsMeta"] {
                    // Not there where it failed before.
                    let _ = fs::remove_dir_all(rig.cache().join(part));
                }
                assert!(failures < 5, "rclone must mount again: {e}");
                // Some changes that it had not uploaded it never gets over: it
                // tries again and again before it mounts.
                if failures == 2 {
                    rig.unmount();
                    for tree in ["vfs", "vfsMeta"] {
                        // There may be none yet.
                        let _ = fs::remove_dir_all(rig.cache().join(tree));
                    }
                    world.journal.count("cache emptied for rclone to start");
                }
            }
        }
    }
}

/// Clips that nobody changes lose their cache file by eviction alone.
fn count_evictions(rig: &Rig, world: &World, quiet: &[Clip], inodes: &mut HashMap<String, u64>) {
    let found = inodes_below(&rig.cache().join("vfs"));
    for clip in quiet {
        let inode = found.get(&clip.name).copied();
        if inodes
            .get(&clip.name)
            .is_some_and(|old| Some(*old) != inode)
        {
            world.journal.count("eviction");
        }
        match inode {
            Some(inode) => inodes.insert(clip.name.clone(), inode),
            None => inodes.remove(&clip.name),
        };
    }
}

/// Names and inodes of the files in the cache; what vanishes is left out.
fn inodes_below(folder: &Path) -> HashMap<String, u64> {
    let mut found = HashMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(inodes_below(&entry.path()));
        } else if let Ok(metadata) = entry.metadata() {
            let name = entry.file_name().to_string_lossy().into_owned();
            found.insert(name, metadata.ino());
        }
    }
    found
}

pub fn describe(title: &str, suspect: &Suspect, world: &World) -> String {
    let ms = |at: u64| (at as f64 - suspect.read[0] as f64) / 1e6;
    let mut text = format!(
        "{title}: {} at {} +{}: FUSE does not account for what {:?} read\n  \
         reader's seed {:#x}; {} bytes read, {} of the file's from the cache meanwhile; \
         state afterwards: {}\n  FUSE before by {} from {:.1} ms, the read from 0 to {:.1} ms\n",
        suspect.clip,
        suspect.offset,
        suspect.asked,
        suspect.kind.unwrap(),
        suspect.seed,
        suspect.read_bytes,
        suspect.cache_bytes,
        suspect.state,
        suspect.way,
        ms(suspect.before),
        ms(suspect.read[1]),
    );
    for wrong in &suspect.wrong {
        let _ = writeln!(
            text,
            "  {:?} at {} +{}: of {:?}\n    bypass {}\n    before {}\n    after  {}",
            wrong.fault,
            wrong.offset,
            wrong.length,
            wrong
                .stamp
                .or_else(|| world.journal.whose(&suspect.clip, wrong)),
            wrong.hex[0],
            wrong.hex[1],
            wrong.hex[2]
        );
    }
    if suspect.more_wrong > 0 {
        let _ = writeln!(text, "  and {} more runs", suspect.more_wrong);
    }
    let _ = write!(
        text,
        "  mutations, from the read's begin:\n{}",
        world.journal.tail(suspect)
    );
    text
}
