//! `exec`: real programs, unchanged, get the same bytes and the same results.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;

use common::clips::{each_rclone, each_writable};
use common::exec::*;
use common::{content, rig};
use serde_json::json;

/// Programs that read, and how many opens of clips are substituted.
const READERS: &[(u64, &str)] = &[
    (1, "cat clip | cksum"),
    (2, "cat clip sub/deep/other | sha256sum"),
    (1, "sha256sum clip"),
    (1, "dd if=clip bs=64k skip=3 count=5 status=none | md5sum"),
    (1, "tac b | cksum"),
    (2, "cmp clip sub/deep/other"),
    (1, "head -c 100 clip; exit 7"),
    (1, "wc -l clip"),
    (1, "od -An -tx1 b | tail -n 1"),
    (3, "grep -c 0000 clip sub/deep/other b"),
    (1, "busybox md5sum clip"),
    (1, "busybox cat clip | busybox wc -c"),
    (1, "md5sum < clip"),
    (1, "while read -r line; do echo \"$line\"; done < b | cksum"),
    (
        2,
        "(cd sub; cat deep/other; (cat ../b)) | (cat | md5sum); false",
    ),
    (
        2,
        "x=$(<b); echo ${#x}; for f in sub/*/*; do md5sum $f; done | sort",
    ),
    (2, "xargs -P 2 -n 1 cksum <<< 'clip b' | sort"),
    (1, "git hash-object clip"),
    (1, "gzip -nc clip | md5sum"),
    (1, "find . -xdev -name other -exec md5sum {} +"),
];

#[test]
fn programs_read_the_same_bytes() {
    each(|rig| {
        for (expected, script) in READERS {
            let done = both(&rig.mountpoint(), script);
            assert_eq!(done.substituted(), *expected, "{script}: {}", done.report);
            assert_eq!(done.report["by_reason"], json!({}), "{script}");
        }
    });
}

#[test]
fn go_programs_get_snapshots() {
    let rig = clips();
    let done = both(
        &rig.mountpoint(),
        "rclone md5sum --config /dev/null . | sort",
    );
    // By the plain run, the last clip has become whole, too.
    assert_eq!(
        done.substituted(),
        WHOLE.len() as u64 + 1,
        "{}",
        done.report
    );
}

#[test]
fn python_reads_and_maps() {
    let rig = clips();
    let done = both_python(
        &rig.mountpoint(),
        "f=open('clip','rb'); print(hashlib.md5(f.read()).hexdigest())\n\
         m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ); print(hashlib.md5(m).hexdigest())\n\
         g=os.open('clip',os.O_RDONLY); print(os.pread(g,20,4000),os.lseek(g,0,1),os.fstat(g).st_size)\n\
         print(os.fstat(g).st_mtime_ns, os.stat('clip').st_mtime_ns==os.fstat(g).st_mtime_ns)\n\
         f.seek(100); print(os.lseek(g,0,1))\n\
         try: os.write(g,b'x')\n\
         except OSError as e: print(e)\n",
    );
    assert_eq!(done.substituted(), 2, "{}", done.report);
    assert_eq!(done.report["reused"], 1);
    assert_eq!(done.report["bytes"], 2 * bytes_of("clip").len());
}

#[test]
fn ffmpeg_decodes_and_compares() {
    let rig = rig(|source| {
        for (name, source_of) in [("a.y4m", "testsrc2"), ("b.y4m", "testsrc")] {
            let made = Command::new("ffmpeg")
                .args(["-v", "error", "-f", "lavfi", "-i"])
                .arg(format!("{source_of}=size=320x240:rate=25:duration=1"))
                .args(["-pix_fmt", "yuv420p"])
                .arg(source.join(name))
                .status();
            assert!(made.unwrap().success());
        }
    });
    for name in ["a.y4m", "b.y4m"] {
        rig.cache_whole(Path::new(name)).unwrap();
    }
    let mount = rig.mountpoint();
    let done = both(&mount, "ffmpeg -v error -nostdin -i a.y4m -f md5 -");
    assert_eq!(done.substituted(), 1, "{}", done.report);
    let psnr = "ffmpeg -nostdin -i a.y4m -i b.y4m -lavfi psnr -f null - 2>&1 | grep -o 'PSNR.*'";
    let done = both(&mount, psnr);
    assert!(done.text().contains("average:"), "{}", done.text());
    assert_eq!(done.substituted(), 2, "{}", done.report);
}

#[test]
fn sqlite_and_git_read_what_they_hold() {
    let rig = rig(|source| {
        let script = "sqlite3 base.db 'create table t(a,b); insert into t values(1,hex(randomblob(99999))),(2,7)' && \
            git init -q repo && cd repo && cp ../base.db . && git add . && \
            git -c user.name=x -c user.email=x@x commit -qm x && git gc -q";
        let made = Command::new("bash")
            .arg("-c")
            .arg(script)
            .current_dir(source)
            .status();
        assert!(made.unwrap().success());
    });
    let mount = rig.mountpoint();
    for path in common::clips::walk(&rig.source()) {
        let name = path.strip_prefix(rig.source()).unwrap();
        if path.metadata().unwrap().len() > 0 {
            rig.cache_whole(name).unwrap();
        }
    }
    let done = both(
        &mount,
        "sqlite3 -readonly base.db 'select a,length(b) from t; pragma integrity_check'",
    );
    assert!(done.substituted() >= 1, "{}", done.report);
    let git = "git -c safe.directory='*' -C repo";
    let done = both(
        &mount,
        &format!(
            "{git} log --format=%s; {git} show HEAD:base.db | md5sum; {git} fsck; {git} ls-files -s"
        ),
    );
    assert!(done.substituted() >= 3, "{}", done.report);
}

#[test]
fn programs_that_compare_are_left_alone() {
    let rig = clips();
    let mount = rig.mountpoint();
    let out = tempfile::tempdir().unwrap();
    let to = out.path().display();
    let mut programs = vec![
        ("cp", format!("cp clip {to}/x && cksum {to}/x")),
        ("mv", format!("mv -f clip {to}/x; cksum {to}/x")),
        ("install", format!("install clip {to}/x && cksum {to}/x")),
        ("tar", "tar c clip | cksum".to_owned()),
        ("tail", "timeout 1 tail -n 0 -f clip 2>&1".to_owned()),
    ];
    // The server as the other end of a pipe.
    let put = format!(
        "echo put clip {to}/sftp | sftp -q -D /usr/lib/openssh/sftp-server > /dev/null 2>&1; stat -c %a {to}/sftp; rm {to}/sftp"
    );
    programs.push(("sftp", put));
    for (name, script) in programs {
        let done = both(&mount, &script);
        assert_eq!(
            (done.reason("program"), done.substituted()),
            (1, 0),
            "{name}"
        );
        // That is why: taken off the list, each does something else.
        let plain = plainly(&mount, &["bash", "-c", &script]);
        let done = run_in(&mount, &["--include", name], &["bash", "-c", &script]);
        assert_eq!(done.substituted(), 1, "{name}: {}", done.report);
        let alike = done.stdout == plain.stdout && done.code == plain.status.code();
        assert!(!alike || name == "mv", "{name} need not be on the list");
    }
    let done = run_in(
        &mount,
        &["--exclude", "cat,dd"],
        &["bash", "-c", "cat b; dd if=b; cksum b"],
    );
    assert_eq!((done.reason("program"), done.substituted()), (2, 1));
}

#[test]
fn descriptors_are_as_asked_for() {
    let rig = clips();
    let done = both_python(
        &rig.mountpoint(),
        "for flags in (0,os.O_CLOEXEC,os.O_NONBLOCK,os.O_NOFOLLOW|os.O_CLOEXEC|os.O_NOCTTY):\n\
        \x20fd=sys_(257 if os.uname().machine=='x86_64' else 56,-100,b'b',flags,0)\n\
        \x20print(fd,fcntl.fcntl(fd,fcntl.F_GETFD),fcntl.fcntl(fd,fcntl.F_GETFL)&(os.O_NONBLOCK|3))\n\
         for flags in (os.O_WRONLY,os.O_RDWR,os.O_RDONLY|os.O_DIRECTORY,os.O_PATH,os.O_RDONLY|os.O_CREAT|os.O_EXCL):\n\
        \x20try: print(os.open('b',flags))\n\
        \x20except OSError as e: print(e)\n\
         import resource\n\
         resource.setrlimit(resource.RLIMIT_NOFILE,(5,5))\n\
         try:\n\
        \x20while True: print(os.open('b',0))\n\
         except OSError as e: print(e)\n",
    );
    assert!(done.substituted() >= 4, "{}", done.report);
}

#[test]
fn what_is_not_whole_or_changed_goes_through_fuse() {
    let rig = clips();
    let mount = rig.mountpoint();
    let done = both(
        &mount,
        "head -c 5000 partial | md5sum; cat nothing; cat sub; cat clip | md5sum",
    );
    assert_eq!(
        (done.reason("partial"), done.substituted()),
        (1, 1),
        "{}",
        done.report
    );
    drop(rig);
    each_rclone(
        100_000,
        &["--dir-cache-time=100ms", "--attr-timeout=50ms"],
        |rig, _| {
            rig.cache_whole(Path::new("clip")).unwrap();
            let mount = rig.mountpoint();
            assert_eq!(both(&mount, "md5sum clip").substituted(), 1);
            let new = content(5, 120_000);
            common::clips::replace_remote(rig, &new, "2031-01-01 00:00:00 UTC");
            common::eventually("the change", || {
                std::fs::read(mount.join("clip")).unwrap() == new
            });
            both(&mount, "md5sum clip");
        },
    );
    each_writable(100_000, &[], |rig, _| {
        let done = both(&rig.mountpoint(), "md5sum clip");
        assert_eq!(done.substituted(), 0, "{}", done.report);
        assert_eq!(done.reason("unsupported"), 1, "{}", done.report);
    });
}

#[test]
fn many_processes_open_at_once() {
    let rig = clips();
    let script = "import multiprocessing as m\n\
        want={n:hashlib.md5(open(n,'rb').read()).digest() for n in ('clip','b','sub/deep/other')}\n\
        def work(k):\n\
        \x20for i in range(63):\n\
        \x20 n=('clip','b','sub/deep/other','/etc/passwd')[(i+k)%4]\n\
        \x20 with open(n,'rb') as f: d=f.read()\n\
        \x20 if n in want and hashlib.md5(d).digest()!=want[n]: return 1\n\
        \x20return 0\n\
        m.set_start_method('fork')\n\
        with m.Pool(16) as p: print(sum(p.map(work,range(16),1)))\n";
    let done = both_python(&rig.mountpoint(), script);
    assert_eq!(done.text(), "0\n");
    assert_eq!(done.substituted(), 3 + 16 * 63 * 3 / 4, "{}", done.report);
}

#[test]
fn reports_say_what_happened() {
    let rig = clips();
    let mount = rig.mountpoint();
    let output = common::program()
        .args(["exec", "--report", "--", "cat", "b", "partial"])
        .current_dir(&mount)
        .output()
        .unwrap();
    let text = common::stderr(&output);
    assert!(text.starts_with("exec: 1 of 2 opens of clips got a snapshot (4.0 KiB, 1 copy), 1 through FUSE: partial; "), "{text}");
    let done = run_in(&mount, &["--snapshot", "off"], &["md5sum", "b"]);
    let live = done.report["kinds"]["live"].as_u64().unwrap_or(0);
    assert_eq!(live + done.reason("busy"), 1, "{}", done.report);
    let done = run_in(&mount, &["--copy-budget", "1MiB"], &["md5sum", "clip", "b"]);
    assert_eq!(
        (done.reason("budget"), done.substituted()),
        (1, 1),
        "{}",
        done.report
    );
}
