//! Names of system calls by what they are about, so that the same call has the
//! same name in every run, whatever the pids and descriptor numbers.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::libc::{self, c_long, user_regs_struct};
use vmafx_bypass::rig::Rig;

use crate::common::clips::{CLIP, cache_file, clip};

/// Calls of the memory allocator, threads and clocks: of the Rust runtime, not
/// of a reader. Their failure means that there is no memory, which ends a Rust
/// program, or cannot happen.
const OF_THE_RUNTIME: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_sched_yield,
    // Which kernel and process this is: they have no error to give.
    libc::SYS_uname,
    libc::SYS_getpid,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
];

/// The same number on every architecture (include/uapi/asm-generic/unistd.h).
const SYS_CACHESTAT: c_long = 451;

/// How the name begins whose lookup waits for a rename to be over.
const BARRIER: &str = ".vmafx-bypass-";

/// What the paths of one mount are called.
pub struct Names {
    paths: Vec<(PathBuf, &'static str)>,
    daemon: u32,
    traced: u32,
    /// What runs under a pid: asked once, since most are asked about often.
    programs: RefCell<HashMap<u32, &'static str>>,
}

impl Names {
    pub fn new(rig: &Rig, traced: u32) -> Self {
        let mut paths = vec![
            (clip(rig), "CLIP"),
            (rig.mountpoint(), "MOUNT"),
            (rig.cache(), "CACHE"),
        ];
        for (kind, name) in [("vfs", "DATA"), ("vfsMeta", "METADATA")] {
            let path = cache_file(rig, kind, CLIP);
            if path.is_absolute() {
                paths.push((path, name));
            }
        }
        Self {
            paths,
            daemon: rig.daemon().unwrap(),
            traced,
            programs: RefCell::default(),
        }
    }

    /// The name of a call, with what it is about. `None`: not a reader's.
    pub fn call(&self, regs: &user_regs_struct, memory: &File) -> Option<String> {
        let number = regs.orig_rax as c_long;
        let path = |address| self.path(&text(memory, address));
        let fd = |number: u64| self.descriptor(number);
        // Of a call that takes a folder's descriptor and a path: which it means.
        let at = |folder, address| {
            let text = text(memory, address);
            if text.as_os_str().is_empty() {
                format!("of {}", self.descriptor(folder))
            } else {
                self.path(&text)
            }
        };
        Some(match number {
            libc::SYS_open => format!("open {}", path(regs.rdi)),
            libc::SYS_openat => format!("open {}", path(regs.rsi)),
            libc::SYS_readlink => format!("readlink {}", path(regs.rdi)),
            libc::SYS_readlinkat => format!("readlink {}", path(regs.rsi)),
            libc::SYS_statx => format!("statx {}", at(regs.rdi, regs.rsi)),
            libc::SYS_newfstatat => format!("fstat {}", at(regs.rdi, regs.rsi)),
            libc::SYS_fstat => format!("fstat of {}", fd(regs.rdi)),
            libc::SYS_fstatfs => format!("fstatfs of {}", fd(regs.rdi)),
            libc::SYS_read => format!("read of {}", fd(regs.rdi)),
            libc::SYS_pread64 => format!("pread of {}", fd(regs.rdi)),
            libc::SYS_getdents64 => format!("getdents of {}", fd(regs.rdi)),
            libc::SYS_close => format!("close of {}", fd(regs.rdi)),
            libc::SYS_lseek => format!("lseek({}) of {}", regs.rdx, fd(regs.rdi)),
            libc::SYS_fcntl => format!("fcntl({}) of {}", regs.rsi, fd(regs.rdi)),
            libc::SYS_fadvise64 => format!("fadvise of {}", fd(regs.rdi)),
            libc::SYS_poll => "poll".into(),
            SYS_CACHESTAT => format!("cachestat of {}", fd(regs.rdi)),
            number if OF_THE_RUNTIME.contains(&number) => return None,
            number => panic!(
                "system call {number} is none of a reader's, unless it panics now; \
                 if it is, name it here"
            ),
        })
    }

    fn descriptor(&self, number: u64) -> String {
        let link = format!("/proc/{}/fd/{number}", self.traced);
        fs::read_link(link).map_or_else(|_| "?".into(), |target| self.path(&target))
    }

    pub fn path(&self, path: &Path) -> String {
        if let Some((_, name)) = self.paths.iter().find(|(known, _)| known == path) {
            return (*name).into();
        }
        let text = path.display().to_string();
        let name = path.file_name().unwrap_or_default().as_bytes();
        if name.starts_with(BARRIER.as_bytes()) {
            return "BARRIER".into();
        }
        let Some(rest) = text.strip_prefix("/proc/") else {
            return text;
        };
        let (process, rest) = rest.split_once('/').unwrap_or((rest, ""));
        let own = process == "self";
        let pid = match process.parse() {
            _ if own => self.traced,
            Ok(pid) => pid,
            Err(_) => return text,
        };
        let of = self.program(pid);
        let Some(number) = rest.strip_prefix("fd/") else {
            let folder = rest.strip_prefix("fdinfo/").map(|_| "fdinfo/N");
            return format!("/proc/{of}/{}", folder.unwrap_or(rest));
        };
        // A descriptor is known by what it leads to.
        let target = fs::read_link(format!("/proc/{pid}/fd/{number}"));
        let target = match target.map(|target| self.path(&target)) {
            Ok(target) if target.starts_with(|c: char| c.is_ascii_uppercase()) => target,
            Ok(target) if target == "/dev/fuse" => "FUSE".into(),
            _ => "N".into(),
        };
        format!("/proc/{of}/fd/{target}")
    }

    fn program(&self, pid: u32) -> &'static str {
        if pid == self.traced {
            return "self";
        } else if pid == self.daemon {
            return "DAEMON";
        }
        let mut programs = self.programs.borrow_mut();
        programs.entry(pid).or_insert_with(|| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            match name.trim() {
                "rclone" => "RCLONE",
                _ => "PID",
            }
        })
    }
}

/// A C string of another process.
fn text(memory: &File, address: u64) -> PathBuf {
    let mut bytes = [0; 512];
    let n = memory.read_at(&mut bytes, address).unwrap_or(0);
    let end = bytes[..n].iter().position(|&b| b == 0).unwrap_or(n);
    PathBuf::from(std::ffi::OsStr::from_bytes(&bytes[..end]))
}
