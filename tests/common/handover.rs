//! Servers that hand cache files over, and clients of every kind.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
    sendmsg, socket_with,
};
use serde_json::Value;
use tempfile::TempDir;
use vmafx_bypass::handover::protocol::{Answer, Request};
use vmafx_bypass::handover::{Server, ServerOptions};
use vmafx_bypass::rig::Rig;
use vmafx_bypass::snapshot::{SnapshotMode, SnapshotOptions, Snapshots};
use vmafx_bypass::{BypassFile, BypassOptions, Clips, Reason};

use super::clips::{CLIP, MIB, clip, options, read_all};
use super::{Tracking, content, eventually, need_root, program, put, rig_with, stderr};

/// Who may do nothing.
pub const NOBODY: [&str; 4] = [
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
];

/// A server in this process.
pub struct Served {
    pub folder: TempDir,
    prefixes: Vec<PathBuf>,
    server: Option<Server>,
}

pub fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

impl Served {
    pub fn new(prefixes: &[&Path]) -> Self {
        let mut served = Self {
            folder: folder(),
            prefixes: prefixes.iter().map(|p| p.to_path_buf()).collect(),
            server: None,
        };
        served.start(Duration::from_secs(60));
        served
    }

    /// A rig's clips, with everybody let into the rig's own folder.
    pub fn of(rig: &Rig) -> Self {
        fs::set_permissions(rig.folder(), fs::Permissions::from_mode(0o755)).unwrap();
        Self::new(&[&rig.mountpoint()])
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub fn start(&mut self, idle: Duration) {
        let snapshots = Snapshots::new(SnapshotOptions {
            mode: SnapshotMode::Auto,
            copy_budget: 256 << 20,
        });
        let clips = Clips::new(self.prefixes.clone(), Arc::new(snapshots));
        let options = ServerOptions {
            mode: 0o666,
            idle,
            ..ServerOptions::new(self.socket())
        };
        self.server = Some(Server::start(options, Arc::new(clips)).unwrap());
    }

    pub fn stop(&mut self) {
        self.server = None;
    }

    pub fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    /// Opens by the server alone.
    pub fn open(&self, path: &Path) -> BypassFile {
        let options = BypassOptions::new().socket(self.socket()).socket_alone();
        options.open(path).unwrap()
    }

    /// The rig's clip, cached, and proven by the server.
    pub fn open_cached(&self, rig: &Rig) -> BypassFile {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let file = self.open(&clip(rig));
        assert_eq!(file.refusal(), None);
        file
    }
}

/// Runs `read` by another command; the bytes, and the statistics.
pub fn read_by(command: &[&str], path: &Path, arguments: &[&str]) -> (Vec<u8>, Value) {
    let output = Command::new(command[0])
        .args(&command[1..])
        .arg(program().get_program())
        .args(["-q", "read", "--stats=json"])
        .args(arguments)
        .arg("--")
        .arg(path)
        .env_remove("VMAFX_EBPF_BYPASS")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    let stats = serde_json::from_str(text.trim_end().lines().last().unwrap());
    (output.stdout, stats.unwrap())
}

/// What `explain` tells of a rig's clip, run by `command`.
pub fn explain_by(command: &[&str], rig: &Rig, arguments: &[&str]) -> Value {
    let output = Command::new(command[0])
        .args(&command[1..])
        .arg(program().get_program())
        .args(["explain", "--format", "json"])
        .args(arguments)
        .arg(clip(rig))
        .env_remove("VMAFX_EBPF_BYPASS")
        .env_remove("VMAFX_BYPASS_SOCKET")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A client without manners.
pub struct Raw(pub OwnedFd);

impl Raw {
    pub fn connect(path: &Path) -> Self {
        Self::try_connect(path).unwrap()
    }

    pub fn try_connect(path: &Path) -> rustix::io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        for timeout in [Timeout::Send, Timeout::Recv] {
            set_socket_timeout(&socket, timeout, Some(super::patience()))?;
        }
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self(socket))
    }

    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let flags = SendFlags::NOSIGNAL;
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags)
    }

    /// The answer and its descriptors; `None` at the end.
    pub fn receive(&self) -> Option<(Answer, Vec<OwnedFd>)> {
        let mut bytes = vec![0; 1 << 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let got = recvmsg(&self.0, &mut parts, &mut control, flags);
        let length = match got {
            Err(rustix::io::Errno::CONNRESET) => return None,
            got => got.unwrap().bytes,
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        (length > 0).then(|| (Answer::parse(&bytes[..length]).unwrap(), fds))
    }

    pub fn ask(&self, request: Request, fds: &[BorrowedFd<'_>]) -> (Answer, Vec<OwnedFd>) {
        self.send(&request.encode(), fds).unwrap();
        self.receive().expect("an answer")
    }

    /// Asks for a descriptor's ranges; the reason and detail that it is refused for.
    pub fn refused(&self, fd: impl AsFd) -> (Reason, String) {
        match self.ask(RANGES, &[fd.as_fd()]).0 {
            Answer::Refused(refusal) => (refusal.reason, refusal.detail),
            other => panic!("not refused: {other:?}"),
        }
    }
}

pub const RANGES: Request = Request::Ranges { pulled: None };

/// How many descriptors a process has, and its resident memory, KiB.
pub fn resources(pid: u32) -> (usize, u64) {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let rss = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    (fds, rss)
}

/// Waits until a process has so many descriptors.
pub fn settles_at(pid: u32, fds: usize) {
    eventually("descriptors closed", || resources(pid).0 <= fds);
}

/// A mount with a cached clip, and a `run` that hands it over.
pub fn serving(name: &str, arguments: &[&str]) -> (Rig, tempfile::TempDir, PathBuf, Tracking) {
    need_root();
    let rig = rig_with(options(Path::new("rclone"), &["--allow-other"]), |source| {
        put(source, CLIP, &content(1, 2 * MIB));
        put(source, "other", &content(2, MIB));
    });
    fs::set_permissions(rig.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let folder = folder();
    let socket = folder.path().join(name);
    let all = [&["--socket", socket.to_str().unwrap()], arguments].concat();
    let run = Tracking::start(&rig.mountpoint(), &all);
    eventually("a socket", || Raw::try_connect(&socket).is_ok());
    // What it opens once, and keeps.
    is_well(&socket, &rig);
    std::thread::sleep(Duration::from_millis(300));
    (rig, folder, socket, run)
}

/// The server still answers, and rightly.
pub fn is_well(socket: &Path, rig: &Rig) {
    let options = BypassOptions::new().socket(socket).socket_alone();
    let file = options.open(clip(rig)).unwrap();
    assert_eq!(file.refusal(), None);
    assert!(read_all(&file) == content(1, 2 * MIB));
}
