//! The judge catches what it must, and nothing else.

use proptest::prelude::*;

use crate::cells::{CELL, Stamp, content};
use crate::judge::{Fault, Subject, Verdict, View, judge};

const OWN: u16 = 1;
const SUBJECT: Subject = Subject {
    file: OWN,
    floor: 0,
};
const OTHER: u16 = 2;
const AT: u64 = 160;
const LENGTH: usize = 320;

fn stamp(version: u32) -> Stamp {
    Stamp { version, file: OWN }
}

fn view(bytes: Vec<u8>) -> View {
    View {
        offset: AT,
        asked: LENGTH,
        bytes,
    }
}

fn version(version: u32) -> View {
    view(content(stamp(version), AT, LENGTH))
}

/// `base`, and from `offset` on other bytes.
fn patched(base: &View, offset: u64, bytes: &[u8]) -> View {
    let mut view = base.clone();
    let at = (offset - AT) as usize;
    view.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    view
}

/// The faults of a read between FUSE's `before` and `after`.
fn faults(before: &View, bypass: &View, after: &View) -> Vec<Fault> {
    match judge(SUBJECT, Some(before), bypass, Some(after)) {
        Verdict::Right => Vec::new(),
        Verdict::Wrong(wrong) => wrong.into_iter().map(|w| w.fault).collect(),
    }
}

#[test]
fn what_fuse_gave_before_or_after_is_right() {
    let (one, two) = (version(1), version(2));
    for bypass in [&one, &two] {
        assert_eq!(faults(&one, bypass, &two), []);
    }
    // Also what no version has, where FUSE itself gives it.
    let zeros = view(vec![0; LENGTH]);
    assert_eq!(faults(&one, &zeros, &zeros), []);
    assert_eq!(faults(&zeros, &zeros, &one), []);
}

#[test]
fn a_version_between_is_right() {
    assert_eq!(faults(&version(1), &version(2), &version(3)), []);
    // A read that FUSE, too, would have split: old, new, and between.
    let mixed = patched(&version(1), AT + 32, &content(stamp(2), AT + 32, 100));
    assert_eq!(faults(&version(1), &mixed, &version(3)), []);
    let mixed = patched(&version(1), AT + 37, &content(stamp(3), AT + 37, 101));
    assert_eq!(faults(&version(1), &mixed, &version(3)), []);
}

#[test]
fn zeros_are_wrong() {
    for (from, length) in [(0, LENGTH), (16, 16), (37, 3), (5, 100), (LENGTH - 1, 1)] {
        let from = AT + from as u64;
        let holed = patched(&version(5), from, &vec![0; length]);
        for after in [version(5), version(6)] {
            let found = faults(&version(5), &holed, &after);
            assert!(!found.is_empty(), "{from} {length}");
            assert!(found.iter().all(|f| *f == Fault::Zeros), "{found:?}");
        }
    }
}

#[test]
fn another_files_bytes_are_wrong() {
    let foreign = |version| {
        let file = OTHER;
        view(content(Stamp { version, file }, AT, LENGTH))
    };
    for v in [0, 5, 6, 7] {
        assert_eq!(
            faults(&version(5), &foreign(v), &version(6)),
            [Fault::Foreign],
            "{v}"
        );
    }
    // After a rename over it they are what FUSE gives.
    assert_eq!(faults(&version(5), &foreign(6), &foreign(6)), []);
    assert_eq!(faults(&version(5), &foreign(6), &foreign(7)), []);
    let some = patched(&version(5), AT + 48, &foreign(5).bytes[48..80]);
    assert_eq!(faults(&version(5), &some, &version(6)), [Fault::Foreign]);
}

#[test]
fn another_offsets_bytes_are_wrong() {
    for shift in [16, 4096, 1 << 20] {
        let shifted = view(content(stamp(5), AT + shift, LENGTH));
        let found = faults(&version(5), &shifted, &version(6));
        assert!(found.iter().all(|f| *f == Fault::Elsewhere), "{found:?}");
        assert!(!found.is_empty());
    }
    for shift in [1, 7, 15] {
        let shifted = view(content(stamp(5), AT + shift, LENGTH));
        let found = faults(&version(5), &shifted, &version(5));
        assert!(!found.is_empty(), "{shift}");
    }
}

#[test]
fn an_older_version_than_before_is_wrong() {
    assert_eq!(
        faults(&version(5), &version(4), &version(6)),
        [Fault::Older]
    );
    assert_eq!(
        faults(&version(5), &version(4), &version(5)),
        [Fault::Older]
    );
    // In one cell alone, and in a part of one.
    for (from, length) in [(32, 16), (37, 60), (0, 20)] {
        let from = AT + from;
        let some = patched(&version(5), from, &content(stamp(4), from, length));
        let found = faults(&version(5), &some, &version(6));
        assert!(found.contains(&Fault::Older), "{from} {length}: {found:?}");
    }
    // An older part of the file that nobody has written again is no fault.
    let written = patched(&version(4), AT + 64, &content(stamp(5), AT + 64, 64));
    assert_eq!(faults(&written, &written, &version(6)), []);
    // But the old bytes where it was written are.
    assert_eq!(faults(&written, &version(4), &version(6)), [Fault::Older]);
}

#[test]
fn a_newer_version_than_after_is_wrong() {
    assert_eq!(
        faults(&version(5), &version(7), &version(6)),
        [Fault::Newer]
    );
}

#[test]
fn mixtures_within_a_cell_are_wrong() {
    let (old, new) = (version(5), version(6));
    let alternate = |count: usize| {
        let mut view = old.clone();
        for at in (0..count).step_by(2) {
            view.bytes[at] = new.bytes[at];
        }
        view
    };
    let found = faults(&old, &alternate(LENGTH), &new);
    assert!(found.contains(&Fault::Mixture), "{found:?}");
    assert_eq!(faults(&old, &alternate(CELL), &new), [Fault::Mixture]);
    // A single seam in a cell is what a write leaves that is under way.
    assert_eq!(faults(&old, &patched(&old, AT, &new.bytes[..7]), &new), []);
}

#[test]
fn a_floor_holds_where_fuse_was_not_asked_before() {
    let above = |floor| {
        let subject = Subject { file: OWN, floor };
        judge(subject, None, &version(5), Some(&version(6))) == Verdict::Right
    };
    assert!(above(0) && above(5) && !above(6));
    // What FUSE itself still gives is right.
    let subject = Subject {
        file: OWN,
        floor: 6,
    };
    assert_eq!(
        judge(subject, None, &version(5), Some(&version(5))),
        Verdict::Right
    );
}

#[test]
fn nobodys_bytes_are_wrong() {
    let noise = view(vec![0x5a; LENGTH]);
    let found = faults(&version(5), &noise, &version(6));
    assert_eq!(found, [Fault::Garbage]);
}

#[test]
fn the_end_must_be_where_fuse_has_it() {
    let short = |n: usize| view(content(stamp(5), AT, n));
    assert_eq!(faults(&short(100), &short(100), &short(100)), []);
    assert_eq!(faults(&short(100), &short(150), &short(200)), []);
    assert_eq!(
        faults(&short(100), &short(99), &short(200)),
        [Fault::Length]
    );
    assert_eq!(faults(&short(100), &short(0), &short(200)), [Fault::Length]);
    assert_eq!(
        faults(&short(100), &short(201), &short(200)),
        [Fault::Length]
    );
    assert_eq!(
        faults(&version(5), &short(319), &version(5)),
        [Fault::Length]
    );
}

#[test]
fn an_error_of_fuse_leaves_one_side_open() {
    let one = |before: Option<u32>, after: Option<u32>| {
        let [before, after] = [before, after].map(|v| v.map(version));
        judge(SUBJECT, before.as_ref(), &version(5), after.as_ref()) == Verdict::Right
    };
    assert!(one(Some(4), None) && one(None, Some(6)) && one(Some(5), None));
    assert!(!one(Some(6), None) && !one(None, Some(4)));
    let zeros = view(vec![0; LENGTH]);
    let verdict = judge(SUBJECT, None, &zeros, Some(&version(5)));
    assert!(matches!(verdict, Verdict::Wrong(w) if w[0].fault == Fault::Zeros));
}

#[test]
fn a_finding_says_where_and_what() {
    let bypass = patched(&version(5), AT + 32, &content(stamp(3), AT + 32, 48));
    let Verdict::Wrong(wrong) = judge(SUBJECT, Some(&version(5)), &bypass, Some(&version(5)))
    else {
        panic!("a fault must be found");
    };
    assert_eq!(wrong.len(), 1);
    let first = &wrong[0];
    assert_eq!((first.offset, first.length), (AT + 32, 48));
    assert_eq!(first.stamp, Some(stamp(3)));
    assert_ne!(first.hex[0], first.hex[1]);
    assert_eq!(first.hex[1], first.hex[2]);
    assert_eq!(first.hex[0].len(), 64);
}

proptest! {
    /// Reads at any place, of views that reach further: one damaged byte is
    /// found, the undamaged read is right.
    #[test]
    fn one_damaged_byte_is_found(
        from in 0usize..100, length in 1usize..200, at in 0usize..200, change in 1u8..=255,
        written in 0usize..200, size in 32usize..100,
    ) {
        // Before: version 5; after: a write of version 6 into it.
        let before = version(5);
        let patch = content(stamp(6), AT + written as u64, size.min(LENGTH - written));
        let after = patched(&before, AT + written as u64, &patch);
        let at = at % length;
        for source in [&before, &after] {
            let mut bypass = View {
                offset: AT + from as u64,
                asked: length,
                bytes: source.bytes[from..from + length].to_vec(),
            };
            prop_assert_eq!(judge(SUBJECT, Some(&before), &bypass, Some(&after)), Verdict::Right);
            bypass.bytes[at] ^= change;
            let value = bypass.bytes[at];
            // By chance it can be the byte of the other version.
            if value != before.bytes[from + at] && value != after.bytes[from + at] {
                let verdict = judge(SUBJECT, Some(&before), &bypass, Some(&after));
                prop_assert!(matches!(verdict, Verdict::Wrong(_)), "{} {:?}", at, verdict);
            }
        }
    }
}
