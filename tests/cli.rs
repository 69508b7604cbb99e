//! The command line without root and without rclone: usage, plain files,
//! exit codes.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use common::{assert_fails, content, program, run, stderr};

fn file(bytes: &[u8]) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, bytes).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (dir, path)
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in [
        &[][..],
        &["nonsense"],
        &["read"],
        &["run"],
        &["bench"],
        &["read", "f", "--offset", "1.5"],
        &["read", "f", "--block-size", "0"],
        &["run", "--prefix", "/", "--ring-size", "5000"],
        &["run", "--prefix", "/", "--wait=soon"],
        &["bench", "f", "--gate", "-1"],
        &["bench", "f", "--gate", "4KiB=9", "--block-size", "64KiB"],
        &["bench", "f", "--gate", "9", "--engines", "fuse,raw"],
        &["-q", "-v", "read", "f"],
    ] {
        let output = run(args);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            stderr(&output)
        );
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    for args in [
        &["--help"][..],
        &["--version"],
        &["run", "--help"],
        &["bench", "-h"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0));
        assert!(!output.stdout.is_empty() && output.stderr.is_empty());
    }
}

#[test]
fn the_version_names_revision_libbpf_and_the_oldest_kernel() {
    let build = vmafx_bypass::version::build();
    let short = format!("vmafx-bypass {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(run(&["-V"]).stdout, short.as_bytes());
    let libbpf = match build.libbpf {
        Some((major, minor)) => format!("libbpf {major}.{minor}"),
        None => "no tracker".into(),
    };
    assert_eq!(build.libbpf.is_some(), cfg!(feature = "ebpf"));
    let long = format!(
        "vmafx-bypass {} ({}, {libbpf}, linux 5.15 or newer)\n",
        env!("CARGO_PKG_VERSION"),
        build.revision
    );
    assert_eq!(run(&["--version"]).stdout, long.as_bytes());
    // Of a commit or, in a source archive, of none.
    let commit = build.revision.split('-').next().unwrap();
    let is_commit = commit.len() == 12 && commit.bytes().all(|b| b.is_ascii_hexdigit());
    let given = option_env!("VMAFX_BYPASS_REVISION");
    assert!(
        is_commit || commit == "unknown" || given == Some(build.revision),
        "{build}"
    );
}

#[test]
fn run_wants_an_opt_in_first() {
    let prefix = ["run", "--prefix", "/"];
    assert_fails(&run(&prefix), 3, "set VMAFX_EBPF_BYPASS=1");
    let killed = program()
        .env("VMAFX_EBPF_BYPASS", "0")
        .args(prefix)
        .arg("--enable")
        .output()
        .unwrap();
    assert_fails(&killed, 3, "VMAFX_EBPF_BYPASS=0");
}

#[cfg(not(feature = "ebpf"))]
#[test]
fn a_build_without_ebpf_says_so() {
    assert_fails(
        &run(&["run", "--prefix", "/", "--enable"]),
        3,
        "feature `ebpf`",
    );
    assert_fails(&run(&["dump-map"]), 3, "feature `ebpf`");
}

#[test]
fn a_plain_file_reads_plainly() {
    let bytes = content(1, 300_000);
    let (_dir, path) = file(&bytes);
    let output = run(&["read", &path, "--stats=json"]);
    assert!(output.status.success() && output.stdout == bytes);
    let stats: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(stats["schema"], 1);
    assert_eq!(stats["path"], path);
    assert_eq!(stats["state"], "not_fuse");
    assert_eq!(stats["bytes"], 300_000);
    assert_eq!(stats["cache_bytes"], 0);
    assert_eq!(stats["fuse_bytes"], 300_000);
    assert_eq!(
        stats["bytes_by_reason"],
        serde_json::json!({"not_fuse": 300_000})
    );
    assert!(stats["open_ns"].as_u64().unwrap() > 0 && stats["read_ns"].as_u64().unwrap() > 0);
}

#[test]
fn ranges_are_exact() {
    let bytes = content(2, 100_000);
    let (_dir, path) = file(&bytes);
    for (offset, length) in [
        ("0", "0"),
        ("0", "1"),
        ("99999", "5"),
        ("100000", "1"),
        ("1KiB", "50KiB"),
        ("18446744073709551615", "1"),
        ("9223372036854775807", "9"),
        ("5", "1TiB"),
    ] {
        let output = run(&[
            "read",
            &path,
            "--offset",
            offset,
            "--length",
            length,
            "--block-size",
            "7000",
        ]);
        assert!(output.status.success(), "{}", stderr(&output));
        let number = |text: &str| {
            text.parse::<u64>().unwrap_or(match text {
                "1KiB" => 1 << 10,
                "50KiB" => 50 << 10,
                _ => 1 << 40,
            })
        };
        let start = number(offset).min(bytes.len() as u64) as usize;
        let end = (start as u64)
            .saturating_add(number(length))
            .min(bytes.len() as u64) as usize;
        assert!(output.stdout == bytes[start..end], "{offset} {length}");
    }
}

#[test]
fn bad_files_fail_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    assert_fails(&run(&["read", "/no/such"]), 1, "`/no/such`");
    assert_fails(
        &run(&["read", dir.path().to_str().unwrap()]),
        1,
        "is a directory",
    );
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_fails(
        &run(&["read", fifo.to_str().unwrap()]),
        1,
        "not a regular file",
    );
    assert_fails(&run(&["bench", "/no/such"]), 1, "`/no/such`");
}

#[test]
fn an_output_file_is_whole_or_not_there() {
    let (dir, path) = file(b"content");
    let target = dir.path().join("out");
    let out = target.to_str().unwrap();
    assert!(run(&["-q", "read", &path, "-o", out]).status.success());
    assert_eq!(fs::read(&target).unwrap(), b"content");
    // The umask applies, as to any new file.
    let mode = fs::metadata(&target).unwrap().permissions().mode();
    assert_eq!(mode & 0o600, 0o600);
    // A symlink stays one; its target is replaced.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&target, &link).unwrap();
    assert!(
        run(&["read", &path, "--length=3", "-o", link.to_str().unwrap()])
            .status
            .success()
    );
    assert_eq!(fs::read(&target).unwrap(), b"con");
    assert!(link.is_symlink());
    // A device is written to, not replaced; and a full one is an error.
    assert!(run(&["read", &path, "-o", "/dev/null"]).status.success());
    assert_fails(
        &run(&["read", &path, "-o", "/dev/full"]),
        1,
        "No space left",
    );
    let folder = dir.path().to_str().unwrap();
    assert_fails(&run(&["read", &path, "-o", folder]), 1, "is a folder");
    assert_fails(
        &run(&["read", &path, "-o", "/no/such/out"]),
        1,
        "/no/such/out",
    );
    let left = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 3, "no temporary file is left");
}

#[test]
fn a_closed_standard_output_is_no_error() {
    let (_dir, path) = file(&content(3, 10 << 20));
    let mut child = program()
        .args(["read", &path])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut some = [0; 100];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(output.stderr.is_empty());
}

#[test]
fn a_signal_ends_read_with_its_code_and_without_leftovers() {
    // More than a pipe holds.
    let (dir, path) = file(&content(4, 4 << 20));
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        // A pipe that nobody reads holds it in the middle of its work.
        let mut child = program()
            .args(["read", &path])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 1];
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut first).unwrap();
        let kill = Command::new("kill")
            .args(["-s", signal, &child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
        common::eventually("its taking the signal", || {
            let pending = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
            pending.lines().any(|l| {
                l.strip_prefix("ShdPnd:\t")
                    .is_some_and(|p| p.trim_start_matches('0').is_empty())
            })
        });
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest).unwrap();
        let code_now = child.wait().unwrap().code();
        assert_eq!(code_now, Some(code));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

#[test]
fn the_kill_switch_sends_all_through_fuse_and_says_so() {
    let (_dir, path) = file(b"abc");
    let output = program()
        .env("VMAFX_EBPF_BYPASS", "0")
        .args(["read", &path, "--stats=json"])
        .output()
        .unwrap();
    assert!(output.status.success() && output.stdout == b"abc");
    assert!(stderr(&output).contains("\"state\":\"disabled\""));
    assert!(stderr(&output).contains("came through FUSE: disabled"));
}
