//! Whether there is memory for a copy: of the host, and of our control groups.
//! What a copy takes is never written out where there is no swap, so that too
//! large a one has the kernel kill somebody.

use std::fs;
use std::path::Path;

use crate::reason::{Reason, Refusal};

/// Refuses a copy that would take more than half of what is available.
///
/// # Errors
/// [`Reason::Budget`].
pub(super) fn check(bytes: u64) -> Result<(), Refusal> {
    match available() {
        Some(available) if bytes > available / 2 => Err(Refusal::new(
            Reason::Budget,
            format!("a copy of {bytes} bytes would take over half of the {available} available"),
        )),
        // Where /proc does not tell, the budget alone limits it.
        _ => Ok(()),
    }
}

/// Bytes that can be taken without anything being written out.
fn available() -> Option<u64> {
    let host = fs::read_to_string("/proc/meminfo").ok();
    let host = host.and_then(|text| Some(field(&text, "MemAvailable:")? << 10));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = groups
        .lines()
        .filter_map(|line| Version::of(line).of_groups());
    host.into_iter().chain(groups).min()
}

/// The number after a name, in a text of such lines.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Where a control group's memory is told, by a line of `/proc/self/cgroup`.
#[derive(Debug, PartialEq, Eq)]
enum Version<'a> {
    /// `0::/path`
    Two(&'a str),
    /// `7:memory:/path`
    One(&'a str),
    /// Of another controller.
    None,
}

impl<'a> Version<'a> {
    fn of(line: &'a str) -> Self {
        let mut parts = line.splitn(3, ':').skip(1);
        match (parts.next(), parts.next()) {
            (Some(""), Some(path)) => Self::Two(path),
            (Some(names), Some(path)) if names.split(',').any(|n| n == "memory") => Self::One(path),
            _ => Self::None,
        }
    }

    /// The least that a group, or one above it, has left. Groups that are not
    /// to be seen from here limit nothing that we know of.
    fn of_groups(&self) -> Option<u64> {
        let (root, path, limit, usage, files) = match self {
            Self::Two(path) => {
                let names = ("memory.max", "memory.current");
                (
                    "/sys/fs/cgroup",
                    path,
                    names.0,
                    names.1,
                    ["inactive_file ", "active_file "],
                )
            }
            Self::One(path) => {
                let names = ("memory.limit_in_bytes", "memory.usage_in_bytes");
                let files = ["total_inactive_file ", "total_active_file "];
                ("/sys/fs/cgroup/memory", path, names.0, names.1, files)
            }
            Self::None => return None,
        };
        let below = Path::new(path.strip_prefix('/')?);
        let read = |folder: &Path, name| fs::read_to_string(folder.join(name)).ok();
        let left = below.ancestors().filter_map(|group| {
            let folder = Path::new(root).join(group);
            // `max`, and no number, where there is no limit.
            let limit: u64 = read(&folder, limit)?.trim().parse().ok()?;
            let usage: u64 = read(&folder, usage)?.trim().parse().ok()?;
            let stat = read(&folder, "memory.stat").unwrap_or_default();
            // The page cache gives way.
            let files: u64 = files.iter().filter_map(|name| field(&stat, name)).sum();
            Some(limit.saturating_sub(usage.saturating_sub(files)))
        });
        left.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_what_is_available_is_the_limit() {
        let available = available().unwrap();
        assert!(available > 1 << 20);
        assert!(check(1 << 20).is_ok());
        assert_eq!(check(u64::MAX).unwrap_err().reason, Reason::Budget);
    }

    #[test]
    fn groups_are_told_by_their_lines() {
        assert_eq!(Version::of("0::/a/b"), Version::Two("/a/b"));
        assert_eq!(Version::of("7:memory:/a:b"), Version::One("/a:b"));
        assert_eq!(Version::of("7:cpu,memory:/"), Version::One("/"));
        assert_eq!(Version::of("7:cpu:/a"), Version::None);
        assert_eq!(Version::of(""), Version::None);
    }

    #[test]
    fn fields_are_whole_names() {
        let text = "inactive_file 5\nactive_file 7\n";
        assert_eq!(field(text, "active_file "), Some(7));
        assert_eq!(field(text, "file "), None);
    }
}
