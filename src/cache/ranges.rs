//! Sets of byte ranges, split into pieces that are proven one by one.

/// A half-open range of byte offsets, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// One beyond the last byte.
    pub end: u64,
}

impl Span {
    /// The whole blocks of the span without its first and its last one: a block
    /// at the edge of what was written may hold other bytes in part, so the
    /// neighbours of what is left are there, too. `None` where nothing is left.
    #[must_use]
    pub fn inner(self, block: u64) -> Option<Self> {
        let start = self
            .start
            .checked_next_multiple_of(block)?
            .checked_add(block)?;
        let end = (self.end / block).checked_sub(1)? * block;
        (start < end).then_some(Self { start, end })
    }
}

/// Sorted ranges that neither overlap nor are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Span>);

impl Ranges {
    /// Takes `(position, length)` pairs that must be sorted, apart from each
    /// other or adjacent, and not empty; `None` where they are not, or where an
    /// end overflows. What lies at or beyond `limit` is cut off: rclone's
    /// ranges may exceed the file (its downloads are in whole chunks).
    #[must_use]
    pub fn from_sorted(pairs: &[(u64, u64)], limit: u64) -> Option<Self> {
        let mut spans: Vec<Span> = Vec::with_capacity(pairs.len());
        let mut last_end = 0;
        for &(start, length) in pairs {
            let end = start.checked_add(length)?;
            if length == 0 || start < last_end {
                return None;
            }
            last_end = end;
            let end = end.min(limit);
            if start >= end {
                continue;
            }
            match spans.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => spans.push(Span { start, end }),
            }
        }
        Some(Self(spans))
    }

    /// The ranges in order.
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.0
    }

    /// Bytes in all ranges.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|s| s.end - s.start).sum()
    }

    /// The first offset in the set.
    #[must_use]
    pub fn first(&self) -> Option<u64> {
        self.0.first().map(|s| s.start)
    }

    /// [`Span::inner`] of every range.
    #[must_use]
    pub fn inner(&self, block: u64) -> Self {
        Self(self.0.iter().filter_map(|s| s.inner(block)).collect())
    }

    /// What the set lacks of the bytes up to `size`.
    #[must_use]
    pub fn missing(&self, size: u64) -> Self {
        let mut spans = Vec::new();
        let mut at = 0;
        for span in &self.0 {
            let end = span.start.min(size);
            if at < end {
                spans.push(Span { start: at, end });
            }
            at = span.end;
        }
        if at < size {
            spans.push(Span {
                start: at,
                end: size,
            });
        }
        Self(spans)
    }

    /// Adds a range, joined with those that it meets.
    pub fn insert(&mut self, span: Span) {
        let from = self.0.partition_point(|s| s.end < span.start);
        let to = self.0.partition_point(|s| s.start <= span.end);
        let met = &self.0[from..to];
        let joined = Span {
            start: met.first().map_or(span.start, |s| s.start.min(span.start)),
            end: met.last().map_or(span.end, |s| s.end.max(span.end)),
        };
        self.0.splice(from..to, [joined]);
    }

    /// The same set in spans that cross no multiple of `window`.
    #[must_use]
    pub fn pieces(&self, window: u64) -> Vec<Span> {
        let mut pieces = Vec::new();
        for span in &self.0 {
            let mut start = span.start;
            while start < span.end {
                let end = (start / window + 1).saturating_mul(window).min(span.end);
                pieces.push(Span { start, end });
                start = end;
            }
        }
        pieces
    }
}

/// Where an offset falls among sorted spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the span of this index.
    In(usize),
    /// In no span; the next one starts here (`u64::MAX`: none follows).
    Before(u64),
}

/// Finds `offset` in sorted spans that do not overlap.
#[must_use]
pub fn place(spans: &[Span], offset: u64) -> Place {
    let index = spans.partition_point(|s| s.end <= offset);
    match spans.get(index) {
        Some(span) if span.start <= offset => Place::In(index),
        Some(span) => Place::Before(span.start),
        None => Place::Before(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_what_rclone_never_writes() {
        for bad in [
            &[(0, 0)][..],
            &[(10, 5), (0, 5)],
            &[(0, 10), (9, 5)],
            &[(u64::MAX, 2)],
        ] {
            assert_eq!(Ranges::from_sorted(bad, u64::MAX), None, "{bad:?}");
        }
    }

    #[test]
    fn joins_neighbours_and_cuts_at_the_limit() {
        let ranges = Ranges::from_sorted(&[(0, 4), (4, 4), (16, 100), (200, 1)], 20).unwrap();
        assert_eq!(
            ranges.spans(),
            [Span { start: 0, end: 8 }, Span { start: 16, end: 20 }]
        );
        assert_eq!(ranges.bytes(), 12);
    }

    #[test]
    fn the_inner_part_has_whole_blocks_and_neighbours() {
        let inner = |start, end| Span { start, end }.inner(4).map(|s| (s.start, s.end));
        assert_eq!(inner(0, 12), Some((4, 8)));
        assert_eq!(inner(1, 15), Some((8, 8)).filter(|(a, b)| a < b));
        assert_eq!(inner(1, 17), Some((8, 12)));
        assert_eq!(inner(0, 8), None);
        assert_eq!(inner(0, 3), None);
        assert_eq!(inner(u64::MAX - 2, u64::MAX), None);
    }

    #[test]
    fn what_is_missing_ends_at_the_size() {
        let ranges = Ranges::from_sorted(&[(4, 4), (16, 4)], 100).unwrap();
        let missing = |size| {
            let spans = ranges.missing(size);
            let pairs: Vec<_> = spans.spans().iter().map(|s| (s.start, s.end)).collect();
            pairs
        };
        assert_eq!(missing(0), []);
        assert_eq!(missing(3), [(0, 3)]);
        assert_eq!(missing(6), [(0, 4)]);
        assert_eq!(missing(20), [(0, 4), (8, 16)]);
        assert_eq!(missing(30), [(0, 4), (8, 16), (20, 30)]);
        assert_eq!(
            Ranges::default().missing(u64::MAX).bytes(),
            u64::MAX,
            "of nothing, all is missing"
        );
    }

    /// The set of a bitmap's bits.
    fn of_bits(bits: &[bool]) -> Ranges {
        let pairs: Vec<(u64, u64)> = (0..bits.len() as u64).zip(std::iter::repeat(1)).collect();
        let set: Vec<_> = pairs
            .into_iter()
            .filter(|(at, _)| bits[*at as usize])
            .collect();
        Ranges::from_sorted(&set, u64::MAX).unwrap()
    }

    proptest! {
        /// Against a bitmap: what is missing is what is not there.
        #[test]
        fn missing_is_the_complement(bits: [bool; 32], size in 0usize..40) {
            let mut wanted: Vec<bool> = bits.iter().map(|bit| !bit).collect();
            wanted.resize(40, true);
            wanted.truncate(size);
            prop_assert_eq!(of_bits(&bits).missing(size as u64), of_bits(&wanted));
        }

        /// Against a bitmap: what was inserted is there, in the one right form.
        #[test]
        fn insert_is_the_union(bits: [bool; 32], start in 0usize..31, length in 1usize..32) {
            let mut ranges = of_bits(&bits);
            let end = (start + length).min(32);
            ranges.insert(Span { start: start as u64, end: end as u64 });
            let mut wanted = bits;
            wanted[start..end].fill(true);
            prop_assert_eq!(ranges, of_bits(&wanted));
        }

        /// Against a bitmap: pieces hold exactly the set, in windows.
        #[test]
        fn pieces_are_the_set(
            gaps in prop::collection::vec((0u64..9, 1u64..30), 0..12),
            limit in 0u64..200,
            window in 1u64..40,
        ) {
            let mut at = 0;
            let mut pairs = Vec::new();
            let mut model = vec![false; 600];
            for (gap, length) in gaps {
                at += gap;
                pairs.push((at, length));
                for bit in &mut model[at as usize..(at + length) as usize] {
                    *bit = true;
                }
                at += length;
            }
            for bit in &mut model[limit as usize..] {
                *bit = false;
            }
            let ranges = Ranges::from_sorted(&pairs, limit).unwrap();
            let pieces = ranges.pieces(window);
            prop_assert_eq!(ranges.bytes(), model.iter().filter(|b| **b).count() as u64);
            for piece in &pieces {
                prop_assert!(piece.start < piece.end);
                prop_assert_eq!(piece.start / window, (piece.end - 1) / window);
            }
            for (offset, present) in model.iter().enumerate() {
                match place(&pieces, offset as u64) {
                    Place::In(i) => {
                        prop_assert!(*present);
                        let piece = pieces[i];
                        prop_assert!(piece.start <= offset as u64 && (offset as u64) < piece.end);
                    }
                    Place::Before(next) => {
                        prop_assert!(!present);
                        let expected = model[offset..].iter().position(|b| *b);
                        prop_assert_eq!(
                            next,
                            expected.map_or(u64::MAX, |i| (offset + i) as u64)
                        );
                    }
                }
            }
        }
    }
}
