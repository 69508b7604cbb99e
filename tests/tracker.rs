//! `run`, `dump-map` and the library's tracker see what programs do with clips.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::time::SystemTime;

use common::fds::{Open, dumped, end, lost, told, truth};
use common::{Tracking, Worker, content, program, put, rclones, rig, rig_of, rig_with};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vmafx_bypass::mounts::Dev;
use vmafx_bypass::rig::RigOptions;

#[test]
fn an_open_is_shown_with_what_the_kernel_says_of_it() {
    let rig = rig(|source| put(source, "clip.y4m", &content(1, 300_000)));
    rig.cache_whole(Path::new("clip.y4m")).unwrap();
    let clip = rig.mountpoint().join("clip.y4m");
    let stat = fs::metadata(&clip).unwrap();
    let before = SystemTime::now();
    let mut tracking = Tracking::start(&rig.mountpoint(), &[]);
    let mut worker = Worker::start(
        &rig.mountpoint(),
        "def work():\n open('/proc/thread-self/comm','w').write('fifteen \"chars\"')\n \
         global fd; fd=os.open('clip.y4m',os.O_RDONLY|os.O_NONBLOCK); opened.set(); rest.wait()\n\
         opened=threading.Event(); rest=threading.Event()\n\
         threading.Thread(target=work,daemon=True).start(); opened.wait()\n\
         step(); os.close(fd)",
        &[],
    );
    let pid = worker.pid();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let tids = tasks.map(|t| {
        t.unwrap()
            .file_name()
            .to_str()
            .unwrap()
            .parse::<u32>()
            .unwrap()
    });
    let tid = tids.into_iter().find(|tid| *tid != pid).unwrap();
    let (fd, _) = truth(pid, &rig.mountpoint())[0];
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap();
    let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap();
    // Python's O_CLOEXEC is the descriptor's, not the file's.
    let flags = u32::from_str_radix(flags.trim(), 8).unwrap() & !0o2_000_000;
    let row = json!({
        "pid": pid, "fd": fd, "comm": "fifteen \"chars\"", "path": clip,
        "dev": Dev::from_st_dev(stat.dev()).to_string(), "ino": stat.ino(), "flags": flags,
        "size": 300_000, "cached_bytes": 300_000, "state": "active",
        "own_pid": worker.pid(),
    });
    // Takes the fields that differ, and leaves those of `row`.
    let take_time = |line: &mut Value, field| {
        let time = line.as_object_mut().unwrap().remove(field).unwrap();
        let at = humantime::parse_rfc3339(time.as_str().unwrap()).unwrap();
        assert!(at >= before && at <= SystemTime::now(), "{time}");
        assert!(time.as_str().unwrap().ends_with('Z'));
    };
    let event = |tracking: &mut Tracking, kind: &str, tid: u32| {
        let mut line = tracking.next_where(|line| line["event"] == kind);
        take_time(&mut line, "ts");
        let object = line.as_object_mut().unwrap();
        let open_ns = object.remove("open_ns").unwrap().as_u64().unwrap();
        assert!(open_ns > 0 && u128::from(open_ns) < before.elapsed().unwrap().as_nanos());
        assert_eq!(object.remove("event").unwrap(), kind);
        assert_eq!(object.remove("tid").unwrap(), tid);
        assert_eq!(line, row);
    };

    event(&mut tracking, "open", tid);
    let mut dump = tracking.dump();
    take_time(&mut dump["entries"][0], "opened_at");
    assert_eq!(dump["entries"], json!([row]));
    take_time(&mut dump["owner"], "since");
    assert_eq!(dump["owner"], json!({"pid": tracking.pid(), "alive": true}));
    assert_eq!(
        (&dump["schema"], &dump["complete"]),
        (&json!(1), &json!(true))
    );
    assert!(lost(&dump).is_empty());

    worker.proceed();
    event(&mut tracking, "close", pid);
    assert_eq!(tracking.dump()["entries"], json!([]));
    let lines = tracking.end(Signal::SIGINT);
    let mut summary = lines[0].clone();
    take_time(&mut summary, "ts");
    let expected = json!({
        "event": "summary", "events": 2, "tracked": 0, "complete": true, "losses": dump["losses"],
    });
    assert_eq!(summary, expected);
    assert_eq!(lines.len(), 1, "nothing comes after the summary");
}

#[test]
fn names_of_any_bytes_are_shown_as_they_are() {
    let long = "n".repeat(255);
    let names: &[&[u8]] = &[
        b" a b ",
        b"quote\"'`$",
        "日本 é e\u{301} 🎞".as_bytes(),
        b"back\\slash",
        b"-dash",
        b"%41#?&",
        // rclone shows it as U+240A.
        b"new\nline",
        b"not\xff\xfetext",
        long.as_bytes(),
    ];
    for rclone in rclones() {
        let rig = rig_of(&rclone, |source| {
            for name in names {
                fs::write(source.join(OsStr::from_bytes(name)), "clip").unwrap();
            }
        });
        let tracking = Tracking::start(&rig.mountpoint(), &[]);
        let script = "for name in os.listdir(b'.'): os.open(name,os.O_RDONLY)";
        let worker = Worker::start(&rig.mountpoint(), script, &[]);
        let pid = worker.pid();
        let open = truth(pid, &rig.mountpoint());
        assert_eq!(open.len(), names.len());
        let shown: Vec<&Path> = open.iter().map(|(_, path)| path.as_path()).collect();
        assert!(shown.contains(&&*rig.mountpoint().join("new\u{240a}line")));
        assert!(shown.contains(&&*rig.mountpoint().join(OsStr::from_bytes(b"not\xff\xfetext"))));

        assert_eq!(dumped(&tracking.dump(), pid), open);
        let table = program()
            .args(["dump-map", "--pin-dir"])
            .arg(&tracking.pin_dir)
            .output()
            .unwrap();
        let table = String::from_utf8(table.stdout).unwrap();
        assert_eq!(table.lines().count(), 1 + names.len(), "{table}");
        assert!(table.contains("/not\\xff\\xfetext\n"), "{table}");

        let lines = end(tracking);
        let opens = told(&lines, pid).into_iter();
        let opens: Open = opens.map(|(_, fd, path)| (fd, path)).collect();
        assert_eq!(opens, open);
    }
}

/// Serves over HTTP a tree without end: each folder has the folder `a`, one of
/// 255 letters, and files of 1, 254 and 255 letters. Its address.
fn serve_endless_tree() -> String {
    fn answer(stream: &TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream).lines();
        while let Some(request) = lines.next().transpose()? {
            // The headers, up to the blank line, tell nothing.
            lines.find(|line| !line.as_ref().is_ok_and(|text| !text.is_empty()));
            let (kind, body) = if request.contains("/ HTTP") {
                let folders = ["a", &"d".repeat(255)].map(|name| format!("<a href={name}/>"));
                let files = [1, 254, 255].map(|length| format!("<a href={}>", "f".repeat(length)));
                ("text/html", folders.concat() + &files.concat())
            } else {
                ("video/mp4", "clip".to_owned())
            };
            let length = body.len();
            let sent = if request.starts_with("HEAD") {
                ""
            } else {
                &body
            };
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}");
            // In one packet, else the next waits for the first's receipt.
            let mut stream = stream;
            stream.write_all(format!("{head}\r\n\r\n{sent}").as_bytes())?;
        }
        Ok(())
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A client that goes away early is no failure of the test.
            std::thread::spawn(move || answer(&stream?));
        }
    });
    format!("http://{address}")
}

/// Opens the file at each path of its arguments, a component at a time: the
/// paths are too long for one call.
const OPEN_BY_STEPS: &str = "
for path in sys.argv[1:]:
    folder=os.open('.',os.O_PATH)
    *above,name=path.split('/')
    for step_name in above:
        below=os.open(step_name,os.O_PATH,dir_fd=folder); os.close(folder); folder=below
    os.open(name,os.O_RDONLY,dir_fd=folder)";

#[test]
fn paths_of_4095_bytes_are_exact_and_longer_ones_are_counted() {
    let remote = Some(format!(":http,url='{}':", serve_endless_tree()));
    // No file system could hold a cache file that deep.
    let mount_arguments = vec!["--vfs-cache-mode".into(), "off".into()];
    let options = RigOptions {
        remote,
        mount_arguments,
        ..RigOptions::default()
    };
    let rig = rig_with(options, |_| ());
    let folders = format!("{}/", "d".repeat(255)).repeat(15);
    let wide = folders.clone() + &"f".repeat(255);
    // The deepest: 2,047 folders.
    let deep = "a/".repeat(2047) + "f";
    let longer = folders + "a/" + &"f".repeat(254);
    assert_eq!((wide.len(), deep.len(), longer.len()), (4095, 4095, 4096));

    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(&rig.mountpoint(), OPEN_BY_STEPS, &[&wide, &deep]);
    let expected = [&wide, &deep].map(|path| rig.mountpoint().join(path));
    let shown = dumped(&tracking.dump(), worker.pid());
    assert!(shown.iter().map(|(_, path)| path).eq(&expected));
    assert!(lost(&tracking.dump()).is_empty());

    let over = Worker::start(&rig.mountpoint(), OPEN_BY_STEPS, &[&longer]);
    let dump = tracking.dump();
    assert_eq!(dumped(&dump, over.pid())[0].1, Path::new("?"));
    assert_eq!(
        (lost(&dump), &dump["complete"]),
        (vec!["path_unreadable"], &json!(false))
    );

    let lines = tracking.end(Signal::SIGTERM);
    let shown = told(&lines, worker.pid());
    assert!(shown.iter().map(|(_, _, path)| path).eq(&expected));
    assert_eq!(lines.last().unwrap()["complete"], false);
}

#[test]
fn a_clip_as_deep_as_the_cache_allows_is_active() {
    // rclone opens `<cache>/vfsMeta/:http{xxxxx}/<path>`, of up to 4,095 bytes.
    let room = |rig: &Path| 4095 - rig.join("cache/vfsMeta/:http{12345}/").as_os_str().len();
    let mut deep = String::new();
    let rig = rig(|source| {
        deep = format!("{}/", "d".repeat(199)).repeat(20);
        let rest = room(source.parent().unwrap()) - deep.len();
        deep.push_str(&"c".repeat(rest));
        put(source, &deep, &content(1, 5000));
    });
    rig.cache_whole(Path::new(&deep)).unwrap();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(&rig.mountpoint(), OPEN_BY_STEPS, &[&deep]);
    let dump = tracking.dump();
    let expected = rig.mountpoint().join(&deep);
    assert_eq!(dumped(&dump, worker.pid())[0].1, expected);
    assert_eq!(dump["entries"][0]["state"], "active");
    assert_eq!(dump["entries"][0]["cached_bytes"], 5000);
    let lines = end(tracking);
    assert_eq!(told(&lines, worker.pid())[0].2, expected);
}

/// A bind mount, until it is dropped.
struct Bind(tempfile::TempDir);

impl Bind {
    fn new(folder: &Path) -> Self {
        let point = tempfile::tempdir().unwrap();
        let none: Option<&str> = None;
        mount(Some(folder), point.path(), none, MsFlags::MS_BIND, none).unwrap();
        Self(point)
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        // Else the folder would not go.
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_clip_is_the_same_by_whatever_way_it_is_reached() {
    let rig = rig(|source| put(source, "sub/clip.y4m", &content(1, 100)));
    let sub = rig.mountpoint().join("sub");
    let bind = Bind::new(&sub);
    let links = tempfile::tempdir().unwrap();
    let (link, to_sub) = (links.path().join("link"), links.path().join("sub"));
    symlink(sub.join("clip.y4m"), &link).unwrap();
    symlink(&sub, &to_sub).unwrap();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(
        &sub,
        "link,to_sub,bind=sys.argv[1:]\n\
         os.open('clip.y4m',0)\n\
         os.open('../sub/./clip.y4m',0)\n\
         os.open('sub/clip.y4m',0,dir_fd=os.open('..',os.O_RDONLY))\n\
         os.open('clip.y4m',0,dir_fd=os.open(bind,os.O_PATH))\n\
         os.open(link,0)\n\
         os.open(to_sub+'/clip.y4m',0)\n\
         os.open(bind+'/clip.y4m',0)\n\
         os.chdir(bind); os.open('clip.y4m',0)\n\
         os.open('/proc/self/fd/%d'%os.open('clip.y4m',os.O_PATH),0)",
        &[&link, &to_sub, bind.0.path()].map(|path| path.to_str().unwrap()),
    );
    let clip = sub.join("clip.y4m");
    let shown = dumped(&tracking.dump(), worker.pid());
    assert_eq!(shown.len(), 9);
    assert!(shown.iter().all(|(_, path)| *path == clip), "{shown:?}");
    let lines = end(tracking);
    let opens = told(&lines, worker.pid());
    assert_eq!(opens.len(), 9);
    assert!(
        opens
            .iter()
            .all(|(event, _, path)| *event == "open" && *path == clip)
    );
}

/// O_APPEND.
const APPEND: i32 = 0o2000;

#[test]
fn every_call_that_opens_or_creates_is_tracked() {
    let source = tempfile::tempdir().unwrap();
    let options = RigOptions {
        remote: Some(source.path().to_str().unwrap().into()),
        read_only: false,
        ..RigOptions::default()
    };
    let calls = ["open", "openat2", "create", "creat", "write", "truncate"];
    for call in calls {
        put(source.path(), call, &content(1, 100));
    }
    fs::remove_file(source.path().join("create")).unwrap();
    fs::remove_file(source.path().join("creat")).unwrap();
    let rig = rig_with(options, |_| ());
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    // 437 is openat2 everywhere; 2 is the open of x86-64, which glibc avoids.
    let worker = Worker::start(
        &rig.mountpoint(),
        "import ctypes\n\
         libc=ctypes.CDLL(None,use_errno=True)\n\
         how=(ctypes.c_uint64*3)(os.O_RDONLY,0,0)\n\
         if os.uname().machine=='x86_64': assert libc.syscall(2,b'open',0)>=0\n\
         else: os.open('open',0)\n\
         assert libc.syscall(437,-100,b'openat2',how,24)>=0\n\
         os.open('create',os.O_RDWR|os.O_CREAT|os.O_EXCL)\n\
         assert libc.creat(b'creat',0o644)>=0\n\
         os.open('write',os.O_WRONLY|os.O_APPEND)\n\
         os.open('truncate',os.O_WRONLY|os.O_TRUNC)",
        &[],
    );
    let dump = tracking.dump();
    let entries = dump["entries"].as_array().unwrap();
    let shown = entries.iter().map(|entry| {
        let name = Path::new(entry["path"].as_str().unwrap()).file_name();
        let flags = entry["flags"].as_i64().unwrap() as i32;
        (name.unwrap().to_str().unwrap(), flags & (3 | APPEND))
    });
    assert!(shown.eq(calls.into_iter().zip([0, 0, 2, 1, 1 | APPEND, 1])));
    assert_eq!(
        dumped(&dump, worker.pid()),
        truth(worker.pid(), &rig.mountpoint())
    );
    let lines = end(tracking);
    let opens = told(&lines, worker.pid());
    assert!(opens.iter().all(|(event, ..)| *event == "open"));
    assert_eq!(opens.len(), calls.len());
}

#[test]
fn every_dup_is_tracked_and_what_it_replaces_is_closed() {
    let rig = rig(|source| {
        put(source, "a", b"a");
        put(source, "b", b"b");
    });
    let (a, b) = (rig.mountpoint().join("a"), rig.mountpoint().join("b"));
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let mut worker = Worker::start(
        &rig.mountpoint(),
        "import ctypes\n\
         libc=ctypes.CDLL(None)\n\
         # Above 50, so that the numbers are known.\n\
         def at(path,fd): libc.dup2(os.open(path,0),fd)\n\
         at('a',50); at('b',51); at('/etc/passwd',52)\n\
         libc.dup(50); libc.dup3(50,53,os.O_CLOEXEC); libc.dup2(50,54)\n\
         step()\n\
         libc.dup2(50,50)\n\
         libc.dup2(52,53)\n\
         libc.dup2(50,52)\n\
         libc.dup3(51,54,0)\n\
         libc.dup2(99,51)",
        &[],
    );
    let pid = worker.pid();
    assert_eq!(dumped(&tracking.dump(), pid), truth(pid, &rig.mountpoint()));
    assert_eq!(tracking.dump()["entries"].as_array().unwrap().len(), 7);
    worker.proceed();
    let open = truth(pid, &rig.mountpoint());
    assert_eq!(dumped(&tracking.dump(), pid), open);
    let lines = end(tracking);
    let mut events = told(&lines, pid);
    assert_eq!(
        events.iter().filter(|(event, ..)| *event == "open").count(),
        2
    );
    events.retain(|(_, fd, _)| *fd >= 50);
    let expected = [
        ("dup", 50, &a),
        ("dup", 51, &b),
        ("dup", 53, &a),
        ("dup", 54, &a),
        ("close", 53, &a),
        ("dup", 52, &a),
        ("close", 54, &a),
        ("dup", 54, &b),
    ];
    assert_eq!(
        events,
        expected.map(|(event, fd, path)| (event, fd, path.clone()))
    );
}

#[test]
fn what_is_no_clip_open_for_reading_or_writing_is_not_tracked() {
    let rig = rig(|source| put(source, "sub/clip.y4m", b"clip"));
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(
        &rig.mountpoint(),
        "os.open('sub',os.O_RDONLY|os.O_DIRECTORY)\n\
         os.open('sub/clip.y4m',os.O_PATH)\n\
         os.open('/etc/passwd',os.O_RDONLY)\n\
         os.listdir('sub'); os.stat('sub/clip.y4m'); os.pipe()\n\
         try: os.open('none',os.O_RDONLY)\n\
         except FileNotFoundError: pass\n\
         try: os.open('new',os.O_WRONLY|os.O_CREAT)\n\
         except OSError: pass\n\
         os.open('sub/clip.y4m',os.O_RDONLY)",
        &[],
    );
    // The last one alone, which shows that the others would have been seen.
    let clip = rig.mountpoint().join("sub/clip.y4m");
    let shown = dumped(&tracking.dump(), worker.pid());
    assert!(shown.iter().map(|(_, path)| path).eq([&clip]), "{shown:?}");
    let lines = end(tracking);
    let opens = told(&lines, worker.pid());
    assert_eq!(opens, [("open", shown[0].0, clip)]);
}
