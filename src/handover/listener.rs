//! The socket file: made with its rights, kept from a second server, removed.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Group, User};
use rustix::fs::{Mode, OFlags, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use super::given::Given;
use super::server::ServerError;
use crate::sys;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;
/// How long another server may take to make its socket in the same folder.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whose the socket file is to be: `user:group`, `user` or `:group`, by name or
/// number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user; `None`: as it is made.
    pub uid: Option<u32>,
    /// The group; `None`: as it is made.
    pub gid: Option<u32>,
}

impl FromStr for Owner {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (user, group) = text.split_once(':').unwrap_or((text, ""));
        let uid = id(user, |name| {
            Ok(User::from_name(name)?.map(|u| u.uid.as_raw()))
        })?;
        let gid = id(group, |name| {
            Ok(Group::from_name(name)?.map(|g| g.gid.as_raw()))
        })?;
        if uid.is_none() && gid.is_none() {
            return Err("neither a user nor a group; write it as user:group".into());
        }
        Ok(Self { uid, gid })
    }
}

fn id(name: &str, find: impl Fn(&str) -> nix::Result<Option<u32>>) -> Result<Option<u32>, String> {
    if name.is_empty() {
        return Ok(None);
    }
    if let Ok(number) = name.parse() {
        return Ok(Some(number));
    }
    match find(name) {
        Ok(Some(number)) => Ok(Some(number)),
        Ok(None) => Err(format!("`{name}` is unknown here")),
        Err(e) => Err(format!("`{name}`: {e}")),
    }
}

/// A listening socket.
pub(super) struct Listener {
    pub(super) socket: OwnedFd,
    /// Its file, if we have made it: to go with it.
    _file: Option<SocketFile>,
}

/// A socket file; goes when it is dropped.
struct SocketFile {
    path: PathBuf,
    /// Its device and inode.
    identity: (u64, u64),
}

impl Listener {
    /// Makes the socket and its file, which a dead server may have left.
    pub(super) fn new(path: &Path, mode: u32, owner: Owner) -> Result<Self, ServerError> {
        let failed =
            |e: io::Error| ServerError::Failed(format!("socket `{}`: {e}", path.display()));
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // One server at a time looks for an old file and makes its own.
        let _lock = lock(folder).map_err(failed)?;
        remove_stale(path, &address)?;
        let socket = socket().map_err(failed)?;
        // Linux makes the file with the socket's own mode, less the umask: at
        // no moment may others connect, whatever the umask is.
        fchmod(&socket, Mode::from_raw_mode(0o600)).map_err(|e| failed(e.into()))?;
        bind(&socket, &address).map_err(|e| failed(e.into()))?;
        let found = fs::symlink_metadata(path).map_err(failed)?;
        let file = SocketFile {
            path: path.to_path_buf(),
            identity: (found.dev(), found.ino()),
        };
        give(path, mode, owner).map_err(failed)?;
        listen(&socket, BACKLOG).map_err(|e| failed(e.into()))?;
        Ok(Self {
            socket,
            _file: Some(file),
        })
    }

    /// One that was made by another, whose file, mode and owner are not ours to change.
    pub(super) fn given(given: Given) -> Self {
        Self {
            socket: given.into_socket(),
            _file: None,
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Unless another's has come in its place.
        let own = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if own {
            // Left, it does no harm: the next server replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Gives a socket file its owner and mode. Whoever may write to the folder can
/// put another file in its place; so by a descriptor, of a socket of ours.
fn give(path: &Path, mode: u32, owner: Owner) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let found = file.metadata()?;
    if !found.file_type().is_socket() || found.uid() != nix::unistd::geteuid().as_raw() {
        return Err(io::Error::other("another file has taken its place"));
    }
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::os::unix::fs::chown(&link, owner.uid, owner.gid)?;
    fs::set_permissions(&link, fs::Permissions::from_mode(mode))
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

fn lock(folder: &Path) -> io::Result<Flock<File>> {
    let deadline = Instant::now() + PATIENCE;
    let mut file = File::open(folder)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, errno)) if Instant::now() >= deadline => return Err(errno.into()),
            Err((back, _)) => file = back,
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Removes the socket file of a server that is no more.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ServerError> {
    let failed = |what: &str| ServerError::Failed(format!("socket `{}`: {what}", path.display()));
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(&e.to_string())),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(failed("is there, and no socket: name another path"));
        }
        Ok(_) => {}
    }
    let probe = socket().map_err(|e| failed(&e.to_string()))?;
    match connect(&probe, address) {
        Err(rustix::io::Errno::CONNREFUSED) => {
            fs::remove_file(path).map_err(|e| failed(&e.to_string()))
        }
        Ok(()) => {
            let pid = sys::peer(&probe).map_or(0, |peer| peer.pid);
            let path = path.to_path_buf();
            Err(ServerError::InUse { pid, path })
        }
        // So many wait that it takes no more, or it is of another kind.
        Err(e) => Err(failed(&format!("another program listens there: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_parse() {
        let parse = |text: &str| text.parse::<Owner>().ok().map(|o| (o.uid, o.gid));
        assert_eq!(parse("root"), Some((Some(0), None)));
        assert_eq!(parse("root:root"), Some((Some(0), Some(0))));
        assert_eq!(parse(":12"), Some((None, Some(12))));
        assert_eq!(parse("7:8"), Some((Some(7), Some(8))));
        for bad in ["", ":", "no such user", "root:no such group"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_dead_servers_file_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let make = |mode| Listener::new(&path, mode, Owner::default());
        let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
        let first = make(0o660).unwrap();
        assert_eq!(mode(), 0o660);
        let Err(ServerError::InUse { pid, .. }) = make(0o600) else {
            panic!("a second server listens");
        };
        assert_eq!(pid, std::process::id());
        drop(first);
        assert!(!path.exists());
        // As a server that was killed leaves it.
        let dead = make(0o600).unwrap();
        let copy = dir.path().join("copy");
        fs::hard_link(&path, &copy).unwrap();
        drop(dead);
        fs::rename(&copy, &path).unwrap();
        let next = make(0o666).unwrap();
        assert_eq!(mode(), 0o666);
        // Another's file is left alone.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        drop(next);
        assert!(path.exists());
        assert!(matches!(make(0o600), Err(ServerError::Failed(_))));
        let long = dir.path().join("x".repeat(200));
        assert!(Listener::new(&long, 0o600, Owner::default()).is_err());
    }

    #[test]
    fn what_has_taken_the_files_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("secret"), dir.path().join("s"));
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for taken in [&link, &path] {
            assert!(give(taken, 0o666, Owner::default()).is_err());
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn the_file_is_born_private() {
        // What `bind` makes of the socket's mode, before anything is changed.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = socket().unwrap();
        fchmod(&socket, Mode::from_raw_mode(0o600)).unwrap();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }
}
