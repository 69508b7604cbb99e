//! `exec --fill`: clips that are not whole are completed before they are handed
//! over, within limits.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::clips::{CLIP, MIB, each_rclone};
use common::exec::*;
use common::{content, need_root, put, rclones, rig_of, rig_with};
use vmafx_bypass::rig::Rig;

fn number(done: &Done, name: &str) -> u64 {
    done.report[name].as_u64().unwrap()
}

fn fill(folder: &Path, options: &[&str], script: &str) -> Done {
    run_in(
        folder,
        &[&["--fill"], options].concat(),
        &["bash", "-c", script],
    )
}

#[test]
fn clips_are_completed_and_handed_over() {
    each(|rig| {
        let mount = rig.mountpoint();
        let done = fill(&mount, &[], "cat partial clip");
        let expected = [bytes_of(PARTIAL), bytes_of("clip")].concat();
        assert!(done.stdout == expected, "{}", done.stderr);
        assert_eq!(done.substituted(), 2, "{}", done.report);
        assert_eq!(number(&done, "filled"), 1, "{}", done.report);
        // What was cached is not read again.
        let read = number(&done, "fill_bytes");
        assert!(
            (1..bytes_of(PARTIAL).len() as u64).contains(&read),
            "{read}"
        );
        // Whole by now; and without --fill nothing is completed.
        let done = run_in(&mount, &[], &["cat", PARTIAL]);
        assert_eq!((done.substituted(), number(&done, "filled")), (1, 0));
    });
}

/// With rclone's own settings, a newer one keeps clips open for 5 seconds.
#[test]
fn clips_of_which_nothing_is_cached_are_completed() {
    need_root();
    for rclone in rclones() {
        let rig = rig_of(&rclone, |source| {
            put(source, CLIP, &content(1, 3 * MIB));
            put(source, "empty", b"");
        });
        let done = fill(&rig.mountpoint(), &[], "cat clip empty");
        assert!(done.stdout == content(1, 3 * MIB), "{}", done.stderr);
        assert_eq!(number(&done, "filled"), 1, "{}", done.report);
        assert_eq!(number(&done, "fill_bytes"), 3 * MIB as u64);
        assert!(done.substituted() >= 1, "{}", done.report);
    }
}

#[test]
fn opens_of_one_clip_wait_for_one_fill() {
    each_rclone(6 * MIB, &[], |rig, bytes| {
        let script = "for i in {1..12}; do cksum clip & done; wait";
        let done = fill(&rig.mountpoint(), &[], script);
        let plain = plainly(&rig.mountpoint(), &["cksum", "clip"]).stdout;
        assert!(done.stdout == plain.repeat(12), "{}", done.text());
        assert_eq!(done.substituted(), 12, "{}", done.report);
        assert_eq!(number(&done, "filled"), 1, "{}", done.report);
        assert_eq!(number(&done, "fill_bytes"), bytes.len() as u64);
    });
}

#[test]
fn what_misses_too_much_is_not_begun() {
    each_rclone(2 * MIB, &[], |rig, bytes| {
        let script = "head -c 1000 clip; true < clip";
        let done = fill(&rig.mountpoint(), &["--fill-max-size=1MiB"], script);
        assert!(done.stdout == bytes[..1000], "{}", done.stderr);
        // Nor is it tried again at once.
        assert_eq!(number(&done, "fill_failed"), 1, "{}", done.report);
        assert_eq!(number(&done, "fill_bytes"), 0, "{}", done.report);
        assert_eq!((done.substituted(), number(&done, "filled")), (0, 0));
    });
}

/// A clip that would take two minutes to read, and one that is cached.
fn slow(rclone: &Path) -> Rig {
    let arguments = [
        "--bwlimit=64k",
        "--vfs-read-chunk-size=128k",
        "--buffer-size=0",
    ];
    let options = common::clips::options(rclone, &arguments);
    let rig = rig_with(options, |source| {
        put(source, CLIP, &content(1, 8 * MIB));
        put(source, "b", &bytes_of("b"));
    });
    rig.cache_whole(Path::new("b")).unwrap();
    rig
}

#[test]
fn no_open_waits_longer_than_it_may() {
    need_root();
    for rclone in rclones() {
        let rig = slow(&rclone);
        let done = fill(
            &rig.mountpoint(),
            &["--fill-timeout=2s"],
            "head -c 1000 clip; cat b; true < clip",
        );
        let expected = [&content(1, 1000)[..], &bytes_of("b")].concat();
        assert!(done.stdout == expected, "{}", done.stderr);
        assert_eq!(number(&done, "fill_failed"), 1, "{}", done.report);
        assert_eq!((done.substituted(), number(&done, "filled")), (1, 0));
    }
}

#[test]
fn others_are_served_and_who_waits_can_be_killed() {
    need_root();
    for rclone in rclones() {
        let rig = slow(&rclone);
        let script = "cat clip > /dev/null & sleep 1; cat b; kill -9 $!; wait $!; echo $?";
        let done = fill(&rig.mountpoint(), &[], script);
        let expected = [&bytes_of("b")[..], b"137\n"].concat();
        assert!(done.stdout == expected, "{}", done.stderr);
        assert_eq!(done.substituted(), 1, "{}", done.report);
        let ends = [number(&done, "filled"), number(&done, "fill_failed")];
        assert_eq!(ends, [0, 0], "{}", done.report);
    }
}

#[test]
fn a_signal_with_a_handler_ends_the_wait() {
    let rig = slow(Path::new("rclone"));
    need_root();
    let script = "def f(n,s): print('signal',flush=True)\n\
        signal.signal(signal.SIGALRM,f); signal.setitimer(signal.ITIMER_REAL,1)\n\
        g=open('clip','rb',0); print(len(g.read(100)))";
    let done = run_in(&rig.mountpoint(), &["--fill"], &python(script));
    assert_eq!(done.text(), "signal\n100\n", "{}", done.stderr);
    assert_eq!((done.substituted(), number(&done, "filled")), (0, 0));
}
