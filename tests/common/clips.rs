//! For the reader's tests: a cached clip on each rclone, and what happens to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{content, need_root, put, rclones, rig_with};
use vmafx_bypass::BypassFile;
use vmafx_bypass::rig::{Rig, RigOptions};

pub const MIB: usize = 1 << 20;
pub const CLIP: &str = "clip";

/// Options for a program; a newer rclone would keep a clip open for 5 seconds
/// after its last close, and tests would wait for it.
pub fn options(rclone: &Path, arguments: &[&str]) -> RigOptions {
    let mut mount_arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
    if rclone.is_absolute() {
        mount_arguments.push("--vfs-handle-caching=0s".into());
    }
    RigOptions {
        rclone: rclone.into(),
        mount_arguments,
        ..RigOptions::default()
    }
}

/// Runs a test on each rclone, with a clip of so many bytes.
pub fn each_rclone(size: usize, arguments: &[&str], test: impl Fn(&mut Rig, &[u8])) {
    need_root();
    for rclone in rclones() {
        let bytes = content(1, size);
        let mut rig = rig_with(options(&rclone, arguments), |s| put(s, CLIP, &bytes));
        test(&mut rig, &bytes);
    }
}

pub fn clip(rig: &Rig) -> PathBuf {
    rig.mountpoint().join(CLIP)
}

pub fn open(rig: &Rig) -> BypassFile {
    BypassFile::open(clip(rig)).unwrap()
}

/// Caches the clip whole and opens it: bypassed.
pub fn open_cached(rig: &Rig) -> BypassFile {
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let file = open(rig);
    assert_eq!(file.refusal(), None);
    file
}

pub fn read_all(file: &BypassFile) -> Vec<u8> {
    let mut bytes = vec![0; file.size().unwrap() as usize + 1];
    let n = file.read_at(&mut bytes, 0).unwrap();
    bytes.truncate(n);
    bytes
}

/// The one file below `vfs` or `vfsMeta` of this name.
pub fn cache_file(rig: &Rig, kind: &str, name: &str) -> PathBuf {
    let found = Command::new("find")
        .arg(rig.cache().join(kind))
        .args(["-type", "f", "-name", name])
        .output()
        .unwrap();
    PathBuf::from(String::from_utf8(found.stdout).unwrap().trim_end())
}

/// Replaces the clip at the remote, with a time of its own.
pub fn replace_remote(rig: &Rig, bytes: &[u8], time: &str) {
    let path = rig.source().join(CLIP);
    fs::write(&path, bytes).unwrap();
    let touched = Command::new("touch").args(["-d", time]).arg(&path).status();
    assert!(touched.unwrap().success());
}

pub fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            files.extend(walk(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files
}
