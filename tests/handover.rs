//! Readers that may not open rclone's cache, and a server that may: the bytes
//! are FUSE's, and come from the cache. Each test runs on every rclone program
//! there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use common::clips::*;
use common::handover::*;
use common::{content, eventually, fuse_range, need_root, put, rclones, rig_with};
use vmafx_bypass::handover;
use vmafx_bypass::handover::protocol::{Answer, Request, WholeKind};

use vmafx_bypass::{BypassOptions, Reason};

const ALL: &[&str] = &["--allow-other"];

#[test]
fn an_unprivileged_reader_gets_roots_bytes_from_the_cache() {
    each_rclone(9 * MIB + 123, ALL, |rig, bytes| {
        let served = Served::of(rig);
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let socket = served.socket();
        let socket = ["--socket", socket.to_str().unwrap()];
        let (read, stats) = read_by(&NOBODY, &clip(rig), &[]);
        assert!(read == bytes);
        // `permission`, unless there is another rclone of which as little shows.
        assert_ne!(stats["state"], "active", "{stats}");
        assert_eq!(stats["cache_bytes"], 0);
        let (read, stats) = read_by(&NOBODY, &clip(rig), &socket);
        assert!(read == bytes);
        assert_eq!(stats["state"], "active", "{stats}");
        assert_eq!(stats["cache_bytes"], bytes.len(), "{stats}");
        // By the environment, too; and root does not need it.
        let environment = format!("VMAFX_BYPASS_SOCKET={}", socket[1]);
        let by = [&NOBODY[..], &["env", &environment]].concat();
        assert_eq!(read_by(&by, &clip(rig), &[]).1["cache_bytes"], bytes.len());
        let handed_over = served.server().stats().ranges;
        assert_eq!(
            read_by(&["env", &environment], &clip(rig), &[]).1["state"],
            "active"
        );
        assert_eq!(served.server().stats().ranges, handed_over);
        // Switched off, nobody is asked.
        let by = [&by[..], &["VMAFX_EBPF_BYPASS=0"]].concat();
        assert_eq!(read_by(&by, &clip(rig), &[]).1["state"], "disabled");
        // Compared with FUSE.
        let verify = [&socket[..], &["--verify", "full"]].concat();
        let (read, stats) = read_by(&NOBODY, &clip(rig), &verify);
        assert!(read == bytes);
        assert_eq!(stats["verified_bytes"], bytes.len(), "{stats}");
    });
}

#[test]
fn explain_asks_the_server_where_read_does() {
    each_rclone(9 * MIB + 123, ALL, |rig, bytes| {
        let served = Served::of(rig);
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let socket = served.socket();
        let socket = socket.to_str().unwrap();
        let named = ["--socket", socket];
        let handover = |document: &Value| {
            let gates = document["gates"].as_array().unwrap();
            let last = gates.last().unwrap().clone();
            assert_eq!(last["name"], "handover");
            last
        };
        let unasked = explain_by(&NOBODY, rig, &[]);
        assert_ne!(unasked["state"], "active", "{unasked}");
        assert_eq!(handover(&unasked)["pass"], Value::Null, "{unasked}");
        let asked = explain_by(&NOBODY, rig, &named);
        assert_eq!(asked["state"], "active", "{asked}");
        assert_eq!(asked["cached_bytes"], bytes.len(), "{asked}");
        let gate = handover(&asked);
        assert_eq!(gate["pass"], true, "{asked}");
        assert!(gate["detail"].as_str().unwrap().contains(socket), "{asked}");
        let gates = asked["gates"].as_array().unwrap();
        assert!(gates.iter().all(|gate| gate["pass"] != false), "{asked}");
        // Root sees the cache itself.
        let own = explain_by(&["env"], rig, &named);
        assert_eq!(own["state"], "active", "{own}");
        let detail = handover(&own)["detail"].clone();
        assert!(detail.as_str().unwrap().starts_with("not needed"), "{own}");
        // Nor is a server asked that the kill switch keeps `read` from asking.
        let killed = [&NOBODY[..], &["env", "VMAFX_EBPF_BYPASS=0"]].concat();
        let killed = explain_by(&killed, rig, &named);
        assert_eq!(killed["state"], "disabled", "{killed}");
        assert_eq!(handover(&killed)["pass"], Value::Null, "{killed}");
        drop(served);
        let gone = explain_by(&NOBODY, rig, &named);
        assert_eq!(gone["state"], "handover", "{gone}");
        assert_eq!(handover(&gone)["pass"], false, "{gone}");
        assert!(handover(&gone)["remedy"].is_string(), "{gone}");
    });
}

#[test]
fn what_is_missing_comes_through_fuse_and_then_from_the_cache() {
    let options = [
        "--allow-other",
        "--buffer-size=0",
        "--vfs-read-chunk-size=1M",
        "--dir-cache-time=1s",
    ];
    each_rclone(64 * MIB, &options, |rig, bytes| {
        let served = Served::of(rig);
        fuse_range(&clip(rig), 8 * MIB as u64, MIB);
        let mut file = served.open(&clip(rig));
        eventually("an active clip", || {
            file = served.open(&clip(rig));
            file.refusal().is_none()
        });
        let mut middle = vec![0; 8 * MIB];
        for pass in 0..2 {
            file.read_at(&mut middle, 4 * MIB as u64).unwrap();
            assert!(middle == bytes[4 * MIB..12 * MIB], "pass {pass}");
        }
        let stats = file.stats();
        assert!(stats.by_reason[&Reason::Partial] >= MIB as u64, "{stats:?}");
        // What this reader has pulled itself is there the second time.
        assert!(stats.cache_bytes >= 7 * MIB as u64, "{stats:?}");
        drop(file);
        // One that nobody has cached.
        put(&rig.source(), "new", &bytes[..MIB]);
        let path = rig.mountpoint().join("new");
        eventually("a new clip", || path.exists());
        let file = served.open(&path);
        assert_eq!(file.refusal().unwrap().reason, Reason::NoMetadata);
        assert!(read_all(&file) == bytes[..MIB]);
    });
}

#[test]
fn an_evicted_clip_reads_on() {
    each_rclone(8 * MIB, ALL, |rig, bytes| {
        let served = Served::of(rig);
        let file = served.open_cached(rig);
        let mut start = vec![0; MIB];
        file.read_at(&mut start, 0).unwrap();
        fs::remove_file(cache_file(rig, "vfs", CLIP)).unwrap();
        fs::remove_file(cache_file(rig, "vfsMeta", CLIP)).unwrap();
        let before = file.stats().cache_bytes;
        assert_eq!(before, MIB as u64);
        assert_eq!(file.read_at(&mut start, 4 * MIB as u64).unwrap(), MIB);
        assert!(start == bytes[4 * MIB..5 * MIB]);
        assert_eq!(
            file.stats().cache_bytes,
            before,
            "an unlinked file is not read"
        );
        assert_ne!(file.refusal(), None);
    });
}

#[test]
fn a_clip_replaced_at_the_remote_is_never_mixed_with_the_old_cache() {
    let options = ["--allow-other", "--dir-cache-time=1s", "--attr-timeout=1s"];
    each_rclone(8 * MIB, &options, |rig, old| {
        let served = Served::of(rig);
        let file = served.open_cached(rig);
        assert!(read_all(&file) == old);
        let new = content(2, old.len() + MIB);
        replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
        eventually("the new clip through FUSE", || {
            fuse_range(&clip(rig), 0, 16) == new[..16]
        });
        let mut start = vec![0; MIB];
        for _ in 0..20 {
            assert_eq!(file.read_at(&mut start, 0).unwrap(), MIB);
            let through_fuse = fuse_range(&clip(rig), 0, MIB);
            assert!(start == old[..MIB] || start == new[..MIB], "mixed bytes");
            assert!(start == through_fuse, "behind FUSE");
        }
        drop(file);
        let fresh = served.open(&clip(rig));
        assert!(read_all(&fresh) == new);
    });
}

/// Edits what only the server can see; each time the client must learn of it.
#[test]
fn changed_metadata_ends_the_proof() {
    type Edit = fn(String) -> String;
    let edits: [(Reason, Edit); 3] = [
        (Reason::BadMetadata, |text| {
            text[..text.len() / 2].to_owned()
        }),
        (Reason::Dirty, |text| {
            text.replace("\"Dirty\": false", "\"Dirty\": true")
        }),
        (Reason::StaleMetadata, |text| {
            text.replace("\"Fingerprint\": \"20", "\"Fingerprint\": \"21")
        }),
    ];
    for (reason, edit) in edits {
        each_rclone(2 * MIB, ALL, |rig, bytes| {
            let served = Served::of(rig);
            let file = served.open_cached(rig);
            let mut start = vec![0; 4096];
            file.read_at(&mut start, 0).unwrap();
            assert_eq!(file.stats().fuse_bytes(), 0, "{:?}", file.refusal());
            // While this is held, rclone does not write it again.
            let _held = hold(&clip(rig), 0, 1);
            std::thread::sleep(Duration::from_millis(50));
            edit_metadata(rig, CLIP, edit);
            std::thread::sleep(Duration::from_millis(1_100));
            assert!(read_all(&file) == bytes);
            let stats = file.stats();
            assert_eq!(stats.by_reason[&reason], bytes.len() as u64, "{stats:?}");
            let ended = served.server().stats().ended;
            assert_eq!(ended.get(&Reason::Changed), Some(&1), "{ended:?}");
        });
    }
}

#[test]
fn thousands_of_ranges_are_handed_over() {
    const RANGES: usize = 5_000;
    each_rclone(8192 * RANGES, ALL, |rig, bytes| {
        let served = Served::of(rig);
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let _held = hold(&clip(rig), 0, 1);
        std::thread::sleep(Duration::from_millis(50));
        edit_metadata(rig, CLIP, |text| {
            let mut info: serde_json::Value = serde_json::from_str(&text).unwrap();
            let range = |i| serde_json::json!({"Pos": i * 8192, "Size": 4096});
            info["Rs"] = (0..RANGES).map(range).collect();
            info.to_string()
        });
        let file = served.open(&clip(rig));
        assert_eq!(file.refusal(), None);
        assert_eq!(file.proven_bytes(), (RANGES * 4096) as u64);
        let mut block = vec![0; 8192];
        for place in [0, 1, 1023, 1024, 4_999] {
            let offset = place * 8192;
            file.read_at(&mut block, offset as u64).unwrap();
            assert!(block == bytes[offset..offset + 8192], "{place}");
        }
        assert_eq!(file.stats().cache_bytes, 5 * 4096);
    });
}

#[test]
fn a_server_that_ends_and_comes_back() {
    each_rclone(40 * MIB, ALL, |rig, bytes| {
        let mut served = Served::of(rig);
        let file = served.open_cached(rig);
        let mut block = vec![0; MIB];
        file.read_at(&mut block, 0).unwrap();
        assert_eq!(file.stats().fuse_bytes(), 0);
        served.stop();
        assert!(!served.socket().exists());
        assert!(read_all(&file) == bytes);
        let stats = file.stats();
        assert!(stats.by_reason.contains_key(&Reason::Handover), "{stats:?}");
        let refusal = file.refusal().unwrap();
        assert_eq!(refusal.reason, Reason::Handover);
        served.start(Duration::from_secs(60));
        eventually("another proof", || {
            file.read_at(&mut block, 0).unwrap();
            file.refusal().is_none()
        });
        let before = file.stats().fuse_bytes();
        assert!(read_all(&file) == bytes);
        assert_eq!(file.stats().fuse_bytes(), before);
    });
}

#[test]
fn a_silent_client_gets_another_proof() {
    each_rclone(2 * MIB, ALL, |rig, bytes| {
        let mut served = Served::of(rig);
        served.stop();
        served.start(Duration::from_millis(600));
        let file = served.open_cached(rig);
        eventually("a dropped client", || served.server().stats().dropped == 1);
        eventually("no client", || served.server().stats().connected == 0);
        assert!(read_all(&file) == bytes);
        eventually("another proof", || {
            assert!(read_all(&file) == bytes);
            file.refusal().is_none()
        });
        // One that reads on asks often enough, and keeps the clip open.
        let until = Instant::now() + Duration::from_secs(2);
        let dropped = served.server().stats().dropped;
        let ranges = served.server().stats().ranges;
        while Instant::now() < until {
            assert!(read_all(&file) == bytes);
            std::thread::sleep(Duration::from_millis(5));
        }
        let stats = served.server().stats();
        // At an idle time below a second it is dropped each second.
        assert!(stats.dropped <= dropped + 3 && stats.ranges <= ranges + 3);
    });
}

#[test]
fn a_server_that_never_answers_costs_one_wait() {
    each_rclone(2 * MIB, ALL, |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let folder = folder();
        let socket = folder.path().join("socket");
        let _listener = listener(&socket);
        let options = BypassOptions::new().socket(&socket).socket_alone();
        let file = options.open(clip(rig)).unwrap();
        assert_eq!(file.refusal().unwrap().reason, Reason::Handover);
        assert!(read_all(&file) == bytes);
        let started = Instant::now();
        let next = options.open(clip(rig)).unwrap();
        let refusal = next.refusal().unwrap();
        assert!(
            refusal.detail.contains("did not answer lately"),
            "{refusal}"
        );
        assert!(started.elapsed() < Duration::from_millis(200));
    });
}

/// A socket that listens, and no more.
fn listener(path: &Path) -> std::os::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 8).unwrap();
    socket
}

#[test]
fn another_users_server_is_not_believed() {
    each_rclone(2 * MIB, ALL, |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let folder = folder();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let socket = folder.path().join("socket");
        let script = "import socket,sys\n\
                      s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET)\n\
                      s.bind(sys.argv[1]); s.listen(8)";
        let by = [&NOBODY[..], &["/usr/bin/python3"]].concat();
        let argument = socket.to_str().unwrap();
        let worker = common::Worker::start_by(&by, folder.path(), script, &[argument]);
        let options = BypassOptions::new().socket(&socket).socket_alone();
        let file = options.open(clip(rig)).unwrap();
        let refusal = file.refusal().unwrap();
        assert_eq!(refusal.reason, Reason::Handover);
        assert!(refusal.detail.contains("uid 65534"), "{refusal}");
        assert!(read_all(&file) == bytes);
        worker.end();
    });
}

#[test]
fn writable_mounts_and_other_folders_are_refused() {
    each_writable(MIB, ALL, |rig, bytes| {
        let served = Served::of(rig);
        let file = served.open(&clip(rig));
        let refusal = file.refusal().unwrap();
        assert_eq!(refusal.reason, Reason::Unsupported);
        assert!(refusal.detail.contains("writable"), "{refusal}");
        assert!(read_all(&file) == bytes);
    });
}

#[test]
fn a_prefix_may_be_a_folder_of_the_mount() {
    need_root();
    for rclone in rclones() {
        let bytes = content(1, MIB);
        let rig = rig_with(options(&rclone, ALL), |source| {
            for name in ["job/clip", "jobs/clip"] {
                put(source, name, &bytes);
            }
        });
        for name in ["job/clip", "jobs/clip"] {
            rig.cache_whole(Path::new(name)).unwrap();
        }
        let served = Served::new(&[&rig.mountpoint().join("job")]);
        assert_eq!(
            served.open(&rig.mountpoint().join("job/clip")).refusal(),
            None
        );
        let other = served.open(&rig.mountpoint().join("jobs/clip"));
        assert!(other.refusal().unwrap().detail.contains("prefix"));
    }
}

#[test]
fn a_mount_that_belongs_to_its_user_alone_is_refused() {
    need_root();
    for rclone in rclones() {
        let folder = folder();
        let source = folder.path().join("source");
        put(&source, CLIP, &content(1, MIB));
        let (mount, cache) = (folder.path().join("mount"), folder.path().join("cache"));
        // As udev leaves it.
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        for part in [&mount, &cache] {
            fs::create_dir(part).unwrap();
            std::os::unix::fs::chown(part, Some(65534), Some(65534)).unwrap();
        }
        let mut daemon = Command::new(NOBODY[0])
            .args(&NOBODY[1..])
            .arg(if rclone.is_absolute() {
                // Where anybody may run it.
                let copy = folder.path().join("rclone");
                fs::copy(&rclone, &copy).unwrap();
                copy
            } else {
                rclone.clone()
            })
            .args([
                "--config=",
                "mount",
                "--read-only",
                "--vfs-cache-mode=full",
                "--cache-dir",
            ])
            .args([&cache, &source, &mount])
            .spawn()
            .unwrap();
        let by = |script: &str, arguments: &[&str]| {
            Command::new(NOBODY[0])
                .args(&NOBODY[1..])
                .args(["/usr/bin/python3", "-c", script])
                .args(arguments)
                .output()
                .unwrap()
        };
        let clip = mount.join(CLIP);
        let path = clip.to_str().unwrap();
        eventually("a mount of nobody's", || {
            by("import sys; open(sys.argv[1]).read(1)", &[path])
                .status
                .success()
        });
        let served = Served::new(&[&mount]);
        let script = "import socket,sys\n\
             s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n\
             f=open(sys.argv[2],'rb')\n\
             socket.send_fds(s,[bytes.fromhex(sys.argv[3])],[f.fileno()])\n\
             print(s.recv(65536)[48:].decode())";
        let hex: Vec<String> = RANGES
            .encode()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let hex = hex.concat();
        let answer = by(script, &[served.socket().to_str().unwrap(), path, &hex]);
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        let _ = Command::new("umount").arg("-l").arg(&mount).status();
        daemon.wait().unwrap();
        assert!(
            text.starts_with("permission"),
            "{text} {}",
            common::stderr(&answer)
        );
        assert!(text.contains("--allow-other"), "{text}");
    }
}

/// As a worker in a container has it: another mount namespace, and the job's
/// folder under another name.
#[test]
fn a_clip_opened_in_another_mount_namespace_is_handed_over() {
    need_root();
    for rclone in rclones() {
        let bytes = content(1, 3 * MIB);
        let rig = rig_with(options(&rclone, ALL), |source| {
            put(source, "job/a/clip", &bytes);
            put(source, "other/a/clip", &bytes[..MIB]);
        });
        for name in ["job/a/clip", "other/a/clip"] {
            rig.cache_whole(Path::new(name)).unwrap();
        }
        let served = Served::of(&rig);
        let inner = folder();
        let script = format!(
            "mount --bind '{}' '{}' && exec \"$@\"",
            rig.mountpoint().join("job").display(),
            inner.path().display()
        );
        let namespace = [
            "unshare",
            "--mount",
            "--propagation=private",
            "sh",
            "-ec",
            &script,
            "sh",
        ];
        let by = [&namespace[..], &NOBODY[..]].concat();
        let socket = served.socket();
        let socket = ["--socket", socket.to_str().unwrap()];
        let (read, stats) = read_by(&by, &inner.path().join("a/clip"), &socket);
        assert!(read == bytes);
        assert_eq!(stats["cache_bytes"], bytes.len(), "{stats}");
    }
}

#[test]
fn whole_clips_are_snapshots() {
    each_rclone(
        3 * MIB,
        &["--allow-other", "--dir-cache-time=1s"],
        |rig, bytes| {
            let served = Served::of(rig);
            rig.cache_whole(Path::new(CLIP)).unwrap();
            let file = File::open(clip(rig)).unwrap();
            let whole = handover::whole(&served.socket(), file.as_fd()).unwrap();
            assert_ne!(whole.kind, WholeKind::Live);
            assert_eq!(whole.size, bytes.len() as u64);
            let whole = File::from(whole.fd);
            let mut read = vec![0; bytes.len() + 1];
            assert_eq!(whole.read_at(&mut read, 0).unwrap(), bytes.len());
            assert!(read[..bytes.len()] == *bytes);
            assert!(whole.write_at(b"x", 0).is_err());
            // A clip of which there is nothing.
            put(&rig.source(), "new", &bytes[..MIB]);
            let path = rig.mountpoint().join("new");
            eventually("a new clip", || path.exists());
            let file = File::open(path).unwrap();
            let refusal = handover::whole(&served.socket(), file.as_fd()).unwrap_err();
            assert_eq!(refusal.reason, Reason::NoMetadata);
            let stats = served.server().stats();
            assert_eq!((stats.whole, stats.refused[&Reason::NoMetadata]), (1, 1));
        },
    );
}

/// What the server gives to a client cannot be made to write.
#[test]
fn the_descriptor_cannot_write_nor_be_shared() {
    each_rclone(MIB, &["--allow-other", "--dir-cache-time=1s"], |rig, _| {
        let served = Served::of(rig);
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let client = Raw::connect(&served.socket());
        let file = File::open(clip(rig)).unwrap();
        (&file).seek(SeekFrom::Start(77)).unwrap();
        // An offset that is said to differ, and does not.
        let differs = |token| Request::Differs {
            token,
            offset: 4097,
        };
        let mut last = 0;
        // rclone may write its metadata once more after the clip was closed.
        eventually("a proof that lasts", || {
            let (answer, fds) = client.ask(RANGES, &[file.as_fd()]);
            let Answer::Ranges { token, size, .. } = answer else {
                panic!("{answer:?}");
            };
            assert_eq!(size, MIB as u64);
            assert_eq!(fds.len(), 1);
            let data = File::from(fds.into_iter().next().unwrap());
            assert!(data.write_at(b"x", 0).is_err());
            // Neither has the server used the client's description.
            assert_eq!((&file).stream_position().unwrap(), 77);
            let flags = rustix::fs::fcntl_getfl(&file).unwrap();
            assert!(!flags.contains(rustix::fs::OFlags::DIRECT));
            last = token;
            match client.ask(differs(token), &[file.as_fd()]).0 {
                Answer::Refused(refusal) if refusal.reason == Reason::Changed => false,
                answer => {
                    assert_eq!(answer, Answer::Valid { token });
                    true
                }
            }
        });
        // By a descriptor of another file.
        put(&rig.source(), "other", b"other");
        let path = rig.mountpoint().join("other");
        eventually("another clip", || path.exists());
        let other = File::open(path).unwrap();
        let (answer, _) = client.ask(differs(last), &[other.as_fd()]);
        assert!(matches!(answer, Answer::Refused(r) if r.reason == Reason::Changed));
        // A mode by which others could open it anew for writing.
        let cached = cache_file(rig, "vfs", CLIP);
        fs::set_permissions(&cached, fs::Permissions::from_mode(0o666)).unwrap();
        let (reason, detail) = client.refused(&file);
        assert_eq!(reason, Reason::Permission, "{detail}");
    });
}
