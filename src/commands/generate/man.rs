//! Man pages: one of the program, and one of each command.

use std::io::{self, Write};

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};
use vmafx_bypass::{handover, optin};

use crate::cli::Cli;

/// How the text below a command's help begins that tells its exit codes.
const CODES: &str = "Exit codes: ";

const EXIT_CODES: [(&str, &str); 6] = [
    ("0", "done; also where standard output was closed"),
    ("1", "failed"),
    ("2", "wrong usage"),
    (
        "3",
        "the environment cannot do it, or nobody opted in; the message says what is missing",
    ),
    (
        "4",
        "data mismatch: the cache, or an engine of bench, gave other bytes than FUSE",
    ),
    ("5", "a gate of bench was missed"),
];

const ENVIRONMENT: [(&str, &str); 3] = [
    (
        optin::VARIABLE,
        "1 opts in to run; 0 turns every bypass off: run refuses, the others read through FUSE \
         alone and say so. Unset, run refuses without --enable, and commands that are called by \
         name work.",
    ),
    (
        handover::VARIABLE,
        "The socket of a running run --socket, which read, bench and exec ask for cache files \
         that they may not open themselves.",
    ),
    ("NO_COLOR", "No colours, on a terminal either."),
];

const FILES: [(&str, &str); 3] = [
    (
        "/sys/fs/bpf/vmafx-bypass",
        "Where run pins its maps, for dump-map.",
    ),
    (
        "/etc/default/vmafx-bypass",
        "The service's options; the service is neither enabled nor started by itself.",
    ),
    (
        "~/.cache/rclone/vfs, ~/.cache/rclone/vfsMeta",
        "rclone's cache, where its daemon was not told another. It is read, and never written.",
    ),
];

/// All pages, by their files' names.
pub fn pages() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    let mut names = vec![program.get_name().to_owned()];
    names.extend(commands(&program).map(|command| name(command).to_owned()));
    let mut pages = Vec::new();
    for command in std::iter::once(&program).chain(commands(&program)) {
        let file = format!("{}.1", name(command));
        pages.push((file, page(command, &names)?));
    }
    Ok(pages)
}

fn commands(program: &Command) -> impl Iterator<Item = &Command> {
    program.get_subcommands().filter(|c| !c.is_hide_set())
}

fn name(command: &Command) -> &str {
    command.get_display_name().unwrap_or(command.get_name())
}

fn page(command: &Command, names: &[String]) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let man = Man::new(command.clone())
        // None: it would change each time. An empty one would not be counted.
        .date(" ")
        .source(concat!("vmafx-bypass ", env!("CARGO_PKG_VERSION")))
        .manual("User Commands");
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let rest = [
        exit_status(command),
        terms("ENVIRONMENT", &ENVIRONMENT),
        terms("FILES", &FILES),
        see_also(command, names),
    ];
    for section in rest {
        section.to_writer(&mut page)?;
    }
    page.flush()?;
    Ok(page)
}

/// The command's own words below its help, or else what holds for all.
fn exit_status(command: &Command) -> Roff {
    let own = command.get_after_help().map(ToString::to_string);
    let own = own.as_deref().and_then(|text| text.strip_prefix(CODES));
    match own.filter(|_| !command.has_subcommands()) {
        Some(text) => {
            let mut section = Roff::new();
            section.control("SH", ["EXIT STATUS"]);
            section.text([roman(text.replace('\n', " "))]);
            section
        }
        None => terms("EXIT STATUS", &EXIT_CODES),
    }
}

fn terms(title: &str, terms: &[(&str, &str)]) -> Roff {
    let mut section = Roff::new();
    section.control("SH", [title]);
    for (term, meaning) in terms {
        section.control("TP", []);
        section.text([bold(*term)]);
        section.text([roman(*meaning)]);
    }
    section
}

fn see_also(command: &Command, names: &[String]) -> Roff {
    let mut section = Roff::new();
    section.control("SH", ["SEE ALSO"]);
    let mut text = Vec::new();
    for other in names.iter().filter(|other| *other != name(command)) {
        text.extend([bold(other), roman("(1), ")]);
    }
    text.extend([bold("rclone"), roman("(1); ")]);
    text.extend([italic("/usr/share/doc/vmafx-bypass")]);
    section.text(text);
    section
}
