//! Buffers that begin at a page.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Bytes of a page, on every machine at least a divisor of one.
const PAGE: usize = 4096;

/// A buffer that begins at a page, of zeroes at first: into one, reads of whole
/// blocks of a file are as fast as the processor copies.
///
/// Where a buffer begins 16 bytes behind a page, as `vec![0; 1 << 20]` does, since
/// malloc(3) keeps its notes there, AMD's Zen 3 and 4 copy at a quarter of the
/// speed: their `rep movsb`, by which the kernel copies to programs, is slow where
/// the target's place in its page is a little behind the source's. The same holds
/// for read(2) of any file. See `docs/BENCHMARKING.md`.
///
/// ```
/// use vmafx_bypass::AlignedBuffer;
///
/// let mut block = AlignedBuffer::new(64 << 10);
/// assert_eq!(block.as_ptr() as usize % 4096, 0);
/// block[0] = 1;
/// ```
#[derive(Default)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// A buffer of so many bytes.
    #[must_use]
    pub fn new(length: usize) -> Self {
        let memory = vec![0; length + PAGE - 1];
        Self {
            start: memory.as_ptr().align_offset(PAGE),
            memory,
            length,
        }
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuffer")
            .field("len", &self.length)
            .finish_non_exhaustive()
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_page_and_has_its_length() {
        for length in [0, 1, 4095, 4096, 1 << 20] {
            let mut buffer = AlignedBuffer::new(length);
            assert_eq!(buffer.len(), length);
            assert_eq!(buffer.as_ptr() as usize % PAGE, 0);
            buffer.fill(7);
            assert!(buffer.iter().all(|byte| *byte == 7));
        }
        assert!(AlignedBuffer::default().is_empty());
    }
}
