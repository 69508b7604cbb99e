//! `bench` on a clip that it generates and serves itself.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::clips::{CLIP, MIB, each_rclone};
use common::{assert_fails, content, need_root, program, put, run, stderr};
use serde_json::Value;
use vmafx_bypass::rig::{Rig, RigOptions};

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
    let rclone = report["environment"]["rclone"].as_str().unwrap();
    assert!(rclone.starts_with("rclone v"), "{rclone}");
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
fn ways_without_a_copy_and_a_local_copy_read_the_same() {
    need_root();
    let mut args = SMALL.to_vec();
    args.push("--engines=fuse,bypass,bufread,mmap,raw,copy");
    args.push("--streams=1,3");
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let results = report["results"].as_array().unwrap();
    // Engines, patterns, blocks, streams.
    assert_eq!(results.len(), 6 * 2 * 2 * 2);
    for result in results {
        assert_eq!(result["fuse_bytes"], 0, "{result}");
        let streams = result["streams"].as_u64().unwrap() as usize;
        assert_eq!(result["open_ns"].as_array().unwrap().len(), 2 * streams);
        let samples = result["samples_ns"].as_array().unwrap().len();
        if result["pattern"] == "sequential" {
            assert_eq!(samples, 2, "one for all readers: {result}");
        } else {
            assert_eq!(samples % (2 * streams), 0, "{result}");
        }
        let spread = |name: &str| result["spread"][name].as_u64().unwrap();
        assert!(spread("low_ns") <= spread("high_ns"));
        assert!(
            result["ratio_to_fuse_range"][0].as_f64() <= result["ratio_to_fuse_range"][1].as_f64()
        );
    }
    assert_eq!(results[0]["sha256"], results[4]["sha256"]);
}

#[test]
fn whatever_can_run_here_is_compared_and_the_rest_told() {
    need_root();
    let mut args = SMALL.to_vec();
    args.extend(["--engines=all", "--pattern=sequential,random,open"]);
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let left_out: Vec<&str> = report["left_out"]
        .as_array()
        .unwrap()
        .iter()
        .map(|left| {
            assert!(!left["why"].as_str().unwrap().is_empty());
            left["engine"].as_str().unwrap()
        })
        .collect();
    // No server is asked; passthrough is Linux 6.9.
    assert!(left_out.contains(&"handover"), "{left_out:?}");
    assert!(
        left_out
            .iter()
            .all(|left| ["handover", "mount"].contains(left)),
        "{left_out:?}"
    );
    let results = report["results"].as_array().unwrap();
    for engine in [
        "fuse",
        "fuse_tuned",
        "bypass",
        "bufread",
        "mmap",
        "exec",
        "raw",
        "io_uring",
        "preload",
        "copy",
    ] {
        let own = results.iter().filter(|result| result["engine"] == engine);
        assert_eq!(own.clone().count(), 3 * 2, "{engine}");
        for result in own {
            assert_eq!(result["fuse_bytes"], 0, "{result}");
            let first = results.iter().find(|first| {
                first["pattern"] == result["pattern"] && first["block_size"] == result["block_size"]
            });
            assert_eq!(result["sha256"], first.unwrap()["sha256"], "{result}");
            let runs = if result["pattern"] == "open" { 2 } else { 1 };
            assert!(result["open_ns"].as_array().unwrap().len() >= runs);
        }
    }
    // One that is named has to run.
    let named = run(&["bench", "--generate=1MiB", "-q", "--engines=fuse,handover"]);
    assert_fails(&named, 3, "the engine handover cannot run");
}

#[test]
fn another_mount_of_the_remote_is_compared_by_its_folder() {
    each_rclone(MIB, &[], |rig, _| {
        let clip = |rig: &Rig| rig.cache_whole(Path::new(CLIP)).unwrap();
        let options = RigOptions {
            remote: Some(rig.remote().to_owned()),
            ..RigOptions::default()
        };
        let other = Rig::start(options, |_| Ok(())).unwrap();
        clip(rig);
        clip(&other);
        let bench = |tuned: &Path| {
            program()
                .args([
                    "bench",
                    CLIP,
                    "--engines=fuse,fuse_tuned",
                    "--runs=1",
                    "--prefix",
                ])
                .arg(rig.mountpoint())
                .arg("--tuned")
                .arg(tuned)
                .args(["--block-size=64KiB", "--format=json"])
                .output()
                .unwrap()
        };
        let output = bench(&other.mountpoint());
        assert!(output.status.success(), "{}", stderr(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["results"][1]["engine"], "fuse_tuned");
        assert_fails(&bench(Path::new("/no/such")), 1, "No such file");
        // Of other bytes no ratio tells anything.
        put(&other.folder().join("mount2"), CLIP, &content(2, MIB));
        assert_fails(
            &bench(&other.folder().join("mount2")),
            4,
            "read other bytes",
        );
    });
}

#[test]
fn cold_clips_come_from_the_disk_and_what_is_in_memory_is_refused() {
    need_root();
    let mut args = SMALL.to_vec();
    args.extend([
        "--cold",
        "--engines=fuse,fuse_tuned,bypass,bufread,raw,copy",
    ]);
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["environment"]["page_cache"], "cold");
    for engines in ["fuse,mmap", "fuse,exec", "fuse,preload"] {
        args.truncate(SMALL.len() - 1);
        args.extend(["--cold", "--engines", engines]);
        assert_fails(&run(&args), 3, "never cold");
    }
}

#[test]
fn a_regression_is_measured_again_and_told() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let output = run(&SMALL);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    let write = |factor: f64| {
        let mut then = report.clone();
        for result in then["results"].as_array_mut().unwrap() {
            let ratio = result["ratio_to_fuse"].as_f64().unwrap() * factor;
            result["ratio_to_fuse"] = ratio.into();
        }
        std::fs::write(path("then"), then.to_string()).unwrap();
    };
    let then = format!("--baseline={}", path("then"));
    let junit = format!("--junit={}", path("junit.xml"));
    let mut args = SMALL.to_vec();
    args.extend([then.as_str(), junit.as_str(), "--max-regression=90%"]);
    write(0.5);
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let xml = std::fs::read_to_string(path("junit.xml")).unwrap();
    assert!(
        xml.contains("failures=\"0\"") && xml.contains("name=\"baseline\""),
        "{xml}"
    );
    // No machine is as fast as that.
    write(1e6);
    args.retain(|arg| *arg != "-q");
    let output = run(&args);
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    let told = stderr(&output);
    assert!(told.contains("measured again: `"), "{told}");
    assert!(
        told.contains("(it was ") && told.contains("measured 3 times"),
        "{told}"
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["gate"]["pass"], false);
    assert_eq!(report["gate"]["checks"][1]["tries"], 3);
    assert_eq!(report["results"][0]["tries"], 3);
    let xml = std::fs::read_to_string(path("junit.xml")).unwrap();
    assert!(xml.contains("type=\"too slow\""), "{xml}");
    std::fs::write(path("then"), "{}").unwrap();
    assert_fails(&run(&args), 2, "then`: ");
}

/// Whether each element is ended, in order.
fn is_balanced(html: &str) -> bool {
    let mut open = Vec::new();
    for tag in html.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').unwrap();
        let name = tag.split([' ', '\n']).next().unwrap();
        if let Some(name) = name.strip_prefix('/') {
            if open.pop() != Some(name) {
                return false;
            }
        } else if !tag.ends_with('/') && !["!doctype", "meta"].contains(&name) {
            open.push(name);
        }
    }
    open.is_empty()
}

#[test]
fn a_page_needs_no_network_and_has_all_of_the_report() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("bench.html");
    let output = program()
        .args([
            "bench",
            "--generate=4MiB",
            "--runs=2",
            "--block-size=4KiB",
            "-q",
        ])
        .args(["--format=html", "--streams=1,2", "--gate=0.001"])
        .args([
            "--pattern=sequential,random,open",
            "--engines=fuse,bypass,mmap,raw",
        ])
        .arg("--output")
        .arg(&page)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let html = std::fs::read_to_string(&page).unwrap();
    let (shown, json) = html
        .split_once("<script type=\"application/json\" id=\"report\">")
        .unwrap();
    let (json, rest) = json.split_once("</script>").unwrap();
    assert!(is_balanced(&format!("{shown}{rest}")));
    for foreign in ["http://", "https://", " src=", "<link", "url(", "@import"] {
        // The daemon's own address is text.
        let shown = shown.replace("http://127.0.0.1", "");
        assert!(!shown.contains(foreign), "{foreign}");
    }
    let report: Value = serde_json::from_str(json).unwrap();
    assert_eq!(report["results"].as_array().unwrap().len(), 4 * 3 * 2);
    // A chart of latencies for each pattern of single reads, and one of readers for
    // each pattern.
    assert_eq!(shown.matches("<svg ").count(), 2 + 3);
    assert_eq!(shown.matches("<table>").count(), 3);
    assert_eq!(shown.matches("<polyline ").count(), 4 * 5);
    assert!(shown.contains("Gate: pass") && shown.contains("prefers-color-scheme: dark"));
}

#[test]
fn without_rclone_there_is_nothing_to_generate() {
    need_root();
    let output = run(&["bench", "--generate=1MiB", "--rclone=/no/such", "-q"]);
    assert_fails(&output, 3, "`/no/such`");
}

#[test]
fn an_interrupted_bench_ends_the_programs_that_it_runs() {
    need_root();
    for engine in ["exec", "preload"] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = program()
            .args(["bench", "--generate=8MiB", "--runs=10000", "-q"])
            .arg(format!("--engines={engine}"))
            .env("TMPDIR", folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let reading = || {
            let all = std::fs::read_dir("/proc").unwrap().flatten();
            let lines = all.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
            let lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
            let inside = |line: &String| {
                line.contains("--engines=fuse\0") && line.contains(folder.path().to_str().unwrap())
            };
            lines.filter(inside).count()
        };
        common::eventually("a program that reads", || reading() > 0);
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130));
        // exec's keeper ends by itself.
        common::eventually("the end of what it ran", || reading() == 0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
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
