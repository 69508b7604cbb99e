//! Whether a bypassed read returned what FUSE would have: pure, bytes in,
//! verdict out.
//!
//! FUSE is read before and after. Each byte must be the one that FUSE gave
//! before or after it, or belong to a version between the two. A cell may come
//! from two of these, since neither FUSE nor the cache reads a version at once,
//! but with one seam.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::cells::{self, CELL, Stamp};

/// What a read returned: fewer bytes than asked for mean that the file ended.
#[derive(Debug, Clone)]
pub struct View {
    pub offset: u64,
    pub asked: usize,
    pub bytes: Vec<u8>,
}

impl View {
    fn end(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }

    fn get(&self, offset: u64) -> Option<u8> {
        let at = usize::try_from(offset.checked_sub(self.offset)?).ok()?;
        self.bytes.get(at).copied()
    }

    fn cell(&self, index: u64) -> Option<[u8; CELL]> {
        let at = (index * CELL as u64).checked_sub(self.offset)? as usize;
        self.bytes.get(at..at + CELL)?.try_into().ok()
    }

    /// The stamp of a whole cell in its right place.
    fn stamp(&self, index: u64) -> Option<Stamp> {
        let (stamp, place) = cells::decode(self.cell(index)?)?;
        (place == index).then_some(stamp)
    }

    /// The newest version in it.
    pub fn newest(&self) -> Option<u32> {
        self.stamps().map(|stamp| stamp.version).max()
    }

    fn stamps(&self) -> impl Iterator<Item = Stamp> {
        let first = self.offset / CELL as u64;
        let last = self.end() / CELL as u64;
        (first..=last).filter_map(|index| self.stamp(index))
    }

    fn part(&self, offset: u64, length: usize) -> &[u8] {
        let at = usize::try_from(offset.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        let from = at.min(self.bytes.len());
        &self.bytes[from..self.bytes.len().min(from + length)]
    }
}

/// In which way bytes are wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Zeros, where FUSE had none.
    Zeros,
    /// Another file's bytes.
    Foreign,
    /// Bytes of another offset.
    Elsewhere,
    /// An older version than FUSE had shown before.
    Older,
    /// A newer version than FUSE showed afterwards.
    Newer,
    /// Bytes of before and after, mixed within a cell.
    Mixture,
    /// Nobody's bytes.
    Garbage,
    /// More bytes, or fewer, than FUSE before and after.
    Length,
}

/// Bytes in a row that are wrong in one way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wrong {
    pub offset: u64,
    pub length: u64,
    pub fault: Fault,
    /// Whose bytes they are, where that can be told.
    pub stamp: Option<Stamp>,
    /// The first of them, hexadecimal: bypass, before, after.
    pub hex: [String; 3],
}

/// The judgement of a read: what is wrong in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Right,
    Wrong(Vec<Wrong>),
}

/// The file whose bytes are judged.
#[derive(Debug, Clone, Copy)]
pub struct Subject {
    pub file: u16,
    /// No byte may be older, wherever FUSE says nothing else: for files that
    /// change as a whole, and of which FUSE has shown this version.
    pub floor: u32,
}

/// Judges what was read past FUSE, by what FUSE returned before and after for
/// at least the same range, to whole cells; `None` where it returned an error,
/// or was not asked, which leaves that side open.
pub fn judge(
    subject: Subject,
    before: Option<&View>,
    bypass: &View,
    after: Option<&View>,
) -> Verdict {
    let (offset, asked) = (bypass.offset, bypass.asked);
    let same = |fuse: Option<&View>| {
        fuse.is_some_and(|view| {
            view.offset <= offset && view.part(offset, asked) == bypass.bytes.as_slice()
        })
    };
    if same(before) || same(after) {
        return Verdict::Right;
    }
    let court = Court::new(subject, before, bypass, after);
    let mut wrong: Vec<Wrong> = Vec::new();
    let mut from = offset;
    while from < bypass.end() {
        let index = from / CELL as u64;
        let end = ((index + 1) * CELL as u64).min(bypass.end());
        if let Some((fault, stamp)) = court.fault(index, from, end) {
            match wrong.last_mut() {
                Some(last)
                    if last.offset + last.length == from
                        && (last.fault, last.stamp) == (fault, stamp) =>
                {
                    last.length += end - from;
                }
                _ => wrong.push(court.wrong(from, end - from, fault, stamp)),
            }
        }
        from = end;
    }
    if let Some(length) = court.length() {
        wrong.push(length);
    }
    if wrong.is_empty() {
        Verdict::Right
    } else {
        Verdict::Wrong(wrong)
    }
}

/// What one side of FUSE says of an offset.
#[derive(Clone, Copy)]
enum Bound {
    /// It shows this version there.
    At(u32),
    /// Nothing can be said: an error, the end of the file, zeros.
    Open,
}

struct Court<'a> {
    subject: Subject,
    before: Option<&'a View>,
    bypass: &'a View,
    after: Option<&'a View>,
    known: BTreeSet<Stamp>,
}

impl<'a> Court<'a> {
    fn new(
        subject: Subject,
        before: Option<&'a View>,
        bypass: &'a View,
        after: Option<&'a View>,
    ) -> Self {
        let views = [before, Some(bypass), after];
        Self {
            subject,
            before,
            bypass,
            after,
            known: views.into_iter().flatten().flat_map(View::stamps).collect(),
        }
    }

    /// What is wrong with the bytes from `from` to `end`, all of one cell.
    fn fault(&self, index: u64, from: u64, end: u64) -> Option<(Fault, Option<Stamp>)> {
        let byte = |offset| self.bypass.get(offset).unwrap_or_default();
        let is =
            |view: Option<&View>, offset| view.and_then(|v| v.get(offset)) == Some(byte(offset));
        let of_before = |offset| is(self.before, offset);
        let of_after = |offset| is(self.after, offset);
        if seams(from, end, of_before, of_after) {
            return None;
        }
        let single = |view: Option<&View>| view.is_some_and(|v| v.stamp(index).is_some());
        if (from..end).all(|offset| of_before(offset) || of_after(offset)) {
            // Writes have at least a cell's length: where either side has a
            // seam of its own in this cell, there can be more than one.
            let whole = single(self.before) && single(self.after);
            return whole.then_some((Fault::Mixture, None));
        }
        if let Some((stamp, place)) = self.bypass.cell(index).and_then(cells::decode) {
            return if place == index {
                (from..end)
                    .find_map(|offset| self.fault_of(stamp, offset))
                    .map(|fault| (fault, Some(stamp)))
            } else {
                Some((Fault::Elsewhere, Some(stamp)))
            };
        }
        // Parts of cells: what may be there, with one seam.
        let allowed: Vec<Stamp> = self.known.iter().copied().collect();
        let fits = |stamp: &Stamp, offset| {
            cells::byte(*stamp, offset) == byte(offset) && self.fault_of(*stamp, offset).is_none()
        };
        for stamp in &allowed {
            let of_stamp = |offset| fits(stamp, offset);
            if seams(from, end, of_stamp, |o| of_before(o) || of_after(o))
                || allowed
                    .iter()
                    .any(|other| seams(from, end, of_stamp, |o| fits(other, o)))
            {
                return None;
            }
        }
        let right = |o| of_before(o) || of_after(o) || allowed.iter().any(|s| fits(s, o));
        if (from..end).all(|offset| byte(offset) == 0 || right(offset)) {
            return Some((Fault::Zeros, None));
        }
        let whose = allowed
            .iter()
            .find(|s| (from..end).all(|offset| cells::byte(**s, offset) == byte(offset)));
        whose.map_or(Some((Fault::Garbage, None)), |stamp| {
            (from..end)
                .find_map(|offset| self.fault_of(*stamp, offset))
                .map(|fault| (fault, Some(*stamp)))
        })
    }

    /// Whether a byte of this stamp may be at this offset.
    fn fault_of(&self, stamp: Stamp, offset: u64) -> Option<Fault> {
        let index = offset / CELL as u64;
        let files = [self.before, self.after].map(|v| v?.stamp(index).map(|s| s.file));
        if stamp.file != self.subject.file && !files.contains(&Some(stamp.file)) {
            return Some(Fault::Foreign);
        }
        if stamp.version < self.subject.floor {
            return Some(Fault::Older);
        }
        match self.bound(self.before, offset, Iterator::min) {
            Bound::At(floor) if stamp.version < floor => return Some(Fault::Older),
            _ => {}
        }
        match self.bound(self.after, offset, Iterator::max) {
            Bound::At(ceiling) if stamp.version > ceiling => Some(Fault::Newer),
            _ => None,
        }
    }

    /// The version that FUSE shows at an offset; of several that the byte could
    /// be of, the one that `choose` takes.
    fn bound(
        &self,
        view: Option<&View>,
        offset: u64,
        choose: impl Fn(std::vec::IntoIter<u32>) -> Option<u32>,
    ) -> Bound {
        let Some(view) = view else { return Bound::Open };
        if let Some(stamp) = view.stamp(offset / CELL as u64) {
            return Bound::At(stamp.version);
        }
        let Some(byte) = view.get(offset) else {
            return Bound::Open;
        };
        let of: Vec<u32> = self
            .known
            .iter()
            .filter(|stamp| cells::byte(**stamp, offset) == byte)
            .map(|stamp| stamp.version)
            .collect();
        choose(of.into_iter()).map_or(Bound::Open, Bound::At)
    }

    /// Whether it ended where FUSE did, before or after, or between the two.
    fn length(&self) -> Option<Wrong> {
        let (offset, asked) = (self.bypass.offset, self.bypass.asked);
        let [before, after] = [self.before?, self.after?].map(|v| v.part(offset, asked).len());
        let read = self.bypass.bytes.len();
        let between = (before.min(after)..=before.max(after)).contains(&read);
        (!between).then(|| {
            let end = self.bypass.end();
            self.wrong(end, (asked - read) as u64, Fault::Length, None)
        })
    }

    fn wrong(&self, offset: u64, length: u64, fault: Fault, stamp: Option<Stamp>) -> Wrong {
        let hex =
            |view: Option<&View>| cells::hex(view.map_or(&[][..], |v| v.part(offset, 2 * CELL)));
        Wrong {
            offset,
            length,
            fault,
            stamp,
            hex: [hex(Some(self.bypass)), hex(self.before), hex(self.after)],
        }
    }
}

/// Whether a range is of one source, then of another: at most one seam.
fn seams(from: u64, end: u64, a: impl Fn(u64) -> bool, b: impl Fn(u64) -> bool) -> bool {
    let split = |first: &dyn Fn(u64) -> bool, second: &dyn Fn(u64) -> bool| {
        let seam = (from..end).find(|&offset| !first(offset)).unwrap_or(end);
        (seam..end).all(second)
    };
    split(&a, &b) || split(&b, &a)
}
