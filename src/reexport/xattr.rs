//! Extended attributes: the source's, and two of our own.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;

/// The largest value and list that there are (include/uapi/linux/limits.h).
const MAX: usize = 64 << 10;

/// Attributes that every file has, in no list: what copies attributes does not
/// copy them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Own {
    /// The file's path on the rclone mount.
    Source,
    /// The mount's counts, as JSON.
    Stats,
}

/// The name of [`Own::Source`].
pub(super) const SOURCE: &str = "user.vmafx_bypass.source";
/// The name of [`Own::Stats`].
pub(super) const STATS: &str = "user.vmafx_bypass.stats";

impl Own {
    pub(super) fn named(name: &OsStr) -> Option<Self> {
        match name.to_str()? {
            SOURCE => Some(Self::Source),
            STATS => Some(Self::Stats),
            _ => None,
        }
    }
}

/// What an O_PATH descriptor refers to, by its name in /proc: the calls for
/// extended attributes do not take such descriptors.
fn proc_path(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// A value that the source has.
pub(super) fn get(file: OwnedFd, name: &OsStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0; MAX];
    let got = rustix::fs::getxattr(proc_path(&file), name, &mut value[..]);
    value.truncate(got.map_err(unsupported)?);
    Ok(value)
}

/// The names that the source has, each ended by a NUL.
pub(super) fn list(file: OwnedFd) -> io::Result<Vec<u8>> {
    let mut names = vec![0; MAX];
    let listed = rustix::fs::listxattr(proc_path(&file), &mut names[..]);
    names.truncate(listed.map_err(unsupported)?);
    Ok(names)
}

/// ENOSYS would have the kernel ask for no attribute ever again.
fn unsupported(error: Errno) -> io::Error {
    match error {
        Errno::NOSYS => Errno::NOTSUP.into(),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_are_known_by_their_names() {
        assert_eq!(Own::named(OsStr::new(SOURCE)), Some(Own::Source));
        assert_eq!(Own::named(OsStr::new(STATS)), Some(Own::Stats));
        assert_eq!(Own::named(OsStr::new("user.other")), None);
    }

    #[test]
    fn a_file_without_any_has_an_empty_list() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), "").unwrap();
        let open = || OwnedFd::from(std::fs::File::open(dir.path().join("f")).unwrap());
        assert_eq!(list(open()).unwrap(), b"");
        let error = get(open(), OsStr::new("user.x")).unwrap_err();
        let code = error.raw_os_error();
        assert!(matches!(
            code,
            Some(nix::libc::ENODATA | nix::libc::EOPNOTSUPP)
        ));
    }
}
