//! Pieces of a file, found by offset.

use std::ops::Deref;

use super::ranges::{Place, Ranges, Span, place};

/// Sorted spans that do not overlap, with a table of where to look for an offset: of
/// 10,000, a search alone has 14 steps, each to another place in memory, when the
/// bytes that are read take what the CPU's caches have.
#[derive(Debug)]
pub struct Pieces {
    spans: Box<[Span]>,
    /// For each part of the file of `1 << shift` bytes: the first span that ends
    /// behind its start.
    first: Box<[u32]>,
    shift: u32,
}

impl Pieces {
    /// The ranges' [pieces](Ranges::pieces), none of which crosses a multiple of
    /// `window` bytes.
    #[must_use]
    pub fn of(ranges: &Ranges, window: u64) -> Self {
        let spans = ranges.pieces(window).into_boxed_slice();
        let end = spans.last().map_or(0, |span| span.end);
        // The least parts of which there are no more than spans.
        let shift = (0..63).find(|shift| end >> shift <= spans.len() as u64);
        let shift = shift.unwrap_or(63);
        let mut index = 0;
        let parts = 0..=end >> shift;
        let first = parts.map(|part| {
            while spans
                .get(index)
                .is_some_and(|span| span.end <= part << shift)
            {
                index += 1;
            }
            index as u32
        });
        Self {
            first: first.collect(),
            shift,
            spans,
        }
    }

    /// Where an offset falls.
    #[must_use]
    pub fn place(&self, offset: u64) -> Place {
        let part = (offset >> self.shift) as usize;
        let Some(&from) = self.first.get(part) else {
            return Place::Before(u64::MAX);
        };
        // What is in this part, and the first that reaches beyond it.
        let to = match self.first.get(part + 1) {
            Some(&next) => self.spans.len().min(next as usize + 1),
            None => self.spans.len(),
        };
        let from = from as usize;
        match place(&self.spans[from..to], offset) {
            Place::In(index) => Place::In(from + index),
            before @ Place::Before(_) => before,
        }
    }
}

impl Deref for Pieces {
    type Target = [Span];

    fn deref(&self) -> &[Span] {
        &self.spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn of_nothing_all_is_before_nothing() {
        let none = Pieces::of(&Ranges::default(), 16);
        assert!(none.is_empty());
        for offset in [0, 1, u64::MAX] {
            assert_eq!(none.place(offset), Place::Before(u64::MAX));
        }
    }

    proptest! {
        /// Against the search among all spans.
        #[test]
        fn the_table_finds_what_a_search_finds(
            gaps in prop::collection::vec((0_u64..1 << 40, 1_u64..1 << 20), 0..40),
            small in prop::collection::vec((0_u64..9, 1_u64..30), 0..40),
            offsets in prop::collection::vec(0_u64..1 << 46, 20),
        ) {
            let mut at = 0;
            let mut pairs = Vec::new();
            for (gap, length) in small.into_iter().chain(gaps) {
                at += gap;
                pairs.push((at, length));
                at += length;
            }
            let ranges = Ranges::from_sorted(&pairs, u64::MAX).unwrap();
            let pieces = Pieces::of(&ranges, 1 << 19);
            prop_assert!(pieces.first.len() <= pieces.len() + 1);
            let edges = pieces.iter().flat_map(|s| [s.start.saturating_sub(1), s.start, s.end - 1, s.end]);
            for offset in edges.chain(offsets).chain([0, u64::MAX]) {
                prop_assert_eq!(pieces.place(offset), place(&pieces, offset), "{}", offset);
            }
        }
    }
}
