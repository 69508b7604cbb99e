//! The performance gate: FUSE's median over the bypass's, within one run.

use std::path::PathBuf;

use serde::Serialize;

use super::{Engine, Measurement, Pattern};

/// What must hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    /// For this block size; `None`: for each that has no gate of its own.
    pub block_size: Option<usize>,
    /// How many times faster than FUSE the bypass must be.
    pub ratio: f64,
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// The clip.
    #[serde(serialize_with = "super::lossy")]
    pub path: PathBuf,
    /// The order of reads.
    pub pattern: Pattern,
    /// Bytes per read.
    pub block_size: usize,
    /// Measured: FUSE's median over the bypass's.
    pub ratio: f64,
    /// Demanded.
    pub threshold: f64,
    /// Whether it holds.
    pub pass: bool,
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
    /// Compares sequential reads, or random ones where nothing else was
    /// measured, with the gates.
    pub fn of(gates: &[Gate], results: &[Measurement]) -> Self {
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
        let checks: Vec<Check> = results
            .iter()
            .filter(|r| r.engine == Engine::Bypass && r.pattern == pattern)
            .filter_map(|r| {
                let threshold = threshold(r.block_size)?;
                let ratio = r.ratio_to_fuse?;
                Some(Check {
                    path: r.path.clone(),
                    pattern,
                    block_size: r.block_size,
                    ratio,
                    threshold,
                    pass: ratio >= threshold,
                })
            })
            .collect();
        Self {
            // No comparison is no pass.
            pass: !checks.is_empty() && checks.iter().all(|c| c.pass),
            checks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Percentiles;

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
            ratio_to_fuse: Some(ratio),
            ratio_to_raw: None,
            fuse_bytes: 0,
            sha256: String::new(),
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
        let verdict = Verdict::of(&[gate(None, 25.0), gate(Some(4096), 20.0)], &results);
        assert!(verdict.pass);
        assert_eq!(verdict.checks.len(), 2);
        let verdict = Verdict::of(&[gate(None, 25.0)], &results);
        assert!(!verdict.pass);
        assert_eq!(verdict.checks.iter().filter(|c| !c.pass).count(), 1);
        assert!(!Verdict::of(&[gate(Some(512), 1.0)], &results).pass);
        assert!(!Verdict::of(&[gate(None, 1.0)], &[]).pass);
        assert!(!Verdict::of(&[gate(None, 2.0)], &results[2..]).pass);
    }
}
