//! `run` with all that it can do, under stress: its memory, descriptors and threads stay
//! as they are, and nothing is lost uncounted. `make soak` for half an hour, and a
//! table of figures; see docs/TESTING.md.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::handover::{Raw, folder, resources};
use common::{Tracking, Worker, content, eventually, need_root, put, rig_with};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use vmafx_bypass::BypassOptions;
use vmafx_bypass::rig::{Rig, RigOptions};

/// How long, unless `SOAK_SECONDS` says otherwise.
const SECONDS: u64 = 20;
/// How often it is looked at, and the mount comes anew.
const SAMPLES: u32 = 40;
const REMOUNTS: u32 = 4;
/// Memory that may come in the second half, KiB: of a heap that is not yet as large as
/// it gets, and of a clip more or less that is being proven.
const SLACK_KIB: u64 = 8192;
/// Descriptors more or less: connections and clips that are under way.
const SLACK_FDS: u64 = 24;

/// Opens at the end, each of which is to be told.
const BURST: u64 = 5000;
const CLIPS: u32 = 24;
const CLIP_BYTES: usize = 256 << 10;

/// Opens clips as fast as it can, in four threads: reads, dups, forks.
const OPENER: &str = r"
import os, random, subprocess, sys, threading
def work(seed):
    pick = random.Random(seed)
    while True:
        try:
            fd = os.open(sys.argv[1] + '/clip%d' % pick.randrange(24), os.O_RDONLY)
            os.pread(fd, 4096, pick.randrange(60) * 4096)
            other = os.dup(fd)
            os.close(fd)
            if pick.randrange(50) == 0:
                subprocess.run(['true'], close_fds=False)
            os.read(other, 65536)
            os.close(other)
        except OSError:
            # Unmounted at the moment.
            pass
for seed in range(4):
    threading.Thread(target=work, args=(seed,)).start()
";

/// What `run` has at a moment.
struct Sample {
    at: Duration,
    fds: usize,
    rss_kib: u64,
    threads: usize,
    lines: u64,
}

/// What goes on beside it, counted.
#[derive(Default)]
struct Work {
    over: AtomicBool,
    /// Lines that `run` has printed.
    lines: AtomicU64,
    /// Clips that were read whole by a handover.
    handed: AtomicU64,
    /// Scrapes of the metrics.
    scrapes: AtomicU64,
    /// Opens of the last burst that were told.
    burst: AtomicU64,
}

impl Work {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn duration() -> Duration {
    let text = std::env::var("SOAK_SECONDS").unwrap_or_default();
    match text.as_str() {
        "" => Duration::from_secs(SECONDS),
        text => text.parse().map_or_else(
            |_| humantime::parse_duration(text).expect("SOAK_SECONDS: 60, or 30m"),
            Duration::from_secs,
        ),
    }
}

/// A process that is killed when the test ends, however it does.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Ended already, unless all goes well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn opener(mount: &Path) -> Killed {
    let child = Command::new("python3")
        .args(["-c", OPENER])
        .arg(mount)
        .stdin(Stdio::null())
        .spawn();
    Killed(child.unwrap())
}

fn fill(source: &Path) {
    for number in 0..CLIPS {
        put(
            source,
            &format!("clip{number}"),
            &content(number, CLIP_BYTES),
        );
    }
}

/// Reads clips by handovers, each to its end, while there is a mount.
fn be_given(socket: &Path, mount: &Path, work: &Work) {
    let options = BypassOptions::new().socket(socket).socket_alone();
    for number in (0..CLIPS).cycle() {
        if work.is_over() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
        let clip = mount.join(format!("clip{number}"));
        // Unmounted at the moment, or just then.
        let Ok(mut file) = options.open(clip) else {
            continue;
        };
        let mut bytes = Vec::new();
        if file.read_to_end(&mut bytes).is_ok() {
            assert!(bytes == content(number, CLIP_BYTES), "clip{number}");
            if file.stats().cache_bytes > 0 {
                Work::add(&work.handed);
            }
        }
    }
}

/// What is served at a path.
fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: soak\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The losses that a page of metrics has, by cause.
fn losses_of(page: &str) -> Vec<(String, u64)> {
    let prefix = "vmafx_bypass_losses_total{cause=\"";
    let lines = page.lines().filter_map(|line| line.strip_prefix(prefix));
    lines
        .map(|line| {
            let (cause, count) = line.split_once("\"} ").unwrap();
            (cause.to_owned(), count.parse().unwrap())
        })
        .collect()
}

/// Scrapes as often as no Prometheus does.
fn scrape(address: SocketAddr, work: &Work) {
    while !work.is_over() {
        let page = get(address, "/metrics");
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        assert!(get(address, "/healthz").starts_with("HTTP/1.1 200"));
        Work::add(&work.scrapes);
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Takes what `run` prints, up to its end; the last line.
fn listen(tracking: &mut Tracking, work: &Work) -> Value {
    let mut last = Value::Null;
    while let Some(line) = tracking.next_line() {
        // Each is whole.
        last = serde_json::from_str(&line).unwrap();
        Work::add(&work.lines);
        if last["event"] == "open" && last["comm"] == "burst" {
            Work::add(&work.burst);
        }
    }
    last
}

/// Stress for the whole time, the mount coming anew now and then; samples of it.
fn stress(rig: &mut Rig, pid: u32, work: &Work) -> Vec<Sample> {
    let started = Instant::now();
    let interval = duration() / SAMPLES;
    let mount = rig.mountpoint();
    let mut openers = vec![opener(&mount), opener(&mount)];
    let mut samples = Vec::new();
    for number in 1..=SAMPLES {
        let due = interval * number;
        std::thread::sleep(due.saturating_sub(started.elapsed()));
        let (fds, rss_kib) = resources(pid);
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
        samples.push(Sample {
            at: started.elapsed(),
            fds,
            rss_kib,
            threads,
            lines: work.lines.load(Ordering::Relaxed),
        });
        if number % (SAMPLES / REMOUNTS) == 0 {
            openers.clear();
            rig.unmount();
            rig.mount().unwrap();
            openers.extend([opener(&mount), opener(&mount)]);
        }
    }
    samples
}

/// Opens that are all told: the mount is watched, and nothing else goes on.
fn burst(mount: &Path) {
    Worker::start(
        mount,
        &format!(
            "open('/proc/self/comm','w').write('burst')\n\
             for number in range({BURST}): os.close(os.open('clip%d'%(number%24),os.O_RDONLY))"
        ),
        &[],
    )
    .end();
}

/// The median of a figure over some samples.
fn median(samples: &[Sample], figure: impl Fn(&Sample) -> u64) -> u64 {
    let mut all: Vec<u64> = samples.iter().map(figure).collect();
    all.sort_unstable();
    all[all.len() / 2]
}

#[test]
fn run_stays_as_it_is() {
    need_root();
    let options = RigOptions {
        mount_arguments: vec!["--allow-other".into()],
        ..RigOptions::default()
    };
    let mut rig = rig_with(options, fill);
    for number in 0..CLIPS {
        rig.cache_whole(Path::new(&format!("clip{number}")))
            .unwrap();
    }
    let mount = rig.mountpoint();
    let folder = folder();
    let socket = folder.path().join("socket");
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let metrics = format!("--metrics={address}");
    let arguments = ["--account", &metrics, "--socket", socket.to_str().unwrap()];
    let mut tracking = Tracking::start(&mount, &arguments);
    eventually("a socket", || Raw::try_connect(&socket).is_ok());
    let pid = tracking.pid();
    let work = Work::default();
    let (samples, losses, summary) = std::thread::scope(|scope| {
        let (rig, work, mount, socket) = (&mut rig, &work, &mount, &socket);
        let given = scope.spawn(move || be_given(socket, mount, work));
        let scraping = scope.spawn(move || scrape(address, work));
        let stressed = scope.spawn(move || {
            let samples = stress(rig, pid, work);
            work.over.store(true, Ordering::Relaxed);
            given.join().unwrap();
            scraping.join().unwrap();
            // Once a clip of the last mount was told of, all are.
            let before = work.lines.load(Ordering::Relaxed);
            Worker::start(mount, "os.close(os.open('clip1',os.O_RDONLY))", &[]).end();
            eventually("events", || work.lines.load(Ordering::Relaxed) > before);
            burst(mount);
            eventually("every open", || work.burst.load(Ordering::Relaxed) >= BURST);
            let losses = losses_of(&get(address, "/metrics"));
            kill(Pid::from_raw(pid as i32), Signal::SIGINT).unwrap();
            (samples, losses)
        });
        let summary = listen(&mut tracking, work);
        let (samples, losses) = stressed.join().unwrap();
        (samples, losses, summary)
    });
    for s in &samples {
        eprintln!(
            "{:>6.0} s {:>7} KiB {:>4} descriptors {:>3} threads {:>9} lines",
            s.at.as_secs_f64(),
            s.rss_kib,
            s.fds,
            s.threads,
            s.lines
        );
    }
    let handed = work.handed.load(Ordering::Relaxed);
    let scrapes = work.scrapes.load(Ordering::Relaxed);
    eprintln!("{handed} clips read by handovers, {scrapes} scrapes; {summary}");
    assert_eq!(summary["event"], "summary");
    assert_eq!(summary["tracked"], 0);
    assert_eq!(summary["complete"], true, "{summary}");
    assert_eq!(work.burst.load(Ordering::Relaxed), BURST);
    assert!(handed > 0 && scrapes > 0);
    assert!(!losses.is_empty());
    for (cause, count) in losses {
        assert_eq!(summary["losses"][&cause], count, "{cause}");
    }
    assert!(summary["account"]["reads"].as_u64().unwrap() > 0);
    let quarter = samples.len() / 4;
    let (early, late) = (&samples[quarter..2 * quarter], &samples[3 * quarter..]);
    let rss = |part| median(part, |s| s.rss_kib);
    assert!(rss(late) <= rss(early) + SLACK_KIB, "memory grows");
    let fds = |part| median(part, |s| s.fds as u64);
    assert!(fds(late) <= fds(early) + SLACK_FDS, "descriptors leak");
    let threads = |part| median(part, |s| s.threads as u64);
    assert!(threads(late) <= threads(early) + SLACK_FDS, "threads leak");
    tracking.end(Signal::SIGINT);
}
