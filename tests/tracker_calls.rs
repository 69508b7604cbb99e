//! Every way in which a descriptor comes and goes, one at a time; in any order
//! and all at once: tests/fdlife.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::PathBuf;

use common::fds::{Open, dumped, end, told, truth};
use common::{Tracking, Worker, content, eventually, put, rig};
use vmafx_bypass::rig::Rig;

const LIBC: &str = "import ctypes,fcntl,socket; libc=ctypes.CDLL(None,use_errno=True)\n";

fn clips() -> Rig {
    rig(|source| {
        for i in 0..5 {
            put(source, &format!("clip{i}"), &content(i, 100));
        }
    })
}

/// What [`follow`] saw.
struct Seen {
    /// What was open at each step.
    steps: Vec<Open>,
    /// What was told, by event and descriptor.
    told: Vec<(String, u64)>,
}

/// Runs a script of so many steps; after each the table must be the truth.
fn follow(script: &str, steps: usize) -> Seen {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let mut worker = Worker::start(&rig.mountpoint(), &format!("{LIBC}{script}"), &[]);
    let pid = worker.pid();
    let mut seen = Vec::new();
    for step in 0..steps {
        if step > 0 {
            worker.proceed();
        }
        let open = truth(pid, &rig.mountpoint());
        assert_eq!(dumped(&tracking.dump(), pid), open, "step {step}");
        seen.push(open);
    }
    worker.kill();
    assert_eq!(dumped(&tracking.dump(), pid), []);
    let lines = end(tracking);
    let told = told(&lines, pid).into_iter();
    Seen {
        steps: seen,
        told: told.map(|(event, fd, _)| (event.to_owned(), fd)).collect(),
    }
}

fn events(pairs: &[(&str, u64)]) -> Vec<(String, u64)> {
    let owned = |(event, fd): &(&str, u64)| ((*event).to_owned(), *fd);
    pairs.iter().map(owned).collect()
}

#[test]
fn fcntl_dups() {
    let seen = follow(
        "fd=os.open('clip0',0); fcntl.fcntl(fd,fcntl.F_DUPFD,50)\n\
         fcntl.fcntl(fd,fcntl.F_DUPFD_CLOEXEC,60); fcntl.fcntl(fd,fcntl.F_GETFD); os.close(50)",
        1,
    );
    assert_eq!(
        seen.told[1..4],
        events(&[("dup", 50), ("dup", 60), ("close", 50)])
    );
}

#[test]
fn close_range_closes_or_only_marks() {
    let seen = follow(
        "fds=[os.open('clip0',0) for _ in range(20)]; libc.close_range(fds[5],fds[9],4)\n\
         step(); libc.close_range(fds[2],fds[4],0)\n\
         step(); libc.close_range(fds[7],0xffffffff,0)",
        3,
    );
    let open: Vec<_> = seen.steps.iter().map(Vec::len).collect();
    assert_eq!(open, [20, 17, 4]);
}

#[test]
fn exec_closes_what_is_to_be_closed() {
    let again = "[sys.executable,'-c','import sys;print(\"ready\",flush=True);\
                 sys.stdin.readline()']";
    let seen = follow(
        &format!(
            "a=os.open('clip0',0); b=os.open('clip1',0); os.set_inheritable(b,True)\n\
             step(); os.execv(sys.executable,{again})"
        ),
        2,
    );
    assert_eq!((seen.steps[0].len(), seen.steps[1].len()), (2, 1));
    let last = events(&[("close", 3), ("close", 4)]);
    assert_eq!(seen.told[seen.told.len() - 2..], last);
}

#[test]
fn a_fork_inherits_and_lives_its_own_life() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let mut worker = Worker::start(
        &rig.mountpoint(),
        &(LIBC.to_owned()
            + "fds=[os.open('clip0',0) for _ in range(3)]; r,w=os.pipe()\n\
         child=os.fork()\n\
         if child==0:\n libc.prctl(1,9); os.close(fds[0]); os.write(w,b'.'); time.sleep(1000)\n\
         os.read(r,1); os.close(fds[1])\n\
         print(child,flush=True); sys.stdin.readline()\n\
         os.kill(child,9); os.waitpid(child,0)"),
        &[],
    );
    let (parent, child) = (worker.pid(), worker.line().parse().unwrap());
    let dump = tracking.dump();
    for pid in [parent, child] {
        let open = truth(pid, &rig.mountpoint());
        assert_eq!((dumped(&dump, pid), open.len()), (open, 2));
    }
    worker.proceed();
    assert_eq!(dumped(&tracking.dump(), child), []);
    worker.kill();
    let lines = end(tracking);
    let events: Vec<_> = told(&lines, child)
        .iter()
        .map(|(e, fd, _)| (*e, *fd))
        .collect();
    assert_eq!(
        events[..4],
        [("inherit", 3), ("inherit", 4), ("inherit", 5), ("close", 3)]
    );
}

#[test]
fn a_process_of_10_000_descriptors_forks() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let mut worker = Worker::start(
        &rig.mountpoint(),
        &(LIBC.to_owned()
            + "import resource; hard=resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n\
         resource.setrlimit(resource.RLIMIT_NOFILE,(hard,hard))\n\
         fd=os.open('clip0',os.O_RDONLY)\n\
         for number in range(100,10100): os.dup2(fd,number)\n\
         child=os.fork()\n\
         if child==0: libc.prctl(1,9); time.sleep(1000)\n\
         print(child,flush=True); sys.stdin.readline()\n\
         os.kill(child,9); os.waitpid(child,0)"),
        &[],
    );
    let child = worker.line().parse().unwrap();
    let open = truth(child, &rig.mountpoint());
    assert_eq!(open.len(), 10_001);
    // So many are not copied by the fork's own handler.
    let mut dump = tracking.dump();
    eventually("reconciliation", || {
        dump = tracking.dump();
        dump["complete"] == true
    });
    assert_eq!(dumped(&dump, child), open);
    worker.proceed();
    assert_eq!(dumped(&tracking.dump(), child), []);
    worker.kill();
    end(tracking);
}

/// Each forks the next one before anybody has looked at its own descriptors.
#[test]
fn generations_of_processes_of_many_descriptors_fork_at_once() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let mut worker = Worker::start(
        &rig.mountpoint(),
        &(LIBC.to_owned()
            + "fd=os.open('clip0',os.O_RDONLY); os.dup2(fd,1023); import resource\n\
         resource.setrlimit(resource.RLIMIT_NOFILE,(2100,2100)); os.dup2(fd,2000)\n\
         me=os.getpid(); r,w=os.pipe(); generation=0\n\
         while generation<6 and os.fork()==0: generation+=1\n\
         os.write(w,b'%d '%os.getpid())\n\
         if generation: libc.prctl(1,9); time.sleep(1000)\n\
         pids=b''\n\
         while pids.count(b' ')<7: pids+=os.read(r,999)\n\
         print(pids.decode(),flush=True); sys.stdin.readline()\n\
         for pid in pids.split(): int(pid)!=me and os.kill(int(pid),9)"),
        &[],
    );
    let line = worker.line();
    let pids: Vec<u32> = line.split(' ').map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 7, "{line}");
    let mut dump = tracking.dump();
    eventually("reconciliation", || {
        dump = tracking.dump();
        dump["complete"] == true
    });
    for pid in pids {
        let open = truth(pid, &rig.mountpoint());
        assert_eq!((dumped(&dump, pid), open.len()), (open, 3));
    }
    worker.proceed();
    worker.kill();
    end(tracking);
}

#[test]
fn descriptors_passed_over_sockets_are_received() {
    let seen = follow(
        "a,b=socket.socketpair(socket.AF_UNIX); fd=os.open('clip0',0)\n\
         other=os.open('clip1',0); null=os.open('/dev/null',0)\n\
         socket.send_fds(a,[b'x'],[fd,null,other]); socket.recv_fds(b,9,9)",
        1,
    );
    assert_eq!(seen.steps[0].len(), 4);
    let received = seen.told.iter().filter(|(event, _)| event == "receive");
    assert_eq!(received.count(), 2);
}

#[test]
fn descriptors_taken_by_pidfd_are_received() {
    let seen = follow(
        "fd=os.open('clip0',0); pid=os.pidfd_open(os.getpid())\n\
         taken=libc.syscall(438,pid,fd,0); assert taken>0",
        1,
    );
    assert_eq!(seen.steps[0].len(), 2);
    assert_eq!(seen.told[1].0, "receive");
}

#[test]
fn a_thread_with_its_own_table_counts_as_a_process() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let mut worker = Worker::start(
        &rig.mountpoint(),
        &format!(
            "{LIBC}fds=[os.open('clip0',0) for _ in range(3)]; go=threading.Event()\n\
             done=threading.Event(); end=threading.Event(); tids=[]\n\
             def own():\n \
               assert libc.unshare(0x400)==0\n \
               tids.append(threading.get_native_id())\n \
               os.close(fds[0]); os.open('clip1',0); os.open('clip2',0); done.set(); end.wait()\n\
             thread=threading.Thread(target=own); thread.start(); done.wait()\n\
             os.close(fds[2])\n\
             print(tids[0],flush=True); sys.stdin.readline()\n\
             end.set(); thread.join()"
        ),
        &[],
    );
    let (process, thread): (u32, u32) = (worker.pid(), worker.line().parse().unwrap());
    let dump = tracking.dump();
    for (pid, count) in [(process, 2), (thread, 4)] {
        let open = truth(pid, &rig.mountpoint());
        assert_eq!((dumped(&dump, pid), open.len()), (open, count));
    }
    worker.proceed();
    let dump = tracking.dump();
    assert_eq!(dumped(&dump, thread), []);
    assert_eq!(dumped(&dump, process), truth(process, &rig.mountpoint()));
    worker.kill();
    end(tracking);
}

#[test]
fn what_was_open_before_is_adopted_once() {
    let rig = clips();
    let mount = rig.mountpoint();
    let worker = Worker::start(&mount, "fds=[os.open('clip0',0) for _ in range(300)]", &[]);
    let tracking = Tracking::start(&mount, &[]);
    let open = truth(worker.pid(), &mount);
    assert_eq!(dumped(&tracking.dump(), worker.pid()), open);
    let pid = worker.pid();
    worker.kill();
    assert_eq!(dumped(&tracking.dump(), pid), []);
    let lines = end(tracking);
    let told = told(&lines, pid);
    let adopted: Vec<(u64, PathBuf)> = told
        .iter()
        .filter(|(event, ..)| *event == "adopt")
        .map(|(_, fd, path)| (*fd, path.clone()))
        .collect();
    assert_eq!((adopted, told.len()), (open, 600));
}
