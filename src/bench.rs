//! Compares the ways to read a clip: the rclone mount, the bypass, and the
//! cache file itself, interleaved in one run on the same warm clip.
//!
//! Each engine first reads the clip once to be checksummed, which also warms
//! it. Then every run opens it anew, as a program would, since an open drops
//! FUSE's page cache; opening is timed apart from reading. Nothing here prints.

mod engine;
mod gate;
mod offsets;
mod plan;
#[cfg(feature = "mount")]
mod remount;
mod statistics;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use sha2::{Digest, Sha256};

pub use gate::{Check, Gate, Verdict};
pub use plan::{Engine, Pattern, Plan};
pub use statistics::Percentiles;

use crate::BypassOptions;
use engine::{Opened, Ways};
use offsets::random_offsets;

/// Opens of one run, at most.
const OPENS: usize = 50;

/// One engine's result for one clip, pattern and block size.
#[derive(Debug, Clone, Serialize)]
pub struct Measurement {
    /// The clip.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// The way it was read.
    pub engine: Engine,
    /// The order.
    pub pattern: Pattern,
    /// Bytes per read.
    pub block_size: usize,
    /// Readers at once.
    pub streams: u32,
    /// Every sample in order, nanoseconds: of a whole clip if sequential, of
    /// one read if random, of an open and one read if open.
    pub samples_ns: Vec<u64>,
    /// Every open, nanoseconds; not part of the samples.
    pub open_ns: Vec<u64>,
    /// Of the samples.
    #[serde(flatten)]
    pub percentiles: Percentiles,
    /// By the median sample.
    pub bytes_per_s: f64,
    /// FUSE's median over this one's: how many times faster this is.
    pub ratio_to_fuse: Option<f64>,
    /// The raw file's median over this one's: 1 is as fast.
    pub ratio_to_raw: Option<f64>,
    /// Bytes that did not come from the cache, over all runs; of engines that tell.
    pub fuse_bytes: u64,
    /// Of the bytes read, in hexadecimal.
    pub sha256: String,
}

fn lossy<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// A clip cannot be opened or read.
    #[error("`{}`: {error}", path.display())]
    Io {
        /// The clip.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// There is nothing in it to measure.
    #[error("`{}` is shorter than a block of {block_size} bytes: choose a larger clip or a smaller --block-size", path.display())]
    TooShort {
        /// The clip.
        path: PathBuf,
        /// The block size that does not fit.
        block_size: usize,
    },
    /// No cache file is proven, so there is no raw file to read.
    #[error("`{}` is not bypassed: {refusal}; {}", path.display(), refusal.reason.remedy())]
    NotBypassed {
        /// The clip.
        path: PathBuf,
        /// Why.
        refusal: crate::Refusal,
    },
    /// An engine cannot run here.
    #[error("the engine {engine} cannot run for `{}`: {why}; leave it out of --engines", path.display())]
    Engine {
        /// The clip.
        path: PathBuf,
        /// Which.
        engine: &'static str,
        /// One line.
        why: String,
    },
    /// Two engines read different bytes.
    #[error("`{}`: {engine} read other bytes than {reference} ({pattern}, blocks of {block_size})", path.display())]
    Mismatch {
        /// The clip.
        path: PathBuf,
        /// The one that differs.
        engine: &'static str,
        /// From this one.
        reference: &'static str,
        /// In this order.
        pattern: &'static str,
        /// Bytes per read.
        block_size: usize,
    },
    /// `stop` said so.
    #[error("interrupted")]
    Stopped,
}

/// Measures a plan. `progress` is told before each group of engines what comes
/// next; `stop` is asked between runs whether to go on.
///
/// # Errors
/// The first clip that cannot be measured, engines that read different bytes,
/// or a stop.
pub fn measure(
    plan: &Plan,
    mut progress: impl FnMut(&Path, Pattern, usize),
    mut stop: impl FnMut() -> bool,
) -> Result<Vec<Measurement>, BenchError> {
    let mut results = Vec::new();
    for clip in &plan.clips {
        let ways = Ways::open(clip, &plan.engines)?;
        for &pattern in &plan.patterns {
            for &block_size in &plan.block_sizes {
                progress(clip, pattern, block_size);
                let options = engine::options(plan.socket.as_deref());
                let case = Case::new(clip, pattern, block_size, &ways, options)?;
                results.extend(case.measure(&plan.engines, plan.runs, &mut stop)?);
            }
        }
    }
    Ok(results)
}

/// One clip, pattern and block size.
struct Case<'a> {
    clip: &'a Path,
    pattern: Pattern,
    block_size: usize,
    size: u64,
    /// Where random reads start.
    offsets: Vec<u64>,
    /// Where engines that mount have mounted.
    ways: &'a Ways,
    /// Which handover server is asked.
    options: BypassOptions,
}

/// The samples of one engine as they come in.
struct Series {
    engine: Engine,
    sha256: String,
    samples_ns: Vec<u64>,
    open_ns: Vec<u64>,
    fuse_bytes: u64,
}

impl<'a> Case<'a> {
    fn new(
        clip: &'a Path,
        pattern: Pattern,
        block_size: usize,
        ways: &'a Ways,
        options: BypassOptions,
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
            size,
            offsets,
            ways,
            options,
        })
    }

    fn measure(
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
            series.push(self.checksum(engine)?);
        }
        let before: Vec<u64> = engines.iter().map(|e| self.ways.fuse_bytes(*e)).collect();
        if let Some((first, rest)) = series.split_first()
            && let Some(other) = rest.iter().find(|s| s.sha256 != first.sha256)
        {
            return Err(BenchError::Mismatch {
                path: self.clip.into(),
                engine: other.engine.name(),
                reference: first.engine.name(),
                pattern: self.pattern.name(),
                block_size: self.block_size,
            });
        }
        for run in 0..runs as usize {
            // Another engine goes first each time: what one leaves behind in
            // the CPU's caches helps or hinders each of the others as often.
            let count = series.len();
            for turn in 0..count {
                if stop() {
                    return Err(BenchError::Stopped);
                }
                self.run(&mut series[(run + turn) % count])?;
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

    fn open(&self, engine: Engine) -> Result<Opened, BenchError> {
        Opened::open(engine, self.clip, self.ways, &self.options)
    }

    /// Reads once as a run does, and hashes what was read.
    fn checksum(&self, engine: Engine) -> Result<Series, BenchError> {
        let mut file = self.open(engine)?;
        let mut hash = Sha256::new();
        self.read(&mut file, |bytes, _| hash.update(bytes))?;
        let mut sha256 = String::with_capacity(64);
        for byte in hash.finalize() {
            use std::fmt::Write;
            // Writing to a string does not fail.
            let _ = write!(sha256, "{byte:02x}");
        }
        Ok(Series {
            engine,
            sha256,
            samples_ns: Vec::new(),
            open_ns: Vec::new(),
            fuse_bytes: 0,
        })
    }

    fn run(&self, series: &mut Series) -> Result<(), BenchError> {
        // An open drops the pages that FUSE has cached, 15 ms for 100 MiB: not
        // to be paid by whichever engine comes after the one that read them.
        drop(File::open(self.clip).map_err(|e| self.io(e))?);
        if self.pattern == Pattern::Open {
            return self.open_and_read(series);
        }
        let opening = Instant::now();
        let mut file = self.open(series.engine)?;
        series.open_ns.push(opening.elapsed().as_nanos() as u64);
        let started = Instant::now();
        match self.pattern {
            Pattern::Sequential => {
                self.read(&mut file, |bytes, _| {
                    std::hint::black_box(bytes);
                })?;
                series.samples_ns.push(started.elapsed().as_nanos() as u64);
            }
            Pattern::Random | Pattern::Open => self.read(&mut file, |bytes, ns| {
                std::hint::black_box(bytes);
                series.samples_ns.push(ns);
            })?,
        }
        series.fuse_bytes += file.fuse_bytes();
        Ok(())
    }

    /// Opens and reads one block, and closes, untimed, again and again.
    fn open_and_read(&self, series: &mut Series) -> Result<(), BenchError> {
        // The raw file's path comes from a proof, which is not raw's to pay.
        let proven = match series.engine {
            Engine::Raw => Some(Opened::raw_path(self.clip)?),
            _ => None,
        };
        let mut block = vec![0; self.block_size];
        for &offset in &self.offsets {
            let started = Instant::now();
            let file = match &proven {
                Some(path) => Opened::Plain(File::open(path).map_err(|e| self.io(e))?),
                None => self.open(series.engine)?,
            };
            series.open_ns.push(started.elapsed().as_nanos() as u64);
            file.read_at(&mut block, offset).map_err(|e| self.io(e))?;
            series.samples_ns.push(started.elapsed().as_nanos() as u64);
            std::hint::black_box(&block);
            series.fuse_bytes += file.fuse_bytes();
        }
        Ok(())
    }

    /// Reads in the case's order; `each` gets every block, and how many
    /// nanoseconds it took if random.
    fn read(&self, file: &mut Opened, mut each: impl FnMut(&[u8], u64)) -> Result<(), BenchError> {
        let mut block = vec![0; self.block_size];
        match self.pattern {
            Pattern::Sequential => {
                let mut total = 0;
                loop {
                    let n = file.read(&mut block).map_err(|e| self.io(e))?;
                    if n == 0 {
                        break;
                    }
                    total += n as u64;
                    each(&block[..n], 0);
                }
                if total != self.size {
                    let error = io::Error::other("the clip changed while it was measured");
                    return Err(self.io(error));
                }
            }
            Pattern::Random | Pattern::Open => {
                for &offset in &self.offsets {
                    let started = Instant::now();
                    let n = file.read_at(&mut block, offset).map_err(|e| self.io(e))?;
                    let ns = started.elapsed().as_nanos() as u64;
                    each(&block[..n], ns);
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
        let percentiles: Vec<_> = series
            .iter()
            .map(|s| (s.engine, Percentiles::of(&s.samples_ns)))
            .collect();
        let median = |engine| {
            let found = percentiles.iter().find(|(e, _)| *e == engine);
            found.map(|(_, p)| p.p50_ns as f64)
        };
        series
            .into_iter()
            .zip(&percentiles)
            .map(|(series, (_, percentiles))| {
                let own = percentiles.p50_ns.max(1) as f64;
                Measurement {
                    path: self.clip.to_path_buf(),
                    engine: series.engine,
                    pattern: self.pattern,
                    block_size: self.block_size,
                    streams: 1,
                    samples_ns: series.samples_ns,
                    open_ns: series.open_ns,
                    percentiles: *percentiles,
                    bytes_per_s: bytes as f64 / (own / 1e9),
                    ratio_to_fuse: median(Engine::Fuse).map(|fuse| fuse / own),
                    ratio_to_raw: median(Engine::Raw).map(|raw| raw / own),
                    fuse_bytes: series.fuse_bytes,
                    sha256: series.sha256,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_file_has_fuse_and_bypass_but_no_raw() {
        let dir = tempfile::tempdir().unwrap();
        let clip = dir.path().join("clip");
        std::fs::write(&clip, vec![7; 100_000]).unwrap();
        let mut plan = Plan {
            clips: vec![clip],
            engines: vec![Engine::Fuse, Engine::Bypass],
            patterns: vec![Pattern::Sequential, Pattern::Random, Pattern::Open],
            block_sizes: vec![4096],
            runs: 3,
            socket: None,
        };
        let results = measure(&plan, |_, _, _| {}, || false).unwrap();
        assert_eq!(results.len(), 6);
        assert_eq!(results[4].samples_ns.len(), 3 * 24);
        assert_eq!(results[4].open_ns.len(), 3 * 24);
        assert_eq!(results[0].samples_ns.len(), 3);
        assert_eq!(results[2].samples_ns.len(), 3 * 24);
        assert_eq!(results[0].sha256, results[1].sha256);
        assert_eq!(results[1].fuse_bytes, 300_000);
        assert_eq!(results[0].ratio_to_fuse, Some(1.0));
        assert_eq!(results[0].ratio_to_raw, None);
        let stopped = measure(&plan, |_, _, _| {}, || true);
        assert!(matches!(stopped, Err(BenchError::Stopped)));
        plan.engines = vec![Engine::Raw];
        let raw = measure(&plan, |_, _, _| {}, || false);
        assert!(matches!(raw, Err(BenchError::NotBypassed { .. })));
        plan.engines = vec![Engine::Fuse];
        plan.block_sizes = vec![1 << 20];
        let short = measure(&plan, |_, _, _| {}, || false);
        assert!(matches!(short, Err(BenchError::TooShort { .. })));
    }
}
