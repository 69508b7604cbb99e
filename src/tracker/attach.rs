//! The ways to come to system calls: which programs each loads, and which of
//! them this kernel has something for.

use libbpf_rs::btf::types::{Func, FuncProto, Ptr, Typedef};
use libbpf_rs::{Btf, ReferencesType};

use super::abi::OpenRcloneBypassSkel;
use super::{TrackerError, host};

/// How the tracker comes to system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AttachMode {
    /// The system calls' own functions: other calls pay nothing. Needs
    /// trampolines: x86_64, or arm64 from Linux 6.4 on.
    Fentry,
    /// The raw `sys_enter` and `sys_exit` tracepoints: every system call of the
    /// host pays, and 32-bit programs are seen. Works without tracefs.
    Raw,
    /// A tracepoint for each system call: every system call pays, too. Needs
    /// tracefs, and does not see 32-bit programs.
    Tracepoint,
}

impl AttachMode {
    /// Every mode, the one that costs the host least first (docs/BENCHMARKING.md).
    pub const ALL: [Self; 3] = [Self::Fentry, Self::Raw, Self::Tracepoint];

    /// The name on the command line and in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fentry => "fentry",
            Self::Raw => "raw",
            Self::Tracepoint => "tracepoint",
        }
    }

    /// What it is called in a sentence.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Fentry => "fentry programs",
            Self::Raw => "raw tracepoints",
            Self::Tracepoint => "tracepoints",
        }
    }
}

/// What the running kernel has to attach to, by its own type information.
pub(super) struct Kernel(Btf<'static>);

impl Kernel {
    pub(super) fn read() -> Result<Self, TrackerError> {
        Btf::from_vmlinux().map(Self).map_err(|e| {
            TrackerError::Environment(format!(
                "`{}` cannot be read: {e}; is it a kernel with CONFIG_DEBUG_INFO_BTF?",
                host::BTF
            ))
        })
    }

    fn has_function(&self, name: &str) -> bool {
        self.0.type_by_name::<Func<'_>>(name).is_some()
    }

    /// The number of a raw tracepoint's arguments; `None`: there is none such.
    fn tracepoint_arguments(&self, name: &str) -> Option<usize> {
        // include/trace/bpf_probe.h: one argument more, the program's own data.
        let hook: Typedef<'_> = self.0.type_by_name(&format!("btf_trace_{name}"))?;
        let pointer = Ptr::try_from(hook.referenced_type()).ok()?;
        let function = FuncProto::try_from(pointer.referenced_type()).ok()?;
        Some(function.len().saturating_sub(1))
    }
}

/// Whether a program's target is a read call: its event, or a function of it.
fn is_read(target: &str) -> bool {
    let name = target.rsplit_once("sys_").map_or(target, |(_, name)| name);
    let mut forms = ["enter_", "exit_", "ia32_", "aarch32_"].iter();
    let name = forms
        .find_map(|form| name.strip_prefix(form))
        .unwrap_or(name);
    matches!(name, "read" | "pread64" | "readv" | "preadv" | "preadv2")
}

/// Whether a program, by its ELF section, is one of those that only count reads.
pub(super) fn counts_reads(section: &str) -> bool {
    section
        .split_once('/')
        .is_some_and(|(_, target)| is_read(target))
}

/// Whether a program, by its ELF section, is to be loaded in this mode; those of
/// reads only if they are counted.
fn is_wanted(section: &str, mode: AttachMode, account: bool, kernel: &Kernel) -> bool {
    let (kind, target) = section.split_once('/').unwrap_or((section, ""));
    if !account && counts_reads(section) {
        return false;
    }
    match (kind, target) {
        ("tracepoint", _) => {
            let event = target.trim_start_matches("syscalls/");
            mode == AttachMode::Tracepoint && host::has_syscall_event(event)
        }
        ("fentry" | "fexit", _) => mode == AttachMode::Fentry && kernel.has_function(target),
        ("raw_tp", "sys_enter" | "sys_exit") => mode == AttachMode::Raw,
        // Run by user space.
        ("raw_tp", "") => true,
        ("raw_tp", _) => kernel.tracepoint_arguments(target).is_some(),
        _ => false,
    }
}

/// Chooses the programs of a mode.
pub(super) fn select(
    open: &mut OpenRcloneBypassSkel<'_>,
    mode: AttachMode,
    account: bool,
    kernel: &Kernel,
) {
    use libbpf_rs::skel::OpenSkel;

    // (request, …), but before 5.19 (ring, request, …): io_uring/io_uring.c.
    let request = kernel
        .tracepoint_arguments("io_uring_submit_sqe")
        .is_some_and(|arguments| arguments > 2);
    if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
        rodata.uring_request = request.into();
        rodata.account_reads = account.into();
    }
    for mut program in open.open_object_mut().progs_mut() {
        let section = program.section().to_string_lossy().into_owned();
        program.set_autoload(is_wanted(&section, mode, account, kernel));
    }
}
