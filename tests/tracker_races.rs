//! Ways in which a descriptor comes or goes that hide from the tracker: at
//! ends, in tables that several share, by calls that are made oddly.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::fds::{dumped, truth};
use common::{Tracking, Worker, content, put, rig};
use serde_json::json;
use vmafx_bypass::rig::Rig;

const LIBC: &str = "import ctypes,mmap,socket; libc=ctypes.CDLL(None,use_errno=True)\n";

fn clips() -> Rig {
    rig(|source| {
        for i in 0..5 {
            put(source, &format!("clip{i}"), &content(i, 100));
        }
    })
}

#[test]
fn a_marked_process_that_takes_long_to_exit_leaves_nothing() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    // It is reconciled while the kernel frees its memory, which comes between
    // the event of its exit and the end of its descriptors.
    let script = "fd=os.open('clip0',0)\n\
         memory=mmap.mmap(-1,700<<20); memory.madvise(15)\n\
         libc.memset(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))),1,\
         ctypes.c_size_t(700<<20))\n\
         threading.Thread(target=time.sleep,args=(99,),daemon=True).start()\n\
         step(); libc.unshare(0x400); os._exit(0)";
    for _ in 0..3 {
        let worker = Worker::start(&rig.mountpoint(), &format!("{LIBC}{script}"), &[]);
        assert_eq!(truth(worker.pid(), &rig.mountpoint()).len(), 1);
        worker.end();
        let dump = tracking.dump();
        assert_eq!(
            (&dump["entries"], &dump["complete"]),
            (&json!([]), &json!(true))
        );
    }
}

#[test]
fn a_call_s_number_is_the_lower_half_of_its_register() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    // openat(2): 257, or 56 on arm64.
    let worker = Worker::start(
        &rig.mountpoint(),
        &format!(
            "{LIBC}import platform; number=257 if platform.machine()=='x86_64' else 56\n\
             assert libc.syscall(ctypes.c_long(7<<32|number),-100,b'clip0',0)>2"
        ),
        &[],
    );
    let open = truth(worker.pid(), &rig.mountpoint());
    assert_eq!(open.len(), 1);
    assert_eq!(dumped(&tracking.dump(), worker.pid()), open);
}

#[test]
fn a_table_that_two_processes_share_comes_to_rest() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    // clone(CLONE_FILES|SIGCHLD): 56, or 220 on arm64.
    let mut worker = Worker::start(
        &rig.mountpoint(),
        &format!(
            "{LIBC}import platform; number=56 if platform.machine()=='x86_64' else 220\n\
             fd=os.open('clip0',0); child=libc.syscall(number,0x411,0,0,0,0)\n\
             if child==0: time.sleep(99)\n\
             print(child,flush=True); sys.stdin.readline()\n\
             other=os.open('clip1',0); step(); os.dup2(other,fd); step()\n\
             os.kill(child,9); os.wait()"
        ),
        &[],
    );
    let pids = [worker.pid(), worker.line().parse().unwrap()];
    for (step, count) in [1, 2, 2].into_iter().enumerate() {
        if step > 0 {
            worker.proceed();
        }
        let dump = tracking.dump();
        assert_eq!(dump["complete"], true, "step {step}");
        for pid in pids {
            let open = truth(pid, &rig.mountpoint());
            assert_eq!(open.len(), count);
            assert_eq!(dumped(&dump, pid), open, "step {step}");
        }
    }
    worker.proceed();
    assert_eq!(dumped(&tracking.dump(), pids[1]), []);
}

#[test]
fn threads_apart_from_their_process_share_a_table() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(
        &rig.mountpoint(),
        &format!(
            "{LIBC}ids=[]; go=threading.Event(); done=threading.Event()\n\
             def second(fd):\n \
               ids.append(threading.get_native_id()); os.close(fd); os.open('clip2',0)\n \
               done.set(); go.wait()\n\
             def first():\n \
               ids.append(threading.get_native_id()); libc.unshare(0x400)\n \
               fd=os.open('clip1',0); time.sleep(0.3)\n \
               threading.Thread(target=second,args=(fd,)).start(); go.wait()\n\
             threading.Thread(target=first).start(); done.wait()\n\
             print(*ids,flush=True); sys.stdin.readline(); go.set()"
        ),
        &[],
    );
    let tids = worker.line().split(' ').map(|tid| tid.parse().unwrap());
    let dump = tracking.dump();
    assert_eq!(dump["complete"], true);
    for tid in tids {
        let open = truth(tid, &rig.mountpoint());
        assert_eq!(open.len(), 1);
        assert_eq!(dumped(&dump, tid), open);
    }
    worker.end();
    assert_eq!(tracking.dump()["entries"], json!([]));
}

#[test]
fn descriptors_come_with_a_message_whose_header_cannot_be_written() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(
        &rig.mountpoint(),
        &format!(
            "{LIBC}a,b=socket.socketpair(); fd=os.open('clip0',0)\n\
             socket.send_fds(a,[b'x'],[fd]); os.close(fd)\n\
             page=mmap.mmap(-1,4096); here=ctypes.addressof(ctypes.c_char.from_buffer(page))\n\
             words=(ctypes.c_uint64*64).from_buffer(page)\n\
             words[2]=here+256; words[3]=1; words[4]=here+384; words[5]=64\n\
             words[32]=here+320; words[33]=8\n\
             header=mmap.mmap(-1,4096); copy=ctypes.addressof(ctypes.c_char.from_buffer(header))\n\
             ctypes.memmove(copy,here,64); libc.mprotect(ctypes.c_void_p(copy),4096,1)\n\
             assert libc.recvmsg(b.fileno(),ctypes.c_void_p(copy),0)==-1\n\
             assert ctypes.get_errno()==14"
        ),
        &[],
    );
    let open = truth(worker.pid(), &rig.mountpoint());
    assert_eq!(open.len(), 1);
    assert_eq!(dumped(&tracking.dump(), worker.pid()), open);
}

#[test]
fn every_open_of_one_clip_in_a_row_is_told() {
    const OPENS: usize = 4000;
    let rig = clips();
    let mut tracking = Tracking::start(&rig.mountpoint(), &[]);
    // All by one number: what is told of one must not hide the next.
    let worker = Worker::start(
        &rig.mountpoint(),
        &format!("for _ in range({OPENS}): os.close(os.open('clip1',os.O_RDONLY))"),
        &[],
    );
    let pid = worker.pid();
    worker.end();
    let (mut opens, mut closes) = (0, 0);
    while closes < OPENS {
        let line = tracking.next_where(|line| line["pid"] == pid);
        match line["event"].as_str().unwrap() {
            "open" => opens += 1,
            "close" => closes += 1,
            other => panic!("{other}"),
        }
        assert!(opens - closes <= 1, "{opens} opens, {closes} closes");
        // One that is missing would leave this waiting.
        if closes + 1 == OPENS {
            assert!(opens + 1 >= OPENS, "{opens} opens");
        }
    }
    assert_eq!(opens, OPENS);
}
