//! Reads by this process.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{Advice, fadvise};
use vmafx_bypass::AlignedBuffer;

use crate::common::next;
use crate::{Bench, CLIP, Outcome, SMALL, Way, quantile, ratio};

/// Reads at random in a sample.
const READS: usize = 5_000;

/// What is read, and whether the kernel's pages of it are dropped before.
struct Place {
    name: &'static str,
    path: PathBuf,
    dropped: bool,
}

pub fn whole(bench: &Bench) -> Outcome<()> {
    bench.rig.cache_whole(Path::new(CLIP))?;
    let at = |name, path: PathBuf, dropped| Place {
        name,
        path,
        dropped,
    };
    let shown = |name, way, dropped| at(name, bench.folder(way).join(CLIP), dropped);
    let places = [
        shown("rclone's mount", Way::Rclone, false),
        shown("mount, passed through", Way::Passed, false),
        shown("mount, by ranges, first", Way::Ranges, true),
        shown("mount, by ranges, again", Way::Ranges, false),
        at("raw cache file", bench.cache_file(CLIP)?, false),
    ];
    for place in &places {
        in_order(&place.path, 1 << 20)?;
    }
    println!("\nwhole clip, in order: ms, and rclone's mount and the raw file beside it");
    for block in [4 << 10, 64 << 10, 1 << 20] {
        let samples = bench.rounds(places.len(), |index| {
            let place = &places[index];
            if place.dropped {
                drop_pages(&place.path)?;
            }
            in_order(&place.path, block)
        })?;
        table(&format!("{} KiB", block >> 10), &places, &samples, 1e6);
    }
    println!("\nat random, {READS} reads: us for one");
    for block in [4 << 10, 64 << 10] {
        let samples = bench.rounds(places.len(), |index| {
            let place = &places[index];
            if place.dropped {
                drop_pages(&place.path)?;
            }
            at_random(&place.path, block)
        })?;
        table(
            &format!("{} KiB", block >> 10),
            &places,
            &samples,
            1e3 * READS as f64,
        );
    }
    Ok(())
}

fn table(what: &str, places: &[Place], samples: &[Vec<f64>], unit: f64) {
    for (place, own) in places.iter().zip(samples) {
        let time = quantile(own, 0.5) / unit;
        let (faster, of_raw) = (
            ratio(&samples[0], own),
            ratio(&samples[places.len() - 1], own),
        );
        println!(
            "{what:<9} {:<24} {time:>9.2}  {faster:>24} x rclone's  {of_raw:>22} of raw's speed",
            place.name
        );
    }
}

/// What the kernel has of a file goes.
fn drop_pages(path: &Path) -> Outcome<()> {
    fadvise(File::open(path)?, 0, None, Advice::DontNeed)?;
    Ok(())
}

/// Nanoseconds for all of a file.
fn in_order(path: &Path, block: usize) -> Outcome<f64> {
    let mut buffer = AlignedBuffer::new(block);
    let start = Instant::now();
    let mut file = File::open(path)?;
    while file.read(&mut buffer)? > 0 {}
    Ok(start.elapsed().as_nanos() as f64)
}

fn at_random(path: &Path, block: usize) -> Outcome<f64> {
    let mut buffer = AlignedBuffer::new(block);
    let file = File::open(path)?;
    let blocks = file.metadata()?.len() / block as u64;
    let mut state = 7_u64;
    let start = Instant::now();
    for _ in 0..READS {
        state = next(state);
        file.read_exact_at(&mut buffer, (state >> 20) % blocks * block as u64)?;
    }
    Ok(start.elapsed().as_nanos() as f64)
}

pub fn opens(bench: &Bench) -> Outcome<()> {
    let names: Vec<String> = (0..SMALL).map(|n| format!("small{n}")).collect();
    for name in &names {
        in_order(&bench.folder(Way::Rclone).join(name), 1 << 20)?;
    }
    bench.rig.cache_whole(Path::new(&names[SMALL - 1]))?;
    println!("\nopen, read 4 KiB and close a clip of 1 MiB: us");
    let ways = [Way::Rclone, Way::Passed, Way::Ranges];
    let one = |way, name: &String| -> Outcome<f64> {
        let path = bench.folder(way).join(name);
        let start = Instant::now();
        File::open(path)?.read_exact_at(&mut [0; 4096], 0)?;
        Ok(start.elapsed().as_nanos() as f64)
    };
    for (time, rounds) in [("first", 0..1), ("again", 0..5)] {
        let mut samples = [const { Vec::new() }; 3];
        for _ in rounds {
            for (n, name) in names.iter().enumerate() {
                for offset in 0..ways.len() {
                    let index = (n + offset) % ways.len();
                    samples[index].push(one(ways[index], name)?);
                }
            }
        }
        for (way, own) in ways.iter().zip(&samples) {
            let [p50, p99] = [0.5, 0.99].map(|share| quantile(own, share) / 1e3);
            let times = quantile(own, 0.5) / quantile(&samples[0], 0.5);
            println!(
                "{time:<6} {:<24} p50 {p50:>8.0}  p99 {p99:>8.0}  {times:>6.2} x rclone's p50",
                way.name()
            );
        }
    }
    Ok(())
}

pub fn half(bench: &Bench) -> Outcome<()> {
    let count = 2 * bench.args.rounds;
    let size = bench.args.size << 20;
    for n in 0..count {
        let file = File::open(bench.folder(Way::Rclone).join(format!("half{n}")))?;
        let mut buffer = vec![0; 1 << 20];
        for block in 0..size >> 21 {
            file.read_exact_at(&mut buffer, (block << 20) as u64)?;
        }
    }
    // rclone since 1.74 writes its metadata 5 seconds after the last close.
    std::thread::sleep(std::time::Duration::from_secs(7));
    println!("\ncached by half, each clip once, blocks of 64 KiB: ms");
    let mut next = 0;
    let ways = [Way::Rclone, Way::Ranges];
    let samples = bench.rounds(ways.len(), |index| {
        let name = format!("half{next}");
        next += 1;
        in_order(&bench.folder(ways[index]).join(name), 64 << 10)
    })?;
    for (way, own) in ways.iter().zip(&samples) {
        println!(
            "{:<24} {:>9.1}  {:>24} x rclone's",
            way.name(),
            quantile(own, 0.5) / 1e6,
            ratio(&samples[0], own)
        );
    }
    Ok(())
}
