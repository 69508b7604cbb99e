use std::time::{Duration, UNIX_EPOCH};

use fuser::{FileType, INodeNo};

use super::*;
use crate::cache::proof::Timestamp;

pub(super) fn attr(ino: u64, size: u64, seconds: u64) -> FileAttr {
    let time = UNIX_EPOCH + Duration::from_secs(seconds);
    FileAttr {
        ino: INodeNo(ino),
        size,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: FileType::RegularFile,
        perm: 0o644,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

pub(super) fn edition(version: Version, file: u64) -> Edition {
    Edition::for_tests(version.size, version.modified, file)
}

const A: SnapshotId = SnapshotId { dev: 1, ino: 1 };
const B: SnapshotId = SnapshotId { dev: 1, ino: 2 };

/// Opens, and names what came of it.
fn open(nodes: &mut Nodes<()>, id: u64, attr: &FileAttr, wanted: Wanted) -> String {
    let version = Some(Version::of_attr(attr));
    let back = || Ok::<_, ()>(());
    match nodes.admit(id, version, wanted, back).unwrap() {
        Admission::Whole(_) => "whole".into(),
        Admission::Ranges { keep, .. } => format!("ranges, keep {keep}"),
        Admission::Direct => "direct".into(),
        Admission::Stale => "stale".into(),
    }
}

fn path() -> &'static Path {
    Path::new("a/clip")
}

#[test]
fn a_clip_that_becomes_whole_gets_another_node_while_it_is_open() {
    let mut nodes = Nodes::new();
    let shown = attr(7, 100, 1);
    let version = Version::of_attr(&shown);
    let by_ranges = Wanted::Ranges(edition(version, 1));
    let id = nodes.enter(path(), &shown, false);
    assert_eq!(id, 7);
    let first = open(&mut nodes, id, &shown, by_ranges);
    assert_eq!(first, "ranges, keep false");
    assert_eq!(open(&mut nodes, id, &shown, Wanted::Whole(A)), "stale");
    let second = nodes.enter(path(), &shown, false);
    assert_ne!(second, id);
    assert_eq!(open(&mut nodes, second, &shown, Wanted::Whole(A)), "whole");
    assert_eq!(open(&mut nodes, second, &shown, Wanted::Whole(A)), "whole");
    assert!(nodes.is_whole(second) && !nodes.is_whole(id));
    // Who has the old node still reads by ranges.
    assert_eq!(
        open(&mut nodes, id, &shown, by_ranges),
        "ranges, keep false"
    );
    // Evicted, and by ranges again: a third; and one more that programs may write.
    assert_eq!(open(&mut nodes, second, &shown, by_ranges), "stale");
    let third = nodes.enter(path(), &shown, false);
    assert_eq!(third, MADE_UP + 2);
    assert_eq!(
        open(&mut nodes, third, &shown, by_ranges),
        "ranges, keep false"
    );
    assert_eq!(open(&mut nodes, third, &shown, Wanted::Direct), "stale");
    let fourth = nodes.enter(path(), &shown, false);
    assert_eq!(open(&mut nodes, fourth, &shown, Wanted::Direct), "direct");
    assert_eq!(open(&mut nodes, fourth, &shown, Wanted::Direct), "direct");
    assert_eq!(open(&mut nodes, fourth, &shown, Wanted::Whole(A)), "stale");
    for (id, opens) in [(second, 2), (id, 2), (third, 1)] {
        for left in (0..opens).rev() {
            assert_eq!(nodes.close(id).is_some(), left == 0 && id == second);
            assert_eq!(nodes.frozen(id).is_some(), left > 0);
        }
    }
    assert!(nodes.close(id).is_none());
    // What programs may write shows what it is now.
    assert_eq!(nodes.frozen(fourth), None);
    assert_eq!(nodes.show(fourth, &attr(7, 5, 9)).unwrap().size, 5);
}

#[test]
fn another_snapshot_or_version_is_another_node() {
    let mut nodes = Nodes::new();
    let (old, new) = (attr(7, 100, 1), attr(7, 90, 2));
    let first = nodes.enter(path(), &old, false);
    // The version that was opened is not the one that the kernel was told of.
    assert_eq!(open(&mut nodes, first, &new, Wanted::Whole(A)), "stale");
    let id = nodes.enter(path(), &new, false);
    assert_ne!(id, first, "nobody knows when the kernel notes another size");
    assert_eq!(nodes.show(first, &new).map(|attr| attr.size), None);
    assert_eq!(open(&mut nodes, id, &new, Wanted::Whole(A)), "whole");
    assert_eq!(open(&mut nodes, id, &new, Wanted::Whole(B)), "stale");
    let other = nodes.enter(path(), &new, false);
    assert_ne!(other, id);
    assert_eq!(open(&mut nodes, other, &new, Wanted::Whole(B)), "whole");
    // An open node shows what was opened, whatever came after.
    let newer = attr(7, 5, 3);
    assert_eq!(nodes.frozen(id).unwrap().size, 90);
    let newest = nodes.enter(path(), &newer, false);
    assert!(newest != other && newest != id);
    assert_eq!(nodes.frozen(newest), None);
    // Once it is free, a file has its own number again.
    assert!(newest > MADE_UP && first == 7);
    nodes.forget(first, 1);
    assert_eq!(nodes.enter(path(), &newer, false), 7);
    assert_eq!(nodes.enter(path(), &newer, false), 7);
}

#[test]
fn who_was_told_to_look_again_finds_a_node_that_no_other_opens() {
    let mut nodes = Nodes::new();
    let shown = attr(7, 100, 1);
    let first = nodes.enter(path(), &shown, false);
    let alone = nodes.enter(path(), &shown, true);
    assert_ne!(alone, first);
    assert_eq!(nodes.enter(path(), &shown, false), first);
    assert_eq!(open(&mut nodes, first, &shown, Wanted::Whole(A)), "whole");
    assert_eq!(open(&mut nodes, first, &shown, Wanted::Whole(B)), "stale");
    assert_eq!(open(&mut nodes, alone, &shown, Wanted::Whole(B)), "whole");
    // Open, it is for all.
    assert_eq!(nodes.enter(path(), &shown, false), alone);
}

#[test]
fn pages_are_kept_only_of_one_edition() {
    let mut nodes = Nodes::new();
    let shown = attr(7, 100, 1);
    let version = Version::of_attr(&shown);
    let id = nodes.enter(path(), &shown, false);
    let mut reopen = |file: Option<u64>, taint: bool| {
        let edition = match file {
            Some(file) => edition(version, file),
            None => Edition::uncertain_for_tests(version.size, version.modified),
        };
        let (keep, pages) = by_ranges(&mut nodes, id, edition);
        if !keep {
            pages.were_dropped();
        }
        if taint {
            pages.taint();
        }
        nodes.close(id);
        keep
    };
    assert!(!reopen(Some(1), false));
    assert!(reopen(Some(1), false));
    assert!(!reopen(Some(2), false), "another cache file");
    assert!(reopen(Some(2), true));
    assert!(!reopen(Some(2), false), "a page was not certain");
    assert!(!reopen(None, false), "no cache file");
    assert!(!reopen(None, false), "nor then");
    // What was whole in between leaves no pages that are known.
    assert!(!reopen(Some(2), false));
    assert_eq!(open(&mut nodes, id, &shown, Wanted::Whole(A)), "whole");
    nodes.close(id);
    let again = Wanted::Ranges(edition(version, 2));
    let kept = open(&mut nodes, id, &shown, again);
    assert_eq!(kept, "ranges, keep false");
}

/// Opens by ranges: whether pages are kept.
fn by_ranges(nodes: &mut Nodes<()>, id: u64, edition: Edition) -> (bool, Arc<Pages>) {
    let back = || Ok::<_, ()>(());
    let admitted = nodes.admit(id, None, Wanted::Ranges(edition), back);
    let Ok(Admission::Ranges { keep, pages }) = admitted else {
        panic!("not by ranges");
    };
    (keep, pages)
}

#[test]
fn pages_of_an_older_version_are_dropped_by_all_until_one_has() {
    let mut nodes = Nodes::new();
    let shown = attr(7, 100, 1);
    let version = Version::of_attr(&shown);
    let id = nodes.enter(path(), &shown, false);
    let (old, new) = (edition(version, 1), edition(version, 2));
    let (_, pages) = by_ranges(&mut nodes, id, old);
    pages.were_dropped();
    nodes.close(id);
    // Two open the new one; whether the kernel has come to drop for the first is
    // not known before it reads.
    let (keep, _) = by_ranges(&mut nodes, id, new);
    assert!(!keep);
    let (keep, _) = by_ranges(&mut nodes, id, new);
    assert!(!keep);
    // They close without a read: the old pages may still be there.
    nodes.close(id);
    nodes.close(id);
    let (keep, pages) = by_ranges(&mut nodes, id, new);
    assert!(!keep);
    pages.were_dropped();
    assert!(by_ranges(&mut nodes, id, new).0);
}

#[test]
fn what_the_kernel_forgets_is_gone() {
    let mut nodes: Nodes<()> = Nodes::new();
    let shown = attr(7, 100, 1);
    let id = nodes.enter(path(), &shown, false);
    assert_eq!(nodes.enter(path(), &shown, false), id);
    nodes.forget(id, 1);
    assert_eq!(nodes.path(id).as_deref(), Some(path()));
    nodes.forget(id, 1);
    nodes.forget(99, 1);
    assert_eq!((nodes.len(), nodes.path(id)), (0, None));
    assert!(nodes.current.is_empty());
    assert_eq!(nodes.path(ROOT).as_deref(), Some(Path::new("")));
    // A later file of the same number, at another path, beside one that is known.
    let one = nodes.enter(Path::new("x"), &shown, false);
    let other = nodes.enter(Path::new("y"), &shown, false);
    assert!(one == 7 && other >= MADE_UP);
    // A forgotten node does not take the path from its successor.
    let folder = FileAttr {
        kind: FileType::Directory,
        ..shown
    };
    let successor = nodes.enter(Path::new("x"), &folder, false);
    assert!(nodes.show(one, &folder).is_none());
    assert!(nodes.show(successor, &folder).is_some());
    nodes.forget(one, 1);
    assert_eq!(nodes.current.get(Path::new("x")), Some(&successor));
    // Nor does the successor, when it is forgotten, from who has the file's own number.
    assert_eq!(nodes.enter(Path::new("x"), &folder, false), 7);
    nodes.forget(successor, 1);
    assert_eq!(nodes.current.get(Path::new("x")), Some(&7));
}

#[test]
fn a_backing_file_that_cannot_be_registered_opens_nothing() {
    let mut nodes: Nodes<()> = Nodes::new();
    let shown = attr(7, 100, 1);
    let id = nodes.enter(path(), &shown, false);
    let version = Version::of_attr(&shown);
    let failed = nodes.admit(id, Some(version), Wanted::Whole(A), || Err("no"));
    assert_eq!(failed.unwrap_err(), "no");
    assert_eq!(nodes.frozen(id), None);
    let time = Timestamp {
        seconds: 1,
        nanos: 0,
    };
    assert_eq!(version.modified, time);
}
