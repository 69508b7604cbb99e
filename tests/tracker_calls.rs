//! Every way in which a descriptor comes and goes, one at a time; in any order
//! and all at once: tests/fdlife.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use common::fds::{Open, dumped, end, told, truth};
use common::{Tracking, Worker, content, eventually, put, rig};
use serde_json::Value;
use vmafx_bypass::rig::Rig;

const LIBC: &str = "import ctypes,fcntl,socket; libc=ctypes.CDLL(None,use_errno=True)\n";

fn clips() -> Rig {
    rig(|source| {
        for i in 0..5 {
            put(source, &format!("clip{i}"), &content(i, 100));
        }
    })
}

/// `run` on a mount of clips, for one case after another: a start of it takes long
/// in a guest of the kernel matrix.
struct Watched {
    rig: Rig,
    tracking: Tracking,
}

impl Watched {
    fn start() -> Self {
        let rig = clips();
        let tracking = Tracking::start(&rig.mountpoint(), &[]);
        Self { rig, tracking }
    }

    fn worker(&self, script: &str) -> Worker {
        Worker::start(&self.rig.mountpoint(), &format!("{LIBC}{script}"), &[])
    }

    fn truth(&self, pid: u32) -> Open {
        truth(pid, &self.rig.mountpoint())
    }

    fn dump(&self) -> Value {
        self.tracking.dump()
    }

    /// The dump once all is reconciled.
    fn healed(&self) -> Value {
        let mut dump = self.dump();
        eventually("reconciliation", || {
            dump = self.dump();
            dump["complete"] == true
        });
        dump
    }

    /// What was told since the last call, by event and descriptor.
    fn told(&mut self, pid: u32) -> Vec<(String, u64)> {
        // All before is told before this.
        let last = File::open(self.rig.mountpoint().join("clip4")).unwrap();
        let fd = last.as_raw_fd();
        let mut lines = Vec::new();
        loop {
            let line = self.tracking.next().expect("the last open is told");
            if line["event"] == "open" && line["pid"] == std::process::id() && line["fd"] == fd {
                break;
            }
            lines.push(line);
        }
        let told = told(&lines, pid).into_iter();
        told.map(|(event, fd, _)| (event.to_owned(), fd)).collect()
    }

    /// Runs a script of so many steps; after each the table must be the truth.
    fn follow(&mut self, script: &str, steps: usize) -> Seen {
        let mut worker = self.worker(script);
        let pid = worker.pid();
        let mut seen = Vec::new();
        for step in 0..steps {
            if step > 0 {
                worker.proceed();
            }
            let open = self.truth(pid);
            assert_eq!(dumped(&self.dump(), pid), open, "step {step}");
            seen.push(open);
        }
        worker.kill();
        assert_eq!(dumped(&self.dump(), pid), []);
        Seen {
            steps: seen,
            told: self.told(pid),
        }
    }

    fn end(self) {
        end(self.tracking);
    }
}

/// What [`follow`](Watched::follow) saw.
struct Seen {
    /// What was open at each step.
    steps: Vec<Open>,
    /// What was told, by event and descriptor.
    told: Vec<(String, u64)>,
}

fn events(pairs: &[(&str, u64)]) -> Vec<(String, u64)> {
    let owned = |(event, fd): &(&str, u64)| ((*event).to_owned(), *fd);
    pairs.iter().map(owned).collect()
}

type Case = fn(&mut Watched);

#[test]
fn each_way_leaves_the_table_right() {
    let cases: &[(&str, Case)] = &[
        ("fcntl", fcntl_dups),
        ("exec", exec_closes_what_is_to_be_closed),
        ("fork", a_fork_inherits_and_lives_its_own_life),
        ("many", a_process_of_many_descriptors_forks),
        ("generations", generations_of_many_descriptors_fork_at_once),
        ("sockets", descriptors_passed_over_sockets_are_received),
        ("pidfd", descriptors_taken_by_pidfd_are_received),
        ("thread", a_thread_with_its_own_table_counts_as_a_process),
    ];
    let mut watched = Watched::start();
    for (name, case) in cases {
        eprintln!("case: {name}");
        case(&mut watched);
    }
    watched.end();
}

fn fcntl_dups(watched: &mut Watched) {
    let seen = watched.follow(
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
    let mut watched = Watched::start();
    let seen = watched.follow(
        "fds=[os.open('clip0',0) for _ in range(20)]; libc.close_range(fds[5],fds[9],4)\n\
         step(); libc.close_range(fds[2],fds[4],0)\n\
         step(); libc.close_range(fds[7],0xffffffff,0)",
        3,
    );
    let open: Vec<_> = seen.steps.iter().map(Vec::len).collect();
    assert_eq!(open, [20, 17, 4]);
    watched.end();
}

fn exec_closes_what_is_to_be_closed(watched: &mut Watched) {
    let again = "[sys.executable,'-c','import sys;print(\"ready\",flush=True);\
                 sys.stdin.readline()']";
    let seen = watched.follow(
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

fn a_fork_inherits_and_lives_its_own_life(watched: &mut Watched) {
    let mut worker = watched.worker(
        "fds=[os.open('clip0',0) for _ in range(3)]; r,w=os.pipe()\n\
         child=os.fork()\n\
         if child==0:\n libc.prctl(1,9); os.close(fds[0]); os.write(w,b'.'); time.sleep(1000)\n\
         os.read(r,1); os.close(fds[1])\n\
         print(child,flush=True); sys.stdin.readline()\n\
         os.kill(child,9); os.waitpid(child,0)",
    );
    let (parent, child) = (worker.pid(), worker.line().parse().unwrap());
    let dump = watched.dump();
    for pid in [parent, child] {
        let open = watched.truth(pid);
        assert_eq!((dumped(&dump, pid), open.len()), (open, 2));
    }
    worker.proceed();
    assert_eq!(dumped(&watched.dump(), child), []);
    worker.kill();
    let wanted = [("inherit", 3), ("inherit", 4), ("inherit", 5), ("close", 3)];
    assert_eq!(watched.told(child)[..4], events(&wanted));
}

/// 10,000, if `FORK_FDS` does not say otherwise.
fn a_process_of_many_descriptors_forks(watched: &mut Watched) {
    let many = std::env::var("FORK_FDS").map_or(10_000, |many| many.parse().unwrap());
    let mut worker = watched.worker(&format!(
        "import resource; hard=resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n\
         resource.setrlimit(resource.RLIMIT_NOFILE,(hard,hard))\n\
         fd=os.open('clip0',os.O_RDONLY)\n\
         for number in range(100,100+{many}): os.dup2(fd,number)\n\
         child=os.fork()\n\
         if child==0: libc.prctl(1,9); time.sleep(1000)\n\
         print(child,flush=True); sys.stdin.readline()\n\
         os.kill(child,9); os.waitpid(child,0)",
    ));
    let child = worker.line().parse().unwrap();
    let open = watched.truth(child);
    assert_eq!(open.len(), many + 1);
    // So many are not copied by the fork's own handler.
    let dump = watched.healed();
    assert_eq!(dumped(&dump, child), open);
    worker.proceed();
    assert_eq!(dumped(&watched.dump(), child), []);
    worker.kill();
    assert!(watched.told(child).len() > many + 1);
}

/// Each forks the next one before anybody has looked at its own descriptors.
fn generations_of_many_descriptors_fork_at_once(watched: &mut Watched) {
    let mut worker = watched.worker(
        "fd=os.open('clip0',os.O_RDONLY); os.dup2(fd,1023); import resource\n\
         resource.setrlimit(resource.RLIMIT_NOFILE,(2100,2100)); os.dup2(fd,2000)\n\
         me=os.getpid(); r,w=os.pipe(); generation=0\n\
         while generation<6 and os.fork()==0: generation+=1\n\
         os.write(w,b'%d '%os.getpid())\n\
         if generation: libc.prctl(1,9); time.sleep(1000)\n\
         pids=b''\n\
         while pids.count(b' ')<7: pids+=os.read(r,999)\n\
         print(pids.decode(),flush=True); sys.stdin.readline()\n\
         for pid in pids.split(): int(pid)!=me and os.kill(int(pid),9)",
    );
    let line = worker.line();
    let pids: Vec<u32> = line.split(' ').map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 7, "{line}");
    let dump = watched.healed();
    for pid in pids {
        let open = watched.truth(pid);
        assert_eq!((dumped(&dump, pid), open.len()), (open, 3));
    }
    worker.proceed();
    worker.kill();
}

fn descriptors_passed_over_sockets_are_received(watched: &mut Watched) {
    let seen = watched.follow(
        "a,b=socket.socketpair(socket.AF_UNIX); fd=os.open('clip0',0)\n\
         other=os.open('clip1',0); null=os.open('/dev/null',0)\n\
         socket.send_fds(a,[b'x'],[fd,null,other]); socket.recv_fds(b,9,9)",
        1,
    );
    assert_eq!(seen.steps[0].len(), 4);
    let received = seen.told.iter().filter(|(event, _)| event == "receive");
    assert_eq!(received.count(), 2);
}

fn descriptors_taken_by_pidfd_are_received(watched: &mut Watched) {
    let seen = watched.follow(
        "fd=os.open('clip0',0); pid=os.pidfd_open(os.getpid())\n\
         taken=libc.syscall(438,pid,fd,0); assert taken>0",
        1,
    );
    assert_eq!(seen.steps[0].len(), 2);
    assert_eq!(seen.told[1].0, "receive");
}

fn a_thread_with_its_own_table_counts_as_a_process(watched: &mut Watched) {
    let mut worker = watched.worker(
        "fds=[os.open('clip0',0) for _ in range(3)]; go=threading.Event()\n\
             done=threading.Event(); end=threading.Event(); tids=[]\n\
             def own():\n \
               assert libc.unshare(0x400)==0\n \
               tids.append(threading.get_native_id())\n \
               os.close(fds[0]); os.open('clip1',0); os.open('clip2',0); done.set(); end.wait()\n\
             thread=threading.Thread(target=own); thread.start(); done.wait()\n\
             os.close(fds[2])\n\
             print(tids[0],flush=True); sys.stdin.readline()\n\
             end.set(); thread.join()",
    );
    let (process, thread): (u32, u32) = (worker.pid(), worker.line().parse().unwrap());
    let dump = watched.dump();
    for (pid, count) in [(process, 2), (thread, 4)] {
        let open = watched.truth(pid);
        assert_eq!((dumped(&dump, pid), open.len()), (open, count));
    }
    worker.proceed();
    let dump = watched.dump();
    assert_eq!(dumped(&dump, thread), []);
    assert_eq!(dumped(&dump, process), watched.truth(process));
    worker.kill();
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
