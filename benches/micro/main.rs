//! What the hot paths cost, by size: see docs/BENCHMARKING.md.
//!
//! Memory alone, and one fstat(2) to compare with: no mount and no rights are needed.
#![allow(missing_docs)]

mod metadata;
mod proof;
mod tracker;

use std::time::Duration;

use criterion::Criterion;

/// How many ranges a clip is cached in.
const RANGES: [u64; 3] = [1, 100, 10_000];
/// How long each range is, and as far from the next, bytes.
const RANGE: u64 = 1 << 20;

/// Position and length of so many ranges.
fn ranges(count: u64) -> Vec<(u64, u64)> {
    (0..count).map(|index| (index * 2 * RANGE, RANGE)).collect()
}

/// Numbers that do not repeat, and that cost next to nothing to make.
struct Numbers(u64);

impl Numbers {
    /// The next one below `limit`. `mixed` goes into it: given what the last search has
    /// found, the CPU cannot begin the next one before that.
    fn next(&mut self, limit: u64, mixed: u64) -> u64 {
        let state = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = state.wrapping_add(mixed | 1);
        ((u128::from(self.0) * u128::from(limit)) >> 64) as u64
    }
}

fn main() {
    // Two minutes for all; what `cargo bench` was given goes before. Its text
    // is what is wanted, and pictures need other programs.
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .without_plots()
        .configure_from_args();
    proof::lookup(&mut criterion);
    proof::pieces(&mut criterion);
    proof::prove(&mut criterion);
    metadata::parse(&mut criterion);
    tracker::decode(&mut criterion);
    tracker::table(&mut criterion);
    criterion.final_summary();
}
