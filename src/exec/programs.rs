//! Programs that are left alone, by name.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;

/// Programs that compare what a path leads to with what they have opened, or take
/// more than bytes from it, such as its mode, and
/// fail or behave otherwise. `docs/REFERENCE.md` says what
/// each does; a test looks at those that are installed.
pub const DEFAULT: &[&str] = &[
    "7z", "7za", "7zr", "bsdcpio", "bsdtar", "cp", "install", "mv", "scp", "sftp", "tail", "tar",
];

/// Which programs get no other descriptor than the kernel's.
#[derive(Debug, Clone)]
pub struct Programs {
    excluded: BTreeSet<OsString>,
}

impl Default for Programs {
    fn default() -> Self {
        Self::new(&[], &[])
    }
}

impl Programs {
    /// The default list, without `included` and with `excluded`.
    #[must_use]
    pub fn new(included: &[OsString], excluded: &[OsString]) -> Self {
        let mut names: BTreeSet<OsString> = DEFAULT.iter().map(OsString::from).collect();
        for name in included {
            names.remove(name);
        }
        names.extend(excluded.iter().cloned());
        Self { excluded: names }
    }

    /// The name by which a process is on the list, if it is: that of its
    /// program's file, or the one by which it was called, which is another for
    /// scripts and for programs of many names such as busybox.
    pub(super) fn excluded(&self, tgid: u32) -> Option<OsString> {
        if self.excluded.is_empty() {
            return None;
        }
        let program = fs::read_link(format!("/proc/{tgid}/exe")).ok();
        let called = fs::read(format!("/proc/{tgid}/comm")).unwrap_or_default();
        let called = called.strip_suffix(b"\n").unwrap_or(&called);
        let names = [
            program.as_deref().and_then(|path| path.file_name()),
            Some(OsStr::from_bytes(called)),
        ];
        let mut names = names.into_iter().flatten();
        names
            .find(|name| self.excluded.contains(*name))
            .map(OsStr::to_os_string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_be_added_and_taken_off() {
        let own = std::env::current_exe().unwrap();
        let own = own.file_name().unwrap().to_os_string();
        let pid = std::process::id();
        assert_eq!(Programs::default().excluded(pid), None);
        let with = Programs::new(&[], std::slice::from_ref(&own));
        assert_eq!(with.excluded(pid), Some(own));
        let without = Programs::new(&["cp".into()], &[]);
        assert!(!without.excluded.contains(OsStr::new("cp")));
        assert!(without.excluded.contains(OsStr::new("mv")));
    }
}
