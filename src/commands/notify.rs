//! `run` as a service of systemd's: readiness, status and watchdog, by sd_notify(3).

use std::cell::Cell;
use std::env;
use std::fmt::Write as _;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use vmafx_bypass::tracker::Observer;

use crate::output::{self, Notes};

/// How often the status is looked at; more often where the watchdog wants it.
const STATUS: Duration = Duration::from_secs(2);
/// How long the next step of the end may take: a slow disk's read, and detaching.
const LONGER: Duration = Duration::from_secs(30);

/// Who has started this process, and wants to know how it is; or nobody.
///
/// The socket is connected once, before `run` gives up its rights. NOTIFY_SOCKET stays
/// in the environment: `run` starts no program that could inherit it.
pub struct Service<'a> {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
    notes: &'a Notes,
}

impl<'a> Service<'a> {
    /// As systemd has set the environment.
    pub fn from_env(notes: &'a Notes) -> Self {
        let socket = connect().unwrap_or_else(|e| {
            notes.note(format_args!("warning: NOTIFY_SOCKET: {e}"));
            None
        });
        Self {
            socket,
            watchdog: sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()),
            notes,
        }
    }

    /// Tells that tracking has begun, and from then on that it goes on.
    pub fn ready(self, tracker: Observer) -> Telling {
        let Some(socket) = self.socket.map(Arc::new) else {
            return Telling(None);
        };
        let mut status = status(&tracker);
        if let Err(e) = send(&socket, &[NotifyState::Ready, NotifyState::Status(&status)]) {
            self.notes.note(format_args!("warning: NOTIFY_SOCKET: {e}"));
        }
        let (end, ended) = mpsc::channel();
        let interval = self.watchdog.map_or(STATUS, |limit| STATUS.min(limit / 2));
        let to = Arc::clone(&socket);
        let tell = move || {
            while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                // A tracker that is stuck holds this thread, and the watchdog barks.
                if tracker.flush().is_err() {
                    return;
                }
                let mut news = Vec::new();
                if self.watchdog.is_some() {
                    news.push(NotifyState::Watchdog);
                }
                let now = self::status(&tracker);
                if now != status {
                    status = now;
                    news.push(NotifyState::Status(&status));
                }
                // Who does not listen now may listen the next time.
                let _ = send(&to, &news);
            }
        };
        let thread = thread::Builder::new().name("vmafx-notify".into());
        if let Err(e) = thread.spawn(tell) {
            self.notes
                .note(format_args!("warning: no watchdog: thread: {e}"));
        }
        Telling(Some((socket, end)))
    }
}

/// Tells until it is dropped.
pub struct Telling(Option<(Arc<UnixDatagram>, Sender<()>)>);

impl Telling {
    /// Tells that the end has begun; the watchdog is not served any more.
    pub fn stopping(self) -> Stopping {
        let socket = self.0.map(|(socket, _end)| socket);
        if let Some(socket) = &socket {
            let status = NotifyState::Status("detaching");
            // Whoever stops us knows already.
            let _ = send(socket, &[NotifyState::Stopping, status]);
        }
        Stopping {
            socket,
            told: Cell::new(Instant::now()),
        }
    }
}

/// The end, which may take longer than a service is given.
pub struct Stopping {
    socket: Option<Arc<UnixDatagram>>,
    told: Cell<Instant>,
}

impl Stopping {
    /// Tells, once a second, that it goes on: then the service is not killed for the
    /// time of [`LONGER`] (EXTEND_TIMEOUT_USEC of sd_notify(3)).
    pub fn goes_on(&self) {
        if let Some(socket) = &self.socket
            && self.told.get().elapsed() >= Duration::from_secs(1)
        {
            self.told.set(Instant::now());
            let longer = NotifyState::ExtendTimeoutUsec(LONGER.as_micros() as u32);
            // Who does not listen now may listen the next time.
            let _ = send(socket, &[longer]);
        }
    }
}

/// A path, or an abstract name after `@`.
fn connect() -> io::Result<Option<UnixDatagram>> {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else {
        return Ok(None);
    };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address?)?;
    Ok(Some(socket))
}

fn send(socket: &UnixDatagram, news: &[NotifyState<'_>]) -> io::Result<()> {
    let lines: Vec<_> = news.iter().map(ToString::to_string).collect();
    if lines.is_empty() {
        return Ok(());
    }
    socket.send(lines.join("\n").as_bytes()).map(drop)
}

/// What `systemctl status` shows.
fn status(tracker: &Observer) -> String {
    let tracked = tracker.tracked();
    let mut text = format!("tracking {tracked} descriptors");
    let watches = tracker.watches();
    if watches.is_empty() {
        text.push_str("; waiting for a mount");
    }
    for (number, watch) in watches.iter().enumerate() {
        let before = if number == 0 { " below" } else { "," };
        let prefix = output::escape(watch.prefix.as_os_str());
        // Writing to a string does not fail.
        let _ = write!(text, "{before} `{prefix}`");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_tells_once_a_second_that_it_goes_on() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let stopping = Stopping {
            socket: Some(Arc::new(ours)),
            told: Cell::new(Instant::now()),
        };
        let mut told = [0; 64];
        stopping.goes_on();
        assert!(theirs.recv(&mut told).is_err(), "it has just begun");
        let before = Instant::now().checked_sub(Duration::from_secs(2));
        stopping.told.set(before.unwrap());
        for _ in 0..2 {
            stopping.goes_on();
        }
        let length = theirs.recv(&mut told).unwrap();
        assert_eq!(&told[..length], b"EXTEND_TIMEOUT_USEC=30000000");
        assert!(theirs.recv(&mut told).is_err(), "once");
    }
}
