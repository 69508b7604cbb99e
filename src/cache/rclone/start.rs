//! How an rclone was started, and what follows from it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::reason::{Reason, Refusal};

/// A daemon's arguments and environment, as far as they may be read.
#[derive(Debug, Clone, Default)]
pub(super) struct Start {
    arguments: Vec<OsString>,
    environ: Option<BTreeMap<OsString, OsString>>,
    folder: Option<PathBuf>,
}

impl Start {
    /// From what /proc has of a process; `None`: it may not be read.
    pub(super) fn new(
        arguments: Vec<OsString>,
        environ: Option<&[u8]>,
        folder: Option<PathBuf>,
    ) -> Self {
        Self {
            arguments,
            environ: environ.map(parse_environ),
            folder,
        }
    }

    /// The value of a flag, `--name VALUE` or `--name=VALUE`; the last one, as
    /// in rclone's pflag, else of its environment variable `RCLONE_NAME`.
    pub(super) fn option(&self, name: &str) -> Option<OsString> {
        let flag = format!("--{name}");
        let mut value = None;
        let mut arguments = self.arguments.iter().skip(1);
        while let Some(argument) = arguments.next() {
            let bytes = argument.as_bytes();
            if bytes == b"--" {
                break;
            } else if bytes == flag.as_bytes() {
                value = arguments.next().cloned();
            } else if let Some(rest) = bytes.strip_prefix(format!("{flag}=").as_bytes()) {
                value = Some(OsStr::from_bytes(rest).to_os_string());
            }
        }
        let variable = format!("RCLONE_{}", name.replace('-', "_").to_uppercase());
        value.or_else(|| self.variable(&variable))
    }

    fn variable(&self, name: &str) -> Option<OsString> {
        let value = self.environ.as_ref()?.get(OsStr::new(name))?;
        (!value.is_empty()).then(|| value.clone())
    }

    /// Whether a flag that takes no value may be on.
    pub(super) fn is_on(&self, name: &str) -> bool {
        let flag = format!("--{name}");
        self.arguments.iter().any(|a| a == flag.as_str())
            || self.option(name).is_some_and(|value| value != "false")
    }

    /// Whether /proc hides the process's descriptors, working folder and root.
    pub(super) fn is_hidden(&self) -> bool {
        self.folder.is_none()
    }

    /// Whether it can have been told to serve anything but one mount, now or later.
    pub(super) fn may_serve_more(&self) -> bool {
        self.environ.is_none() || self.is_on("rc") || !is_mounting_rclone(&self.arguments)
    }

    /// Whether it is certain that RCLONE_DEVNAME is not what a mount's source
    /// shows: the arguments name the same remote, where the environment is closed.
    pub(super) fn tells_devname(&self, name: &[u8]) -> bool {
        self.environ.is_some() || self.remotes().any(|remote| remote == name)
    }

    /// The arguments after the program's name.
    pub(super) fn arguments(&self) -> Vec<&OsStr> {
        self.arguments
            .iter()
            .skip(1)
            .map(OsString::as_os_str)
            .collect()
    }

    /// A path among the arguments, absolute.
    pub(super) fn resolve(&self, path: &OsStr) -> PathBuf {
        normalize(&self.working_folder().join(path))
    }

    /// The working folder; empty where it may not be read.
    pub(super) fn working_folder(&self) -> &Path {
        self.folder.as_deref().unwrap_or(Path::new(""))
    }

    /// The names of remotes among the arguments, without connection strings
    /// and hashes: `web` of `web:sub` and of `web,opt=1:`, `:http` of `:http,url=…:`.
    pub(super) fn remotes(&self) -> impl Iterator<Item = &[u8]> {
        let arguments = self.arguments.iter().skip(1).map(|a| a.as_bytes());
        arguments.filter(|a| !a.starts_with(b"-")).map(|argument| {
            if argument.starts_with(b"/") || argument.starts_with(b".") {
                b"local"
            } else {
                base_name(argument)
            }
        })
    }

    /// The cache folder, absolute in the daemon's eyes (fs/config/config.go,
    /// `makeCacheDir`).
    ///
    /// # Errors
    /// [`Reason::Permission`] where it depends on an environment that may not be read.
    pub(super) fn cache_folder(&self) -> Result<PathBuf, Refusal> {
        let hidden = |what| {
            Refusal::new(
                Reason::Permission,
                format!("the daemon's {what} may not be read, and so not its cache folder"),
            )
        };
        let folder = if let Some(folder) = self.option("cache-dir") {
            PathBuf::from(folder)
        } else if self.environ.is_none() {
            return Err(hidden("environment"));
        } else if let Some(base) = self.variable("XDG_CACHE_HOME") {
            if !Path::new(&base).is_absolute() {
                // Go's os.UserCacheDir took it at first, and later does not.
                return Err(Refusal::new(
                    Reason::Unsupported,
                    "the daemon's XDG_CACHE_HOME is relative, which rclone's versions read differently",
                ));
            }
            PathBuf::from(base).join("rclone")
        } else if let Some(home) = self.variable("HOME") {
            PathBuf::from(home).join(".cache/rclone")
        } else {
            let temporary = self.variable("TMPDIR").unwrap_or_else(|| "/tmp".into());
            PathBuf::from(temporary).join("rclone")
        };
        if folder.is_absolute() {
            return Ok(folder);
        }
        let base = self
            .folder
            .as_ref()
            .ok_or_else(|| hidden("working folder"))?;
        Ok(normalize(&base.join(folder)))
    }
}

/// A remote's name up to its options, hash or path.
pub(super) fn base_name(name: &[u8]) -> &[u8] {
    let rest = name.get(1..).unwrap_or_default();
    let end = rest.iter().position(|b| b":,{".contains(b));
    end.map_or(name, |end| &name[..=end])
}

/// Resolves `.` and `..` by the text alone, as Go's filepath.Clean does.
pub(super) fn normalize(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

fn parse_environ(bytes: &[u8]) -> BTreeMap<OsString, OsString> {
    bytes
        .split(|&b| b == 0)
        .filter_map(|entry| {
            let equals = entry.iter().position(|&b| b == b'=')?;
            let (name, value) = (&entry[..equals], &entry[equals + 1..]);
            Some((
                OsStr::from_bytes(name).to_os_string(),
                OsStr::from_bytes(value).to_os_string(),
            ))
        })
        .collect()
}

pub(super) fn program_name(arguments: &[OsString]) -> &[u8] {
    let program = arguments.first().map(Path::new);
    let name = program.and_then(Path::file_name);
    name.map_or(b"", OsStrExt::as_bytes)
}

/// `rclone mount`, or `mount.rclone` as mount(8) calls it.
pub(super) fn is_mounting_rclone(arguments: &[OsString]) -> bool {
    let name = program_name(arguments);
    let commands: [&OsStr; 3] = ["mount".as_ref(), "mount2".as_ref(), "cmount".as_ref()];
    let mounts = || {
        arguments
            .iter()
            .skip(1)
            .any(|a| commands.contains(&a.as_os_str()))
    };
    name == b"mount.rclone" || (name.starts_with(b"rclone") && mounts())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(arguments: &[&str], environ: Option<&[u8]>, folder: Option<&str>) -> Start {
        let arguments = arguments.iter().map(Into::into).collect();
        Start::new(arguments, environ, folder.map(PathBuf::from))
    }

    #[test]
    fn the_cache_folder_follows_rclone() {
        let folder = |a: &[&str], e: Option<&[u8]>, d: Option<&str>| {
            start(a, e, d).cache_folder().map_err(|r| r.reason)
        };
        let none: Option<&[u8]> = Some(b"");
        for (got, expected) in [
            (folder(&["r", "--cache-dir", "/c"], None, None), "/c"),
            (
                folder(&["r", "--cache-dir=/c", "--cache-dir=/d"], None, None),
                "/d",
            ),
            (
                folder(&["r", "--cache-dir", "c/../d"], None, Some("/w")),
                "/w/d",
            ),
            (
                folder(&["r", "--", "--cache-dir=/c"], Some(b"HOME=/h\0"), None),
                "/h/.cache/rclone",
            ),
            (
                folder(&["r"], Some(b"RCLONE_CACHE_DIR=e\0HOME=/h\0"), Some("/w")),
                "/w/e",
            ),
            (
                folder(&["r"], Some(b"XDG_CACHE_HOME=/x\0HOME=/h\0"), None),
                "/x/rclone",
            ),
            (folder(&["r"], none, None), "/tmp/rclone"),
        ] {
            assert_eq!(got.unwrap(), Path::new(expected));
        }
        assert_eq!(
            folder(&["r"], Some(b"XDG_CACHE_HOME=x\0HOME=/h\0"), Some("/w")),
            Err(Reason::Unsupported)
        );
        assert_eq!(folder(&["r"], None, None), Err(Reason::Permission));
        assert_eq!(
            folder(&["r", "--cache-dir", "c"], none, None),
            Err(Reason::Permission)
        );
    }
}
