//! Who a process is: whether it may be given what the supervisor may open.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};

use crate::reason::{Reason, Refusal};
use crate::sys;

/// What a process may do, from /proc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// The pid, the same for all threads.
    pub(super) tgid: u32,
    /// User and group ids, groups and effective capabilities, as text.
    credentials: Vec<Vec<u8>>,
    user_namespace: PathBuf,
    /// The label of AppArmor, SELinux or another; `None` without.
    label: Option<Vec<u8>>,
    pub(super) no_new_privs: bool,
    pub(super) filters: u64,
}

/// The fields of `/proc/<pid>/status` that are compared as they are.
const CREDENTIALS: [&[u8]; 4] = [b"Uid:", b"Gid:", b"Groups:", b"CapEff:"];

impl Identity {
    /// Of a thread, or with `self` of the calling process.
    pub(super) fn of(thread: &str) -> io::Result<Self> {
        let mut status = Vec::with_capacity(2048);
        fs::File::open(format!("/proc/{thread}/status"))?.read_to_end(&mut status)?;
        let user_namespace = fs::read_link(format!("/proc/{thread}/ns/user"))?;
        // Without a security module the file is there and cannot be read.
        let label = fs::read(format!("/proc/{thread}/attr/current")).ok();
        parse(&status, user_namespace, label)
            .ok_or_else(|| io::Error::other(format!("`/proc/{thread}/status` lacks a field")))
    }

    /// What every process of the command looks like that has changed nothing.
    pub(super) fn expected(mut self, no_new_privs: bool) -> Self {
        self.no_new_privs |= no_new_privs;
        self.filters += 1;
        self
    }

    /// Whether it has the same credentials as another.
    fn is_like(&self, other: &Self) -> bool {
        self.credentials == other.credentials
            && self.user_namespace == other.user_namespace
            && self.label == other.label
    }
}

fn parse(status: &[u8], user_namespace: PathBuf, label: Option<Vec<u8>>) -> Option<Identity> {
    let field = |name: &[u8]| {
        let mut lines = status.split(|&b| b == b'\n');
        lines.find_map(|line| line.strip_prefix(name))
    };
    let number = |name: &[u8]| -> Option<u64> {
        std::str::from_utf8(field(name)?).ok()?.trim().parse().ok()
    };
    let credentials = CREDENTIALS
        .iter()
        .map(|name| field(name).map(<[u8]>::to_vec));
    Some(Identity {
        tgid: number(b"Tgid:")? as u32,
        credentials: credentials.collect::<Option<_>>()?,
        user_namespace,
        label,
        no_new_privs: number(b"NoNewPrivs:")? != 0,
        filters: number(b"Seccomp_filters:")?,
    })
}

/// Which processes are in a sandbox that the supervisor is not in.
///
/// seccomp filters and no_new_privs, which nearly every sandbox sets, are
/// inherited and shown in /proc. Landlock is not shown; what restricts itself
/// without having set no_new_privs by itself is remembered, and who was started
/// since then may be its child.
pub(super) struct Sandboxes {
    expected: Identity,
    restricted: Mutex<HashSet<u32>>,
    /// When the first restricted itself, in clock ticks since boot.
    since: AtomicU64,
}

impl Sandboxes {
    pub(super) fn new(expected: Identity) -> Self {
        Self {
            expected,
            restricted: Mutex::default(),
            since: AtomicU64::new(u64::MAX),
        }
    }

    /// A thread is about to restrict itself by Landlock.
    pub(super) fn restricts_itself(&self, thread: u32) {
        match Identity::of(&thread.to_string()) {
            // It shows, in it and in its children.
            Ok(identity) if identity.no_new_privs != self.expected.no_new_privs => {}
            Ok(identity) => {
                self.lock().insert(identity.tgid);
                self.since.fetch_min(ticks_now(), Ordering::SeqCst);
            }
            // Gone, or not to be known.
            Err(_) => self.trust_nobody(),
        }
    }

    /// Who has restricted itself is not known.
    pub(super) fn trust_nobody(&self) {
        self.since.store(0, Ordering::SeqCst);
    }

    /// Whether a thread may be given what the supervisor may open.
    pub(super) fn check(&self, thread: u32) -> Result<Identity, Refusal> {
        let identity = Identity::of(&thread.to_string()).map_err(|e| {
            let what = format_args!("pid {thread}");
            Refusal::from_io(what, &e, Reason::Credentials)
        })?;
        let pid = identity.tgid;
        if !identity.is_like(&self.expected) {
            let detail = format!("pid {pid} has other credentials than exec itself");
            return Err(Refusal::new(Reason::Credentials, detail));
        }
        let sandboxed =
            |what: &str| Err(Refusal::new(Reason::Sandboxed, format!("pid {pid} {what}")));
        if identity.no_new_privs != self.expected.no_new_privs {
            return sandboxed("has set no_new_privs");
        }
        if identity.filters != self.expected.filters {
            return sandboxed("has a seccomp filter of its own");
        }
        let since = self.since.load(Ordering::SeqCst);
        if since != u64::MAX {
            let started = sys::start_time(pid);
            if self.lock().contains(&pid) || started.is_none_or(|started| started >= since) {
                return sandboxed("may be restricted by landlock");
            }
        }
        Ok(identity)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<u32>> {
        // A set of numbers is whole, whoever panicked.
        self.restricted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time as `/proc/<pid>/stat` has it, rounded down and one less.
fn ticks_now() -> u64 {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as u64;
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let ns = time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64;
        (u128::from(ns) * u128::from(per_second) / 1_000_000_000).saturating_sub(1) as u64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &[u8] = b"Name:\tcat\nTgid:\t77\nPid:\t78\nUid:\t0\t0\t0\t0\nGid:\t1\t1\t1\t1\n\
        Groups:\t1 2 \nCapEff:\t00000000\nNoNewPrivs:\t0\nSeccomp:\t2\nSeccomp_filters:\t1\n";

    fn identity(status: &[u8]) -> Option<Identity> {
        parse(status, "user:[1]".into(), None)
    }

    #[test]
    fn every_difference_counts() {
        let base = identity(STATUS).unwrap();
        assert_eq!((base.tgid, base.filters, base.no_new_privs), (77, 1, false));
        let text = String::from_utf8(STATUS.to_vec()).unwrap();
        for (from, to) in [
            ("Uid:\t0\t0", "Uid:\t0\t5"),
            ("Gid:\t1\t1\t1\t1", "Gid:\t1\t1\t1\t2"),
            ("Groups:\t1 2", "Groups:\t1"),
            ("CapEff:\t0", "CapEff:\tf"),
        ] {
            let other = identity(text.replace(from, to).as_bytes()).unwrap();
            assert!(!other.is_like(&base), "{to}");
        }
        let elsewhere = parse(STATUS, "user:[2]".into(), None).unwrap();
        assert!(!elsewhere.is_like(&base));
        let labelled = parse(STATUS, "user:[1]".into(), Some(b"unconfined".to_vec()));
        assert!(!labelled.unwrap().is_like(&base));
        assert_eq!(identity(b"Tgid:\t1\n"), None);
    }

    #[test]
    fn who_was_started_after_a_restriction_is_left_alone() {
        let own = Identity::of("self").unwrap();
        let sandboxes = Sandboxes::new(own);
        let pid = std::process::id();
        assert!(sandboxes.check(pid).is_ok());
        sandboxes.since.store(ticks_now() + 100, Ordering::SeqCst);
        assert!(sandboxes.check(pid).is_ok(), "older than the restriction");
        sandboxes.since.store(1, Ordering::SeqCst);
        let refusal = sandboxes.check(pid).unwrap_err();
        assert_eq!(refusal.reason, Reason::Sandboxed);
        sandboxes.since.store(u64::MAX, Ordering::SeqCst);
        sandboxes.restricts_itself(pid);
        assert!(sandboxes.check(pid).is_err());
    }
}
