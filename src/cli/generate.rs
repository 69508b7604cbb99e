//! `generate`'s own.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use clap_complete::Shell;

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(subcommand)]
    pub what: Generated,
}

#[derive(Debug, Subcommand)]
pub enum Generated {
    /// The man pages, into a folder.
    Man {
        /// The folder; it is made where it is missing.
        folder: PathBuf,
    },
    /// A shell's completions, to standard output.
    Completions {
        /// The shell.
        shell: Shell,
    },
}
