//! `generate`: man pages and completions, for packages.

mod man;

use std::fs;
use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::cli::{Cli, GenerateArgs, Generated};
use crate::exit::Exit;

const PROGRAM: &str = "vmafx-bypass";

/// Runs the command.
pub fn run(args: &GenerateArgs) -> Result<Exit> {
    match &args.what {
        Generated::Man { folder } => {
            fs::create_dir_all(folder)
                .with_context(|| format!("making the folder `{}`", folder.display()))?;
            for (name, text) in man::pages()? {
                let path = folder.join(name);
                fs::write(&path, text).with_context(|| format!("writing `{}`", path.display()))?;
            }
        }
        Generated::Completions { shell } => {
            // At once: what clap_complete prints itself panics on a closed pipe.
            let script = completions(*shell);
            let mut out = io::stdout();
            out.write_all(&script)
                .and_then(|()| out.flush())
                .context("writing to standard output")?;
        }
    }
    Ok(Exit::Done)
}

/// What a shell reads to complete command lines.
fn completions(shell: Shell) -> Vec<u8> {
    let program = Cli::command();
    // Without the hidden commands, which clap_complete would offer.
    let shown = program.get_subcommands().filter(|c| !c.is_hide_set());
    let mut shown = Command::new(PROGRAM)
        .version(env!("CARGO_PKG_VERSION"))
        .args(program.get_arguments())
        .subcommands(shown);
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown, PROGRAM, &mut script);
    if shell == Shell::Bash {
        // clap-rs/clap#6421: it writes a hyphen of the program's name in two ways.
        let text = String::from_utf8_lossy(&script);
        script = text
            .replace("vmafx__subcmd__bypass__", "vmafx__bypass__")
            .into_bytes();
    }
    script
}
