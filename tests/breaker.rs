//! Differences in two files end every bypass of the process; so this test has
//! a process to itself.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::clips::*;
use common::{content, need_root, put, rig_with};
use vmafx_bypass::{BypassFile, Reason, Verify};

#[test]
fn two_files_that_differ_end_every_bypass() {
    need_root();
    let names = ["one", "two", "three"];
    let bytes = content(1, 2 * MIB);
    let rig = rig_with(options(Path::new("rclone"), &[]), |source| {
        for name in names {
            put(source, name, &bytes);
        }
    });
    let open = |name: &str| BypassFile::open(rig.mountpoint().join(name)).unwrap();
    let files = names.map(|name| {
        rig.cache_whole(Path::new(name)).unwrap();
        let file = open(name);
        assert_eq!(file.refusal(), None);
        fs::read(rig.mountpoint().join(name)).unwrap();
        file
    });
    let [one, two, three] = files;
    let damage = |name: &str| {
        let data = cache_file(&rig, "vfs", name);
        let data = fs::OpenOptions::new().write(true).open(data).unwrap();
        data.write_all_at(b"!!!", MIB as u64).unwrap();
    };
    let reason = |file: &BypassFile| file.refusal().map(|refusal| refusal.reason);
    let one = one.verifying(Verify::Full);
    damage("one");
    assert!(read_all(&one) == bytes);
    assert_eq!(one.mismatch(), Some(MIB as u64));
    // Alone: the others go on.
    assert!(read_all(&three) == bytes);
    assert_eq!(
        (reason(&one), reason(&three)),
        (Some(Reason::Quarantined), None)
    );
    let before = three.stats().cache_bytes;
    assert_eq!(before, bytes.len() as u64);
    let two = two.verifying(Verify::Sample);
    damage("two");
    // The first read is sampled; so small, all of it.
    let mut start = [0; 3];
    two.read_at(&mut start, MIB as u64).unwrap();
    assert!(start == bytes[MIB..MIB + 3]);
    assert_eq!(two.mismatch(), Some(MIB as u64));
    assert!(read_all(&three) == bytes);
    assert_eq!(three.stats().cache_bytes, before);
    assert_eq!(reason(&three), Some(Reason::Quarantined));
    assert_eq!(reason(&open("three")), Some(Reason::Quarantined));
}
