//! `exec` of those who may not open the cache, by a server that may.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::clips::*;
use common::exec::{Done, plainly};
use common::handover::*;
use common::program;
use nix::sys::signal::Signal;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with,
};
use vmafx_bypass::Refusal;
use vmafx_bypass::handover::protocol::WholeKind;
use vmafx_bypass::handover::{Client, Lease, Server, ServerOptions, Source, WholeFd};

/// A shell's script under `exec` by another command, in a folder.
fn exec_by(command: &[&str], folder: &Path, options: &[&str], script: &str) -> Done {
    let output = Command::new(command[0])
        .args(&command[1..])
        .arg(program().get_program())
        .args(["exec", "--report=json"])
        .args(options)
        .args(["--", "bash", "-c", script])
        .env_remove("VMAFX_EBPF_BYPASS")
        .stdin(Stdio::null())
        .current_dir(folder)
        .output()
        .unwrap();
    Done::of(&output)
}

/// The same plainly.
fn expected(folder: &Path, script: &str) -> String {
    let output = plainly(folder, &["bash", "-c", script]);
    String::from_utf8(output.stdout).unwrap()
}

fn by_server(done: &Done) -> u64 {
    done.report["by_server"].as_u64().unwrap()
}

#[test]
fn an_unprivileged_exec_gets_the_server_s_snapshots() {
    let (rig, _folder, socket, run) = serving("socket", &["--socket-mode", "0666"]);
    let mount = rig.mountpoint();
    let options = ["--socket", socket.to_str().unwrap()];
    let script = "sha256sum clip; (cd /; cat /etc/hostname /etc/passwd | md5sum); md5sum < clip";
    let done = exec_by(&NOBODY, &mount, &options, script);
    assert_eq!(done.text(), expected(&mount, script));
    assert_eq!(
        (done.substituted(), by_server(&done)),
        (2, 2),
        "{}",
        done.report
    );
    // By the environment, too.
    let environment = format!("VMAFX_BYPASS_SOCKET={}", options[1]);
    let by = [&NOBODY[..], &["env", &environment]].concat();
    let done = exec_by(&by, &mount, &[], script);
    assert_eq!(
        (done.substituted(), by_server(&done)),
        (2, 2),
        "{}",
        done.report
    );
    // A clip that is not whole is the server's to refuse.
    let done = exec_by(&NOBODY, &mount, &options, "sha256sum other");
    assert_eq!(done.text(), expected(&mount, "sha256sum other"));
    assert_eq!(done.reason("no_metadata"), 1, "{}", done.report);
    // Root sees the cache itself; without a server the others do not.
    let done = exec_by(&["env", &environment], &mount, &[], script);
    assert_eq!(
        (done.substituted(), by_server(&done)),
        (2, 0),
        "{}",
        done.report
    );
    let done = exec_by(&NOBODY, &mount, &[], script);
    assert_eq!(done.text(), expected(&mount, script));
    assert_eq!(done.substituted(), 0, "{}", done.report);
    // Opens of other files have not reached it: four of whole clips, one refused,
    // and what `serving` has asked.
    let lines = run.end(Signal::SIGTERM);
    let handover = &lines.last().unwrap()["handover"];
    assert_eq!(handover["whole"], 4, "{handover}");
    assert_eq!(handover["refused"]["no_metadata"], 1, "{handover}");
    assert_eq!(handover["rejected"], 0, "{handover}");
}

#[test]
fn a_server_that_ends_leaves_the_command_its_mount() {
    each_rclone(2 * MIB, &["--allow-other"], |rig, _| {
        let mut served = Served::of(rig);
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let socket = served.socket();
        let options = ["--socket", socket.to_str().unwrap()];
        let script = "for i in {1..10}; do md5sum clip; done";
        served.stop();
        for is_there in [false, true] {
            if is_there {
                // The file of a server that was killed.
                drop(listener(&socket));
            }
            let done = exec_by(&NOBODY, &rig.mountpoint(), &options, script);
            assert_eq!(done.text(), expected(&rig.mountpoint(), script));
            assert_eq!(done.reason("handover"), 10, "{}", done.report);
        }
    });
}

#[test]
fn a_silent_server_is_waited_for_once() {
    each_rclone(2 * MIB, &["--allow-other"], |rig, _| {
        let folder = folder();
        fs::set_permissions(rig.folder(), Permissions::from_mode(0o755)).unwrap();
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let socket = folder.path().join("socket");
        let silent = listener(&socket);
        fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
        let options = ["--socket", socket.to_str().unwrap()];
        let script = "for i in {1..30}; do md5sum clip; done";
        let done = exec_by(&NOBODY, &rig.mountpoint(), &options, script);
        assert_eq!(done.text(), expected(&rig.mountpoint(), script));
        assert_eq!(done.reason("handover"), 30, "{}", done.report);
        // Each wait is a request, and a question whether it lives. After a
        // second, two, four … another is dared.
        let connections = std::iter::from_fn(|| accept(&silent).ok()).count();
        assert!(connections < 20, "{connections} connections for 30 opens");
    });
}

/// A socket that listens, and no more; accepting does not wait.
fn listener(path: &Path) -> OwnedFd {
    let _ = fs::remove_file(path);
    let flags = SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 100).unwrap();
    socket
}

/// A server of root's whose snapshots are another version's.
struct Confused(u64);

impl Source for Confused {
    fn ranges(&self, _: Client, _: OwnedFd, _: Option<u64>) -> Result<Box<dyn Lease>, Refusal> {
        unreachable!()
    }

    fn whole(&self, _: Client, _: OwnedFd) -> Result<WholeFd, Refusal> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let copy = rustix::fs::memfd_create("clip", flags).unwrap();
        let mut copy = File::from(copy);
        copy.write_all(&vec![0; self.0 as usize]).unwrap();
        rustix::fs::fcntl_add_seals(&copy, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
        let link = format!("/proc/self/fd/{}", copy.as_raw_fd());
        Ok(WholeFd {
            fd: File::open(link).unwrap().into(),
            kind: WholeKind::Copy,
            size: self.0,
        })
    }
}

#[test]
fn a_snapshot_of_another_version_is_not_taken() {
    each_rclone(2 * MIB, &["--allow-other"], |rig, bytes| {
        let folder = folder();
        fs::set_permissions(rig.folder(), Permissions::from_mode(0o755)).unwrap();
        let socket = folder.path().join("socket");
        let options = ServerOptions {
            mode: 0o666,
            ..ServerOptions::new(socket.clone())
        };
        let _server = Server::start(options, Arc::new(Confused(bytes.len() as u64))).unwrap();
        let options = ["--socket", socket.to_str().unwrap()];
        let done = exec_by(&NOBODY, &rig.mountpoint(), &options, "md5sum clip");
        assert_eq!(done.text(), expected(&rig.mountpoint(), "md5sum clip"));
        assert_eq!(done.reason("changed"), 1, "{}", done.report);
    });
}
