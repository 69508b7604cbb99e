//! Clips that only their bytes tell apart, and what a reader gets of them.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;

use super::clips::{options, read_all};
use super::{content, eventually, need_root, put, rclones};
use vmafx_bypass::rig::RigOptions;
use vmafx_bypass::{BypassFile, Reason};

pub const SIZE: usize = 300_000;
pub const TIME: &str = "2020-01-01T00:00:00Z";

/// A clip whose size and time are those of every other.
pub fn put_alike(folder: &Path, name: &str, seed: u32) {
    put(folder, name, &content(seed, SIZE));
    let path = folder.join(name);
    let touched = Command::new("touch").args(["-d", TIME]).arg(path).status();
    assert!(touched.unwrap().success());
}

pub fn remote(rclone: &Path, remote: &str, arguments: &[&str]) -> RigOptions {
    RigOptions {
        remote: Some(remote.into()),
        environment: ["A", "B", "LOC"]
            .map(|name| (format!("RCLONE_CONFIG_{name}_TYPE"), "local".into()))
            .to_vec(),
        ..options(rclone, arguments)
    }
}

/// What a reader gets: its refusal, if any; the bytes are the seed's either way.
pub fn read(path: &Path, seed: u32) -> Option<Reason> {
    let file = BypassFile::open(path).unwrap();
    let refusal = file.refusal();
    assert!(read_all(&file) == content(seed, SIZE), "{}", path.display());
    let cached = file.stats().cache_bytes;
    assert_eq!(cached, if refusal.is_none() { SIZE as u64 } else { 0 });
    refusal.map(|refusal| {
        println!("{refusal}");
        refusal.reason
    })
}

/// A newer rclone would keep clips open for 5 seconds after their last close.
pub fn closed_at_once(rclone: &Path) -> Option<(&str, &str)> {
    rclone
        .is_absolute()
        .then_some(("RCLONE_VFS_HANDLE_CACHING", "0s"))
}

/// Waits until a clip is bypassed; whatever is read meanwhile is right.
pub fn becomes_bypassed(path: &Path, seed: u32) {
    assert_eq!(fs::read(path).unwrap(), content(seed, SIZE));
    eventually("a bypassed clip", || read(path, seed).is_none());
}

/// Holds a clip open, so that rclone does, too.
pub struct Holder {
    _file: File,
}

impl Holder {
    pub fn of(path: &Path) -> Self {
        let mut file = File::open(path).unwrap();
        file.read_exact(&mut [0; 1000]).unwrap();
        Self { _file: file }
    }
}

pub fn each(test: impl Fn(&Path)) {
    need_root();
    for rclone in rclones() {
        test(&rclone);
    }
}

/// Waits until two clips are bypassed while both are in use.
pub fn both_bypassed(a: &Path, b: &Path) {
    let holders = (Holder::of(a), Holder::of(b));
    becomes_bypassed(a, 1);
    becomes_bypassed(b, 2);
    drop(holders);
}
