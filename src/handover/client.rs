//! The client's side: one connection a clip, as long as its proof lasts.

use std::env;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
};

use super::protocol::{ANSWER_BYTES, Answer, Request, WholeKind};
use super::wire;
use crate::cache::proof::Timestamp;
use crate::cache::ranges::Ranges;
use crate::reason::{Reason, Refusal};
use crate::sys;

/// The environment's name of the server's socket.
pub const VARIABLE: &str = "VMAFX_BYPASS_SOCKET";

/// The socket that the environment names, if it does.
#[must_use]
pub fn socket_from_env() -> Option<PathBuf> {
    let path = env::var_os(VARIABLE).filter(|path| !path.is_empty());
    path.map(PathBuf::from)
}

/// How long a server may take to answer what it knows without FUSE.
const PATIENCE: Duration = Duration::from_millis(250);
/// How many times as long a proof may take, for which rclone is asked; and a
/// whole clip, which may have to be copied.
const PROOF: u32 = 4;
const WHOLE: u32 = 240;
/// How long a server that was silent is left alone, at first; doubled up to 64
/// times.
const LEAVE_ALONE: Duration = Duration::from_secs(1);
const MAX_DOUBLINGS: u32 = 6;

/// Servers that did not answer: one that hangs must not delay every open.
static SILENT: Mutex<Vec<Silent>> = Mutex::new(Vec::new());

struct Silent {
    path: PathBuf,
    until: Instant,
    doublings: u32,
}

fn check_silent(path: &Path) -> Result<(), Refusal> {
    let silent = SILENT.lock().unwrap_or_else(PoisonError::into_inner);
    match silent.iter().find(|s| s.path == path) {
        Some(found) if Instant::now() < found.until => {
            Err(unavailable(path, "did not answer lately"))
        }
        _ => Ok(()),
    }
}

fn note_silent(path: &Path, is_silent: bool) {
    let mut silent = SILENT.lock().unwrap_or_else(PoisonError::into_inner);
    let index = silent.iter().position(|s| s.path == path);
    match (index, is_silent) {
        (Some(index), true) => {
            let found = &mut silent[index];
            found.doublings = (found.doublings + 1).min(MAX_DOUBLINGS);
            found.until = Instant::now() + LEAVE_ALONE * (1 << found.doublings);
        }
        (Some(index), false) => drop(silent.swap_remove(index)),
        (None, true) => silent.push(Silent {
            path: path.to_path_buf(),
            until: Instant::now() + LEAVE_ALONE,
            doublings: 0,
        }),
        (None, false) => {}
    }
}

fn unavailable(path: &Path, what: impl std::fmt::Display) -> Refusal {
    let path = path.display();
    Refusal::new(Reason::Handover, format!("server at `{path}`: {what}"))
}

/// What a server has given, once checked.
pub(crate) struct Granted {
    /// Tells whether the proof still holds.
    pub(crate) connection: Connection,
    /// The cache file, read-only.
    pub(crate) data: File,
    /// The clip's size, bytes.
    pub(crate) size: u64,
    /// Its modification time.
    pub(crate) modified: Timestamp,
    /// Whether all that is read through FUSE goes into the cache file.
    pub(crate) caches_reads: bool,
    /// What is proven.
    pub(crate) ranges: Ranges,
}

/// A connection to a server that may be believed.
pub(crate) struct Connection {
    /// `None` once an answer did not come: a late one would be taken for the
    /// next.
    socket: Option<OwnedFd>,
    path: PathBuf,
    buffer: Box<[u8]>,
    token: u64,
    /// Who may ask. A child of fork(2) has the socket, too: of two that ask, each
    /// might get the other's answer, and every one after it an older one's.
    pid: u32,
}

impl Connection {
    /// Connects to a server that runs as root or as ourselves: of another user
    /// we would have to believe every byte.
    pub(crate) fn open(path: &Path) -> Result<Self, Refusal> {
        check_silent(path)?;
        let failed = |e: io::Error| unavailable(path, e);
        // Blocking, but for the time that is set.
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| failed(e.into()))?;
        for timeout in [Timeout::Send, Timeout::Recv] {
            set_socket_timeout(&socket, timeout, Some(PATIENCE)).map_err(|e| failed(e.into()))?;
        }
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        connect(&socket, &address).map_err(|e| {
            // More wait to be accepted than it has room for.
            if e == rustix::io::Errno::AGAIN {
                note_silent(path, true);
            }
            failed(e.into())
        })?;
        let peer = sys::peer(&socket).map_err(failed)?;
        if peer.uid != 0 && peer.uid != nix::unistd::geteuid().as_raw() {
            let what = format_args!("runs as uid {}: neither root nor ourselves", peer.uid);
            return Err(unavailable(path, what));
        }
        Ok(Self {
            socket: Some(socket),
            path: path.to_path_buf(),
            buffer: vec![0; ANSWER_BYTES + 1].into_boxed_slice(),
            token: 0,
            pid: std::process::id(),
        })
    }

    /// Asks, and waits so many times the usual time for an answer.
    fn ask(
        &mut self,
        request: Request,
        descriptor: Option<BorrowedFd<'_>>,
        patience: u32,
    ) -> Result<(Answer, Vec<OwnedFd>), Refusal> {
        let Some(socket) = self.socket.take() else {
            return Err(unavailable(&self.path, "did not answer before"));
        };
        if self.pid != std::process::id() {
            let what = format_args!("the connection is that of the parent, pid {}", self.pid);
            return Err(unavailable(&self.path, what));
        }
        wire::send(&socket, &request.encode(), descriptor)
            .map_err(|e| unavailable(&self.path, e))?;
        let mut tries = 0;
        let packet = loop {
            match wire::receive(&socket, &mut self.buffer, RecvFlags::empty()) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    tries += 1;
                    let is_last = tries >= patience;
                    // A copy may take its time; a server that hangs may not.
                    if (is_last || tries % PROOF == 0) && !self.is_alive(patience) {
                        note_silent(&self.path, true);
                        return Err(unavailable(&self.path, "does not answer"));
                    }
                    if is_last {
                        return Err(unavailable(&self.path, "takes too long for this clip"));
                    }
                }
                Err(e) => return Err(unavailable(&self.path, e)),
                Ok(packet) => break packet,
            }
        };
        if packet.length == 0 {
            return Err(unavailable(&self.path, "has closed the connection"));
        }
        if packet.is_cut {
            return Err(unavailable(&self.path, "gave an answer that is too long"));
        }
        let answer =
            Answer::parse(&self.buffer[..packet.length]).map_err(|e| unavailable(&self.path, e))?;
        // It answers: what it says, the caller judges.
        note_silent(&self.path, false);
        self.socket = Some(socket);
        match answer {
            Answer::Refused(refusal) => Err(refusal),
            answer => Ok((answer, packet.descriptors)),
        }
    }

    /// Whether it is a clip that takes its time, and not the server.
    fn is_alive(&self, patience: u32) -> bool {
        patience > 1 && answers(&self.path).is_ok()
    }

    /// An answer of another kind than was asked for.
    fn confused(&mut self) -> Refusal {
        self.socket = None;
        unavailable(&self.path, "gave an answer to another question")
    }

    /// Asks for a clip's cache file and its proven ranges.
    pub(crate) fn ranges(
        mut self,
        clip: BorrowedFd<'_>,
        pulled: Option<u64>,
    ) -> Result<Granted, Refusal> {
        let request = Request::Ranges { pulled };
        let (answer, descriptors) = self.ask(request, Some(clip), PROOF)?;
        let Answer::Ranges {
            token,
            size,
            modified,
            caches_reads,
            total,
            ranges: mut spans,
        } = answer
        else {
            return Err(self.confused());
        };
        self.token = token;
        while spans.len() < total as usize {
            let from = spans.len() as u64;
            let (answer, _) = self.ask(Request::More { token, from }, None, 1)?;
            match answer {
                Answer::More { ranges, .. } if !ranges.is_empty() => spans.extend(ranges),
                _ => return Err(self.confused()),
            }
        }
        let pairs: Vec<(u64, u64)> = spans.iter().map(|s| (s.start, s.end - s.start)).collect();
        let is_inside = spans.last().is_none_or(|last| last.end <= size);
        let ranges = Ranges::from_sorted(&pairs, size).filter(|_| is_inside);
        let ranges = ranges.ok_or_else(|| unavailable(&self.path, "gave ranges out of order"))?;
        let data = only(&self.path, descriptors)?;
        check_file(&self.path, &data, size)?;
        Ok(Granted {
            connection: self,
            data,
            size,
            modified,
            caches_reads,
            ranges,
        })
    }

    /// Whether the proof that was given still holds.
    pub(crate) fn check(&mut self) -> Result<(), Refusal> {
        let token = self.token;
        match self.ask(Request::Check { token }, None, 1)?.0 {
            Answer::Valid { token: same } if same == token => Ok(()),
            _ => Err(self.confused()),
        }
    }

    /// Tells that the cache has another byte than FUSE, which the server then
    /// looks at itself.
    pub(crate) fn differs(&mut self, clip: BorrowedFd<'_>, offset: u64) -> Result<(), Refusal> {
        let token = self.token;
        let request = Request::Differs { token, offset };
        self.ask(request, Some(clip), PROOF).map(drop)
    }
}

/// Asks a server about a proof that it has not given: whether one is there that may
/// be believed, and answers.
///
/// # Errors
/// Why not.
pub fn answers(socket: &Path) -> Result<(), Refusal> {
    match Connection::open(socket)?.ask(Request::Check { token: 0 }, None, 1) {
        Err(refusal) if refusal.reason == Reason::Handover => Err(refusal),
        // That there is no such proof.
        _ => Ok(()),
    }
}

fn only(path: &Path, mut descriptors: Vec<OwnedFd>) -> Result<File, Refusal> {
    match (descriptors.pop(), descriptors.is_empty()) {
        (Some(descriptor), true) => Ok(descriptor.into()),
        _ => Err(unavailable(path, "gave not one descriptor")),
    }
}

/// What can be checked of a file that was given: a regular one of the clip's
/// size that cannot be written to.
fn check_file(path: &Path, file: &File, size: u64) -> Result<(), Refusal> {
    let failed = |e: io::Error| unavailable(path, format_args!("file it gave: {e}"));
    let found = file.metadata().map_err(failed)?;
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|e| failed(e.into()))?;
    let flags = OFlag::from_bits_retain(flags);
    if !found.is_file()
        || flags.contains(OFlag::O_PATH)
        || flags & OFlag::O_ACCMODE != OFlag::O_RDONLY
    {
        return Err(unavailable(path, "gave what is not a file open read-only"));
    }
    if found.len() != size {
        // Cut since, or the clip has changed.
        let detail = format!("size by the server {size}, of its file {}", found.len());
        return Err(Refusal::new(Reason::Changed, detail));
    }
    Ok(())
}

/// A file with a whole clip.
#[derive(Debug)]
pub struct WholeFd {
    /// A description of its own, read-only.
    pub fd: OwnedFd,
    /// What it is of.
    pub kind: WholeKind,
    /// Its size, bytes.
    pub size: u64,
}

/// Asks the server at `socket` for a file with the whole of a clip that is open
/// through FUSE. A copy may take as long as reading the clip does.
///
/// # Errors
/// Why there is none; [`Reason::Handover`] where the server is at fault.
pub fn whole(socket: &Path, clip: BorrowedFd<'_>) -> Result<WholeFd, Refusal> {
    let mut connection = Connection::open(socket)?;
    let (answer, descriptors) = connection.ask(Request::Whole, Some(clip), WHOLE)?;
    let Answer::Whole { kind, size } = answer else {
        return Err(connection.confused());
    };
    let file = only(socket, descriptors)?;
    check_file(socket, &file, size)?;
    if kind == WholeKind::Copy {
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or(0);
        let wanted = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK;
        if !SealFlag::from_bits_retain(seals).contains(wanted) {
            return Err(unavailable(socket, "gave a copy that is not sealed"));
        }
    }
    Ok(WholeFd {
        fd: file.into(),
        kind,
        size,
    })
}
