//! A worker that scores clips: its own opens, by whatever code they are made,
//! are turned into bypassed files.
//!
//! `cargo run --release --example worker -- /rclone-mount CLIP…`, as root.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use vmafx_bypass::{BypassFile, Tracker, TrackerOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let prefix = arguments.next().ok_or("usage: worker PREFIX CLIP...")?;
    let tracker = Tracker::start(TrackerOptions::new(prefix))?;

    for clip in arguments {
        // Stands for a library that opens files by itself and hands out the fd.
        let file = File::open(clip)?;

        // The table is kept by events; wait for those that are under way.
        tracker.flush()?;
        let Some(tracked) = tracker.lookup(std::process::id(), file.as_raw_fd() as u32) else {
            println!("descriptor {} is not below the prefix", file.as_raw_fd());
            continue;
        };

        // From here on reads take the cache where it is proven, else FUSE.
        let mut clip = BypassFile::from_fd(OwnedFd::from(file))?;
        let mut sum = 0_u64;
        let mut block = vec![0; 64 << 10];
        loop {
            let n = clip.read(&mut block)?;
            if n == 0 {
                break;
            }
            sum = block[..n]
                .iter()
                .fold(sum, |sum, &byte| sum.wrapping_mul(31) + u64::from(byte));
        }
        let stats = clip.stats();
        println!(
            "{}: sum {sum:016x}, {} bytes from the cache, {} through FUSE{}",
            tracked.path.as_deref().unwrap_or(clip.path()).display(),
            stats.cache_bytes,
            stats.fuse_bytes(),
            clip.refusal()
                .map_or_else(String::new, |refusal| format!(" ({refusal})")),
        );
    }
    println!("lost events: {}", tracker.losses().total());
    tracker.stop()?;
    Ok(())
}
