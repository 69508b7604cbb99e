//! `top`: a live view of what a running `run` tracks.

mod app;
mod asking;
mod columns;
mod draw;
mod lines;
mod list;
mod look;
mod model;
mod screen;
mod words;

use std::io::{self, BufWriter, IsTerminal};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use ratatui::crossterm::event::Event;
use ratatui::crossterm::terminal;
use vmafx_bypass::tracker::DumpError;

use self::lines::Lines;
use self::look::{Look, Looker, Watched};
use crate::cli::{Format, TopArgs};
use crate::exit::{Coded, Exit};
use crate::signals::{Interrupted, Signals};

/// A look that takes long is followed by at least so many times that of rest.
const REST: u32 = 3;
/// How long the view may take to see a signal before its terminal is made usable
/// without it.
const SEES_SIGNALS: Duration = Duration::from_secs(1);
/// Messages that may wait: where the view does not come to take them, nothing is
/// looked at.
const WAITING: usize = 16;

/// What the threads tell the one that shows.
enum Message {
    Looked(Box<Result<Look, DumpError>>),
    Input(io::Result<Event>),
    /// What `explain` said of a clip.
    Explained(std::path::PathBuf, String),
    /// A signal has come.
    Signal,
    /// A thread ended that should not.
    Ended(&'static str),
}

/// Shows what there is, until a key or a signal.
pub fn run(args: &TopArgs, mut signals: Signals) -> Result<Exit> {
    // A terminal that is left in raw mode is of no use.
    signals.also([Signal::SIGHUP, Signal::SIGQUIT]);
    let (sender, messages) = mpsc::sync_channel(WAITING);
    let interrupted = signals.watch({
        let sender = sender.clone();
        move || {
            // Where there is no room, it comes to see it by itself.
            let _ = sender.try_send(Message::Signal);
            std::thread::sleep(SEES_SIGNALS);
            // It writes to a terminal that takes nothing, and may never end.
            let _ = terminal::disable_raw_mode();
        }
    });
    let watched = Watched::default();
    let mut looker = Looker::new(args.pin_dir.clone(), watched.clone());
    let first = looker
        .look()
        .map_err(|e| Coded::error(Exit::Environment, e.to_string()))?;
    if let Some(exit) = interrupted.exit() {
        return Ok(exit);
    }
    let pause = start_looking(looker, args.interval.0, sender.clone())?;
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    if args.count.is_some() || args.format == Format::Json || dumb || !io::stdout().is_terminal() {
        return print(args, first, &messages, &interrupted);
    }
    let looking = screen::Looking { watched, pause };
    screen::show(
        args.view,
        first,
        (&sender, &messages),
        &looking,
        &interrupted,
    )
}

/// Starts a thread that ends with the program, or else says so.
fn start(
    name: &'static str,
    sender: SyncSender<Message>,
    work: impl FnOnce(&SyncSender<Message>) + Send + 'static,
) -> Result<()> {
    struct End(&'static str, SyncSender<Message>);
    impl Drop for End {
        fn drop(&mut self) {
            // Nobody is told where nobody listens any more.
            let _ = self.1.try_send(Message::Ended(self.0));
        }
    }
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || work(&End(name, sender).1))
        .context("starting a thread")?;
    Ok(())
}

/// Looks once an interval, in a thread of its own; true, sent to it, makes it
/// pause, and false go on.
fn start_looking(
    mut looker: Looker,
    interval: Duration,
    sender: SyncSender<Message>,
) -> Result<Sender<bool>> {
    let (pause, pauses) = mpsc::channel();
    start("vmafx-top-look", sender, move |sender| {
        let mut rest = interval;
        loop {
            match pauses.recv_timeout(rest) {
                Ok(true) => while matches!(pauses.recv(), Ok(true)) {},
                Ok(false) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let started = Instant::now();
            let looked = Message::Looked(Box::new(looker.look()));
            let took = started.elapsed();
            if sender.send(looked).is_err() {
                return;
            }
            rest = interval.saturating_sub(took).max(took * REST);
        }
    })?;
    Ok(pause)
}

/// Prints looks, one below the other.
fn print(
    args: &TopArgs,
    first: Look,
    messages: &Receiver<Message>,
    interrupted: &Interrupted,
) -> Result<Exit> {
    let out = BufWriter::new(io::stdout());
    let lines = Lines::begin(out, args.format, args.view, first);
    let mut lines = lines.context("standard output")?;
    let mut printed = 1;
    while args.count.is_none_or(|count| printed < count) {
        let next = loop {
            // The threads that send do not end before this.
            let message = messages.recv().context("no thread is left")?;
            if let Some(exit) = interrupted.exit() {
                return Ok(exit);
            }
            match message {
                Message::Looked(looked) => break *looked,
                Message::Ended(thread) => anyhow::bail!("thread `{thread}` has ended"),
                _ => {}
            }
        };
        printed += u64::from(lines.print(next).context("standard output")?);
    }
    Ok(Exit::Done)
}
