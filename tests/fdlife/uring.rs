//! Descriptors by io_uring(7): a ring for one request.
//!
//! By hand: a ring of the crate owns its descriptor, which here any thread may
//! close or replace at any time.

use std::sync::atomic::Ordering::SeqCst;

use nix::libc;

use crate::calls::{self, plain, with};

/// linux/io_uring.h
const OP_OPENAT: u64 = 18;
const OP_CLOSE: u64 = 19;
const ASYNC: u64 = 1 << 4;
const FEATURE_SINGLE_MMAP: u32 = 1;
const OFFSET_REQUESTS: usize = 0x1000_0000;
/// struct io_uring_params, by words.
const FEATURES: usize = 5;
const SQ_TAIL: usize = 11;
const SQ_ARRAY: usize = 16;
const CQ_TAIL: usize = 21;
const CQ_RESULTS: usize = 25;
/// How long the result may take.
const TRIES: u32 = 4_000;
const PAUSE_US: i64 = 50;
const RING: usize = 8_192;
const REQUESTS: usize = 4_096;

/// `later`: by a thread of the kernel's.
pub fn open(path: usize, flags: usize, later: bool) -> i64 {
    let at = u64::from(libc::AT_FDCWD.cast_unsigned());
    let flags = (flags as u64) << 32;
    request(OP_OPENAT, at, path as u64, flags, later)
}

pub fn close(fd: usize, later: bool) -> i64 {
    request(OP_CLOSE, fd as u64, 0, 0, later)
}

fn request(op: u64, fd: u64, address: u64, flags: u64, later: bool) -> i64 {
    let mut params = [0u32; 30];
    let ring = with(libc::SYS_io_uring_setup, &[1], 1, &mut params);
    if ring < 0 {
        return ring;
    }
    let fd_of_ring = ring as usize;
    let ret = if params[FEATURES] & FEATURE_SINGLE_MMAP == 0 {
        i64::from(-libc::ENOSYS)
    } else {
        let options = if later { ASYNC } else { 0 };
        // struct io_uring_sqe: opcode, flags, fd; off; addr; len, open_flags.
        let sqe = [op | options << 8 | fd << 32, 0, address, flags, 1, 0, 0, 0];
        submit(fd_of_ring, &params, sqe)
    };
    calls::close(ring);
    ret
}

fn map(fd: usize, size: usize, offset: usize) -> Result<usize, i64> {
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags = (libc::MAP_SHARED | libc::MAP_POPULATE) as usize;
    match plain(libc::SYS_mmap, &[0, size, prot, flags, fd, offset]) {
        at if at < 0 => Err(at),
        at => Ok(at as usize),
    }
}

fn submit(fd: usize, params: &[u32; 30], sqe: [u64; 8]) -> i64 {
    let rings = match map(fd, RING, 0) {
        Ok(at) => at,
        Err(error) => return error,
    };
    let ret = match map(fd, REQUESTS, OFFSET_REQUESTS) {
        Ok(requests) => {
            calls::write_request(requests, sqe);
            calls::word(rings, params[SQ_ARRAY]).store(0, SeqCst);
            calls::word(rings, params[SQ_TAIL]).store(1, SeqCst);
            let ret = wait(fd, rings, params);
            plain(libc::SYS_munmap, &[requests, REQUESTS]);
            ret
        }
        Err(error) => error,
    };
    plain(libc::SYS_munmap, &[rings, RING]);
    ret
}

/// Not in the kernel: another thread may have put another ring there.
fn wait(fd: usize, rings: usize, params: &[u32; 30]) -> i64 {
    let ret = plain(libc::SYS_io_uring_enter, &[fd, 1, 0, 0, 0, 0]);
    if ret != 1 {
        return ret.min(i64::from(-libc::EBADF));
    }
    for _ in 0..TRIES {
        if calls::word(rings, params[CQ_TAIL]).load(SeqCst) != 0 {
            return calls::read_result(rings, params[CQ_RESULTS]);
        }
        calls::sleep_us(PAUSE_US);
    }
    i64::from(-libc::ETIME)
}
