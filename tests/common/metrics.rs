//! Scrapes, as Prometheus makes them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{eventually, patience};

/// promtool, which `scripts/setup.sh` puts beside what is built.
pub fn promtool() -> Command {
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let program = built.join("tools/promtool");
    assert!(
        program.exists(),
        "`{}` is missing: run scripts/setup.sh",
        program.display()
    );
    Command::new(program)
}

/// Runs promtool on a text; it must have nothing to say against it.
pub fn promtool_accepts(args: &[&str], input: &str) {
    let mut child = promtool()
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let told = [&output.stdout[..], &output.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    assert!(output.status.success(), "{args:?}: {told}");
    assert!(!told.contains("FAILED"), "{args:?}: {told}");
}

/// A file for standard error, and the address that a program tells there.
pub struct Told(PathBuf);

impl Told {
    pub fn new(folder: &Path) -> Self {
        Self(folder.join("stderr"))
    }

    /// Has a command tell it there.
    pub fn by(&self, command: &mut Command) {
        command.stderr(fs::File::create(&self.0).unwrap());
    }

    pub fn text(&self) -> String {
        fs::read_to_string(&self.0).unwrap()
    }

    pub fn site(&self) -> Site {
        let mut site = None;
        eventually("an address", || {
            site = Site::told(&self.text());
            site.is_some()
        });
        site.unwrap()
    }
}

/// Where counts are served.
#[derive(Clone, Copy)]
pub struct Site(pub SocketAddr);

impl Site {
    /// Of what a program has told.
    pub fn told(text: &str) -> Option<Self> {
        let rest = text.split("metrics at http://").nth(1)?;
        Some(Self(rest.split_once("/metrics\n")?.0.parse().unwrap()))
    }

    pub fn connect(self) -> TcpStream {
        let stream = TcpStream::connect(self.0).unwrap();
        stream.set_read_timeout(Some(patience())).unwrap();
        stream
    }

    /// The status and the body.
    pub fn get(self, path: &str) -> (u16, String) {
        let mut stream = self.connect();
        let host = self.0;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }

    pub fn scrape(self) -> Scrape {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200, "{text}");
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let numbers = lines.map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.to_owned())
        });
        Scrape {
            numbers: numbers.collect(),
            text,
        }
    }
}

/// The numbers of one moment.
pub struct Scrape {
    numbers: BTreeMap<String, String>,
    pub text: String,
}

impl Scrape {
    fn text_of(&self, name: &str) -> &str {
        let name = format!("vmafx_bypass_{name}");
        let value = self.numbers.get(&name);
        value.unwrap_or_else(|| panic!("{name} is not in {}", self.text))
    }

    /// A whole number, by its name without the prefix, labels included.
    pub fn get(&self, name: &str) -> u64 {
        self.text_of(name).parse().unwrap()
    }

    /// Seconds, likewise.
    pub fn seconds(&self, name: &str) -> f64 {
        self.text_of(name).parse().unwrap()
    }

    /// A family by its only label.
    pub fn by(&self, family: &str) -> BTreeMap<String, u64> {
        let start = format!("vmafx_bypass_{family}{{");
        let numbers = self.numbers.iter().filter_map(|(name, value)| {
            let label = name.strip_prefix(&start)?.split('"').nth(1)?;
            Some((label.to_owned(), value.parse().unwrap()))
        });
        numbers.collect()
    }

    /// The families, by the names that Prometheus stores.
    pub fn families(&self) -> Vec<&str> {
        let types = self.text.lines().filter_map(|l| l.strip_prefix("# TYPE "));
        types.map(|line| line.split(' ').next().unwrap()).collect()
    }
}

/// The rows of docs/METRICS.md whose `of` is one of these, by name.
pub fn documented(of: &[&str]) -> Vec<&'static str> {
    let page = include_str!("../../docs/METRICS.md");
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| {
        let cells = row.trim_matches('|').split('|').map(str::trim);
        cells.collect::<Vec<_>>()
    });
    cells
        .filter(|cells| cells.len() == 7 && cells[4].split(", ").any(|who| of.contains(&who)))
        .map(|cells| cells[0].trim_matches('`'))
        .collect()
}
