//! One mount under torture: its rclone, its mutators, its readers.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use vmafx_bypass::BypassFile;
use vmafx_bypass::rig::{Rig, RigOptions};

use crate::journal::{Effects, Journal};
use crate::mutate::World;
use crate::random::Random;
use crate::reader::{Clip, Suspect, Tally, Task, Told};

/// Processes of readers for each mount, and threads in each.
const PROCESSES: u64 = 2;
const THREADS: u64 = 3;
/// How long readers may take to end, or to say anything.
const PATIENCE: Duration = Duration::from_secs(25);
/// Clips live in a folder, which is not there while nothing is mounted: what is
/// written then must not land below the mount.
const FOLDER: &str = "clips";
/// The variable by which a process of readers gets its task.
pub const TASK: &str = "TORTURE_TASK";

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

fn clips(prefix: &str, files: std::ops::Range<u16>) -> Vec<Clip> {
    let name = |file| format!("{prefix}{file}");
    files
        .map(|file| Clip {
            name: name(file),
            file,
        })
        .collect()
}

/// Tortures one mount for a while.
pub fn torture(variant: &Variant, lasts: Duration, seed: u64) -> Outcome {
    let folder = tempfile::Builder::new()
        .prefix("vmafx-torture-")
        .tempdir()
        .unwrap();
    let origin = folder.path().join("origin");
    let staging = folder.path().join("staging");
    fs::create_dir(&origin).unwrap();
    fs::create_dir(&staging).unwrap();
    let mut arguments: Vec<String> = [
        "--dir-cache-time=400ms",
        "--attr-timeout=100ms",
        "--poll-interval=0",
        "--vfs-cache-max-age=5s",
        "--vfs-cache-max-size=9M",
        "--vfs-cache-poll-interval=1s",
        "--vfs-read-chunk-size=128k",
        "--buffer-size=0",
    ]
    .map(str::to_owned)
    .into();
    arguments.extend(variant.arguments.iter().map(|&a| a.to_owned()));
    if knows(&variant.rclone, "--vfs-handle-caching") {
        arguments.push("--vfs-handle-caching=200ms".into());
    }
    let (quiet, swapped) = (clips("quiet", 1..4), clips("swapped", 4..8));
    let (written, both) = (clips("written", 8..12), clips("both", 12..13));
    let spare = Clip {
        name: "spare".into(),
        file: 13,
    };
    let all: Vec<Clip> = [&quiet[..], &swapped, &written, &both].concat();
    let options = RigOptions {
        rclone: variant.rclone.clone(),
        remote: (!variant.http).then(|| origin.to_str().unwrap().to_owned()),
        mount_arguments: arguments,
        read_only: variant.read_only,
    };
    let mut random = Random::new(seed);
    let journal = Journal::default();
    let mut fill = |source: &Path| {
        fs::create_dir(source.join(FOLDER))?;
        for clip in &all {
            let size = random.between(200_000, 1_500_000) as usize;
            let bytes = crate::cells::content(journal.stamp(clip.file), 0, size);
            fs::write(source.join(FOLDER).join(&clip.name), bytes)?;
        }
        Ok(())
    };
    let mut rig = if variant.http {
        Rig::start(options, fill)
    } else {
        Rig::start(options, |_| fill(&origin))
    }
    .expect("rclone must mount");
    let world = World {
        source: if variant.http { rig.source() } else { origin }.join(FOLDER),
        staging,
        folder: rig.mountpoint().join(FOLDER),
        journal,
        stop: AtomicBool::new(false),
    };
    rig.cache_whole(&Path::new(FOLDER).join(&quiet[0].name))
        .unwrap();
    let bypasses = BypassFile::open(world.folder.join(&quiet[0].name))
        .unwrap()
        .refusal()
        .is_none();
    let readers: Vec<Readers> = (0..PROCESSES)
        .map(|process| {
            Readers::start(&Task {
                folder: world.folder.clone(),
                clips: all.clone(),
                seed: seed ^ (process + 1) << 16,
                milliseconds: lasts.as_millis() as u64,
                threads: THREADS,
                writable: !variant.read_only,
            })
        })
        .collect();
    let title = variant.title();
    let (mut tally, mut excused, mut findings) = (Tally::default(), 0, Vec::new());
    thread::scope(|scope| {
        let world = &world;
        // On a read-only mount nobody writes: all but the quiet are swapped.
        let remote = if variant.read_only {
            [&swapped[..], &written, &both].concat()
        } else {
            [&swapped[..], &both].concat()
        };
        scope.spawn(move || world.change_remote(&remote, seed ^ 0xa));
        if !variant.read_only {
            let by_mount = [&written[..], &both].concat();
            let spare = &spare;
            scope.spawn(move || world.change_by_mount(&by_mount, spare, seed ^ 0xb));
        }
        let keeper = scope.spawn(|| keep(&mut rig, world, &quiet, lasts));
        let deadline = Instant::now() + lasts + PATIENCE;
        let title = title.as_str();
        let following: Vec<_> = readers
            .into_iter()
            .map(|readers| scope.spawn(move || readers.follow(world, title, deadline)))
            .collect();
        for readers in following {
            let (done, by_mutation, found) = readers.join().unwrap();
            tally.add(done);
            excused += by_mutation;
            findings.extend(found);
        }
        world.stop.store(true, Ordering::Relaxed);
        keeper.join().unwrap();
    });
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

fn knows(rclone: &Path, option: &str) -> bool {
    let help = Command::new(rclone).args(["mount", "--help"]).output();
    let help = help.expect("rclone must run").stdout;
    String::from_utf8_lossy(&help).contains(option)
}

/// Kills and restarts rclone, remounts in good order, and counts evictions.
fn keep(rig: &mut Rig, world: &World, quiet: &[Clip], lasts: Duration) {
    // Thrice in a short run, and every ten seconds in a long one.
    let every = (lasts / 4).min(Duration::from_secs(10));
    let mut next = Instant::now() + every;
    let mut inodes: HashMap<String, u64> = HashMap::new();
    let mut graceful = false;
    while !world.stopped() {
        count_evictions(rig, world, quiet, &mut inodes);
        world.pause(100);
        if world.stopped() || Instant::now() < next {
            continue;
        }
        let kind = if graceful {
            "graceful remount"
        } else {
            "kill and restart"
        };
        graceful = !graceful;
        let stamp = world.journal.stamp(0);
        world
            .journal
            .record("*", kind, stamp, Effects::default(), String::new(), || {
                if kind == "kill and restart" {
                    rig.kill_daemon();
                }
                rig.unmount();
                rig.mount()
            })
            .expect("rclone must mount again");
        next = Instant::now() + every;
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

/// A process of readers.
struct Readers {
    child: Child,
    told: Receiver<Told>,
}

impl Readers {
    fn start(task: &Task) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "readers", "--nocapture", "--test-threads=1"])
            .env(TASK, serde_json::to_string(task).unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (send, told) = channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                // Other lines are the test harness's.
                if let Ok(one) = serde_json::from_str(&line)
                    && send.send(one).is_err()
                {
                    break;
                }
            }
        });
        Self { child, told }
    }

    /// Takes what it tells until it ends: what it did, how many suspects the
    /// journal excuses, and the findings.
    fn follow(self, world: &World, title: &str, deadline: Instant) -> (Tally, u64, Vec<String>) {
        let mut doing: BTreeMap<u64, String> = BTreeMap::new();
        let (mut excused, mut findings) = (0, Vec::new());
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = match self.told.recv_timeout(left) {
                Ok(Told::Doing(thread, what)) => {
                    doing.insert(thread, what);
                    continue;
                }
                Ok(Told::Suspect(suspect)) => {
                    if world.journal.excuses(&suspect) {
                        excused += 1;
                    } else {
                        findings.push(describe(title, &suspect, world));
                    }
                    continue;
                }
                Ok(Told::Done(tally)) => return (*tally, excused, findings),
                Err(RecvTimeoutError::Timeout) => "hang",
                Err(RecvTimeoutError::Disconnected) => "died",
            };
            findings.push(format!("{title}: readers {ended}: {doing:?}"));
            return (Tally::default(), excused, findings);
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn describe(title: &str, suspect: &Suspect, world: &World) -> String {
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
            wrong.stamp,
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

/// As a process of readers: does the task, tells it on standard output, and
/// ends itself where nothing moves any more.
pub fn be_readers(task: &Task) {
    let (send, told) = channel();
    let lasts = Duration::from_millis(task.milliseconds);
    let deadline = Instant::now() + lasts + PATIENCE;
    // What hangs in the kernel cannot be joined: it ends with the process.
    let task = task.clone();
    thread::spawn(move || crate::reader::run(&task, &send));
    // The harness has begun a line.
    println!();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(one) = told.recv_timeout(left) else {
            std::process::exit(1);
        };
        let mut out = std::io::stdout().lock();
        let line = serde_json::to_string(&one).unwrap();
        // The one who reads it has gone: nothing is left to do.
        if writeln!(out, "{line}").is_err() || matches!(one, Told::Done(_)) {
            return;
        }
    }
}
