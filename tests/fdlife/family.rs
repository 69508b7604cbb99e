//! All workers and what comes of them, as the harness sees them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::calls;
use crate::common::{program, stderr};
use crate::control::{Control, FREE, PARKED, RESERVED, WORKERS};
use crate::kinds::ALL;
use crate::ops::{CLIPS, Place};
use crate::random::Random;
use crate::setting;
use crate::truth::{self, Difference};
use crate::worker::{TASK, Task};

/// How often to look whether all are where they are to be.
const INTERVAL: Duration = Duration::from_micros(500);
/// A reservation of one who has died is given up after this.
const ABANDONED: Duration = Duration::from_secs(1);

/// A deadline, on this machine: TEST_PATIENCE is 20, the seconds that anything
/// may take, where it is as fast as most.
pub fn pace(natively: Duration) -> Duration {
    natively * setting("TEST_PATIENCE", 20u32) / 20
}

/// What `dump-map` says now.
pub fn dump(pin_dir: &Path) -> Value {
    let mut command = program();
    command
        .args(["dump-map", "--format", "json", "--pin-dir"])
        .arg(pin_dir);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

pub struct Family {
    pub control: &'static Control,
    /// Of the workers' first processes, which are also their process groups.
    pub sessions: Vec<i32>,
    folder: TempDir,
    mount: PathBuf,
    workers: u32,
    threads: u32,
    random: Random,
    /// Whose calls are of interest.
    noted: Mutex<BTreeSet<i32>>,
}

impl Family {
    pub fn new(mount: &Path, names: &[&str], weights: &[u32], seed: u64) -> Self {
        // Whoever loses its parent is reaped here.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let folder = tempfile::Builder::new()
            .prefix("vmafx-fdlife-")
            .tempdir()
            .unwrap();
        let path = folder.path().join("control");
        let file = File::create(&path).unwrap();
        file.set_len(size_of::<Control>() as u64).unwrap();
        let control = calls::map(&path);
        control.harness.store(std::process::id() as i32, SeqCst);
        control.clips.store(names.len() as u32, SeqCst);
        for (index, name) in names.iter().enumerate() {
            control.set_path(index, mount.join(name).as_os_str().as_bytes());
            control.set_path(CLIPS + index, name.as_bytes());
        }
        let set = |place: Place, path: &Path| {
            control.set_path(place.index(), path.as_os_str().as_bytes());
        };
        let [file, missing, link] = crate::scratch(folder.path(), mount);
        set(Place::Mount, mount);
        set(Place::Nested, &mount.join("a/b"));
        set(Place::Scratch, &file);
        set(Place::Null, Path::new("/dev/null"));
        set(Place::Missing, &missing);
        set(Place::Link, &link);
        set(Place::Program, &std::env::current_exe().unwrap());
        set(Place::Short, Path::new("/bin/true"));
        set(Place::Control, &path);
        for ((to, weight), (kind, ..)) in control.weights.iter().zip(weights).zip(ALL) {
            let weight = if kind.is_there() { *weight } else { 0 };
            to.store(weight, SeqCst);
            control.total.fetch_add(weight, SeqCst);
        }
        assert!(
            control.total.load(SeqCst) > 0,
            "this kernel has none of these kinds"
        );
        Self {
            control,
            sessions: Vec::new(),
            folder,
            mount: mount.into(),
            workers: setting("FDLIFE_WORKERS", 4).min(WORKERS as u32),
            threads: setting("FDLIFE_THREADS", 3),
            random: Random::new(seed),
            noted: Mutex::default(),
        }
    }

    /// Starts the workers that are not there: at first, or any more.
    pub fn begin(&mut self) {
        for worker in 0..self.workers {
            let of_worker = |slot: &&crate::control::Slot| slot.worker.load(SeqCst) == worker;
            let mut slots = self.control.slots.iter().filter(of_worker);
            if slots.all(|slot| slot.state.load(SeqCst) == FREE) {
                self.start(worker);
            }
        }
    }

    fn start(&mut self, worker: u32) {
        let own = std::process::id() as i32;
        let slot = self.control.reserve(worker, 1, own, own).expect("a slot");
        let path = self.folder.path().join("control");
        let task = Task {
            control: &path,
            slot,
            worker,
            seed: self.random.next(),
            threads: self.threads,
            life: u64::MAX,
        };
        let mut text = String::new();
        task.write(&mut text).unwrap();
        // Reaped by its process group, as all that it leaves.
        #[expect(clippy::zombie_processes)]
        let child = Command::new(std::env::current_exe().unwrap())
            .env_clear()
            .env(TASK, text)
            .current_dir(&self.mount)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.sessions.push(child.id() as i32);
    }

    /// Lets all work until so many calls were made.
    pub fn run_until(&self, calls: u64, end: Instant) -> Result<(), String> {
        let begin = Instant::now();
        while self.control.calls.load(SeqCst) < calls && Instant::now() < end {
            if begin.elapsed() > pace(Duration::from_secs(60)) {
                return Err(self.hang("nothing moves"));
            }
            if begin.elapsed().as_millis().is_multiple_of(100) {
                self.reap();
                self.control.reclaim(|_| true);
            }
            if self.live() == 0 {
                // All have died at once: the next checkpoint is now.
                return Ok(());
            }
            sleep(INTERVAL);
        }
        Ok(())
    }

    fn live(&self) -> usize {
        let live = |slot: &&crate::control::Slot| slot.state.load(SeqCst) != FREE;
        self.control.slots.iter().filter(live).count()
    }

    /// Whether nobody is at a call, and nobody is about to come.
    fn is_at_rest(&self) -> bool {
        // Until then the dead look alive.
        self.reap();
        self.control.reclaim(|_| true);
        let reserved = self.control.reserved.load(SeqCst);
        let at_rest = || {
            let rests =
                |slot: &crate::control::Slot| matches!(slot.state.load(SeqCst), FREE | PARKED);
            self.control.slots.iter().all(rests)
        };
        at_rest() && at_rest() && self.control.reserved.load(SeqCst) == reserved
    }

    /// Has all park, and waits for it.
    pub fn park(&self) -> Result<(), String> {
        self.control.epoch.fetch_add(1, SeqCst);
        self.wait("not all park", || self.is_at_rest())
    }

    pub fn resume(&self) {
        self.control.epoch.fetch_add(1, SeqCst);
        calls::futex_wake(&self.control.epoch);
    }

    /// Has all end, and waits for it.
    pub fn stop(&mut self) -> Result<(), String> {
        self.control.stop.store(1, SeqCst);
        self.wait("not all end", || {
            self.reap();
            self.control.reclaim(|_| true);
            self.live() == 0 && truth::family(&self.sessions).is_empty()
        })
    }

    fn wait(&self, what: &str, is_so: impl Fn() -> bool) -> Result<(), String> {
        let begin = Instant::now();
        while !is_so() {
            if begin.elapsed() > ABANDONED {
                self.abandon();
            }
            if begin.elapsed() > pace(Duration::from_secs(20)) {
                return Err(self.hang(what));
            }
            sleep(INTERVAL);
        }
        Ok(())
    }

    /// Frees what was reserved by those who died before they made use of it.
    fn abandon(&self) {
        for slot in &self.control.slots {
            let (tgid, tid) = (slot.tgid.load(SeqCst), slot.tid.load(SeqCst));
            if slot.state.load(SeqCst) == RESERVED && !calls::is_alive(tgid, tid) {
                // Lost where it comes at last: then it is there.
                let _ = slot.state.compare_exchange(RESERVED, FREE, SeqCst, SeqCst);
            }
        }
    }

    fn reap(&self) {
        for session in &self.sessions {
            let ended = || waitpid(Pid::from_raw(-session), Some(WaitPidFlag::WNOHANG));
            while ended().is_ok_and(|status| status != WaitStatus::StillAlive) {}
        }
    }

    fn hang(&self, what: &str) -> String {
        let mut text = format!("{what}:\n");
        for slot in &self.control.slots {
            let state = slot.state.load(SeqCst);
            if matches!(state, FREE | PARKED) {
                continue;
            }
            let (tgid, tid) = (slot.tgid.load(SeqCst), slot.tid.load(SeqCst));
            self.noted.lock().unwrap().insert(tgid);
            let read = |name| fs::read_to_string(format!("/proc/{tgid}/task/{tid}/{name}"));
            let _ = writeln!(
                text,
                "  state {state} pid {tgid} tid {tid} in {:?}, {:?}",
                read("wchan").unwrap_or_default(),
                read("syscall").unwrap_or_default(),
            );
        }
        text
    }

    pub fn note(&self, differences: &[Difference]) {
        let pids = differences.iter().map(|((pid, _), ..)| *pid as i32);
        self.noted.lock().unwrap().extend(pids);
    }

    /// Writes the last calls of those noted, and of their workers; where to.
    pub fn write_records(&self) -> PathBuf {
        let noted = self.noted.lock().unwrap();
        let mut text = String::new();
        for (index, worker) in self.control.workers.iter().enumerate() {
            let mut records: Vec<_> = worker
                .records
                .iter()
                .map(|record| (record.number.load(SeqCst), record))
                .filter(|(number, _)| *number > 0)
                .collect();
            records.sort_by_key(|(number, _)| *number);
            for (number, record) in records {
                let (tgid, tid) = (record.tgid.load(SeqCst), record.tid.load(SeqCst));
                let mark = if noted.contains(&tgid) || noted.contains(&tid) {
                    '*'
                } else {
                    ' '
                };
                let (_, name, _) = ALL[record.kind.load(SeqCst) as usize];
                let [a, b] = record.args.each_ref().map(|arg| arg.load(SeqCst));
                let ret = record.ret.load(SeqCst);
                let _ = writeln!(
                    text,
                    "{mark} {index}:{number} {tgid}/{tid} {name}({a}, {b}) = {ret}"
                );
            }
        }
        let name = format!("fdlife-{}.txt", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        // All are gone, unless the test failed.
        for session in &self.sessions {
            let _ = killpg(Pid::from_raw(*session), Signal::SIGKILL);
        }
        for pid in truth::family(&self.sessions) {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        self.control.stop.store(1, SeqCst);
        self.reap();
    }
}
