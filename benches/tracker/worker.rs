//! What the workers do: this executable, started again.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::Outcome;

/// Descriptors that are made before a pause, which lets `run` keep up.
const BURST: usize = 1_000;
const PAUSE: Duration = Duration::from_millis(20);
/// Descriptors that a worker has for itself, at most.
const OWN: u64 = 32;

/// Does a task to its end: `open PATH SECONDS`, `dup PATH SECONDS RATE`, with
/// the number of calls on standard output; or `hold PATH`.
pub fn run(task: &[String]) -> Outcome<()> {
    let task: Vec<&str> = task.iter().map(String::as_str).collect();
    let done = match task[..] {
        ["open", path, seconds] => open(Path::new(path), seconds_of(seconds)?)?,
        ["dup", path, seconds, rate] => dup(Path::new(path), seconds_of(seconds)?, rate.parse()?)?,
        ["hold", path] => return hold(Path::new(path)),
        _ => return Err(format!("no such task: {task:?}").into()),
    };
    println!("{done}");
    Ok(())
}

fn seconds_of(text: &str) -> Outcome<Duration> {
    Ok(Duration::from_secs_f64(text.parse()?))
}

/// Opens and closes, as fast as it goes.
fn open(path: &Path, time: Duration) -> Outcome<u64> {
    let deadline = Instant::now() + time;
    let mut done = 0;
    while Instant::now() < deadline {
        File::open(path)?;
        done += 1;
    }
    Ok(done)
}

/// Dups and closes, at most `rate` times a second; 0: as fast as it goes.
fn dup(path: &Path, time: Duration, rate: u64) -> Outcome<u64> {
    let file = File::open(path)?;
    let start = Instant::now();
    let mut done = 0;
    while start.elapsed() < time {
        let due = match rate {
            0 => done + 100,
            rate => (start.elapsed().as_secs_f64() * rate as f64) as u64,
        };
        while done < due {
            rustix::io::dup(&file)?;
            done += 1;
        }
        if rate > 0 {
            sleep(Duration::from_millis(1));
        }
    }
    Ok(done)
}

/// The most descriptors that one worker can hold here.
pub fn most_held() -> Outcome<usize> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(hard.saturating_sub(OWN).max(1) as usize)
}

/// Holds as many descriptors as each line on standard input says.
fn hold(path: &Path) -> Outcome<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let file = File::open(path)?;
    let mut held: Vec<OwnedFd> = Vec::new();
    for line in io::stdin().lines() {
        let wanted: usize = line?.trim().parse()?;
        while held.len() + 1 < wanted {
            // dup(2), where std calls fcntl(2).
            held.push(rustix::io::dup(&file)?);
            if held.len().is_multiple_of(BURST) {
                sleep(PAUSE);
            }
        }
        println!("{wanted}");
        io::stdout().flush()?;
    }
    Ok(())
}

/// A worker, seen from the one that started it; killed when dropped.
pub struct Worker {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Worker {
    pub fn start(task: &[&str]) -> Outcome<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--worker")
            .args(task)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("no output")?;
        Ok(Self {
            child,
            output: BufReader::new(output),
        })
    }

    /// Tells it a number.
    pub fn tell(&mut self, number: usize) -> Outcome<()> {
        let input = self.child.stdin.as_mut().ok_or("no input")?;
        writeln!(input, "{number}")?;
        Ok(())
    }

    /// Waits for the number that it prints.
    pub fn answer(&mut self) -> Outcome<u64> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        line.trim()
            .parse()
            .map_err(|_| "a worker failed, see above".into())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Ended already, unless something failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
