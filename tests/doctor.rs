//! `doctor` says what works here and what does not.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{content, need_root, program, put, rig};
use serde_json::Value;

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

/// In a mount namespace of its own that the shell script `prepare` changes, by
/// a command before it.
fn doctor_in(prepare: &str, setpriv: &str) -> Output {
    let script = format!("{prepare} exec {setpriv} \"$0\" doctor --format json");
    Command::new("unshare")
        .args([
            "--mount",
            "sh",
            "-ec",
            &script,
            env!("CARGO_BIN_EXE_vmafx-bypass"),
        ])
        .output()
        .unwrap()
}

fn check<'a>(document: &'a Value, name: &str) -> &'a Value {
    let checks = document["checks"].as_array().unwrap().iter();
    checks
        .clone()
        .find(|check| check["name"] == name)
        .unwrap_or_else(|| panic!("no check {name}: {document}"))
}

#[test]
fn a_host_where_run_works_is_told_which_ways_attach_and_which_mounts_there_are() {
    need_root();
    let rig = rig(|source| put(source, "clip", &content(1, 100)));
    let mount = rig.mountpoint();
    let prefix = format!("--prefix={}", mount.display());
    let output = program()
        .args(["doctor", "--format=json", &prefix])
        .output()
        .unwrap();
    let document = json(&output);
    assert_eq!(
        (output.status.code(), &document["ok"]),
        (Some(0), &true.into())
    );
    for name in ["kernel", "rights", "btf", "bpf_fs", "attach", "prefix"] {
        let check = check(&document, name);
        assert_eq!(
            (&check["pass"], &check["needed"]),
            (&true.into(), &true.into())
        );
    }
    // What it says of each mode is what `run` does.
    for mode in ["fentry", "raw", "tracepoint"] {
        let said = &check(&document, &format!("attach_{mode}"))["pass"];
        let pins = format!("--pin-dir=/sys/fs/bpf/vmafx-doctor-{}", std::process::id());
        let run = program()
            .args(["run", "--enable", "--duration=100ms", "--attach", mode])
            .args([&prefix, &pins])
            .output()
            .unwrap();
        let code = if said == true { 0 } else { 3 };
        assert_eq!(run.status.code(), Some(code), "{mode}: {run:?}");
    }
    let mounts = document["mounts"].as_array().unwrap().iter();
    let found: Vec<_> = mounts
        .filter(|m| m["path"].as_str().map(Path::new) == Some(&mount))
        .collect();
    assert_eq!(
        (found.len(), &found[0]["pass"]),
        (1, &true.into()),
        "{document}"
    );
}

#[test]
fn a_prefix_elsewhere_ends_with_3() {
    let output = program()
        .args(["doctor", "--prefix=/proc"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("`/proc` is on proc"), "{text}");
    assert!(text.contains("`run` cannot work here"), "{text}");
}

#[test]
fn what_is_missing_is_named_with_a_remedy() {
    need_root();
    let output = doctor_in("mount -t tmpfs none /sys/kernel/btf;", "");
    assert_eq!(output.status.code(), Some(3));
    let document = json(&output);
    let btf = check(&document, "btf");
    assert_eq!(btf["pass"], false);
    assert!(
        btf["remedy"]
            .as_str()
            .unwrap()
            .contains("CONFIG_DEBUG_INFO_BTF")
    );

    let output = doctor_in("", "setpriv --bounding-set=-sys_admin,-bpf --");
    assert_eq!(output.status.code(), Some(3));
    let document = json(&output);
    assert_eq!(check(&document, "rights")["pass"], false);
    assert_eq!(check(&document, "attach")["pass"], false);
}

#[test]
fn with_the_kill_switch_nothing_is_loaded_or_mounted() {
    need_root();
    let hide = "mount -t tmpfs none /sys/fs/bpf; mount -t tmpfs none /sys/kernel/tracing;\
                mount -t tmpfs none /sys/kernel/debug; export VMAFX_EBPF_BYPASS=0;";
    let trace = tempfile::NamedTempFile::new().unwrap();
    let strace = format!("strace -f -e trace=bpf,mount -o {}", trace.path().display());
    let output = doctor_in(hide, &strace);
    assert_eq!(output.status.code(), Some(3));
    let document = json(&output);
    let named = ["bpf_fs", "tracefs", "attach_raw", "attach", "opt_in"];
    for name in named {
        let check = check(&document, name);
        assert_eq!(check["pass"], false, "{name}");
        let detail = check["detail"].as_str().unwrap();
        assert!(detail.contains("VMAFX_EBPF_BYPASS=0"), "{name}: {detail}");
    }
    let trace = std::fs::read_to_string(trace.path()).unwrap();
    // It was traced up to its end.
    assert!(trace.contains("+++ exited with 3 +++"), "{trace}");
    assert!(
        !trace.contains("bpf(") && !trace.contains("mount("),
        "{trace}"
    );
}

#[test]
fn every_check_is_in_the_reference() {
    let output = program()
        .args(["doctor", "--format=json", "--prefix=/proc"])
        .env("VMAFX_EBPF_BYPASS", "0")
        .output()
        .unwrap();
    let document = json(&output);
    let checks = document["checks"].as_array().unwrap().iter();
    let found: Vec<_> = checks
        .map(|check| {
            (
                check["name"].as_str().unwrap(),
                check["for"].as_str().unwrap(),
            )
        })
        .collect();
    let page = include_str!("../docs/REFERENCE.md");
    let section = page.split("\n## Doctor\n").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let mut documented: Vec<_> = rows
        .map(|row| {
            let (name, rest) = row.split_once("` | ").unwrap();
            (name, rest.split([',', ';', ' ']).next().unwrap())
        })
        .collect();
    let mut found = found;
    found.sort_unstable();
    documented.sort_unstable();
    assert_eq!(found, documented);
}

#[test]
fn a_server_that_the_environment_names_must_answer() {
    let asked = |socket: &str| {
        let output = program()
            .args(["doctor", "--format=json"])
            .env("VMAFX_EBPF_BYPASS", "0")
            .env("VMAFX_BYPASS_SOCKET", socket)
            .output()
            .unwrap();
        check(&json(&output), "handover_server").clone()
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let path = socket.to_str().unwrap();
    let refused = asked(path);
    assert_eq!(refused["pass"], false);
    let remedy = refused["remedy"].as_str().unwrap();
    assert!(
        remedy.contains("--socket") && remedy.contains(path),
        "{remedy}"
    );
    let clips = vmafx_bypass::Clips::new(
        vec!["/nowhere".into()],
        std::sync::Arc::new(vmafx_bypass::snapshot::Snapshots::new(
            vmafx_bypass::snapshot::SnapshotOptions {
                mode: vmafx_bypass::snapshot::SnapshotMode::Auto,
                copy_budget: 0,
            },
        )),
    );
    let options = vmafx_bypass::handover::ServerOptions::new(&socket);
    let _server = vmafx_bypass::handover::Server::start(options, std::sync::Arc::new(clips));
    // It has 250 ms to answer, and a busy machine.
    common::eventually("an answer", || asked(path)["pass"] == true);
}

#[test]
fn a_run_that_has_the_pins_is_named() {
    need_root();
    let rig = rig(|source| put(source, "clip", b"clip"));
    let mut run = program()
        .args(["run", "--enable", "--quiet", "--prefix"])
        .arg(rig.mountpoint())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid = run.id();
    common::eventually("pins", || {
        let output = program()
            .args(["doctor", "--format=json"])
            .env("VMAFX_EBPF_BYPASS", "0")
            .output()
            .unwrap();
        let document = json(&output);
        let pins = check(&document, "pins");
        let detail = pins["detail"].as_str().unwrap();
        pins["pass"] == true && detail.contains(&format!("`run` is pid {pid}"))
    });
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(run.wait().unwrap().success());
}
