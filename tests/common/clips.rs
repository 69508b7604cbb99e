//! For the reader's tests: a cached clip on each rclone, and what happens to it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::SystemTime;

use serde_json::Value;

use super::{content, eventually, need_root, put, rclones, rig_with};
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

/// Runs a test on each rclone, on a writable mount of a local folder with a
/// clip that is not cached yet; the folder is the test's second argument.
pub fn each_remote(size: usize, arguments: &[&str], test: impl Fn(&mut Rig, &Path, &[u8])) {
    need_root();
    for rclone in rclones() {
        let bytes = content(1, size);
        let remote = tempfile::tempdir().unwrap();
        put(remote.path(), CLIP, &bytes);
        let options = RigOptions {
            read_only: false,
            remote: Some(remote.path().to_str().unwrap().into()),
            ..options(&rclone, arguments)
        };
        let mut rig = rig_with(options, |_| ());
        test(&mut rig, remote.path(), &bytes);
    }
}

/// As [`each_remote`], with the clip cached whole.
pub fn each_writable(size: usize, arguments: &[&str], test: impl Fn(&mut Rig, &[u8])) {
    each_remote(size, arguments, |rig, _, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        test(rig, bytes);
    });
}

/// Reads bytes of a file through FUSE and keeps it open. rclone writes metadata
/// when the first opens a clip and when the last closes it: while this is held,
/// an edit of the metadata stays.
pub fn hold(path: &Path, offset: u64, length: usize) -> fs::File {
    let file = fs::File::open(path).unwrap();
    file.read_exact_at(&mut vec![0; length], offset).unwrap();
    file
}

/// Waits until rclone has uploaded the clip, or whatever there is of it: each
/// open of a changed clip puts its upload off, so the metadata is looked at.
pub fn wait_for_upload(rig: &Rig) {
    let metadata = cache_file(rig, "vfsMeta", CLIP);
    eventually("an upload", || {
        fs::read_to_string(&metadata)
            .unwrap()
            .contains("\"Dirty\": false")
    });
}

/// Changes the metadata of a clip, in place.
pub fn edit_metadata(rig: &Rig, name: &str, edit: impl Fn(String) -> String) {
    let path = cache_file(rig, "vfsMeta", name);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, edit(text)).unwrap();
}

/// Metadata that lists all of a clip of this size as present.
pub fn listing_all(text: &str, size: usize) -> String {
    let mut info: Value = serde_json::from_str(text).unwrap();
    info["Rs"] = serde_json::json!([{ "Pos": 0, "Size": size }]);
    serde_json::to_string(&info).unwrap()
}

/// As rclone writes a version of a file.
pub fn fingerprint(size: usize, time: SystemTime) -> String {
    let time = humantime::format_rfc3339_nanos(time).to_string();
    let time = time.replace('T', " ").replace('Z', " +0000 UTC");
    format!("{size},{time}")
}

/// Reads a file by the program, as root without CAP_SYS_PTRACE: the daemon's
/// descriptors are hidden then, and the cache file is found by its path. The
/// bytes, and the statistics.
pub fn read_without_ptrace(path: &Path) -> (Vec<u8>, Value) {
    let output = Command::new("setpriv")
        .args(["--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"])
        .arg(env!("CARGO_BIN_EXE_vmafx-bypass"))
        .args(["-q", "read", "--stats=json", "--"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = super::stderr(&output);
    assert!(output.status.success(), "{text}");
    let stats = serde_json::from_str(text.trim_end().lines().last().unwrap());
    (output.stdout, stats.unwrap())
}

/// An `rclone mount` in the place of a rig's own; unmounted when dropped.
pub struct Mounted {
    daemon: Child,
    point: PathBuf,
}

impl Mounted {
    /// Ends the rig's own, and mounts with its arguments after `edit`.
    pub fn instead(rig: &mut Rig, edit: impl Fn(&mut Vec<String>)) -> Self {
        let pid = rig.daemon().unwrap();
        let text = String::from_utf8(fs::read(format!("/proc/{pid}/cmdline")).unwrap()).unwrap();
        let mut arguments: Vec<String> = text.split_terminator('\0').map(str::to_owned).collect();
        edit(&mut arguments);
        rig.unmount();
        let daemon = Command::new(&arguments[0])
            .args(&arguments[1..])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mounted = Self {
            daemon,
            point: rig.mountpoint(),
        };
        eventually("another mount", || rig.is_mounted().unwrap());
        mounted
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Where the test has failed, readers may still be there.
        let _ = Command::new("umount").arg("-l").arg(&self.point).status();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A process whose calls of one kind are delayed, by strace(1), until this is
/// dropped.
pub struct Slow(Child);

impl Slow {
    /// `inject`: as of strace's option, `pwrite64:delay_enter=2s`.
    pub fn start(pid: u32, inject: &str) -> Self {
        let strace = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-p", &pid.to_string()])
            .args(["-e", &format!("inject={inject}")])
            .stdin(Stdio::null())
            .spawn()
            .expect("strace is installed by scripts/setup.sh");
        let slow = Self(strace);
        eventually("every thread traced", || {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            let mut states = threads.flatten().filter_map(|thread| {
                let status = fs::read_to_string(thread.path().join("status"));
                Some(status.ok()?.contains("TracerPid:\t0\n"))
            });
            !states.any(|untraced| untraced)
        });
        slow
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // It lets the process go; killed, it could not.
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
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
    set_time(&path, time);
}

/// Sets when a file was last changed.
pub fn set_time(path: &Path, time: &str) {
    let touched = Command::new("touch").args(["-d", time]).arg(path).status();
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
