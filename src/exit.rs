//! Exit codes: part of the contract with scripts.

use std::fmt;
use std::io;
use std::process::ExitCode;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done,
    /// Something failed.
    Failed,
    /// The command line makes no sense; clap's own code.
    Usage,
    /// The environment cannot do it, or nobody opted in.
    Environment,
    /// A verification found other bytes than FUSE's.
    Mismatch,
    /// A gate was missed.
    Gate,
    /// Ended by this signal.
    Signal(u8),
    /// That of a command that was run, or why it was not.
    Code(u8),
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Environment => 3,
            Exit::Mismatch => 4,
            Exit::Gate => 5,
            Exit::Signal(number) => 128 + number,
            Exit::Code(code) => code,
        })
    }
}

/// An error with an exit code other than [`Exit::Failed`].
#[derive(Debug)]
pub struct Coded {
    exit: Exit,
    message: String,
}

impl Coded {
    /// An [`anyhow::Error`] that ends the program with `exit`.
    pub fn error(exit: Exit, message: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Self {
            exit,
            message: message.into(),
        })
    }
}

impl fmt::Display for Coded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Coded {}

/// The exit code of an error.
pub fn of(error: &anyhow::Error) -> Exit {
    error
        .downcast_ref::<Coded>()
        .map_or(Exit::Failed, |coded| coded.exit)
}

/// Whether the reader of our standard output has gone, which is no error.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}
