//! How SIGPIPE and the standard descriptors were when this program was started:
//! Rust's runtime ignores the one, and opens /dev/null for others that are closed,
//! before `main`; a command that is run is to inherit what was before.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc;

static IGNORED: AtomicBool = AtomicBool::new(false);
static CLOSED: [AtomicBool; 3] = [const { AtomicBool::new(false) }; 3];

/// Called by the C runtime, before Rust's.
// SAFETY: the section holds pointers to functions that the C runtime calls with
// argc, argv and envp, of which this one needs none; it makes system calls alone.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the kernel writes one `action`; zeroes are a valid one, too.
    let action = unsafe {
        libc::sigaction(
            libc::SIGPIPE as c_int,
            std::ptr::null(),
            action.as_mut_ptr(),
        );
        action.assume_init()
    };
    IGNORED.store(action.sa_sigaction == libc::SIG_IGN, Ordering::Relaxed);
    for (fd, closed) in CLOSED.iter().enumerate() {
        // SAFETY: no pointers.
        let flags = unsafe { libc::fcntl(fd as c_int, libc::F_GETFD) };
        closed.store(flags == -1, Ordering::Relaxed);
    }
}

/// Which of the standard descriptors whoever started this program had closed.
pub fn were_closed() -> [bool; 3] {
    [0, 1, 2].map(|fd: usize| CLOSED[fd].load(Ordering::Relaxed))
}

/// Whether whoever started this program ignored SIGPIPE.
pub fn was_ignored() -> bool {
    IGNORED.load(Ordering::Relaxed)
}
