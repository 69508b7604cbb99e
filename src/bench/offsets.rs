//! Where random reads start.

/// Random reads of one run, at most.
const RANDOM_READS: u64 = 1_000;

/// Starts of blocks in an order that is random but the same each time, none twice.
pub(super) fn random_offsets(blocks: u64, block_size: u64) -> Vec<u64> {
    let count = blocks.min(RANDOM_READS);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        // splitmix64 (Steele, Lea and Flood, 2014)
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    // Floyd's sampling: `count` of `blocks`, each as likely.
    let mut chosen = std::collections::HashSet::new();
    let mut offsets = Vec::with_capacity(count as usize);
    for upper in blocks - count..blocks {
        let candidate = next() % (upper + 1);
        let block = if chosen.insert(candidate) {
            candidate
        } else {
            chosen.insert(upper);
            upper
        };
        offsets.push(block * block_size);
    }
    // Floyd's order leans: late blocks come late.
    for i in (1..offsets.len()).rev() {
        offsets.swap(i, (next() % (i as u64 + 1)) as usize);
    }
    offsets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_offsets_are_blocks_and_none_twice() {
        for blocks in [1, 2, 999, 1_000, 1_001, 1 << 20] {
            let offsets = random_offsets(blocks, 4096);
            let set: std::collections::HashSet<_> = offsets.iter().collect();
            assert_eq!(set.len() as u64, blocks.min(RANDOM_READS));
            assert_eq!(set.len(), offsets.len());
            assert!(offsets.iter().all(|o| o % 4096 == 0 && o / 4096 < blocks));
            assert_eq!(offsets, random_offsets(blocks, 4096));
        }
    }
}
