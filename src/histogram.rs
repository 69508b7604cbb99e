//! Durations, counted by their size; plain atomics, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The buckets' upper bounds, microseconds: 0.1 ms to 10 s. What takes longer is in
/// one more.
const BOUNDS_US: [u64; 16] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000,
];

/// Counts durations.
#[derive(Default)]
pub(crate) struct Histogram {
    counts: [AtomicU64; BOUNDS_US.len() + 1],
    sum_ns: AtomicU64,
}

/// How long things took, so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Durations {
    /// Upper bounds, seconds, the last one infinite, each with the number of
    /// durations up to it that are over the bound before.
    pub buckets: Vec<(f64, u64)>,
    /// All of them together, seconds.
    pub sum: f64,
}

impl Durations {
    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }
}

impl Histogram {
    pub(crate) fn add(&self, duration: Duration) {
        let within = |bound: &&u64| duration <= Duration::from_micros(**bound);
        let place = BOUNDS_US.iter().position(|bound| within(&bound));
        let place = place.unwrap_or(BOUNDS_US.len());
        self.counts[place].fetch_add(1, Ordering::Relaxed);
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Durations {
        let bounds = BOUNDS_US.iter().map(|us| *us as f64 / 1e6);
        let counts = self.counts.iter().map(|n| n.load(Ordering::Relaxed));
        Durations {
            buckets: bounds.chain([f64::INFINITY]).zip(counts).collect(),
            sum: self.sum_ns.load(Ordering::Relaxed) as f64 / 1e9,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_first_bucket_that_it_fits() {
        let histogram = Histogram::default();
        let times = [0, 100, 101, 10_000_000, 10_000_001, 1 << 40];
        for us in times {
            histogram.add(Duration::from_micros(us));
        }
        let durations = histogram.snapshot();
        let filled: Vec<_> = durations.buckets.iter().filter(|b| b.1 > 0).collect();
        let expected = [(0.0001, 2), (0.000_25, 1), (10.0, 1), (f64::INFINITY, 2)];
        assert!(filled.into_iter().eq(&expected));
        assert_eq!(durations.count(), times.len() as u64);
        let sum: u64 = times.iter().sum();
        assert!((durations.sum - sum as f64 / 1e6).abs() < 1e-3);
        assert!(
            durations
                .buckets
                .windows(2)
                .all(|pair| pair[0].0 < pair[1].0)
        );
    }
}
