//! `run --metrics` and `mount --metrics`: the numbers are those that are told
//! elsewhere, and nobody who asks for them does harm.
#![cfg(all(feature = "ebpf", feature = "metrics", feature = "mount"))]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::clips::{CLIP, MIB};
use common::exec::{PARTIAL, bytes_of, clips};
use common::handover::{NOBODY, read_by, resources};
use common::metrics::*;
use common::reexport::{RANGES, Reexport, mount};
use common::{
    Tracking, Worker, assert_fails, content, eventually, program, put, rig, rig_with, stderr,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use vmafx_bypass::rig::RigOptions;

const ANY: &str = "--metrics=127.0.0.1:0";

/// A `run` that serves its numbers, and where.
fn tracking(prefix: &Path, args: &[&str]) -> (Tracking, Site, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let told = Told::new(folder.path());
    let args = [&[ANY], args].concat();
    let tracking = Tracking::start_by(prefix, &args, |mut command| {
        told.by(&mut command);
        command
    });
    let site = told.site();
    eventually("it is ready", || site.get("/readyz").0 == 200);
    (tracking, site, folder)
}

/// Integers of JSON by their names.
fn counts(value: &Value) -> BTreeMap<String, u64> {
    let fields = value.as_object().unwrap().iter();
    fields
        .map(|(name, n)| (name.clone(), n.as_u64().unwrap()))
        .collect()
}

/// Without zeros.
fn filled(mut counts: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    counts.retain(|_, n| *n != 0);
    counts
}

/// Numbers of a moment, and `dump-map` of the same.
fn is_dumped(scrape: &Scrape, dump: &Value) {
    let entries = dump["entries"].as_array().unwrap();
    assert_eq!(scrape.get("tracked_fds"), entries.len() as u64);
    assert_eq!(scrape.get("tracked_processes"), 2);
    assert_eq!(scrape.get("complete"), 1);
    assert_eq!(scrape.by("losses_total"), counts(&dump["losses"]));
    let mut states = BTreeMap::new();
    let mut clips = BTreeMap::new();
    for entry in entries {
        clips.insert(entry["path"].as_str().unwrap(), entry);
    }
    let sum = |field: &str| -> u64 { clips.values().map(|c| c[field].as_u64().unwrap()).sum() };
    for clip in clips.values() {
        *states
            .entry(clip["state"].as_str().unwrap().to_owned())
            .or_insert(0) += 1;
    }
    assert_eq!(filled(scrape.by("clips")), states);
    assert_eq!(scrape.get("clips{state=\"active\"}"), 1);
    assert_eq!(scrape.get("clips_size_bytes"), sum("size"));
    assert_eq!(scrape.get("clips_cached_bytes"), sum("cached_bytes"));
    assert_eq!(
        filled(scrape.by("prefixes")),
        [("watched".into(), 1)].into()
    );
    assert_eq!(scrape.get("mounts"), 1);
}

/// The last numbers, and the summary.
fn is_summarised(scrape: &Scrape, summary: &Value) {
    assert_eq!(summary["event"], "summary");
    assert_eq!(scrape.by("losses_total"), counts(&summary["losses"]));
    let (account, handover) = (&summary["account"], &summary["handover"]);
    for (name, told) in [
        ("fuse_reads_total", &account["reads"]),
        ("read_bytes_total{path=\"fuse\"}", &account["read_bytes"]),
        ("handover_connections_total", &handover["clients"]),
        ("handover_given_total{kind=\"ranges\"}", &handover["ranges"]),
        ("handover_given_total{kind=\"whole\"}", &handover["whole"]),
        ("handover_checks_total", &handover["checks"]),
        ("handover_rejected_total", &handover["rejected"]),
        ("handover_busy_total", &handover["busy"]),
        ("handover_turned_away_total", &handover["turned_away"]),
        ("handover_dropped_total", &handover["dropped"]),
    ] {
        assert_eq!(scrape.get(name), told.as_u64().unwrap(), "{name}");
    }
    let seconds = scrape.seconds("fuse_read_seconds_total");
    assert!((seconds - account["read_ns"].as_f64().unwrap() / 1e9).abs() < 1e-6);
    // The rate is measured for each; rates of one machine are alike. The estimates are
    // older: of the other clip nothing was cached then.
    let savable = scrape.seconds("savable_seconds");
    let clips = account["clips"].as_array().unwrap();
    let ours = |clip: &&Value| clip["path"].as_str().unwrap().ends_with(CLIP);
    let saved = clips.iter().find(ours).unwrap()["saved_ns"]
        .as_f64()
        .unwrap()
        / 1e9;
    assert!(savable > 0.0 && savable < seconds, "{savable} of {seconds}");
    let near = |a: f64, b: f64| a < 1.5 * b && b < 1.5 * a;
    assert!(near(savable, saved), "{savable} s, {saved} s");
    let refused = filled(scrape.by("handover_refused_total"));
    assert_eq!(refused, counts(&handover["refused"]));
    let refused = refused.values().sum();
    let given = handover["ranges"].as_u64().unwrap();
    assert!(given >= 1 && refused >= 1);
    for (result, count) in [("given", given), ("refused", refused)] {
        let of = format!("kind=\"ranges\",result=\"{result}\"");
        let name = format!("handover_proof_seconds_count{{{of}}}");
        assert_eq!(scrape.get(&name), count);
        let name = format!("handover_proof_seconds_bucket{{{of},le=\"+Inf\"}}");
        assert_eq!(scrape.get(&name), count);
        assert!(scrape.seconds(&format!("handover_proof_seconds_sum{{{of}}}")) > 0.0);
    }
}

#[test]
fn numbers_are_those_of_dump_map_and_of_the_summary() {
    let options = RigOptions {
        mount_arguments: vec!["--allow-other".into()],
        ..RigOptions::default()
    };
    let rig = rig_with(options, |source| {
        put(source, CLIP, &content(1, 2 * MIB));
        put(source, "secret-name", &content(2, MIB));
    });
    fs::set_permissions(rig.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    rig.cache_whole(Path::new(CLIP)).unwrap();
    let sockets = common::handover::folder();
    let socket = sockets.path().join("s");
    let socket = socket.to_str().unwrap();
    let serve = ["--account", "--socket", socket, "--socket-mode=0666"];
    let (run, site, _told) = tracking(&rig.mountpoint(), &serve);

    let script = "first=os.open(sys.argv[1],os.O_RDONLY); os.dup(first)\n\
                  other=os.open('secret-name',os.O_RDONLY)\n\
                  for n in range(10): os.pread(first,1000,n)\n\
                  step(); os.close(other)";
    let mut worker = Worker::start(&rig.mountpoint(), script, &[CLIP]);
    let second = Worker::start(&rig.mountpoint(), script, &[CLIP]);
    eventually("both are tracked", || site.scrape().get("tracked_fds") == 6);
    let (scrape, dump) = (site.scrape(), run.dump());
    assert_eq!(dump["entries"].as_array().unwrap().len(), 6);
    is_dumped(&scrape, &dump);

    // One clip is given, another refused.
    let by_socket = ["--socket", socket];
    let (bytes, _) = read_by(&NOBODY, &rig.mountpoint().join(CLIP), &by_socket);
    assert!(bytes == content(1, 2 * MIB));
    read_by(&NOBODY, &rig.mountpoint().join("secret-name"), &by_socket);
    worker.proceed();
    worker.end();
    second.end();
    eventually("all is closed", || site.scrape().get("tracked_fds") == 0);
    eventually("clients are gone", || {
        site.scrape().get("handover_connected") == 0
    });

    let scrape = site.scrape();
    promtool_accepts(&["check", "metrics"], &scrape.text);
    let mut families = scrape.families();
    families.sort_unstable();
    let mut documented = documented(&["both", "run", "run --socket", "run --account"]);
    documented.sort_unstable();
    assert_eq!(families, documented);
    for name in ["secret-name", "/tmp", "python3"] {
        assert!(!scrape.text.contains(name), "{name}");
    }

    let mut rows = BTreeMap::new();
    let lines = run.end(Signal::SIGTERM);
    for line in &lines {
        if line["fd"].is_u64() {
            let kind = line["event"].as_str().unwrap();
            *rows.entry(kind.to_owned()).or_insert(0) += 1;
        }
    }
    assert_eq!(filled(scrape.by("events_total")), rows);
    is_summarised(&scrape, lines.last().unwrap());
}

#[test]
fn readiness_follows_the_mount() {
    let mut rig = rig(|source| put(source, CLIP, &content(1, 1000)));
    let point = rig.mountpoint();
    let watched = |site: Site| site.scrape().get("prefixes{state=\"watched\"}");
    let (run, site, _told) = tracking(&point, &[]);
    assert_eq!(
        site.get("/readyz"),
        (200, "1 of 1 prefixes watched\n".into())
    );
    rig.unmount();
    eventually("it is not ready", || site.get("/readyz").0 == 503);
    let (_, why) = site.get("/readyz");
    assert_eq!(why, "no prefix is on an rclone mount any more\n");
    assert_eq!(site.get("/healthz").0, 200);
    let scrape = site.scrape();
    assert_eq!((scrape.get("ready"), scrape.get("mounts")), (0, 0));
    assert_eq!(scrape.get("prefixes{state=\"waiting\"}"), 1);
    rig.mount().unwrap();
    eventually("it is ready again", || site.get("/readyz").0 == 200);
    assert_eq!(site.scrape().get("ready"), 1);
    run.end(Signal::SIGTERM);
    rig.unmount();
    // One that may wait is ready before.
    let (run, site, _told) = tracking(&point, &["--wait"]);
    assert_eq!(
        site.get("/readyz"),
        (200, "0 of 1 prefixes watched\n".into())
    );
    assert_eq!(watched(site), 0);
    rig.mount().unwrap();
    eventually("the mount is watched", || watched(site) == 1);
    run.end(Signal::SIGINT);
    // It goes with the process.
    assert!(TcpStream::connect(site.0).is_err());
}

#[test]
fn clients_of_every_kind_do_no_harm() {
    let rig = rig(|source| {
        for n in 0..400 {
            put(source, &n.to_string(), b"clip");
        }
    });
    let (run, site, _told) = tracking(&rig.mountpoint(), &[]);
    let threads = || {
        fs::read_dir(format!("/proc/{}/task", run.pid()))
            .unwrap()
            .count()
    };
    // What it opens and starts once, and keeps.
    let first = Worker::start(&rig.mountpoint(), "os.open('0',os.O_RDONLY)", &[]);
    eventually("a clip is looked at", || {
        site.scrape().get("clips{state=\"no_metadata\"}") == 1
    });
    first.end();
    eventually("it is closed", || site.scrape().get("tracked_fds") == 0);
    let before = (resources(run.pid()).0, threads());
    let script = "for n in range(400):\n fd=os.open(str(n),os.O_RDONLY); os.close(fd)";
    let opens = Worker::start(&rig.mountpoint(), script, &[]);
    let slow: Vec<TcpStream> = (0..24)
        .map(|_| {
            let mut stream = site.connect();
            stream.write_all(b"GET /metrics HTTP/1.1\r\nX").unwrap();
            stream
        })
        .collect();
    std::thread::scope(|scope| {
        for n in 0..6 {
            scope.spawn(move || {
                for _ in 0..20 {
                    assert!(site.scrape().get("complete") == 1);
                    let mut stream = site.connect();
                    // Some do not wait for the answer.
                    let garbage = [&b"\0\xff\r\n\r\n"[..], b"GET /metrics HTTP/1.1\r\n\r\n"];
                    stream.write_all(garbage[n % 2]).unwrap();
                }
            });
        }
    });
    for mut stream in slow {
        let mut answer = Vec::new();
        // A connection that is reset has ended, too.
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.windows(5).any(|part| part == b" 200 "));
    }
    opens.end();
    let kinds = || site.scrape().by("events_total");
    eventually("every open was seen", || kinds()["close"] == 401);
    assert_eq!(kinds()["open"], 401);
    eventually("connections closed", || {
        (resources(run.pid()).0, threads()) <= before
    });
    let lines = run.end(Signal::SIGTERM);
    assert_eq!(lines.last().unwrap()["complete"], true);
}

#[test]
fn where_it_cannot_listen_nothing_is_begun() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let rig = rig(|source| put(source, CLIP, &content(1, 1000)));
    let folder = tempfile::tempdir().unwrap();
    let pins = format!("/sys/fs/bpf/vmafx-metrics-{}", std::process::id());
    let run = |metrics: &str| {
        let mut command = program();
        command.args(["run", "--enable", "--pin-dir", &pins, "--metrics", metrics]);
        command.arg("--prefix").arg(rig.mountpoint());
        command.stdin(Stdio::null());
        command
    };
    let output = run(&address).output().unwrap();
    assert_fails(&output, 3, &format!("cannot listen at {address}: "));
    assert!(!Path::new(&pins).exists());
    let metrics = format!("--metrics={address}");
    let mut shown = mount(&rig.mountpoint(), folder.path(), &[&metrics]);
    assert_fails(&shown.output().unwrap(), 3, "name another address");
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none());
    for bad in ["9779", ":9779", "localhost:9779", "127.0.0.1"] {
        let output = run(bad).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{bad}");
        assert!(stderr(&output).contains("write it as 127.0.0.1:9779"));
    }
    // Others may reach it: that is said.
    let output = run("[::]:0").arg("--duration=1ms").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(said.contains("metrics at http://[::]:") && said.contains("warning: whoever reaches"));
    let output = run("127.0.0.1:0").arg("--duration=1ms").output().unwrap();
    assert!(!stderr(&output).contains("warning"), "{}", stderr(&output));
}

#[test]
fn mount_counts_what_it_reads_by_path() {
    let rig = clips();
    let folder = tempfile::tempdir().unwrap();
    let told = Told::new(folder.path());
    let args = [RANGES, &[ANY]].concat();
    let shown = Reexport::start_by(&rig.mountpoint(), &args, |command| told.by(command));
    let site = told.site();
    assert_eq!(site.get("/readyz"), (200, "mounted\n".into()));
    for name in [CLIP, PARTIAL] {
        assert!(fs::read(shown.join(name)).unwrap() == bytes_of(name));
    }
    let held = fs::File::open(shown.join(CLIP)).unwrap();
    let (scrape, stats) = (site.scrape(), shown.stats());
    drop(held);
    promtool_accepts(&["check", "metrics"], &scrape.text);
    let mut families = scrape.families();
    families.sort_unstable();
    let mut documented = documented(&["both", "mount"]);
    documented.sort_unstable();
    assert_eq!(families, documented);
    let number = |field: &str| stats[field].as_u64().unwrap();
    assert_eq!(
        scrape.get("read_bytes_total{path=\"cache\"}"),
        number("cache_bytes")
    );
    assert_eq!(
        scrape.get("read_bytes_total{path=\"fuse\"}"),
        number("fuse_bytes")
    );
    assert!(number("cache_bytes") > 0 && number("fuse_bytes") > 0);
    for (family, field) in [
        ("fuse_read_bytes_total", "fuse_by_reason"),
        ("mount_opens_total", "opens"),
        ("mount_not_passed_total", "by_reason"),
    ] {
        assert_eq!(filled(scrape.by(family)), counts(&stats[field]), "{family}");
    }
    shown.end();
}

#[test]
fn mount_in_the_background_serves_its_numbers() {
    let rig = clips();
    let point = tempfile::tempdir().unwrap();
    let mut command = program();
    command.args(["mount", "--passthrough=never"]);
    command.args([&rig.mountpoint(), point.path()]).arg(ANY);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let site = Site::told(&stderr(&output)).unwrap();
    let read = || fs::read(point.path().join(CLIP)).unwrap() == bytes_of(CLIP);
    assert!(read());
    assert_eq!(site.scrape().get("mount_opens_total{way=\"ranges\"}"), 1);
    let unmounted = Command::new("umount").arg(point.path()).status();
    assert!(unmounted.unwrap().success());
    eventually("its end", || TcpStream::connect(site.0).is_err());
}

#[test]
fn promtool_accepts_the_alerts_and_the_dashboard() {
    let alerts = "deploy/prometheus/alerts.yaml";
    promtool_accepts(&["check", "rules", alerts], "");
    let test = "deploy/prometheus/alerts_test.yaml";
    promtool_accepts(&["test", "rules", test], "");
    // Every alert is tested, both where it comes and where it does not.
    let (alerts, test) = (
        include_str!("../deploy/prometheus/alerts.yaml"),
        include_str!("../deploy/prometheus/alerts_test.yaml"),
    );
    let names = alerts.lines().filter_map(|l| l.split("- alert: ").nth(1));
    for name in names {
        let comes = format!("alertname: {name}\n        exp_alerts:");
        let is_silent = format!("alertname: {name} }}");
        assert!(test.contains(&comes) && test.contains(&is_silent), "{name}");
    }
    // What the dashboard asks for, as if it were rules.
    let dashboard = include_str!("../deploy/grafana/vmafx-bypass.json");
    let dashboard: Value = serde_json::from_str(dashboard).unwrap();
    let mut rules = "groups:\n- name: panels\n  rules:\n".to_owned();
    let mut count = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().unwrap();
            let expression = expression.replace("$__rate_interval", "1m");
            let quoted = serde_json::to_string(&expression).unwrap();
            writeln!(rules, "  - record: panel:{count}\n    expr: {quoted}").unwrap();
            count += 1;
        }
    }
    assert!(count > 30);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("panels.yaml");
    fs::write(&file, rules).unwrap();
    promtool_accepts(&["check", "rules", file.to_str().unwrap()], "");
}
