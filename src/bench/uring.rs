//! The cache file by io_uring: the file and the buffers are registered, so that the
//! kernel looks neither up for each read.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use crate::aligned::AlignedBuffer;

/// Reads at once.
const DEPTH: usize = 8;
/// Bytes of all buffers, at most, unless one block has more.
const MEMORY: usize = 64 << 20;

/// A file that is read ahead, block by block.
pub(super) struct Uring {
    ring: IoUring,
    _file: File,
    size: u64,
    block_size: usize,
    /// The kernel writes to those of `begun`.
    buffers: Vec<AlignedBuffer>,
    /// Whether the kernel knows the buffers by their number.
    registered: bool,
    /// The reads under way or done, in order of their offsets.
    begun: VecDeque<Read>,
    /// Where the next one to be begun starts.
    next: u64,
    /// The buffer that was lent last.
    lent: Option<usize>,
    /// Buffers without a read.
    free: Vec<usize>,
}

struct Read {
    buffer: usize,
    offset: u64,
    result: Option<i32>,
}

impl Uring {
    /// # Errors
    /// Those of io_uring_setup(2) and io_uring_register(2): EPERM where it is
    /// switched off (`kernel.io_uring_disabled`) or filtered.
    pub(super) fn open(file: File, block_size: usize) -> io::Result<Self> {
        let depth = (MEMORY / block_size.max(1)).clamp(1, DEPTH);
        let mut buffers: Vec<_> = (0..depth).map(|_| AlignedBuffer::new(block_size)).collect();
        // Their pages are there when they are read into.
        for buffer in &mut buffers {
            buffer.fill(1);
        }
        let ring = IoUring::new(DEPTH as u32)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let parts = buffers.iter_mut().map(|buffer| nix::libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: block_size,
        });
        let parts: Vec<_> = parts.collect();
        // SAFETY: the buffers are dropped after the ring, have heap memory that no move
        // of them moves, and are read by us only while the kernel does not write to
        // them.
        let registered = match unsafe { ring.submitter().register_buffers(&parts) } {
            Ok(()) => true,
            // Beyond RLIMIT_MEMLOCK, 8 MiB by default for all rings of a user.
            Err(e) if e.raw_os_error() == Some(nix::libc::ENOMEM) => false,
            Err(e) => return Err(e),
        };
        Ok(Self {
            registered,
            ring,
            size: file.metadata()?.len(),
            _file: file,
            block_size,
            buffers,
            begun: VecDeque::new(),
            next: 0,
            lent: None,
            free: (0..depth).collect(),
        })
    }

    /// The next block, the file's last one shorter, empty at its end.
    pub(super) fn next(&mut self) -> io::Result<&[u8]> {
        self.free.extend(self.lent.take());
        if self.begun.front().is_none_or(|read| read.result.is_none()) {
            while self.next < self.size
                && let Some(buffer) = self.free.pop()
            {
                self.begin(buffer, self.next)?;
                self.next += self.block_size as u64;
            }
        }
        if self.begun.is_empty() {
            return Ok(&[]);
        }
        self.take()
    }

    /// The block at an offset; `next` goes on from behind it.
    pub(super) fn at(&mut self, offset: u64) -> io::Result<&[u8]> {
        self.free.extend(self.lent.take());
        self.settle()?;
        let ended: Vec<_> = self.begun.drain(..).map(|read| read.buffer).collect();
        self.free.extend(ended);
        let Some(buffer) = self.free.pop() else {
            return Err(io::Error::other("no buffer is free"));
        };
        self.begin(buffer, offset)?;
        self.next = offset + self.block_size as u64;
        self.take()
    }

    fn begin(&mut self, buffer: usize, offset: u64) -> io::Result<()> {
        let part = self.buffers[buffer].as_mut_ptr();
        let length = self.block_size as u32;
        let file = types::Fixed(0);
        let read = if self.registered {
            let read = opcode::ReadFixed::new(file, part, length, buffer as u16);
            read.offset(offset).build()
        } else {
            opcode::Read::new(file, part, length).offset(offset).build()
        };
        let read = read.user_data(offset);
        // SAFETY: the buffer is ours, free, and neither lent nor used for
        // another read until this one has ended, which `drop` waits for, too.
        let pushed = unsafe { self.ring.submission().push(&read) };
        pushed.map_err(io::Error::other)?;
        self.begun.push_back(Read {
            buffer,
            offset,
            result: None,
        });
        Ok(())
    }

    /// Waits for the first of the reads, and lends its bytes.
    fn take(&mut self) -> io::Result<&[u8]> {
        while self.begun.front().is_some_and(|read| read.result.is_none()) {
            self.wait()?;
        }
        let Some(read) = self.begun.pop_front() else {
            return Ok(&[]);
        };
        self.lent = Some(read.buffer);
        let result = read.result.unwrap_or_default();
        let n = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))?;
        Ok(&self.buffers[read.buffer][..n])
    }

    /// Begins what was pushed, and waits for at least one read.
    fn wait(&mut self) -> io::Result<()> {
        while let Err(e) = self.ring.submit_and_wait(1) {
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
        for done in self.ring.completion() {
            let mut reads = self.begun.iter_mut();
            let read = reads.find(|read| read.offset == done.user_data() && read.result.is_none());
            if let Some(read) = read {
                read.result = Some(done.result());
            }
        }
        Ok(())
    }

    /// Waits for all reads.
    fn settle(&mut self) -> io::Result<()> {
        while self.begun.iter().any(|read| read.result.is_none()) {
            self.wait()?;
        }
        Ok(())
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel is not to write to memory that is another's by then.
        if self.settle().is_err() {
            std::mem::forget(std::mem::take(&mut self.buffers));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn blocks_come_in_order_and_from_anywhere() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i / 7 % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        for block_size in [512, 4096, 99_999, 1 << 20] {
            let mut ring = Uring::open(file.try_clone().unwrap(), block_size).unwrap();
            for _ in 0..2 {
                let mut all = Vec::new();
                all.extend_from_slice(ring.at(0).unwrap());
                loop {
                    let block = ring.next().unwrap();
                    if block.is_empty() {
                        break;
                    }
                    all.extend_from_slice(block);
                }
                assert!(all == bytes, "{block_size}");
            }
            let end = ring.at(99_999).unwrap();
            assert_eq!(end, &bytes[99_999..]);
            // Left with reads under way.
            ring.at(0).unwrap();
            ring.next().unwrap();
        }
    }
}
