//! Runs a program that nobody will change, and answers its opens of clips with
//! descriptors of their snapshots.
//!
//! A seccomp filter sends the opens of the command, and of all processes that
//! it starts, to this process, the supervisor. It resolves each path as the
//! caller would, and where that leads to a clip on a watched rclone mount that
//! is whole in the cache, the caller gets a descriptor of a
//! [snapshot](crate::snapshot). Every other open goes on in the kernel,
//! untouched: other files, other flags, callers with other rights than the
//! supervisor's, and whatever is in doubt.
//!
//! How it is done: seccomp_unotify(2). What is promised: `docs/SEMANTICS.md`.

mod fill;
mod filter;
mod identity;
mod job;
mod keeper;
mod launch;
mod notify;
mod programs;
mod report;
mod source;
mod supervisor;
mod target;
mod unsafe_calls;
mod watch;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

use crate::handover::socket_from_env;
use crate::optin::{self, OptIn};
use crate::snapshot::{SnapshotMode, SnapshotOptions, Snapshots};
use fill::Fills;
use identity::{Identity, Sandboxes};
use keeper::Keeper;
use launch::Assistance;
use notify::Board;
use report::Counters;
use source::Source;
use supervisor::Supervisor;
use target::Root;
use watch::Watched;

pub use fill::FillOptions;
pub use launch::Inherited;
pub use programs::{DEFAULT as EXCLUDED_PROGRAMS, Programs};
pub use report::Report;

/// How to run a command.
#[derive(Debug, Clone)]
pub struct ExecOptions {
    /// Folders on rclone mounts below which clips are watched; none: all rclone
    /// mounts, also those that come later.
    pub prefixes: Vec<PathBuf>,
    /// How clips are handed over. With [`SnapshotMode::Require`] a command that
    /// cannot be assisted does not run.
    pub snapshots: SnapshotOptions,
    /// The socket of the handover server that is asked where the cache may not
    /// be opened; `None`: the one that the environment names, if it does.
    pub socket: Option<PathBuf>,
    /// How clips are completed in the cache before they are handed over, if they
    /// are to be.
    pub fill: Option<FillOptions>,
    /// Programs that are left alone.
    pub programs: Programs,
    /// What the command inherits.
    pub inherited: Inherited,
}

/// Why a command did not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such program.
    #[error("`{}` was not found", .0.display())]
    NotFound(PathBuf),
    /// It cannot be executed.
    #[error("`{}` cannot be executed: {error}", path.display())]
    NotExecutable {
        /// The program.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It was not tried.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    fn from_exec(program: &OsStr, error: &io::Error) -> Self {
        let path = PathBuf::from(program);
        let again = || match error.raw_os_error() {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::from(error.kind()),
        };
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotFound(path),
            // A NUL in an argument, no memory for a process.
            io::ErrorKind::InvalidInput
            | io::ErrorKind::OutOfMemory
            | io::ErrorKind::WouldBlock => {
                Self::Failed(format!("starting `{}`: {error}", path.display()))
            }
            _ => Self::NotExecutable {
                path,
                error: again(),
            },
        }
    }
}

/// How a command has ended.
#[derive(Debug, Clone)]
pub struct Ended {
    status: ExitStatus,
    /// What became of its opens.
    pub report: Report,
}

impl Ended {
    /// The command's exit code; `None` where a signal ended it.
    #[must_use]
    pub fn code(&self) -> Option<u8> {
        self.status.code().map(|code| code as u8)
    }

    /// The number of the signal that ended the command.
    #[must_use]
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// Ends this process as the command has ended, by the same signal if it was
    /// one; returns where that signal does not end it.
    pub fn die_alike(&self) {
        if let Some(signal) = self.signal() {
            job::die_by(signal);
        }
    }
}

/// Runs a command to its end. Why it runs unassisted, if so, is told when it
/// has started, by `tell`.
///
/// It forks, and takes nearly all signals of this process: call it from a
/// process of one thread, once, and end the process afterwards. Processes that
/// the command leaves behind go on as without `exec`; opens of theirs go
/// through FUSE.
///
/// # Errors
/// Where the command was not started.
pub fn run(
    command: &[OsString],
    options: &ExecOptions,
    tell: &mut dyn FnMut(&str),
) -> Result<Ended, Error> {
    let required = options.snapshots.mode == SnapshotMode::Require;
    let failed = |what: &'static str| move |e: io::Error| Error::Failed(format!("{what}: {e}"));
    let watched = Watched::new(&options.prefixes).map_err(Error::Failed)?;
    let ignores_child = job::prepare().map_err(failed("signals"))?;

    let prepared = prepare();
    let (ground, keeper) = match prepared {
        Ok((ground, keeper)) => (Ok(ground), Ok(keeper)),
        Err(why) => (Err(why.clone()), Err(why)),
    };
    let launched = launch::launch(command, &options.inherited, ignores_child, keeper, required)?;
    let child = Pid::from_raw(launched.child.id() as i32);
    let assisted = launched.assistance.and_then(|assistance| {
        let ground = ground?;
        assist(assistance, ground, watched, options)
    });
    if let Err(why) = &assisted {
        tell(&format!("running `{}` unassisted: {why}", name(command)));
    }
    let status = job::wait(child).map_err(failed("waiting for the command"))?;
    let report = match &assisted {
        Ok((supervisor, no_new_privs)) => Report {
            no_new_privs: *no_new_privs,
            ..supervisor.counters.report()
        },
        Err(why) => Report {
            unassisted: Some(why.clone()),
            ..Report::default()
        },
    };
    Ok(Ended { status, report })
}

fn name(command: &[OsString]) -> String {
    let program = command.first().map(Path::new);
    program.map_or_else(String::new, |p| p.display().to_string())
}

/// What has to be known before the command starts.
struct Ground {
    own: Identity,
    root: Root,
    board: &'static Board,
}

/// Looks whether a command can be assisted here, and starts the keeper.
fn prepare() -> Result<(Ground, Keeper), String> {
    if optin::from_env() == OptIn::Killed {
        return Err(format!("{}=0", optin::VARIABLE));
    }
    // Numbers in notifications are of this process's pid namespace, and must be
    // those of /proc.
    let shown = fs::read_link("/proc/self").map_err(|e| format!("`/proc/self`: {e}"))?;
    if shown.as_os_str() != OsStr::new(&std::process::id().to_string()) {
        return Err("/proc is of another pid namespace; mount one of this".into());
    }
    let own = Identity::of("self").map_err(|e| format!("`/proc/self`: {e}"))?;
    let root = Root::own().map_err(|e| format!("`/proc/self/root`: {e}"))?;
    if !notify::structures_are_known() {
        return Err("the kernel has no seccomp user notification, or one of another layout".into());
    }
    let board = Board::new().map_err(|e| format!("mmap: {e}"))?;
    let keeper = keeper::start(board).map_err(|e| format!("starting the keeper: {e}"))?;
    Ok((Ground { own, root, board }, keeper))
}

/// Starts to answer the command's opens.
fn assist(
    assistance: Assistance,
    ground: Ground,
    watched: Watched,
    options: &ExecOptions,
) -> Result<(Arc<Supervisor>, bool), String> {
    // Snapshots keep descriptors. The command has started with the limit as it was.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let no_new_privs = assistance.no_new_privs;
    let counters = Counters::new();
    let fills = |options| Fills::new(options, Arc::clone(&counters.fills));
    let source = Source {
        snapshots: Snapshots::of_huge_pages(options.snapshots),
        server: options.socket.clone().or_else(socket_from_env),
        fills: options.fill.map(fills),
    };
    let supervisor = Arc::new(Supervisor::new(
        assistance.listener,
        ground.board,
        watched,
        Sandboxes::new(ground.own.expected(no_new_privs)),
        options.programs.clone(),
        source,
        counters,
        ground.root,
    ));
    // Where not one thread could be started, the keeper answers.
    supervisor
        .start()
        .map_err(|e| format!("starting threads: {e}"))?;
    Ok((supervisor, no_new_privs))
}
