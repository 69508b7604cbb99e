//! Engines that are programs: `bench` of this program reads the clip as any other
//! would, through the mount for all that it knows, under `exec` or with a library
//! that is preloaded.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use tempfile::TempDir;

use super::{BenchError, Engine, Pattern};
use crate::optin;

/// What opens go through; see there.
const SHIM: &str = include_str!("preload.c");

/// How often to look whether it has ended.
const LOOK: Duration = Duration::from_millis(2);

/// A program that reads one clip.
pub(super) struct Child {
    program: PathBuf,
    clip: PathBuf,
    engine: Engine,
    preload: Option<Preload>,
}

/// The library, and what it gives for the clip.
struct Preload {
    folder: TempDir,
    cache: PathBuf,
}

/// One run of it.
#[derive(Debug, Deserialize)]
pub(super) struct Ran {
    pub(super) sha256: String,
    pub(super) samples_ns: Vec<u64>,
    pub(super) open_ns: Vec<u64>,
}

#[derive(Deserialize)]
struct Report {
    results: Vec<Ran>,
}

/// Of `exec --report=json`.
#[derive(Deserialize)]
struct Assisted {
    substituted: u64,
    by_reason: serde_json::Map<String, serde_json::Value>,
    unassisted: Option<String>,
}

impl Child {
    pub(super) fn under_exec(program: &Path, clip: &Path) -> Self {
        Self {
            program: program.into(),
            clip: clip.into(),
            engine: Engine::Exec,
            preload: None,
        }
    }

    /// Builds the library, which opens `cache` in the clip's place.
    pub(super) fn preloaded(program: &Path, clip: &Path, cache: &Path) -> Result<Self, BenchError> {
        let mut child = Self {
            program: program.into(),
            clip: clip.into(),
            engine: Engine::Preload,
            preload: None,
        };
        let folder = build().map_err(|why| child.cannot(why))?;
        let cache = cache.into();
        child.preload = Some(Preload { folder, cache });
        Ok(child)
    }

    fn cannot(&self, why: String) -> BenchError {
        BenchError::Engine {
            path: self.clip.clone(),
            engine: self.engine.name(),
            why,
        }
    }

    /// Runs it once. Each of its opens of the clip must have been answered otherwise
    /// than by FUSE: else something else would be measured.
    pub(super) fn run(
        &self,
        pattern: Pattern,
        block_size: usize,
        streams: u32,
        stop: &mut impl FnMut() -> bool,
    ) -> Result<Ran, BenchError> {
        let mut command = Command::new(&self.program);
        match &self.preload {
            Some(preload) => {
                let _ = std::fs::remove_file(preload.mark());
                command
                    .env("LD_PRELOAD", preload.library())
                    .env("VMAFX_BENCH_CLIP", &self.clip)
                    .env("VMAFX_BENCH_CACHE", &preload.cache)
                    .env("VMAFX_BENCH_MARK", preload.mark());
            }
            None => {
                command
                    // `bench` works with the kill switch; its engines, too.
                    .env_remove(optin::VARIABLE)
                    .args(["exec", "--report=json", "--"])
                    .arg(&self.program);
            }
        }
        command
            .args(["bench", "-q", "--engines=fuse", "--runs=1", "--format=json"])
            .args(["--pattern", pattern.name()])
            .args(["--block-size", &block_size.to_string()])
            .args(["--streams", &streams.to_string()])
            .arg("--")
            .arg(&self.clip)
            .stdin(Stdio::null());
        let output = output_of(&mut command, stop).map_err(|e| {
            let program = self.program.display();
            self.cannot(format!("`{program}`: {e}"))
        })?;
        let Some(output) = output else {
            return Err(BenchError::Stopped);
        };
        let ran = parse(&output).map_err(|why| self.cannot(why))?;
        let acted = match &self.preload {
            Some(preload) if preload.mark().exists() => Ok(()),
            Some(_) => Err("the library was not asked to open the clip".into()),
            None => assisted(&output),
        };
        acted.map(|()| ran).map_err(|why| self.cannot(why))
    }
}

impl Preload {
    fn library(&self) -> PathBuf {
        self.folder.path().join("preload.so")
    }

    /// Made by the library when it has opened the cache file.
    fn mark(&self) -> PathBuf {
        self.folder.path().join("mark")
    }
}

/// Runs a program; `None` when it was stopped, which it is by a signal.
fn output_of(command: &mut Command, stop: &mut impl FnMut() -> bool) -> io::Result<Option<Output>> {
    // No pipes, which somebody would have to empty meanwhile.
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = command
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()?;
    let mut stopped = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if !stopped && stop() {
            stopped = true;
            // exec passes it on.
            kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM)?;
        }
        std::thread::sleep(LOOK);
    };
    let read = |file: &mut File| {
        let mut bytes = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut bytes).map(|_| bytes)
    };
    let output = Output {
        status,
        stdout: read(&mut stdout)?,
        stderr: read(&mut stderr)?,
    };
    Ok((!stopped && !stop()).then_some(output))
}

/// Compiles the library into a folder of its own.
fn build() -> Result<TempDir, String> {
    let folder = tempfile::Builder::new()
        .prefix("vmafx-bypass-")
        .tempdir()
        .map_err(|e| format!("a temporary folder: {e}"))?;
    let source = folder.path().join("preload.c");
    std::fs::write(&source, SHIM).map_err(|e| format!("`{}`: {e}", source.display()))?;
    let built = Command::new("cc")
        .args(["-O2", "-shared", "-fPIC", "-o"])
        .arg(folder.path().join("preload.so"))
        .arg(&source)
        .arg("-ldl")
        .stdin(Stdio::null())
        .output();
    match built {
        Ok(built) if built.status.success() => Ok(folder),
        Ok(built) => Err(format!("cc failed: {}", last_line(&built.stderr))),
        Err(e) => Err(format!("cc builds the library: {e}")),
    }
}

fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.trim().lines().last().unwrap_or_default().to_owned()
}

fn parse(output: &Output) -> Result<Ran, String> {
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        // The report of exec comes last.
        let told = text.lines().rfind(|line| !line.starts_with('{'));
        return Err(told.map_or_else(|| output.status.to_string(), str::to_owned));
    }
    let report: Report =
        serde_json::from_slice(&output.stdout).map_err(|e| format!("the program's report: {e}"))?;
    let mut results = report.results.into_iter();
    results.next().ok_or("the program reports nothing".into())
}

/// Whether all opens of clips got a snapshot.
fn assisted(output: &Output) -> Result<(), String> {
    let line = last_line(&output.stderr);
    let report: Assisted =
        serde_json::from_str(&line).map_err(|e| format!("the report of exec: {e}: {line}"))?;
    if let Some(why) = report.unassisted {
        return Err(why);
    }
    match report.by_reason.keys().next() {
        Some(reason) => Err(format!("an open went through fuse: {reason}")),
        None if report.substituted == 0 => Err("no open of the clip was seen".into()),
        None => Ok(()),
    }
}
