//! What `doctor` looks at, gathered; nothing is judged here.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::resource::{Resource, getrlimit};
use serde::Deserialize;
use vmafx_bypass::handover;
use vmafx_bypass::optin::{self, OptIn};
use vmafx_bypass::privileges::Capabilities;

use super::container::Place;

/// What is known of this process, the kernel and what is installed.
#[derive(Debug, Clone)]
pub struct Facts {
    pub place: Place,
    /// This program's file.
    pub program: PathBuf,
    pub is_root: bool,
    pub capabilities: Capabilities,
    pub no_new_privs: bool,
    pub opt_in: OptIn,
    /// Major and minor.
    pub kernel: (u32, u32),
    /// The first line of /proc/self/uid_map.
    pub uid_map: String,
    /// Of kernel lockdown, the line with the state in brackets; `None`: not shown.
    pub lockdown: Option<String>,
    /// Of /proc, its mount options.
    pub proc_options: String,
    /// kernel.perf_event_paranoid.
    pub perf_event_paranoid: Option<i32>,
    /// kernel.yama.ptrace_scope; `None`: no Yama.
    pub ptrace_scope: Option<u8>,
    /// What became of a command under `exec`.
    pub exec: Result<Assisted, String>,
    /// Opening /dev/fuse, as `mount` does.
    pub fuse: Result<(), String>,
    pub fusermount: Option<Helper>,
    /// The contents of /etc/fuse.conf; empty where there is none.
    pub fuse_conf: String,
    /// The optional fields of `/` in mountinfo: `shared:1 master:2`.
    pub propagation: String,
    /// PATH's rclone: what its `version` prints first.
    pub rclone: Result<String, String>,
    /// The server that the environment names, and whether it answers.
    pub server: Option<(PathBuf, Result<(), String>)>,
    /// The hard limit of open descriptors.
    pub descriptors: u64,
}

/// A program that may be set-user-id root.
#[derive(Debug, Clone)]
pub struct Helper {
    pub path: PathBuf,
    pub set_uid_root: bool,
}

/// What `exec --report=json` says.
#[derive(Debug, Clone, Deserialize)]
pub struct Assisted {
    /// Why it was not.
    pub unassisted: Option<String>,
    pub no_new_privs: bool,
}

impl Facts {
    /// Looks at all of it.
    pub fn gather() -> Self {
        let program = std::env::current_exe().unwrap_or_else(|_| "vmafx-bypass".into());
        let text = |path: &str| fs::read_to_string(path).ok();
        let server = handover::socket_from_env().map(|socket| {
            let answers = handover::answers(&socket).map_err(|refusal| refusal.detail);
            (socket, answers)
        });
        Self {
            place: Place::find(),
            is_root: nix::unistd::geteuid().is_root(),
            capabilities: Capabilities::effective(),
            no_new_privs: rustix::thread::no_new_privs().unwrap_or(false),
            opt_in: optin::from_env(),
            kernel: kernel(&rustix::system::uname().release().to_string_lossy()),
            uid_map: text("/proc/self/uid_map").unwrap_or_default(),
            lockdown: text("/sys/kernel/security/lockdown"),
            proc_options: options_of("/proc", &text("/proc/self/mounts").unwrap_or_default()),
            perf_event_paranoid: text("/proc/sys/kernel/perf_event_paranoid")
                .and_then(|level| level.trim().parse().ok()),
            ptrace_scope: text("/proc/sys/kernel/yama/ptrace_scope")
                .and_then(|scope| scope.trim().parse().ok()),
            exec: exec(&program),
            fuse: open_fuse(),
            fusermount: in_path("fusermount3").map(Helper::of),
            fuse_conf: text("/etc/fuse.conf").unwrap_or_default(),
            propagation: propagation(&text("/proc/self/mountinfo").unwrap_or_default()),
            rclone: rclone(),
            server,
            descriptors: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard),
            program,
        }
    }
}

fn open_fuse() -> Result<(), String> {
    let opened = fs::File::options().read(true).write(true).open("/dev/fuse");
    opened.map(drop).map_err(|e| format!("`/dev/fuse`: {e}"))
}

impl Helper {
    fn of(path: PathBuf) -> Self {
        let set_uid_root = fs::metadata(&path)
            .is_ok_and(|found| found.uid() == 0 && found.permissions().mode() & 0o4000 != 0);
        Self { path, set_uid_root }
    }
}

/// `6.18.44-cloud-amd64`.
fn kernel(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The options of what is mounted at `point`, the last of it, by /proc/self/mounts.
fn options_of(point: &str, mounts: &str) -> String {
    let mut lines = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let last = lines.rfind(|fields| fields.get(1) == Some(&point));
    last.and_then(|fields| fields.get(3).map(ToString::to_string))
        .unwrap_or_default()
}

/// The fields between the options of `/` and the hyphen: proc_pid_mountinfo(5).
fn propagation(mountinfo: &str) -> String {
    let mut lines = mountinfo
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let root = lines.rfind(|fields| fields.get(4) == Some(&"/"));
    let optional = root.map(|fields| {
        let fields = fields.into_iter().skip(6);
        fields.take_while(|field| *field != "-").collect::<Vec<_>>()
    });
    optional.unwrap_or_default().join(" ")
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let mut found = std::env::split_paths(&path).map(|folder| folder.join(name));
    found.find(|program| program.is_file())
}

/// Has this program run itself, as `exec` would any command: it says whether that
/// is assisted here.
fn exec(program: &Path) -> Result<Assisted, String> {
    let output = Command::new(program)
        .args(["exec", "--quiet", "--report=json", "--"])
        .arg(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("`{}`: {e}", program.display()))?;
    let told = String::from_utf8_lossy(&output.stderr);
    let last = told.lines().last().unwrap_or_default();
    serde_json::from_str(last).map_err(|_| format!("`exec` said: {}", told.trim()))
}

fn rclone() -> Result<String, String> {
    let output = Command::new("rclone")
        .arg("version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    match output {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            Ok(text.lines().next().unwrap_or_default().to_owned())
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err("no `rclone` in PATH".into()),
        Err(e) => Err(format!("`rclone`: {e}")),
    }
}

/// Whether a process runs PATH's rclone.
pub fn runs_paths_rclone(pid: u32) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let running = identity(Path::new(&format!("/proc/{pid}/exe")));
    running.is_some() && in_path("rclone").and_then(|path| identity(&path)) == running
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_tells_is_read() {
        assert_eq!(kernel("6.18.44-cloud-amd64"), (6, 18));
        assert_eq!(kernel("6.1-rc1"), (6, 1));
        let mounts = "proc /proc proc rw 0 0\nproc /proc proc rw,hidepid=invisible 0 0\n";
        assert_eq!(options_of("/proc", mounts), "rw,hidepid=invisible");
        assert_eq!(options_of("/sys", mounts), "");
        let shared = "1 0 8:1 / / rw shared:1 master:2 - ext4 d rw\n2 1 0:5 / /proc rw - proc p rw";
        assert_eq!(propagation(shared), "shared:1 master:2");
        assert_eq!(propagation("1 0 8:1 / / rw - ext4 d rw"), "");
    }

    #[test]
    fn programs_are_found_and_their_owner_told() {
        let shell = in_path("sh").unwrap();
        assert!(!Helper::of(shell).set_uid_root);
        assert_eq!(in_path("no-such-program-here"), None);
        assert!(!runs_paths_rclone(std::process::id()));
    }
}
