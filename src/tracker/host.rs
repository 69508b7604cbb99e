//! What tracking needs of the host, checked before anything is loaded so that
//! the message can say what is missing.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};

use super::TrackerError;
use crate::privileges::Capabilities;
use crate::version::KERNEL_FLOOR;

pub(super) const BTF: &str = "/sys/kernel/btf/vmlinux";
const TRACEFS: &str = "/sys/kernel/tracing";
/// Where tracefs appears by itself on hosts with debugfs.
const TRACEFS_IN_DEBUGFS: &str = "/sys/kernel/debug/tracing";
const BPFFS: &str = "/sys/fs/bpf";
/// linux/magic.h: BPF_FS_MAGIC.
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

fn missing<T>(message: impl Into<String>) -> Result<T, TrackerError> {
    Err(TrackerError::Environment(message.into()))
}

/// Checks rights and BTF.
pub(super) fn check() -> Result<(), TrackerError> {
    check_rights()?;
    check_btf()
}

/// Whether this process may load BPF programs.
pub(super) fn check_rights() -> Result<(), TrackerError> {
    if Capabilities::effective().may_trace() {
        return Ok(());
    }
    missing("not permitted to load BPF programs: run as root, or with CAP_BPF and CAP_PERFMON")
}

/// Whether the kernel tells its types.
pub(super) fn check_btf() -> Result<(), TrackerError> {
    if Path::new(BTF).exists() {
        return Ok(());
    }
    missing(format!(
        "`{BTF}` is missing: the kernel needs CONFIG_DEBUG_INFO_BTF (linux 5.15 or newer)"
    ))
}

/// The kernel's release; an error before Linux 5.15.
pub(super) fn kernel() -> Result<String, TrackerError> {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    if crate::sys::kernel_version() >= KERNEL_FLOOR {
        return Ok(format!("linux {release}"));
    }
    missing(format!("linux {release}: 5.15 or newer is needed"))
}

/// Whether tracefs is there, with the system calls' tracepoints; an error where it
/// may not be entered.
pub(super) fn has_tracefs() -> Result<bool, TrackerError> {
    let mut closed = None;
    for folder in [TRACEFS, TRACEFS_IN_DEBUGFS] {
        match fs::read_dir(Path::new(folder).join("events/syscalls")) {
            Ok(_) => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => closed = Some(folder),
            Err(_) => {}
        }
    }
    closed.map_or(Ok(false), |folder| {
        missing(format!(
            "`{folder}` may not be read: add CAP_DAC_READ_SEARCH, or start with --attach raw"
        ))
    })
}

/// Sees to it that tracefs is there, mounted if need be.
pub(super) fn need_tracefs() -> Result<(), TrackerError> {
    if has_tracefs()? {
        return Ok(());
    }
    let mounted = mount_at(c"tracefs", TRACEFS);
    if has_tracefs()? {
        return Ok(());
    }
    match mounted {
        Err(error) => missing(format!(
            "tracefs is not mounted at `{TRACEFS}` and could not be: {error}; as root run \
             `mount -t tracefs tracefs {TRACEFS}`, or start with --attach raw"
        )),
        Ok(()) => missing(format!(
            "`{TRACEFS}/events/syscalls` is missing: the kernel needs CONFIG_FTRACE_SYSCALLS"
        )),
    }
}

fn mount_at(fstype: &CStr, folder: &str) -> nix::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // As systemd mounts them: else anyone could make folders on a BPF file system.
    mount(
        Some(fstype),
        folder,
        Some(fstype),
        flags,
        Some(c"mode=0700"),
    )
}

/// Whether tracefs has the tracepoint of a system call, such as `sys_enter_openat`.
pub(super) fn has_syscall_event(event: &str) -> bool {
    [TRACEFS, TRACEFS_IN_DEBUGFS].iter().any(|folder| {
        Path::new(folder)
            .join("events/syscalls")
            .join(event)
            .is_dir()
    })
}

/// linux/proc_ns.h: PROC_PID_INIT_INO.
const HOST_PID_NAMESPACE: u64 = 0xefff_fffc;

/// The inode of this process's pid namespace; `None`: it is the host's.
pub(super) fn pid_namespace() -> Option<u32> {
    let own = fs::metadata("/proc/self/ns/pid").ok()?.ino();
    (own != HOST_PID_NAMESPACE).then_some(own as u32)
}

/// Every process in this process's pid namespace; an error where /proc is
/// missing, that of another namespace, or hides processes (`hidepid=2`).
pub(super) fn processes() -> io::Result<Vec<u32>> {
    let own = std::process::id();
    if fs::read_link("/proc/self")? != Path::new(&own.to_string()) {
        return Err(io::Error::other("/proc is of another pid namespace"));
    }
    // Every namespace has a first process, whoever's it is.
    fs::metadata("/proc/1")?;
    let names = fs::read_dir("/proc")?.flatten().map(|e| e.file_name());
    Ok(names
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect())
}

/// The folder that pins go to, as an absolute path on a BPF file system, which
/// is mounted at its usual place where it is missing.
pub(super) fn pin_folder(dir: &Path) -> Result<PathBuf, TrackerError> {
    let dir = std::path::absolute(dir)
        .map_err(|e| TrackerError::Failed(format!("`{}`: {e}", dir.display())))?;
    if on_bpffs(&dir) {
        return Ok(dir);
    }
    if dir.starts_with(BPFFS) {
        if let Err(error) = mount_at(c"bpf", BPFFS) {
            return missing(format!(
                "no BPF file system is mounted at `{BPFFS}` and none could be: {error}; as root \
                 run `mount -t bpf bpf {BPFFS}`"
            ));
        }
        if on_bpffs(&dir) {
            return Ok(dir);
        }
    }
    missing(format!(
        "`{}` is not on a BPF file system: choose a --pin-dir below `{BPFFS}`",
        dir.display()
    ))
}

/// Whether the nearest folder above a path that exists is on a BPF file system.
pub(super) fn on_bpffs(dir: &Path) -> bool {
    dir.ancestors()
        .find(|folder| folder.exists())
        .and_then(|folder| statfs(folder).ok())
        .is_some_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// How often programs did not run because another was running.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Misses {
    /// Those that follow descriptors.
    pub(super) tracking: u64,
    /// Those that count reads.
    pub(super) reads: u64,
}

/// The misses of the BPF programs that a process (a pid, or `self`) holds: the sums
/// over its descriptors' fdinfo (kernel/bpf/syscall.c, `bpf_prog_show_fdinfo`). Where
/// it may not be asked, it must be taken for a miss. `reads` are the ids of programs
/// that count reads.
pub(super) fn recursion_misses(process: &str, reads: &[u32]) -> Misses {
    let mut misses = Misses::default();
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/fdinfo")) else {
        misses.tracking = 1;
        return misses;
    };
    // A descriptor that is closed meanwhile is no program of ours.
    for info in entries.flatten().flat_map(|e| fs::read_to_string(e.path())) {
        let count = field(&info, "recursion_misses:").unwrap_or(0);
        let id = field(&info, "prog_id:").unwrap_or(0);
        if reads.iter().any(|&program| u64::from(program) == id) {
            misses.reads += count;
        } else {
            misses.tracking += count;
        }
    }
    misses
}

/// The id of a BPF program of this process, by its descriptor.
pub(super) fn program_id(program: BorrowedFd<'_>) -> Option<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd())).ok()?;
    u32::try_from(field(&info, "prog_id:")?).ok()
}

fn field(info: &str, name: &str) -> Option<u64> {
    let mut lines = info.lines();
    lines.find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misses_are_read_from_a_program_s_fdinfo() {
        let info = "pos:\t0\nprog_type:\t5\nprog_id:\t7\nrecursion_misses:\t12\n";
        assert_eq!(field(info, "recursion_misses:"), Some(12));
        assert_eq!(field(info, "prog_id:"), Some(7));
        assert_eq!(field("pos:\t0\nflags:\t02\n", "prog_id:"), None);
        assert_eq!(recursion_misses("self", &[]), Misses::default());
        assert_eq!(recursion_misses("no-such-process", &[]).tracking, 1);
    }
}
