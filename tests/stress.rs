//! The stressors of stress-ng that open, dup, fork, exec and close, with their
//! working folder on the mount and beside it: the table must not drift, and
//! nothing may get lost uncounted. For STRESS_SECONDS each, 30 by default.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::fds::{dumped, lost, truth};
use common::{Tracking, Worker, content, eventually, put, rig_with};
use nix::sys::signal::Signal;
use vmafx_bypass::rig::RigOptions;

const STRESSORS: [&str; 10] = [
    "close", "dup", "exec", "fcntl", "fork", "io-uring", "open", "sockfd", "unshare", "vfork",
];

/// Every process with clips open below the mount, as /proc tells; processes
/// may end meanwhile.
fn everyone(mount: &Path) -> BTreeSet<u32> {
    let has_clips = |pid: &u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        let mut paths = fds.flatten().flat_map(|fd| fs::read_link(fd.path()));
        paths.any(|path| path.starts_with(mount) && path != mount)
    };
    let names = fs::read_dir("/proc").unwrap().flatten();
    let pids = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(has_clips).collect()
}

/// CPU time so far, seconds, and resident memory, KiB, of a process.
fn usage(pid: u32) -> (f64, u64) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: u64 = fields[11..13]
        .iter()
        .map(|f| f.parse::<u64>().unwrap())
        .sum();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let rss = rss.unwrap().trim().trim_end_matches(" kB").parse().unwrap();
    (ticks as f64 / 100.0, rss)
}

#[test]
fn stressors_leave_the_table_right() {
    let seconds = std::env::var("STRESS_SECONDS").unwrap_or_else(|_| "30".into());
    let options = RigOptions {
        read_only: false,
        // Where stressors can make their folders.
        remote: Some("{folder}/source".into()),
        ..RigOptions::default()
    };
    let rig = rig_with(options, |source| {
        for i in 0..8 {
            put(source, &format!("clip{i}"), &content(i, 100));
        }
    });
    let mount = rig.mountpoint();
    let tracking = Tracking::start(&mount, &["--ring-size=16MiB"]);
    // Holds clips all the time, and opens and passes on others.
    let holder = Worker::start(
        &mount,
        "fds=[os.open('clip%d'%i,0) for i in range(8)]\n\
         def churn():\n \
           while True:\n  \
             fd=os.open('clip0',0); other=os.dup(fd); os.close(fd); os.close(other)\n\
         threading.Thread(target=churn,daemon=True).start()",
        &[],
    );
    let beside = tempfile::tempdir().unwrap();
    let (cpu_before, _) = usage(tracking.pid());
    for folder in [mount.as_path(), beside.path()] {
        let mut stress = Command::new("stress-ng");
        for stressor in STRESSORS {
            stress.args([format!("--{stressor}"), "1".into()]);
        }
        let output = stress
            .args(["--timeout", &format!("{seconds}s"), "--temp-path"])
            .arg(folder)
            .arg("--quiet")
            // Inherited by every stressor and all their children.
            .stdin(Stdio::from(fs::File::open(mount.join("clip1")).unwrap()))
            .current_dir(folder)
            .output()
            .unwrap();
        // 2: a stressor failed, 3: one had not what it needs; not ours to judge.
        let code = output.status.code();
        assert!(matches!(code, Some(0 | 2 | 3)), "{output:?}");
    }
    let (cpu, rss) = usage(tracking.pid());
    println!(
        "`run`: {:.1} s of CPU time in 2 x {seconds} s, {rss} KiB resident",
        cpu - cpu_before
    );
    drop(holder);
    let rest = Worker::start(&mount, "fds=[os.open('clip%d'%i,0) for i in range(8)]", &[]);
    let mut dump = tracking.dump();
    eventually("the end of all stressors, and of healing", || {
        dump = tracking.dump();
        dump["complete"] == true && everyone(&mount) == BTreeSet::from([rest.pid()])
    });
    assert_eq!(dumped(&dump, rest.pid()), truth(rest.pid(), &mount));
    assert_eq!(dump["entries"].as_array().unwrap().len(), 8, "{dump}");
    println!("lost and made good: {:?}", lost(&dump));
    rest.end();
    assert_eq!(tracking.dump()["entries"], serde_json::json!([]));
    let lines = tracking.end(Signal::SIGTERM);
    assert_eq!(lines.last().unwrap()["complete"], true);
}
