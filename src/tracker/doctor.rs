//! What tracking needs of a host, one by one: what there is, and what to do.

use std::path::Path;

use super::attach::AttachMode;
use super::{DEFAULT_PIN_DIR, Log, TrackerError, host, session};

/// One thing that tracking needs, or can do without.
#[derive(Debug, Clone)]
pub struct Check {
    /// Its name, `snake_case`.
    pub name: &'static str,
    /// What there is, or why it is not as it should be.
    pub found: Result<String, String>,
    /// What to do about it, one sentence.
    pub remedy: &'static str,
    /// Whether `run` cannot start without it.
    pub needed: bool,
}

/// Looks at all of it. To see which ways to attach work, each is loaded and
/// attached for a moment; file systems that are missing are mounted, as `run`
/// would. `log` takes what libbpf says of that.
#[must_use]
pub fn checks(log: Option<Log>) -> Vec<Check> {
    let mut checks = vec![
        check("kernel", true, "run Linux 5.15 or newer", host::kernel()),
        check(
            "rights",
            true,
            "run as root, or with CAP_BPF and CAP_PERFMON",
            host::check_rights().map(|()| "BPF programs may be loaded".into()),
        ),
        check(
            "btf",
            true,
            "run a kernel with CONFIG_DEBUG_INFO_BTF",
            host::check_btf().map(|()| format!("`{}`", host::BTF)),
        ),
        check(
            "bpf_fs",
            true,
            "as root run `mount -t bpf bpf /sys/fs/bpf`",
            host::pin_folder(Path::new(DEFAULT_PIN_DIR))
                .map(|folder| format!("pins go to `{}`", folder.display())),
        ),
        check(
            "tracefs",
            false,
            "as root run `mount -t tracefs tracefs /sys/kernel/tracing`; only `--attach tracepoint` needs it",
            host::need_tracefs().map(|()| "system call tracepoints".into()),
        ),
    ];
    for (name, mode, remedy) in [
        (
            "attach_fentry",
            AttachMode::Fentry,
            "needs BPF trampolines, and programs of type tracing to be allowed; the other modes cost more",
        ),
        (
            "attach_raw",
            AttachMode::Raw,
            "needs raw tracepoints for system calls (CONFIG_HAVE_SYSCALL_TRACEPOINTS)",
        ),
        (
            "attach_tracepoint",
            AttachMode::Tracepoint,
            "needs tracefs and CONFIG_FTRACE_SYSCALLS",
        ),
    ] {
        let found = session::probe(mode, log).map(|()| format!("works (--attach {})", mode.name()));
        checks.push(check(name, false, remedy, found));
    }
    let mut attaches = checks.iter().filter(|c| c.name.starts_with("attach_"));
    let best = attaches.find_map(|c| c.found.clone().ok());
    checks.push(check(
        "attach",
        true,
        "see the three ways above: one must work",
        best.ok_or_else(|| TrackerError::Environment("no way to attach works".into())),
    ));
    checks.push(check(
        "pid_namespace",
        false,
        "run in the host's pid namespace (`docker run --pid=host`) to see every process",
        match host::pid_namespace() {
            None => Ok("the host's: every process is seen".into()),
            Some(_) => Err(TrackerError::Environment(
                "one of its own: processes outside of it are not seen".into(),
            )),
        },
    ));
    checks
}

fn check(
    name: &'static str,
    needed: bool,
    remedy: &'static str,
    found: Result<String, TrackerError>,
) -> Check {
    Check {
        name,
        found: found.map_err(|error| error.to_string()),
        remedy,
        needed,
    }
}
