//! `exec` and the life of a command: exit codes, signals, terminals, and what
//! happens when either of the two is killed.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::exec::*;
use common::{assert_fails, eventually, program, stderr};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap();
}

/// A real-time signal.
fn send_number(pid: u32, number: i32) {
    let sent = Command::new("kill")
        .args([format!("-{number}"), pid.to_string()])
        .status();
    assert!(sent.unwrap().success());
}

/// A command under `exec` with pipes, in a folder.
fn start(folder: &Path, command: &[&str]) -> Child {
    exec(&[])
        .arg("--")
        .args(command)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn line(child: &mut Child) -> String {
    let mut text = String::new();
    let mut byte = [0];
    let stdout = child.stdout.as_mut().unwrap();
    while stdout.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        text.push(byte[0] as char);
    }
    text
}

/// The supervisor's children by name.
fn child_called(supervisor: u32, name: &str) -> u32 {
    let mut found = 0;
    eventually(name, || {
        let is = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|comm| comm.trim_end() == name)
        };
        found = children(supervisor).into_iter().find(is).unwrap_or(0);
        found != 0
    });
    found
}

#[test]
fn exit_codes_are_the_command_s() {
    common::need_root();
    let root = Path::new("/");
    for code in [0, 1, 7, 125, 255] {
        let done = run_in(root, &[], &["sh", "-c", &format!("exit {code}")]);
        assert_eq!(done.code, Some(code));
    }
    for signal in [
        Signal::SIGTERM,
        Signal::SIGKILL,
        Signal::SIGSEGV,
        Signal::SIGINT,
        Signal::SIGUSR1,
        Signal::SIGPIPE,
        Signal::SIGALRM,
    ] {
        let done = run_in(
            root,
            &[],
            &["sh", "-c", &format!("kill -{} $$", signal as i32)],
        );
        assert_eq!(done.signal, Some(signal as i32), "{}", done.stderr);
    }
    for signal in [34, 64] {
        let done = run_in(root, &[], &["bash", "-c", &format!("kill -{signal} $$")]);
        assert_eq!(done.signal, Some(signal), "{}", done.stderr);
    }
    let run = |command: &[&str]| exec(&[]).arg("--").args(command).output().unwrap();
    assert_fails(
        &run(&["/no/such/program"]),
        127,
        "`/no/such/program` was not found",
    );
    assert_fails(
        &run(&["no-such-program"]),
        127,
        "`no-such-program` was not found",
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    assert_fails(&run(&[path]), 126, "cannot be executed");
    assert_fails(&run(&["/"]), 126, "`/` cannot be executed");
    assert_eq!(
        program().arg("exec").output().unwrap().status.code(),
        Some(2)
    );
}

#[test]
fn the_kill_switch_runs_the_command_plainly_and_says_so() {
    let rig = clips();
    let output = exec(&[])
        .env("VMAFX_EBPF_BYPASS", "0")
        .args(["--", "sh", "-c", "md5sum clip; exit 5"])
        .current_dir(rig.mountpoint())
        .output()
        .unwrap();
    let done = Done::of(&output);
    assert_eq!(
        (done.code, done.report["opens"].as_u64()),
        (Some(5), Some(0))
    );
    assert!(
        done.stderr.contains("unassisted: VMAFX_EBPF_BYPASS=0"),
        "{}",
        done.stderr
    );
    assert_eq!(done.report["unassisted"], "VMAFX_EBPF_BYPASS=0");
}

#[test]
fn a_nested_exec_says_so_and_is_served_by_the_outer_one() {
    let rig = clips();
    let inner = [
        env!("CARGO_BIN_EXE_vmafx-bypass"),
        "exec",
        "--",
        "md5sum",
        "clip",
    ];
    let done = run_in(&rig.mountpoint(), &[], &inner);
    assert_eq!(
        (done.code, done.substituted()),
        (Some(0), 1),
        "{}",
        done.stderr
    );
    assert!(
        done.stderr.contains("another supervisor already answers"),
        "{}",
        done.stderr
    );
}

#[test]
fn the_command_starts_as_it_would_without() {
    common::need_root();
    // Signals, descriptors, limits, environment, folder and process group.
    let look = "grep -E '^(Sig(Blk|Ign|Cgt)|ShdPnd)' /proc/self/status; ls -l /proc/self/fd | wc -l; \
        ulimit -a; env | grep -v -e ^_= -e SHLVL | sort; pwd; umask; nice";
    let python = "import signal,os,sys\n\
        for s in sys.argv[2].split(','):\n\
        \x20if s: signal.signal(int(s),signal.SIG_IGN)\n\
        signal.signal(signal.SIGPIPE,signal.SIG_IGN if '13' in sys.argv[2].split(',') else signal.SIG_DFL)\n\
        signal.pthread_sigmask(signal.SIG_SETMASK,[int(s) for s in sys.argv[3].split(',') if s])\n\
        os.execv(sys.argv[4],sys.argv[4:]) if sys.argv[1]=='exec' else os.execvp(sys.argv[7],sys.argv[7:])";
    for (ignored, blocked) in [
        ("", ""),
        ("13", ""),
        ("1,2,3,15", ""),
        ("17", ""),
        ("", "2,15,10,17,34"),
        ("13,20", "13,20,28"),
    ] {
        let run = |way: &str| {
            let output = Command::new("python3")
                .args(["-c", python, way, ignored, blocked])
                .arg(env!("CARGO_BIN_EXE_vmafx-bypass"))
                .args(["exec", "--", "sh", "-c", look])
                .env_remove("VMAFX_EBPF_BYPASS")
                .stdin(Stdio::null())
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(
            run("exec"),
            run("plain"),
            "ignored {ignored}, blocked {blocked}"
        );
    }
}

#[test]
fn what_is_closed_stays_closed() {
    common::need_root();
    for closed in ["0<&-", "1>&-", "2>&-", "0<&- 2>&-", ""] {
        let run = |way: &str| {
            let out = tempfile::NamedTempFile::new().unwrap();
            let script = format!(
                "exec 9>{}; {way} bash -c 'for n in 0 1 2; do [ -e /proc/$$/fd/$n ] && echo $n >&9; done' {closed}",
                out.path().display()
            );
            let status = Command::new("bash").args(["-c", &script]).status();
            assert!(status.is_ok());
            fs::read_to_string(out.path()).unwrap()
        };
        let way = format!("{} exec --", env!("CARGO_BIN_EXE_vmafx-bypass"));
        assert_eq!(run(&way), run(""), "{closed}");
    }
}

#[test]
fn signals_to_exec_reach_the_command() {
    common::need_root();
    // Not by pause(2): before which a signal may come that Python has noted and not
    // yet handled.
    let script = "import signal,time\n\
        for s in (1,2,3,10,12,15,20,28,34,64): signal.signal(s,lambda n,f:print(n,flush=True))\n\
        print('ready',flush=True)\n\
        while True: time.sleep(0.05)";
    let mut child = start(Path::new("/"), &["python3", "-c", script]);
    assert_eq!(line(&mut child), "ready");
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGTERM,
        Signal::SIGWINCH,
    ] {
        send(child.id(), signal);
        assert_eq!(line(&mut child), (signal as i32).to_string());
    }
    for number in [34, 64] {
        send_number(child.id(), number);
        assert_eq!(line(&mut child), number.to_string());
    }
    // It may be stopped together with its command, and go on with it.
    send(child.id(), Signal::SIGTSTP);
    assert_eq!(line(&mut child), "20");
    // Else the stop below would be taken for the answer to that one, and undone;
    // of two signals that wait, the lower number comes first.
    send(child.id(), Signal::SIGCONT);
    send(child.id(), Signal::SIGWINCH);
    assert_eq!(line(&mut child), "28");
    let command = child_called(child.id(), "python3");
    let state = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.split(' ').nth(2).unwrap().to_owned()
    };
    send(command, Signal::SIGSTOP);
    send(child.id(), Signal::SIGSTOP);
    eventually("a stop", || state(command) == "T");
    send(child.id(), Signal::SIGCONT);
    eventually("going on", || state(command) == "S");
    // One that comes to the command alone leaves exec running.
    send(command, Signal::SIGSTOP);
    eventually("a stop", || state(command) == "T");
    std::thread::sleep(Duration::from_millis(100));
    assert_ne!(state(child.id()), "T");
    send(command, Signal::SIGCONT);
    send(command, Signal::SIGKILL);
    let done = Done::of(&child.wait_with_output().unwrap());
    assert_eq!(done.signal, Some(9));
}

#[test]
fn a_killed_supervisor_leaves_the_command_its_mount() {
    let rig = clips();
    let script = "import hashlib,sys\n\
        def show(): print(hashlib.md5(open('clip','rb').read()).hexdigest(),flush=True)\n\
        show()\n\
        for l in sys.stdin: show()\n\
        print('end',flush=True)";
    let mut child = start(&rig.mountpoint(), &["python3", "-c", script]);
    let first = line(&mut child);
    let keeper = child_called(child.id(), "vmafx-keeper");
    let command = child_called(child.id(), "python3");
    let mut stdin = child.stdin.take().unwrap();
    send(child.id(), Signal::SIGKILL);
    child.wait().unwrap();
    for _ in 0..20 {
        stdin.write_all(b"\n").unwrap();
        assert_eq!(line(&mut child), first);
    }
    assert!(fs::metadata(format!("/proc/{keeper}")).is_ok());
    drop(stdin);
    assert_eq!(line(&mut child), "end");
    eventually("the command's end", || {
        fs::metadata(format!("/proc/{command}")).is_err()
    });
    gone(keeper);
}

/// Waits until a process is gone, or waits for a parent that does not look.
fn gone(pid: u32) {
    eventually("the keeper's end", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z")
    });
}

#[test]
fn an_open_that_the_supervisor_had_in_hand_goes_on_when_it_is_killed() {
    let rig = clips();
    let daemon = rig.daemon().unwrap();
    let clip = rig.mountpoint().join("clip");
    // Not in a folder on the mount: the shell itself would wait for it.
    let script = format!("read x; exec md5sum {}", clip.display());
    let mut child = start(Path::new("/"), &["sh", "-c", &script]);
    let command = child_called(child.id(), "sh");
    // Its snapshot waits for a daemon that does not answer.
    send(daemon, Signal::SIGSTOP);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"\n").unwrap();
    let is_waiting = || {
        let wchan = fs::read_to_string(format!("/proc/{command}/wchan")).unwrap_or_default();
        let comm = fs::read_to_string(format!("/proc/{command}/comm")).unwrap_or_default();
        wchan.starts_with("seccomp_do_user") && comm == "md5sum\n"
    };
    eventually("its open", || {
        let before = is_waiting();
        std::thread::sleep(Duration::from_millis(200));
        before && is_waiting()
    });
    send(child.id(), Signal::SIGKILL);
    std::thread::sleep(Duration::from_millis(300));
    send(daemon, Signal::SIGCONT);
    let mut text = String::new();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_to_string(&mut text).unwrap();
    assert!(text.ends_with("/clip\n"), "{text:?}");
    child.wait().unwrap();
}

#[test]
fn an_open_that_waits_holds_up_nobody_else_and_can_be_killed() {
    let rig = clips();
    let daemon = rig.daemon().unwrap();
    let script = format!(
        "read x; for i in 1 2 3 4 5 6; do md5sum {0}/clip > /dev/null & last=$!; done; sleep 0.5\n\
         for i in 1 2 3 4 5; do cat /etc/hostname; done > /dev/null; echo others\n\
         kill -9 $last; wait $last; echo $?; read x; wait; md5sum < {0}/b",
        rig.mountpoint().display()
    );
    let mut child = start(Path::new("/"), &["bash", "-c", &script]);
    send(daemon, Signal::SIGSTOP);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"\n").unwrap();
    assert_eq!(line(&mut child), "others");
    assert_eq!(line(&mut child), "137");
    send(daemon, Signal::SIGCONT);
    stdin.write_all(b"\n").unwrap();
    let done = Done::of(&child.wait_with_output().unwrap());
    assert!(done.text().ends_with("  -\n"), "{}", done.text());
    assert!(done.substituted() >= 5, "{}", done.report);
}

#[test]
fn signals_during_opens_change_nothing() {
    let rig = clips();
    let script = "n=0\n\
        def tick(*a):\n\
        \x20global n; n+=1\n\
        signal.signal(signal.SIGALRM,tick); signal.setitimer(signal.ITIMER_REAL,.0003,.0003)\n\
        want={f:hashlib.md5(open(f,'rb').read()).digest() for f in ('clip','b')}\n\
        end=time.time()+2\n\
        while time.time()<end:\n\
        \x20for f in want: assert hashlib.md5(open(f,'rb').read()).digest()==want[f]\n\
        signal.setitimer(signal.ITIMER_REAL,0)\n\
        print(n>100,len(os.listdir('/proc/self/fd')))";
    let done = both_python(&rig.mountpoint(), script);
    assert!(done.substituted() > 10, "{}", done.report);
}

/// Python itself opens again after EINTR; C programs do not.
#[test]
fn handlers_that_restart_see_no_eintr() {
    let rig = clips();
    let script = "signal.signal(signal.SIGALRM,lambda *a:None); signal.siginterrupt(signal.SIGALRM,False)\n\
        signal.setitimer(signal.ITIMER_REAL,.0002,.0002)\n\
        failed=set()\n\
        end=time.time()+2\n\
        while time.time()<end:\n\
        \x20for f in (b'clip',b'b',b'/etc/hostname'):\n\
        \x20 fd=libc.open(f,0)\n\
        \x20 if fd<0: failed.add(ctypes.get_errno())\n\
        \x20 else: os.close(fd)\n\
        signal.setitimer(signal.ITIMER_REAL,0)\n\
        print(failed,len(os.listdir('/proc/self/fd')))";
    let done = both_python(&rig.mountpoint(), script);
    assert!(done.text().starts_with("set()"), "{}", done.text());
    assert!(done.substituted() > 10, "{}", done.report);
}

#[test]
fn killed_processes_leave_the_others_served() {
    let rig = clips();
    let script = "for i in $(seq 30); do (while :; do cat clip b > /dev/null; done) & \
        sleep 0.02; kill -9 $!; wait $! 2>/dev/null; done; md5sum clip";
    let done = run_in(&rig.mountpoint(), &[], &["bash", "-c", script]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(done.text().ends_with("  clip\n"));
    assert!(done.substituted() > 1, "{}", done.report);
}

#[test]
fn what_outlives_the_command_goes_on_through_fuse() {
    let rig = clips();
    let out = tempfile::tempdir().unwrap();
    let script = format!(
        "setsid sh -c 'sleep 0.5; md5sum clip b > {0}/t 2>&1; mv {0}/t {0}/done' > /dev/null 2>&1 < /dev/null & exit 4",
        out.path().display()
    );
    let started = std::time::Instant::now();
    let done = run_in(&rig.mountpoint(), &[], &["bash", "-c", &script]);
    assert_eq!(done.code, Some(4));
    assert!(
        started.elapsed() < Duration::from_millis(450),
        "does not wait for it, nor does who reads its output"
    );
    let file = out.path().join("done");
    eventually("the rest", || file.exists());
    let plain = plainly(&rig.mountpoint(), &["md5sum", "clip", "b"]);
    assert_eq!(fs::read(file).unwrap(), plain.stdout);
}

#[test]
fn a_stopped_supervisor_holds_nobody_up_for_long() {
    let rig = clips();
    let script =
        "for l in sys.stdin: print(hashlib.md5(open('clip','rb').read()).hexdigest(),flush=True)";
    let command = python(script);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let mut child = start(&rig.mountpoint(), &command);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"\n").unwrap();
    let first = line(&mut child);
    send(child.id(), Signal::SIGSTOP);
    for _ in 0..3 {
        stdin.write_all(b"\n").unwrap();
        assert_eq!(line(&mut child), first);
    }
    send(child.id(), Signal::SIGCONT);
    std::thread::sleep(Duration::from_millis(1200));
    for _ in 0..3 {
        stdin.write_all(b"\n").unwrap();
        assert_eq!(line(&mut child), first);
    }
    drop(stdin);
    let done = Done::of(&child.wait_with_output().unwrap());
    assert!(done.substituted() >= 3, "{}", done.report);
}

/// A shell with job control at a terminal of its own, by Python's pty. Keys wait
/// until the command sleeps: a shell that is stopped, or interrupted, between two
/// of its commands may not take notice, with or without `exec`.
const TERMINAL: &str = "import pty,os,sys,time,select,signal\n\
    pid,fd=pty.fork()\n\
    if pid==0: os.execvp('bash',['bash','--norc','--noprofile','-i'])\n\
    seen=b''\n\
    def until(text,limit=20):\n\
    \x20global seen\n\
    \x20end=time.time()+limit\n\
    \x20while text not in seen:\n\
    \x20 if time.time()>end: print('no',text,seen); sys.exit(1)\n\
    \x20 if select.select([fd],[],[],.1)[0]: seen+=os.read(fd,4096)\n\
    \x20seen=seen[seen.index(text)+len(text):]\n\
    def type(text): os.write(fd,text)\n\
    def key(text): time.sleep(.5); type(text)\n\
    type(b'PS1=; stty -echo; echo re\"\"ady\\n'); until(b'ready')\n";

#[test]
fn a_terminal_stops_continues_and_interrupts_the_job() {
    let rig = clips();
    let program = env!("CARGO_BIN_EXE_vmafx-bypass");
    let script = format!(
        "{TERMINAL}\
         type(b'{program} exec --report -- sh -c \"echo on; md5sum clip; sleep 1; md5sum b; sleep 100\"\\n'); until(b'on'); until(b'clip')\n\
         key(b'\\x1a'); until(b'Stopped'); type(b'echo st=$?\\n'); until(b'st=148')\n\
         type(b'jobs -l; fg\\n'); until(b'Stopped'); until(b'b\\r')\n\
         key(b'\\x03'); until(b'exec: 2 of 2'); type(b'echo st=$?\\n'); until(b'st=130')\n\
         type(b'{program} exec -- cat\\n'); time.sleep(.5); type(b'hello\\n'); until(b'hello')\n\
         key(b'\\x1a'); until(b'Stopped'); type(b'bg; sleep 1; jobs\\n'); until(b'Stopped')\n\
         type(b'fg\\n'); time.sleep(.5); type(b'again\\n'); until(b'again'); type(b'\\x04'); time.sleep(.5)\n\
         type(b'echo st=$?\\n'); until(b'st=0')\n\
         type(b'{program} exec -- sh -c \"trap \\\\\"echo got; exit 9\\\\\" INT; echo on; while :; do sleep .1; done\"\\n'); until(b'on')\n\
         key(b'\\x03'); until(b'got'); type(b'echo st=$?\\n'); until(b'st=9')\n\
         print('well')"
    );
    let output = Command::new("python3")
        .args(["-c", &script])
        .env_remove("VMAFX_EBPF_BYPASS")
        .current_dir(rig.mountpoint())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text, "well\n", "{}", stderr(&output));
}

#[test]
fn a_pipe_that_closes_ends_the_command_as_ever() {
    let rig = clips();
    let mut child = start(&rig.mountpoint(), &["cat", "clip", "clip"]);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut first = Vec::new();
    stdout.read_until(b'\n', &mut first).unwrap();
    drop(stdout);
    let done = Done::of(&child.wait_with_output().unwrap());
    assert_eq!(done.signal, Some(Signal::SIGPIPE as i32), "{}", done.stderr);
}
