//! `run --account`: what reads through FUSE cost.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Tracking, Worker, content, put, rig};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// The rows of a list that are of this process.
fn of(list: &Value, pid: u32) -> Vec<&Value> {
    let rows = list.as_array().unwrap().iter();
    rows.filter(|row| row["pid"] == pid).collect()
}

/// The last line's account.
fn summary(tracking: Tracking) -> Value {
    let lines = tracking.end(Signal::SIGINT);
    let last = lines.last().unwrap();
    assert_eq!(last["event"], "summary");
    last.clone()
}

/// What a row has read: calls, bytes.
fn read(row: &Value) -> (u64, u64) {
    assert!(row["reads"] == 0 || row["read_ns"].as_u64().unwrap() > 0);
    (
        row["reads"].as_u64().unwrap(),
        row["read_bytes"].as_u64().unwrap(),
    )
}

#[test]
fn every_read_call_is_counted_for_its_process_and_clip() {
    let rig = rig(|source| {
        put(source, "a", &content(1, 100_000));
        put(source, "b", &content(2, 100_000));
    });
    let mut tracking = Tracking::start(&rig.mountpoint(), &["--account"]);
    let reader = Worker::start(
        &rig.mountpoint(),
        "import ctypes; libc=ctypes.CDLL(None,use_errno=True)\n\
         class Part(ctypes.Structure): _fields_=[('at',ctypes.c_void_p),('length',ctypes.c_size_t)]\n\
         room=ctypes.create_string_buffer(300)\n\
         parts=(Part*2)(Part(ctypes.addressof(room),100),Part(ctypes.addressof(room)+100,200))\n\
         fd=os.open('a',os.O_RDONLY)\n\
         assert len(os.read(fd,1000))==1000\n\
         assert len(os.pread(fd,5000,0))==5000\n\
         assert os.readv(fd,[bytearray(10),bytearray(20)])==30\n\
         libc.preadv.argtypes=[ctypes.c_int,ctypes.c_void_p,ctypes.c_int,ctypes.c_long]\n\
         assert libc.preadv(fd,parts,2,0)==300\n\
         assert os.preadv(fd,[bytearray(7)],0,0)==7\n\
         assert os.read(os.dup(fd),40)==os.pread(fd,40,1030)\n\
         try: os.pread(fd,1,-1)\n\
         except OSError: pass\n\
         assert os.pread(fd,1,100000)==b''\n\
         other=os.open('b',os.O_RDONLY); os.pread(other,64,0)\n\
         with open('/dev/zero','rb') as zero: zero.read(4096)",
        &[],
    );
    // And another process, which ends.
    let gone = Worker::start(
        &rig.mountpoint(),
        "os.read(os.open('a',os.O_RDONLY),11)",
        &[],
    );
    let gone_pid = gone.pid();
    gone.end();
    let closed = tracking.next_where(|line| line["event"] == "close" && line["pid"] == gone_pid);
    assert_eq!(read(&closed), (1, 11));
    let dump = tracking.dump();
    let account = &dump["account"];
    let mut rows = of(&account["each"], reader.pid());
    rows.sort_by_key(|row| row["path"].as_str());
    let a = 1000 + 5000 + 30 + 300 + 7 + 40 + 40;
    assert_eq!(rows.len(), 2, "{account}");
    assert_eq!(read(rows[0]), (9, a), "{account}");
    assert_eq!(
        rows[0]["path"],
        rig.mountpoint().join("a").to_str().unwrap()
    );
    assert_eq!(read(rows[1]), (1, 64), "{account}");
    let ended = of(&account["each"], gone_pid);
    assert_eq!(read(ended[0]), (1, 11), "{account}");
    assert_eq!(
        ended[0]["path"],
        rig.mountpoint().join("a").to_str().unwrap()
    );
    // The same by clip, and all together.
    let clips = account["clips"].as_array().unwrap().iter();
    let clip = clips.clone().find(|clip| clip["path"] == rows[0]["path"]);
    assert_eq!(read(clip.unwrap()), (10, a + 11), "{account}");
    assert_eq!(clip.unwrap()["processes"], 2);
    let process = of(&account["processes"], reader.pid())[0];
    assert_eq!(
        (read(process), &process["clips"]),
        ((10, a + 64), &json!(2))
    );
    assert_eq!(read(account), (11, a + 64 + 11), "{account}");
    assert_eq!(account["forgotten"], 0);
    let output = common::program()
        .args(["dump-map", "--format=json", "--pid", &gone_pid.to_string()])
        .arg("--pin-dir")
        .arg(&tracking.pin_dir)
        .output()
        .unwrap();
    let own: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(read(&own["account"]), (1, 11), "of that process alone");
    reader.end();
    let summary = summary(tracking);
    assert_eq!(read(&summary["account"]), (11, a + 64 + 11));
    assert_eq!(summary["losses"]["read_uncounted"], 0);
}

#[test]
fn what_is_saved_is_reckoned_from_what_is_cached() {
    let rig = rig(|source| {
        put(source, "cached", &content(1, 4 << 20));
        put(source, "cold", &content(2, 4 << 20));
    });
    rig.cache_whole("cached".as_ref()).unwrap();
    let tracking = Tracking::start(&rig.mountpoint(), &["--account"]);
    Worker::start(
        &rig.mountpoint(),
        "import mmap\n\
         with open('cached','rb',buffering=0) as clip:\n \
           os.posix_fadvise(clip.fileno(),0,0,os.POSIX_FADV_DONTNEED)\n \
           while clip.read(4096): pass\n \
           # Not seen, and said to be so.\n \
           assert len(mmap.mmap(clip.fileno(),0,prot=mmap.PROT_READ)[:])==4<<20",
        &[],
    )
    .end();
    let summary = summary(tracking);
    let account = &summary["account"];
    assert_eq!(read(account), (1025, 4 << 20), "{account}");
    let clip = &account["clips"][0];
    assert_eq!(
        (&clip["state"], &clip["cached_bytes"]),
        (&json!("active"), &json!(4 << 20))
    );
    let (saved, took) = (&clip["saved_ns"], &clip["read_ns"]);
    assert!(saved.as_u64() < took.as_u64(), "{account}");
    assert!(saved.as_u64() > Some(0), "{account}");
    assert!(account["local_bytes_per_s"].as_f64().unwrap() > 0.0);
    assert_eq!(&account["saved_ns"], saved);
}

#[test]
fn more_accounts_than_fit_are_in_the_total() {
    let rig = rig(|source| {
        for number in 0..600 {
            put(source, &format!("clip{number}"), &content(number, 100));
        }
        put(source, "beside/clip", &content(9, 100));
    });
    let tracking = Tracking::start(&rig.mountpoint(), &["--account", "--max-fds=256"]);
    Worker::start(
        &rig.mountpoint(),
        "for number in range(600):\n \
           with open(f'clip{number}','rb',buffering=0) as clip: assert len(clip.read(100))==100",
        &[],
    )
    .end();
    let dump = tracking.dump();
    let account = &dump["account"];
    assert_eq!(read(account), (600, 60_000));
    let listed = account["each"].as_array().unwrap();
    assert!(listed.len() <= 256, "{}", listed.len());
    assert_eq!(account["forgotten"], 600 - listed.len());
    // The kernel keeps which it likes, and paths are kept of the last ones.
    let named = listed.iter().filter_map(|row| row["path"].as_str());
    assert!(named.clone().count() > 0, "{account}");
    let own = rig.mountpoint().join("clip");
    assert!(
        named
            .clone()
            .all(|path| path.starts_with(own.to_str().unwrap()))
    );
    assert!(listed.iter().all(|row| read(row) == (1, 100)), "{account}");
    let summary = summary(tracking);
    assert_eq!(summary["account"]["clips"].as_array().unwrap().len(), 10);
}

#[test]
fn clips_beside_the_prefix_are_in_the_total_alone() {
    let rig = rig(|source| {
        put(source, "in/clip", &content(1, 1000));
        put(source, "out/clip", &content(2, 1000));
    });
    let prefix = rig.mountpoint().join("in");
    let tracking = Tracking::start(&prefix, &["--account"]);
    Worker::start(
        &rig.mountpoint(),
        "for folder in 'in','out':\n \
           with open(folder+'/clip','rb',buffering=0) as clip: clip.read(10)",
        &[],
    )
    .end();
    let summary = summary(tracking);
    let account = &summary["account"];
    assert_eq!(read(account), (2, 20));
    let clips = account["clips"].as_array().unwrap();
    assert_eq!(clips.len(), 1, "{account}");
    assert_eq!(clips[0]["path"], prefix.join("clip").to_str().unwrap());
}

#[test]
fn what_was_read_of_a_mount_that_is_gone_stays() {
    let mut rig = rig(|source| put(source, "clip", &content(1, 1000)));
    let mut tracking = Tracking::start(&rig.mountpoint(), &["--account"]);
    let read_it = "with open('clip','rb',buffering=0) as clip: clip.read(10)";
    Worker::start(&rig.mountpoint(), read_it, &[]).end();
    rig.unmount();
    tracking.next_where(|line| line["event"] == "unmount");
    rig.mount().unwrap();
    tracking.next_where(|line| line["event"] == "mount");
    Worker::start(&rig.mountpoint(), read_it, &[]).end();
    let summary = summary(tracking);
    let clips = summary["account"]["clips"].as_array().unwrap();
    // One if the mount has got the same device number again.
    assert!([1, 2].contains(&clips.len()), "{summary}");
    let path = rig.mountpoint().join("clip");
    assert!(
        clips
            .iter()
            .all(|clip| clip["path"] == path.to_str().unwrap())
    );
    assert_eq!(clips.iter().map(|clip| read(clip).0).sum::<u64>(), 2);
}

#[test]
fn paths_that_are_long_make_room_for_each_other() {
    let long = ["x".repeat(200).as_str(); 10].join("/");
    let rig = rig(|source| {
        for number in 0..20 {
            put(
                source,
                &format!("{long}/clip{number}"),
                &content(number, 100),
            );
        }
    });
    // Room for 16 pieces of 240 bytes, where each path takes nine.
    let tracking = Tracking::start(&rig.mountpoint(), &["--account", "--max-fds=8"]);
    Worker::start(
        &rig.mountpoint().join(&long),
        "for number in range(20):\n \
           with open(f'clip{number}','rb',buffering=0) as clip: clip.read(10)",
        &[],
    )
    .end();
    let dump = tracking.dump();
    let each = dump["account"]["each"].as_array().unwrap();
    let last = rig.mountpoint().join(&long).join("clip19");
    let last = last.to_str().unwrap();
    assert!(each.iter().any(|row| row["path"] == last), "{dump}");
}

#[test]
fn nothing_is_counted_unasked() {
    let rig = rig(|source| put(source, "clip", &content(1, 1000)));
    let mut tracking = Tracking::start(&rig.mountpoint(), &[]);
    Worker::start(
        &rig.mountpoint(),
        "with open('clip','rb',buffering=0) as clip: clip.read(10)",
        &[],
    )
    .end();
    let closed = tracking.next_where(|line| line["event"] == "close");
    assert_eq!(closed.get("reads"), None);
    assert_eq!(tracking.dump().get("account"), None);
    assert_eq!(summary(tracking).get("account"), None);
}
