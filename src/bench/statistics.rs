//! Percentiles of samples.

use serde::Serialize;

/// Nearest-rank percentiles, nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Percentiles {
    /// The median.
    pub p50_ns: u64,
    /// Nine of ten samples are no larger.
    pub p90_ns: u64,
    /// 99 of 100 samples are no larger.
    pub p99_ns: u64,
}

impl Percentiles {
    /// Of any number of samples, in any order; zeros of none.
    pub fn of(samples: &[u64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let rank = |percent: usize| {
            let index = (sorted.len() * percent).div_ceil(100).max(1) - 1;
            sorted.get(index).copied().unwrap_or(0)
        };
        Self {
            p50_ns: rank(50),
            p90_ns: rank(90),
            p99_ns: rank(99),
        }
    }
}

/// How samples lie around their median.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// The median of their distances from the median, nanoseconds.
    pub mad_ns: u64,
    /// The median of all samples that could have been taken is no lower than this,
    /// with 95 % certainty; with fewer than 6 samples the least of them.
    pub low_ns: u64,
    /// Nor higher than this; else the largest.
    pub high_ns: u64,
    /// Samples that are further from the median than 7.4 times `mad_ns`.
    pub outliers: usize,
}

/// 5 standard deviations, if the samples were distributed normally.
const OUTLIER: f64 = 7.4;

impl Spread {
    /// Of any number of samples, in any order; zeros of none.
    pub fn of(samples: &[u64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else {
            return Self::default();
        };
        let p50 = Percentiles::of(&sorted).p50_ns;
        let distances: Vec<u64> = sorted.iter().map(|ns| ns.abs_diff(p50)).collect();
        let mad_ns = median(&distances);
        let limit = OUTLIER * mad_ns as f64;
        // By order statistics: how many of the samples are below the true median is
        // a binomial variable, here by its normal approximation.
        let n = sorted.len() as f64;
        let margin = 1.96 * n.sqrt() / 2.0;
        let (low, high) = if sorted.len() < 6 {
            (*first, *last)
        } else {
            let low = (n / 2.0 - margin).floor().max(0.0) as usize;
            let high = ((n / 2.0 + margin).ceil() as usize).min(sorted.len() - 1);
            (sorted[low], sorted[high])
        };
        Self {
            mad_ns,
            low_ns: low,
            high_ns: high,
            outliers: distances.iter().filter(|ns| **ns as f64 > limit).count(),
        }
    }
}

/// The median, by the nearest rank.
pub(super) fn median(samples: &[u64]) -> u64 {
    Percentiles::of(samples).p50_ns
}

/// Between which the middle half of some numbers are; `None` of none.
pub(super) fn quartiles(numbers: impl Iterator<Item = f64>) -> Option<[f64; 2]> {
    let mut sorted: Vec<f64> = numbers.collect();
    sorted.sort_by(f64::total_cmp);
    let rank = |share: f64| {
        let index = (sorted.len() as f64 * share).ceil().max(1.0) as usize - 1;
        sorted.get(index).copied()
    };
    Some([rank(0.25)?, rank(0.75)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_the_nearest() {
        let of = |samples: &[u64]| {
            let p = Percentiles::of(samples);
            (p.p50_ns, p.p90_ns, p.p99_ns)
        };
        assert_eq!(of(&[]), (0, 0, 0));
        assert_eq!(of(&[5]), (5, 5, 5));
        assert_eq!(of(&[3, 1, 2]), (2, 3, 3));
        assert_eq!(of(&[4, 3, 2, 1]), (2, 4, 4));
        let hundred: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(of(&hundred), (50, 90, 99));
    }

    #[test]
    fn the_median_is_within_its_interval_19_times_of_20() {
        use proptest::test_runner::{Config, TestRunner};
        let mut within = 0;
        let mut runner = TestRunner::new(Config::with_cases(400));
        let samples = proptest::collection::vec(0_u64..1_000_000, 21);
        let count = std::cell::Cell::new(0);
        runner
            .run(&samples, |samples| {
                let spread = Spread::of(&samples);
                assert!(spread.low_ns <= median(&samples) && median(&samples) <= spread.high_ns);
                if (spread.low_ns..=spread.high_ns).contains(&500_000) {
                    count.set(count.get() + 1);
                }
                Ok(())
            })
            .unwrap();
        within += count.get();
        assert!(within > 360, "{within} of 400");
        assert!(within < 400, "an interval that holds always tells nothing");
    }

    #[test]
    fn what_is_far_away_is_counted() {
        let spread = Spread::of(&[10, 11, 9, 10, 12, 8, 1000, 10]);
        assert_eq!((spread.mad_ns, spread.outliers), (1, 1));
        let spread = Spread::of(&[10, 20, 30, 40, 50, 60, 1000]);
        assert_eq!((spread.mad_ns, spread.outliers), (20, 1));
        assert_eq!(Spread::of(&[]), Spread::default());
        assert_eq!(Spread::of(&[7, 9]).high_ns, 9);
        assert_eq!(
            quartiles([1.0, 2.0, 3.0, 4.0].into_iter()),
            Some([1.0, 3.0])
        );
        assert_eq!(quartiles(std::iter::empty()), None);
    }
}
