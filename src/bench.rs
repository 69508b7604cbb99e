//! Compares the ways to read a clip: the rclone mount, the bypass, and the
//! cache file itself, interleaved in one run on the same warm clip.
//!
//! Each engine first reads the clip once to be checksummed, which also warms
//! it. Then every run opens it anew, as a program would, since an open drops
//! FUSE's page cache; opening is timed apart from reading. Nothing here prints.

mod case;
mod child;
mod engine;
mod gate;
mod offsets;
mod plan;
#[cfg(feature = "mount")]
mod remount;
mod statistics;
mod uring;

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use gate::{Baseline, Check, Gate, Verdict};
pub use plan::{Engine, Pattern, Plan, Tuned};
pub use statistics::{Percentiles, Spread};

use case::Case;
use engine::Ways;

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
    /// Every sample in order, nanoseconds: of a whole clip if sequential, by all
    /// readers; of one read if random, of an open and one read if open.
    pub samples_ns: Vec<u64>,
    /// Every open, nanoseconds; not part of the samples.
    pub open_ns: Vec<u64>,
    /// Of the samples.
    #[serde(flatten)]
    pub percentiles: Percentiles,
    /// Of the samples.
    pub spread: Spread,
    /// By the median sample, of all readers.
    pub bytes_per_s: f64,
    /// FUSE's median over this one's: how many times faster this is.
    pub ratio_to_fuse: Option<f64>,
    /// Where the middle half of the runs have it, each compared with FUSE's run of
    /// its round.
    pub ratio_to_fuse_range: Option<[f64; 2]>,
    /// The raw file's median over this one's: 1 is as fast.
    pub ratio_to_raw: Option<f64>,
    /// Likewise.
    pub ratio_to_raw_range: Option<[f64; 2]>,
    /// Bytes that did not come from the cache, over all runs; of engines that tell.
    pub fuse_bytes: u64,
    /// Of the bytes read, in hexadecimal.
    pub sha256: String,
    /// How often it was measured; this is the last time's.
    pub tries: u32,
}

/// What was measured.
#[derive(Debug)]
pub struct Results {
    /// In the plan's order.
    pub measurements: Vec<Measurement>,
    /// What could not be, where [`Plan::leave_out`] allows that.
    pub left_out: Vec<LeftOut>,
}

/// An engine that cannot run here.
#[derive(Debug, Clone, Serialize)]
pub struct LeftOut {
    /// For this clip.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// Which.
    pub engine: Engine,
    /// One line.
    pub why: String,
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

impl BenchError {
    /// Why an engine cannot run, without what is known.
    fn why(self) -> String {
        match self {
            Self::Engine { why, .. } => why,
            Self::NotBypassed { refusal, .. } => refusal.to_string(),
            other => other.to_string(),
        }
    }
}

/// Measures a plan. `progress` is told before each group of engines what comes
/// next; `stop` is asked between runs whether to go on.
///
/// # Errors
/// The first clip that cannot be measured, engines that read different bytes,
/// or a stop.
pub fn measure(
    plan: &Plan,
    progress: impl FnMut(&Path, Pattern, usize),
    stop: impl FnMut() -> bool,
) -> Result<Results, BenchError> {
    measure_where(plan, |_, _, _, _| true, progress, stop)
}

/// Measures again what was too slow, in place of what was measured: a busy moment
/// is no regression. True where something was.
///
/// # Errors
/// As of [`measure`].
pub fn measure_again(
    plan: &Plan,
    verdict: &Verdict,
    results: &mut [Measurement],
    progress: impl FnMut(&Path, Pattern, usize),
    stop: impl FnMut() -> bool,
) -> Result<bool, BenchError> {
    let missed: Vec<_> = results
        .iter()
        .filter(|result| verdict.missed(result))
        .map(|r| (r.path.clone(), r.pattern, r.block_size, r.streams))
        .collect();
    let wanted = |clip: &Path, pattern, block_size, streams| {
        missed.iter().any(|(path, of, size, readers)| {
            path == clip && (*of, *size, *readers) == (pattern, block_size, streams)
        })
    };
    for new in measure_where(plan, wanted, progress, stop)?.measurements {
        let old = results.iter_mut().find(|old| {
            (&old.path, old.engine, old.pattern) == (&new.path, new.engine, new.pattern)
                && (old.block_size, old.streams) == (new.block_size, new.streams)
        });
        if let Some(old) = old {
            let tries = old.tries + 1;
            *old = Measurement { tries, ..new };
        }
    }
    Ok(!missed.is_empty())
}

fn measure_where(
    plan: &Plan,
    wanted: impl Fn(&Path, Pattern, usize, u32) -> bool,
    mut progress: impl FnMut(&Path, Pattern, usize),
    mut stop: impl FnMut() -> bool,
) -> Result<Results, BenchError> {
    let mut results = Results {
        measurements: Vec::new(),
        left_out: Vec::new(),
    };
    for clip in &plan.clips {
        let mut ways = Ways::new(clip, plan);
        let mut engines = Vec::new();
        for &engine in &plan.engines {
            if stop() {
                return Err(BenchError::Stopped);
            }
            match ways.prepare(engine) {
                Ok(()) => engines.push(engine),
                Err(error) if plan.leave_out => results.left_out.push(LeftOut {
                    path: clip.clone(),
                    engine,
                    why: error.why(),
                }),
                Err(error) => return Err(error),
            }
        }
        for &pattern in &plan.patterns {
            for &block_size in &plan.block_sizes {
                for &streams in &plan.streams {
                    if !wanted(clip, pattern, block_size, streams) {
                        continue;
                    }
                    progress(clip, pattern, block_size);
                    let case = Case::new(clip, pattern, block_size, streams, plan.cold, &ways)?;
                    let measured = loop {
                        match case.measure(&engines, plan.runs, &mut stop) {
                            // Of others it is to be told what they have.
                            Err(BenchError::Engine { path, engine, why }) if plan.leave_out => {
                                let Some(at) = engines.iter().position(|e| e.name() == engine)
                                else {
                                    continue;
                                };
                                let engine = engines.remove(at);
                                results.left_out.push(LeftOut { path, engine, why });
                            }
                            measured => break measured?,
                        }
                    };
                    results.measurements.extend(measured);
                }
            }
        }
    }
    Ok(results)
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
            leave_out: false,
            patterns: vec![Pattern::Sequential, Pattern::Random, Pattern::Open],
            block_sizes: vec![4096],
            streams: vec![1],
            runs: 3,
            cold: false,
            socket: None,
            tuned: None,
            program: None,
        };
        let measured =
            |plan: &Plan| measure(plan, |_, _, _| {}, || false).map(|results| results.measurements);
        let results = measured(&plan).unwrap();
        assert_eq!(results.len(), 6);
        assert_eq!(results[4].samples_ns.len(), 3 * 24);
        assert_eq!(results[4].open_ns.len(), 3 * 24);
        assert_eq!(results[0].samples_ns.len(), 3);
        assert_eq!(results[2].samples_ns.len(), 3 * 24);
        assert_eq!(results[0].sha256, results[1].sha256);
        assert_eq!(results[1].fuse_bytes, 300_000);
        assert_eq!(results[0].ratio_to_fuse, Some(1.0));
        assert_eq!(results[0].ratio_to_raw, None);
        assert_eq!(results[1].ratio_to_fuse_range.unwrap().len(), 2);
        plan.streams = vec![3];
        let three = measured(&plan).unwrap();
        assert_eq!(three[0].samples_ns.len(), 3);
        assert_eq!(three[0].open_ns.len(), 9);
        assert_eq!(three[2].samples_ns.len(), 3 * 3 * 24);
        assert_eq!(three[1].fuse_bytes, 900_000);
        assert_eq!(three[0].sha256, results[0].sha256);
        let stopped = measure(&plan, |_, _, _| {}, || true);
        assert!(matches!(stopped, Err(BenchError::Stopped)));
        plan.engines = vec![Engine::Raw];
        assert!(matches!(
            measured(&plan),
            Err(BenchError::NotBypassed { .. })
        ));
        plan.engines = Engine::ALL.to_vec();
        plan.leave_out = true;
        let results = measure(&plan, |_, _, _| {}, || false).unwrap();
        let left_out: Vec<_> = results.left_out.iter().map(|left| left.engine).collect();
        for engine in Engine::ALL {
            let runs = [Engine::Fuse, Engine::Bypass, Engine::Bufread, Engine::Copy];
            assert_eq!(
                left_out.contains(engine),
                !runs.contains(engine),
                "{engine:?}"
            );
            assert_eq!(
                results.measurements.iter().any(|m| m.engine == *engine),
                runs.contains(engine)
            );
        }
        plan.leave_out = false;
        plan.engines = vec![Engine::Fuse];
        plan.block_sizes = vec![1 << 20];
        assert!(matches!(measured(&plan), Err(BenchError::TooShort { .. })));
    }
}
