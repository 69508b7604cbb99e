//! What is in the columns, how it is ordered, and which of them fit.

use std::cmp::Ordering;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::model::{Clip, ClipId, Process, Rate, Usage};
use crate::output::{human_bytes, shown};

/// Cells of a bar.
const BAR: usize = 10;
/// The last column takes what the others leave, and wants so much.
const LAST: usize = 20;

/// A column of rows `R`.
pub struct Column<R> {
    pub name: &'static str,
    /// At least one more than the name, for the order's arrow; 0 for the last.
    pub width: usize,
    pub right: bool,
    /// Where there is no room, those with the least go.
    keep: u8,
    pub text: fn(&R) -> String,
    /// Ascending.
    pub order: fn(&R, &R) -> Ordering,
    /// Whether the largest come first, unless reversed.
    pub descending: bool,
}

/// A row that can be listed.
pub trait Row: Sized + 'static {
    type Key: Copy + Eq;
    /// The last one takes what the others leave.
    const COLUMNS: &'static [Column<Self>];
    /// The column to sort by at first.
    const FIRST_SORT: usize;

    fn key(&self) -> Self::Key;
    /// Whether a text, in lower case, is in what the row shows.
    fn matches(&self, text: &str) -> bool;
    /// The order of rows that a column does not tell apart.
    fn tie(&self, other: &Self) -> Ordering;
}

impl Row for Clip {
    type Key = ClipId;
    const COLUMNS: &'static [Column<Self>] = &[
        Column {
            name: "STATE",
            width: 14,
            right: false,
            keep: 9,
            text: |clip| state(clip).to_owned(),
            order: |a, b| a.facts.state.cmp(b.facts.state),
            descending: false,
        },
        Column {
            name: "CACHED",
            width: BAR + 5,
            right: false,
            keep: 8,
            text: cached,
            order: |a, b| compare(share(a), share(b)),
            descending: false,
        },
        Column {
            name: "SIZE",
            width: 10,
            right: true,
            keep: 5,
            text: |clip| clip.facts.size.map_or_else(none, human_bytes),
            order: |a, b| a.facts.size.cmp(&b.facts.size),
            descending: true,
        },
        Column {
            name: "FDS",
            width: 5,
            right: true,
            keep: 7,
            text: |clip| clip.fds.to_string(),
            order: |a, b| a.fds.cmp(&b.fds),
            descending: true,
        },
        Column {
            name: "PROCS",
            width: 6,
            right: true,
            keep: 3,
            text: |clip| clip.pids.len().to_string(),
            order: |a, b| a.pids.len().cmp(&b.pids.len()),
            descending: true,
        },
        Column {
            name: "FUSE/S",
            width: 10,
            right: true,
            keep: 6,
            text: |clip| bytes_a_second(clip.usage),
            order: |a, b| compare(rate(a.usage, |r| r.bytes), rate(b.usage, |r| r.bytes)),
            descending: true,
        },
        Column {
            name: "READS/S",
            width: 8,
            right: true,
            keep: 1,
            text: |clip| reads_a_second(clip.usage),
            order: |a, b| compare(rate(a.usage, |r| r.reads), rate(b.usage, |r| r.reads)),
            descending: true,
        },
        Column {
            name: "IN FUSE",
            width: 8,
            right: true,
            keep: 4,
            text: |clip| busy(clip.usage),
            order: |a, b| compare(rate(a.usage, |r| r.ns), rate(b.usage, |r| r.ns)),
            descending: true,
        },
        Column {
            name: "TIME",
            width: 9,
            right: true,
            keep: 2,
            text: |clip| time(clip.usage),
            order: |a, b| total_ns(a.usage).cmp(&total_ns(b.usage)),
            descending: true,
        },
        Column {
            name: "PATH",
            width: 0,
            right: false,
            keep: u8::MAX,
            text: |clip| shown(clip.facts.path.as_deref()),
            order: |a, b| a.facts.path.cmp(&b.facts.path),
            descending: false,
        },
    ];
    const FIRST_SORT: usize = 8;

    fn key(&self) -> ClipId {
        self.id
    }

    fn matches(&self, text: &str) -> bool {
        let path = shown(self.facts.path.as_deref());
        path.to_lowercase().contains(text) || self.facts.state.contains(text)
    }

    fn tie(&self, other: &Self) -> Ordering {
        let order = other.fds.cmp(&self.fds);
        let order = order.then_with(|| self.facts.path.cmp(&other.facts.path));
        order.then_with(|| self.id.cmp(&other.id))
    }
}

impl Row for Process {
    type Key = u32;
    const COLUMNS: &'static [Column<Self>] = &[
        Column {
            name: "PID",
            width: 8,
            right: true,
            keep: 9,
            text: |process| process.pid.to_string(),
            order: |a, b| a.pid.cmp(&b.pid),
            descending: false,
        },
        Column {
            name: "CLIPS",
            width: 6,
            right: true,
            keep: 8,
            text: |process| process.clips.to_string(),
            order: |a, b| a.clips.cmp(&b.clips),
            descending: true,
        },
        Column {
            name: "FDS",
            width: 6,
            right: true,
            keep: 7,
            text: |process| process.fds.to_string(),
            order: |a, b| a.fds.cmp(&b.fds),
            descending: true,
        },
        Column {
            name: "FUSE/S",
            width: 10,
            right: true,
            keep: 6,
            text: |process| bytes_a_second(process.usage),
            order: |a, b| compare(rate(a.usage, |r| r.bytes), rate(b.usage, |r| r.bytes)),
            descending: true,
        },
        Column {
            name: "READS/S",
            width: 8,
            right: true,
            keep: 3,
            text: |process| reads_a_second(process.usage),
            order: |a, b| compare(rate(a.usage, |r| r.reads), rate(b.usage, |r| r.reads)),
            descending: true,
        },
        Column {
            name: "IN FUSE",
            width: 8,
            right: true,
            keep: 5,
            text: |process| busy(process.usage),
            order: |a, b| compare(rate(a.usage, |r| r.ns), rate(b.usage, |r| r.ns)),
            descending: true,
        },
        Column {
            name: "TIME",
            width: 9,
            right: true,
            keep: 4,
            text: |process| time(process.usage),
            order: |a, b| total_ns(a.usage).cmp(&total_ns(b.usage)),
            descending: true,
        },
        Column {
            name: "COMMAND",
            width: 0,
            right: false,
            keep: u8::MAX,
            text: |process| process.comm.clone(),
            order: |a, b| a.comm.cmp(&b.comm),
            descending: false,
        },
    ];
    const FIRST_SORT: usize = 6;

    fn key(&self) -> u32 {
        self.pid
    }

    fn matches(&self, text: &str) -> bool {
        self.comm.to_lowercase().contains(text) || self.pid.to_string().contains(text)
    }

    fn tie(&self, other: &Self) -> Ordering {
        let order = other.fds.cmp(&self.fds);
        order.then_with(|| self.pid.cmp(&other.pid))
    }
}

fn none() -> String {
    "-".to_owned()
}

/// The state's word; dots until it is estimated.
pub fn state(clip: &Clip) -> &'static str {
    match clip.facts.state {
        "" => "...",
        state => state,
    }
}

/// The cached share.
fn share(clip: &Clip) -> Option<f64> {
    match (clip.facts.cached?, clip.facts.size?) {
        (_, 0) => None,
        // Metadata may be of a larger version.
        (cached, size) => Some((cached as f64 / size as f64).min(1.0)),
    }
}

fn cached(clip: &Clip) -> String {
    let Some(share) = share(clip) else {
        return none();
    };
    // Neither full nor empty before it is so.
    let cells = match share {
        s if s <= 0.0 => 0,
        s if s >= 1.0 => BAR,
        s => ((s * BAR as f64) as usize).clamp(1, BAR - 1),
    };
    let percent = (share * 100.0).floor();
    let (full, empty) = ("#".repeat(cells), ".".repeat(BAR - cells));
    format!("{full}{empty} {percent:>3}%")
}

fn compare(a: Option<f64>, b: Option<f64>) -> Ordering {
    match (a, b) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        (a, b) => a.is_some().cmp(&b.is_some()),
    }
}

fn rate(usage: Option<Usage>, of: fn(Rate) -> f64) -> Option<f64> {
    Some(of(usage?.rate?))
}

fn total_ns(usage: Option<Usage>) -> Option<u64> {
    Some(usage?.total.ns)
}

pub fn bytes_a_second(usage: Option<Usage>) -> String {
    rate(usage, |r| r.bytes).map_or_else(none, |bytes| human_bytes(bytes as u64))
}

pub fn reads_a_second(usage: Option<Usage>) -> String {
    rate(usage, |r| r.reads).map_or_else(none, |reads| format!("{reads:.0}"))
}

pub fn busy(usage: Option<Usage>) -> String {
    rate(usage, Rate::busy).map_or_else(none, |share| format!("{:.0}%", 100.0 * share))
}

/// The time in reads since `run` counts.
fn time(usage: Option<Usage>) -> String {
    let Some(ns) = total_ns(usage) else {
        return none();
    };
    let seconds = ns as f64 / 1e9;
    match seconds {
        s if s < 100.0 => format!("{s:.2} s"),
        s if s < 6_000.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3_600.0),
    }
}

/// The columns for so many cells, each with its own and the last with what is
/// left; between them one is blank.
pub fn fit<R: Row>(cells: usize) -> Vec<(usize, &'static Column<R>, usize)> {
    let mut columns: Vec<_> = R::COLUMNS.iter().enumerate().collect();
    let taken =
        |columns: &[(usize, &Column<R>)]| columns.iter().map(|(_, c)| c.width + 1).sum::<usize>();
    while columns.len() > 1 && taken(&columns) + LAST > cells + 1 {
        let least = columns.iter().enumerate().min_by_key(|(_, (_, c))| c.keep);
        let Some((place, _)) = least else { break };
        columns.remove(place);
    }
    let last = (cells + 1).saturating_sub(taken(&columns));
    columns
        .into_iter()
        .map(|(index, column)| {
            let width = if column.width == 0 {
                last
            } else {
                column.width
            };
            (index, column, width)
        })
        .collect()
}

/// The end of a text in so many cells: paths differ there.
pub fn tail(text: &str, cells: usize) -> String {
    if text.width() <= cells {
        return text.to_owned();
    }
    let mut room = cells.saturating_sub(1);
    let mut from = text.len();
    for (index, c) in text.char_indices().rev() {
        let width = c.width().unwrap_or(0);
        if width > room {
            break;
        }
        room -= width;
        from = index;
    }
    if cells == 0 {
        return String::new();
    }
    format!("…{}", &text[from..])
}

/// A text in exactly so many cells, where it is not longer.
pub fn padded(text: &str, cells: usize, right: bool) -> String {
    let blank = " ".repeat(cells.saturating_sub(text.width()));
    if right {
        blank + text
    } else {
        text.to_owned() + &blank
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::top::model::Facts;
    use vmafx_bypass::mounts::Dev;
    use vmafx_bypass::tracker::ReadCost;

    fn clip(cached: Option<u64>, size: u64) -> Clip {
        Clip {
            id: ClipId {
                dev: Dev::new(0, 1),
                ino: 1,
            },
            facts: Facts {
                path: None,
                size: Some(size),
                cached,
                state: "",
            },
            fds: 1,
            pids: vec![],
            usage: None,
        }
    }

    #[test]
    fn a_bar_is_full_or_empty_only_when_the_clip_is() {
        for (bytes, size, bar) in [
            (Some(0), 100, ".......... 0%"),
            (Some(1), 10_000, "#......... 0%"),
            (Some(50), 100, "#####..... 50%"),
            (Some(9_999), 10_000, "#########. 99%"),
            (Some(100), 100, "########## 100%"),
            (Some(200), 100, "########## 100%"),
            (Some(0), 0, "-"),
            (None, 100, "-"),
        ] {
            let shown = cached(&clip(bytes, size));
            let shown: Vec<_> = shown.split_whitespace().collect();
            assert_eq!(shown.join(" "), bar);
        }
    }

    #[test]
    fn narrow_terminals_get_fewer_columns_and_always_the_last() {
        for cells in 0..300 {
            let columns = fit::<Clip>(cells);
            assert_eq!(columns.last().unwrap().1.name, "PATH");
            let taken: usize = columns.iter().map(|(_, _, width)| width + 1).sum();
            assert!(columns.len() == 1 || taken <= cells + 1, "{cells}");
        }
        let names = |cells| -> Vec<_> { fit::<Clip>(cells).iter().map(|c| c.1.name).collect() };
        assert_eq!(names(20), ["PATH"]);
        assert_eq!(names(35), ["STATE", "PATH"]);
        let usual = ["STATE", "CACHED", "SIZE", "FDS", "FUSE/S", "PATH"];
        assert_eq!(names(80), usual);
        assert_eq!(names(200).len(), Clip::COLUMNS.len());
    }

    #[test]
    fn what_is_too_long_keeps_its_end() {
        assert_eq!(tail("/mount/clip", 11), "/mount/clip");
        assert_eq!(tail("/mount/clip", 5), "…clip");
        // Two cells each.
        assert_eq!(tail("日本語", 5), "…本語");
        assert_eq!(tail("日本語", 4), "…語");
        assert_eq!(tail("abc", 1), "…");
        assert_eq!(tail("abc", 0), "");
        assert_eq!(padded("語", 4, true), "  語");
    }

    #[test]
    fn what_is_not_known_is_a_dash_and_comes_last() {
        let with = |bytes: f64| Usage {
            total: ReadCost {
                reads: 1,
                bytes: 1,
                ns: 90_000_000_000,
            },
            rate: Some(Rate {
                reads: 1.0,
                bytes,
                ns: 1.5e9,
            }),
        };
        assert_eq!(bytes_a_second(None), "-");
        assert_eq!(bytes_a_second(Some(with(2048.0))), "2.0 KiB");
        assert_eq!(busy(Some(with(1.0))), "150%");
        assert_eq!(time(Some(with(1.0))), "90.00 s");
        let unknown = rate(Some(Usage::default()), |r| r.bytes);
        assert_eq!(compare(unknown, Some(0.0)), Ordering::Less);
    }
}
