//! Draws an [`App`].

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Margin, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph};

use super::app::{App, Over};
use super::columns::{Row, fit, padded, tail};
use super::list::List;
use super::words::{self, Tone};
use crate::cli::TopView;
use crate::output::shown;

/// Lines above the rows, where there is room.
const HEADER: u16 = 3;
/// From so many columns on, what goes on in the next line of an explanation
/// stands below the words above.
const WIDE: usize = 60;

/// Before the chosen row, and before the others.
const MARK: &str = "> ";
const NO_MARK: &str = "  ";

const HELP: &str = "\
Tab          clips or processes
Up Down j k  choose a row
PgUp PgDn    a page; Home End: the first, the last
e Enter      explain the chosen clip: every gate, and what to do
Enter        of a process: its clips alone; Esc: all again
s S          sort by the next column; the other way around
/            show rows with this text alone; Enter keeps it, Esc clears it
p Space      pause: nothing is looked at, and nothing changes
Ctrl-L       draw all anew
q Esc Ctrl-C quit

STATE    active: read from the cache; else why reads go through FUSE. An estimate
         by rclone's metadata, as CACHED is.
CACHED   # cached, . not
FUSE/S   bytes read through FUSE a second, since the last look
IN FUSE  the share of the time spent in these reads, over 100% by several threads
TIME     spent in them since `run` counts
Clips and processes without a descriptor have just read, and closed.";

/// Which colours there are.
#[derive(Debug, Clone, Copy)]
pub struct Theme {
    pub colours: bool,
}

impl Theme {
    /// As NO_COLOR says.
    pub fn of_environment() -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colours: !no_color }
    }

    fn style(self, tone: Tone) -> Style {
        let bold = match tone {
            Tone::Bad => Style::new().add_modifier(Modifier::BOLD),
            _ => Style::new(),
        };
        match tone {
            _ if !self.colours => bold,
            Tone::Plain => bold,
            Tone::Good => bold.fg(Color::Green),
            Tone::Doubtful => bold.fg(Color::Yellow),
            Tone::Bad => bold.fg(Color::Red),
        }
    }
}

/// Draws all of it. Where there is little room, the rows are what is left.
pub fn draw(frame: &mut Frame<'_>, app: &mut App, theme: Theme) {
    let area = frame.area();
    let header = area.height.saturating_sub(4).min(HEADER);
    let names = u16::from(area.height >= 2);
    let footer = u16::from(area.height >= 3);
    let [top, names, rows, bottom] = Layout::vertical([
        Constraint::Length(header),
        Constraint::Length(names),
        Constraint::Fill(1),
        Constraint::Length(footer),
    ])
    .areas(area);

    let lines = header_lines(app, theme);
    frame.render_widget(Paragraph::new(lines), top);
    match app.view {
        TopView::Clips => table(frame, names, rows, &mut app.clips, |clip| {
            theme.style(words::of_state(clip.facts.state))
        }),
        TopView::Processes => {
            table(frame, names, rows, &mut app.processes, |_| Style::new());
        }
    }
    frame.render_widget(footer_line(app, theme), bottom);
    if app.typing && !bottom.is_empty() {
        let width = Line::from(app.filter()).width() as u16;
        let x = (bottom.x + 1).saturating_add(width);
        frame.set_cursor_position((x.min(bottom.right() - 1), bottom.y));
    }
    draw_over(frame, app, area);
}

fn header_lines<'a>(app: &App, theme: Theme) -> Vec<Line<'a>> {
    let (owner, tone) = words::owner(&app.look, app.gone.as_ref());
    let (clips, processes) = (app.clips.all().len(), app.processes.all().len());
    vec![
        Line::styled(owner, theme.style(tone)),
        Line::raw(words::amount(&app.look, clips, processes)),
        Line::raw(words::reads(&app.look.picture)),
    ]
}

/// Draws the names of columns and the rows that are in the window. The first
/// column has the style of its row.
fn table<R: Row>(
    frame: &mut Frame<'_>,
    names: Rect,
    area: Rect,
    list: &mut List<R>,
    style: impl Fn(&R) -> Style,
) {
    let columns = fit::<R>(usize::from(area.width).saturating_sub(MARK.len()));
    let (sorted, descending) = list.sorted();
    let mut text = String::from(NO_MARK);
    for (index, column, width) in &columns {
        let arrow = if descending { '↓' } else { '↑' };
        let name = match (*index == sorted, column.right) {
            (false, _) => column.name.to_owned(),
            (true, true) => format!("{arrow}{}", column.name),
            (true, false) => format!("{}{arrow}", column.name),
        };
        text += &padded(&name, *width, column.right);
        text.push(' ');
    }
    let text = padded(&text, names.width.into(), false);
    let reversed = Style::new().add_modifier(Modifier::REVERSED);
    frame.render_widget(Line::styled(text, reversed), names);

    let (window, chosen) = list.window(area.height.into());
    let shown = list.shown().skip(window.start).take(window.len());
    for (place, (row, line)) in shown.zip(area.rows()).enumerate() {
        let is_chosen = chosen == Some(place);
        let mut spans = vec![Span::raw(if is_chosen { MARK } else { NO_MARK })];
        for (at, (_, column, width)) in columns.iter().enumerate() {
            let text = tail(&(column.text)(row), *width);
            let text = padded(&text, *width, column.right) + " ";
            let style = if at == 0 { style(row) } else { Style::new() };
            spans.push(Span::styled(text, style));
        }
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let style = if is_chosen { bold } else { Style::new() };
        frame.render_widget(Line::from(spans).style(style), line);
    }
    if list.shown().len() == 0 {
        let text = if list.all().is_empty() {
            " no clip is open"
        } else {
            " nothing to show: Esc shows all again"
        };
        frame.render_widget(Line::raw(text), area);
    }
}

fn footer_line<'a>(app: &App, theme: Theme) -> Line<'a> {
    if app.typing {
        return Line::raw(format!("/{}", app.filter()));
    }
    if let Some(notice) = app.notice {
        return Line::styled(notice, theme.style(Tone::Doubtful));
    }
    let mut spans = Vec::new();
    if app.paused {
        spans.push(Span::styled("PAUSED  ", theme.style(Tone::Doubtful)));
    }
    let mut narrowed = Vec::new();
    if let (TopView::Clips, Some(pid)) = (app.view, app.only) {
        narrowed.push(format!("of process {pid}"));
    }
    if !app.filter().is_empty() {
        narrowed.push(format!("with \"{}\"", app.filter()));
    }
    if !narrowed.is_empty() {
        let text = format!("only those {}: Esc shows all  ", narrowed.join(" "));
        spans.push(Span::styled(text, theme.style(Tone::Doubtful)));
    }
    let (other, enter) = match app.view {
        TopView::Clips => ("processes", "e explain"),
        TopView::Processes => ("clips", "Enter its clips"),
    };
    spans.push(Span::raw(format!(
        "q quit  Tab {other}  {enter}  s sort  / filter  p pause  ? help"
    )));
    Line::from(spans)
}

fn draw_over(frame: &mut Frame<'_>, app: &mut App, area: Rect) {
    let (title, text, indent) = match &app.over {
        None => return,
        Some(Over::Help) => (" help ".to_owned(), HELP, 9),
        Some(Over::Explain { path, text }) => {
            let waiting = "asking; FUSE may take its time\n\nEsc: do not wait";
            let title = format!(" explain {} ", shown(Some(path)));
            (title, text.as_deref().unwrap_or(waiting), 22)
        }
    };
    // On small terminals all of it.
    let margin = Margin {
        horizontal: if area.width > 80 { 4 } else { 0 },
        vertical: u16::from(area.height > 20),
    };
    let area = area.inner(margin);
    let title = tail(&title, area.width.saturating_sub(4).into());
    let block = Block::bordered()
        .title_top(title)
        .title_bottom(" arrows scroll, Esc closes ");
    let inside = block.inner(area);
    let width = usize::from(inside.width).max(1);
    let indent = " ".repeat(if width >= WIDE {
        indent
    } else {
        2.min(width - 1)
    });
    let options = textwrap::Options::new(width).subsequent_indent(&indent);
    let lines: Vec<Line> = text
        .lines()
        .flat_map(|line| textwrap::wrap(line, &options))
        .map(|line| Line::raw(line.into_owned()))
        .collect();
    app.scroll = app
        .scroll
        .min(lines.len().saturating_sub(inside.height.into()));
    let shown: Vec<Line> = lines.into_iter().skip(app.scroll).collect();
    frame.render_widget(Clear, area);
    frame.render_widget(block, area);
    frame.render_widget(Paragraph::new(shown), inside);
}

#[cfg(test)]
mod tests;
