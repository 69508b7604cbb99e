//! System calls of processes and signals that nix does not offer safely.

use std::ffi::{c_int, c_uint};
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::ptr;
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{SigAction, SigSet, Signal};
use nix::unistd::{ForkResult, Pid};

/// fork(2). The caller has one thread, so that the child may do anything.
pub(super) fn fork() -> io::Result<ForkResult> {
    // SAFETY: no lock is held by another thread, since there is none.
    Ok(unsafe { nix::unistd::fork() }?)
}

/// Ends a forked process without what the parent has registered for its end.
pub(super) fn leave() -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

/// A descriptor that becomes readable when the process ends.
pub(super) fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Makes a standard descriptor another's duplicate.
pub(super) fn replace(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    // SAFETY: 0 to 2 have no owner in this program.
    if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Closes all descriptors from 3 on but some, of a process that was just forked
/// and uses no other any more.
pub(super) fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<c_uint> = keep.iter().map(|fd| *fd as c_uint).collect();
    keep.sort_unstable();
    let mut first: c_uint = 3;
    for fd in keep.into_iter().chain([c_uint::MAX]) {
        if fd > first {
            // SAFETY: their owners belong to the parent's code, which does not
            // run in this process any more.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1).max(first);
    }
}

/// What the child tells before it becomes the command.
#[derive(Debug)]
pub(super) struct Word {
    /// Why there is no listener; 0 where there is.
    pub(super) errno: c_int,
    /// Whether no_new_privs had to be set.
    pub(super) no_new_privs: bool,
    pub(super) listener: Option<OwnedFd>,
}

/// Room for one descriptor beside a message.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Sends a [`Word`]. For a child between fork and exec: it allocates nothing.
pub(super) fn send(door: RawFd, errno: c_int, no_new_privs: bool, listener: Option<RawFd>) {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&errno.to_ne_bytes());
    bytes[4] = no_new_privs.into();
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control([0; 64]);
    // SAFETY: all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if let Some(fd) = listener {
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: arithmetic.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as _;
        // SAFETY: `control` is aligned and has room for a header and one int.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as _;
            ptr::write_unaligned(libc::CMSG_DATA(header).cast(), fd);
        }
    }
    // SAFETY: all that the message points to lives during the call. The
    // receiver sees an end where it fails.
    unsafe { libc::sendmsg(door, &raw const message, libc::MSG_NOSIGNAL) };
}

/// Waits for a [`Word`]; `None` when nobody can send one any more.
pub(super) fn receive(door: BorrowedFd<'_>) -> io::Result<Option<Word>> {
    let mut bytes = [0; 8];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control([0; 64]);
    // SAFETY: all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: arithmetic.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as _;
    let length = loop {
        // SAFETY: all that the message points to lives during the call.
        let length =
            unsafe { libc::recvmsg(door.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        if length >= 0 {
            break length as usize;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    };
    // SAFETY: the kernel has filled `control` as the header says.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    let mut listener = None;
    // SAFETY: null, or a header within `control`.
    if let Some(header) = unsafe { header.as_ref() }
        && header.cmsg_level == libc::SOL_SOCKET
        && header.cmsg_type == libc::SCM_RIGHTS
    {
        // SAFETY: there is room for one int only, which the kernel has filled
        // with a descriptor that it has just opened for us.
        listener = Some(unsafe {
            let fd: RawFd = ptr::read_unaligned(libc::CMSG_DATA(header).cast());
            OwnedFd::from_raw_fd(fd)
        });
    }
    if length < bytes.len() {
        return Ok(None);
    }
    let [a, b, c, d, no_new_privs, ..] = bytes;
    Ok(Some(Word {
        errno: c_int::from_ne_bytes([a, b, c, d]),
        no_new_privs: no_new_privs != 0,
        listener,
    }))
}

/// What the child does before it becomes the command.
pub(super) struct Prelude {
    pub(super) mask: SigSet,
    /// Of the descriptors 0 to 2.
    pub(super) closed: [bool; 3],
    pub(super) ignored: [(Signal, bool); 2],
    pub(super) assist: Option<Assist>,
}

/// How the child puts itself under the supervisor.
pub(super) struct Assist {
    pub(super) filter: Vec<libc::sock_filter>,
    /// Who gets the listener, in this order.
    pub(super) doors: [RawFd; 2],
    /// Whether the command may not run without.
    pub(super) required: bool,
}

/// Arranges for the child to do it.
pub(super) fn before_exec(command: &mut Command, prelude: Prelude) {
    let child = move || {
        for (signal, ignored) in prelude.ignored {
            let action = if ignored {
                libc::SIG_IGN
            } else {
                libc::SIG_DFL
            };
            // SAFETY: no handler is involved.
            unsafe { libc::signal(signal as c_int, action) };
        }
        prelude.mask.thread_set_mask()?;
        for (number, closed) in (0..).zip(prelude.closed) {
            if closed {
                // SAFETY: it has no owner in this process.
                unsafe { libc::close(number) };
            }
        }
        let Some(assist) = &prelude.assist else {
            return Ok(());
        };
        // Last: from here on an open would wait for the supervisor.
        match super::notify::install(&assist.filter) {
            Ok(installed) => {
                for door in assist.doors {
                    send(door, 0, installed.no_new_privs, Some(installed.listener));
                }
                Ok(())
            }
            Err(errno) => {
                for door in assist.doors {
                    send(door, errno, false, None);
                }
                if assist.required {
                    return Err(io::Error::from_raw_os_error(errno));
                }
                Ok(())
            }
        }
    };
    // SAFETY: between fork and exec it makes system calls alone; it allocates
    // nothing and takes no lock.
    unsafe { command.pre_exec(child) };
}

/// Sends SIGALRM after this time; zero: not any more.
pub(super) fn alarm_after(time: Duration) {
    let timer = libc::itimerval {
        // Again and again: the first may come just before the call that it is for.
        it_interval: timeval(time),
        it_value: timeval(time),
    };
    // SAFETY: the kernel reads one `timer`.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) };
}

fn timeval(time: Duration) -> libc::timeval {
    libc::timeval {
        tv_sec: time.as_secs() as libc::time_t,
        tv_usec: libc::suseconds_t::from(time.subsec_micros()),
    }
}

/// A handler that only interrupts.
pub(super) extern "C" fn do_nothing(_: c_int) {}

/// sigaction(2); the action before.
pub(super) fn set_action(signal: Signal, action: &SigAction) -> io::Result<SigAction> {
    // SAFETY: the handlers used here are the default, to ignore, or `do_nothing`.
    Ok(unsafe { nix::sys::signal::sigaction(signal, action) }?)
}

/// A signal that was taken, and whether a process has sent it: else the kernel
/// has, as for ^C at a terminal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Taken {
    /// One of the real-time signals has no name.
    pub(super) number: c_int,
    pub(super) by_process: bool,
}

/// What has become of a child, without waiting for it; `None`: nothing new. The
/// status of waitpid(2), which nix takes for an error after a real-time signal.
pub(super) fn look_at(child: Pid) -> io::Result<Option<ExitStatus>> {
    let flags = libc::WNOHANG | libc::WUNTRACED | libc::WCONTINUED;
    let mut status = 0;
    // SAFETY: the kernel writes one `status`.
    match unsafe { libc::waitpid(child.as_raw(), &raw mut status, flags) } {
        0 => Ok(None),
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(Some(ExitStatus::from_raw(status))),
    }
}

/// Ends this process by a signal; returns where the signal does not end it.
pub(super) fn die_by(number: c_int) {
    // SAFETY: zeroes are a valid set; it lives during the calls, and no handler
    // is involved. The first fails for SIGKILL, which needs neither.
    unsafe {
        libc::signal(number, libc::SIG_DFL);
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, number);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
        libc::raise(number);
    }
}

/// kill(2), by a signal's number.
pub(super) fn kill(pid: Pid, number: c_int) {
    // SAFETY: no pointers. It may have ended just now.
    unsafe { libc::kill(pid.as_raw(), number) };
}

/// Whether a blocked signal waits to be taken.
pub(super) fn is_pending(signal: Signal) -> bool {
    // SAFETY: zeroes are a valid set, which the kernel overwrites.
    let mut set: libc::sigset_t = unsafe { zeroed() };
    // SAFETY: `set` lives during both calls.
    unsafe {
        libc::sigpending(&raw mut set) == 0
            && libc::sigismember(&raw const set, signal as c_int) == 1
    }
}

/// Waits for one of some blocked signals; `None`: there was none.
pub(super) fn take_signal(set: &SigSet) -> Option<Taken> {
    // SAFETY: plain integers; the kernel overwrites it.
    let mut info: libc::siginfo_t = unsafe { zeroed() };
    // SAFETY: both live during the call.
    let number = unsafe { libc::sigwaitinfo(set.as_ref(), &raw mut info) };
    (number > 0).then_some(Taken {
        number,
        // SI_USER, SI_QUEUE, SI_TKILL; the kernel's own are positive.
        by_process: info.si_code <= 0,
    })
}
