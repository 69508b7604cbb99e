//! The command line of `vmafx-bypass`.

mod cli;
mod commands;
mod exit;
// Without the tracker there are fewer things to print.
#[cfg_attr(not(feature = "ebpf"), allow(dead_code, unused_imports))]
mod output;
mod pipe;
mod signals;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use exit::Exit;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let notes = output::Notes::new(cli.quiet, cli.verbose);
    // Before any thread starts, so that all of them leave signals to one.
    let signals = signals::Signals::block();
    let result = match cli.command {
        Command::Run(args) => commands::run::run(&args, &notes, signals),
        Command::DumpMap(args) => commands::dump_map::run(&args, &notes, signals),
        Command::Read(args) => commands::read::run(&args, &notes, signals),
        Command::Doctor(args) => {
            signals.unblock();
            commands::doctor::run(&args, &notes)
        }
        Command::Explain(args) => {
            signals.unblock();
            commands::explain::run(&args)
        }
        Command::Bench(args) => commands::bench::run(&args, &notes, signals),
        Command::Exec(args) => commands::exec::run(&args, &notes, signals),
        #[cfg(feature = "mount")]
        Command::Mount(args) => commands::mount::run(&args, &notes, signals),
        Command::Warm(args) => commands::warm::run(&args, &notes, signals),
        Command::Generate(args) => {
            signals.unblock();
            commands::generate::run(&args)
        }
        #[cfg(feature = "top")]
        Command::Top(args) => commands::top::run(&args, signals),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) if exit::is_broken_pipe(&error) => Exit::Done.into(),
        Err(error) => {
            output::error(&error);
            exit::of(&error).into()
        }
    }
}
