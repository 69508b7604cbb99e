//! Rows in an order, filtered, one of them chosen, some of them in the window.

use std::ops::Range;

use super::columns::Row;

type Only<R> = Option<Box<dyn Fn(&R) -> bool>>;

/// A list of rows. What is chosen is a row, wherever it goes; until a key has
/// chosen one it is the first, whichever that is.
pub struct List<R: Row> {
    rows: Vec<R>,
    /// Those that are shown, in order.
    order: Vec<usize>,
    sort: usize,
    reverse: bool,
    filter: String,
    /// What rows must be, beside that.
    only: Only<R>,
    chosen: Option<R::Key>,
    /// Where it is, or was.
    place: usize,
    /// The first in the window.
    top: usize,
    /// How many the window had at its last drawing.
    height: usize,
}

impl<R: Row> Default for List<R> {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            order: Vec::new(),
            sort: R::FIRST_SORT,
            reverse: false,
            filter: String::new(),
            only: None,
            chosen: None,
            place: 0,
            top: 0,
            height: 0,
        }
    }
}

impl<R: Row> List<R> {
    pub fn of(rows: Vec<R>) -> Self {
        let mut list = Self::default();
        list.set(rows);
        list
    }

    /// Takes new rows.
    pub fn set(&mut self, rows: Vec<R>) {
        self.rows = rows;
        self.arrange();
    }

    /// Sorts by the next column.
    pub fn sort_by_next(&mut self) {
        self.sort = (self.sort + 1) % R::COLUMNS.len();
        self.reverse = false;
        self.arrange();
    }

    /// Sorts the other way around.
    pub fn reverse(&mut self) {
        self.reverse = !self.reverse;
        self.arrange();
    }

    /// The column that is sorted by, and whether the largest come first.
    pub fn sorted(&self) -> (usize, bool) {
        (self.sort, R::COLUMNS[self.sort].descending != self.reverse)
    }

    pub fn filter(&self) -> &str {
        &self.filter
    }

    /// Changes what rows must have, in upper or lower case.
    pub fn change_filter(&mut self, change: impl FnOnce(&mut String)) {
        change(&mut self.filter);
        self.arrange();
    }

    /// Shows only rows of which this is true, too.
    pub fn show_only(&mut self, only: impl Fn(&R) -> bool + 'static) {
        self.only = Some(Box::new(only));
        self.arrange();
    }

    /// Rows, shown or not.
    pub fn all(&self) -> &[R] {
        &self.rows
    }

    /// Rows that are shown, in order.
    pub fn shown(&self) -> impl ExactSizeIterator<Item = &R> {
        self.order.iter().map(|index| &self.rows[*index])
    }

    /// The chosen row; `None`: there is none.
    pub fn chosen(&self) -> Option<&R> {
        self.order.get(self.place).map(|index| &self.rows[*index])
    }

    /// Chooses the row so many further down, or up.
    pub fn go(&mut self, by: isize) {
        let last = self.order.len().saturating_sub(1);
        self.place = self.place.saturating_add_signed(by).min(last);
        self.chosen = self.chosen().map(Row::key);
    }

    /// Chooses the row a window further down, or up.
    pub fn page(&mut self, down: bool) {
        let rows = self.height.max(1) as isize;
        self.go(if down { rows } else { -rows });
    }

    /// Chooses the first row, whichever it is from now on.
    pub fn go_first(&mut self) {
        self.place = 0;
        self.chosen = None;
    }

    /// Chooses the last row.
    pub fn go_last(&mut self) {
        self.go(isize::MAX);
    }

    /// The rows for a window of so many, and which of them is the chosen one.
    pub fn window(&mut self, height: usize) -> (Range<usize>, Option<usize>) {
        self.height = height;
        let count = self.order.len();
        // No blank end while there are rows above.
        self.top = self.top.min(count.saturating_sub(height));
        if self.place < self.top {
            self.top = self.place;
        } else if height > 0 && self.place >= self.top + height {
            self.top = self.place + 1 - height;
        }
        let end = (self.top + height).min(count);
        let chosen = (self.top..end).contains(&self.place);
        (self.top..end, chosen.then(|| self.place - self.top))
    }

    /// The rows that were in the window at its last drawing.
    pub fn in_window(&self) -> impl Iterator<Item = &R> {
        self.shown().skip(self.top).take(self.height)
    }

    /// Filters, sorts, and finds the chosen row again; where it has gone, its
    /// place's row is chosen.
    fn arrange(&mut self) {
        let text = self.filter.to_lowercase();
        let only = |row: &R| self.only.as_ref().is_none_or(|only| only(row));
        let shown = |(index, row)| (only(row) && row.matches(&text)).then_some(index);
        self.order = self.rows.iter().enumerate().filter_map(shown).collect();
        let order = R::COLUMNS[self.sort].order;
        let (_, descending) = self.sorted();
        let rows = &self.rows;
        self.order.sort_by(|a, b| {
            let (a, b) = (&rows[*a], &rows[*b]);
            let by_column = if descending { order(b, a) } else { order(a, b) };
            by_column.then_with(|| a.tie(b))
        });
        let last = self.order.len().saturating_sub(1);
        let Some(key) = self.chosen else {
            self.place = 0;
            return;
        };
        let found = self.shown().position(|row| row.key() == key);
        match found {
            Some(place) => self.place = place,
            // Nothing is shown now: what was chosen may come back.
            None if self.order.is_empty() => self.place = 0,
            None => {
                self.place = self.place.min(last);
                self.chosen = self.chosen().map(Row::key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::top::model::Process;
    use proptest::prelude::*;

    fn process(pid: u32, fds: u32) -> Process {
        Process {
            pid,
            comm: format!("Prog{pid}"),
            fds,
            clips: 1,
            usage: None,
        }
    }

    fn pids(list: &List<Process>) -> Vec<u32> {
        list.shown().map(|p| p.pid).collect()
    }

    fn sort_by(list: &mut List<Process>, name: &str) {
        while Process::COLUMNS[list.sorted().0].name != name {
            list.sort_by_next();
        }
    }

    #[test]
    fn rows_are_sorted_and_the_other_way_around() {
        let mut list = List::default();
        list.set(vec![process(2, 5), process(1, 5), process(3, 9)]);
        assert_eq!(pids(&list), [3, 1, 2], "nothing read: by descriptors, pid");
        sort_by(&mut list, "PID");
        assert_eq!(pids(&list), [1, 2, 3]);
        list.reverse();
        assert_eq!(pids(&list), [3, 2, 1]);
        sort_by(&mut list, "FDS");
        assert_eq!(pids(&list), [3, 1, 2]);
    }

    #[test]
    fn the_chosen_row_is_followed_and_its_place_kept_when_it_goes() {
        let mut list = List::default();
        sort_by(&mut list, "FDS");
        list.set(vec![process(1, 9), process(2, 5), process(3, 1)]);
        // Nothing chosen yet: the first, whichever it is.
        list.set(vec![process(1, 9), process(2, 99), process(3, 1)]);
        assert_eq!(list.chosen().unwrap().pid, 2);
        list.go(1);
        assert_eq!(list.chosen().unwrap().pid, 1);
        list.set(vec![process(1, 0), process(2, 5), process(3, 1)]);
        assert_eq!(list.chosen().unwrap().pid, 1, "now the last");
        list.set(vec![process(2, 5), process(3, 1)]);
        assert_eq!(list.chosen().unwrap().pid, 3, "there is no third place");
        list.go_first();
        list.set(vec![process(2, 5), process(3, 10)]);
        assert_eq!(list.chosen().unwrap().pid, 3);
        list.set(vec![]);
        assert!(list.chosen().is_none());
        list.go(1);
        list.go_last();
        assert_eq!(list.window(5), (0..0, None));
    }

    #[test]
    fn a_filter_hides_rows_and_gives_them_back() {
        let mut list = List::default();
        list.set((1..30).map(|pid| process(pid, 1)).collect());
        list.go(6);
        list.change_filter(|f| f.push_str("pROG7"));
        assert_eq!(pids(&list), [7]);
        list.change_filter(|f| f.push('x'));
        assert!(list.chosen().is_none());
        list.change_filter(String::clear);
        assert_eq!(list.chosen().unwrap().pid, 7);
        assert_eq!(list.shown().len(), 29);
    }

    proptest! {
        #[test]
        fn the_chosen_row_is_always_in_the_window(
            steps in prop::collection::vec((0_u8..6, 0_usize..40, 0_usize..12), 1..40)
        ) {
            let mut list = List::default();
            for (what, rows, height) in steps {
                match what {
                    0 => list.set((0..rows).map(|i| process(i as u32, i as u32 % 3)).collect()),
                    1 => list.go(rows as isize - 20),
                    2 => list.page(rows % 2 == 0),
                    3 => list.sort_by_next(),
                    4 => list.go_last(),
                    _ => list.change_filter(|f| { f.clear(); f.push_str(&(rows % 5).to_string()); }),
                }
                let (window, chosen) = list.window(height);
                prop_assert!(window.len() <= height && window.end <= list.shown().len());
                prop_assert_eq!(chosen.is_some(), height > 0 && list.shown().len() > 0);
                prop_assert!(chosen.is_none_or(|place| place < window.len()));
            }
        }
    }
}
