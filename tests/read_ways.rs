//! The ways in which `read` reads and writes.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use common::clips::{CLIP, MIB, clip, each_rclone};
use common::{assert_fails, content, need_root, program, run, stderr};
use nix::fcntl::{FcntlArg, fcntl};
use serde_json::Value;

#[test]
fn a_whole_clip_is_read_from_a_map() {
    each_rclone(3 * MIB, &[], |rig, _| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let bytes = content(1, 3 * MIB);
        let path = clip(rig);
        let path = path.to_str().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let read = |more: &[&str]| {
            let mut args = vec!["read", path, "--engine=mmap", "--stats=json"];
            args.extend(["--output", output.to_str().unwrap()]);
            args.extend(more);
            let done = run(&args);
            assert!(done.status.success(), "{}", stderr(&done));
            let told = stderr(&done);
            let report: Value = serde_json::from_str(told.trim()).unwrap();
            assert_eq!(report["state"], "active");
            assert_eq!(report["bytes"], report["cache_bytes"]);
            fs::read(&output).unwrap()
        };
        assert!(read(&[]) == bytes);
        let part = read(&["--offset=1000001", "--length=70000", "--block-size=4KiB"]);
        assert!(part == bytes[1_000_001..1_070_001]);
        assert!(read(&["--offset=3MiB"]).is_empty());
        assert!(read(&["--offset=4GiB", "--length=1"]).is_empty());
        assert!(read(&["--offset=3145727", "--length=9"]) == bytes[3 * MIB - 1..]);
        let both = ["read", path, "--engine=mmap", "--verify=full"];
        assert_fails(&run(&both), 2, "leave out --engine mmap");
    });
}

#[test]
fn what_cannot_be_mapped_is_read_and_told() {
    each_rclone(MIB, &[], |rig, _| {
        let path = clip(rig);
        let args = ["read", path.to_str().unwrap(), "--engine=mmap"];
        let output = run(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(output.stdout == content(1, MIB));
        assert!(stderr(&output).contains("is not mapped: "));
        let killed = program().env("VMAFX_EBPF_BYPASS", "0").args(args).output();
        let killed = killed.unwrap();
        assert!(killed.stdout == content(1, MIB));
        assert!(stderr(&killed).contains("is not mapped: disabled"));
    });
    assert_fails(&run(&["read", "/no/such", "--engine=mmap"]), 1, "/no/such");
}

#[test]
fn a_pipe_is_made_large() {
    need_root();
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = content(1, 3 * MIB);
    fs::write(&file, &bytes).unwrap();
    let mut child = program()
        .args(["read", "-q"])
        .arg(file.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = File::from(std::os::fd::OwnedFd::from(child.stdout.take().unwrap()));
    let mut read = vec![0];
    pipe.read_exact(&mut read).unwrap();
    assert_eq!(fcntl(&pipe, FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 20);
    pipe.read_to_end(&mut read).unwrap();
    assert!(read == bytes);
    assert!(child.wait().unwrap().success());
}
