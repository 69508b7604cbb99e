//! With a source of the tests' own, which may take its time.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Barrier;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::*;
use crate::cache::proof::Timestamp;
use crate::cache::ranges::Ranges;
use crate::handover::client::{Connection, WholeFd};
use crate::reason::Reason;

const TIME: Timestamp = Timestamp {
    seconds: 1,
    nanos: 2,
};

/// Waits in `whole` until it is told to go on; gives one file by ranges.
struct Slow {
    file: std::path::PathBuf,
    entered: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<()>>,
}

struct Given(std::path::PathBuf, Ranges);

impl Lease for Given {
    fn settle(&mut self) {}
    fn data(&self) -> Result<OwnedFd, Refusal> {
        Ok(File::open(&self.0).unwrap().into())
    }
    fn version(&self) -> (u64, Timestamp) {
        (3, TIME)
    }
    fn ranges(&self) -> &Ranges {
        &self.1
    }
    fn caches_reads(&self) -> bool {
        true
    }
    fn check(&self) -> Result<(), Refusal> {
        Ok(())
    }
    fn compare(&self, _: BorrowedFd<'_>, _: u64) -> Result<(), Refusal> {
        Err(Refusal::new(Reason::Quarantined, "as asked"))
    }
}

impl Source for Slow {
    fn ranges(
        &self,
        client: Client,
        _: OwnedFd,
        pulled: Option<u64>,
    ) -> Result<Box<dyn Lease>, Refusal> {
        assert_eq!(client.pid, std::process::id());
        assert_eq!(pulled, Some(7));
        let ranges = Ranges::from_sorted(&[(0, 1), (2, 1)], 3).unwrap();
        Ok(Box::new(Given(self.file.clone(), ranges)))
    }

    fn whole(&self, _: Client, _: OwnedFd) -> Result<WholeFd, Refusal> {
        self.entered.lock().unwrap().send(()).unwrap();
        // Whoever is told first goes on first.
        let told = self.go_on.lock().unwrap().recv();
        told.unwrap();
        Err(Refusal::new(Reason::Partial, "slow"))
    }
}

#[test]
fn slow_clips_leave_threads_for_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "abc").unwrap();
    let clip = File::open(&file).unwrap();
    let (entered, enters) = channel();
    let (tell, go_on) = channel();
    let source = Slow {
        file,
        entered: Mutex::new(entered),
        go_on: Mutex::new(go_on),
    };
    let socket = folder.path().join("socket");
    let server = Server::start(ServerOptions::new(&socket), Arc::new(source)).unwrap();
    let ask = || {
        Connection::open(&socket)
            .unwrap()
            .ranges(clip.as_fd(), Some(7))
    };
    let mut granted = ask().unwrap();
    assert_eq!((granted.size, granted.modified), (3, TIME));
    assert_eq!(granted.ranges.bytes(), 2);
    let started = Barrier::new(SLOTS_OF_ONE + 1);
    thread::scope(|scope| {
        for _ in 0..SLOTS_OF_ONE {
            scope.spawn(|| {
                started.wait();
                let whole = crate::handover::whole(&socket, clip.as_fd());
                assert_eq!(whole.unwrap_err().reason, Reason::Partial);
            });
        }
        started.wait();
        (0..SLOTS_OF_ONE).for_each(|_| enters.recv().unwrap());
        // One more of this user's is put off; what needs no slot is answered.
        let busy = ask().err().unwrap();
        assert_eq!(busy.reason, Reason::Handover);
        assert!(busy.detail.contains("busy"), "{busy}");
        granted.connection.check().unwrap();
        (0..SLOTS_OF_ONE).for_each(|_| tell.send(()).unwrap());
    });
    assert!(ask().is_ok());
    let differs = granted.connection.differs(clip.as_fd(), 1);
    assert_eq!(differs.unwrap_err().reason, Reason::Quarantined);
    // That proof has ended.
    let ended = granted.connection.check().unwrap_err();
    assert_eq!(ended.reason, Reason::Changed);
    let stats = server.stats();
    assert_eq!((stats.ranges, stats.busy, stats.rejected), (2, 1, 0));
    assert_eq!(stats.refused[&Reason::Partial], SLOTS_OF_ONE as u64);
    assert_eq!(stats.ended[&Reason::Quarantined], 1);
    drop(server);
    assert!(!socket.exists());
    assert!(granted.connection.check().is_err());
}

#[test]
fn a_child_leaves_its_parents_connection_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "abc").unwrap();
    let clip = File::open(&file).unwrap();
    let source = Slow {
        file,
        entered: Mutex::new(channel().0),
        go_on: Mutex::new(channel().1),
    };
    let socket = folder.path().join("socket");
    let server = Server::start(ServerOptions::new(&socket), Arc::new(source)).unwrap();
    let connection = Connection::open(&socket).unwrap();
    let mut granted = connection.ranges(clip.as_fd(), Some(7)).unwrap();
    // SAFETY: the child asks, which takes no lock that others here hold, and ends.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let refused = granted.connection.check().is_err();
            // SAFETY: ends the child, of which nothing is left to run.
            unsafe { nix::libc::_exit(i32::from(!refused)) }
        }
        ForkResult::Parent { child } => {
            let status = waitpid(child, None).unwrap();
            assert_eq!(status, WaitStatus::Exited(child, 0));
        }
    }
    assert_eq!(
        server.stats().checks,
        0,
        "nothing of the child's on the way"
    );
    granted.connection.check().unwrap();
}

#[test]
fn connections_leave_room_for_everything_else() {
    // The tracker's own, with accounts.
    const TRACKER: u64 = 190;
    for limit in [1024, 2048, 4096, 16_384, 65_536, 1 << 20] {
        let clients = clients_of(limit);
        let all = TRACKER + clients as u64 * FDS_OF_ONE + snapshot::descriptors(limit);
        assert!(all < limit, "{all} of {limit}");
        assert!(clients >= 40, "{clients} of {limit}");
    }
    assert_eq!(clients_of(16_384), CLIENTS);
    assert_eq!(clients_of(0), 1);
    assert_eq!((share_of(0, CLIENTS), share_of(1000, CLIENTS)), (960, 768));
    assert_eq!((share_of(0, 1), share_of(1000, 1)), (1, 1));
}
