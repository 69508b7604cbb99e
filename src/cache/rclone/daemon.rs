//! The rclone process behind a mount.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::start::{Start, is_mounting_rclone, normalize, program_name};
use crate::mounts::{Mount, MountTable};
use crate::reason::{Reason, Refusal};
use crate::sys::{is_exiting, parent, start_time};

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

    /// `None` where the process has exited.
    ///
    /// # Errors
    /// Where it runs, and cannot be asked since when.
    fn running(pid: u32) -> Result<Option<Self>, Refusal> {
        match Self::new(pid) {
            None if !has_exited(pid) => {
                let detail = format!("start time of pid {pid} cannot be read");
                Err(Refusal::new(Reason::IoError, detail))
            }
            found => Ok(found),
        }
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Whether it runs no more for certain: where it cannot be asked, it may.
    pub(super) fn has_exited(&self) -> bool {
        match start_time(self.pid) {
            // One that is exiting shows neither arguments nor folders any more.
            Some(start_time) => start_time != self.start_time || is_exiting(self.pid),
            None => has_exited(self.pid),
        }
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
    /// [`Reason::Permission`] where there is none, and /proc hides some;
    /// [`Reason::IoError`] where one cannot be asked, which might be it.
    pub(super) fn candidates(mount: &Mount) -> Result<Vec<Self>, Refusal> {
        let pids = pids().map_err(|e| Refusal::from_io("`/proc`", &e, Reason::IoError))?;
        let mut found = Vec::new();
        let mut hidden = 0;
        // First those that are, or may be, named like it: to list the descriptors
        // of all takes long where they have many. What else holds the connection
        // of one that is found would be left out below.
        let named = |pid: &&u32| program_of(**pid).map_or(true, |name| named_like_rclone(&name));
        let (likely, others): (Vec<u32>, Vec<u32>) = pids.iter().partition(named);
        for (index, pid) in likely.iter().chain(&others).copied().enumerate() {
            if index >= likely.len() && !found.is_empty() {
                break;
            }
            match fuse_connections(pid) {
                Ok(connections) if connections.contains(&Some(mount.dev.minor())) => {
                    found.push(pid);
                }
                Ok(_) => {}
                Err(e) if denied(&e) => hidden += 1,
                Err(e) if exited(&e) => {}
                Err(e) => {
                    let what = format_args!("descriptors of pid {pid}");
                    return Err(Refusal::from_io(what, &e, Reason::IoError));
                }
            }
        }
        if found.is_empty() {
            for &pid in &pids {
                if serves_by_arguments(pid, &mount.point)? {
                    found.push(pid);
                }
            }
        }
        if found.len() > 1 {
            // While a mount starts or ends, fusermount3 has the descriptor, too;
            // before it is fusermount3, it is a child that looks like rclone.
            let all = std::mem::take(&mut found);
            for &pid in &all {
                let child = parent(pid).is_some_and(|parent| all.contains(&parent));
                if !child && is_rclone(pid)? {
                    found.push(pid);
                }
            }
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
        let found = found.into_iter().map(Self::running);
        found.filter_map(Result::transpose).collect()
    }

    /// The FUSE connections that it serves, as minor device numbers; `None` for
    /// one of which the kernel does not say which it is.
    pub(super) fn connections(&self) -> io::Result<Vec<Option<u32>>> {
        fuse_connections(self.pid)
    }

    /// The paths of what it has open.
    pub(super) fn open_files(&self) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid))? {
            match fs::read_link(entry?.path()) {
                Err(e) if exited(&e) => {}
                target => files.push(target?),
            }
        }
        Ok(files)
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
    ///
    /// /proc shows a process's descriptors, working folder and root to whoever
    /// may trace it, and its environment to them and some others
    /// (proc_pid_cwd(5), proc_pid_environ(5)). What alone may not be read is a
    /// call that has failed.
    pub(super) fn start(&self) -> io::Result<Start> {
        let hides_descriptors = || self.connections().is_err_and(|e| denied(&e));
        let folder = match fs::read_link(format!("/proc/{}/cwd", self.pid)) {
            Err(e) if denied(&e) && hides_descriptors() => None,
            folder => Some(folder?),
        };
        let environ = match fs::read(format!("/proc/{}/environ", self.pid)) {
            Err(e) if denied(&e) && folder.is_none() => None,
            environ => Some(environ?),
        };
        let arguments = arguments(self.pid)?;
        Ok(Start::new(arguments, environ.as_deref(), folder))
    }

    /// What to put before an absolute path of the daemon's, so that it leads
    /// to the same file here: nothing where both see the same file systems.
    pub(super) fn root(&self, start: &Start) -> io::Result<PathBuf> {
        let pid = self.pid;
        let asked = || {
            let own = fs::read_link("/proc/self/ns/mnt")?;
            let its = fs::read_link(format!("/proc/{pid}/ns/mnt"))?;
            let root = fs::read_link(format!("/proc/{pid}/root"))?;
            Ok(own == its && root == Path::new("/"))
        };
        match asked() {
            Ok(true) => Ok(PathBuf::new()),
            Ok(false) => Ok(PathBuf::from(format!("/proc/{pid}/root"))),
            // Then its paths can only be tried as ours; the proof's gates tell
            // if they lead to something else.
            Err(e) if denied(&e) && start.is_hidden() => Ok(PathBuf::new()),
            Err(e) => Err(e),
        }
    }
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
pub(super) fn exited(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

/// Whether /proc shows something to others only.
pub(super) fn denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// Whether there is no such process, or a zombie: it has no arguments.
fn has_exited(pid: u32) -> bool {
    match arguments(pid) {
        Ok(arguments) => arguments.iter().all(|argument| argument.is_empty()),
        Err(e) => exited(&e),
    }
}

/// The FUSE connections (minor device numbers) whose `/dev/fuse` a process holds;
/// `None` where the kernel does not say which.
fn fuse_connections(pid: u32) -> io::Result<Vec<Option<u32>>> {
    let mut connections = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
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

/// Processes that look like an rclone of any command.
///
/// # Errors
/// Where one cannot be asked, and has not exited.
pub(super) fn all_rclones() -> Result<Vec<Daemon>, Refusal> {
    let mut found = Vec::new();
    for pid in pids().map_err(|e| Refusal::from_io("`/proc`", &e, Reason::IoError))? {
        if is_rclone(pid)? {
            found.extend(Daemon::running(pid)?);
        }
    }
    Ok(found)
}

/// Whether a process looks like an rclone of any command.
///
/// # Errors
/// Where it cannot be asked, and has not exited.
fn is_rclone(pid: u32) -> Result<bool, Refusal> {
    Ok(rclones_arguments(pid)?.is_some())
}

/// The arguments of a process that looks like an rclone of any command.
///
/// By its program's file first: the arguments of a process that waits for a
/// page of a hung mount cannot be read before it has it.
fn rclones_arguments(pid: u32) -> Result<Option<Vec<OsString>>, Refusal> {
    let failed = |what: &str, e: &io::Error| {
        let what = format_args!("{what} of pid {pid}");
        Err(Refusal::from_io(what, e, Reason::IoError))
    };
    match program_of(pid) {
        Ok(name) if !named_like_rclone(&name) => return Ok(None),
        Ok(_) => {}
        Err(e) if exited(&e) => return Ok(None),
        Err(e) => return failed("name", &e),
    }
    match arguments(pid) {
        Ok(arguments) => Ok(Some(arguments).filter(|a| named_like_rclone(program_name(a)))),
        Err(e) if exited(&e) => Ok(None),
        Err(e) => failed("arguments", &e),
    }
}

/// The name of a process's program, its first 15 bytes.
fn program_of(pid: u32) -> io::Result<Vec<u8>> {
    fs::read(format!("/proc/{pid}/comm"))
}

fn named_like_rclone(name: &[u8]) -> bool {
    name.starts_with(b"rclone") || name.trim_ascii_end() == b"mount.rclone"
}

/// Whether a process looks like `rclone mount … POINT`.
fn serves_by_arguments(pid: u32, point: &Path) -> Result<bool, Refusal> {
    let Some(arguments) = rclones_arguments(pid)?.filter(|a| is_mounting_rclone(a)) else {
        return Ok(false);
    };
    let folder = match fs::read_link(format!("/proc/{pid}/cwd")) {
        Ok(folder) => folder,
        Err(e) if exited(&e) => return Ok(false),
        // Then only absolute arguments can be told.
        Err(e) if denied(&e) => PathBuf::new(),
        Err(e) => {
            let what = format_args!("working folder of pid {pid}");
            return Err(Refusal::from_io(what, &e, Reason::IoError));
        }
    };
    let mut arguments = arguments.iter().skip(1);
    Ok(arguments.any(|a| !a.is_empty() && normalize(&folder.join(a)) == point))
}

#[cfg(test)]
mod tests {
    use super::*;

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
