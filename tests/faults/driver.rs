//! The process whose system calls are failed: it opens and reads a clip as it
//! is told on standard input, and reports on standard output.
//!
//! It is this test program, started again. A line `@NAME` that it writes tells
//! the tracer which part of its work follows; `@` alone, that none does.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{
    SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction,
};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use nix::unistd::{Pid, gettid};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering};
use vmafx_bypass::{BypassFile, ReadStats};

use crate::watchdog::Watchdog;

/// Names the clip for the driver; unset: nobody started this as one.
const CLIP: &str = "FAULTS_CLIP";
/// Names a file that holds the bytes which the clip must give.
const EXPECTED: &str = "FAULTS_EXPECTED";

/// Large reads are of this size, bytes.
pub const BLOCK: usize = 64 << 10;
/// What is read at first and again, bytes from the start.
pub const HEAD: usize = 3 * BLOCK;
/// Where a further piece of the proof begins.
pub const PIECE: usize = 16 << 20;
/// Just over the time after which a proof is looked at again.
const A_WHILE: Duration = Duration::from_millis(1_100);

/// Does what standard input says, if this process was started as a driver.
pub fn run_if_started_as_one() -> bool {
    let (Some(clip), Some(expected)) = (std::env::var_os(CLIP), std::env::var_os(EXPECTED)) else {
        return false;
    };
    let mut script = Script::new(Path::new(&clip), &std::fs::read(expected).unwrap());
    say(&format!("ready {}", gettid()));
    for line in io::stdin().lock().lines() {
        let line = line.unwrap();
        let (command, argument) = line.split_once(' ').unwrap_or((&line, "0"));
        let report = script.execute(command, argument.parse().unwrap());
        say("@");
        say(&report.to_string());
    }
    true
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// What a driver can do.
pub struct Script {
    clip: PathBuf,
    expected: Vec<u8>,
    prepared: Vec<BypassFile>,
    since: Instant,
    storm: Option<Timer>,
}

/// What was read so far of one file.
#[derive(Default)]
struct Tally {
    bytes: u64,
    wrong_at: Option<u64>,
}

impl Script {
    pub fn new(clip: &Path, expected: &[u8]) -> Self {
        Self {
            clip: clip.into(),
            expected: expected.into(),
            prepared: Vec::new(),
            since: Instant::now(),
            storm: None,
        }
    }

    /// Runs one command; what came of it.
    pub fn execute(&mut self, command: &str, argument: u64) -> Value {
        match command {
            // A file's whole life.
            "whole" => self.life(|path| BypassFile::open(path)),
            "open" => {
                say("@open");
                match BypassFile::open(&self.clip) {
                    Ok(file) => json!({ "refusal": refusal(&file) }),
                    Err(error) => failed(&error),
                }
            }
            // All of it without a word before the report.
            "life" => {
                let mut file = BypassFile::open(&self.clip).unwrap();
                let mut tally = Tally::default();
                let result = self.read_blocks(&file, 0, HEAD, &mut tally);
                let result = result.and_then(|()| self.read_small(&mut file, &mut tally));
                report(&file, &tally, result)
            }
            "fuse" => self.life(|path| BypassFile::open_fuse_only(path)),
            "fd" => {
                let fd = File::open(&self.clip).map(OwnedFd::from);
                self.life(|_| BypassFile::from_fd(fd?))
            }
            // Files whose proofs come of age at once, and then one after another.
            "prepare" => self.prepare(argument),
            "again" => self.again(),
            "reopen" => self.reread(),
            // For how long a proof holds while nobody answers.
            "proven" => self.proven(),
            "nofile" => {
                let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
                setrlimit(Resource::RLIMIT_NOFILE, argument, hard).unwrap();
                json!({})
            }
            "storm" => {
                self.storm = Some(storm(argument == 1));
                json!({})
            }
            "calm" => {
                self.storm = None;
                json!({})
            }
            "signals" => json!({ "signals": SIGNALS.load(Ordering::Relaxed) }),
            other => panic!("no such command: {other}"),
        }
    }

    /// Opens, reads large and small blocks, and closes.
    fn life(&mut self, open: impl FnOnce(&Path) -> io::Result<BypassFile>) -> Value {
        say("@open");
        let mut file = match open(&self.clip) {
            Ok(file) => file,
            Err(error) => return failed(&error),
        };
        let opened_as = refusal(&file);
        say("@read");
        let mut tally = Tally::default();
        let mut result = self.read_blocks(&file, 0, HEAD, &mut tally);
        if result.is_ok() {
            say("@small");
            result = self.read_small(&mut file, &mut tally);
        }
        let mut report = report(&file, &tally, result);
        report["opened_as"] = json!(opened_as);
        say("@drop");
        drop(file);
        report
    }

    /// Opens files, and proves them at their start alone.
    fn prepare(&mut self, count: u64) -> Value {
        let mut refusals = Vec::new();
        for _ in 0..count {
            let file = BypassFile::open(&self.clip).unwrap();
            let mut tally = Tally::default();
            self.read_blocks(&file, 0, BLOCK, &mut tally).unwrap();
            refusals.extend(refusal(&file));
            self.prepared.push(file);
        }
        self.since = Instant::now();
        json!({ "refusals": refusals })
    }

    /// Reads on in a prepared file when its proof is to be looked at again.
    fn again(&mut self) -> Value {
        let report = self.reread();
        self.prepared.pop();
        report
    }

    fn reread(&mut self) -> Value {
        let file = self.prepared.last().expect("a prepared file");
        std::thread::sleep(A_WHILE.saturating_sub(self.since.elapsed()));
        let before = file.stats();
        say("@again");
        let mut tally = Tally::default();
        let mut result = self.read_blocks(file, 0, HEAD, &mut tally);
        if result.is_ok() {
            say("@piece");
            let end = self.expected.len();
            result = self.read_blocks(file, PIECE - BLOCK, end, &mut tally);
        }
        report_since(&before, file, &tally, result)
    }

    /// Opens the last prepared file's proven start for reading at once.
    fn proven(&mut self) -> Value {
        let file = self.prepared.last().expect("a prepared file");
        let before = file.stats();
        let mut tally = Tally::default();
        let result = self.read_blocks(file, 0, HEAD, &mut tally);
        report_since(&before, file, &tally, result)
    }

    fn read_blocks(
        &self,
        file: &BypassFile,
        from: usize,
        to: usize,
        tally: &mut Tally,
    ) -> io::Result<()> {
        let mut block = vec![0; BLOCK];
        let mut at = from;
        while at < to {
            let length = BLOCK.min(to - at);
            let n = file.read_at(&mut block[..length], at as u64)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.compare(&block[..n], at, tally);
            at += n;
        }
        Ok(())
    }

    /// Small reads, which are buffered, and one that is too large for that.
    fn read_small(&self, file: &mut BypassFile, tally: &mut Tally) -> io::Result<()> {
        file.seek(SeekFrom::Start(0))?;
        let mut at = 0;
        let mut block = vec![0; 2 * BLOCK + 1];
        for size in [100, 5_000, 9_999, 2 * BLOCK + 1, 700, 700] {
            let mut done = 0;
            while done < size {
                let n = file.read(&mut block[..size - done])?;
                if n == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.compare(&block[..n], at, tally);
                at += n;
                done += n;
            }
        }
        Ok(())
    }

    fn compare(&self, bytes: &[u8], at: usize, tally: &mut Tally) {
        tally.bytes += bytes.len() as u64;
        let expected = self.expected.get(at..at + bytes.len());
        if tally.wrong_at.is_none() && expected != Some(bytes) {
            tally.wrong_at = Some(at as u64);
        }
    }
}

fn report(file: &BypassFile, tally: &Tally, result: io::Result<()>) -> Value {
    let stats = file.stats();
    json!({
        "bytes": tally.bytes,
        "wrong_at": tally.wrong_at,
        "cache": stats.cache_bytes,
        "fuse": stats.fuse_bytes(),
        "by_reason": stats.by_reason,
        "refusal": refusal(file),
        "error": result.err().map(|e| e.to_string()),
    })
}

/// As [`report`], of what was read after `before`.
fn report_since(
    before: &ReadStats,
    file: &BypassFile,
    tally: &Tally,
    result: io::Result<()>,
) -> Value {
    let mut report = report(file, tally, result);
    let stats = file.stats();
    report["cache"] = json!(stats.cache_bytes - before.cache_bytes);
    report["fuse"] = json!(stats.fuse_bytes() - before.fuse_bytes());
    report
}

/// Signals that have come.
static SIGNALS: AtomicU64 = AtomicU64::new(0);

/// From now on, a thousand times a second, a signal interrupts the system call
/// of this thread, which the kernel makes again or does not.
fn storm(restart: bool) -> Timer {
    extern "C" fn count(_: i32) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }
    let mut flags = SaFlags::empty();
    flags.set(SaFlags::SA_RESTART, restart);
    let action = SigAction::new(SigHandler::Handler(count), flags, SigSet::empty());
    // SAFETY: all that the handler does is to count, atomically.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
    SIGNALS.store(0, Ordering::Relaxed);
    let notify = SigevNotify::SigevThreadId {
        signal: Signal::SIGUSR1,
        thread_id: gettid().as_raw(),
        si_value: 0,
    };
    let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(notify)).unwrap();
    let interval = Expiration::Interval(TimeSpec::from(Duration::from_millis(1)));
    timer.set(interval, TimerSetTimeFlags::empty()).unwrap();
    timer
}

fn refusal(file: &BypassFile) -> Option<String> {
    file.refusal().map(|refusal| refusal.to_string())
}

fn failed(error: &io::Error) -> Value {
    json!({ "open_error": error.to_string() })
}

/// A driver that was started. Killed when dropped, or when it hangs.
pub struct Driver {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub thread: Pid,
    pub watchdog: Watchdog,
}

impl Driver {
    pub fn start(clip: &Path, expected: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_driver_runs_its_script", "--nocapture"])
            .args(["--test-threads=1", "--quiet"])
            .env(CLIP, clip)
            .env(EXPECTED, expected)
            .env_remove("VMAFX_EBPF_BYPASS")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut driver = Self {
            watchdog: Watchdog::new(child.id()),
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
            thread: Pid::from_raw(0),
        };
        let ready = driver.line("ready ");
        driver.thread = Pid::from_raw(ready["ready ".len()..].trim().parse().unwrap());
        driver
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it what to do.
    pub fn send(&mut self, command: &str) {
        self.watchdog.feed();
        self.input
            .write_all(format!("{command}\n").as_bytes())
            .unwrap();
    }

    /// Waits for its report.
    pub fn report(&mut self) -> Value {
        let line = self.line("{");
        self.watchdog.rest();
        serde_json::from_str(&line).unwrap()
    }

    /// Whether it reports, in a while that is long for a read.
    pub fn answers(&self, milliseconds: u16) -> bool {
        let mut fds = [PollFd::new(
            self.output.get_ref().as_fd(),
            PollFlags::POLLIN,
        )];
        poll(&mut fds, PollTimeout::from(milliseconds)).unwrap() > 0
    }

    pub fn ask(&mut self, command: &str) -> Value {
        self.send(command);
        self.report()
    }

    pub fn kill(&mut self) {
        // Ended already, where a test has failed.
        let _ = self.child.kill();
    }

    /// The next line that begins so.
    fn line(&mut self, start: &str) -> String {
        loop {
            let mut line = String::new();
            let n = self.output.read_line(&mut line).unwrap();
            assert!(n > 0, "the driver ended, or hung and was killed");
            if line.starts_with(start) {
                return line;
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.watchdog.rest();
        self.kill();
        let _ = self.child.wait();
    }
}
