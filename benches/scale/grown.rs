//! Large clips, many ranges, many clips.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmafx_bypass::rig::Rig;
use vmafx_bypass::{AlignedBuffer, BypassFile};

use crate::common::{next, quantile, ratio};
use crate::{Args, Outcome, options, rig_with, rounds, shown};

/// Reads at random in a sample.
const READS: usize = 5_000;
const BLOCK: usize = 4 << 10;

/// Nanoseconds of each of `READS` reads at random of one of these blocks.
fn at_random(clip: &BypassFile, blocks: &[u64]) -> io::Result<f64> {
    let mut buffer = AlignedBuffer::new(BLOCK);
    let mut state = 7_u64;
    let start = Instant::now();
    for _ in 0..READS {
        state = next(state);
        let offset = blocks[(state >> 20) as usize % blocks.len()];
        if clip.read_at(&mut buffer, offset)? != BLOCK {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(start.elapsed().as_nanos() as f64 / READS as f64)
}

/// Fails if something came through FUSE: else something else was measured.
fn assert_cached(clip: &BypassFile) -> Outcome<()> {
    match clip.stats().fuse_bytes() {
        0 => Ok(()),
        bytes => Err(format!("{bytes} bytes came through FUSE: {:?}", clip.refusal()).into()),
    }
}

/// Nanoseconds of an open and one read.
fn open_and_read(path: &Path) -> Outcome<f64> {
    let start = Instant::now();
    let clip = BypassFile::open(path)?;
    clip.read_at(&mut [0; BLOCK], BLOCK as u64)?;
    let took = start.elapsed().as_nanos() as f64;
    assert_cached(&clip)?;
    Ok(took)
}

/// Sparse clips of which the first and the last MiB are cached.
pub fn sizes(args: &Args) -> Outcome<()> {
    const END: u64 = 1 << 20;
    let sizes: [u64; 5] = [2 << 20, 64 << 20, 512 << 20, 2 << 30, 8 << 30];
    let name = |size: u64| format!("{size}");
    let rig = Rig::start(options(args), |source| {
        for size in sizes {
            File::create(source.join(name(size)))?.set_len(size)?;
        }
        Ok(())
    })?;
    for size in sizes {
        let clip = File::open(rig.mountpoint().join(name(size)))?;
        let mut end = vec![0; END as usize];
        clip.read_exact_at(&mut end, 0)?;
        clip.read_exact_at(&mut end, size - END)?;
    }
    std::thread::sleep(Duration::from_secs(7));
    let blocks = |size: u64| -> Vec<u64> {
        // Not at the very edges of what is cached.
        let inside = (1..END / BLOCK as u64 - 1).map(|n| n * BLOCK as u64);
        inside
            .flat_map(|offset| [offset, size - END + offset])
            .collect()
    };
    let open = rounds(args, sizes.len(), |index| {
        open_and_read(&rig.mountpoint().join(name(sizes[index])))
    })?;
    let read = rounds(args, sizes.len(), |index| {
        let clip = BypassFile::open(rig.mountpoint().join(name(sizes[index])))?;
        let took = at_random(&clip, &blocks(sizes[index]))?;
        assert_cached(&clip)?;
        Ok(took)
    })?;
    println!("\na clip of so many MiB, 2 of them cached: open and read, us; a read of 4 KiB, ns");
    for (index, size) in sizes.iter().enumerate() {
        println!(
            "{:>5} MiB  open {:<28} read {:<26} {:>22} times the smallest's",
            size >> 20,
            shown(&open[index], 1e3),
            shown(&read[index], 1.0),
            ratio(&read[index], &read[0])
        );
    }
    Ok(())
}

/// A clip whose metadata lists so many ranges, the same bytes in all.
pub fn ranges(args: &Args) -> Outcome<()> {
    const CLIP: usize = 160 << 20;
    // Of each 16 KiB the first 12 are listed.
    const STEP: usize = 16 << 10;
    const LISTED: usize = 12 << 10;
    let counts = [1, 100, 1_000, 10_000];
    let name = |count: usize| format!("{count}");
    let clips: Vec<_> = counts.map(|count| (name(count), CLIP)).to_vec();
    let mut rig = rig_with(args, &clips)?;
    for (name, _) in &clips {
        rig.cache_whole(Path::new(name))?;
    }
    rig.unmount();
    for count in counts {
        let listed = |index: usize| match count {
            1 => serde_json::json!({ "Pos": 0, "Size": CLIP }),
            _ => serde_json::json!({ "Pos": index * STEP, "Size": LISTED }),
        };
        let path = metadata_of(&rig.cache().join("vfsMeta"), &name(count))?;
        let mut info: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        info["Rs"] = (0..count).map(listed).collect();
        fs::write(&path, serde_json::to_vec(&info)?)?;
    }
    rig.mount()?;
    println!(
        "\na clip with so many cached ranges: open and read, us, by fuse and bypassed; a read of 4 KiB, ns; memory"
    );
    let mut memory = Vec::new();
    for count in counts {
        let before = resident()?;
        let path = rig.mountpoint().join(name(count));
        let clips = (0..20).map(|_| BypassFile::open(&path));
        let clips: Vec<BypassFile> = clips.collect::<io::Result<_>>()?;
        memory.push((resident()?.saturating_sub(before)) as f64 / clips.len() as f64);
    }
    let by_fuse = rounds(args, counts.len(), |index| {
        let path = rig.mountpoint().join(name(counts[index]));
        let start = Instant::now();
        File::open(path)?.read_exact_at(&mut [0; BLOCK], BLOCK as u64)?;
        Ok(start.elapsed().as_nanos() as f64)
    })?;
    let open = rounds(args, counts.len(), |index| {
        open_and_read(&rig.mountpoint().join(name(counts[index])))
    })?;
    let read = rounds(args, counts.len(), |index| {
        let clip = BypassFile::open(rig.mountpoint().join(name(counts[index])))?;
        // The same places as of 10,000, so that the CPU's caches have as much to do.
        let ranges = if counts[index] == 1 {
            10_000
        } else {
            counts[index]
        };
        let blocks: Vec<u64> = (0..ranges).map(|n| (n * STEP + BLOCK) as u64).collect();
        // What is read first is looked for holes, once.
        at_random(&clip, &blocks)?;
        let took = at_random(&clip, &blocks)?;
        assert_cached(&clip)?;
        Ok(took)
    })?;
    for (index, count) in counts.iter().enumerate() {
        println!(
            "{count:>6} ranges  by fuse {:<26} open {:<26} read {:<26} {:>22} times one range's; {:.0} KiB",
            shown(&by_fuse[index], 1e3),
            shown(&open[index], 1e3),
            shown(&read[index], 1.0),
            ratio(&read[index], &read[0]),
            memory[index] / 1024.0
        );
    }
    Ok(())
}

/// The metadata file of a clip, wherever it is below a folder.
fn metadata_of(folder: &Path, name: &str) -> Outcome<PathBuf> {
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if entry.file_name() == name {
                return Ok(entry.path());
            }
        }
    }
    Err(format!("no metadata of `{name}`").into())
}

/// Bytes of memory of this process that are its own.
fn resident() -> Outcome<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.ok_or("no RssAnon")? << 10)
}

/// Clips that are open at once.
pub fn clips(args: &Args) -> Outcome<()> {
    const MANY: usize = 1_000;
    let names: Vec<_> = (0..MANY).map(|n| (format!("{n}"), 64 << 10)).collect();
    let rig = rig_with(args, &names)?;
    for (name, _) in &names {
        fs::read(rig.mountpoint().join(name))?;
    }
    rig.cache_whole(Path::new("0"))?;
    std::thread::sleep(Duration::from_secs(7));
    let mut buffer = [0; BLOCK];
    println!(
        "\nso many clips open at once: open, us; a read of 4 KiB in each in turn, ns; memory of each"
    );
    for count in [1, 10, 100, MANY] {
        let before = resident()?;
        let mut open = Vec::new();
        let mut clips = Vec::new();
        for (name, _) in &names[..count] {
            let path = rig.mountpoint().join(name);
            let start = Instant::now();
            let clip = BypassFile::open(path)?;
            clip.read_at(&mut buffer, 0)?;
            open.push(start.elapsed().as_nanos() as f64);
            clips.push(clip);
        }
        let memory = resident()?.saturating_sub(before) as f64 / count as f64;
        let mut read = Vec::new();
        for _ in 0..args.rounds.max(10_000 / count) {
            for clip in &clips {
                let start = Instant::now();
                clip.read_at(&mut buffer, 8192)?;
                read.push(start.elapsed().as_nanos() as f64);
            }
        }
        for clip in &clips {
            assert_cached(clip)?;
        }
        println!(
            "{count:>6} clips  open {:<28} read {:<26} p99 {:.0} ns; {:.1} KiB",
            shown(&open, 1e3),
            shown(&read, 1.0),
            quantile(&read, 0.99),
            memory / 1024.0
        );
    }
    Ok(())
}
