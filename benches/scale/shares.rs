//! Clips that are cached in part, and small ones.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use vmafx_bypass::snapshot::{SnapshotMode, SnapshotOptions, Snapshots};
use vmafx_bypass::{AlignedBuffer, BypassFile};

use crate::common::ratio;
use crate::{Args, Outcome, rig_with, rounds, shown};

/// Bytes of a clip that is cached in part.
const SIZE: usize = 32 << 20;
/// What is cached and what is not come in turn, in parts of so many bytes.
const PART: usize = 1 << 20;
const BLOCK: usize = 64 << 10;
/// rclone since 1.74 writes its metadata 5 seconds after the last close.
const WRITTEN: Duration = Duration::from_secs(7);

/// How long it takes to read a file to its end.
fn read_all(mut file: impl Read, buffer: &mut [u8]) -> io::Result<()> {
    while file.read(buffer)? > 0 {}
    Ok(())
}

/// Each clip is read once, since what is missing is cached by that: so each round
/// has clips of its own.
pub fn shares(args: &Args) -> Outcome<()> {
    const PERCENTS: [usize; 5] = [0, 25, 50, 75, 100];
    let name = |percent, round, way| format!("{percent}-{round}-{way}");
    let mut names = Vec::new();
    for percent in PERCENTS {
        for round in 0..args.rounds {
            names.extend(["fuse", "bypass"].map(|way| (name(percent, round, way), SIZE)));
        }
    }
    let rig = rig_with(args, &names)?;
    let mut part = AlignedBuffer::new(PART);
    for percent in PERCENTS {
        for round in 0..args.rounds {
            for way in ["fuse", "bypass"] {
                let clip = rig.mountpoint().join(name(percent, round, way));
                let clip = File::open(clip)?;
                // Spread over the clip: of 4 parts, 0 to 4.
                for index in (0..SIZE / PART).filter(|index| index % 4 < percent / 25) {
                    clip.read_exact_at(&mut part, (index * PART) as u64)?;
                }
            }
        }
    }
    std::thread::sleep(WRITTEN);
    println!("\ncached by so much, 32 MiB in blocks of 64 KiB, ms");
    let mut buffer = AlignedBuffer::new(BLOCK);
    for percent in PERCENTS {
        let mut round = [0; 2];
        let mut by_cache = 0;
        let samples = rounds(args, 2, |way| {
            let way_name = ["fuse", "bypass"][way];
            let clip = rig.mountpoint().join(name(percent, round[way], way_name));
            round[way] += 1;
            let start = Instant::now();
            if way == 0 {
                read_all(File::open(clip)?, &mut buffer)?;
            } else {
                let mut file = BypassFile::open(clip)?;
                read_all(&mut file, &mut buffer)?;
                by_cache = file.stats().cache_bytes * 100 / SIZE as u64;
            }
            Ok(start.elapsed().as_nanos() as f64)
        })?;
        println!(
            "{percent:>3} %  fuse {:<24} bypass {:<24} {:>22} times, {by_cache} % from the cache",
            shown(&samples[0], 1e6),
            shown(&samples[1], 1e6),
            ratio(&samples[0], &samples[1])
        );
    }
    Ok(())
}

/// Clips in which the open is most of it.
pub fn small(args: &Args) -> Outcome<()> {
    const CLIPS: usize = 50;
    println!(
        "\nopened, read to the end in blocks of 64 KiB and closed, us for each of {CLIPS} clips"
    );
    for size in [64 << 10, 1 << 20] {
        let names: Vec<_> = (0..CLIPS).map(|n| (format!("clip{n}"), size)).collect();
        let rig = rig_with(args, &names)?;
        let mut caches = Vec::new();
        for (name, _) in &names {
            rig.cache_whole(Path::new(name))?;
            let clip = BypassFile::open(rig.mountpoint().join(name))?;
            caches.push(clip.cache_path().ok_or("a clip is not proven")?);
        }
        let snapshots = Snapshots::of_huge_pages(SnapshotOptions {
            mode: SnapshotMode::Auto,
            copy_budget: 1 << 30,
        });
        let mut buffer = AlignedBuffer::new(BLOCK);
        let ways = ["fuse", "bypass", "mmap", "raw"];
        let samples = rounds(args, ways.len(), |way| {
            let start = Instant::now();
            for ((name, _), cache) in names.iter().zip(&caches) {
                let clip = rig.mountpoint().join(name);
                match ways[way] {
                    "fuse" => read_all(File::open(clip)?, &mut buffer)?,
                    "bypass" => read_all(BypassFile::open(clip)?, &mut buffer)?,
                    "raw" => read_all(File::open(cache)?, &mut buffer)?,
                    _ => {
                        let clip = rustix::fs::open(
                            clip,
                            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
                            rustix::fs::Mode::empty(),
                        )?;
                        let whole = snapshots.open(clip.as_fd()).map_err(|e| e.to_string())?;
                        let map = whole.map().map_err(|e| e.to_string())?;
                        read_all(&map[..], &mut buffer)?;
                    }
                }
            }
            Ok(start.elapsed().as_nanos() as f64 / CLIPS as f64)
        })?;
        for (way, own) in ways.iter().zip(&samples) {
            println!(
                "{:>5} KiB  {way:<7} {:<28} fuse takes {} times as long",
                size >> 10,
                shown(own, 1e3),
                ratio(&samples[0], own)
            );
        }
    }
    Ok(())
}
