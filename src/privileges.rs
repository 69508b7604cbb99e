//! What this process may do, and giving up what it does not need any more.
//!
//! Capabilities are a thread's own: each gives up its own, and a thread that is
//! started later has those of the one that starts it.

use std::fmt;
use std::io;
use std::ops::{BitAnd, BitOr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::thread::CapabilitySet;

use crate::sys::kernel_version;

/// A set of capabilities, by their numbers in linux/capability.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities(u64);

impl Capabilities {
    /// None.
    pub const NONE: Self = Self(0);
    /// Writing to files and folders of others.
    pub const DAC_OVERRIDE: Self = Self(CapabilitySet::DAC_OVERRIDE.bits());
    /// Reading files of others, and going through their folders.
    pub const DAC_READ_SEARCH: Self = Self(CapabilitySet::DAC_READ_SEARCH.bits());
    /// What is a file's owner's to do.
    pub const FOWNER: Self = Self(CapabilitySet::FOWNER.bits());
    /// Making a file immutable.
    pub const LINUX_IMMUTABLE: Self = Self(CapabilitySet::LINUX_IMMUTABLE.bits());
    /// Changing the root folder, which entering a mount namespace does.
    pub const SYS_CHROOT: Self = Self(CapabilitySet::SYS_CHROOT.bits());
    /// Looking into processes of others.
    pub const SYS_PTRACE: Self = Self(CapabilitySet::SYS_PTRACE.bits());
    /// Mounting, and much else.
    pub const SYS_ADMIN: Self = Self(CapabilitySet::SYS_ADMIN.bits());
    /// Asking who has files of others open.
    pub const LEASE: Self = Self(CapabilitySet::LEASE.bits());
    /// BPF programs that look at the kernel.
    pub const PERFMON: Self = Self(CapabilitySet::PERFMON.bits());
    /// BPF maps and programs.
    pub const BPF: Self = Self(CapabilitySet::BPF.bits());

    /// Those that the calling thread may use now.
    #[must_use]
    pub fn effective() -> Self {
        // A thread may always ask for its own.
        let sets = rustix::thread::capabilities(None);
        Self(sets.map_or(0, |sets| sets.effective.bits()))
    }

    /// Whether all of these are in it.
    #[must_use]
    pub fn has(self, others: Self) -> bool {
        self & others == others
    }

    /// Whether BPF programs may be loaded that look at the kernel.
    #[must_use]
    pub fn may_trace(self) -> bool {
        self.has(Self::SYS_ADMIN) || self.has(Self::BPF | Self::PERFMON)
    }

    /// Their names as setpriv(1) and containers take them: `bpf`, `sys_admin`.
    pub fn names(self) -> impl Iterator<Item = String> {
        let numbers = (0..u64::BITS).filter(move |n| self.0 & (1 << n) != 0);
        numbers.map(|n| {
            let one = CapabilitySet::from_bits_retain(1 << n);
            match one.iter_names().next() {
                Some((name, _)) => name.to_lowercase(),
                // One of a later kernel.
                None => n.to_string(),
            }
        })
    }
}

impl BitOr for Capabilities {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Capabilities {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// As in `cap_bpf, cap_perfmon`.
impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::NONE {
            return f.write_str("none");
        }
        let names: Vec<_> = self.names().map(|name| format!("cap_{name}")).collect();
        f.write_str(&names.join(", "))
    }
}

/// Gives up, in the calling thread, every capability but these: from the
/// effective, permitted, inheritable and ambient sets and, where that is allowed
/// (CAP_SETPCAP), from the bounding set. Returns what is left.
///
/// # Errors
/// Those of capset(2), which does not refuse to take away.
pub fn keep(wanted: Capabilities) -> io::Result<Capabilities> {
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        // EINVAL: the kernel has no more. EPERM: not ours to take away; then
        // no_new_privs keeps a program that is started from having it.
        if one.bits() & wanted.0 == 0
            && rustix::thread::capability_is_in_bounding_set(one).unwrap_or(false)
            && rustix::thread::remove_capability_from_bounding_set(one).is_err()
        {
            break;
        }
    }
    let mut sets = rustix::thread::capabilities(None)?;
    let wanted = CapabilitySet::from_bits_retain(wanted.0);
    sets.effective &= wanted;
    sets.permitted &= wanted;
    sets.inheritable = CapabilitySet::empty();
    // The ambient set goes with the inheritable one: capabilities(7).
    rustix::thread::set_capabilities(None, sets)?;
    Ok(Capabilities(sets.effective.bits()))
}

/// What bpf(2) asks of who works on maps and programs by their descriptors: nothing
/// from Linux 5.19 on. Before, where kernel.unprivileged_bpf_disabled is set, it
/// wants CAP_BPF for everything (kernel/bpf/syscall.c).
#[must_use]
pub fn for_maps() -> Capabilities {
    if kernel_version() < (5, 19) {
        Capabilities::BPF
    } else {
        Capabilities::NONE
    }
}

/// What it takes to remove a file of ours from a folder: nothing from one of our own.
#[must_use]
pub fn to_remove_from(folder: &Path) -> Capabilities {
    let own = rustix::process::geteuid().as_raw();
    match std::fs::metadata(folder) {
        Ok(found) if found.uid() != own => Capabilities::DAC_OVERRIDE | Capabilities::FOWNER,
        _ => Capabilities::NONE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_capabilities_or_one_may_trace() {
        let both = Capabilities::BPF | Capabilities::PERFMON;
        assert!(both.may_trace() && Capabilities::SYS_ADMIN.may_trace());
        for less in [
            Capabilities::BPF,
            Capabilities::PERFMON,
            Capabilities::SYS_PTRACE,
            Capabilities::NONE,
        ] {
            assert!(!less.may_trace(), "{less}");
        }
    }

    #[test]
    fn sets_are_told_by_name() {
        let both = Capabilities::BPF | Capabilities::SYS_ADMIN;
        assert_eq!(both.to_string(), "cap_sys_admin, cap_bpf");
        assert_eq!(Capabilities::NONE.to_string(), "none");
        assert_eq!(Capabilities(1 << 63).to_string(), "cap_63");
        assert!(both.has(Capabilities::BPF) && !both.has(Capabilities::LEASE | both));
    }

    #[test]
    fn what_is_given_up_is_gone_from_every_set_of_this_thread_alone() {
        let before = Capabilities::effective();
        std::thread::spawn(move || {
            assert_eq!(
                keep(Capabilities::SYS_PTRACE).unwrap(),
                before & Capabilities::SYS_PTRACE
            );
            assert_eq!(keep(Capabilities::NONE).unwrap(), Capabilities::NONE);
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                let line = format!("{set}:\t0000000000000000\n");
                assert!(status.contains(&line), "{set}: {status}");
            }
        })
        .join()
        .unwrap();
        assert_eq!(Capabilities::effective(), before);
    }
}
