//! From facts to checks: pure.

use serde::Serialize;
use vmafx_bypass::optin::{self, OptIn};
use vmafx_bypass::privileges::Capabilities;

use super::container::{Place, remedy};
use super::exec::{ptrace_scope, seccomp_notify, set_uid_programs};
use super::facts::Facts;
use Purpose::{Exec, Handover, Mount, Reading, Tracking};

/// What a check is for: the sections of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    Tracking,
    Reading,
    Exec,
    Mount,
    Handover,
}

impl Purpose {
    /// All of them, in the order of the text.
    pub const ALL: [Self; 5] = [
        Self::Tracking,
        Self::Reading,
        Self::Exec,
        Self::Mount,
        Self::Handover,
    ];

    /// The heading of its section.
    pub fn heading(self) -> &'static str {
        match self {
            Self::Tracking => "tracking: run, dump-map, top",
            Self::Reading => "reading: read, explain, bench, warm, and the states that run shows",
            Self::Exec => "exec",
            Self::Mount => "mount",
            Self::Handover => "handover: run --socket, and who asks it",
        }
    }
}

/// One thing that something of the program needs.
#[derive(Debug, Clone, Serialize)]
pub struct CheckRow {
    pub name: &'static str,
    #[serde(rename = "for")]
    pub purpose: Purpose,
    /// The command, option or feature that needs it.
    pub needed_by: &'static str,
    pub pass: bool,
    /// Whether `run` needs it.
    pub needed: bool,
    pub detail: String,
    /// Null: it passes.
    pub remedy: Option<String>,
}

/// The versions of rclone that the tests know, as its first two numbers.
const RCLONES: std::ops::RangeInclusive<(u32, u32)> = (1, 60)..=(1, 75);
/// Linux 6.9: passthrough of FUSE.
const PASSTHROUGH: (u32, u32) = (6, 9);
/// Descriptors with which a server takes as many clients as it can serve.
const DESCRIPTORS: u64 = 16_384;

/// What was found, or what is wrong and its remedy.
pub type Found = Result<String, (String, String)>;

/// A check: its name, what it is for, what needs it, and how it is judged.
type Check = (&'static str, Purpose, &'static str, fn(&Facts) -> Found);

/// Every check but the tracker's.
const CHECKS: &[Check] = &[
    ("cap_bpf", Tracking, "run, doctor's attach checks", |f| {
        capability(f, Capabilities::BPF, "no map or program can be loaded")
    }),
    (
        "cap_perfmon",
        Tracking,
        "run, doctor's attach checks",
        |f| {
            capability(
                f,
                Capabilities::PERFMON,
                "no program may look at the kernel",
            )
        },
    ),
    ("user_namespace", Tracking, "run", user_namespace),
    ("lockdown", Tracking, "run", lockdown),
    (
        "perf_event_paranoid",
        Tracking,
        "run --attach tracepoint, for others than root",
        perf_event_paranoid,
    ),
    (
        "proc",
        Tracking,
        "run, to make losses good; finding rclone's process",
        hidden_processes,
    ),
    ("opt_in", Tracking, "run", opt_in),
    (
        "cap_dac_read_search",
        Reading,
        "caches of other users; run --attach tracepoint",
        |f| {
            let without = "caches of other users give `permission`";
            capability(f, Capabilities::DAC_READ_SEARCH, without)
        },
    ),
    (
        "cap_sys_ptrace",
        Reading,
        "an rclone of another user that does not name its cache, or in another mount namespace",
        |f| {
            let without = "an rclone of another user may give `permission`";
            capability(f, Capabilities::SYS_PTRACE, without)
        },
    ),
    (
        "rclone",
        Reading,
        "bench --generate; the versions that are known",
        rclone,
    ),
    ("seccomp_notify", Exec, "exec", seccomp_notify),
    (
        "set_uid_programs",
        Exec,
        "set-uid programs under exec",
        set_uid_programs,
    ),
    (
        "ptrace_scope",
        Exec,
        "exec, to read the paths that its command opens",
        ptrace_scope,
    ),
    ("fuse_device", Mount, "mount", fuse_device),
    (
        "fusermount3",
        Mount,
        "mount, for others than root",
        fusermount,
    ),
    (
        "user_allow_other",
        Mount,
        "mount --allow-other, for others than root",
        allow_other,
    ),
    (
        "fuse_passthrough",
        Mount,
        "mount --passthrough",
        passthrough,
    ),
    (
        "mount_propagation",
        Mount,
        "mounts that come while a container runs",
        propagation,
    ),
    (
        "handover_server",
        Handover,
        "read, bench, exec and the library with VMAFX_BYPASS_SOCKET",
        server,
    ),
    (
        "cap_sys_admin",
        Handover,
        "run --socket for root and the cache's owner; mount without fusermount3",
        |f| {
            let without = "root, and the cache's owner, get nothing by ranges";
            capability(f, Capabilities::SYS_ADMIN, without)
        },
    ),
    (
        "descriptors",
        Handover,
        "run --socket, for 1,024 clients",
        descriptors,
    ),
];

/// Judges all that the facts tell. The tracker's own checks are not among them.
pub fn judge(facts: &Facts) -> Vec<CheckRow> {
    let rows = CHECKS.iter().map(|(name, purpose, needed_by, found)| {
        let found = found(facts);
        // This one's remedy depends on what is wrong.
        let remedy = match *name {
            "seccomp_notify" => None,
            name => remedy(facts.place, name),
        };
        CheckRow {
            name,
            purpose: *purpose,
            needed_by,
            pass: found.is_ok(),
            // It then refuses whatever its command line says.
            needed: *name == "opt_in" && facts.opt_in == OptIn::Killed,
            remedy: found
                .as_ref()
                .err()
                .map(|(_, own)| remedy.unwrap_or(own.clone())),
            detail: found.unwrap_or_else(|(detail, _)| detail),
        }
    });
    rows.collect()
}

/// `without`: what becomes of it.
fn capability(facts: &Facts, wanted: Capabilities, without: &str) -> Found {
    let names: Vec<_> = wanted
        .names()
        .map(|name| format!("CAP_{}", name.to_uppercase()))
        .collect();
    let name = names.join(" and ");
    if facts.capabilities.has(wanted) {
        return Ok(format!("{name} is effective"));
    }
    let covered = wanted == Capabilities::BPF || wanted == Capabilities::PERFMON;
    if covered && facts.capabilities.has(Capabilities::SYS_ADMIN) {
        return Ok(format!("CAP_SYS_ADMIN does for {name}"));
    }
    let remedy = if facts.is_root {
        format!("give it {name} back: `CapabilityBoundingSet={name}` in its systemd unit")
    } else if wanted == Capabilities::SYS_ADMIN {
        "start it as root, or with `AmbientCapabilities=CAP_SYS_ADMIN` in its systemd unit".into()
    } else {
        let all = Capabilities::BPF
            | Capabilities::PERFMON
            | Capabilities::DAC_READ_SEARCH
            | Capabilities::SYS_PTRACE;
        let all: Vec<_> = all.names().map(|name| format!("cap_{name}")).collect();
        format!(
            "as root run `setcap {}+ep {}`, or start it as root",
            all.join(","),
            facts.program.display()
        )
    };
    Err((format!("{name} is not effective: {without}"), remedy))
}

fn user_namespace(facts: &Facts) -> Found {
    let mut numbers = facts.uid_map.split_whitespace();
    if numbers.next() == Some("0")
        && numbers.next() == Some("0")
        && numbers.next() == Some("4294967295")
    {
        return Ok("the host's: capabilities count".into());
    }
    Err((
        "one of its own: the kernel lets it load no BPF programs, whatever its capabilities".into(),
        "start it outside of it: `docker run --userns=host`, `hostUsers: true`, or no rootless container".into(),
    ))
}

fn lockdown(facts: &Facts) -> Found {
    match &facts.lockdown {
        None => Ok("none, or not shown".into()),
        Some(states) if states.contains("[confidentiality]") => Err((
            "confidentiality: BPF programs may not read the kernel".into(),
            "boot with `lockdown=integrity`, or without".into(),
        )),
        Some(states) => Ok(states.trim().into()),
    }
}

/// Up to 2, what released kernels know, CAP_PERFMON does; distributions added more.
fn perf_event_paranoid(facts: &Facts) -> Found {
    match facts.perf_event_paranoid {
        Some(level) if level > 2 && !facts.capabilities.has(Capabilities::SYS_ADMIN) => Err((
            format!("kernel.perf_event_paranoid={level}: CAP_PERFMON may not do"),
            "as root run `sysctl kernel.perf_event_paranoid=2`".into(),
        )),
        Some(level) => Ok(format!("kernel.perf_event_paranoid={level}")),
        None => Ok("not shown".into()),
    }
}

fn hidden_processes(facts: &Facts) -> Found {
    let hides = facts
        .proc_options
        .split(',')
        .filter_map(|option| option.strip_prefix("hidepid="))
        .any(|value| !matches!(value, "0" | "off"));
    match (hides, facts.capabilities.has(Capabilities::SYS_PTRACE)) {
        (false, _) => Ok("/proc shows every process".into()),
        (true, true) => Ok("/proc hides processes, but not from CAP_SYS_PTRACE".into()),
        (true, false) => Err((
            format!("/proc hides processes of others ({})", facts.proc_options),
            "as root run `mount -o remount,hidepid=0 /proc`, or add CAP_SYS_PTRACE".into(),
        )),
    }
}

fn opt_in(facts: &Facts) -> Found {
    let variable = optin::VARIABLE;
    match facts.opt_in {
        OptIn::Yes => Ok(format!("{variable}=1")),
        OptIn::Unset => Err((
            format!("{variable} is not set: `run` refuses to start"),
            format!("set {variable}=1, or start `run` with --enable"),
        )),
        OptIn::Killed => Err((
            format!("{variable}=0: nothing is tracked or bypassed"),
            format!("unset {variable}, or set it to 1"),
        )),
    }
}

/// The first two numbers of `rclone v1.60.1-DEV`.
fn version(text: &str) -> Option<(u32, u32)> {
    let (_, numbers) = text.split_once(" v")?;
    let mut numbers = numbers.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn rclone(facts: &Facts) -> Found {
    let (first, last) = (RCLONES.start(), RCLONES.end());
    let known = format!("{}.{} to {}.{}", first.0, first.1, last.0, last.1);
    match &facts.rclone {
        Ok(text) if version(text).is_some_and(|v| RCLONES.contains(&v)) => Ok(text.clone()),
        Ok(text) => Err((
            format!("`{text}` in PATH: known are {known}"),
            format!("install rclone {known}, or verify with `read --verify full`"),
        )),
        Err(error) => Err((error.clone(), format!("install rclone {known}"))),
    }
}

fn fuse_device(facts: &Facts) -> Found {
    match &facts.fuse {
        Ok(()) => Ok("/dev/fuse opens".into()),
        Err(error) => Err((
            error.clone(),
            "as root run `modprobe fuse`, and `chmod 666 /dev/fuse` if it is there".into(),
        )),
    }
}

fn fusermount(facts: &Facts) -> Found {
    let install = || "install it: the Debian package fuse3".to_owned();
    if facts.capabilities.has(Capabilities::SYS_ADMIN) {
        return Ok("not needed with CAP_SYS_ADMIN".into());
    }
    match &facts.fusermount {
        None => Err(("no `fusermount3` in PATH".into(), install())),
        Some(helper) if !helper.set_uid_root => Err((
            format!("`{}` is not set-user-id root", helper.path.display()),
            format!(
                "as root run `chown root {0} && chmod 4755 {0}`",
                helper.path.display()
            ),
        )),
        Some(_) if facts.no_new_privs => Err((
            "no_new_privs is set: `fusermount3` has no rights".into(),
            "start it without: `NoNewPrivileges=no`, `allowPrivilegeEscalation: true`".into(),
        )),
        Some(helper) => Ok(format!("`{}`", helper.path.display())),
    }
}

fn allow_other(facts: &Facts) -> Found {
    let allowed = facts
        .fuse_conf
        .lines()
        .any(|line| line.trim() == "user_allow_other");
    if facts.is_root || facts.capabilities.has(Capabilities::SYS_ADMIN) {
        Ok("not needed here: root may".into())
    } else if allowed {
        Ok("user_allow_other is in /etc/fuse.conf".into())
    } else {
        Err((
            "user_allow_other is not in /etc/fuse.conf".into(),
            "as root run `echo user_allow_other >> /etc/fuse.conf`".into(),
        ))
    }
}

fn passthrough(facts: &Facts) -> Found {
    let (major, minor) = facts.kernel;
    if facts.kernel < PASSTHROUGH {
        return Err((
            format!("linux {major}.{minor}: clips are read by proven ranges"),
            "run Linux 6.9 or newer with CONFIG_FUSE_PASSTHROUGH".into(),
        ));
    }
    if !facts.capabilities.has(Capabilities::SYS_ADMIN) {
        return Err((
            "CAP_SYS_ADMIN is not effective: clips are read by proven ranges".into(),
            "start `mount` as root".into(),
        ));
    }
    Ok(format!(
        "linux {major}.{minor}, and CAP_SYS_ADMIN; `mount` tells if the kernel was built without"
    ))
}

fn propagation(facts: &Facts) -> Found {
    let receives = facts.propagation.contains("shared:") || facts.propagation.contains("master:");
    match (facts.place, receives) {
        (Place::Host, _) => Ok("not in a container".into()),
        (_, true) => Ok(facts.propagation.clone()),
        (_, false) => Err((
            "mounts of the host that come later may not be seen here".into(),
            "bind the folder above them with propagation `rslave`".into(),
        )),
    }
}

fn server(facts: &Facts) -> Found {
    let Some((socket, answers)) = &facts.server else {
        return Ok("VMAFX_BYPASS_SOCKET is not set: no server is asked".into());
    };
    let socket = socket.display();
    match answers {
        Ok(()) => Ok(format!("the server at `{socket}` answers")),
        Err(error) => Err((
            error.clone(),
            format!(
                "as root start `vmafx-bypass run --prefix DIR --socket {socket}`, or unset VMAFX_BYPASS_SOCKET"
            ),
        )),
    }
}

fn descriptors(facts: &Facts) -> Found {
    let limit = facts.descriptors;
    if limit >= DESCRIPTORS {
        return Ok("the hard limit of open descriptors is high enough".into());
    }
    Err((
        format!("the hard limit is {limit} open descriptors: fewer clients are taken"),
        format!(
            "set `LimitNOFILE={DESCRIPTORS}` in its systemd unit, or as root run `ulimit -Hn {DESCRIPTORS}`"
        ),
    ))
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
