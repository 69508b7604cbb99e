//! What goes to standard output and standard error.

mod level;
mod rows;
mod sink;

use level::Level;
pub use rows::{Row, escape, shown};
#[cfg(feature = "ebpf")]
pub use rows::{losses_json, losses_text};
pub use sink::Sink;

use std::io::{self, Write};
use std::path::Path;
use std::time::SystemTime;

use serde::Serialize;

/// The contract's JSON version.
pub const SCHEMA: u32 = 1;

/// Messages to standard error: `-q` silences notes and warnings, `-v` adds more.
pub struct Notes {
    quiet: bool,
    verbose: bool,
}

impl Notes {
    pub fn new(quiet: bool, verbose: bool) -> Self {
        Self { quiet, verbose }
    }

    /// Whether `-q` was given.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Whether `-v` was given.
    #[cfg(feature = "ebpf")]
    pub fn is_verbose(&self) -> bool {
        self.verbose
    }

    /// Something the user should know; what begins with `warning: ` is a warning in
    /// the journal, too.
    pub fn note(&self, message: impl std::fmt::Display) {
        if !self.quiet {
            let message = message.to_string();
            level::tell(Level::of_note(&message), &message);
        }
    }

    /// Something the user asked to know, by `-v`.
    pub fn detail(&self, message: impl std::fmt::Display) {
        if self.verbose {
            level::tell(Level::Debug, &message.to_string());
        }
    }

    /// Where libbpf's own messages go, by `-v`: the verifier's log among them.
    #[cfg(feature = "ebpf")]
    pub fn libbpf_log(&self) -> Option<vmafx_bypass::tracker::Log> {
        self.verbose
            .then_some(|_, message| message.lines().for_each(detail))
    }
}

/// Prints on standard error, even with `-q`: summaries and reports.
pub fn report(message: impl std::fmt::Display) {
    level::tell(Level::Notice, &message.to_string());
}

/// Prints what was asked for by `-v`, where no [`Notes`] are at hand.
#[cfg(feature = "ebpf")]
pub fn detail(message: impl std::fmt::Display) {
    level::tell(Level::Debug, &message.to_string());
}

/// Prints the error that ends the program, on one line.
pub fn error(error: &anyhow::Error) {
    let text = format!("{error:#}").replace('\n', "; ");
    level::tell(Level::Error, &format!("vmafx-bypass: {text}"));
}

/// Writes one JSON document and a newline.
pub fn write_json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}

/// RFC 3339 in UTC, with nanoseconds.
pub fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_nanos(at).to_string()
}

/// A path for JSON: its text, and its bytes in hexadecimal where it has none.
#[derive(Debug, Serialize)]
pub struct JsonPath {
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
}

impl JsonPath {
    pub fn new(path: Option<&Path>) -> Self {
        use std::fmt::Write as _;
        use std::os::unix::ffi::OsStrExt;
        let text = |p: &Path| p.to_string_lossy().into_owned();
        let hex = |p: &Path| {
            let mut hex = String::new();
            for byte in p.as_os_str().as_bytes() {
                // Writing to a string does not fail.
                let _ = write!(hex, "{byte:02x}");
            }
            hex
        };
        Self {
            path: path.map(text),
            path_hex: path.filter(|p| p.to_str().is_none()).map(hex),
        }
    }
}

/// A size for people: `100.0 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {unit}")
    }
}

/// A duration for people: `8.2 ms`.
pub fn human_ns(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn sizes_for_people() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(100 << 20), "100.0 MiB");
        assert_eq!(human_bytes(u64::MAX), "16384.0 PiB");
    }

    #[test]
    fn paths_that_are_no_text_keep_their_bytes() {
        let json = |p| serde_json::to_string(&JsonPath::new(p)).unwrap();
        assert_eq!(json(None), r#"{"path":null}"#);
        assert_eq!(json(Some(Path::new("a\n\"b"))), r#"{"path":"a\n\"b"}"#);
        let odd = Path::new(OsStr::from_bytes(b"a\xff"));
        assert_eq!(
            json(Some(odd)),
            "{\"path\":\"a\u{fffd}\",\"path_hex\":\"61ff\"}"
        );
    }
}
