//! The terminal: taken, drawn on, and given back.

use std::io;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, raise};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, enable_raw_mode};
use ratatui::layout::Rect;

use super::app::{App, Ask};
use super::asking::Asking;
use super::draw::{Theme, draw};
use super::look::{Look, Watched};
use super::{Message, start};
use crate::cli::TopView;
use crate::exit::Exit;
use crate::signals::Interrupted;

/// How often to draw where nothing happens: a terminal that has gone shows then.
const TICK: Duration = Duration::from_secs(1);

/// The terminal, until it is dropped.
struct Screen(DefaultTerminal);

impl Screen {
    fn take() -> io::Result<Self> {
        ratatui::try_init().map(Self).inspect_err(|_| give_back())
    }

    /// Draws all anew. `Terminal::clear` would ask the terminal for its cursor, and
    /// the thread that reads keys take the answer.
    fn redraw(&mut self) -> io::Result<()> {
        let size = self.0.size()?;
        self.0.resize(Rect::new(0, 0, size.width, size.height))
    }

    /// Gives the terminal back, stops, and takes it again after that.
    fn stop(&mut self) -> Result<()> {
        self.0.show_cursor().context("terminal")?;
        ratatui::try_restore().context("terminal")?;
        raise(Signal::SIGTSTP).context("raise")?;
        enable_raw_mode().context("terminal")?;
        execute!(io::stdout(), EnterAlternateScreen).context("terminal")?;
        self.redraw().context("terminal")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // As below.
        let _ = self.0.show_cursor();
        give_back();
    }
}

fn give_back() {
    // A terminal that has gone needs nothing more.
    let _ = ratatui::try_restore();
}

/// How to tell the thread that looks.
pub struct Looking {
    pub watched: Watched,
    /// True: pause, false: go on.
    pub pause: Sender<bool>,
}

/// Shows looks and what keys ask for, until a key or a signal.
pub fn show(
    view: TopView,
    first: Look,
    (sender, messages): (&SyncSender<Message>, &Receiver<Message>),
    looking: &Looking,
    interrupted: &Interrupted,
) -> Result<Exit> {
    let theme = Theme::of_environment();
    let mut showing = Showing {
        app: App::new(view, first),
        screen: Screen::take().context("terminal")?,
        asking: None,
        sender,
        looking,
    };
    start("vmafx-top-keys", sender.clone(), |sender| {
        loop {
            let input = event::read();
            let failed = input.is_err();
            if sender.send(Message::Input(input)).is_err() || failed {
                return;
            }
        }
    })?;
    loop {
        showing.draw(theme)?;
        let mut next = match messages.recv_timeout(TICK) {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => bail!("no thread is left"),
        };
        // All that waits, before it is drawn.
        while let Some(message) = next {
            if let Some(exit) = showing.take(message)? {
                return Ok(exit);
            }
            next = messages.try_recv().ok();
        }
        if let Some(exit) = interrupted.exit() {
            return Ok(exit);
        }
    }
}

struct Showing<'a> {
    app: App,
    screen: Screen,
    /// The `explain` that somebody waits for.
    asking: Option<Asking>,
    sender: &'a SyncSender<Message>,
    looking: &'a Looking,
}

impl Showing<'_> {
    fn draw(&mut self, theme: Theme) -> Result<()> {
        let drawn = self
            .screen
            .0
            .draw(|frame| draw(frame, &mut self.app, theme));
        drawn.context("terminal")?;
        let mut watched = (self.looking.watched.lock()).unwrap_or_else(PoisonError::into_inner);
        watched.clear();
        watched.extend(self.app.clips.in_window().map(|clip| clip.id));
        Ok(())
    }

    fn take(&mut self, message: Message) -> Result<Option<Exit>> {
        match message {
            Message::Looked(looked) => self.app.take(*looked),
            Message::Explained(path, said) => self.app.explained(&path, said),
            Message::Input(input) => {
                // A size is asked for at each drawing.
                if let Event::Key(key) = input.context("terminal")?
                    && let Some(ask) = self.app.key(key)
                {
                    return self.ask(ask);
                }
            }
            // It shows by itself.
            Message::Signal => {}
            Message::Ended(thread) => bail!("thread `{thread}` has ended"),
        }
        Ok(None)
    }

    fn ask(&mut self, ask: Ask) -> Result<Option<Exit>> {
        match ask {
            Ask::Quit => return Ok(Some(Exit::Done)),
            Ask::Stop => self.screen.stop()?,
            Ask::Redraw => self.screen.redraw().context("terminal")?,
            // The thread that would not take it tells of its end.
            Ask::Pause(on) => drop(self.looking.pause.send(on)),
            Ask::Explain(path) => self.explain(path),
            Ask::Forget => drop(self.asking.take()),
        }
        Ok(None)
    }

    fn explain(&mut self, path: PathBuf) {
        let sender = self.sender.clone();
        let of = path.clone();
        // Nobody is told where nobody waits any more.
        let tell = move |said| drop(sender.send(Message::Explained(of, said)));
        match Asking::start(&path, tell) {
            Ok(asking) => self.asking = Some(asking),
            Err(error) => self.app.explained(&path, format!("explain: {error}")),
        }
    }
}
