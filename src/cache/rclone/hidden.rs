//! Which remote a mount shows whose source does not say: `--devname` replaces
//! it. The daemon's own arguments name it, but for an overridden remote's hash.
//!
//! What is found here only tells where to look. Which file is read is decided
//! by what the daemon, which serves nothing else, then has open.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::locate::names_nothing;
use super::names;
use super::start::{base_name, normalize};

/// The arguments that may be the remote: those before the mount point. One that
/// follows no flag is it for certain, for a flag takes one value at most and
/// the command takes two arguments.
pub(super) fn remotes<'a>(
    arguments: &'a [&'a OsStr],
    is_point: impl Fn(&OsStr) -> bool,
) -> Vec<&'a OsStr> {
    let Some(point) = arguments.iter().rposition(|a| is_point(a)) else {
        return Vec::new();
    };
    let is_flag = |a: &OsStr| a.as_bytes().starts_with(b"-");
    let mut possible = Vec::new();
    let mut after_flag = false;
    for &argument in &arguments[..point] {
        if is_flag(argument) {
            after_flag = argument != "--" && !argument.as_bytes().contains(&b'=');
        } else {
            let is_command = matches!(argument.to_str(), Some("mount" | "mount2" | "cmount"));
            if !after_flag && !is_command {
                return vec![argument];
            }
            if !is_command {
                possible.push(argument);
            }
            after_flag = false;
        }
    }
    possible
}

/// Where a remote's cache may be below `vfs`: `<Name>` without its hash, and
/// `<Root>`, in the cache's encoding. `folder` is rclone's working folder: until
/// 1.60, at least, a relative path was made absolute; 1.75 keeps it.
fn name_and_roots(remote: &OsStr, folder: &Path) -> (Vec<u8>, Vec<PathBuf>) {
    let bytes = remote.as_bytes();
    let cleaned = |path: &Path| names::in_cache(path.strip_prefix("/").unwrap_or(path));
    if let Some(colon) = end_of_name(bytes) {
        let root = Path::new(OsStr::from_bytes(&bytes[colon + 1..]));
        return (base_name(bytes).to_vec(), vec![cleaned(root)]);
    }
    let relative = cleaned(&normalize(Path::new(remote)));
    let absolute = cleaned(&normalize(&folder.join(remote)));
    let mut roots = vec![relative, absolute];
    roots.dedup();
    (b"local".to_vec(), roots)
}

/// Where the colon is that ends a remote's name and connection string; `None`
/// for a local path (fs/fspath/path.go `Parse`).
fn end_of_name(remote: &[u8]) -> Option<usize> {
    let mut quote = None;
    for (at, &byte) in remote.iter().enumerate() {
        match (quote, byte) {
            (Some(open), _) if byte == open => quote = None,
            (Some(_), _) => {}
            (None, b'\'' | b'"') if at > 0 && remote[at - 1] == b'=' => quote = Some(byte),
            // A doubled quote goes on.
            (None, b'\'' | b'"') if at > 0 && remote[at - 1] == byte => quote = Some(byte),
            (None, b':') if at > 0 => return Some(at),
            (None, b'/') if !remote[..at].contains(&b',') => return None,
            _ => {}
        }
    }
    None
}

/// The folders below `vfs`, `<Name>/<Root>`, that exist for a remote.
pub(super) fn folders(vfs: &Path, remote: &OsStr, folder: &Path) -> io::Result<Vec<PathBuf>> {
    let (name, roots) = name_and_roots(remote, folder);
    let mut found = Vec::new();
    for entry in fs::read_dir(vfs)? {
        let entry = entry?.file_name();
        let rest = entry.as_bytes().strip_prefix(name.as_slice());
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"{")) {
            for tail in roots.iter().map(|root| Path::new(&entry).join(root)) {
                match fs::metadata(vfs.join(&tail)) {
                    Ok(existing) if existing.is_dir() => found.push(tail),
                    Ok(_) => {}
                    Err(e) if names_nothing(&e) => {}
                    Err(e) => return Err(e),
                }
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remotes_of(line: &str) -> Vec<String> {
        let arguments: Vec<&OsStr> = line.split(' ').map(OsStr::new).collect();
        let found = remotes(&arguments, |a| a == "/m");
        found.iter().map(|a| a.to_string_lossy().into()).collect()
    }

    #[test]
    fn the_remote_is_before_the_mount_point() {
        for (line, expected) in [
            ("mount web:sub /m --devname X", vec!["web:sub"]),
            (
                "mount web:sub --cache-dir /c --devname X /m",
                vec!["web:sub"],
            ),
            (
                "--cache-dir /c mount --devname=X web:sub /m",
                vec!["web:sub"],
            ),
            ("mount --read-only web: /m", vec!["web:"]),
            (
                "mount --vfs-cache-mode full -v web: /m",
                vec!["full", "web:"],
            ),
            ("mount -- web: /m", vec!["web:"]),
            ("/s /m", vec!["/s"]),
            ("mount web: /other", vec![]),
        ] {
            assert_eq!(remotes_of(line), expected, "{line}");
        }
    }

    #[test]
    fn remotes_split_as_rclone_splits_them() {
        for (remote, name, roots) in [
            ("web:sub/", "web", vec!["sub"]),
            ("web,a=1:sub", "web", vec!["sub"]),
            (":http,url='http://h:80/x':a␊", ":http", vec!["a\n"]),
            (":http,url='it''s:x',b=\":\":p", ":http", vec!["p"]),
            (":local:/p//q", ":local", vec!["p/q"]),
            ("/a/b:c", "local", vec!["a/b:c"]),
            ("./src/sub", "local", vec!["src/sub", "w/src/sub"]),
            ("src", "local", vec!["src", "w/src"]),
        ] {
            let (n, r) = name_and_roots(OsStr::new(remote), Path::new("/w"));
            let roots: Vec<PathBuf> = roots.iter().map(PathBuf::from).collect();
            assert_eq!((n.as_slice(), r), (name.as_bytes(), roots), "{remote}");
        }
    }
}
