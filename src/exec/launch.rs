//! Starts the command: as it would start without us, but under the filter.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};

use super::keeper::Keeper;
use super::notify::Listener;
use super::unsafe_calls::{self, Assist, Prelude};
use super::{Error, filter};

/// The state of signals with which this program was started, and with which
/// the command is to start.
#[derive(Debug, Clone)]
pub struct Inherited {
    /// Blocked signals.
    pub mask: SigSet,
    /// Whether SIGPIPE is ignored. Rust's runtime has changed that by the time
    /// of `main`, so the program has to look before.
    pub ignores_pipe: bool,
    /// Which of the descriptors 0 to 2 are closed; its runtime has opened them.
    pub closed: [bool; 3],
}

/// A command that runs.
pub(super) struct Launched {
    pub(super) child: Child,
    /// How its opens come to us, or why they do not.
    pub(super) assistance: Result<Assistance, String>,
}

pub(super) struct Assistance {
    pub(super) listener: Listener,
    pub(super) no_new_privs: bool,
}

/// Starts the command, under the filter where there is a keeper.
pub(super) fn launch(
    words: &[OsString],
    inherited: &Inherited,
    ignores_child: bool,
    keeper: Result<Keeper, String>,
    required: bool,
) -> Result<Launched, Error> {
    let Some((program, arguments)) = words.split_first() else {
        return Err(Error::Failed("no command was given".into()));
    };
    let mut command = Command::new(program);
    command.args(arguments);
    let mut prelude = Prelude {
        mask: inherited.mask,
        closed: inherited.closed,
        ignored: [
            (Signal::SIGPIPE, inherited.ignores_pipe),
            (Signal::SIGCHLD, ignores_child),
        ],
        assist: None,
    };
    let prepared = keeper.and_then(|keeper| {
        let filter = filter::program().ok_or("this processor is not supported")?;
        let (inside, outside) = UnixStream::pair().map_err(|e| format!("socketpair: {e}"))?;
        prelude.assist = Some(Assist {
            filter,
            doors: [keeper.door.as_raw_fd(), outside.as_raw_fd()],
            required,
        });
        Ok((keeper, inside, outside))
    });
    if let Err(why) = &prepared
        && required
    {
        return Err(Error::Failed(why.clone()));
    }
    unsafe_calls::before_exec(&mut command, prelude);
    let spawned = command.spawn();
    let assistance = prepared.and_then(|(keeper, inside, outside)| {
        // Where the child has died before it sent anything, this ends the wait.
        drop((keeper, outside));
        let word = unsafe_calls::receive(inside.as_fd()).ok().flatten();
        match word {
            Some(word) => match word.listener {
                Some(listener) => Ok(Assistance {
                    listener: Listener::new(listener),
                    no_new_privs: word.no_new_privs,
                }),
                None => Err(missing(word.errno)),
            },
            None => Err("the command did not hand over its listener".into()),
        }
    });
    let failed = |error: io::Error| match &assistance {
        Err(why) if required => Error::Failed(why.clone()),
        _ => Error::from_exec(program, &error),
    };
    let child = spawned.map_err(failed)?;
    Ok(Launched { child, assistance })
}

/// What an error of seccomp(2) means.
fn missing(errno: i32) -> String {
    let why = match Errno::from_raw(errno) {
        Errno::EBUSY => {
            "another supervisor already answers for this process, such as an outer `exec`"
        }
        Errno::ENOSYS => "the kernel has no seccomp(2)",
        Errno::EINVAL => {
            "the kernel has no seccomp user notification; linux 5.15 or newer is needed"
        }
        Errno::EPERM | Errno::EACCES => {
            "seccomp(2) is forbidden here; allow it in the container's seccomp profile"
        }
        other => return format!("seccomp(2): {other}"),
    };
    why.into()
}
