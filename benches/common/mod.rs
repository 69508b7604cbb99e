//! What several benchmarks need.

/// The next state of a generator of numbers, of which the high bits are random.
pub fn next(state: u64) -> u64 {
    state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1)
}

/// Bytes that do not repeat.
pub fn noise(size: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        state = next(state);
        bytes.extend_from_slice(&(state >> 16).to_le_bytes());
    }
    bytes
}

/// Of samples, unsorted.
pub fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// How many times as long the first takes as the second, by rounds: the median,
/// and where half of them are.
pub fn ratio(first: &[f64], second: &[f64]) -> String {
    let all: Vec<f64> = first.iter().zip(second).map(|(a, b)| a / b).collect();
    let [low, middle, high] = [0.25, 0.5, 0.75].map(|share| quantile(&all, share));
    format!("{middle:.2} ({low:.2} to {high:.2})")
}
