//! Under which conditions a benchmark ran.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;
use vmafx_bypass::bench::Plan;
use vmafx_bypass::cache::rclone::Locator;

/// What makes figures comparable, or not.
#[derive(Debug, Serialize)]
pub struct Environment {
    version: &'static str,
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    /// Every clip was read once, by each engine, before it was measured; `cold`:
    /// and its pages dropped before each run.
    pub page_cache: &'static str,
    generated: bool,
    /// The first line of `rclone version`, where it was started for the purpose.
    pub rclone: Option<String>,
    pub clips: Vec<Clip>,
}

/// A clip, and what serves it.
#[derive(Debug, Serialize)]
pub struct Clip {
    pub path: String,
    pub size: u64,
    /// The daemon's arguments: rclone's version is told by its program.
    pub daemon: Vec<String>,
    source: Option<String>,
    read_only: Option<bool>,
}

impl Environment {
    /// `, rclone v1.60.1`, if it is known.
    pub fn with_rclone(&self) -> String {
        let version = self.rclone.as_deref();
        version.map_or_else(String::new, |version| format!(", {version}"))
    }

    /// `rclone`: the program that was started for the purpose.
    pub fn read(plan: &Plan, rclone: Option<&Path>) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or_else(
                || std::env::consts::ARCH.to_owned(),
                |(_, name)| name.to_owned(),
            );
        let kernel = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            kernel,
            cpu,
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            page_cache: if plan.cold { "cold" } else { "warm" },
            generated: rclone.is_some(),
            rclone: rclone.and_then(version),
            clips: plan.clips.iter().map(|clip| Clip::read(clip)).collect(),
        }
    }
}

fn version(rclone: &Path) -> Option<String> {
    let output = Command::new(rclone).arg("version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

impl Clip {
    fn read(path: &Path) -> Self {
        let resolved = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let locator = Locator::now().ok();
        let mount = locator
            .as_ref()
            .and_then(|locator| locator.table().containing(&resolved));
        let located = locator.as_ref().zip(mount);
        let located = located.and_then(|(locator, mount)| locator.locate(mount).ok());
        let pid = located.map(|located| located.daemon.pid);
        let arguments = pid.and_then(|pid| fs::read(format!("/proc/{pid}/cmdline")).ok());
        Self {
            path: path.to_string_lossy().into_owned(),
            size: fs::metadata(path).map_or(0, |m| m.len()),
            daemon: arguments
                .unwrap_or_default()
                .split(|&b| b == 0)
                .filter(|argument| !argument.is_empty())
                .map(|argument| String::from_utf8_lossy(argument).into_owned())
                .collect(),
            source: mount
                .as_ref()
                .map(|m| m.source.to_string_lossy().into_owned()),
            read_only: mount.map(|m| m.read_only),
        }
    }
}
