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
}
