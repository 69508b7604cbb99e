//! `bench` on a clip that it generates and serves itself.
#![allow(clippy::unwrap_used)]

mod common;

use common::{assert_fails, need_root, program, run, stderr};
use serde_json::Value;

const SMALL: [&str; 7] = [
    "bench",
    "--generate=4MiB",
    "--runs=2",
    "--block-size=4KiB,1MiB",
    "--format=json",
    "-q",
    "--gate=4KiB=0.001",
];

#[test]
fn all_engines_agree_and_are_compared() {
    need_root();
    // Also where the kill switch sends all others through FUSE.
    let killed = program().env("VMAFX_EBPF_BYPASS", "0").args(SMALL).output();
    let output = killed.unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["schema"], 1);
    assert_eq!(report["environment"]["page_cache"], "warm");
    assert_eq!(report["environment"]["clips"][0]["size"], 4 << 20);
    assert_eq!(report["environment"]["clips"][0]["read_only"], true);
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.len(), 3 * 2 * 2);
    for result in results {
        let samples = result["samples_ns"].as_array().unwrap().len() as u64;
        let blocks = (4 << 20) / result["block_size"].as_u64().unwrap();
        let expected = match result["pattern"].as_str().unwrap() {
            "sequential" => 2,
            _ => 2 * blocks.min(1_000),
        };
        assert_eq!(samples, expected);
        assert_eq!(result["fuse_bytes"], 0, "the bypass is active: {result}");
        let p = |name: &str| result[name].as_u64().unwrap();
        assert!(p("p50_ns") <= p("p90_ns") && p("p90_ns") <= p("p99_ns"));
        assert!(result["ratio_to_fuse"].as_f64().unwrap() > 0.0);
        assert!(result["ratio_to_raw"].as_f64().unwrap() > 0.0);
        // One hash for each pattern and block size, whatever the engine.
        let alike = results.iter().filter(|other| {
            other["pattern"] == result["pattern"] && other["block_size"] == result["block_size"]
        });
        assert!(alike.clone().count() == 3);
        assert!(
            alike
                .clone()
                .all(|other| other["sha256"] == result["sha256"])
        );
    }
    assert_eq!(report["gate"]["pass"], true);
    assert_eq!(report["gate"]["checks"].as_array().unwrap().len(), 1);
}

#[cfg(feature = "mount")]
#[test]
fn mounts_of_its_own_are_compared_and_unmounted() {
    need_root();
    let mut args = SMALL.to_vec();
    args.push("--engines=fuse,mount,mount_ranges,raw");
    args.remove(6);
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.len(), 4 * 2 * 2);
    let of = |engine: &str| {
        let found = results.iter().filter(|result| result["engine"] == engine);
        found.cloned().collect::<Vec<_>>()
    };
    for engine in ["mount", "mount_ranges"] {
        for (result, raw) in of(engine).iter().zip(of("raw")) {
            assert_eq!(result["fuse_bytes"], 0, "{result}");
            assert_eq!(result["sha256"], raw["sha256"]);
        }
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let clip = report["environment"]["clips"][0]["path"].as_str().unwrap();
    let source = clip.strip_suffix("/clip.y4m").unwrap();
    assert!(!table.contains(source), "{table}");

    // Bench itself works with the kill switch; a mount would not.
    let killed = program()
        .env("VMAFX_EBPF_BYPASS", "0")
        .args(&args)
        .output()
        .unwrap();
    assert_fails(&killed, 3, "VMAFX_EBPF_BYPASS=0");
}

#[test]
fn a_missed_gate_exits_with_5_and_names_the_figure() {
    need_root();
    let mut args = SMALL.to_vec();
    args[6] = "--gate=1000000";
    let output = run(&args);
    assert_fails(&output, 5, "gate missed: `");
    assert!(stderr(&output).contains("of at least 1000000x"));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        report["gate"]["pass"], false,
        "the report is printed all the same"
    );
}

#[test]
fn without_rclone_there_is_nothing_to_generate() {
    need_root();
    let output = run(&["bench", "--generate=1MiB", "--rclone=/no/such", "-q"]);
    assert_fails(&output, 3, "`/no/such`");
}

#[test]
fn an_interrupted_bench_leaves_no_mount() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let mut child = program()
        .args(["bench", "--generate=8MiB", "--runs=10000", "--format=json"])
        .env("TMPDIR", folder.path())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mounted = || {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.contains(folder.path().to_str().unwrap())
    };
    common::eventually("its mount", mounted);
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!mounted());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
