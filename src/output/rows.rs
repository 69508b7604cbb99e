//! Tracked descriptors as rows: one field model, rendered as text and JSON.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;
#[cfg(feature = "ebpf")]
use vmafx_bypass::tracker::Losses;

use super::{JsonPath, human_bytes};

/// What `run` and `dump-map` show of a descriptor.
#[derive(Debug, Serialize)]
pub struct Row {
    pub pid: u32,
    /// In the process's own pid namespace.
    pub own_pid: u32,
    pub fd: u32,
    pub comm: String,
    #[serde(flatten)]
    pub path: JsonPath,
    /// `major:minor`.
    pub dev: String,
    pub ino: u64,
    pub flags: u32,
    pub size: u64,
    /// An estimate, from rclone's metadata alone.
    pub cached_bytes: Option<u64>,
    /// `active`, or a reason: an estimate, likewise.
    pub state: &'static str,
}

impl Row {
    /// The size and what of it is cached, for people.
    pub fn cached(&self) -> String {
        match self.cached_bytes {
            Some(bytes) if self.size > 0 => {
                format!("{:.0}%", 100.0 * bytes as f64 / self.size as f64)
            }
            _ => "-".to_owned(),
        }
    }

    pub fn size(&self) -> String {
        human_bytes(self.size)
    }
}

/// A path or name on one line of a terminal: control characters and bytes
/// that are no text are escaped, and so is the backslash that escapes them.
pub fn escape(text: &OsStr) -> String {
    let mut out = String::new();
    for chunk in text.as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                c if misleads(c) => out.extend(c.escape_default()),
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Whether a character can make a line look like another: controls, and those that
/// change the direction of text.
fn misleads(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A message on one line, whatever names are in it: as [`escape`], but for backslashes,
/// and so that JSON stays what it is.
pub fn on_one_line(message: &str) -> String {
    let mut out = String::new();
    for c in message.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\t' => out.push(c),
            // Writing to a string does not fail.
            c if misleads(c) => drop(write!(out, "\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out
}

/// An absolute path on one line; a question mark where it got lost.
pub fn shown(path: Option<&Path>) -> String {
    path.map_or_else(|| "?".to_owned(), |p| escape(p.as_os_str()))
}

/// Every loss by its name, for JSON.
#[cfg(feature = "ebpf")]
pub fn losses_json(losses: &Losses) -> serde_json::Map<String, serde_json::Value> {
    losses
        .iter()
        .map(|(name, count)| (name.to_owned(), count.into()))
        .collect()
}

/// What was lost, for people; `None`: nothing.
#[cfg(feature = "ebpf")]
pub fn losses_text(losses: &Losses) -> Option<String> {
    let lost: Vec<String> = losses
        .iter()
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    (!lost.is_empty()).then(|| format!("lost: {}", lost.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stay_on_one_line() {
        let name = OsStr::from_bytes(b"a b\n\x1b[31m\\ \xff\xc3\xa9");
        assert_eq!(escape(OsStr::new("a\u{202e}b")), "a\\u{202e}b");
        let message = on_one_line("`a\nb\x1b[31m\u{202e}é\\`: no\tsuch");
        assert_eq!(message, "`a\\nb\\u001b[31m\\u202eé\\`: no\tsuch");
        assert_eq!(escape(name), "a b\\n\\u{1b}[31m\\\\ \\xffé");
    }
}
