//! The kernel's event times as times of day.

use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

/// Turns times of CLOCK_BOOTTIME into times of day.
#[derive(Debug, Clone, Copy)]
pub(super) struct BootClock {
    /// When the machine booted, by today's clock.
    boot: SystemTime,
}

impl BootClock {
    /// Reads both clocks.
    pub(super) fn now() -> Self {
        Self {
            boot: SystemTime::now() - Duration::from_nanos(boot_ns()),
        }
    }

    /// The time of day at `ns` nanoseconds of CLOCK_BOOTTIME.
    pub(super) fn at(self, ns: u64) -> SystemTime {
        self.boot + Duration::from_nanos(ns)
    }
}

/// CLOCK_BOOTTIME now, nanoseconds.
pub(super) fn boot_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |t| {
        t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64
    })
}
