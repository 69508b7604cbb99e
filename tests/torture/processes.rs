//! Processes of readers, and what happens to those that hang.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::arena::describe;
use crate::mutate::World;
use crate::told::{Tally, Task, Told};

/// How long readers may take to end, or to say anything.
pub const PATIENCE: Duration = Duration::from_secs(25);
/// The variable by which a process of readers gets its task.
pub const TASK: &str = "TORTURE_TASK";

/// A process of readers.
pub struct Readers {
    pub child: Child,
    told: Receiver<Told>,
}

impl Readers {
    pub fn start(task: &Task) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "readers", "--nocapture", "--test-threads=1"])
            .env(TASK, serde_json::to_string(task).unwrap())
            .stdin(Stdio::piped())
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
    pub fn follow(self, world: &World, title: &str) -> (Tally, u64, Vec<String>) {
        let mut doing: BTreeMap<u64, String> = BTreeMap::new();
        let (mut excused, mut findings) = (0, Vec::new());
        loop {
            let ended = match self.told.recv_timeout(PATIENCE) {
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
            let waits = waits(self.child.id());
            findings.push(format!("{title}: readers {ended}: {doing:?}; in {waits:?}"));
            return (Tally::default(), excused, findings);
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // One that waits in the kernel for a daemon that does not answer ends
        // with the mount, after this.
        for _ in 0..50 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Where in the kernel the threads of a process wait, each place once.
fn waits(pid: u32) -> BTreeSet<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let of = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("wchan")).ok();
    let places = threads.into_iter().flatten().flatten().filter_map(of);
    places.collect()
}

/// As a process of readers: does the task until standard input is closed, tells
/// it on standard output, and ends itself where nothing moves any more.
pub fn be_readers(task: Task) {
    let (send, told) = channel();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    // What hangs in the kernel cannot be joined: it ends with the process.
    thread::spawn(move || crate::reader::run(&task, &stopped, &send));
    thread::spawn(move || {
        // Whatever it returns: nobody wants more.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        stop.store(true, Ordering::Relaxed);
    });
    // The harness has begun a line.
    println!();
    loop {
        // After its parent, which tells what it saw.
        let Ok(one) = told.recv_timeout(2 * PATIENCE) else {
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

/// Kills the daemon of an arena that hangs, which ends whatever waits for it in
/// the kernel; and the whole test where that does not help.
pub struct Watchdog {
    _alive: Sender<()>,
    /// The pid of the daemon at the moment; 0: none.
    pub daemon: Arc<AtomicU32>,
    pub told: Receiver<String>,
}

impl Watchdog {
    pub fn start(title: String, after: Duration) -> Self {
        let (alive, ended) = channel::<()>();
        let (tell, told) = channel();
        let daemon = Arc::new(AtomicU32::new(0));
        let own = daemon.clone();
        thread::spawn(move || {
            let hangs = |after| ended.recv_timeout(after) == Err(RecvTimeoutError::Timeout);
            if !hangs(after) {
                return;
            }
            let pid = own.load(Ordering::Relaxed);
            let waits = [std::process::id(), pid].map(waits);
            let text = format!("{title}: hangs; the test and rclone wait in {waits:?}");
            eprintln!("{text}; killing rclone, pid {pid}");
            // Gone only where the arena has just ended.
            let _ = tell.send(text);
            if pid != 0 {
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
            if hangs(2 * PATIENCE) {
                eprintln!("{title}: still hangs; giving up");
                std::process::exit(101);
            }
        });
        Self {
            _alive: alive,
            daemon,
            told,
        }
    }
}
