//! What tracking needs of a host, one by one: what there is, and what to do.

use std::path::Path;

use super::attach::AttachMode;
use super::pinned::{self, DumpError};
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

/// The ways to attach, with the names of their checks and what each needs.
const MODES: [(AttachMode, &str, &str); 3] = [
    (
        AttachMode::Fentry,
        "attach_fentry",
        "needs BPF trampolines, and programs of type tracing to be allowed; the other modes cost more",
    ),
    (
        AttachMode::Raw,
        "attach_raw",
        "needs raw tracepoints for system calls (CONFIG_HAVE_SYSCALL_TRACEPOINTS)",
    ),
    (
        AttachMode::Tracepoint,
        "attach_tracepoint",
        "needs tracefs and CONFIG_FTRACE_SYSCALLS",
    ),
];

/// Looks at all of it. `leave` is why nothing may be changed for that, if so; else,
/// to see which ways to attach work, each is loaded and attached for a moment, and
/// file systems that are missing are mounted, as `run` would. `log` takes what libbpf
/// says of that.
#[must_use]
pub fn checks(log: Option<Log>, leave: Option<&str>) -> Vec<Check> {
    let not_tried = |why: &str| TrackerError::Environment(format!("not tried: {why}"));
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
            bpf_fs(leave.map(not_tried)),
        ),
        pins(),
        check(
            "tracefs",
            false,
            "as root run `mount -t tracefs tracefs /sys/kernel/tracing`, or add CAP_DAC_READ_SEARCH if it is; only `--attach tracepoint` needs it",
            tracefs(leave.map(not_tried)).map(|()| "system call tracepoints".into()),
        ),
    ];
    let mut best = None;
    for (mode, name, remedy) in MODES {
        let found = match leave {
            Some(why) => Err(not_tried(why)),
            None => session::probe(mode, log),
        };
        let found = found.map(|()| format!("works (--attach {})", mode.name()));
        if best.is_none() {
            best = found.as_ref().ok().cloned();
        }
        checks.push(check(name, false, remedy, found));
    }
    checks.push(check(
        "attach",
        true,
        "see the three ways above: one must work",
        best.ok_or_else(|| match leave {
            Some(why) => not_tried(why),
            None => TrackerError::Environment("no way to attach works".into()),
        }),
    ));
    checks.push(check(
        "pid_namespace",
        false,
        "start it in the host's pid namespace, to see every process",
        match host::pid_namespace() {
            None => Ok("the host's: every process is seen".into()),
            Some(_) => Err(TrackerError::Environment(
                "one of its own: processes outside of it are not seen".into(),
            )),
        },
    ));
    checks
}

/// `leave`: the error where it is missing, and may not be mounted.
fn bpf_fs(leave: Option<TrackerError>) -> Result<String, TrackerError> {
    let folder = Path::new(DEFAULT_PIN_DIR);
    match leave {
        Some(error) if !host::on_bpffs(folder) => Err(error),
        _ => host::pin_folder(folder).map(|folder| format!("pins go to `{}`", folder.display())),
    }
}

/// Likewise.
fn tracefs(leave: Option<TrackerError>) -> Result<(), TrackerError> {
    match leave {
        Some(error) => {
            if host::has_tracefs()? {
                Ok(())
            } else {
                Err(error)
            }
        }
        None => host::need_tracefs(),
    }
}

/// Who has the maps where `run` pins them unless told otherwise.
fn pins() -> Check {
    let found = match pinned::owner(Path::new(DEFAULT_PIN_DIR)) {
        Ok(owner) if owner.alive => Ok(format!(
            "`run` is pid {}: another one needs a --pin-dir of its own",
            owner.pid
        )),
        Ok(owner) => Err(format!("left by pid {}, which has died", owner.pid)),
        Err(DumpError::NotRunning(_)) => Ok("none: `run` is not running".into()),
        Err(error) => Err(error.to_string()),
    };
    Check {
        name: "pins",
        found,
        remedy: "start `run`, which replaces those of a dead one, or choose another --pin-dir",
        needed: false,
    }
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
