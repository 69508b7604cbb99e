//! Strangers at the handover socket of `run`: whatever they send, the server
//! answers others, leaks nothing, and ends in good order.
#![cfg(feature = "ebpf")]
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::clips::*;
use common::handover::*;
use common::{content, eventually, put, rig_with, run, stderr};
use nix::sys::signal::Signal;
use vmafx_bypass::Reason;
use vmafx_bypass::handover::protocol::{Answer, Request};

#[test]
fn descriptors_of_all_kinds_are_refused() {
    let (rig, folder, socket, run) = serving("kinds", &[]);
    let plain = folder.path().join("plain");
    fs::write(&plain, "abc").unwrap();
    let shm = PathBuf::from(format!("/dev/shm/vmafx-test-{}", std::process::id()));
    fs::write(&shm, "abc").unwrap();
    let elsewhere = rig_with(options(Path::new("rclone"), &[]), |source| {
        put(source, CLIP, &content(1, MIB));
    });
    let open = |path: &Path| -> OwnedFd { File::open(path).unwrap().into() };
    let path_only = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_PATH)
        .open(clip(&rig));
    let write_only = OpenOptions::new().write(true).open(&plain).unwrap();
    let both = OpenOptions::new().read(true).write(true).open(&plain);
    let (pipe, pipe_in) = std::io::pipe().unwrap();
    let unix = std::os::unix::net::UnixStream::pair().unwrap().0;
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
    let memory = nix::sys::memfd::memfd_create("x", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let kinds: Vec<(&str, OwnedFd, Reason)> = vec![
        ("ext4", open(&plain), Reason::NotFuse),
        ("tmpfs", open(&shm), Reason::NotFuse),
        (
            "/proc",
            open(Path::new("/proc/self/status")),
            Reason::NotFuse,
        ),
        (
            "another mount",
            open(&clip(&elsewhere)),
            Reason::Unsupported,
        ),
        ("O_PATH", path_only.unwrap().into(), Reason::Permission),
        ("write-only", write_only.into(), Reason::Permission),
        ("read and write", both.unwrap().into(), Reason::WriteOpen),
        ("a folder", open(&rig.mountpoint()), Reason::Unsupported),
        (
            "a device",
            open(Path::new("/dev/null")),
            Reason::Unsupported,
        ),
        ("a pipe", pipe.into(), Reason::Unsupported),
        ("a pipe's end", pipe_in.into(), Reason::Permission),
        ("a socket", unix.into(), Reason::WriteOpen),
        ("an epoll", epoll.0, Reason::WriteOpen),
        ("a memfd", memory, Reason::WriteOpen),
    ];
    // What the server itself would not let in by its own socket.
    let before = resources(run.pid());
    for _ in 0..20 {
        for (what, fd, reason) in &kinds {
            let client = Raw::connect(&socket);
            for request in [RANGES, Request::Whole] {
                let (answer, fds) = client.ask(request, &[fd.as_fd()]);
                let Answer::Refused(refusal) = answer else {
                    panic!("{what}: {answer:?}");
                };
                assert_eq!(refusal.reason, *reason, "{what}: {refusal}");
                assert!(fds.is_empty());
            }
            let differs = Request::Differs {
                token: 1,
                offset: 0,
            };
            let (answer, _) = client.ask(differs, &[fd.as_fd()]);
            assert!(matches!(answer, Answer::Refused(_)), "{what}");
        }
    }
    settles_at(run.pid(), before.0);
    is_well(&socket, &rig);
    fs::remove_file(&shm).unwrap();
    let lines = run.end(Signal::SIGTERM);
    let handover = &lines.last().unwrap()["handover"];
    assert_eq!(handover["refused"]["not_fuse"], 20 * 2 * 3, "{handover}");
    assert_eq!(handover["rejected"], 0, "{handover}");
    assert!(!socket.exists());
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let (rig, _folder, socket, run) = serving("garbage", &[]);
    let file = File::open(clip(&rig)).unwrap();
    let fd = file.as_fd();
    let before = resources(run.pid());
    let long = vec![7; 100_000];
    let ranges = RANGES.encode();
    let mut later = ranges.clone();
    later[4] = 9;
    let bad: Vec<(&[u8], Vec<BorrowedFd<'_>>)> = vec![
        (b"x", vec![]),
        (b"garbage garbage garbage garbage!", vec![fd]),
        (&long, vec![fd, fd]),
        (&ranges, vec![]),
        (&ranges, vec![fd, fd]),
        (&ranges, vec![fd; 5]),
        (&ranges, vec![fd; 253]),
        (&ranges[..31], vec![fd]),
        (&later, vec![fd]),
    ];
    for _ in 0..20 {
        for (bytes, fds) in &bad {
            let client = Raw::connect(&socket);
            client.send(bytes, fds).unwrap();
            let (answer, none) = client.receive().expect("a refusal");
            assert!(matches!(answer, Answer::Refused(r) if r.reason == Reason::Handover));
            assert!(none.is_empty() && client.receive().is_none());
        }
    }
    // Descriptors that are not asked for are not taken, nor harm.
    let client = Raw::connect(&socket);
    let check = Request::Check { token: 5 };
    let (answer, _) = client.ask(check, &[fd; 100]);
    assert!(matches!(answer, Answer::Refused(r) if r.reason == Reason::Changed));
    // Others' tokens are none of ours.
    let (Answer::Ranges { token, .. }, _) = client.ask(RANGES, &[fd]) else {
        panic!("no ranges");
    };
    let stranger = Raw::connect(&socket);
    let check = Request::Check { token };
    assert_eq!(client.ask(check, &[]).0, Answer::Valid { token });
    assert!(matches!(stranger.ask(check, &[]).0, Answer::Refused(_)));
    let more = Request::More { token, from: 0 };
    assert!(matches!(stranger.ask(more, &[]).0, Answer::Refused(_)));
    assert!(matches!(client.ask(more, &[]).0, Answer::More { .. }));
    // Another proof takes the place of the first.
    assert!(matches!(client.ask(RANGES, &[fd]).0, Answer::Ranges { .. }));
    assert!(matches!(client.ask(check, &[]).0, Answer::Refused(_)));
    drop((client, stranger));
    settles_at(run.pid(), before.0);
    is_well(&socket, &rig);
    let lines = run.end(Signal::SIGINT);
    let handover = &lines.last().unwrap()["handover"];
    assert_eq!(handover["rejected"], 20 * bad.len(), "{handover}");
}

#[test]
fn slow_and_silent_clients_hold_nobody_up() {
    let (rig, _folder, socket, run) = serving("slow", &[]);
    let file = File::open(clip(&rig)).unwrap();
    let before = resources(run.pid());
    // So many that never say a word, and others that never read an answer.
    let silent: Vec<Raw> = (0..100).map(|_| Raw::connect(&socket)).collect();
    let deaf: Vec<Raw> = (0..4).map(|_| Raw::connect(&socket)).collect();
    for client in &deaf {
        let nonblocking = rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(&client.0, nonblocking).unwrap();
        // Its own buffer fills, and then the server's.
        for _ in 0..10_000 {
            if client.send(&RANGES.encode(), &[file.as_fd()]).is_err() {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
    is_well(&socket, &rig);
    // Silent ones are let go after 5 seconds.
    eventually("silent clients gone", || {
        silent.iter().all(|client| {
            let mut byte = [0; 1];
            let flags = rustix::net::RecvFlags::DONTWAIT;
            rustix::net::recv(&client.0, &mut byte, flags).is_ok_and(|(_, n)| n == 0)
        })
    });
    drop((silent, deaf));
    settles_at(run.pid(), before.0);
    let lines = run.end(Signal::SIGTERM);
    let handover = &lines.last().unwrap()["handover"];
    assert!(handover["dropped"].as_u64().unwrap() >= 104, "{handover}");
}

#[test]
fn ten_thousand_connections_leave_nothing_behind() {
    let (rig, _folder, socket, run) = serving("many", &[]);
    let file = File::open(clip(&rig)).unwrap();
    let turn = |i: usize| {
        let client = Raw::connect(&socket);
        match i % 5 {
            // Gone before it has its answer, or says anything.
            0 => drop(client.send(&RANGES.encode(), &[file.as_fd()])),
            1 => {}
            2 => drop(client.send(b"garbage", &[file.as_fd(); 3])),
            3 => drop(client.ask(Request::Check { token: 0 }, &[])),
            _ => drop(client.ask(RANGES, &[file.as_fd()])),
        }
    };
    (0..500).for_each(turn);
    is_well(&socket, &rig);
    let before = resources(run.pid());
    (0..10_000).for_each(turn);
    is_well(&socket, &rig);
    settles_at(run.pid(), before.0 + 2);
    let after = resources(run.pid());
    assert!(
        after.1 < before.1 + 4096,
        "memory grew: {before:?} {after:?}"
    );
    let lines = run.end(Signal::SIGTERM);
    let handover = &lines.last().unwrap()["handover"];
    assert!(
        handover["clients"].as_u64().unwrap() >= 10_500,
        "{handover}"
    );
}

#[test]
fn one_user_leaves_room_for_others() {
    let (rig, folder, socket, run) = serving("room", &["--socket-mode", "0666"]);
    let script = "import socket\n\
                  held=[]\n\
                  for i in range(1100):\n \
                   s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n \
                   held.append(s)\n\
                  print(len(held),flush=True)";
    let script = script.replace("sys.argv", "__import__('sys').argv");
    let argument = socket.to_str().unwrap();
    let hold = |user: &[&str]| {
        let limit = ["prlimit", "--nofile=4096"];
        let by = [&limit, user, &["/usr/bin/python3"]].concat();
        let worker = common::Worker::start_by(&by, folder.path(), &script, &[argument]);
        assert_eq!(worker.line(), "1100");
        worker
    };
    let worker = hold(&NOBODY);
    // Root still gets in.
    is_well(&socket, &rig);
    worker.end();
    // And others beside a root that takes what it gets.
    let worker = hold(&[]);
    let (read, stats) = read_by(&NOBODY, &clip(&rig), &["--socket", argument]);
    assert!(read == content(1, 2 * MIB));
    assert_eq!(stats["state"], "active", "{stats}");
    worker.end();
    let lines = run.end(Signal::SIGTERM);
    let handover = &lines.last().unwrap()["handover"];
    assert!(
        handover["turned_away"].as_u64().unwrap() >= 440,
        "{handover}"
    );
}

#[test]
fn the_socket_is_one_servers_and_as_asked_for() {
    let arguments = ["--socket-mode", "0640", "--socket-owner", "65534:65533"];
    let (rig, folder, socket, mut first) = serving("own", &arguments);
    let found = fs::metadata(&socket).unwrap();
    assert_eq!((found.uid(), found.gid()), (65534, 65533));
    assert_eq!(found.mode() & 0o777, 0o640);
    let point = rig.mountpoint();
    let second = |socket: &str, more: &[&str]| {
        let pins = format!("/sys/fs/bpf/vmafx-other-{}", std::process::id());
        let prefix = point.to_str().unwrap();
        let all = [
            &[
                "run",
                "--enable",
                "-q",
                "--prefix",
                prefix,
                "--pin-dir",
                &pins,
            ],
            &["--duration", "200ms", "--socket", socket][..],
            more,
        ]
        .concat();
        run(&all)
    };
    let name = socket.to_str().unwrap();
    let output = second(name, &[]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains(&format!("pid {}", first.pid())), "{text}");
    assert!(socket.exists());
    // One that was killed leaves a file, which the next replaces.
    first.kill();
    assert!(socket.exists());
    let output = second(name, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!socket.exists());
    let file = folder.path().join("file");
    fs::write(&file, "precious").unwrap();
    let output = second(file.to_str().unwrap(), &[]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let output = second(name, &["--socket-owner", "no-such-user"]);
    assert_eq!(output.status.code(), Some(2));
}
