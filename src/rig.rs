//! A private rclone of one's own: clips served over HTTP on loopback, mounted
//! with a cache, in a temporary folder; gone when dropped.
//!
//! `bench --generate` and the tests run on it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::cache::rclone::{Locator, estimate};
use crate::mounts::{Dev, MountTable};
use crate::sys;

/// How long rclone may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often to look whether it has.
const INTERVAL: Duration = Duration::from_millis(20);

/// How to start. `{folder}` in the remote, in arguments and in the environment
/// stands for the rig's own folder, which is also rclone's working folder.
#[derive(Debug, Clone)]
pub struct RigOptions {
    /// The program: a name to be found in PATH, or a path.
    pub rclone: PathBuf,
    /// What to mount; `None`: the served folder, over HTTP.
    pub remote: Option<String>,
    /// `mount`, or another of rclone's commands that mount.
    pub command: String,
    /// Further arguments of `rclone mount`.
    pub mount_arguments: Vec<String>,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
    /// Whether to say where the cache is; if not, the environment does.
    pub cache_argument: bool,
    /// Whether to mount read-only.
    pub read_only: bool,
}

impl Default for RigOptions {
    fn default() -> Self {
        Self {
            rclone: "rclone".into(),
            remote: None,
            command: "mount".into(),
            mount_arguments: Vec::new(),
            environment: Vec::new(),
            cache_argument: true,
            read_only: true,
        }
    }
}

/// A running rclone: what is put into [`source`](Self::source) shows below
/// [`mountpoint`](Self::mountpoint).
#[derive(Debug)]
pub struct Rig {
    program: PathBuf,
    options: RigOptions,
    folder: TempDir,
    remote: String,
    server: Option<Child>,
    mount: Option<Child>,
}

impl Rig {
    /// Serves an empty folder, which `fill` may put clips into before it is
    /// mounted, and mounts it.
    ///
    /// # Errors
    /// Where rclone cannot be started, or does not mount in 20 seconds; with
    /// what it said.
    pub fn start(
        options: RigOptions,
        fill: impl FnOnce(&Path) -> io::Result<()>,
    ) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("vmafx-bypass-").tempdir()?;
        let is_path = options.rclone.components().count() > 1;
        let mut rig = Self {
            // It is started from another folder.
            program: if is_path {
                std::path::absolute(&options.rclone)?
            } else {
                options.rclone.clone()
            },
            remote: String::new(),
            options,
            folder,
            server: None,
            mount: None,
        };
        for part in [rig.source(), rig.mountpoint(), rig.cache()] {
            fs::create_dir(part)?;
        }
        fill(&rig.source())?;
        match &rig.options.remote {
            Some(remote) => rig.remote = rig.filled(remote),
            None => rig.serve()?,
        }
        rig.mount()?;
        Ok(rig)
    }

    /// The rig's own folder, which holds all of it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The folder that is served.
    pub fn source(&self) -> PathBuf {
        self.folder.path().join("source")
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> PathBuf {
        self.folder.path().join("mount")
    }

    /// rclone's cache folder.
    pub fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    /// The pid of `rclone mount`, while it is started.
    pub fn daemon(&self) -> Option<u32> {
        self.mount.as_ref().map(Child::id)
    }

    /// How much the kernel reads ahead on the mount, KiB: rclone's `--max-read-ahead`
    /// only limits it.
    ///
    /// # Errors
    /// Unless we are root.
    pub fn set_read_ahead(&self, kib: u32) -> io::Result<()> {
        let dev = fs::metadata(self.mountpoint())?.dev();
        sys::set_read_ahead(Dev::from_st_dev(dev), kib)
    }

    /// What is mounted, as rclone's arguments name it.
    pub fn remote(&self) -> &str {
        &self.remote
    }

    fn filled(&self, text: &str) -> String {
        text.replace("{folder}", &self.folder.path().to_string_lossy())
    }

    fn command(&self, log: &str) -> io::Result<Command> {
        let log = File::create(self.folder.path().join(log))?;
        let mut command = Command::new(&self.program);
        // Nobody's settings but ours, and no signal from the terminal's ^C:
        // the one who owns the rig ends it.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("RCLONE_") {
                command.env_remove(name);
            }
        }
        for (name, value) in &self.options.environment {
            command.env(name, self.filled(value));
        }
        command
            .arg("--config=")
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        Ok(command)
    }

    fn log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
        text.trim().lines().last().unwrap_or_default().to_owned()
    }

    fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        command.spawn().map_err(|e| {
            let program = self.options.rclone.display();
            io::Error::new(e.kind(), format!("`{program}`: {e}; is rclone installed?"))
        })
    }

    fn serve(&mut self) -> io::Result<()> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = self.command("serve.log")?;
        command
            // What changes in the folder is to be seen at once.
            .args(["serve", "http", "--read-only", "--dir-cache-time=0s"])
            .arg("--addr")
            .arg(format!("127.0.0.1:{port}"))
            .arg(self.source());
        let mut server = self.spawn(&mut command)?;
        let up = wait_until(|| {
            Ok(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
                || server.try_wait()?.is_some())
        })?;
        let ended = server.try_wait()?.is_some();
        self.server = Some(server);
        if !up || ended {
            let log = self.log("serve.log");
            return Err(io::Error::other(format!("`rclone serve` failed: {log}")));
        }
        self.remote = format!(":http,url='http://127.0.0.1:{port}':");
        Ok(())
    }

    /// Whether the next mount is to be read-only.
    pub fn set_read_only(&mut self, read_only: bool) {
        self.options.read_only = read_only;
    }

    /// Mounts; the folder must not be mounted.
    ///
    /// # Errors
    /// As of [`start`](Self::start).
    pub fn mount(&mut self) -> io::Result<()> {
        let mut command = self.command("mount.log")?;
        command
            .arg(&self.options.command)
            .arg(&self.remote)
            .arg(self.mountpoint())
            .args(["--vfs-cache-mode", "full"]);
        if self.options.cache_argument {
            command.arg("--cache-dir").arg(self.cache());
        }
        if self.options.read_only {
            command.arg("--read-only");
        }
        let arguments = self.options.mount_arguments.iter();
        command.args(arguments.map(|argument| self.filled(argument)));
        let mut mount = self.spawn(&mut command)?;
        let up = wait_until(|| Ok(self.is_mounted()? || mount.try_wait()?.is_some()))?;
        let ended = mount.try_wait()?.is_some();
        self.mount = Some(mount);
        if !up || ended {
            let log = self.log("mount.log");
            return Err(io::Error::other(format!("`rclone mount` failed: {log}")));
        }
        Ok(())
    }

    /// Whether the folder is an rclone mount at the moment.
    ///
    /// # Errors
    /// Where `/proc` is not mounted.
    pub fn is_mounted(&self) -> io::Result<bool> {
        let point = self.mountpoint();
        let table = MountTable::read()?;
        Ok(table.iter().any(|m| m.point == point && m.is_rclone()))
    }

    /// Ends `rclone mount` in good order, and unmounts.
    pub fn unmount(&mut self) {
        self.end_mount(Signal::SIGTERM);
    }

    /// Kills `rclone mount`; the folder stays mounted, and dead.
    pub fn kill_daemon(&mut self) {
        if let Some(mut mount) = self.mount.take() {
            // Where it has ended by itself there is nothing to kill.
            let _ = mount.kill();
            let _ = mount.wait();
        }
    }

    fn end_mount(&mut self, signal: Signal) {
        if let Some(mount) = self.mount.take() {
            end(mount, signal);
        }
        // Left by a daemon that was killed, or is still in use.
        while self.is_mounted().unwrap_or(false) {
            if umount2(&self.mountpoint(), MntFlags::MNT_DETACH).is_err() {
                let mut unmount = Command::new("fusermount3");
                unmount
                    .arg("-uz")
                    .arg(self.mountpoint())
                    .stderr(Stdio::null());
                if !unmount.status().is_ok_and(|s| s.success()) {
                    break;
                }
            }
        }
    }

    /// Reads a clip whole through FUSE and waits until rclone's metadata says
    /// so, which since rclone 1.74 takes 5 seconds after the last close.
    ///
    /// # Errors
    /// Of reading, or where it is not cached in 20 seconds.
    pub fn cache_whole(&self, name: &Path) -> io::Result<()> {
        self.cache_whole_unless(name, || false)
    }

    /// As [`cache_whole`](Self::cache_whole), unless `stop` says to.
    ///
    /// # Errors
    /// Likewise; `Interrupted` after a stop.
    pub fn cache_whole_unless(&self, name: &Path, stop: impl Fn() -> bool) -> io::Result<()> {
        let path = self.mountpoint().join(name);
        let go_on = || {
            if stop() {
                return Err(io::Error::from(io::ErrorKind::Interrupted));
            }
            Ok(())
        };
        let mut file = File::open(&path)?;
        let mut block = vec![0; 1 << 20];
        while file.read(&mut block)? > 0 {
            go_on()?;
        }
        drop(file);
        let size = fs::metadata(&path)?.len();
        let cached = wait_until(|| {
            go_on()?;
            let located = Locator::now().and_then(|locator| {
                let mount = locator.table().containing(&path);
                mount.map(|mount| locator.locate(mount)).transpose()
            });
            Ok(matches!(located, Ok(Some(located))
                if estimate(&located.folders, name, size).state.is_none()))
        })?;
        if cached {
            Ok(())
        } else {
            let path = path.display();
            Err(io::Error::other(format!("`{path}` was not cached")))
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.end_mount(Signal::SIGTERM);
        if let Some(server) = self.server.take() {
            end(server, Signal::SIGTERM);
        }
    }
}

/// Ends a child: asks first, and does not wait for ever.
fn end(mut child: Child, signal: Signal) {
    // Where it has ended by itself, there is nobody to ask.
    let _ = kill(Pid::from_raw(child.id() as i32), signal);
    if !wait_until(|| Ok(child.try_wait()?.is_some())).unwrap_or(false) {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Looks again and again until it is so, or patience ends.
fn wait_until(mut is_so: impl FnMut() -> io::Result<bool>) -> io::Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so()? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(INTERVAL);
    }
    Ok(true)
}
