//! What the view shows, and what keys do to it: pure.

use std::mem::take;
use std::path::{Path, PathBuf};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use vmafx_bypass::tracker::DumpError;

use super::columns::Row;
use super::list::List;
use super::look::Look;
use super::model::{Clip, Process};
use crate::cli::TopView;

/// What lies over the rows.
#[derive(Debug)]
pub enum Over {
    Help,
    /// What `explain` says of a clip; `None`: it has not answered yet.
    Explain {
        path: PathBuf,
        text: Option<String>,
    },
}

/// What a key asks of the world outside.
#[derive(Debug, PartialEq, Eq)]
pub enum Ask {
    Quit,
    /// Stop, as a job of the shell's.
    Stop,
    /// Draw all of it anew.
    Redraw,
    /// Look at rows, or do not.
    Pause(bool),
    Explain(PathBuf),
    /// Nobody waits for it any more.
    Forget,
}

/// All that is shown.
pub struct App {
    pub view: TopView,
    pub clips: List<Clip>,
    pub processes: List<Process>,
    /// The last look that there was something.
    pub look: Look,
    /// Why there is nothing any more.
    pub gone: Option<DumpError>,
    /// Only clips of this process.
    pub only: Option<u32>,
    pub paused: bool,
    /// Whether a filter is being typed.
    pub typing: bool,
    pub over: Option<Over>,
    /// The first line of what lies over the rows that is shown.
    pub scroll: usize,
    /// What a key could not do.
    pub notice: Option<&'static str>,
}

impl App {
    pub fn new(view: TopView, mut look: Look) -> Self {
        Self {
            view,
            clips: List::of(take(&mut look.picture.clips)),
            processes: List::of(take(&mut look.picture.processes)),
            look,
            gone: None,
            only: None,
            paused: false,
            typing: false,
            over: None,
            scroll: 0,
            notice: None,
        }
    }

    /// Takes what was seen, or why nothing was.
    pub fn take(&mut self, look: Result<Look, DumpError>) {
        match look {
            // Looked before the key came.
            _ if self.paused => {}
            Err(gone) => self.gone = Some(gone),
            Ok(mut look) => {
                self.clips.set(take(&mut look.picture.clips));
                self.processes.set(take(&mut look.picture.processes));
                self.look = look;
                self.gone = None;
            }
        }
    }

    /// Takes what `explain` said, if that is still wanted.
    pub fn explained(&mut self, of: &Path, said: String) {
        if let Some(Over::Explain { path, text }) = &mut self.over
            && path == of
        {
            *text = Some(said);
        }
    }

    /// Does what a key says.
    pub fn key(&mut self, key: KeyEvent) -> Option<Ask> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        self.notice = None;
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Some(Ask::Quit),
            KeyCode::Char('z') if control => return Some(Ask::Stop),
            KeyCode::Char('l') if control => return Some(Ask::Redraw),
            _ => {}
        }
        if self.typing {
            self.typed(key.code, control);
            return None;
        }
        if self.over.is_some() {
            return self.key_over(key.code);
        }
        match key.code {
            KeyCode::Char('q') => return Some(Ask::Quit),
            KeyCode::Esc => return self.escape(),
            KeyCode::Tab | KeyCode::BackTab => {
                self.view = match self.view {
                    TopView::Clips => TopView::Processes,
                    TopView::Processes => TopView::Clips,
                }
            }
            KeyCode::Char('s') => self.list(Change::Sort),
            KeyCode::Char('S') => self.list(Change::Reverse),
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char('p' | ' ') => {
                self.paused = !self.paused;
                return Some(Ask::Pause(self.paused));
            }
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => {
                self.over = Some(Over::Help);
                self.scroll = 0;
            }
            KeyCode::Enter if self.view == TopView::Processes => self.clips_of_chosen(),
            KeyCode::Enter | KeyCode::Char('e') => return self.explain(),
            KeyCode::Up | KeyCode::Char('k') => self.list(Change::Go(-1)),
            KeyCode::Down | KeyCode::Char('j') => self.list(Change::Go(1)),
            KeyCode::PageUp => self.list(Change::Page(false)),
            KeyCode::PageDown => self.list(Change::Page(true)),
            KeyCode::Home | KeyCode::Char('g') => self.list(Change::First),
            KeyCode::End | KeyCode::Char('G') => self.list(Change::Last),
            _ => {}
        }
        None
    }

    /// The filter of what is shown.
    pub fn filter(&self) -> &str {
        match self.view {
            TopView::Clips => self.clips.filter(),
            TopView::Processes => self.processes.filter(),
        }
    }

    fn change_filter(&mut self, change: impl FnOnce(&mut String)) {
        match self.view {
            TopView::Clips => self.clips.change_filter(change),
            TopView::Processes => self.processes.change_filter(change),
        }
    }

    fn typed(&mut self, code: KeyCode, control: bool) {
        match code {
            KeyCode::Esc => {
                self.change_filter(String::clear);
                self.typing = false;
            }
            KeyCode::Enter => self.typing = false,
            KeyCode::Backspace => self.change_filter(|text| {
                text.pop();
            }),
            KeyCode::Char('u') if control => self.change_filter(String::clear),
            KeyCode::Char(c) if !control => self.change_filter(|text| text.push(c)),
            _ => {}
        }
    }

    /// Takes back what was narrowed last; where nothing was, quits.
    fn escape(&mut self) -> Option<Ask> {
        if !self.filter().is_empty() {
            self.change_filter(String::clear);
        } else if self.view == TopView::Clips && self.only.is_some() {
            self.show_only(None);
        } else {
            return Some(Ask::Quit);
        }
        None
    }

    fn show_only(&mut self, pid: Option<u32>) {
        self.only = pid;
        self.clips
            .show_only(move |clip| pid.is_none_or(|pid| clip.pids.contains(&pid)));
    }

    fn clips_of_chosen(&mut self) {
        if let Some(process) = self.processes.chosen() {
            let pid = process.pid;
            self.show_only(Some(pid));
            self.view = TopView::Clips;
        }
    }

    fn explain(&mut self) -> Option<Ask> {
        if self.view == TopView::Processes {
            self.notice = Some("choose a clip: Enter shows those of a process");
            return None;
        }
        let clip = self.clips.chosen()?;
        let Some(path) = clip.facts.path.clone() else {
            self.notice = Some("the path of this clip got lost");
            return None;
        };
        self.over = Some(Over::Explain {
            path: path.clone(),
            text: None,
        });
        self.scroll = 0;
        Some(Ask::Explain(path))
    }

    fn key_over(&mut self, code: KeyCode) -> Option<Ask> {
        // The end is known where it is drawn.
        match code {
            KeyCode::Up | KeyCode::Char('k') => self.scroll = self.scroll.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.scroll += 1,
            KeyCode::PageUp => self.scroll = self.scroll.saturating_sub(10),
            KeyCode::PageDown | KeyCode::Char(' ') => self.scroll += 10,
            KeyCode::Home | KeyCode::Char('g') => self.scroll = 0,
            KeyCode::End | KeyCode::Char('G') => self.scroll = usize::MAX / 2,
            KeyCode::Esc | KeyCode::Enter | KeyCode::Char('q' | 'e' | '?' | 'h') => {
                let over = self.over.take();
                return matches!(over, Some(Over::Explain { .. })).then_some(Ask::Forget);
            }
            _ => {}
        }
        None
    }

    fn list(&mut self, change: Change) {
        match self.view {
            TopView::Clips => change.of(&mut self.clips),
            TopView::Processes => change.of(&mut self.processes),
        }
    }
}

/// What a key does to the rows that are shown.
enum Change {
    Sort,
    Reverse,
    Go(isize),
    Page(bool),
    First,
    Last,
}

impl Change {
    fn of<R: Row>(self, list: &mut List<R>) {
        match self {
            Self::Sort => list.sort_by_next(),
            Self::Reverse => list.reverse(),
            Self::Go(by) => list.go(by),
            Self::Page(down) => list.page(down),
            Self::First => list.go_first(),
            Self::Last => list.go_last(),
        }
    }
}
