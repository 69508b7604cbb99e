//! One clip, pattern, block size and number of streams: every engine in turn.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use sha2::{Digest, Sha256};

use super::engine::{Opened, Ways};
use super::offsets::random_offsets;
use super::statistics::{median, quartiles};
use super::{BenchError, Engine, Measurement, Pattern, Percentiles, Spread};
use crate::aligned::AlignedBuffer;

/// Opens of one run, at most.
const OPENS: usize = 50;
/// Before each run: rclone goes on with something when it has been read from.
const SETTLE: Duration = Duration::from_millis(20);
/// Bytes that come into the CPU's caches at once.
const LINE: usize = 64;

pub(super) struct Case<'a> {
    clip: &'a Path,
    pattern: Pattern,
    block_size: usize,
    streams: u32,
    /// Whether the kernel's pages of the clip are dropped before each run.
    cold: bool,
    size: u64,
    /// Where random reads start.
    offsets: Vec<u64>,
    /// How engines open the clip.
    ways: &'a Ways<'a>,
}

/// The samples of one engine as they come in.
struct Series {
    engine: Engine,
    sha256: String,
    samples_ns: Vec<u64>,
    /// The median of each run.
    runs_ns: Vec<u64>,
    open_ns: Vec<u64>,
    fuse_bytes: u64,
}

/// What one of several readers at once has measured.
struct Stream {
    began: Instant,
    ended: Instant,
    samples_ns: Vec<u64>,
    open_ns: Vec<u64>,
    fuse_bytes: u64,
}

/// Uses bytes as a program does, one of each of the CPU's cache lines, whether they
/// were copied or lent.
fn touch(bytes: &[u8]) {
    let sum = bytes.chunks(LINE).fold(0_u8, |sum, line| sum ^ line[0]);
    std::hint::black_box(sum);
}

impl<'a> Case<'a> {
    pub(super) fn new(
        clip: &'a Path,
        pattern: Pattern,
        block_size: usize,
        streams: u32,
        cold: bool,
        ways: &'a Ways<'a>,
    ) -> Result<Self, BenchError> {
        let size = std::fs::metadata(clip)
            .map_err(|error| BenchError::Io {
                path: clip.into(),
                error,
            })?
            .len();
        let blocks = size / block_size as u64;
        if blocks == 0 {
            return Err(BenchError::TooShort {
                path: clip.into(),
                block_size,
            });
        }
        let mut offsets = random_offsets(blocks, block_size as u64);
        if pattern == Pattern::Open {
            offsets.truncate(OPENS);
        }
        Ok(Self {
            clip,
            pattern,
            block_size,
            streams,
            cold,
            size,
            offsets,
            ways,
        })
    }

    pub(super) fn measure(
        &self,
        engines: &[Engine],
        runs: u32,
        stop: &mut impl FnMut() -> bool,
    ) -> Result<Vec<Measurement>, BenchError> {
        let mut series = Vec::new();
        for &engine in engines {
            if stop() {
                return Err(BenchError::Stopped);
            }
            series.push(self.checksum(engine, stop)?);
        }
        let before: Vec<u64> = engines.iter().map(|e| self.ways.fuse_bytes(*e)).collect();
        if let Some((first, rest)) = series.split_first()
            && let Some(other) = rest.iter().find(|s| s.sha256 != first.sha256)
        {
            return Err(self.mismatch(other.engine, first.engine));
        }
        for run in 0..runs as usize {
            // Another engine goes first each time, and every second time in the
            // opposite order: what one leaves behind in the CPU's caches helps or
            // hinders each of the others as often.
            let count = series.len();
            for turn in 0..count {
                if stop() {
                    return Err(BenchError::Stopped);
                }
                let turn = if run % 2 == 1 { count - 1 - turn } else { turn };
                self.run(&mut series[(run + turn) % count], stop)?;
            }
        }
        for (series, before) in series.iter_mut().zip(before) {
            series.fuse_bytes += self.ways.fuse_bytes(series.engine) - before;
        }
        Ok(self.results(series))
    }

    fn io(&self, error: io::Error) -> BenchError {
        BenchError::Io {
            path: self.clip.into(),
            error,
        }
    }

    fn mismatch(&self, engine: Engine, reference: Engine) -> BenchError {
        BenchError::Mismatch {
            path: self.clip.into(),
            engine: engine.name(),
            reference: reference.name(),
            pattern: self.pattern.name(),
            block_size: self.block_size,
        }
    }

    /// Reads once as a run does, and hashes what was read.
    fn checksum(
        &self,
        engine: Engine,
        stop: &mut impl FnMut() -> bool,
    ) -> Result<Series, BenchError> {
        let sha256 = match self.ways.child(engine) {
            Some(child) => {
                let ran = child.run(self.pattern, self.block_size, self.streams, stop);
                ran?.sha256
            }
            None => self.hash(engine)?,
        };
        Ok(Series {
            engine,
            sha256,
            samples_ns: Vec::new(),
            runs_ns: Vec::new(),
            open_ns: Vec::new(),
            fuse_bytes: 0,
        })
    }

    fn hash(&self, engine: Engine) -> Result<String, BenchError> {
        let raw = self.ways.raw_of(engine)?;
        let mut file = self.ways.open_by(engine, self.block_size, raw.as_deref())?;
        let mut hash = Sha256::new();
        let mut block = AlignedBuffer::new(self.block_size);
        self.read(&mut file, &mut block, |bytes, _| hash.update(bytes))?;
        let mut sha256 = String::with_capacity(64);
        for byte in hash.finalize() {
            use std::fmt::Write;
            // Writing to a string does not fail.
            let _ = write!(sha256, "{byte:02x}");
        }
        Ok(sha256)
    }

    fn run(&self, series: &mut Series, stop: &mut impl FnMut() -> bool) -> Result<(), BenchError> {
        // An open drops the pages that FUSE has cached, 15 ms for 100 MiB: not
        // to be paid by whichever engine comes after the one that read them.
        let clip = File::open(self.clip).map_err(|e| self.io(e))?;
        if self.cold {
            self.drop_pages(&clip, series.engine)?;
        }
        drop(clip);
        std::thread::sleep(SETTLE);
        if let Some(child) = self.ways.child(series.engine) {
            let ran = child.run(self.pattern, self.block_size, self.streams, stop)?;
            if ran.sha256 != series.sha256 {
                return Err(self.mismatch(series.engine, series.engine));
            }
            series.runs_ns.push(median(&ran.samples_ns));
            series.samples_ns.extend(ran.samples_ns);
            series.open_ns.extend(ran.open_ns);
            return Ok(());
        }
        let raw = self.ways.raw_of(series.engine)?;
        let together = Barrier::new(self.streams as usize);
        let streams: Vec<Result<Stream, BenchError>> = std::thread::scope(|scope| {
            let start = |_| scope.spawn(|| self.stream(series.engine, raw.as_deref(), &together));
            let started: Vec<_> = (0..self.streams).map(start).collect();
            let ended = started.into_iter().map(|stream| match stream.join() {
                Ok(ended) => ended,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            ended.collect()
        });
        let streams = streams.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut samples_ns: Vec<u64> = Vec::new();
        if self.pattern == Pattern::Sequential {
            let began = streams.iter().map(|stream| stream.began).min();
            let ended = streams.iter().map(|stream| stream.ended).max();
            let all = began.zip(ended).map(|(began, ended)| ended - began);
            samples_ns.extend(all.map(|all| all.as_nanos() as u64));
        }
        for stream in streams {
            samples_ns.extend(stream.samples_ns);
            series.open_ns.extend(stream.open_ns);
            series.fuse_bytes += stream.fuse_bytes;
        }
        series.runs_ns.push(median(&samples_ns));
        series.samples_ns.extend(samples_ns);
        Ok(())
    }

    /// What a read has to bring from the disk again.
    fn drop_pages(&self, clip: &File, engine: Engine) -> Result<(), BenchError> {
        let drop_of = |file: &File| {
            // Only clean pages can be dropped.
            rustix::fs::fdatasync(file)?;
            fadvise(file, 0, None, Advice::DontNeed)
        };
        // Where FUSE does not sync, there is nothing to be synced.
        let _ = drop_of(clip);
        let raw = File::open(self.ways.raw_path()?).map_err(|e| self.io(e))?;
        drop_of(&raw).map_err(|e| self.io(e.into()))?;
        for other in self.ways.other_files(engine) {
            let other = File::open(&other).map_err(|e| self.io(e))?;
            let _ = drop_of(&other);
        }
        Ok(())
    }

    /// One of the readers of a run, which all begin to read together.
    fn stream(
        &self,
        engine: Engine,
        raw: Option<&Path>,
        together: &Barrier,
    ) -> Result<Stream, BenchError> {
        // Written to, so that its pages are there.
        let mut block = AlignedBuffer::new(self.block_size);
        block.fill(1);
        if self.pattern == Pattern::Open {
            together.wait();
            return self.open_and_read(engine, raw, &mut block);
        }
        let opening = Instant::now();
        let file = self.ways.open_by(engine, self.block_size, raw);
        let open_ns = vec![opening.elapsed().as_nanos() as u64];
        // Also after an error: the others wait.
        together.wait();
        let mut file = file?;
        let mut samples_ns = Vec::new();
        let began = Instant::now();
        self.read(&mut file, &mut block, |bytes, ns| {
            if self.pattern == Pattern::Random {
                // Touched already, as part of the sample.
                samples_ns.push(ns);
            } else {
                touch(bytes);
            }
        })?;
        Ok(Stream {
            began,
            ended: Instant::now(),
            samples_ns,
            open_ns,
            fuse_bytes: file.fuse_bytes(),
        })
    }

    /// Opens and reads one block, and closes, untimed, again and again.
    fn open_and_read(
        &self,
        engine: Engine,
        raw: Option<&Path>,
        block: &mut [u8],
    ) -> Result<Stream, BenchError> {
        let began = Instant::now();
        let (mut samples_ns, mut open_ns) = (Vec::new(), Vec::new());
        let mut fuse_bytes = 0;
        for &offset in &self.offsets {
            let started = Instant::now();
            let mut file = self.ways.open_by(engine, self.block_size, raw)?;
            open_ns.push(started.elapsed().as_nanos() as u64);
            touch(file.at(block, offset).map_err(|e| self.io(e))?);
            samples_ns.push(started.elapsed().as_nanos() as u64);
            fuse_bytes += file.fuse_bytes();
        }
        Ok(Stream {
            began,
            ended: Instant::now(),
            samples_ns,
            open_ns,
            fuse_bytes,
        })
    }

    /// Reads in the case's order; `each` gets every block, and how many
    /// nanoseconds it took if random.
    fn read(
        &self,
        file: &mut Opened,
        block: &mut [u8],
        mut each: impl FnMut(&[u8], u64),
    ) -> Result<(), BenchError> {
        match self.pattern {
            Pattern::Sequential => {
                let mut total = 0;
                loop {
                    let bytes = file.next(block).map_err(|e| self.io(e))?;
                    if bytes.is_empty() {
                        break;
                    }
                    total += bytes.len() as u64;
                    each(bytes, 0);
                }
                if total != self.size {
                    let error = io::Error::other("the clip changed while it was measured");
                    return Err(self.io(error));
                }
            }
            Pattern::Random | Pattern::Open => {
                for &offset in &self.offsets {
                    let started = Instant::now();
                    let bytes = file.at(block, offset).map_err(|e| self.io(e))?;
                    // Of bytes that are lent, to use them is to read them.
                    touch(bytes);
                    let ns = started.elapsed().as_nanos() as u64;
                    each(bytes, ns);
                }
            }
        }
        Ok(())
    }

    fn results(&self, series: Vec<Series>) -> Vec<Measurement> {
        let bytes = match self.pattern {
            Pattern::Sequential => self.size,
            Pattern::Random | Pattern::Open => self.block_size as u64,
        };
        let bytes = bytes * u64::from(self.streams);
        // An engine's runs, to be compared with another's one by one.
        let runs = |engine| {
            let found = series.iter().find(|s| s.engine == engine);
            found.map(|s| (Percentiles::of(&s.samples_ns).p50_ns, s.runs_ns.clone()))
        };
        let (fuse, raw) = (runs(Engine::Fuse), runs(Engine::Raw));
        series
            .into_iter()
            .map(|series| {
                let percentiles = Percentiles::of(&series.samples_ns);
                let own = percentiles.p50_ns.max(1) as f64;
                let ratio = |to: &Option<(u64, Vec<u64>)>| {
                    let (median, _) = to.as_ref()?;
                    Some(*median as f64 / own)
                };
                let range = |to: &Option<(u64, Vec<u64>)>| {
                    let pairs = to.as_ref()?.1.iter().zip(&series.runs_ns);
                    quartiles(pairs.map(|(to, own)| *to as f64 / (*own).max(1) as f64))
                };
                Measurement {
                    path: self.clip.to_path_buf(),
                    engine: series.engine,
                    pattern: self.pattern,
                    block_size: self.block_size,
                    streams: self.streams,
                    percentiles,
                    spread: Spread::of(&series.samples_ns),
                    bytes_per_s: bytes as f64 / (own / 1e9),
                    ratio_to_fuse: ratio(&fuse),
                    ratio_to_fuse_range: range(&fuse),
                    ratio_to_raw: ratio(&raw),
                    ratio_to_raw_range: range(&raw),
                    fuse_bytes: series.fuse_bytes,
                    tries: 1,
                    sha256: series.sha256,
                    samples_ns: series.samples_ns,
                    open_ns: series.open_ns,
                }
            })
            .collect()
    }
}
