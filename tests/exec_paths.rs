//! `exec` resolves paths as the caller does: its folder, descriptors, root and
//! mounts; and where it could not, the open goes through FUSE.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::os::unix::fs::symlink;

use common::exec::*;

#[test]
fn relative_paths_and_symlinks_lead_to_clips() {
    let rig = clips();
    let mount = rig.mountpoint();
    let outside = tempfile::tempdir().unwrap();
    symlink(mount.join("clip"), outside.path().join("absolute")).unwrap();
    symlink(&mount, outside.path().join("folder")).unwrap();
    symlink("folder/sub/../b", outside.path().join("relative")).unwrap();
    symlink("loop", outside.path().join("loop")).unwrap();
    for (expected, script) in [
        (1, "md5sum absolute"),
        (1, "md5sum relative"),
        (1, "md5sum ./folder/sub/deep/../deep/other"),
        (1, "cd folder/sub && md5sum ../clip"),
        (
            1,
            "cd folder/sub && md5sum ../../$(basename $PWD)/clip || md5sum ./deep/other",
        ),
        (
            0,
            "md5sum loop; md5sum folder/nothing; md5sum folder/clip/; cat folder/sub",
        ),
        (0, "cat ''; cat \"$(printf 'x%.0s' {1..5000})\" 2>/dev/null"),
    ] {
        let done = both(outside.path(), script);
        assert_eq!(done.substituted(), expected, "{script}: {}", done.report);
    }
    let script = format!(
        "cd {} && cat ../../../../../../../../../etc/hostname ../../../../../../..{}/b",
        mount.display(),
        mount.display()
    );
    assert_eq!(both(outside.path(), &script).substituted(), 1);
}

#[test]
fn folders_by_descriptor_and_openat2_are_honoured() {
    let rig = clips();
    let mount = rig.mountpoint();
    let outside = tempfile::tempdir().unwrap();
    symlink(mount.join("b"), outside.path().join("link")).unwrap();
    let script = format!(
        "m=os.open({mount:?},os.O_RDONLY|os.O_DIRECTORY); o=os.open({outside:?},os.O_PATH)\n\
         def show(what,call):\n\
         \x20try:\n\
         \x20 fd=call(); print(what,hashlib.md5(os.pread(fd,1<<24,0)).hexdigest()); os.close(fd)\n\
         \x20except OSError as e: print(what,e)\n\
         show('at',lambda:os.open('sub/deep/other',0,dir_fd=m))\n\
         show('up',lambda:os.open('sub/../clip',0,dir_fd=m))\n\
         show('link',lambda:os.open('link',0,dir_fd=o))\n\
         show('nofollow',lambda:os.open('link',os.O_NOFOLLOW,dir_fd=o))\n\
         show('bad',lambda:os.open('b',0,dir_fd=999))\n\
         show('ignored',lambda:os.open({mount:?}+'/b',0,dir_fd=999))\n\
         def open2(fd,path,flags=0,mode=0,resolve=0,size=24):\n\
         \x20how=(ctypes.c_uint64*4)(flags,mode,resolve,0)\n\
         \x20return sys_(437,fd,path,ctypes.byref(how),size)\n\
         for r in (0,1,2,4,8,16,32,64):\n\
         \x20for fd,p in ((m,b'sub/../b'),(o,b'link'),(m,b'/b'),(m,b'../../b'),(-100,{mount:?}.encode()+b'/clip')):\n\
         \x20 show(('open2',r,p[-9:]),lambda:open2(fd,p,0,0,r))\n\
         show('cloexec',lambda:open2(m,b'b',os.O_CLOEXEC))\n\
         show('mode',lambda:open2(m,b'b',0,0o600))\n\
         show('flags',lambda:open2(m,b'b',1<<40))\n\
         show('long',lambda:open2(m,b'b',0,0,0,32))\n\
         show('short',lambda:open2(m,b'b',0,0,0,16))\n\
         show('write',lambda:open2(m,b'b',os.O_RDWR))\n\
         show('fault',lambda:sys_(437,m,b'b',8,24))\n\
         show('null',lambda:sys_(257 if os.uname().machine=='x86_64' else 56,m,None,0,0))\n",
        mount = mount.to_str().unwrap(),
        outside = outside.path().to_str().unwrap()
    );
    let done = both_python(outside.path(), &script);
    assert!(done.substituted() >= 12, "{}\n{}", done.report, done.text());
}

#[test]
fn magic_links_go_their_own_way() {
    let rig = clips();
    let done = both(
        &rig.mountpoint(),
        "exec 7<b; md5sum /proc/self/fd/7 /dev/fd/7 < clip; md5sum /dev/stdin < clip; cat /proc/self/cwd/b | md5sum",
    );
    // The redirections themselves are opens as any other.
    assert_eq!(done.substituted(), 3, "{}", done.report);
}

#[test]
fn a_chroot_has_its_own_root() {
    let rig = clips();
    let root = tempfile::tempdir().unwrap();
    let script = format!(
        "set -e; cd {root}; mkdir -p bin media etc; cp /bin/busybox bin/; echo inside > etc/hostname\n\
         ln -s /media/clip absolute; ln -s /etc/hostname name; ln -s {mount}/clip dangling\n\
         mount --bind {mount} media; trap 'umount -l {root}/media' EXIT\n\
         chroot . /bin/busybox sh -c '/bin/busybox md5sum /media/clip /absolute ../../media/b; \
            cd /media/sub; /bin/busybox md5sum ../clip; /bin/busybox cat /name /dangling 2>&1; exit 3'",
        root = root.path().display(),
        mount = rig.mountpoint().display()
    );
    let clean = || {
        for name in ["absolute", "name", "dangling"] {
            let _ = std::fs::remove_file(root.path().join(name));
        }
    };
    let plain = plainly(root.path(), &["bash", "-c", &script]);
    clean();
    let done = run_in(root.path(), &[], &["bash", "-c", &script]);
    assert_eq!(
        done.text(),
        String::from_utf8_lossy(&plain.stdout),
        "{}",
        done.stderr
    );
    assert!(done.text().contains("inside"), "{}", done.text());
    assert_eq!(
        (done.code, plain.status.code()),
        (Some(3), Some(3)),
        "{}",
        done.stderr
    );
    // By `..` a path leaves its folder, and only the kernel knows the root there.
    assert_eq!(done.substituted(), 2, "{}", done.report);
}

#[test]
fn another_mount_namespace_has_its_own_mounts() {
    let rig = clips();
    let other = tempfile::tempdir().unwrap();
    let script = format!(
        "mount --bind {mount} {other} && md5sum {other}/clip && mount -t tmpfs none {mount} && \
         echo tmpfs > {mount}/b && cat {mount}/b && cd {other}/sub && md5sum ../b deep/other",
        mount = rig.mountpoint().display(),
        other = other.path().display()
    );
    let command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "bash",
        "-c",
        &script,
    ];
    let plain = plainly(other.path(), &command);
    let done = run_in(other.path(), &[], &command);
    assert_eq!(
        done.text(),
        String::from_utf8_lossy(&plain.stdout),
        "{}",
        done.stderr
    );
    assert!(done.text().contains("tmpfs\n"));
    // Not `../b`, as in a chroot.
    assert_eq!(done.substituted(), 2, "{}", done.report);
}

#[test]
fn another_pid_namespace_makes_no_difference() {
    let rig = clips();
    let command = [
        "unshare",
        "--pid",
        "--fork",
        "--mount-proc",
        "md5sum",
        "clip",
        "b",
    ];
    let done = run_in(&rig.mountpoint(), &[], &command);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(done.substituted(), 2, "{}", done.report);
}

#[test]
fn prefixes_limit_what_is_watched() {
    let rig = clips();
    let mount = rig.mountpoint();
    let sub = mount.join("sub");
    let options = ["--prefix", sub.to_str().unwrap()];
    let done = run_in(&mount, &options, &["md5sum", "clip", "b", "sub/deep/other"]);
    assert_eq!(done.substituted(), 1, "{}", done.report);
    let done = run_in(&mount, &["--prefix", "."], &["md5sum", "clip", "b"]);
    assert_eq!(done.substituted(), 2, "{}", done.report);
    for bad in ["/", "/no/such/folder"] {
        let output = exec(&["--prefix", bad])
            .args(["--", "true"])
            .output()
            .unwrap();
        common::assert_fails(&output, 125, &format!("`{bad}`"));
    }
}

#[test]
fn a_mount_that_comes_later_is_watched() {
    let mut rig = clips();
    rig.unmount();
    let mount = rig.mountpoint();
    let child = exec(&[])
        .args(["--", "sh", "-c"])
        .arg("until [ -e clip ]; do sleep 0.1; cd /; cd \"$0\"; done; sleep 1; md5sum clip b")
        .arg(&mount)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .current_dir(&mount)
        .spawn()
        .unwrap();
    rig.mount().unwrap();
    let done = Done::of(&child.wait_with_output().unwrap());
    assert_eq!(
        (done.code, done.substituted()),
        (Some(0), 2),
        "{}",
        done.report
    );
}

#[test]
fn threads_that_race_for_the_path_get_one_of_its_files() {
    let rig = clips();
    let local = tempfile::tempdir().unwrap();
    // Names of one length: a clip of the mount, another, a local file.
    let mount = rig.mountpoint();
    symlink(mount.join("clip"), local.path().join("aaaa")).unwrap();
    symlink(mount.join("b"), local.path().join("bbbb")).unwrap();
    std::fs::write(local.path().join("cccc"), "a local file").unwrap();
    let script = "nr=257 if os.uname().machine=='x86_64' else 56\n\
        sys.setswitchinterval(1e-5)\n\
        names=(b'aaaa',b'bbbb',b'cccc')\n\
        want={open(n,'rb').read(12) for n in names}\n\
        size={len(open(n,'rb').read()) for n in names}\n\
        assert len(size)==3\n\
        path=ctypes.create_string_buffer(b'aaaa')\n\
        stop=False\n\
        def flip():\n\
        \x20i=0\n\
        \x20while not stop: path.raw=names[i%3]+b'\\0'; i+=1\n\
        ts=[threading.Thread(target=flip) for _ in range(1)]\n\
        [t.start() for t in ts]\n\
        torn=0\n\
        for i in range(1500):\n\
        \x20fd=libc.syscall(nr,-100,path,0,0)\n\
        \x20if fd<0: torn+=1; continue\n\
        \x20assert os.pread(fd,12,0) in want and os.fstat(fd).st_size in size\n\
        \x20os.close(fd)\n\
        stop=True\n\
        [t.join() for t in ts]\n\
        print('torn' if torn>700 else 'well')\n";
    let done = run_in(local.path(), &[], &python(script));
    assert_eq!(done.text(), "well\n", "{}", done.stderr);
    assert!(done.substituted() > 100, "{}", done.report);
}

#[test]
fn paths_are_read_page_by_page() {
    let rig = clips();
    let script = "libc.mmap.restype=ctypes.c_void_p\n\
        nr=257 if os.uname().machine=='x86_64' else 56\n\
        page=libc.mmap(None,ctypes.c_size_t(3*4096),3,0x22,-1,0)\n\
        libc.munmap(ctypes.c_void_p(page+2*4096),ctypes.c_size_t(4096))\n\
        def at(offset,text):\n\
        \x20ctypes.memmove(page+offset,text,len(text))\n\
        \x20try:\n\
        \x20 fd=sys_(nr,-100,ctypes.c_void_p(page+offset),0,0); print(len(os.pread(fd,1<<23,0))); os.close(fd)\n\
        \x20except OSError as e: print(e)\n\
        at(4095,b'clip\\0'); at(8190,b'b\\0'); at(8188,b'clip')\n\
        long=b'./'*2000+b'b\\0'; at(8192-len(long),long); at(100,long)\n\
        long=b'./'*2200+b'b\\0'; at(0,long)\n\
        try: sys_(nr,-100,ctypes.c_void_p(page+2*4096),0,0)\n\
        except OSError as e: print(e)\n";
    let done = both_python(&rig.mountpoint(), script);
    assert_eq!(done.substituted(), 4, "{}\n{}", done.report, done.text());
}
