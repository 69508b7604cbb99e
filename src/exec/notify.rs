//! The kernel's side of seccomp user notification, seccomp_unotify(2): the only
//! place in `exec` that is unsafe, with what is shared with the keeper.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_ulong, c_void};
use std::io;
use std::mem::{offset_of, size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use nix::libc::{
    self, seccomp_notif, seccomp_notif_addfd, seccomp_notif_resp, seccomp_notif_sizes, sock_filter,
    sock_fprog,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Wakes the supervisor on the CPU of the process that waits for it (Linux 6.6).
const SYNC_WAKE_UP: u64 = 1;

/// Threads that can have a notification in hand at once.
pub(super) const SLOTS: usize = u64::BITS as usize;

/// Where one thread receives notifications, in memory that the keeper sees.
///
/// The kernel writes the notification here before its ioctl returns: whenever
/// the supervisor is killed, the keeper finds every id that was given out.
#[repr(C, align(128))]
struct Slot(UnsafeCell<seccomp_notif>);

/// Memory of the supervisor and its keeper.
#[repr(C)]
pub(super) struct Board {
    /// Notifications that the supervisor has received.
    received: AtomicU64,
    /// A bit for each slot that has an owner.
    taken: AtomicU64,
    /// Whether the keeper has let a process restrict itself.
    restriction_missed: AtomicBool,
    slots: [Slot; SLOTS],
}

// SAFETY: each slot is written by the one thread that owns its `Seat`, and by
// the kernel for that thread; all others read only the id, atomically.
unsafe impl Sync for Board {}

impl Board {
    /// New memory, shared with every process that is forked from now on, for as
    /// long as they live.
    pub(super) fn new() -> io::Result<&'static Self> {
        // SAFETY: a new anonymous mapping at an address that the kernel chooses.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<Self>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is zeroed, large enough, aligned to a page, and never
        // unmapped; zeroes are a valid `Board`.
        Ok(unsafe { &*memory.cast::<Self>() })
    }

    /// Takes a slot for the calling thread; `None` when all are taken.
    pub(super) fn seat(&'static self) -> Option<Seat> {
        // Sets the lowest bit that is clear.
        let take = |taken: u64| taken.checked_add(1).map(|next| taken | next);
        let before = self
            .taken
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, take)
            .ok()?;
        let index = before.trailing_ones() as usize;
        Some(Seat { board: self, index })
    }

    /// Notifications received so far.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// A process restricts itself, and the supervisor may not know in time.
    pub(super) fn miss_restriction(&self) {
        self.restriction_missed.store(true, Ordering::SeqCst);
    }

    /// Whether that has happened.
    pub(super) fn has_missed_restriction(&self) -> bool {
        self.restriction_missed.load(Ordering::SeqCst)
    }

    /// What may still wait for an answer of the supervisor.
    pub(super) fn in_hand(&self) -> impl Iterator<Item = Call> + '_ {
        let calls = self.slots.iter().map(|slot| Call {
            id: slot.id().load(Ordering::Acquire),
            nr: slot.nr().load(Ordering::Relaxed),
        });
        // 0 is never given out: the kernel counts up from a random number, and
        // one that is 0 by chance would be an open that nobody answers for a
        // dead supervisor, once in 2^64.
        calls.filter(|call| call.id != 0)
    }
}

impl Slot {
    fn id(&self) -> &AtomicU64 {
        // SAFETY: the id is the first field, aligned; whoever writes the slot
        // without an atomic owns it, and readers take any value.
        unsafe { &*self.0.get().cast::<AtomicU64>() }
    }

    fn nr(&self) -> &AtomicI32 {
        const OFFSET: usize = offset_of!(seccomp_notif, data) + offset_of!(libc::seccomp_data, nr);
        // SAFETY: as of the id; the number is within the slot, aligned.
        unsafe { &*self.0.get().byte_add(OFFSET).cast::<AtomicI32>() }
    }
}

/// As much of a notification as the keeper needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) id: u64,
    pub(super) nr: c_int,
}

/// A slot of one thread.
pub(super) struct Seat {
    board: &'static Board,
    index: usize,
}

impl Seat {
    /// The notification in it is answered.
    pub(super) fn clear(&mut self) {
        self.board.slots[self.index]
            .id()
            .store(0, Ordering::Release);
    }
}

/// Such as when its thread could not be started.
impl Drop for Seat {
    fn drop(&mut self) {
        let bit = 1 << self.index;
        self.board.taken.fetch_and(!bit, Ordering::Release);
    }
}

/// Whether this kernel's structures are those that this program knows; larger
/// ones would be written beyond ours.
pub(super) fn structures_are_known() -> bool {
    // SAFETY: plain integers.
    let mut sizes: seccomp_notif_sizes = unsafe { zeroed() };
    // SAFETY: the kernel writes one `sizes`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_NOTIF_SIZES,
            0,
            &raw mut sizes,
        )
    };
    result == 0
        && usize::from(sizes.seccomp_notif) == size_of::<seccomp_notif>()
        && usize::from(sizes.seccomp_notif_resp) == size_of::<seccomp_notif_resp>()
}

/// What became of [`install`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Installed {
    pub(super) listener: RawFd,
    /// Whether no_new_privs had to be set.
    pub(super) no_new_privs: bool,
}

/// Puts the filter on the calling thread, and returns the listener.
///
/// For a child between fork and exec: it allocates nothing and takes no lock.
pub(super) fn install(filter: &[sock_filter]) -> Result<Installed, c_int> {
    let program = sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    let errno = || {
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
    };
    // SPEC_ALLOW: the filter is no sandbox; kernels before 5.16 would slow the
    // command down by their mitigations for those that are.
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let set = |flags: c_ulong| {
        // SAFETY: the kernel copies the program; it lives during the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const program,
            )
        };
        if fd >= 0 {
            Ok(fd as RawFd)
        } else {
            Err(errno())
        }
    };
    // Linux 5.19: a signal with a handler does not break an open that is in
    // hand; before, the open starts anew.
    let either = || match set(flags | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) {
        Err(libc::EINVAL) => set(flags),
        result => result,
    };
    match either() {
        Ok(listener) => Ok(Installed {
            listener,
            no_new_privs: false,
        }),
        // Without CAP_SYS_ADMIN.
        Err(libc::EACCES) => {
            // SAFETY: no pointers.
            if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
                return Err(errno());
            }
            Ok(Installed {
                listener: either()?,
                no_new_privs: true,
            })
        }
        Err(errno) => Err(errno),
    }
}

/// A listener's descriptor.
#[derive(Debug)]
pub(super) struct Listener(OwnedFd);

impl Listener {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    fn ioctl(&self, request: libc::Ioctl, argument: *mut c_void) -> io::Result<c_int> {
        // SAFETY: each caller passes the structure that the request's number
        // names, alive and writable; `structures_are_known` has compared sizes.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(result)
    }

    /// Asks for quicker wake-ups, where the kernel has them.
    pub(super) fn prefer_sync_wake_up(&self) {
        // The flags are the argument itself, not a pointer to them.
        let flags = ptr::without_provenance_mut(SYNC_WAKE_UP as usize);
        // An older kernel wakes as ever.
        let _ = self.ioctl(libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, flags);
    }

    /// Waits for the next notification.
    ///
    /// # Errors
    /// ENOENT when its process is gone meanwhile, or all are; EINTR.
    pub(super) fn receive(&self, seat: &mut Seat) -> io::Result<seccomp_notif> {
        let slot = seat.board.slots[seat.index].0.get();
        // SAFETY: the slot is this thread's own; the kernel wants it zeroed.
        unsafe { ptr::write_bytes(slot, 0, 1) };
        self.ioctl(libc::SECCOMP_IOCTL_NOTIF_RECV, slot.cast())?;
        seat.board.received.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the kernel has written it, and nobody else does.
        Ok(unsafe { ptr::read(slot) })
    }

    /// The same for a process that has no slot.
    pub(super) fn receive_call(&self) -> io::Result<Call> {
        // SAFETY: plain integers; the kernel wants it zeroed.
        let mut notification: seccomp_notif = unsafe { zeroed() };
        let pointer = (&raw mut notification).cast();
        self.ioctl(libc::SECCOMP_IOCTL_NOTIF_RECV, pointer)?;
        Ok(Call {
            id: notification.id,
            nr: notification.data.nr,
        })
    }

    /// Lets the kernel execute the call as if there were no filter.
    ///
    /// # Errors
    /// ENOENT when the call was interrupted or its thread was killed.
    pub(super) fn go_on(&self, id: u64) -> io::Result<()> {
        let mut response = seccomp_notif_resp {
            id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        };
        let pointer = (&raw mut response).cast();
        self.ioctl(libc::SECCOMP_IOCTL_NOTIF_SEND, pointer)?;
        Ok(())
    }

    /// Whether a caller still waits for its answer.
    pub(super) fn is_waited_for(&self, mut id: u64) -> bool {
        let request = libc::SECCOMP_IOCTL_NOTIF_ID_VALID;
        self.ioctl(request, (&raw mut id).cast()).is_ok()
    }

    /// Gives the caller a duplicate of `fd`, and makes its number the call's
    /// result, both or neither.
    ///
    /// # Errors
    /// ENOENT as of [`go_on`](Self::go_on); EMFILE where the caller's table is full.
    pub(super) fn inject(&self, id: u64, fd: BorrowedFd<'_>, cloexec: bool) -> io::Result<()> {
        let mut request = seccomp_notif_addfd {
            id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: fd.as_raw_fd() as u32,
            newfd: 0,
            newfd_flags: if cloexec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        let pointer = (&raw mut request).cast();
        self.ioctl(libc::SECCOMP_IOCTL_NOTIF_ADDFD, pointer)?;
        Ok(())
    }

    /// What it is ready for: a notification (POLLIN), or nothing more ever,
    /// since every process under the filter is gone (POLLHUP).
    pub(super) fn ready(&self, timeout: PollTimeout) -> PollFlags {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) => fds[0].revents().unwrap_or(PollFlags::empty()),
            // Interrupted: asked again.
            Err(_) => PollFlags::empty(),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seat_that_is_given_up_is_another_s() {
        let board = Board::new().unwrap();
        let mut seats: Vec<Seat> = (0..SLOTS).map(|_| board.seat().unwrap()).collect();
        assert!(board.seat().is_none());
        let indices: std::collections::BTreeSet<_> = seats.iter().map(|s| s.index).collect();
        assert_eq!(indices, (0..SLOTS).collect());
        drop(seats.remove(5));
        assert_eq!(board.seat().unwrap().index, 5);
        assert_eq!(board.seat().unwrap().index, 5);
        drop(seats);
        assert_eq!(board.seat().unwrap().index, 0);
    }
}
