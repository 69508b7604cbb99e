//! The performance gate: ratios of medians, within one run, against a number or
//! against an earlier run's.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Engine, Measurement, Pattern};

/// What must hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    /// For this block size; `None`: for each that has no gate of its own.
    pub block_size: Option<usize>,
    /// How many times faster than FUSE the bypass must be.
    pub ratio: f64,
}

/// An earlier run, as `bench --format json` writes it, and how much slower than
/// then is too slow.
#[derive(Debug, Clone)]
pub struct Baseline {
    results: Vec<Earlier>,
    /// Of each ratio then, the share that may be lost: 0.1 is a tenth.
    max_regression: f64,
}

/// What is read of an earlier run's report.
#[derive(Debug, Clone, Deserialize)]
struct Report {
    results: Vec<Earlier>,
}

#[derive(Debug, Clone, Deserialize)]
struct Earlier {
    path: String,
    engine: String,
    pattern: String,
    block_size: usize,
    streams: u32,
    ratio_to_fuse: Option<f64>,
}

impl Baseline {
    /// Reads a report.
    ///
    /// # Errors
    /// Where it is none, or nothing in it was compared with FUSE.
    pub fn parse(json: &str, max_regression: f64) -> Result<Self, String> {
        let report: Report = serde_json::from_str(json).map_err(|e| e.to_string())?;
        let mut results = report.results;
        results.retain(|r| r.engine != Engine::Fuse.name() && r.ratio_to_fuse.is_some());
        if results.is_empty() {
            return Err("nothing in it was compared with fuse".into());
        }
        Ok(Self {
            results,
            max_regression,
        })
    }

    /// The ratio then. The clip is another where each run generates its own, so it
    /// is looked at only where there were several.
    fn find(&self, result: &Measurement) -> Option<f64> {
        let of_one_clip = self.results.iter().all(|r| r.path == self.results[0].path);
        let found = self.results.iter().find(|r| {
            r.engine == result.engine.name()
                && r.pattern == result.pattern.name()
                && (r.block_size, r.streams) == (result.block_size, result.streams)
                && (of_one_clip || r.path == result.path.to_string_lossy())
        });
        found?.ratio_to_fuse
    }
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// The clip.
    #[serde(serialize_with = "super::lossy")]
    pub path: PathBuf,
    /// The engine that was compared with FUSE.
    pub engine: Engine,
    /// The order of reads.
    pub pattern: Pattern,
    /// Bytes per read.
    pub block_size: usize,
    /// Readers at once.
    pub streams: u32,
    /// Measured: FUSE's median over the engine's.
    pub ratio: f64,
    /// Demanded.
    pub threshold: f64,
    /// The earlier run's ratio, where that is what it was compared with.
    pub baseline: Option<f64>,
    /// How often it was measured: again where it was missed first.
    pub tries: u32,
    /// Whether it holds.
    pub pass: bool,
}

impl Check {
    fn of(result: &Measurement, ratio: f64, threshold: f64, baseline: Option<f64>) -> Self {
        Self {
            path: result.path.clone(),
            engine: result.engine,
            pattern: result.pattern,
            block_size: result.block_size,
            streams: result.streams,
            ratio,
            threshold,
            baseline,
            tries: result.tries,
            pass: ratio >= threshold,
        }
    }
}

/// The outcome of all gates.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Whether all hold.
    pub pass: bool,
    /// One by one.
    pub checks: Vec<Check>,
}

impl Verdict {
    /// Compares sequential reads of the bypass, or random ones where nothing else
    /// was measured, with the gates; and whatever an earlier run has, with that.
    pub fn of(gates: &[Gate], baseline: Option<&Baseline>, results: &[Measurement]) -> Self {
        let sequential = results.iter().any(|r| r.pattern == Pattern::Sequential);
        let pattern = if sequential {
            Pattern::Sequential
        } else {
            Pattern::Random
        };
        let threshold = |block_size| {
            let own = gates.iter().rfind(|g| g.block_size == Some(block_size));
            let general = || gates.iter().rfind(|g| g.block_size.is_none());
            own.or_else(general).map(|g| g.ratio)
        };
        let by_gate = results
            .iter()
            .filter(|r| r.engine == Engine::Bypass && r.pattern == pattern)
            .filter_map(|r| {
                let threshold = threshold(r.block_size)?;
                Some(Check::of(r, r.ratio_to_fuse?, threshold, None))
            });
        let by_baseline = results.iter().filter_map(|r| {
            let baseline = baseline?;
            let then = baseline.find(r)?;
            let threshold = then * (1.0 - baseline.max_regression);
            Some(Check::of(r, r.ratio_to_fuse?, threshold, Some(then)))
        });
        let checks: Vec<Check> = by_gate.chain(by_baseline).collect();
        // No comparison is no pass; nor is an earlier run that has none of these.
        let compared = |with: bool| checks.iter().any(|check| check.baseline.is_some() == with);
        let all = (gates.is_empty() || compared(false)) && (baseline.is_none() || compared(true));
        Self {
            pass: all && checks.iter().all(|c| c.pass),
            checks,
        }
    }

    /// Whether a measurement was compared, and is too slow.
    pub fn missed(&self, result: &Measurement) -> bool {
        self.checks.iter().any(|check| {
            !check.pass
                && check.path == result.path
                && check.pattern == result.pattern
                && (check.block_size, check.streams) == (result.block_size, result.streams)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Percentiles, Spread};

    fn result(pattern: Pattern, block_size: usize, ratio: f64) -> Measurement {
        Measurement {
            path: "clip".into(),
            engine: Engine::Bypass,
            pattern,
            block_size,
            streams: 1,
            samples_ns: vec![1],
            open_ns: vec![1],
            percentiles: Percentiles::default(),
            bytes_per_s: 1.0,
            spread: Spread::default(),
            ratio_to_fuse: Some(ratio),
            ratio_to_fuse_range: None,
            ratio_to_raw: None,
            ratio_to_raw_range: None,
            fuse_bytes: 0,
            sha256: String::new(),
            tries: 1,
        }
    }

    #[test]
    fn a_gate_of_its_own_goes_before_the_general_one() {
        let results = [
            result(Pattern::Sequential, 4096, 20.0),
            result(Pattern::Sequential, 65_536, 30.0),
            result(Pattern::Random, 4096, 1.0),
        ];
        let gate = |block_size, ratio| Gate { block_size, ratio };
        let verdict = Verdict::of(&[gate(None, 25.0), gate(Some(4096), 20.0)], None, &results);
        assert!(verdict.pass);
        assert_eq!(verdict.checks.len(), 2);
        let verdict = Verdict::of(&[gate(None, 25.0)], None, &results);
        assert!(!verdict.pass);
        assert_eq!(verdict.checks.iter().filter(|c| !c.pass).count(), 1);
        assert!(verdict.missed(&results[0]) && !verdict.missed(&results[1]));
        assert!(!Verdict::of(&[gate(Some(512), 1.0)], None, &results).pass);
        assert!(!Verdict::of(&[gate(None, 1.0)], None, &[]).pass);
        assert!(!Verdict::of(&[gate(None, 2.0)], None, &results[2..]).pass);
    }

    #[test]
    fn an_earlier_run_is_compared_by_ratio_whatever_its_clip() {
        let row = |path: &str, engine: &str, ratio: f64| {
            serde_json::json!({
                "path": path, "engine": engine, "pattern": "sequential", "p50_ns": 1,
                "block_size": 4096, "streams": 1, "ratio_to_fuse": ratio,
            })
        };
        let report = |rows: &[_]| serde_json::json!({"schema": 1, "results": rows}).to_string();
        let results = [result(Pattern::Sequential, 4096, 18.1)];
        let verdict = |text: &str, share: f64| {
            let baseline = Baseline::parse(text, share).unwrap();
            Verdict::of(&[], Some(&baseline), &results)
        };
        let one = report(&[row("/x", "bypass", 20.0), row("/x", "fuse", 1.0)]);
        assert!(verdict(&one, 0.1).pass);
        let slower = verdict(&one, 0.05);
        assert!(!slower.pass && slower.checks[0].baseline == Some(20.0));
        assert_eq!(slower.checks.len(), 1);
        // Of other blocks it tells nothing, which is no pass.
        assert!(!verdict(&one.replace("4096", "512"), 0.1).pass);
        // Of several clips each is compared with itself.
        let two = |path| report(&[row(path, "bypass", 20.0), row("/x", "bypass", 9.0)]);
        assert!(!verdict(&two("/y"), 0.1).pass);
        assert!(verdict(&two("clip"), 0.1).pass);
        assert!(Baseline::parse(&report(&[row("/x", "fuse", 1.0)]), 0.1).is_err());
        assert!(Baseline::parse("nonsense", 0.1).is_err());
    }
}
