//! Reads by programs.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::{Bench, MANY, Outcome, VIDEOS, Way, quantile, ratio};

/// Frames of a video, of 1920 by 1080: 3 MiB each.
const FRAMES: &str = "60";

pub fn make_videos(folder: &Path) -> io::Result<()> {
    for (name, kind) in VIDEOS.iter().zip(["testsrc2", "testsrc"]) {
        let made = Command::new("ffmpeg")
            .args(["-v", "error", "-f", "lavfi", "-i"])
            .arg(format!("{kind}=size=1920x1080:rate=25"))
            .args(["-frames:v", FRAMES, "-pix_fmt", "yuv420p"])
            .arg(folder.join(name))
            .status()?;
        if !made.success() {
            return Err(io::Error::other("ffmpeg makes no clips"));
        }
    }
    Ok(())
}

/// Nanoseconds of a program's run in a way's folder, and what it printed.
fn run(bench: &Bench, way: Way, command: &[&str]) -> Outcome<(f64, String)> {
    let start = Instant::now();
    let output = Command::new(command[0])
        .args(&command[1..])
        .current_dir(bench.folder(way))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    let time = start.elapsed().as_nanos() as f64;
    if !output.status.success() {
        return Err(format!("{command:?} failed").into());
    }
    Ok((time, String::from_utf8_lossy(&output.stdout).into_owned()))
}

fn compare(bench: &Bench, what: &str, ways: &[Way], command: &[&str]) -> Outcome<()> {
    // What each reads first is not what is to be compared.
    let expected = run(bench, ways[0], command)?.1;
    for way in &ways[1..] {
        run(bench, *way, command)?;
    }
    let samples = bench.rounds(ways.len(), |index| {
        let (time, text) = run(bench, ways[index], command)?;
        if text != expected {
            return Err(format!("{command:?} differs: {text}").into());
        }
        Ok(time)
    })?;
    let last = &samples[ways.len() - 1];
    for (way, own) in ways.iter().zip(&samples) {
        println!(
            "{what:<8} {:<24} {:>7.0} ms  {:>24} x rclone's  {:>24} of the last's time",
            way.name(),
            quantile(own, 0.5) / 1e6,
            ratio(&samples[0], own),
            ratio(own, last)
        );
    }
    Ok(())
}

pub fn videos(bench: &Bench) -> Outcome<()> {
    let [a, b] = VIDEOS;
    for name in VIDEOS {
        bench.rig.cache_whole(Path::new(name))?;
    }
    println!("\nffmpeg, 1080p, {FRAMES} frames");
    let ffmpeg = ["ffmpeg", "-v", "error", "-nostdin"];
    let decode = [&ffmpeg[..], &["-i", a, "-f", "null", "-"]].concat();
    compare(bench, "decode", &Way::ALL, &decode)?;
    let psnr = ["-i", a, "-i", b, "-lavfi", "psnr", "-f", "null", "-"];
    compare(bench, "psnr", &Way::ALL, &[&ffmpeg[..], &psnr].concat())
}

pub fn listing(bench: &Bench) -> Outcome<()> {
    println!("\na folder of {MANY} files");
    let ways = [Way::Ranges, Way::Rclone];
    compare(bench, "names", &ways, &["ls", "-U", "many"])?;
    let sizes = ["find", "many", "-type", "f", "-printf", "%f %s %T@\n"];
    compare(bench, "find -s", &ways, &sizes)
}
