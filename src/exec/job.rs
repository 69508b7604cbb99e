//! Waits for the command: signals and job control pass through, as if nobody
//! stood between the command and who started it.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, raise};
use nix::unistd::Pid;

use super::unsafe_calls::{self, Taken};
use crate::sys;

/// How soon after the terminal's signal the command's stop counts as its answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Those that stop a job.
const STOPS: [Signal; 3] = [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU];

/// Signals that are taken and handled here. Not among them: what a fault of
/// this very program raises, and SIGPIPE.
fn handled() -> SigSet {
    use Signal::{
        SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGKILL, SIGPIPE, SIGSEGV, SIGSTOP, SIGSYS, SIGTRAP,
    };
    let not = [
        SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGKILL, SIGPIPE, SIGSEGV, SIGSTOP, SIGSYS, SIGTRAP,
    ];
    // Real-time signals, too: they would end this process.
    let mut all = SigSet::all();
    for signal in not {
        all.remove(signal);
    }
    all
}

/// Blocks what [`wait`] takes, in this thread and in all that it starts; and
/// makes sure that children can be waited for. Whether SIGCHLD was ignored.
pub(super) fn prepare() -> io::Result<bool> {
    handled().thread_block()?;
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    let before = unsafe_calls::set_action(Signal::SIGCHLD, &default)?;
    Ok(matches!(before.handler(), SigHandler::SigIgn))
}

/// Waits for the command's end.
///
/// - What the terminal sends goes to the whole foreground group, so the command
///   has it already. What a process sends to this one is passed on.
/// - When a stop by the terminal has stopped the command, this process stops,
///   too, so that the shell takes over; the command goes on when this one does.
pub(super) fn wait(command: Pid) -> io::Result<ExitStatus> {
    let set = handled();
    let mut job = Job {
        command,
        stopped: false,
        wanted: None,
    };
    loop {
        if let Some(end) = job.look()? {
            return Ok(end);
        }
        if let Some(taken) = unsafe_calls::take_signal(&set) {
            job.signal(taken);
        }
    }
}

struct Job {
    command: Pid,
    /// Whether the command is stopped.
    stopped: bool,
    /// The last stop that came to this process, and when.
    wanted: Option<(Signal, Instant)>,
}

impl Job {
    /// What has become of the command; its end, if it has ended.
    fn look(&mut self) -> io::Result<Option<ExitStatus>> {
        while let Some(status) = unsafe_calls::look_at(self.command)? {
            if status.stopped_signal().is_some() {
                self.stopped = true;
            } else if status.continued() {
                self.stopped = false;
            } else {
                return Ok(Some(status));
            }
        }
        if self.stopped
            && let Some((signal, when)) = self.wanted.take()
            && when.elapsed() < ANSWER
            // Else it is over already: stopping now would undo it.
            && !unsafe_calls::is_pending(Signal::SIGCONT)
        {
            stop(signal);
            // Who lets this process go on lets the command go on.
            self.resume();
        }
        Ok(None)
    }

    fn signal(&mut self, taken: Taken) {
        match Signal::try_from(taken.number) {
            Ok(Signal::SIGCHLD) => {}
            Ok(Signal::SIGCONT) => {
                self.wanted = None;
                self.resume();
            }
            signal => {
                if let Ok(signal) = signal
                    && STOPS.contains(&signal)
                {
                    self.wanted = Some((signal, Instant::now()));
                }
                if taken.by_process {
                    unsafe_calls::kill(self.command, taken.number);
                }
            }
        }
    }

    /// Lets the command go on, unless the signal that woke this process has
    /// woken it, too.
    fn resume(&mut self) {
        if sys::state(self.command.as_raw() as u32) == Some('T') {
            let _ = kill(self.command, Signal::SIGCONT);
        }
        self.stopped = false;
    }
}

/// Stops this process, as the signal does by default; the keeper sees to opens
/// until it goes on.
fn stop(signal: Signal) {
    let mut set = SigSet::empty();
    set.add(signal);
    // Blocked, it waits; unblocked, all threads stop. In a group without a
    // shell nothing happens, as to the command.
    let _ = raise(signal);
    let _ = set.thread_unblock();
    let _ = set.thread_block();
}

/// Ends this process by the signal that has ended the command, for who looks at
/// its status; returns where that signal does not end it.
pub(super) fn die_by(signal: i32) {
    // One memory image is enough: the command's.
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
    unsafe_calls::die_by(signal);
}
