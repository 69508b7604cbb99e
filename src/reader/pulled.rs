//! What a reader has brought into the cache itself, by reading through FUSE:
//! rclone's metadata shows it only after the last close.

use std::sync::{Mutex, PoisonError};

use crate::cache::ranges::{Place, Ranges, Span, place};

/// Ranges that were read through FUSE while one data file was proven.
#[derive(Default)]
pub(super) struct Pulled(Mutex<Ranges>);

impl Pulled {
    /// Adds what was read; neighbours grow together.
    pub(super) fn add(&self, span: Span) {
        if span.start >= span.end {
            return;
        }
        let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spans.insert(span);
    }

    /// Where `offset` falls: the inner part of a range that holds it, or where
    /// the next one begins. See [`Span::inner`].
    pub(super) fn find(&self, offset: u64, block: u64) -> Result<Span, u64> {
        let pulled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let spans = pulled.spans();
        let index = match place(spans, offset) {
            Place::In(index) => index,
            Place::Before(next) => return Err(next),
        };
        match spans[index].inner(block) {
            Some(inner) if inner.start <= offset && offset < inner.end => Ok(inner),
            Some(inner) if offset < inner.start => Err(inner.start),
            _ => Err(spans.get(index + 1).map_or(u64::MAX, |next| next.start)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a bitmap.
        #[test]
        fn what_is_found_was_pulled(
            reads in prop::collection::vec((0u64..200, 0u64..40), 0..20),
            block in 1u64..9,
        ) {
            let pulled = Pulled::default();
            let mut model = [false; 260];
            for (start, length) in reads {
                pulled.add(Span { start, end: start + length });
                model[start as usize..(start + length) as usize].fill(true);
            }
            let spans = pulled.0.lock().unwrap().spans().to_vec();
            prop_assert!(spans.windows(2).all(|s| s[0].end < s[1].start));
            for offset in 0..250u64 {
                match pulled.find(offset, block) {
                    Ok(span) => {
                        prop_assert!(span.start <= offset && offset < span.end);
                        // Its neighbouring blocks were pulled, too.
                        let around = (span.start - block) as usize..(span.end + block) as usize;
                        prop_assert!(model[around].iter().all(|b| *b));
                    }
                    Err(next) => {
                        prop_assert!(next > offset);
                        let inner = spans.iter().filter_map(|s| s.inner(block));
                        prop_assert!(!inner.clone().any(|s| s.start <= offset && offset < s.end));
                        // Nothing that could be read is skipped over.
                        prop_assert!(!inner.clone().any(|s| s.start >= offset && s.start < next));
                    }
                }
            }
        }
    }
}
