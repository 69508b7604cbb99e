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
