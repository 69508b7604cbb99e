//! Standard error, and the journal's way of telling what matters how much.

use std::env;
use std::io::{self, Write};
use std::sync::LazyLock;

use super::rows::on_one_line;

/// How much a message matters: as syslog(3) numbers it, and sd-daemon(3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Error = 3,
    Warning = 4,
    Notice = 5,
    Info = 6,
    Debug = 7,
}

impl Level {
    /// That of a note, by how it begins.
    pub fn of_note(message: &str) -> Self {
        if message.starts_with("warning: ") {
            Self::Warning
        } else {
            Self::Info
        }
    }
}

/// Whether standard error is the journal: systemd.exec(5), JOURNAL_STREAM.
static JOURNAL: LazyLock<bool> = LazyLock::new(|| {
    let stderr = rustix::fs::fstat(io::stderr());
    let named = env::var("JOURNAL_STREAM").unwrap_or_default();
    stderr.is_ok_and(|found| named == format!("{}:{}", found.st_dev, found.st_ino))
});

/// Prints a message on one line, in one call: nothing else comes in between.
pub fn tell(level: Level, message: &str) {
    // With standard error closed there is nobody left to tell.
    let _ = io::stderr().write_all(line(level, message, *JOURNAL).as_bytes());
}

/// What is printed: in the journal with the level before it.
fn line(level: Level, message: &str, journal: bool) -> String {
    let message = on_one_line(message);
    if journal {
        format!("<{}>{message}\n", level as u8)
    } else {
        format!("{message}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_level_in_the_journal_alone() {
        // What a message holds makes no record of its own, nor another level.
        assert_eq!(line(Level::Info, "<0>a\n<0>b", true), "<6><0>a\\n<0>b\n");
        assert_eq!(line(Level::Error, "a", false), "a\n");
    }

    #[test]
    fn warnings_are_told_by_how_they_begin() {
        assert_eq!(Level::of_note("warning: x"), Level::Warning);
        assert_eq!(Level::of_note("note: warning: x"), Level::Info);
    }
}
