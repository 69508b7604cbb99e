//! Descriptors that a supervisor gives by seccomp(2).

use std::ptr::from_mut;
use std::sync::atomic::Ordering::SeqCst;

use nix::libc;

use crate::calls::{self, Fork, close, plain, with, with_path};
use crate::control::Slot;
use crate::ops::take_from;
use crate::worker::Loop;

/// The mode of an openat(2) that the supervisor answers; others are made.
const MARK: u32 = 0x5ecc;
/// How long either waits for the other.
const TRIES: u32 = 10_000;
const PAUSE_US: i64 = 100;
const NOTIFY_RECV: usize = 0xc050_2100;
const NOTIFY_SEND: usize = 0xc018_2101;
const NOTIFY_ADDFD: usize = 0x4018_2103;

fn wait_for(is_so: impl Fn() -> bool) -> bool {
    for _ in 0..TRIES {
        if is_so() {
            return true;
        }
        calls::sleep_us(PAUSE_US);
    }
    false
}

/// Makes a child and answers one of its opens; `send`: by the descriptor itself.
pub fn given(own: &mut Loop, send: bool) -> ([i64; 2], i64) {
    let control = own.control;
    let (pid, slot) = own.fork(Fork::Plain);
    if pid < 0 {
        return ([0, 0], pid);
    }
    if pid == 0 {
        return ([0, 0], ask(own));
    }
    let slot = &control.slots[slot];
    ([pid, i64::from(send)], answer(own, pid as i32, slot, send))
}

/// As the child: has its open answered.
fn ask(own: &mut Loop) -> i64 {
    let slot = &own.control.slots[own.slot];
    let listener = listen();
    slot.listener
        .store(if listener < 0 { 0 } else { listener as i32 }, SeqCst);
    if listener < 0 {
        return listener;
    }
    wait_for(|| slot.fetched.load(SeqCst) != 0);
    // Without the supervisor there is an error then, and no wait for ever.
    close(listener);
    calls::interrupt(true);
    let args = [libc::AT_FDCWD as usize, own.clip(), 0, MARK as usize];
    let ret = with_path(libc::SYS_openat, &args);
    calls::interrupt(false);
    ret
}

fn listen() -> i64 {
    let load = |offset| libc::sock_filter {
        code: 0x20,
        jt: 0,
        jf: 0,
        k: offset,
    };
    let unless = |value, skip| libc::sock_filter {
        code: 0x15,
        jt: 0,
        jf: skip,
        k: value,
    };
    let ret = |value| libc::sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: value,
    };
    // struct seccomp_data: the call at 0, its fourth argument at 40.
    let mut filter = [
        load(0),
        unless(libc::SYS_openat as u32, 3),
        load(40),
        unless(MARK, 1),
        ret(libc::SECCOMP_RET_USER_NOTIF),
        ret(libc::SECCOMP_RET_ALLOW),
    ];
    let mut program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: from_mut(&mut filter).cast(),
    };
    let mode = libc::SECCOMP_SET_MODE_FILTER as usize;
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as usize;
    with(libc::SYS_seccomp, &[mode, flags], 2, &mut program)
}

/// As the supervisor.
fn answer(own: &mut Loop, pid: i32, slot: &Slot, send: bool) -> i64 {
    wait_for(|| slot.listener.load(SeqCst) >= 0);
    let theirs = slot.listener.load(SeqCst);
    let listener = take_from(pid, theirs.max(0) as usize);
    slot.fetched.store(1, SeqCst);
    if listener < 0 || theirs <= 0 {
        return listener.min(i64::from(-libc::ENOSYS));
    }
    let ret = answer_by(own, listener as usize, send);
    close(listener);
    ret
}

fn answer_by(own: &mut Loop, listener: usize, send: bool) -> i64 {
    // struct pollfd: the descriptor, POLLIN.
    let mut poll = [listener as u64 | 1 << 32];
    let mut second = [1i64, 0];
    let second = from_mut(&mut second).addr();
    if with(libc::SYS_ppoll, &[0, 1, second, 0, 0], 0, &mut poll) != 1 {
        return i64::from(-libc::ETIME);
    }
    // struct seccomp_notif: the id first.
    let mut asked = [0u64; 10];
    let ret = with(libc::SYS_ioctl, &[listener, NOTIFY_RECV], 2, &mut asked);
    if ret < 0 {
        return ret;
    }
    let (clip, flags) = (own.clip(), own.cloexec() as usize);
    let file = with_path(libc::SYS_openat, &[libc::AT_FDCWD as usize, clip, flags]);
    let set = own.random.one_in(2);
    let mut how = if set {
        libc::SECCOMP_ADDFD_FLAG_SETFD
    } else {
        0
    };
    if send {
        how |= libc::SECCOMP_ADDFD_FLAG_SEND;
    }
    let number = if set { own.number() as u64 } else { 0 };
    // struct seccomp_notif_addfd: id; flags, srcfd; newfd, newfd_flags.
    let options = own.cloexec() as u64;
    let mut gift = [asked[0], how | (file as u64) << 32, number | options << 32];
    let ret = with(libc::SYS_ioctl, &[listener, NOTIFY_ADDFD], 2, &mut gift);
    if !send || ret < 0 {
        // struct seccomp_notif_resp: id; val; error, flags.
        let mut answer = [asked[0], ret.max(0) as u64, 0];
        with(libc::SYS_ioctl, &[listener, NOTIFY_SEND], 2, &mut answer);
    }
    if file >= 0 {
        plain(libc::SYS_close, &[file as usize]);
    }
    ret
}
