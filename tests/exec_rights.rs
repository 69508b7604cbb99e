//! `exec` gives nobody what they might not open themselves: other credentials,
//! sandboxes, and what it does itself without privileges.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::exec::*;

/// Landlock: may read below /usr, /lib, /etc and /proc, and nothing else.
const LANDLOCK: &str = "def restrict(nnp=True):\n\
    \x20a=ctypes.c_uint64(1<<2)\n\
    \x20rs=sys_(444,ctypes.byref(a),8,0)\n\
    \x20class B(ctypes.Structure): _pack_=1; _fields_=[('a',ctypes.c_uint64),('fd',ctypes.c_int)]\n\
    \x20for d in ('/usr','/lib','/etc','/proc'):\n\
    \x20 b=B(1<<2,os.open(d,os.O_PATH)); sys_(445,rs,1,ctypes.byref(b),0)\n\
    \x20if nnp: assert libc.prctl(38,1,0,0,0)==0\n\
    \x20sys_(446,rs,0)\n\
    def show(n):\n\
    \x20try: print(n,len(open(n,'rb').read()),flush=True)\n\
    \x20except OSError as e: print(n,e,flush=True)\n";

fn landlock_is_there() {
    let lsm = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    let probe = python("print(sys_(444,None,0,1))");
    let output = plainly(std::path::Path::new("/"), &probe);
    assert!(
        output.status.success(),
        "this test needs landlock; lsm: {lsm}"
    );
}

#[test]
fn who_has_other_credentials_is_left_alone() {
    let rig = clips();
    let mount = rig.mountpoint();
    // Only root may use the mount: the same errors as without.
    let user = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    let done = both(
        &mount,
        &format!("{user} cat clip || echo $?; cat b | md5sum"),
    );
    assert!(done.text().starts_with("1\n"), "{}", done.text());
    assert_eq!(done.substituted(), 1, "{}", done.report);
    for change in [
        "--bounding-set=-sys_nice --inh-caps=-sys_nice",
        "--groups 5",
        "--regid 7 --clear-groups",
    ] {
        let done = both(&mount, &format!("setpriv {change} md5sum clip"));
        assert_eq!(
            (done.reason("credentials"), done.substituted()),
            (1, 0),
            "{change}"
        );
    }
    let done = both(&mount, "unshare --user --map-root-user md5sum clip");
    assert_eq!(
        (done.reason("credentials"), done.substituted()),
        (1, 0),
        "{}",
        done.report
    );
}

#[test]
fn who_is_under_landlock_gets_its_error() {
    landlock_is_there();
    let rig = clips();
    let script = format!(
        "{LANDLOCK}show('b'); restrict(); show('b')\n\
        if os.fork()==0: show('clip'); os._exit(0)\n\
        os.wait()"
    );
    let done = both_python(&rig.mountpoint(), &script);
    assert_eq!(
        (done.reason("sandboxed"), done.substituted()),
        (2, 1),
        "{}",
        done.report
    );
    assert!(done.text().contains("Permission denied"), "{}", done.text());
}

#[test]
fn landlock_without_no_new_privs_is_remembered() {
    landlock_is_there();
    let rig = clips();
    // Root may, and nothing shows it; nor in a grandchild whose parent is gone.
    let script = format!(
        "{LANDLOCK}r,w=os.pipe()\n\
        old=os.fork()\n\
        if old==0: os.read(r,1); show('b'); os._exit(0)\n\
        time.sleep(.1)\n\
        t=threading.Thread(target=lambda:(restrict(False),show('clip')))\n\
        if os.fork()==0:\n\
        \x20t.start(); t.join()\n\
        \x20if os.fork()==0:\n\
        \x20 show('sub/deep/other'); os._exit(0)\n\
        \x20os._exit(0)\n\
        os.wait(); os.write(w,b'x'); os.wait(); time.sleep(.2)\n\
        show('b')\n\
        if os.fork()==0: show('clip'); os._exit(0)\n\
        os.wait()"
    );
    let done = run_in(&rig.mountpoint(), &[], &python(&script));
    let text = done.text();
    assert!(text.contains("clip [Errno 13]"), "{text}\n{}", done.stderr);
    // The main thread's children are not restricted; but they might be.
    let expected = "b 4096\n";
    assert_eq!(text.matches(expected).count(), 2, "{text}");
    assert!(done.reason("sandboxed") >= 3, "{}\n{text}", done.report);
    assert_eq!(
        done.substituted(),
        2,
        "who was there before: {}\n{text}",
        done.report
    );
}

#[test]
fn landlock_that_the_keeper_lets_go_on_is_remembered() {
    landlock_is_there();
    let rig = clips();
    // In the hands of the supervisor, or not, when it stops.
    for before in ["0", ".3"] {
        // A child that was started well before exec goes on.
        let script = format!(
            "{LANDLOCK}show('b')\n\
            os.kill(os.getppid(),signal.SIGSTOP); time.sleep({before}); restrict(False)\n\
            if os.fork()==0: time.sleep(1.5); show('clip'); os._exit(0)\n\
            time.sleep(.2); os.kill(os.getppid(),signal.SIGCONT); os.wait()"
        );
        let done = run_in(&rig.mountpoint(), &[], &python(&script));
        let text = done.text();
        assert!(text.contains("clip [Errno 13]"), "{text}\n{}", done.stderr);
        assert_eq!(
            (done.reason("sandboxed"), done.substituted()),
            (1, 1),
            "{}",
            done.report
        );
    }
}

/// The 32-bit interface is there for 64-bit programs, too: what restricts itself
/// by it opens by the other.
#[cfg(target_arch = "x86_64")]
#[test]
fn landlock_by_a_32_bit_call_is_remembered() {
    landlock_is_there();
    let rig = clips();
    // push rbx; mov ebx,edi; xor ecx,ecx; mov eax,446; int 0x80; pop rbx; ret
    let script = format!(
        "{LANDLOCK}m=mmap.mmap(-1,4096,prot=7)\n\
        m.write(bytes.fromhex('5389fb31c9b8be010000cd805bc3'))\n\
        at=ctypes.addressof(ctypes.c_char.from_buffer(m))\n\
        call=ctypes.CFUNCTYPE(ctypes.c_int,ctypes.c_int)(at)\n\
        other=sys_\n\
        sys_=lambda nr,rs,*a: call(rs) if nr==446 else other(nr,rs,*a)\n\
        show('b'); restrict(False); show('clip')\n\
        if os.fork()==0: show('b'); os._exit(0)\n\
        os.wait()"
    );
    let done = both_python(&rig.mountpoint(), &script);
    assert_eq!(
        (done.reason("sandboxed"), done.substituted()),
        (2, 1),
        "{}",
        done.report
    );
    assert!(done.text().contains("clip [Errno 13]"), "{}", done.text());
}

#[test]
fn who_has_filters_of_its_own_is_left_alone() {
    let rig = clips();
    // A filter that allows everything.
    let script = "class I(ctypes.Structure): _fields_=[('c',ctypes.c_uint16),('t',ctypes.c_uint8),('f',ctypes.c_uint8),('k',ctypes.c_uint32)]\n\
        class P(ctypes.Structure): _fields_=[('n',ctypes.c_uint16),('p',ctypes.POINTER(I))]\n\
        print(len(open('b','rb').read()))\n\
        i=I(6,0,0,0x7fff0000); p=P(1,ctypes.pointer(i))\n\
        assert libc.prctl(22,2,ctypes.byref(p),0,0)==0\n\
        print(len(open('clip','rb').read()))\n";
    let done = both_python(&rig.mountpoint(), script);
    assert_eq!(
        (done.reason("sandboxed"), done.substituted()),
        (1, 1),
        "{}",
        done.report
    );
    let done = both(
        &rig.mountpoint(),
        "setpriv --no-new-privs md5sum clip; md5sum b",
    );
    assert_eq!(
        (done.reason("sandboxed"), done.substituted()),
        (1, 1),
        "{}",
        done.report
    );
}

#[test]
fn opens_that_cannot_be_looked_at_are_counted() {
    common::need_root();
    // Of a process that has closed its memory to who may not trace it.
    let script = python(
        "libc.prctl(4,0,0,0,0)\n\
        for i in range(7): open('/etc/hostname').close()",
    );
    let output = std::process::Command::new("setpriv")
        .args(["--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"])
        .args([env!("CARGO_BIN_EXE_vmafx-bypass"), "exec"])
        .args(["--report=json", "--"])
        .args(script)
        .output()
        .unwrap();
    let done = Done::of(&output);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(done.reason("permission"), 7, "{}", done.report);
}

#[test]
fn without_privileges_no_new_privs_is_set_and_said() {
    common::need_root();
    let output = std::process::Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(env!("CARGO_BIN_EXE_vmafx-bypass"))
        .args([
            "exec",
            "--report=json",
            "--",
            "grep",
            "NoNewPrivs",
            "/proc/self/status",
        ])
        .output()
        .unwrap();
    let done = Done::of(&output);
    assert_eq!(done.text(), "NoNewPrivs:\t1\n", "{}", done.stderr);
    assert_eq!(done.report["no_new_privs"], true);
    let done = run_in(
        std::path::Path::new("/"),
        &[],
        &["grep", "NoNewPrivs", "/proc/self/status"],
    );
    assert_eq!(done.text(), "NoNewPrivs:\t0\n");
    assert_eq!(done.report["no_new_privs"], false);
}

#[test]
fn where_seccomp_is_forbidden_the_command_runs_unassisted() {
    let rig = clips();
    // As a container's profile: seccomp(2) answers EPERM, or ENOSYS.
    for (errno, message) in [(1, "container's seccomp profile"), (38, "has no seccomp")] {
        let forbid = format!(
            "class I(ctypes.Structure): _fields_=[('c',ctypes.c_uint16),('t',ctypes.c_uint8),('f',ctypes.c_uint8),('k',ctypes.c_uint32)]\n\
             class P(ctypes.Structure): _fields_=[('n',ctypes.c_uint16),('p',ctypes.POINTER(I))]\n\
             nr=317 if os.uname().machine=='x86_64' else 277\n\
             i=(I*4)(I(0x20,0,0,0),I(0x15,0,1,nr),I(6,0,0,0x50000+{errno}),I(6,0,0,0x7fff0000)); p=P(4,i)\n\
             assert libc.prctl(22,2,ctypes.byref(p),0,0)==0\n\
             os.execv(sys.argv[1],sys.argv[1:])"
        );
        for (extra, code) in [(&[][..], 0), (&["--snapshot=require"][..], 125)] {
            let mut command = std::process::Command::new("python3");
            command
                .args(&python(&forbid)[1..])
                .arg(env!("CARGO_BIN_EXE_vmafx-bypass"));
            command
                .args(["exec", "--report=json"])
                .args(extra)
                .args(["--", "md5sum", "clip"]);
            let output = command.current_dir(rig.mountpoint()).output().unwrap();
            let text = common::stderr(&output);
            assert_eq!(output.status.code(), Some(code), "{text}");
            assert!(
                text.contains(message) || text.contains("user notification"),
                "{text}"
            );
            if code == 0 {
                let done = Done::of(&output);
                assert_eq!(done.report["opens"], 0);
                assert!(done.report["unassisted"].is_string());
                assert!(done.text().ends_with("clip\n"));
            }
        }
    }
}
