//! What the view and the printed lines say in words.

use vmafx_bypass::tracker::DumpError;

use super::columns::{busy, bytes_a_second, reads_a_second};
use super::look::Look;
use super::model::{Picture, Usage};
use crate::output::{escape, losses_text, shown};

/// How good something is; colours show it, too, but never alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Doubtful,
    Bad,
}

/// Whose maps these are, and whether they tell everything.
pub fn owner(look: &Look, gone: Option<&DumpError>) -> (String, Tone) {
    let pid = look.owner.pid;
    match gone {
        Some(DumpError::NotRunning(_)) => {
            let text = format!("run {pid} has ended, this is its last; waiting for another");
            return (text, Tone::Bad);
        }
        Some(other) => return (escape(other.to_string().as_ref()), Tone::Bad),
        None => {}
    }
    if !look.owner.alive {
        let text = format!("run {pid} has died, this is its last; waiting for another");
        return (text, Tone::Bad);
    }
    let since = humantime::format_rfc3339_seconds(look.owner.since);
    let lost = losses_text(&look.losses);
    let (state, tone) = match (look.complete, lost) {
        (true, None) => ("complete".to_owned(), Tone::Good),
        (true, Some(lost)) => (format!("complete ({lost})"), Tone::Good),
        (false, Some(lost)) => (format!("NOT COMPLETE, {lost}"), Tone::Bad),
        (false, None) if look.settled => ("NOT COMPLETE, a path got lost".to_owned(), Tone::Bad),
        (false, None) => ("not complete yet".to_owned(), Tone::Doubtful),
    };
    (format!("run {pid}: {state}, since {since}"), tone)
}

/// How much there is, and where.
pub fn amount(look: &Look, clips: usize, processes: usize) -> String {
    let of = |count: usize, one: &str, more: &str| {
        format!("{count} {}", if count == 1 { one } else { more })
    };
    let mut text = [
        of(look.picture.fds, "descriptor", "descriptors"),
        of(clips, "clip", "clips"),
        of(processes, "process", "processes"),
    ]
    .join(", ");
    let mounts: Vec<String> = look.mounts.iter().map(|m| shown(Some(m))).collect();
    if !mounts.is_empty() {
        text = format!("{text} on {}", mounts.join(", "));
    }
    text
}

/// What is read through FUSE by all together.
pub fn reads(picture: &Picture) -> String {
    let usage = picture.usage;
    let text = match usage {
        None => return "reads are not counted: start run with --account".to_owned(),
        Some(Usage { rate: None, .. }) => "reads are counted from here on".to_owned(),
        Some(_) => format!(
            "{}/s through FUSE, {} reads/s, {} of the time",
            bytes_a_second(usage),
            reads_a_second(usage),
            busy(usage)
        ),
    };
    match picture.forgotten {
        0 => text,
        // They had to make room.
        count => format!("{text}; {count} accounts forgotten: raise --max-fds"),
    }
}

/// How good a clip's state is.
pub fn of_state(state: &str) -> Tone {
    match state {
        "active" => Tone::Good,
        "" => Tone::Plain,
        // A cache that is being filled, or waits for the remote.
        "partial" | "no_metadata" | "dirty" => Tone::Doubtful,
        _ => Tone::Bad,
    }
}
