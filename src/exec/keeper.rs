//! The keeper: a small process that lets opens go on when nobody else does.
//!
//! When the last descriptor of a listener is closed, the kernel answers every
//! open under its filter with ENOSYS, for ever. So a second process holds one.
//! It does nothing while the supervisor works. When that is killed, or ends
//! while processes of the command go on, the keeper lets every open go on in
//! the kernel, until the last of these processes is gone; likewise while the
//! supervisor is stopped or does not take notifications.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::unistd::{ForkResult, Pid, getpid, getppid};

use super::notify::{Board, Call, Listener};
use super::unsafe_calls;

/// How often it looks whether the supervisor does its work.
const TICK: Duration = Duration::from_millis(500);

/// A running keeper.
#[derive(Debug)]
pub(super) struct Keeper {
    /// Where it waits for the listener.
    pub(super) door: UnixStream,
}

/// Forks the keeper off. The caller must have one thread.
///
/// # Errors
/// Where there is no room for another process or descriptor.
pub(super) fn start(board: &'static Board) -> io::Result<Keeper> {
    let (door, inside) = UnixStream::pair()?;
    let supervisor = getpid();
    match unsafe_calls::fork()? {
        ForkResult::Parent { .. } => Ok(Keeper { door }),
        ForkResult::Child => {
            drop(door);
            // Whatever it could not do, there is nobody to tell.
            let _ = keep(board, supervisor, inside);
            unsafe_calls::leave()
        }
    }
}

/// The keeper's life.
fn keep(board: &'static Board, supervisor: Pid, door: UnixStream) -> io::Result<()> {
    let alive = unsafe_calls::pidfd(supervisor)?;
    if getppid() != supervisor {
        // It has died before it could be watched; then there is no command yet.
        return Ok(());
    }
    hide(&alive, &door)?;
    let Some(listener) = unsafe_calls::receive(door.as_fd())?.and_then(|word| word.listener) else {
        return Ok(());
    };
    let listener = Listener::new(listener);
    drop(door);
    let mut watch = Watch {
        listener: &listener,
        board,
        supervisor,
        stuck_at: None,
    };
    while !ended(alive.as_fd(), TICK) {
        if listener
            .ready(PollTimeout::ZERO)
            .contains(PollFlags::POLLHUP)
        {
            return Ok(());
        }
        watch.tick();
    }
    // What it had in its hands, and then all that comes.
    watch.answer_in_hand();
    loop {
        let ready = listener.ready(PollTimeout::NONE);
        if ready.contains(PollFlags::POLLIN) {
            watch.answer_one();
        } else if ready.contains(PollFlags::POLLHUP) {
            return Ok(());
        }
    }
}

/// Leaves the terminal, the folder and all descriptors of the command: who
/// waits for the end of a pipe or unmounts a disk does not wait for the keeper.
fn hide(alive: &OwnedFd, door: &UnixStream) -> io::Result<()> {
    SigSet::all().thread_set_mask()?;
    nix::unistd::setsid()?;
    std::env::set_current_dir("/")?;
    let null = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    for number in 0..3 {
        unsafe_calls::replace(null.as_fd(), number)?;
    }
    // Here, and not by its number.
    drop(null);
    unsafe_calls::close_all_but(&[alive.as_raw_fd(), door.as_raw_fd()]);
    // As it is shown by ps(1).
    let _ = nix::sys::prctl::set_name(c"vmafx-keeper");
    // So that a receive that nobody answers is left: not every kernel ends it
    // when the last process is gone.
    let wake = SigAction::new(
        SigHandler::Handler(unsafe_calls::do_nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    unsafe_calls::set_action(Signal::SIGALRM, &wake)?;
    let mut alarm = SigSet::empty();
    alarm.add(Signal::SIGALRM);
    alarm.thread_unblock()?;
    Ok(())
}

/// Whether a process has ended, after waiting for that a while.
fn ended(process: BorrowedFd<'_>, wait: Duration) -> bool {
    let mut fds = [PollFd::new(process, PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
    match poll(&mut fds, timeout) {
        Ok(n) => n > 0,
        Err(_) => false,
    }
}

struct Watch<'a> {
    listener: &'a Listener,
    board: &'static Board,
    supervisor: Pid,
    /// What the supervisor had received when an open waited for it.
    stuck_at: Option<u64>,
}

impl Watch<'_> {
    /// Looks whether opens wait for a supervisor that does not come.
    fn tick(&mut self) {
        let waiting = self.is_waiting();
        if (waiting || self.board.in_hand().next().is_some()) && self.is_stopped() {
            self.answer_in_hand();
            while self.is_stopped() {
                self.answer_one();
            }
            self.stuck_at = None;
            return;
        }
        let received = self.board.received();
        if waiting && self.stuck_at == Some(received) {
            // All its threads are busy, perhaps with a file system that hangs.
            while self.is_waiting() && self.board.received() == received {
                self.answer_one();
            }
        }
        self.stuck_at = waiting.then_some(received);
    }

    fn is_waiting(&self) -> bool {
        self.listener
            .ready(PollTimeout::ZERO)
            .contains(PollFlags::POLLIN)
    }

    fn is_stopped(&self) -> bool {
        matches!(
            crate::sys::state(self.supervisor.as_raw() as u32),
            Some('T' | 't')
        )
    }

    /// Answers what the supervisor may not have answered; where it has, the
    /// kernel does not know the id any more.
    fn answer_in_hand(&self) {
        for call in self.board.in_hand() {
            self.let_go_on(call);
        }
    }

    fn let_go_on(&self, call: Call) {
        // The supervisor may go on later, and has to know before the process does.
        if super::filter::restricts_itself(call.nr.into()) {
            self.board.miss_restriction();
        }
        // ENOENT: its process is gone, or it was answered.
        let _ = self.listener.go_on(call.id);
    }

    /// Waits for a notification, at most a tick, and lets it go on.
    fn answer_one(&self) {
        unsafe_calls::alarm_after(TICK);
        let received = self.listener.receive_call();
        unsafe_calls::alarm_after(Duration::ZERO);
        if let Ok(call) = received {
            self.let_go_on(call);
        }
    }
}
