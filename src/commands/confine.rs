//! What `run` gives up once it has attached: capabilities, and system calls.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::path::Path;

use nix::libc::{self, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};
use vmafx_bypass::privileges::{self, Capabilities};

use crate::cli::RunArgs;
use crate::output::Notes;

/// What estimates need: rclone's cache and its process may be another user's, and
/// /proc may hide processes; and what asking the maps does.
pub fn lasting() -> Capabilities {
    Capabilities::DAC_READ_SEARCH | Capabilities::SYS_PTRACE | privileges::for_maps()
}

/// What the handover server needs beside: a cache file on a mount of its own, which
/// may be of another mount namespace; who has it open; and reflinks beside it, which
/// nobody can change.
fn serving() -> Capabilities {
    Capabilities::SYS_ADMIN
        | Capabilities::SYS_CHROOT
        | Capabilities::LEASE
        | Capabilities::DAC_OVERRIDE
        | Capabilities::FOWNER
        | Capabilities::LINUX_IMMUTABLE
}

/// Gives up, in this thread and all that it starts from now on, what neither
/// tracking nor serving needs, and in all threads the system calls that nothing of
/// `run` makes any more.
pub fn before_serving(args: &RunArgs, notes: &Notes) {
    let serves = args.socket.is_some();
    let wanted = if serves {
        lasting() | serving()
    } else {
        lasting()
    };
    give_up_all_but(wanted, notes);
    let made = filter(serves).map_err(|e| e.to_string());
    // Whoever is to be kept from these calls has little left to make them with.
    match made.and_then(|filter| apply_filter_all_threads(&filter).map_err(|e| e.to_string())) {
        Ok(()) => notes.detail("system calls that are not needed any more are refused"),
        Err(error) => notes.note(format_args!("warning: no system call is refused: {error}")),
    }
}

/// Gives up what only the server's threads need.
pub fn after_serving(args: &RunArgs, notes: &Notes) {
    if let Some(socket) = &args.socket {
        let folder = socket.parent().filter(|f| !f.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        give_up_all_but(lasting() | privileges::to_remove_from(folder), notes);
    }
}

fn give_up_all_but(wanted: Capabilities, notes: &Notes) {
    match privileges::keep(wanted) {
        Ok(kept) => notes.detail(format_args!("capabilities that are kept: {kept}")),
        Err(error) => notes.note(format_args!("warning: giving up capabilities: {error}")),
    }
}

/// Calls that nothing of `run` makes once it has started: what starts programs,
/// changes other processes or the kernel, or opens new ways to talk to either.
const NEVER: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_setuid,
    libc::SYS_setreuid,
    libc::SYS_setresuid,
    libc::SYS_setgid,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_mknodat,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_open_by_handle_at,
    libc::SYS_socket,
    libc::SYS_connect,
    // Its flags are in memory.
    libc::SYS_openat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
];

/// Calls of the handover server alone: a mount of one file, by a thread that may
/// have to enter another mount namespace.
const SERVERS: &[c_long] = &[
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
];

/// Commands of bpf(2), as first and last (include/uapi/linux/bpf.h), that make
/// programs, maps, links and pins, or look for those of others. Left are the ones
/// that work on a map or a program by its descriptor, or by its pin: 21 takes an
/// element out of a map.
const BPF_COMMANDS: [(u64, u64); 7] = [
    (0, 0),
    (5, 6),
    (8, 9),
    (11, 14),
    (16, 20),
    (22, 23),
    (28, u32::MAX as u64),
];

/// The filter: what it does not name goes on in the kernel.
fn filter(serves: bool) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let servers = if serves { &[] } else { SERVERS };
    for call in NEVER.iter().chain(servers) {
        rules.insert(*call, Vec::new());
    }
    let mut commands = Vec::new();
    for (first, last) in BPF_COMMANDS {
        commands.push(SeccompRule::new(vec![
            argument(0, SeccompCmpOp::Ge, first)?,
            argument(0, SeccompCmpOp::Le, last)?,
        ])?);
    }
    rules.insert(libc::SYS_bpf, commands);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, writing(1)?);
    rules.insert(libc::SYS_openat, writing(2)?);
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        TargetArch::try_from(ARCH)?,
    )?
    .try_into()
}

/// An open for writing, of anything but a file without a name, as snapshots are: with
/// CAP_SYS_PTRACE it could be another process's memory.
fn writing(flags: u8) -> Result<Vec<SeccompRule>, BackendError> {
    let unnamed = (libc::O_TMPFILE & !libc::O_DIRECTORY) as u64;
    let is =
        |mask: i32, value: i32| argument(flags, SeccompCmpOp::MaskedEq(mask as u64), value as u64);
    let named = || argument(flags, SeccompCmpOp::MaskedEq(unnamed), 0);
    Ok(vec![
        SeccompRule::new(vec![is(libc::O_ACCMODE, libc::O_WRONLY)?, named()?])?,
        SeccompRule::new(vec![is(libc::O_ACCMODE, libc::O_RDWR)?, named()?])?,
        SeccompRule::new(vec![is(libc::O_CREAT, libc::O_CREAT)?])?,
        SeccompRule::new(vec![is(libc::O_TRUNC, libc::O_TRUNC)?])?,
    ])
}

fn argument(index: u8, is: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, is, value)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt;
    use std::process::Command;

    use super::*;

    /// In a thread of its own, under the filter.
    fn confined<T: Send + 'static>(serves: bool, does: fn() -> T) -> T {
        let thread = std::thread::spawn(move || {
            seccompiler::apply_filter(&filter(serves).unwrap()).unwrap();
            does()
        });
        thread.join().unwrap()
    }

    #[test]
    fn under_the_filter_nothing_is_started_written_or_loaded() {
        let refused = confined(false, || {
            let errno = |error: std::io::Error| error.raw_os_error();
            let write = File::options().write(true).open("/dev/null");
            let append = File::options().append(true).open("/dev/null");
            let create = File::create("/dev/null");
            let unshared = nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS);
            [
                errno(write.unwrap_err()),
                errno(append.unwrap_err()),
                errno(create.unwrap_err()),
                errno(std::net::TcpListener::bind("127.0.0.1:0").unwrap_err()),
                unshared.err().map(|e| e as i32),
            ]
        });
        assert_eq!(refused, [Some(libc::EPERM); 5]);
        let started = confined(false, || Command::new("true").spawn().is_ok());
        assert!(!started);
    }

    #[test]
    fn under_the_filter_files_are_read_and_snapshots_made() {
        let dir = tempfile::tempdir().unwrap();
        std::env::set_current_dir(dir.path()).unwrap();
        confined(true, || {
            File::open("/proc/self/status").unwrap();
            let mut unnamed = File::options();
            unnamed.read(true).write(true).custom_flags(libc::O_TMPFILE);
            unnamed.open(".").unwrap();
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        });
    }
}
