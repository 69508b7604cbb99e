//! Which revision is built, for `--version`.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What the program is made of, below the package's folder.
const SOURCES: [&str; 6] = [
    "src",
    "build",
    "build.rs",
    "vmlinux",
    "Cargo.toml",
    "Cargo.lock",
];

/// A revision's name, and what must be watched for it to stay true.
pub struct Revision {
    pub name: String,
    pub watched: Vec<PathBuf>,
}

/// The revision of the git work tree at `root`: `unknown` where there is none.
///
/// With `exact` the name ends in `-dirty` if the sources differ from the commit,
/// and what it follows from is to be watched. Without it ends in `-dev`: it then
/// follows neither edits nor commits, which would build everything anew.
pub fn of(root: &Path, exact: bool) -> Revision {
    let git = |args: &[&str]| git(root, args);
    let commit = git(&["rev-parse", "--show-toplevel"])
        // A folder in somebody else's repository has none of its own.
        .filter(|top| Path::new(top).canonicalize().ok() == root.canonicalize().ok())
        .and_then(|_| git(&["rev-parse", "--short=12", "HEAD"]));
    let Some(commit) = commit else {
        return Revision {
            name: "unknown".into(),
            watched: Vec::new(),
        };
    };
    if !exact {
        return Revision {
            name: format!("{commit}-dev"),
            watched: Vec::new(),
        };
    }
    let status = [&["status", "--porcelain", "--"][..], &SOURCES].concat();
    let dirty = git(&status).is_none_or(|changes| !changes.is_empty());
    // The log of HEAD grows with every commit and checkout, also where the
    // branch itself is among the packed ones, or in another folder's worktree.
    let places = ["HEAD", "logs/HEAD"].map(|name| git(&["rev-parse", "--git-path", name]));
    let watched = places.into_iter().flatten().map(|place| root.join(place));
    let sources = SOURCES.iter().map(|name| root.join(name));
    Revision {
        name: if dirty {
            format!("{commit}-dirty")
        } else {
            commit
        },
        // What is missing would be taken for changed, each time.
        watched: watched
            .chain(sources)
            .filter(|path| path.exists())
            .collect(),
    }
}

/// What git says; `None` where it fails, or is missing.
fn git(root: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new("git")
        // To look must not write into the index.
        .arg("--no-optional-locks")
        .arg("-C")
        .arg(root)
        .args(args)
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
