//! Answers opens: with a snapshot where all of it is certain, else by letting
//! the kernel go on as if nobody had asked.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use nix::errno::Errno;
use nix::libc::{self, c_long, seccomp_notif};
use nix::poll::{PollFlags, PollTimeout};
use rustix::fs::OFlags;

use super::identity::Sandboxes;
use super::notify::{Board, Listener, Seat};
use super::programs::Programs;
use super::report::Counters;
use super::source::{Given, Source};
use super::target::{self, Asked, PathBuffer, Root};
use super::watch::Watched;
use crate::mounts::Dev;
use crate::reason::{Reason, Refusal};
use crate::sys;

/// Threads at the start: while one is at work, another waits.
const THREADS: usize = 2;
/// Of each; nothing here recurses.
const STACK: usize = 512 << 10;

/// What the threads share.
pub(super) struct Supervisor {
    pub(super) listener: Listener,
    pub(super) board: &'static Board,
    pub(super) watched: Watched,
    pub(super) sandboxes: Sandboxes,
    pub(super) programs: Programs,
    pub(super) source: Source,
    pub(super) counters: Counters,
    pub(super) root: Root,
    /// Whether a process may see other files below a path than this one does.
    views_differ: AtomicBool,
    /// Threads that wait for a notification.
    idle: AtomicUsize,
}

/// What is done with an open.
enum Verdict {
    /// It is of no clip on a watched mount.
    Elsewhere,
    /// A clip, through FUSE.
    Refused(Refusal),
    Whole(Given),
}

impl Supervisor {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn new(
        listener: Listener,
        board: &'static Board,
        watched: Watched,
        sandboxes: Sandboxes,
        programs: Programs,
        source: Source,
        counters: Counters,
        root: Root,
    ) -> Self {
        Self {
            listener,
            board,
            watched,
            sandboxes,
            programs,
            source,
            counters,
            root,
            views_differ: AtomicBool::new(false),
            idle: AtomicUsize::new(0),
        }
    }

    /// Starts to answer.
    pub(super) fn start(self: &Arc<Self>) -> io::Result<()> {
        self.listener.prefer_sync_wake_up();
        for _ in 0..THREADS {
            self.add_thread()?;
        }
        let own = Arc::clone(self);
        thread::Builder::new()
            .name("exec-mounts".into())
            .stack_size(STACK)
            // Without it, mounts that come later are not watched.
            .spawn(move || own.watched.follow())?;
        Ok(())
    }

    fn add_thread(self: &Arc<Self>) -> io::Result<()> {
        let Some(seat) = self.board.seat() else {
            return Ok(());
        };
        let own = Arc::clone(self);
        // Counted before it runs, so that not everyone who finds nobody idle
        // starts another.
        self.idle.fetch_add(1, Ordering::Relaxed);
        let spawned = thread::Builder::new()
            .name("exec-opens".into())
            .stack_size(STACK)
            .spawn(move || own.serve(seat));
        if spawned.is_err() {
            self.idle.fetch_sub(1, Ordering::Relaxed);
        }
        spawned.map(drop)
    }

    fn serve(self: &Arc<Self>, mut seat: Seat) {
        let mut buffer = PathBuffer::new();
        loop {
            match self.listener.receive(&mut seat) {
                Ok(notification) => {
                    // Nobody waits any more: any step from here on may wait for
                    // a file system, and other opens must not.
                    if self.idle.fetch_sub(1, Ordering::Relaxed) == 1 {
                        // Else they wait a little, and the keeper sees to the rest.
                        let _ = self.add_thread();
                    }
                    let not_left = GoesOn(self, notification.id);
                    self.answer(&notification, &mut buffer);
                    drop(not_left);
                    seat.clear();
                    self.idle.fetch_add(1, Ordering::Relaxed);
                }
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(_) => {
                    // Its process was killed, or all are gone.
                    let ready = self.listener.ready(PollTimeout::ZERO);
                    if ready.contains(PollFlags::POLLHUP) {
                        return;
                    }
                }
            }
        }
    }

    /// Answers one call. Facts from /proc are those of the caller, and not of a
    /// later process of its number: while the notification is valid, the caller
    /// is in its call, and the answer fails once it is not.
    fn answer(&self, notification: &seccomp_notif, buffer: &mut PathBuffer) {
        let thread = notification.pid;
        let data = &notification.data;
        let nr = c_long::from(data.nr);
        if super::filter::restricts_itself(nr) {
            self.sandboxes.restricts_itself(thread);
            let _ = self.listener.go_on(notification.id);
            return;
        }
        if super::filter::CHANGES_THE_VIEW.contains(&nr) {
            self.views_differ.store(true, Ordering::Relaxed);
            let _ = self.listener.go_on(notification.id);
            return;
        }
        let asked = Asked::parse(thread, data);
        // 0: not to be seen in this pid namespace.
        let verdict = match asked.filter(|_| thread != 0) {
            None => Verdict::Elsewhere,
            Some(asked) => self.judge(&asked, notification.id, buffer),
        };
        match verdict {
            Verdict::Elsewhere => self.counters.elsewhere(),
            Verdict::Refused(refusal) => self.counters.refused(refusal),
            Verdict::Whole(given) => {
                let cloexec = asked.is_some_and(|asked| asked.cloexec());
                // Counted before: the caller may end, and the report be made,
                // before this thread runs again.
                let counted = self.counters.substituted(&given);
                let injected =
                    self.listener
                        .inject(notification.id, given.whole.fd.as_fd(), cloexec);
                let Err(error) = injected else { return };
                counted.take_back();
                if error.raw_os_error() == Some(libc::ENOENT) {
                    self.counters.interrupted();
                } else {
                    // Such as a full table: the kernel has the right error.
                    let what = "handing a snapshot over";
                    let refusal = Refusal::from_io(what, &error, Reason::IoError);
                    self.counters.refused(refusal);
                }
            }
        }
        // ENOENT: nobody waits any more.
        let _ = self.listener.go_on(notification.id);
    }

    fn judge(&self, asked: &Asked, id: u64, buffer: &mut PathBuffer) -> Verdict {
        match buffer.fill(asked) {
            Ok(()) => {}
            Err(Errno::EPERM) => {
                let detail = format!("the memory of pid {} may not be read", asked.thread);
                return Verdict::Refused(Refusal::new(Reason::Permission, detail));
            }
            Err(_) => return Verdict::Elsewhere,
        }
        // Most opens end here. Where the glance is wrong, since the caller sees
        // other files, a clip goes through FUSE.
        if !self.views_differ.load(Ordering::Relaxed) {
            let stat = buffer.glance(asked);
            let watched = |s: &rustix::fs::Statx| {
                target::is_regular(s) && self.watched.has(s.stx_dev_major, s.stx_dev_minor)
            };
            if !stat.is_some_and(|stat| watched(&stat)) {
                return Verdict::Elsewhere;
            }
        }
        let Ok(clip) = target::resolve(asked, buffer, self.root) else {
            return Verdict::Elsewhere;
        };
        let Ok(stat) = target::look(clip.as_fd()) else {
            return Verdict::Elsewhere;
        };
        if !target::is_regular(&stat) {
            return Verdict::Elsewhere;
        }
        let Some(clip) = self.watched.own(asked.thread, clip, &stat) else {
            return Verdict::Elsewhere;
        };
        let dev = Dev::new(stat.stx_dev_major, stat.stx_dev_minor);
        match self.hand_over(asked, id, clip.as_fd(), dev) {
            Ok(given) => Verdict::Whole(given),
            Err(refusal) => Verdict::Refused(refusal),
        }
    }

    /// A clip on a watched mount: what costs more is asked only now.
    fn hand_over(
        &self,
        asked: &Asked,
        id: u64,
        clip: BorrowedFd<'_>,
        dev: Dev,
    ) -> Result<Given, Refusal> {
        if self.board.has_missed_restriction() {
            self.sandboxes.trust_nobody();
        }
        let identity = self.sandboxes.check(asked.thread)?;
        if let Some(name) = self.programs.excluded(identity.tgid) {
            let name = name.display();
            let detail = format!("`{name}` compares paths with what it has opened");
            return Err(Refusal::new(Reason::Program, detail));
        }
        // A signal that waits for the end of the call ends the wait instead: the
        // open then goes on in the kernel, and the signal is taken after it.
        let wanted = || self.listener.is_waited_for(id) && !sys::has_pending_signal(asked.thread);
        let given = self.source.open(clip, dev, &wanted)?;
        if asked.nonblocking() {
            // As fcntl(F_GETFL) is to show it; the description is the caller's alone.
            rustix::fs::fcntl_setfl(&given.whole.fd, OFlags::NONBLOCK)
                .map_err(|e| Refusal::new(Reason::IoError, format!("fcntl: {e}")))?;
        }
        Ok(given)
    }
}

/// Lets a call go on in the kernel should this thread end in the middle of it, by a
/// mistake of ours: its caller would wait for ever.
struct GoesOn<'a>(&'a Supervisor, u64);

impl Drop for GoesOn<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.0.listener.go_on(self.1);
        }
    }
}
