//! A listening socket that the service manager has made and gives to this process:
//! sd_listen_fds(3).

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, getsockname, sockopt};

use super::server::ServerError;
use crate::sys;

/// A socket to serve at, made by systemd or another that speaks its protocol. Clients
/// that connect while nobody serves wait in it.
#[derive(Debug)]
pub struct Given {
    socket: OwnedFd,
    path: PathBuf,
}

impl Given {
    /// The socket that this process was started with; `None`: it was started without.
    ///
    /// # Errors
    /// [`ServerError::Unfit`] where what it was started with is anything else than one
    /// listening Unix socket of packets with a path.
    pub fn from_env() -> Result<Option<Self>, ServerError> {
        let mut numbers = sd_notify::listen_fds()
            .map_err(|e| ServerError::Unfit(format!("LISTEN_FDS names what is not there: {e}")))?;
        match (numbers.next(), numbers.len()) {
            (None, _) => Ok(None),
            (Some(number), 0) => Self::of(number).map(Some),
            (Some(_), more) => Err(ServerError::Unfit(format!(
                "{} were given: leave one ListenSequentialPacket= in its unit",
                more + 1
            ))),
        }
    }

    fn of(number: RawFd) -> Result<Self, ServerError> {
        let failed = |e: io::Error| ServerError::Unfit(format!("descriptor {number}: {e}"));
        let socket = sys::duplicate(number).map_err(failed)?;
        let is_listener = || -> rustix::io::Result<bool> {
            Ok(sockopt::socket_domain(&socket)? == AddressFamily::UNIX
                && sockopt::socket_type(&socket)? == SocketType::SEQPACKET
                && sockopt::socket_acceptconn(&socket)?)
        };
        if !is_listener().map_err(|e| failed(e.into()))? {
            let why = "not a listening Unix socket of packets: write ListenSequentialPacket=PATH, \
                       and Accept=no, in its unit";
            return Err(ServerError::Unfit(why.into()));
        }
        let address = getsockname(&socket).and_then(SocketAddrUnix::try_from);
        let address = address.map_err(|e| failed(e.into()))?;
        let Some(path) = address.path_bytes() else {
            let why = "it has no path: write ListenSequentialPacket=PATH in its unit";
            return Err(ServerError::Unfit(why.into()));
        };
        let path = PathBuf::from(OsStr::from_bytes(path));
        // Whoever accepts also waits for the end of the server.
        rustix::io::ioctl_fionbio(&socket, true).map_err(|e| failed(e.into()))?;
        Ok(Self { socket, path })
    }

    /// Where clients find it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a path leads to it.
    #[must_use]
    pub fn is_at(&self, path: &Path) -> bool {
        let place = |path| fs::canonicalize(path).or_else(|_| std::path::absolute(path));
        matches!((place(path), place(&self.path)), (Ok(one), Ok(other)) if one == other)
    }

    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixListener;

    use rustix::net::{SocketFlags, bind, listen, socket_with};

    use super::*;

    fn packets() -> OwnedFd {
        let flags = SocketFlags::CLOEXEC;
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    #[test]
    fn a_listener_of_packets_is_taken_and_its_file_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = packets();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        assert!(Given::of(socket.as_raw_fd()).is_err(), "it does not listen");
        listen(&socket, 1).unwrap();
        let given = Given::of(socket.as_raw_fd()).unwrap();
        assert_eq!(given.path(), path);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(given.is_at(&link.join("s")) && !given.is_at(&dir.path().join("t")));
        drop(super::super::listener::Listener::given(given));
        assert!(path.exists());
    }

    #[test]
    fn what_else_may_be_given_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let stream = UnixListener::bind(dir.path().join("stream")).unwrap();
        let inet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let file = fs::File::open("/dev/null").unwrap();
        let nameless = packets();
        bind(
            &nameless,
            &SocketAddrUnix::new_abstract_name(b"vmafx-bypass-test-given").unwrap(),
        )
        .unwrap();
        listen(&nameless, 1).unwrap();
        for (number, message) in [
            (stream.as_raw_fd(), "ListenSequentialPacket"),
            (inet.as_raw_fd(), "ListenSequentialPacket"),
            (file.as_raw_fd(), "on non-socket"),
            (nameless.as_raw_fd(), "has no path"),
            (-1, "Bad file descriptor"),
            (RawFd::MAX, "Bad file descriptor"),
        ] {
            let error = Given::of(number).unwrap_err().to_string();
            assert!(
                error.to_lowercase().contains(&message.to_lowercase()),
                "{error}"
            );
        }
    }
}
