//! Small questions to the kernel that more than one module asks.

use std::fs;

use nix::time::{ClockId, clock_gettime};

/// The fields of `/proc/<pid>/stat` from the third on, the process's state.
fn stat(pid: u32) -> Option<String> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, may hold spaces and parentheses.
    let after_name = stat.iter().rposition(|&b| b == b')')? + 2;
    String::from_utf8(stat.get(after_name..)?.to_vec()).ok()
}

/// The pid of a process's parent. `None` where there is no such process.
#[must_use]
pub(crate) fn parent(pid: u32) -> Option<u32> {
    stat(pid)?.split(' ').nth(1)?.parse().ok()
}

/// Field 22 of `/proc/<pid>/stat`: when the process started, in clock ticks
/// since boot. With the pid it names this process and no later one. `None`
/// where there is no such process.
#[must_use]
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let text = stat(pid)?;
    let mut fields = text.split(' ');
    // A zombie does nothing any more, and holds nothing.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// A monotonic clock of a few milliseconds' grain that costs no system call.
#[must_use]
pub(crate) fn coarse_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(0, |t| {
        t.tv_sec() as u64 * 1_000 + t.tv_nsec() as u64 / 1_000_000
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_start_time_is_stable() {
        let own = std::process::id();
        assert!(start_time(own).is_some());
        assert_eq!(start_time(own), start_time(own));
        assert_eq!(start_time(u32::MAX), None);
        assert_eq!(parent(own), Some(std::os::unix::process::parent_id()));
    }
}
