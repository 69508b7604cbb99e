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
