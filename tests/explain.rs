//! `explain`, and `read --verify`, on real mounts with every rclone there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

use common::clips::*;
use common::{assert_fails, eventually, fuse_range, program, run, stderr};
use serde_json::Value;
use vmafx_bypass::cache::trail::Gate;
use vmafx_bypass::rig::Rig;

fn explain(rig: &Rig) -> Value {
    let path = clip(rig);
    let output = run(&["explain", "--format", "json", path.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn gate<'a>(document: &'a Value, name: &str) -> &'a Value {
    let mut gates = document["gates"].as_array().unwrap().iter();
    gates.find(|gate| gate["name"] == name).unwrap()
}

/// The ranges are the file, without gaps, and neighbours differ.
fn assert_whole(document: &Value) {
    let mut at = 0;
    let mut before = &Value::Null;
    for range in document["ranges"].as_array().unwrap() {
        assert_eq!(range["start"], at);
        at = range["end"].as_u64().unwrap();
        assert_ne!(&range["reason"], before);
        before = &range["reason"];
    }
    assert_eq!(document["size"], at);
}

#[test]
fn a_clip_is_explained_before_and_after_it_is_cached() {
    each_rclone(
        40 * MIB,
        &["--buffer-size=0", "--vfs-read-chunk-size=1M"],
        |rig, _| {
            let document = explain(rig);
            assert_eq!(document["state"], "no_metadata");
            assert_eq!(gate(&document, "cached")["pass"], false);
            assert!(gate(&document, "cached")["remedy"].is_string());
            // Nothing was asked of rclone: nothing is downloaded for it.
            assert_eq!(gate(&document, "prime")["pass"], Value::Null);
            assert_eq!(walk(&rig.cache()), [] as [&Path; 0]);
            assert_whole(&document);

            fuse_range(&clip(rig), 20 * MIB as u64, MIB);
            let mut document = Value::Null;
            eventually("a cached range", || {
                document = explain(rig);
                document["state"] == "partial"
            });
            assert_whole(&document);
            let reasons: Vec<_> = document["ranges"].as_array().unwrap().iter().collect();
            let active = reasons.iter().find(|r| r["reason"] == "active").unwrap();
            assert!(active["start"].as_u64().unwrap() <= 20 * MIB as u64);
            assert!(active["end"].as_u64().unwrap() >= 21 * MIB as u64);

            rig.cache_whole(Path::new(CLIP)).unwrap();
            let document = explain(rig);
            assert_eq!(document["state"], "active");
            assert_eq!(document["cached_bytes"], 40 * MIB as u64);
            let gates = document["gates"].as_array().unwrap();
            let names: Vec<_> = gates.iter().map(|g| g["name"].as_str().unwrap()).collect();
            let all: Vec<_> = Gate::ALL.iter().map(|gate| gate.name()).collect();
            assert_eq!(names, all);
            assert!(gates.iter().all(|gate| gate["pass"] == true), "{document}");

            let output = run(&["explain", clip(rig).to_str().unwrap()]);
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(text.contains(&format!("[{}]", "#".repeat(64))), "{text}");
            assert_eq!(text.matches("\n  ok ").count(), all.len(), "{text}");
            assert!(text.contains("one byte was read through fuse"), "{text}");
        },
    );
}

#[test]
fn each_gate_that_fails_is_shown_with_its_remedy() {
    each_rclone(MIB, &[], |rig, _| {
        let _held = open_cached(rig);
        let path = cache_file(rig, "vfsMeta", CLIP);
        let text = fs::read_to_string(&path).unwrap();
        let other = text.replace("1048576,20", "1048576,19");
        fs::write(&path, other.replacen("1048576", "1048575", 1)).unwrap();
        let document = explain(rig);
        assert_eq!(document["state"], "size_mismatch");
        for name in ["size", "version"] {
            assert_eq!(gate(&document, name)["pass"], false, "{document}");
            assert!(gate(&document, name)["remedy"].is_string());
        }
        assert_eq!(gate(&document, "clean")["pass"], true);
        assert_eq!(document["cached_bytes"], 0);
        assert_whole(&document);
        // A changed clip is not even opened in rclone's cache.
        fs::write(&path, text.replace("\"Dirty\": false", "\"Dirty\": true")).unwrap();
        let document = explain(rig);
        assert_eq!(document["state"], "dirty");
        assert_eq!(gate(&document, "clean")["pass"], false);
        assert_eq!(gate(&document, "prime")["pass"], Value::Null);
    });
}

#[test]
fn what_cannot_be_bypassed_is_explained_and_what_is_not_there_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, "abc").unwrap();
    let path = path.to_str().unwrap();
    let output = run(&["explain", path]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("not_fuse") && text.contains("nothing was read"),
        "{text}"
    );
    let killed = program()
        .env("VMAFX_EBPF_BYPASS", "0")
        .args(["explain", path])
        .output();
    let text = String::from_utf8(killed.unwrap().stdout).unwrap();
    assert!(text.starts_with(&format!("{path}: disabled")), "{text}");
    assert_fails(&run(&["explain", "/no/such/file"]), 1, "`/no/such/file`");
}

#[test]
fn verification_compares_every_byte_or_samples() {
    each_rclone(9 * MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let path = clip(rig);
        for (mode, at_least, at_most) in [("full", 9 * MIB, 9 * MIB), ("sample", 4096, MIB)] {
            let args = [
                "read",
                "--stats=json",
                "--block-size",
                "64KiB",
                "--verify",
                mode,
            ];
            let output = program().args(args).arg(&path).output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            assert!(output.stdout == bytes);
            let stats: Value = serde_json::from_slice(&output.stderr).unwrap();
            let verified = stats["verified_bytes"].as_u64().unwrap() as usize;
            assert!((at_least..=at_most).contains(&verified), "{stats}");
            assert_eq!(stats["cache_bytes"], 9 * MIB as u64);
        }
    });
}

#[test]
fn a_difference_gives_fuses_bytes_and_exit_code_4() {
    each_rclone(16 * MIB, &[], |rig, bytes| {
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let mut child = program()
            .args([
                "read",
                "--stats=json",
                "--block-size=64KiB",
                "--verify=full",
            ])
            .arg(clip(rig))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It has opened the clip, and waits for us to take its bytes.
        let mut out = child.stdout.take().unwrap();
        let mut read = vec![0; 4096];
        out.read_exact(&mut read).unwrap();
        // The kernel keeps the right bytes for FUSE; the cache gets others.
        assert!(fs::read(clip(rig)).unwrap() == bytes);
        let data = fs::OpenOptions::new()
            .write(true)
            .open(cache_file(rig, "vfs", CLIP));
        data.unwrap().write_all_at(b"wrong", 9_000_000).unwrap();
        out.read_to_end(&mut read).unwrap();
        drop(out);
        let output = child.wait_with_output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(4), "{text}");
        assert!(read == bytes, "FUSE's bytes are written");
        assert!(text.contains("at offset 9000000"), "{text}");
        let stats = text.lines().find(|line| line.starts_with('{')).unwrap();
        let stats: Value = serde_json::from_str(stats).unwrap();
        assert_eq!(stats["mismatch_offset"], 9_000_000);
        assert!(
            stats["bytes_by_reason"]["quarantined"].as_u64().unwrap() > 0,
            "{stats}"
        );
    });
}
