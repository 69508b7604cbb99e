//! What runs plainly or under `exec`, and prints nanoseconds.

use std::ffi::CString;
use std::fmt::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::fs::{Mode, OFlags};

use crate::Outcome;

/// `ffmpeg TIMES ARGS…`, or `open TIMES PATH`.
pub fn run(task: &[String]) -> Outcome<()> {
    let [what, times, rest @ ..] = task else {
        return Err("what?".into());
    };
    let times: usize = times.parse()?;
    let mut text = String::new();
    for ns in match what.as_str() {
        "ffmpeg" => ffmpeg(times, rest)?,
        _ => opens(times, &rest[0])?,
    } {
        writeln!(text, "{ns}")?;
    }
    print!("{text}");
    Ok(())
}

fn ffmpeg(times: usize, args: &[String]) -> Outcome<Vec<u128>> {
    let mut all = Vec::new();
    for _ in 0..times {
        let start = Instant::now();
        let status = Command::new("ffmpeg")
            .args(["-v", "error", "-nostdin"])
            .args(args)
            .stdin(Stdio::null())
            .status()?;
        all.push(start.elapsed().as_nanos());
        if !status.success() {
            return Err("ffmpeg failed".into());
        }
    }
    Ok(all)
}

/// The open alone; a file that is not there counts, too.
fn opens(times: usize, path: &str) -> Outcome<Vec<u128>> {
    let path = CString::new(path)?;
    let mut all = Vec::with_capacity(times);
    for _ in 0..times {
        let start = Instant::now();
        let opened = rustix::fs::open(
            path.as_c_str(),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        all.push(start.elapsed().as_nanos());
        drop(opened);
    }
    Ok(all)
}
