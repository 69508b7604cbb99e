//! `top` shows what `run` tracks, in a terminal and without one.
#![cfg(feature = "top")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{Tracking, Worker, assert_fails, content, eventually, program, put, rig, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use vmafx_bypass::rig::Rig;

/// Two clips, of which the first is cached whole and the second not at all.
fn clips() -> Rig {
    let rig = rig(|source| {
        put(source, "cached.y4m", &content(1, 300_000));
        put(source, "cold.y4m", &content(2, 100_000));
    });
    rig.cache_whole(Path::new("cached.y4m")).unwrap();
    rig
}

/// Opens clips of the folder, and closes the first of them at its next step.
fn opener(rig: &Rig, clips: &[&str]) -> Worker {
    let script = "fds=[os.open(c,os.O_RDONLY) for c in sys.argv[1:]]; step(); os.close(fds[0])";
    Worker::start(&rig.mountpoint(), script, clips)
}

/// A shell in a tmux of its own; ended when dropped.
struct Terminal {
    name: String,
    /// Where the shell leaves what it is asked for.
    folder: TempDir,
}

impl Terminal {
    fn start(name: &str) -> Self {
        let terminal = Self {
            name: format!("vmafx-{name}-{}", std::process::id()),
            folder: tempfile::tempdir().unwrap(),
        };
        terminal.tmux(&[
            "new-session",
            "-d",
            "-x",
            "110",
            "-y",
            "24",
            "env -u NO_COLOR LC_ALL=C.UTF-8 PS1='$ ' bash --norc --noprofile",
        ]);
        terminal.tmux(&["set-option", "-g", "window-size", "manual"]);
        terminal
    }

    fn tmux(&self, args: &[&str]) -> String {
        let output = Command::new("tmux")
            .args(["-u", "-f", "/dev/null", "-L", &self.name])
            .args(args)
            .env("LC_ALL", "C.UTF-8")
            .env_remove("TMUX")
            .stdin(Stdio::null())
            .output()
            .expect("tmux is installed by scripts/setup.sh");
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn keys(&self, keys: &str) {
        self.tmux(&["send-keys", keys]);
    }

    fn text(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
    }

    fn resize(&self, width: u16, height: u16) {
        let (x, y) = (width.to_string(), height.to_string());
        self.tmux(&["resize-window", "-x", &x, "-y", &y]);
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits for a screen of which this is true, and returns it.
    fn shows(&self, what: &str, is_so: impl Fn(&str) -> bool) -> String {
        let deadline = std::time::Instant::now() + common::patience();
        loop {
            let screen = self.screen();
            if is_so(&screen) {
                return screen;
            }
            let late = std::time::Instant::now() >= deadline;
            assert!(!late, "{what} is not shown:\n{screen}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    fn has(&self, text: &str) -> String {
        self.shows(text, |screen| screen.contains(text))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// How the terminal is set, by the shell's own stty(1).
    fn modes(&self, name: &str) -> String {
        let file = self.file(name);
        self.text(&format!(
            "stty -a > {0}.new; mv {0}.new {0}",
            file.display()
        ));
        self.keys("Enter");
        eventually("the terminal's modes", || file.exists());
        fs::read_to_string(file).unwrap()
    }

    /// Has the shell run `top`, and leave its exit code at its end.
    fn top(&self, pin_dir: &Path, args: &str) {
        let program = env!("CARGO_BIN_EXE_vmafx-bypass");
        let (pins, code) = (pin_dir.display(), self.file("code"));
        let code = code.display();
        self.text(&format!(
            "{program} top --pin-dir {pins} {args}; echo $? > {code}.new; mv {code}.new {code}"
        ));
        self.keys("Enter");
        self.has("q quit");
    }

    fn ended_with(&self, code: &str) {
        let file = self.file("code");
        eventually("the end of top", || file.exists());
        assert_eq!(fs::read_to_string(&file).unwrap().trim_end(), code);
        fs::remove_file(file).unwrap();
        let screen = self.shows("the shell", |screen| screen.contains("$ "));
        assert!(!screen.contains("q quit"), "{screen}");
    }

    /// The pid of `top`.
    fn pid(&self) -> Pid {
        let shell = self.tmux(&["display-message", "-p", "#{pane_pid}"]);
        let shell = shell.trim_end();
        let pid = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
        Pid::from_raw(pid.trim_end().parse().unwrap())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}

fn line_of<'a>(screen: &'a str, text: &str) -> &'a str {
    let mut lines = screen.lines();
    lines.find(|line| line.contains(text)).unwrap_or_default()
}

#[test]
fn the_view_shows_clips_and_processes_and_does_what_keys_say() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let mut both = opener(&rig, &["cold.y4m", "cached.y4m"]);
    let one = opener(&rig, &["cached.y4m"]);
    let terminal = Terminal::start("view");
    let before = terminal.modes("before");
    terminal.top(&tracking.pin_dir, "--interval 100ms");

    let screen = terminal.shows("both clips", |s| {
        line_of(s, "/cached.y4m").contains("active") && line_of(s, "/cold.y4m").contains("no_meta")
    });
    let cached = line_of(&screen, "/cached.y4m").split_whitespace();
    let cached: Vec<_> = cached.filter(|word| *word != ">").collect();
    let expected = ["active", "##########", "100%", "293.0", "KiB", "2", "2"];
    assert_eq!(cached[..7], expected, "{screen}");
    assert!(
        line_of(&screen, "/cold.y4m").contains("..........   0%"),
        "{screen}"
    );
    let owner = format!("run {}: complete, since ", tracking.pid());
    assert!(screen.starts_with(&owner), "{screen}");
    let amount = format!(
        "3 descriptors, 2 clips, 2 processes on {}",
        rig.mountpoint().display()
    );
    assert!(screen.contains(&amount), "{screen}");
    assert!(screen.contains("start run with --account"), "{screen}");

    // Processes, and one's own clips.
    terminal.keys("Tab");
    let pids = [both.pid(), one.pid()].map(|pid| pid.to_string());
    let screen = terminal.has("COMMAND");
    assert!(line_of(&screen, &pids[0]).ends_with("python3"), "{screen}");
    assert!(screen.contains(&pids[1]), "{screen}");
    terminal.keys("/");
    terminal.text(&pids[1]);
    terminal.shows("one process", |s| !s.contains(&format!("{} ", pids[0])));
    terminal.keys("Enter");
    terminal.keys("Enter");
    let screen = terminal.has(&format!("only those of process {}", pids[1]));
    assert!(
        screen.contains("/cached.y4m") && !screen.contains("/cold.y4m"),
        "{screen}"
    );
    terminal.keys("Escape");
    terminal.has("/cold.y4m");

    // Another order, and back.
    let first = |screen: &str| line_of(screen, ".y4m").contains("cold.y4m");
    terminal.keys("s");
    terminal.shows("an order by path", |s| s.contains("PATH↑") && !first(s));
    terminal.keys("S");
    terminal.shows("the other order", |s| s.contains("PATH↓") && first(s));

    // The chosen clip, explained.
    terminal.keys("/");
    terminal.text("CACHED.");
    terminal.shows("the filter", |s| {
        !s.contains("/cold.y4m") && s.contains("/CACHED.")
    });
    terminal.keys("Enter");
    terminal.keys("e");
    let screen = terminal.has("ok  read_only_open");
    assert!(
        screen.contains("cached.y4m: active; `read` would take 293.0 KiB"),
        "{screen}"
    );
    terminal.keys("End");
    terminal.has("nothing was changed");
    terminal.keys("Escape");
    terminal.shows("the rows", |s| !s.contains("nothing was changed"));
    terminal.keys("Escape");
    terminal.has("/cold.y4m");

    // While it pauses, nothing changes.
    terminal.keys("p");
    terminal.has("PAUSED");
    both.proceed();
    assert_eq!(tracking.dump()["entries"].as_array().unwrap().len(), 2);
    std::thread::sleep(std::time::Duration::from_millis(300));
    terminal.has("/cold.y4m");
    terminal.keys("p");
    terminal.shows("the close", |s| {
        !s.contains("/cold.y4m") && !s.contains("PAUSED")
    });

    for (width, height) in [(20, 5), (1, 1), (300, 3), (45, 12), (110, 24)] {
        terminal.resize(width, height);
        let screen = terminal.shows("a row that fits", |s| {
            s.lines().all(|l| l.chars().count() <= width.into())
                && (width < 20 || s.contains("ached.y4m"))
        });
        assert!(screen.lines().count() <= height.into(), "{screen}");
    }
    terminal.keys("?");
    terminal.has("the share of the time spent in these reads");
    terminal.keys("q");

    // `run` ends, and another one comes.
    let pid = tracking.pid();
    tracking.end(Signal::SIGTERM);
    terminal.has(&format!(
        "run {pid} has ended, this is its last; waiting for another"
    ));
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    terminal.has(&format!("run {}: complete, since ", tracking.pid()));
    terminal.keys("q");
    terminal.ended_with("0");
    assert_eq!(terminal.modes("after"), before);
}

#[test]
fn the_terminal_is_given_back_however_it_ends() {
    let rig = clips();
    let mut tracking = Tracking::start(&rig.mountpoint(), &[]);
    let _worker = opener(&rig, &["cached.y4m"]);
    let terminal = Terminal::start("back");
    let before = terminal.modes("before");
    for (signal, code) in [
        (Signal::SIGTERM, "143"),
        (Signal::SIGINT, "130"),
        (Signal::SIGHUP, "129"),
    ] {
        terminal.top(&tracking.pin_dir, "");
        kill(terminal.pid(), signal).unwrap();
        terminal.ended_with(code);
        assert_eq!(terminal.modes(signal.as_str()), before);
    }
    terminal.top(&tracking.pin_dir, "--view processes");
    terminal.has("COMMAND");
    // Stopped as a job, the shell has its terminal; and then it draws again.
    terminal.keys("C-z");
    terminal.has("Stopped");
    assert_eq!(terminal.modes("stopped"), before);
    // What followed its stop is its code.
    let code = terminal.file("code");
    fs::remove_file(&code).unwrap();
    terminal.text(&format!(
        "fg; echo $? > {0}.new; mv {0}.new {0}",
        code.display()
    ));
    terminal.keys("Enter");
    terminal.has("COMMAND");
    // Killed, `run` leaves its maps.
    let pid = tracking.pid();
    tracking.kill();
    terminal.has(&format!("run {pid} has died"));
    terminal.keys("C-c");
    terminal.ended_with("0");
    assert_eq!(terminal.modes("after"), before);
}

#[test]
fn a_mount_that_hangs_holds_neither_keys_nor_the_end() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = opener(&rig, &["cached.y4m"]);
    let daemon = Pid::from_raw(rig.daemon().unwrap() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let terminal = Terminal::start("hangs");
    terminal.top(&tracking.pin_dir, "");
    terminal.shows("the estimate", |s| {
        line_of(s, "/cached.y4m").contains("active")
    });
    terminal.keys("e");
    terminal.has("asking; FUSE may take its time");
    terminal.keys("Escape");
    terminal.shows("the rows", |s| !s.contains("asking"));
    terminal.keys("e");
    terminal.has("asking; FUSE may take its time");
    terminal.keys("C-c");
    terminal.ended_with("0");
    kill(daemon, Signal::SIGCONT).unwrap();
    worker.end();
}

fn spawn(pin_dir: &Path, args: &[&str]) -> Child {
    program()
        .args(["top", "--interval", "100ms", "--pin-dir"])
        .arg(pin_dir)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn without_a_terminal_it_prints_what_it_sees() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = opener(&rig, &["cold.y4m", "cached.y4m"]);
    let pins = &tracking.pin_dir;

    let output = spawn(pins, &["--count", "2"]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    let tables: Vec<_> = text.split_terminator("\n\n").collect();
    assert_eq!(tables.len(), 2, "{text}");
    for table in tables {
        let lines: Vec<_> = table.lines().collect();
        assert!(
            lines[0].contains(&format!(" run {}: complete, since ", tracking.pid())),
            "{table}"
        );
        assert!(
            lines[3].starts_with("STATE ") && lines[3].ends_with(" PATH"),
            "{table}"
        );
        assert_eq!(lines.len(), 6, "{table}");
        assert!(table.contains(rig.mountpoint().join("cold.y4m").to_str().unwrap()));
    }
    let output = spawn(pins, &["--count", "1", "--view", "processes"]);
    let text = String::from_utf8(output.wait_with_output().unwrap().stdout).unwrap();
    let row: Vec<_> = text.lines().nth(4).unwrap().split_whitespace().collect();
    assert_eq!(row[..3], [&*worker.pid().to_string(), "2", "2"], "{text}");

    // As JSON, until `run` ends and then a signal comes.
    let mut child = spawn(pins, &["--format", "json"]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(next(), serde_json::json!({"schema": 1, "stream": "top"}));
    let look = next();
    assert_eq!(
        (&look["event"], &look["complete"]),
        (&"look".into(), &true.into())
    );
    assert_eq!(look["owner"]["pid"], tracking.pid());
    assert_eq!(look["descriptors"], 2);
    let clip = look["clips"].as_array().unwrap().iter();
    let mut clip = clip.filter(|clip| clip["state"] == "active");
    let clip = clip.next().unwrap();
    let path = rig.mountpoint().join("cached.y4m");
    assert_eq!(clip["path"], path.to_str().unwrap());
    assert_eq!(
        (&clip["size"], &clip["cached_bytes"]),
        (&300_000.into(), &300_000.into())
    );
    assert_eq!(clip["pids"], serde_json::json!([worker.pid()]));
    assert_eq!(look["processes"][0]["comm"], "python3");
    // A closed output is no error.
    let mut closed = spawn(pins, &[]);
    drop(closed.stdout.take());
    assert_eq!(closed.wait().unwrap().code(), Some(0));
    let pins = pins.to_str().unwrap().to_owned();
    tracking.end(Signal::SIGTERM);
    let message = "start `vmafx-bypass run --prefix DIR` first";
    assert_fails(&run(&["top", "--pin-dir", &pins]), 3, message);
    let gone = loop {
        let line = next();
        if line["event"] != "look" {
            break line;
        }
    };
    assert_eq!(gone["event"], "gone");
    assert!(
        gone["reason"]
            .as_str()
            .unwrap()
            .contains("vmafx-bypass run"),
        "{gone}"
    );
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let status = child.wait().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(143), None));
}

#[test]
fn what_is_read_through_fuse_is_shown_a_second_and_in_all() {
    let rig = clips();
    let tracking = Tracking::start(&rig.mountpoint(), &["--account"]);
    let script = "fd=os.open('cold.y4m',os.O_RDONLY); step()\n\
                  for i in range(10): os.pread(fd,4096,4096*i)\n\
                  while True:\n \
                    other=os.open('cached.y4m',os.O_RDONLY); os.pread(other,1000,0)\n \
                    os.close(other); step()";
    let mut worker = Worker::start(&rig.mountpoint(), script, &[]);
    let mut child = spawn(&tracking.pin_dir, &["--format", "json"]);
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut looks = lines
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
        .skip(1);
    let first = looks.next().unwrap();
    let nothing = serde_json::json!({
        "reads": 0, "read_bytes": 0, "read_ns": 0,
        "reads_per_s": null, "read_bytes_per_s": null, "read_ns_per_s": null,
    });
    assert_eq!(first["clips"][0]["account"], nothing);
    let of = |look: &Value, name: &str| {
        let clips = look["clips"].as_array().unwrap();
        let clip = clips
            .iter()
            .find(|c| c["path"].as_str().unwrap().ends_with(name));
        clip.cloned().unwrap_or_default()
    };
    // Looks while it reads may each have some of it; one that falls between open and
    // close has the clip open.
    let (mut cold, mut cached, mut reads, mut opens) = (Value::Null, Value::Null, 0.0, 0);
    while cached["descriptors"] != 0 {
        worker.proceed();
        opens += 1;
        cached = Value::Null;
        while cold["account"]["reads"] != 10 || cached["account"]["reads"] != opens {
            let look = looks.next().unwrap();
            (cold, cached) = (of(&look, "cold.y4m"), of(&look, "cached.y4m"));
            reads += cold["account"]["reads_per_s"].as_f64().unwrap();
            if cached == Value::Null && cold["account"]["reads"] == 10 {
                break;
            }
        }
    }
    assert_eq!(cold["account"]["read_bytes"], 40_960);
    assert!(
        cold["account"]["read_ns"].as_u64().unwrap() > 0 && reads > 0.0,
        "{cold}"
    );
    // Closed again, and still told of once, with all that is known of it.
    assert_eq!(
        (&cached["descriptors"], &cached["size"]),
        (&0.into(), &300_000.into())
    );
    assert_eq!(
        (&cached["account"]["reads"], &cached["state"]),
        (&opens.into(), &"active".into())
    );
    let after = looks.next().unwrap();
    assert_eq!(of(&after, "cached.y4m"), Value::Null);
    assert_eq!(of(&after, "cold.y4m")["account"]["reads_per_s"], 0.0);
    child.kill().unwrap();
    child.wait().unwrap();

    // In the view, while somebody reads without an end.
    let script = "fd=os.open('cold.y4m',os.O_RDONLY)\n\
                  def read():\n while True: os.pread(fd,65536,0); time.sleep(0.001)\n\
                  threading.Thread(target=read,daemon=True).start()";
    worker.kill();
    let _reader = Worker::start(&rig.mountpoint(), script, &[]);
    let terminal = Terminal::start("reads");
    terminal.top(&tracking.pin_dir, "--interval 100ms");
    let row = format!(
        r"/{}/mount/cold.y4m",
        rig.folder().file_name().unwrap().display()
    );
    terminal.resize(160, 10);
    let screen = terminal.shows("rates", |s| {
        s.contains(" of the time")
            && line_of(s, &row).contains(" KiB ")
            && line_of(s, &row).contains("% ")
    });
    assert!(!line_of(&screen, &row).contains(" - "), "{screen}");
    terminal.keys("Tab");
    let screen = terminal.has("COMMAND");
    let row = line_of(&screen, "python3");
    assert!(
        row.contains("iB") && row.contains('%') && row.contains(" s "),
        "{screen}"
    );
    terminal.keys("q");
    terminal.ended_with("0");
}
