//! A headless Chromium, driven by the protocol of its developer tools over a pipe.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::{Value, json};

use super::picture::Picture;
use crate::common::{eventually, need_root, patience};

/// How long an answer may take, the first one with the browser's start.
pub const LIMIT: Duration = Duration::from_secs(60);

/// What a page is shown on.
#[derive(Clone, Copy)]
pub struct Screen {
    pub width: u32,
    pub phone: bool,
    pub dark: bool,
    pub print: bool,
}

pub struct Browser {
    child: Child,
    input: ChildStdin,
    answers: Receiver<Value>,
    events: VecDeque<Value>,
    calls: u64,
    /// The page's, once there is one.
    session: Option<String>,
    limit: Duration,
    /// The pid namespace that all its processes are in.
    namespace: Option<PathBuf>,
    profile: tempfile::TempDir,
    /// Each of them wants more than one processor.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Browser {
    pub fn start(limit: Duration) -> Self {
        need_root();
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let profile = tempfile::tempdir().unwrap();
        let log = fs::File::create(profile.path().join("log")).unwrap();
        // In a pid namespace, since all in it end with its first process; and without a
        // network. The pipe is the descriptors 3 and 4.
        let mut child = Command::new("unshare")
            .args(["--pid", "--net", "--mount-proc", "--fork", "--kill-child"])
            .args(["sh", "-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null"])
            .args(["sh", "chromium", "--headless=new", "--no-sandbox"])
            .args(["--disable-gpu", "--hide-scrollbars", "--no-first-run"])
            .args(["--force-color-profile=srgb", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let (sender, answers) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for message in output.split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).unwrap();
                if sender.send(message).is_err() {
                    break;
                }
            }
        });
        let own = namespace("self/ns/pid");
        let of_children = format!("{}/ns/pid_for_children", child.id());
        let mut made = None;
        eventually("a pid namespace", || {
            made = namespace(&of_children).filter(|made| own.as_ref() != Some(made));
            // What cannot even start says so in its log, below.
            made.is_some() || child.try_wait().unwrap().is_some()
        });
        let mut browser = Self {
            namespace: made,
            input: child.stdin.take().unwrap(),
            child,
            answers,
            events: VecDeque::new(),
            calls: 0,
            session: None,
            limit: LIMIT,
            profile,
            _alone: alone,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let target = target.unwrap()["targetId"].clone();
        let attach = json!({"targetId": target, "flatten": true});
        let session = browser.call("Target.attachToTarget", attach).unwrap();
        browser.session = Some(session["sessionId"].as_str().unwrap().to_owned());
        browser.call("Page.enable", json!({})).unwrap();
        browser.call("Network.enable", json!({})).unwrap();
        browser.limit = limit;
        browser
    }

    fn receive(&mut self, until: Instant) -> Result<Value, String> {
        let left = until.saturating_duration_since(Instant::now());
        self.answers.recv_timeout(left).map_err(|error| {
            let log = fs::read_to_string(self.profile.path().join("log"));
            format!(
                "chromium, which scripts/setup.sh installs: {error}: {}",
                log.unwrap_or_default()
            )
        })
    }

    /// Asks the browser, and waits for the answer.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, String> {
        let until = Instant::now() + self.limit;
        self.calls += 1;
        let mut message = json!({"id": self.calls, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        // Where it has ended there is no answer either, and its log says why.
        let _ = self.input.write_all(&bytes);
        loop {
            let mut answer = self.receive(until)?;
            if answer["id"] == self.calls {
                return match answer.get("error") {
                    Some(error) => Err(format!("{method}: {error}")),
                    None => Ok(answer["result"].take()),
                };
            }
            self.events.push_back(answer);
        }
    }

    /// Loads a page; returns the addresses that it asked for.
    pub fn show(&mut self, page: &Path, screen: Screen) -> Vec<String> {
        let metrics = json!({"width": screen.width, "height": 900, "deviceScaleFactor": 1,
            "mobile": screen.phone});
        self.call("Emulation.setDeviceMetricsOverride", metrics)
            .unwrap();
        let scheme = if screen.dark { "dark" } else { "light" };
        let media = json!({"media": if screen.print { "print" } else { "screen" },
            "features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", media).unwrap();
        self.events.clear();
        let url = format!("file://{}", page.display());
        self.call("Page.navigate", json!({"url": url})).unwrap();
        let until = Instant::now() + self.limit;
        let mut asked = Vec::new();
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive(until).unwrap(),
            };
            match event["method"].as_str() {
                Some("Network.requestWillBeSent") => {
                    let url = event["params"]["request"]["url"].as_str().unwrap();
                    asked.push(url.to_owned());
                }
                Some("Page.loadEventFired") => return asked,
                _ => {}
            }
        }
    }

    /// What an expression is, as JSON.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "returnByValue": true});
        let mut answer = self.call("Runtime.evaluate", params).unwrap();
        assert!(answer.get("exceptionDetails").is_none(), "{answer}");
        answer["result"]["value"].take()
    }

    fn bytes(&mut self, method: &str, params: Value) -> Vec<u8> {
        let answer = self.call(method, params).unwrap();
        let data = answer["data"].as_str().unwrap();
        base64::prelude::BASE64_STANDARD.decode(data).unwrap()
    }

    /// The page in its full length; also left in a file, to be looked at.
    pub fn picture(&mut self, file: &Path) -> Picture {
        let layout = self.call("Page.getLayoutMetrics", json!({})).unwrap();
        let size = &layout["cssContentSize"];
        let params = json!({"format": "png", "captureBeyondViewport": true, "clip":
            {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}});
        let bytes = self.bytes("Page.captureScreenshot", params);
        fs::write(file, &bytes).unwrap();
        Picture::of(&bytes)
    }

    /// The page as a PDF, on A4.
    pub fn pdf(&mut self) -> Vec<u8> {
        let params = json!({"paperWidth": 8.27, "paperHeight": 11.69});
        self.bytes("Page.printToPDF", params)
    }

    /// Stops all its work, as what hangs.
    pub fn halt(&self) {
        for pid in self.processes() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP);
        }
    }

    fn processes(&self) -> Vec<i32> {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid: &i32| {
            let of = namespace(&format!("{pid}/ns/pid"));
            of.is_some() && of == self.namespace
        })
        .collect()
    }

    /// Kills it; no process of it may be left.
    pub fn end(mut self) {
        assert!(!self.processes().is_empty());
        self.kill();
        assert!(self.processes().is_empty(), "processes of the browser stay");
    }

    /// Before the profile's folder is removed, in which the last of them write.
    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let until = Instant::now() + patience();
        while !self.processes().is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ended already, unless the test failed.
        self.kill();
    }
}

fn namespace(link: &str) -> Option<PathBuf> {
    fs::read_link(Path::new("/proc").join(link)).ok()
}
