//! The server: one thread accepts, a fixed number of others answer.
//!
//! A connection has one request worked on at a time. What asks rclone, and so
//! may take long, needs one of a number of slots, of which a user has half at
//! most: the threads that are left always answer what needs no FUSE.

mod answer;
mod slots;

use std::collections::HashMap;
use std::fmt;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rustix::net::{SocketFlags, accept_with};

use super::given::Given;
use super::listener::{Listener, Owner};
use super::protocol::Answer;
use super::stats::{Counters, HandoverStats, ProofTimes, count};
use super::{Client, Lease, Source, wire};
use crate::reason::{Reason, Refusal};
use crate::snapshot;
use crate::sys::{self, coarse_ms};
use slots::Slots;

/// Threads that answer.
const THREADS: usize = 24;
/// Of these, those that may wait for FUSE; and for one user's clips.
const SLOTS: usize = 20;
const SLOTS_OF_ONE: usize = 10;
/// Connections at once.
const CLIENTS: usize = 1024;
/// Descriptors that a connection may need: itself, the cache file, its
/// metadata, and one on the way.
const FDS_OF_ONE: u64 = 4;
/// Descriptors left to the rest of the process beside snapshots: the tracker's 190, and
/// a margin.
const FDS_OF_OTHERS: u64 = 320;
/// How long a new connection may be silent.
const FIRST_REQUEST: Duration = Duration::from_secs(5);
/// How often connections are looked at.
const SWEEP_MS: u16 = 500;
/// Of an answering thread: it parses metadata, on the heap.
const STACK: usize = 1 << 20;
/// How long stopping waits for threads that FUSE holds.
const GRACE: Duration = Duration::from_secs(1);
/// The event of the end; connections count from 1.
const END: u64 = 0;

/// Where a server's log goes, a line at a time.
pub type Log = Box<dyn Fn(&str) + Send + Sync>;

/// How to serve.
pub struct ServerOptions {
    /// Where to make the socket. Whoever may write to it may ask.
    pub path: PathBuf,
    /// The socket file's mode.
    pub mode: u32,
    /// Whose it is to be.
    pub owner: Owner,
    /// How long a client may be silent before its proof ends; it gets another
    /// one when it asks.
    pub idle: Duration,
    /// Told who connects, and what became of each request.
    pub log: Option<Log>,
}

impl ServerOptions {
    /// The defaults: mode 0660, an idle minute, no log.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            mode: 0o660,
            owner: Owner::default(),
            idle: Duration::from_secs(60),
            log: None,
        }
    }
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerOptions")
            .field("path", &self.path)
            .field("mode", &self.mode)
            .field("owner", &self.owner)
            .field("idle", &self.idle)
            .finish_non_exhaustive()
    }
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// Another one listens there.
    #[error("socket `{}` is in use by pid {pid}: end it, or name another path", path.display())]
    InUse {
        /// The other one; 0 where its pid namespace is not ours.
        pid: u32,
        /// The socket.
        path: PathBuf,
    },
    /// What the service manager has given is no socket to serve at.
    #[error("the service manager's socket: {0}")]
    Unfit(String),
    /// A system call failed.
    #[error("{0}")]
    Failed(String),
}

/// A running server; dropped, it ends, and a socket file that it has made goes.
pub struct Server {
    shared: Arc<Shared>,
    listener: Option<Listener>,
    /// Closed, all threads end.
    end: Option<PipeWriter>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    source: Arc<dyn Source>,
    counters: Counters,
    epoll: Epoll,
    clients: Mutex<HashMap<u64, Arc<Connected>>>,
    slots: Slots,
    log: Option<Log>,
    idle: Duration,
    max_clients: usize,
    last_id: AtomicU64,
    /// The other end of [`Server::end`].
    ended: PipeReader,
}

struct Connected {
    id: u64,
    socket: OwnedFd,
    client: Client,
    lease: Mutex<Option<Held>>,
    /// When it last asked, or got its answer, [`coarse_ms`].
    seen_ms: AtomicU64,
    has_asked: AtomicBool,
    is_served: AtomicBool,
}

/// Whether a connection goes on.
#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    Close,
}

/// A proof that was handed over, and its token.
type Held = (u64, Box<dyn Lease>);

/// A socket that nobody answers yet: who is to serve with fewer rights than it
/// takes to make it gives them up now.
pub struct Bound {
    options: ServerOptions,
    listener: Listener,
}

impl Bound {
    /// Serves.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn serve(self, source: Arc<dyn Source>) -> Result<Server, ServerError> {
        let Self { options, listener } = self;
        let failed = |e: io::Error| ServerError::Failed(format!("handover server: {e}"));
        let (ended, end) = io::pipe().map_err(failed)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| failed(e.into()))?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, END);
        epoll.add(&ended, event).map_err(|e| failed(e.into()))?;
        let shared = Arc::new(Shared {
            source,
            counters: Counters::default(),
            epoll,
            clients: Mutex::default(),
            slots: Slots::new(SLOTS, SLOTS_OF_ONE),
            log: options.log,
            idle: options.idle,
            max_clients: max_clients(),
            last_id: AtomicU64::new(END),
            ended,
        });
        let socket = listener.socket.try_clone().map_err(failed)?;
        let mut server = Server {
            shared,
            listener: Some(listener),
            end: Some(end),
            threads: Vec::new(),
        };
        server.spawn("accept", move |shared| shared.accept_all(&socket))?;
        for _ in 0..THREADS {
            server.spawn("answer", Shared::answer_all)?;
        }
        Ok(server)
    }
}

impl Server {
    /// Makes the socket, and serves.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn start(options: ServerOptions, source: Arc<dyn Source>) -> Result<Self, ServerError> {
        Self::bind(options)?.serve(source)
    }

    /// Makes the socket alone.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind(options: ServerOptions) -> Result<Bound, ServerError> {
        let listener = Listener::new(&options.path, options.mode, options.owner)?;
        Ok(Bound { options, listener })
    }

    /// Takes a socket that another has made; the path, mode and owner of the options
    /// are not looked at.
    #[must_use]
    pub fn bind_given(given: Given, options: ServerOptions) -> Bound {
        let listener = Listener::given(given);
        Bound { options, listener }
    }

    fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce(&Shared) + Send + 'static,
    ) -> Result<(), ServerError> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new()
            .name(format!("vmafx-{name}"))
            .stack_size(STACK)
            .spawn(move || run(&shared))
            .map_err(|e| ServerError::Failed(format!("handover server: thread: {e}")))?;
        self.threads.push(thread);
        Ok(())
    }

    /// What it has done so far.
    pub fn stats(&self) -> HandoverStats {
        self.shared.stats()
    }

    /// A handle that reads from another thread, and for as long as it is kept.
    #[must_use]
    pub fn observer(&self) -> ServerObserver {
        ServerObserver(Arc::clone(&self.shared))
    }
}

/// Reads what a [`Server`] has done, from any thread, also when that has ended.
#[derive(Clone)]
pub struct ServerObserver(Arc<Shared>);

impl ServerObserver {
    /// As [`Server::stats`].
    #[must_use]
    pub fn stats(&self) -> HandoverStats {
        self.0.stats()
    }

    /// How long proofs took so far, of each kind and end.
    #[must_use]
    pub fn proof_times(&self) -> Vec<ProofTimes> {
        self.0.counters.proof_times()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The file first: nobody is to find a server that does not answer.
        self.listener = None;
        self.end = None;
        for client in self.shared.clients().values() {
            // It is closed already, at worst.
            let _ = rustix::net::shutdown(&client.socket, rustix::net::Shutdown::Both);
        }
        let deadline = Instant::now() + GRACE;
        for thread in self.threads.drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(2));
            }
            // One that waits for FUSE ends when that answers, or the process.
            if thread.is_finished() && thread.join().is_err() {
                // It has panicked; its message is on standard error.
            }
        }
        self.shared.clients().clear();
    }
}

/// How many of all connections may be one user's: others find room beside root, too.
fn share_of(uid: u32, connections: usize) -> usize {
    let share = if uid == 0 {
        connections * 15 / 16
    } else {
        connections * 3 / 4
    };
    share.max(1)
}

/// As many connections as there is room for in the table of descriptors.
fn max_clients() -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    clients_of(soft)
}

/// As many as there is room for beside everything else; one in any case.
fn clients_of(descriptors: u64) -> usize {
    let others = FDS_OF_OTHERS + snapshot::descriptors(descriptors);
    let room = descriptors.saturating_sub(others) / FDS_OF_ONE;
    CLIENTS.min(room as usize).max(1)
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connected>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stats(&self) -> HandoverStats {
        let connected = self.clients().len();
        self.counters.snapshot(connected)
    }

    fn log(&self, client: Client, what: impl fmt::Display) {
        if let Some(log) = &self.log {
            let Client { pid, uid, gid } = client;
            log(&format!(
                "handover: pid {pid}, uid {uid}, gid {gid}: {what}"
            ));
        }
    }

    fn accept_all(&self, listener: &OwnedFd) {
        let mut swept_ms = coarse_ms();
        loop {
            let mut fds = [
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.ended.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::from(SWEEP_MS)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
            if fds[1].any().unwrap_or(false) {
                return;
            }
            loop {
                match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(socket) => self.connect(socket),
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(_) => {
                        // No descriptor is left; clients wait, and time out.
                        count(&self.counters.turned_away);
                        thread::sleep(Duration::from_millis(50));
                        break;
                    }
                }
            }
            if coarse_ms().saturating_sub(swept_ms) >= u64::from(SWEEP_MS) {
                swept_ms = coarse_ms();
                self.sweep();
            }
        }
    }

    fn connect(&self, socket: OwnedFd) {
        count(&self.counters.clients);
        let Ok(peer) = sys::peer(&socket) else { return };
        let client = Client {
            pid: peer.pid,
            uid: peer.uid,
            gid: peer.gid,
        };
        let mut clients = self.clients();
        let of_user = |c: &&Arc<Connected>| c.client.uid == client.uid;
        let is_full = clients.len() >= self.max_clients
            || clients.values().filter(of_user).count() >= share_of(client.uid, self.max_clients);
        if is_full {
            count(&self.counters.turned_away);
            let refusal = Refusal::new(Reason::Handover, "the server has too many clients");
            // If it cannot be told, it sees the end.
            let _ = wire::send(&socket, &Answer::refused(&refusal).encode(), None);
            drop(clients);
            self.log(client, "turned away: too many clients");
            return;
        }
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let connected = Arc::new(Connected {
            id,
            socket,
            client,
            lease: Mutex::default(),
            seen_ms: AtomicU64::new(coarse_ms()),
            has_asked: AtomicBool::new(false),
            is_served: AtomicBool::new(false),
        });
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, id);
        if self.epoll.add(&connected.socket, event).is_ok() {
            clients.insert(id, connected);
        }
        drop(clients);
        self.log(client, "connected");
    }

    /// Ends connections that were silent for too long.
    fn sweep(&self) {
        let now = coarse_ms();
        for client in self.clients().values() {
            let limit = if client.has_asked.load(Ordering::Relaxed) {
                self.idle
            } else {
                self.idle.min(FIRST_REQUEST)
            };
            let silent = now.saturating_sub(client.seen_ms.load(Ordering::Relaxed));
            if !client.is_served.load(Ordering::Relaxed) && u128::from(silent) > limit.as_millis() {
                count(&self.counters.dropped);
                // Its thread sees the end, and closes it.
                let _ = rustix::net::shutdown(&client.socket, rustix::net::Shutdown::Both);
                client.seen_ms.store(now, Ordering::Relaxed);
            }
        }
    }

    fn answer_all(&self) {
        let mut events = [EpollEvent::empty()];
        loop {
            match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(_) => return,
            }
            let id = events[0].data();
            if id == END {
                return;
            }
            let client = self.clients().get(&id).cloned();
            if let Some(client) = client {
                self.serve(&client);
            }
        }
    }

    /// Answers one request, and waits for the next.
    fn serve(&self, client: &Connected) {
        client.is_served.store(true, Ordering::Relaxed);
        let next = self.answer(client);
        client.seen_ms.store(coarse_ms(), Ordering::Relaxed);
        client.is_served.store(false, Ordering::Relaxed);
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
        let mut event = EpollEvent::new(flags, client.id);
        if next == Next::Close || self.epoll.modify(&client.socket, &mut event).is_err() {
            self.close(client);
        }
    }

    fn close(&self, client: &Connected) {
        // Closed, it leaves by itself; the last to hold it may be another.
        let _ = self.epoll.delete(&client.socket);
        self.clients().remove(&client.id);
        *client.lease() = None;
        self.log(client.client, "gone");
    }
}

impl Connected {
    fn lease(&self) -> MutexGuard<'_, Option<Held>> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
