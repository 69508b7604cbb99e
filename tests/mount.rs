//! `mount`: what is shown is what rclone shows, whoever looks.
#![cfg(feature = "mount")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use common::clips::{CLIP, MIB, each_remote, options};
use common::exec::{PARTIAL, WHOLE, bytes_of, clips, each};
use common::reexport::*;
use common::snapshots::each_place;
use common::{content, fuse_range, put, rclones, rig, rig_with, stderr};
use serde_json::json;
use vmafx_bypass::rig::RigOptions;

/// Each file's name, kind, mode, owner, size, times, inode and link, and what
/// extended attributes it has; by listing, which shows kinds and inodes too.
const WALK: &str = "import os,sys
def names(path):
    try: return os.listxattr(path,follow_symlinks=False)
    except OSError as e: return e.errno
def row(path):
    s=os.lstat(path)
    link=os.readlink(path) if os.path.islink(path) else None
    return (path,s.st_mode,s.st_nlink,s.st_uid,s.st_gid,s.st_size,s.st_blocks,s.st_mtime_ns,s.st_ctime_ns,s.st_ino,link,names(path))
rows=[row(b'.')]
for top,folders,files in os.walk(b'.'):
    for e in os.scandir(top):
        rows.append((e.path,e.is_dir(follow_symlinks=False),e.is_symlink(),e.inode()==os.lstat(e.path).st_ino))
    rows+=[row(os.path.join(top,n)) for n in folders+files]
rows.sort(key=repr)
for r in rows: print(r)
v=os.statvfs('.'); print(v[:10],v.f_namemax)
";

fn walk(source: &Path, shown: &Path) -> String {
    both(source, shown, &format!("python3 -c \"{WALK}\""))
}

#[test]
fn a_tree_is_shown_as_it_is() {
    for rclone in rclones() {
        let remote = tempfile::tempdir().unwrap();
        let names: [&[u8]; 9] = [
            b"a",
            b" leading and trailing ",
            b"new\nline",
            b"\xff\xfe not unicode",
            "\u{1f4fd} café/cafe\u{301}".as_bytes(),
            b"deep/er/and/deeper/still",
            b"-rf",
            b"back\\slash, comma",
            &[b'n'; 200],
        ];
        for (n, name) in names.iter().enumerate() {
            let path = remote.path().join(std::ffi::OsStr::from_bytes(name));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content(n as u32, n * 1000)).unwrap();
        }
        fs::create_dir(remote.path().join("empty")).unwrap();
        for n in 0..3000 {
            put(remote.path(), &format!("many/{n}"), &[]);
        }
        let mut arguments = vec!["--attr-timeout=10s"];
        if rclone.is_absolute() {
            std::os::unix::fs::symlink("a", remote.path().join("link")).unwrap();
            std::os::unix::fs::symlink("/no/where", remote.path().join("broken")).unwrap();
            arguments.push("--links");
        }
        let rig = rig_with(
            RigOptions {
                remote: Some(remote.path().to_str().unwrap().into()),
                ..options(&rclone, &arguments)
            },
            |_| (),
        );
        let mount = rig.mountpoint();
        for args in [PASSED, RANGES] {
            let shown = Reexport::start(&mount, args);
            let text = walk(&mount, &shown.path());
            assert!(text.lines().count() > 2 * 3000, "{text}");
            assert_eq!(text.contains("no/where"), rclone.is_absolute());
            // Below a folder, the folder is the root.
            let below = Reexport::start(&mount.join("deep/er"), args);
            let names = both(
                &mount.join("deep/er"),
                &below.path(),
                "find . -ls; cat */*/*",
            );
            assert!(names.contains("./and/deeper/still"));
            both(
                &mount,
                &shown.path(),
                "LC_ALL=C ls -lAn --time-style=full-iso; find many | wc -l",
            );
            both(
                &mount,
                &shown.path(),
                "cat a ./-rf new* 'back\\slash, comma' | md5sum; ls no such; cat many; cat n*",
            );
            if rclone.is_absolute() {
                both(
                    &mount,
                    &shown.path(),
                    "readlink link broken; cat broken; stat -c %s link; head -c9 link",
                );
            }
        }
    }
}

/// Programs that read, none of which knows of anything.
const READERS: &[&str] = &[
    "md5sum clip sub/deep/other b partial",
    "t=$(mktemp -d); cp -a . $t && (cd $t; find . -printf '%P %s %m %T@\\n' | sort; md5sum clip b partial sub/deep/other); rm -r $t",
    "t=$(mktemp -d); rsync -a --checksum . $t/ && md5sum <$t/clip && rsync -anc --itemize-changes . $t/ && rm -r $t",
    "tar --sort=name -c . | md5sum",
    "find . -type f -size +10k -exec sha1sum {} + | sort",
    "grep -c 0000 -r . | sort",
    "dd if=clip bs=4k iflag=direct status=none | md5sum",
    "dd if=clip bs=1000 skip=1234 count=100 status=none | md5sum; tac b | cksum",
    "busybox sha1sum clip; gzip -nc clip | md5sum; git hash-object clip partial",
    "cmp clip b; head -c 100 clip; tail -c 100 clip; tail -c +2999990 clip",
    "diff -r . . && echo same; du -sb clip b; wc -lc clip b partial",
    "find . -print0 | xargs -0 -P 4 -n 1 stat -c '%n %s %Y %i' | sort",
    "xargs -P 8 -n 1 md5sum <<< 'clip b clip partial clip b sub/deep/other partial' | sort",
    "exec 3<clip 4<clip; md5sum <&3; md5sum <&4; md5sum </dev/fd/3 | cut -c1",
];

#[test]
fn programs_read_the_same_bytes() {
    each(|rig| {
        let mount = rig.mountpoint();
        for args in [PASSED, RANGES] {
            let shown = Reexport::start(&mount, args);
            for script in READERS {
                both(&mount, &shown.path(), script);
            }
            let stats = shown.end();
            assert_eq!(stats["failed"], 0, "{stats}");
            assert_eq!(stats["failed_reads"], 0, "{stats}");
            if args == PASSED {
                assert!(stats["opens"]["copy"].as_u64() > Some(50), "{stats}");
            } else {
                assert_eq!(stats["opens"]["copy"], json!(null), "{stats}");
                assert!(stats["cache_bytes"].as_u64() >= Some(3_000_001), "{stats}");
            }
        }
    });
}

#[test]
fn other_programs_read_the_same_bytes() {
    let rig = rig(|source| {
        let script = "sqlite3 base.db 'create table t(a,b); insert into t values(1,hex(randomblob(99999))),(2,7)' && \
            git init -q repo && cd repo && cp ../base.db . && git add . && \
            git -c user.name=x -c user.email=x@x commit -qm x && git gc -q && cd .. && \
            ffmpeg -v error -f lavfi -i testsrc2=size=320x240:rate=25:duration=1 -pix_fmt yuv420p a.y4m && \
            ffmpeg -v error -f lavfi -i testsrc=size=320x240:rate=25:duration=1 -pix_fmt yuv420p b.y4m && \
            ffmpeg -v error -i a.y4m -c:v mpeg4 -bitexact c.mp4";
        let made = shell(source, script);
        assert!(made.status.success(), "{}", stderr(&made));
    });
    let mount = rig.mountpoint();
    for name in ["base.db", "a.y4m", "b.y4m", "c.mp4"] {
        rig.cache_whole(Path::new(name)).unwrap();
    }
    for args in [PASSED, RANGES] {
        let shown = Reexport::start(&mount, args);
        for script in [
            "sqlite3 'file:base.db?immutable=1' 'select a,length(b) from t; pragma integrity_check;'",
            "sqlite3 -readonly base.db 'select a,length(b) from t'",
            "cd repo; git fsck --strict --no-progress; git log --format=%s; git status --short; git show HEAD:base.db | md5sum",
            "rclone md5sum --config /dev/null . | grep -v '\\.git' | sort",
            "ffmpeg -v error -nostdin -i a.y4m -f md5 -; ffmpeg -v error -nostdin -ss 0.5 -i c.mp4 -f md5 -",
            "ffmpeg -nostdin -i a.y4m -i b.y4m -lavfi psnr -f null - 2>&1 | grep -o 'PSNR.*'",
            "ffprobe -v error -show_streams c.mp4 | md5sum",
        ] {
            both(&mount, &shown.path(), script);
        }
        let stats = shown.end();
        assert_eq!(stats["failed"], 0, "{stats}");
    }
}

#[test]
fn nothing_can_be_written() {
    let rig = clips();
    let mount = rig.mountpoint();
    for args in [PASSED, RANGES] {
        let shown = Reexport::start(&mount, args);
        for script in [
            "> clip",
            ">> clip",
            "> new",
            "rm clip",
            "rmdir sub",
            "mkdir new",
            "mv clip other",
            "ln clip other",
            "ln -s clip other",
            "mkfifo new",
            "chmod 600 clip",
            "touch clip",
            "touch -h b",
            "chown 1:1 clip",
            "truncate -s 0 clip",
            "python3 -c 'import os; os.setxattr(\"clip\",\"user.x\",b\"1\")' 2>&1 | tail -n 1",
            "python3 -c 'import os; os.open(\"clip\",os.O_RDONLY|os.O_TRUNC)' 2>&1 | tail -n 1",
            "python3 -c 'import os; os.open(\".\",os.O_TMPFILE|os.O_RDWR)' 2>&1 | tail -n 1",
            "test -w clip",
        ] {
            both(&mount, &shown.path(), script);
        }
        let bytes = fs::read(shown.join(CLIP)).unwrap();
        assert!(bytes == bytes_of(CLIP));
    }
}

#[test]
fn processes_read_and_map_at_random() {
    let rig = clips();
    let mount = rig.mountpoint();
    let script = "import hashlib,mmap,os,random,sys
def line(o): return b'%04x%011x\\n'%(SEED,o)
def good(b,o):
    s=o-o%16; n=-(-(o+len(b)-s)//16)
    return b==b''.join(line(s+16*i) for i in range(n))[o-s:o-s+len(b)]
name,SEED,size,rounds=sys.argv[1],int(sys.argv[2]),int(sys.argv[3]),int(sys.argv[4])
kids=[]
for k in range(6):
    kids.append(os.fork())
    if kids[-1]: continue
    r=random.Random(k); bad=0
    for i in range(rounds):
        f=os.open(name,os.O_RDONLY|(os.O_DIRECT if r.random()<.1 else 0))
        bad|=os.fstat(f).st_size!=size
        for j in range(5):
            o=r.randrange(size); n=r.randrange(1,200000)
            b=os.pread(f,n,o); bad|=2*(len(b)!=min(n,size-o))|4*(not good(b,o))
        if r.random()<.5:
            m=mmap.mmap(f,0,prot=mmap.PROT_READ,flags=r.choice([mmap.MAP_SHARED,mmap.MAP_PRIVATE]))
            o=r.randrange(size); b=m[o:o+100000]; bad|=8*(not good(b,o)); m.close()
        if r.random()<.2:
            t=os.memfd_create('t'); o=r.randrange(size); n=os.sendfile(t,f,o,100000)
            bad|=16*(not good(os.pread(t,n,0),o)); os.close(t)
        p,q=os.pipe(); o=r.randrange(size); n=os.splice(f,q,60000,offset_src=o)
        bad|=32*(not good(os.read(p,n),o)); os.close(p); os.close(q)
        os.close(f)
    os._exit(bad)
bad=0
for k in kids: bad|=os.waitstatus_to_exitcode(os.waitpid(k,0)[1])
print('bad',bad)";
    for args in [PASSED, RANGES] {
        let shown = Reexport::start(&mount, args);
        for (name, seed) in [(CLIP, 1), (PARTIAL, 9)] {
            let size = bytes_of(name).len();
            let mut python = Command::new("python3");
            python.args([
                "-c",
                script,
                name,
                &seed.to_string(),
                &size.to_string(),
                "20",
            ]);
            let output = python.current_dir(shown.path()).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert_eq!(text.trim(), "bad 0", "{args:?} {name}: {}", stderr(&output));
        }
        let stats = shown.end();
        assert_eq!(stats["failed_reads"], 0, "{stats}");
    }
}

#[test]
fn a_hundred_clips_are_open_at_once() {
    let names: Vec<String> = (0..100).map(|n| format!("clips/{n}")).collect();
    let rig = rig(|source| {
        for (n, name) in names.iter().enumerate() {
            put(source, name, &content(n as u32, 20_000 + n));
        }
    });
    for name in &names {
        fs::read(rig.mountpoint().join(name)).unwrap();
    }
    rig.cache_whole(Path::new(&names[99])).unwrap();
    for (args, way) in [(PASSED, "copy"), (RANGES, "ranges")] {
        let shown = Reexport::start(&rig.mountpoint(), args);
        let open = |name| fs::File::open(shown.join(name)).unwrap();
        let files: Vec<_> = names.iter().map(|name| (name, open(name))).collect();
        assert_eq!(shown.opens(way), 100, "{}", shown.stats());
        for (n, (name, file)) in files.iter().enumerate().rev() {
            let bytes = fuse_range(&shown.join(name), 0, 30_000);
            assert!(bytes == content(n as u32, 20_000 + n));
            assert_eq!(file.metadata().unwrap().len(), 20_000 + n as u64);
        }
    }
}

#[test]
fn pages_are_kept_over_opens() {
    each_place(&[(CLIP, 2 * MIB)], &[], |rig, kind| {
        let bytes = content(1, 2 * MIB);
        let shown = Reexport::start(&rig.mountpoint(), RANGES);
        for _ in 0..5 {
            assert!(fs::read(shown.join(CLIP)).unwrap() == bytes);
        }
        let stats = shown.stats();
        assert_eq!(stats["opens"]["ranges"], 5);
        assert_eq!(stats["cache_bytes"], bytes.len(), "read once: {stats}");
        assert_eq!(stats["fuse_bytes"], 0, "{stats}");
        drop(shown);
        // Where there are reflinks they are what the kernel reads, by default.
        let shown = Reexport::start(&rig.mountpoint(), &[]);
        assert!(fs::read(shown.join(CLIP)).unwrap() == bytes);
        let is_reflink = kind.name() == "reflink";
        assert_eq!(shown.opens("reflink"), u64::from(is_reflink));
        assert_eq!(shown.mounted["passthrough"], is_reflink);
        let reason = if is_reflink {
            json!(null)
        } else {
            json!("unsupported")
        };
        assert_eq!(shown.mounted["reason"], reason, "{}", shown.mounted);
    });
}

#[test]
fn the_kill_switch_leaves_all_to_fuse() {
    let rig = clips();
    let shown = Reexport::start_by(&rig.mountpoint(), RANGES, |command| {
        command.env("VMAFX_EBPF_BYPASS", "0");
    });
    assert_eq!(shown.mounted["reason"], "disabled");
    assert_eq!(shown.mounted["detail"], "VMAFX_EBPF_BYPASS=0");
    for (name, _) in WHOLE {
        assert!(fs::read(shown.join(name)).unwrap() == bytes_of(name));
    }
    let stats = shown.end();
    assert_eq!(stats["cache_bytes"], 0, "{stats}");
    let bytes: usize = WHOLE.iter().map(|(_, size)| size).sum();
    assert_eq!(
        stats["fuse_by_reason"],
        json!({"disabled": bytes}),
        "{stats}"
    );
}

#[test]
fn a_writable_source_is_read_without_pages() {
    each_remote(3 * MIB, &[], |rig, _, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let mount = rig.mountpoint();
        let shown = Reexport::start(&mount, PASSED);
        assert_eq!(shown.mounted["reason"], "unsupported", "{}", shown.mounted);
        let held = fs::File::open(shown.join(CLIP)).unwrap();
        assert!(fs::read(shown.join(CLIP)).unwrap() == bytes);
        // What somebody writes is there at once, also for who has it open.
        let script = "printf 'changed' | dd of=clip bs=1 seek=1000 conv=notrunc status=none";
        assert!(shell(&mount, script).status.success());
        let mut now = bytes.to_vec();
        now[1000..1007].copy_from_slice(b"changed");
        assert!(fs::read(shown.join(CLIP)).unwrap() == now);
        let mut part = [0; 7];
        std::os::unix::fs::FileExt::read_exact_at(&held, &mut part, 1000).unwrap();
        assert_eq!(&part, b"changed");
        let stats = shown.end();
        assert_eq!(stats["opens"], json!({"direct": 3}), "{stats}");
    });
}

#[test]
fn who_may_not_read_may_not_read_here() {
    let rig = rig_with(
        RigOptions {
            mount_arguments: vec![
                "--allow-other".into(),
                "--file-perms=0640".into(),
                "--dir-perms=0755".into(),
                "--umask=0".into(),
            ],
            ..RigOptions::default()
        },
        |source| put(source, CLIP, &content(1, 5000)),
    );
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let nobody = |folder: &Path, script: &str| {
        let mut setpriv = Command::new("setpriv");
        setpriv.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "bash",
            "-c",
            script,
        ]);
        // The folder above is for its owner alone.
        let opened = Command::new("chmod")
            .arg("755")
            .arg(folder.parent().unwrap())
            .status();
        assert!(opened.unwrap().success());
        let output = setpriv.current_dir("/").env("D", folder).output().unwrap();
        stderr(&output) + &String::from_utf8_lossy(&output.stdout)
    };
    let closed = Reexport::start(&rig.mountpoint(), PASSED);
    assert!(nobody(&closed.path(), "ls $D").contains("Permission denied"));
    let open = Reexport::start(&rig.mountpoint(), &["--snapshot=copy", "--allow-other"]);
    assert_eq!(nobody(&open.path(), "ls $D"), "clip\n");
    assert!(nobody(&open.path(), "cat $D/clip").contains("Permission denied"));
    assert_eq!(nobody(&open.path(), "stat -c %s,%a $D/clip"), "5000,640\n");
    fs::read(open.join(CLIP)).unwrap();
    assert_eq!(open.opens("copy"), 1);
}
