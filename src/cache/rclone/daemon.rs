//! The rclone process behind a mount: which one, and how it was started.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::mounts::{Mount, MountTable};
use crate::reason::{Reason, Refusal};
use crate::sys::{parent, start_time};

/// A process that serves a FUSE mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// Its pid.
    pub pid: u32,
    /// Field 22 of its stat file: with the pid, this process and no later one.
    start_time: u64,
}

impl Daemon {
    fn new(pid: u32) -> Option<Self> {
        Some(Self {
            pid,
            start_time: start_time(pid)?,
        })
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Finds the daemon of a FUSE mount: the one process whose `/dev/fuse`
    /// descriptor names this connection (kernels with `fuse_connection` in
    /// fdinfo), else the one that has the mount point among its arguments.
    ///
    /// # Errors
    /// [`Reason::NotRclone`] where there is none, [`Reason::Ambiguous`] where
    /// there are several, [`Reason::Permission`] where /proc hides them.
    pub fn find(mount: &Mount) -> Result<Self, Refusal> {
        let point = mount.point.display();
        let mut found = Self::candidates(mount)?;
        match (found.pop(), found.is_empty()) {
            (Some(daemon), true) => Ok(daemon),
            (Some(last), false) => {
                let pids: Vec<u32> = found.iter().chain([&last]).map(|d| d.pid).collect();
                Err(Refusal::new(
                    Reason::Ambiguous,
                    format!("`{point}`: pids {pids:?} may serve this mount"),
                ))
            }
            (None, _) => Err(Refusal::new(
                Reason::NotRclone,
                format!("`{point}`: no process serves this mount"),
            )),
        }
    }

    /// The processes that may serve a FUSE mount: more than one while they
    /// start or end, none when it is dead.
    ///
    /// # Errors
    /// [`Reason::Permission`] where there is none, and /proc hides some.
    pub(super) fn candidates(mount: &Mount) -> Result<Vec<Self>, Refusal> {
        let pids = pids().map_err(|e| Refusal::from_io("`/proc`", &e, Reason::IoError))?;
        let mut found = Vec::new();
        let mut hidden = 0;
        for &pid in &pids {
            match fuse_connections(pid) {
                Ok(connections) if connections.contains(&Some(mount.dev.minor())) => {
                    found.push(pid);
                }
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => hidden += 1,
                Err(e) if exited(&e) => {}
                Err(e) => {
                    let what = format_args!("descriptors of pid {pid}");
                    return Err(Refusal::from_io(what, &e, Reason::IoError));
                }
            }
        }
        if found.is_empty() {
            found = pids
                .into_iter()
                .filter(|&pid| serves_by_arguments(pid, &mount.point))
                .collect();
        }
        if found.len() > 1 {
            // While a mount starts or ends, fusermount3 has the descriptor, too;
            // before it is fusermount3, it is a child that looks like rclone.
            let all = found.clone();
            found.retain(|&pid| {
                is_rclone(pid) && parent(pid).is_some_and(|parent| !all.contains(&parent))
            });
        }
        if found.is_empty() && hidden > 0 {
            return Err(Refusal::new(
                Reason::Permission,
                format!(
                    "`{}`: no rclone found, and {hidden} processes are hidden from us",
                    mount.point.display()
                ),
            ));
        }
        Ok(found.into_iter().filter_map(Self::new).collect())
    }

    /// The FUSE connections that it serves, as minor device numbers; `None` for
    /// one of which the kernel does not say which it is.
    pub(super) fn connections(&self) -> io::Result<Vec<Option<u32>>> {
        fuse_connections(self.pid)
    }

    /// The paths of what it has open.
    pub(super) fn open_files(&self) -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid))?.flatten();
        Ok(entries
            .filter_map(|fd| fs::read_link(fd.path()).ok())
            .collect())
    }

    /// Its own mount table: that of its mount namespace.
    pub(super) fn mounts(&self) -> io::Result<MountTable> {
        fs::read(format!("/proc/{}/mountinfo", self.pid)).map(|bytes| MountTable::parse(&bytes))
    }

    /// Whether this is a child of `other` that has not become another program
    /// yet: rclone starts fusermount3 to mount and to unmount.
    pub(super) fn is_forked_from(&self, other: &Self) -> bool {
        parent(self.pid) == Some(other.pid)
            && matches!((arguments(self.pid), arguments(other.pid)), (Ok(own), Ok(its)) if own == its)
    }

    /// How it was started.
    pub(super) fn start(&self) -> io::Result<Start> {
        let environ = fs::read(format!("/proc/{}/environ", self.pid));
        Ok(Start {
            arguments: arguments(self.pid)?,
            environ: environ.ok().map(|bytes| parse_environ(&bytes)),
            folder: fs::read_link(format!("/proc/{}/cwd", self.pid)).ok(),
        })
    }

    /// What to put before an absolute path of the daemon's, so that it leads
    /// to the same file here: nothing where both see the same file systems.
    pub(super) fn root(&self) -> PathBuf {
        let pid = self.pid;
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
        let root = fs::read_link(format!("/proc/{pid}/root"));
        match (namespace("self"), namespace(&pid.to_string()), root) {
            (Ok(own), Ok(its), Ok(root)) if own != its || root != Path::new("/") => {
                PathBuf::from(format!("/proc/{pid}/root"))
            }
            // Where it may not be asked, its paths can only be tried as ours;
            // the proof's gates tell if they lead to something else.
            _ => PathBuf::new(),
        }
    }
}

/// A daemon's arguments and environment, as far as they may be read.
#[derive(Debug, Clone, Default)]
pub(super) struct Start {
    arguments: Vec<OsString>,
    environ: Option<BTreeMap<OsString, OsString>>,
    folder: Option<PathBuf>,
}

impl Start {
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

fn pids() -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        pids.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u32>().ok()),
        );
    }
    Ok(pids)
}

/// Whether an error from /proc means that the process or descriptor is gone.
fn exited(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

/// The FUSE connections (minor device numbers) whose `/dev/fuse` a process holds;
/// `None` where the kernel does not say which.
fn fuse_connections(pid: u32) -> io::Result<Vec<Option<u32>>> {
    let mut connections = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let target = match fs::read_link(entry.path()) {
            Err(e) if exited(&e) => continue,
            target => target?,
        };
        if target == Path::new("/dev/fuse") {
            let info = Path::new(&format!("/proc/{pid}/fdinfo")).join(entry.file_name());
            let info = match fs::read_to_string(info) {
                Err(e) if exited(&e) => continue,
                info => info?,
            };
            connections.push(info.lines().find_map(|line| {
                let number = line.strip_prefix("fuse_connection:")?;
                number.trim().parse::<u32>().ok()
            }));
        }
    }
    Ok(connections)
}

fn arguments(pid: u32) -> io::Result<Vec<OsString>> {
    Ok(fs::read(format!("/proc/{pid}/cmdline"))?
        .split(|&b| b == 0)
        .map(|a| OsString::from_vec(a.to_vec()))
        .collect())
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

fn program_name(arguments: &[OsString]) -> &[u8] {
    let program = arguments.first().map(Path::new);
    let name = program.and_then(Path::file_name);
    name.map_or(b"", OsStrExt::as_bytes)
}

/// `rclone mount`, or `mount.rclone` as mount(8) calls it.
fn is_mounting_rclone(arguments: &[OsString]) -> bool {
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

/// Processes that look like an rclone of any command.
///
/// # Errors
/// Where one cannot be asked, and has not exited.
pub(super) fn all_rclones() -> Result<Vec<Daemon>, Refusal> {
    let failed = |what: &str, e: &io::Error| Refusal::from_io(what, e, Reason::IoError);
    let mut found = Vec::new();
    for pid in pids().map_err(|e| failed("`/proc`", &e))? {
        match program_of(pid) {
            Ok(name) if !named_like_rclone(&name) => continue,
            Ok(_) => {}
            Err(e) if exited(&e) => continue,
            Err(e) => return Err(failed(&format!("name of pid {pid}"), &e)),
        }
        match arguments(pid) {
            Ok(arguments) if !named_like_rclone(program_name(&arguments)) => {}
            Ok(_) => match Daemon::new(pid) {
                Some(daemon) => found.push(daemon),
                None if !Path::new(&format!("/proc/{pid}")).exists() => {}
                None => {
                    let detail = format!("start time of pid {pid} cannot be read");
                    return Err(Refusal::new(Reason::IoError, detail));
                }
            },
            Err(e) if exited(&e) => {}
            Err(e) => return Err(failed(&format!("arguments of pid {pid}"), &e)),
        }
    }
    Ok(found)
}

/// By its program's file first: the arguments of a process that waits for a
/// page of a hung mount cannot be read before it has it.
fn is_rclone(pid: u32) -> bool {
    program_of(pid).is_ok_and(|name| named_like_rclone(&name)) && has_rclones_arguments(pid)
}

/// The name of a process's program, its first 15 bytes.
fn program_of(pid: u32) -> io::Result<Vec<u8>> {
    fs::read(format!("/proc/{pid}/comm"))
}

fn named_like_rclone(name: &[u8]) -> bool {
    name.starts_with(b"rclone") || name.trim_ascii_end() == b"mount.rclone"
}

fn has_rclones_arguments(pid: u32) -> bool {
    arguments(pid).is_ok_and(|arguments| named_like_rclone(program_name(&arguments)))
}

/// Whether a process looks like `rclone mount … POINT`.
fn serves_by_arguments(pid: u32, point: &Path) -> bool {
    if !is_rclone(pid) {
        return false;
    }
    let Ok(arguments) = arguments(pid) else {
        return false;
    };
    let folder = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
    is_mounting_rclone(&arguments)
        && arguments
            .iter()
            .skip(1)
            .any(|a| !a.is_empty() && normalize(&folder.join(a)) == point)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(arguments: &[&str], environ: Option<&[u8]>, folder: Option<&str>) -> Start {
        Start {
            arguments: arguments.iter().map(Into::into).collect(),
            environ: environ.map(parse_environ),
            folder: folder.map(PathBuf::from),
        }
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

    #[test]
    fn a_process_is_alive_until_it_is_not() {
        let own = Daemon::new(std::process::id()).unwrap();
        assert!(own.is_alive());
        let reused = Daemon {
            start_time: own.start_time + 1,
            ..own
        };
        assert!(!reused.is_alive());
    }
}
