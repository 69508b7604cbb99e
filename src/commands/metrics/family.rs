//! The one table of what is counted: docs/METRICS.md has it, too, and a test
//! compares both.

use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

/// Numbers of one name.
#[derive(Debug)]
pub struct Family {
    /// As Prometheus stores it, without a histogram's suffixes.
    pub name: &'static str,
    pub kind: MetricType,
    pub unit: &'static str,
    pub labels: &'static [&'static str],
    /// Which command has it.
    #[cfg_attr(not(test), allow(dead_code))] // for the page alone
    pub of: &'static str,
    #[cfg_attr(not(test), allow(dead_code))] // likewise
    pub stability: &'static str,
    pub help: &'static str,
}

impl Family {
    /// The name without what the formats append by themselves, and the unit that they
    /// append.
    pub fn parts(&self) -> (&'static str, Option<Unit>) {
        let suffix = match self.kind {
            MetricType::Counter => "_total",
            MetricType::Info => "_info",
            _ => "",
        };
        let name = self.name.strip_suffix(suffix).unwrap_or(self.name);
        let unit = match self.unit {
            "seconds" => Unit::Seconds,
            "bytes" => Unit::Bytes,
            _ => return (name, None),
        };
        let base = name.strip_suffix(unit.as_str());
        let base = base.and_then(|base| base.strip_suffix('_'));
        (base.unwrap_or(name), Some(unit))
    }
}

macro_rules! families {
    ($($family:ident = $name:literal, $kind:ident, $unit:literal, [$($label:literal),*],
       $of:literal, $stability:literal, $help:literal;)*) => {
        $(
            #[doc = $help]
            // A build without `run` or `mount` has no use for some.
            #[cfg_attr(not(all(feature = "ebpf", feature = "mount")), allow(dead_code))]
            pub const $family: Family = Family {
                name: $name,
                kind: MetricType::$kind,
                unit: $unit,
                labels: &[$($label),*],
                of: $of,
                stability: $stability,
                help: $help,
            };
        )*

        /// All there are.
        #[cfg(test)]
        pub const ALL: &[Family] = &[$($family),*];
    };
}

families! {
    BUILD_INFO = "vmafx_bypass_build_info", Info, "1", ["version", "revision", "command"],
        "both", "stable", "Which build this is, and which of its commands";
    READY = "vmafx_bypass_ready", Gauge, "0 or 1", [],
        "both", "stable", "Whether /readyz answers 200";
    PROCESS_CPU = "process_cpu_seconds_total", Counter, "seconds", [],
        "both", "stable", "Processor time that this process has taken";
    PROCESS_FDS = "process_open_fds", Gauge, "descriptors", [],
        "both", "stable", "Descriptors that this process has open";
    PROCESS_MAX_FDS = "process_max_fds", Gauge, "descriptors", [],
        "both", "stable", "Descriptors that this process may have open";
    PROCESS_RESIDENT = "process_resident_memory_bytes", Gauge, "bytes", [],
        "both", "stable", "Memory of this process that is resident";
    PROCESS_START = "process_start_time_seconds", Gauge, "seconds", [],
        "both", "stable", "When this process was started, since 1970";

    ATTACH_INFO = "vmafx_bypass_attach_info", Info, "1", ["mode"],
        "run", "stable", "How it has come to system calls";
    PREFIXES = "vmafx_bypass_prefixes", Gauge, "prefixes", ["state"],
        "run", "stable", "Prefixes that are watched, and that wait for an rclone mount";
    MOUNTS = "vmafx_bypass_mounts", Gauge, "mounts", [],
        "run", "stable", "File systems that are watched";
    TRACKED_FDS = "vmafx_bypass_tracked_fds", Gauge, "descriptors", [],
        "run", "stable", "Descriptors that are open below the prefixes";
    TRACKED_PROCESSES = "vmafx_bypass_tracked_processes", Gauge, "processes", [],
        "run", "stable", "Processes that have one";
    EVENTS = "vmafx_bypass_events_total", Counter, "events", ["kind"],
        "run", "stable", "Rows of `run`: what happened to descriptors";
    LOSSES = "vmafx_bypass_losses_total", Counter, "losses", ["cause"],
        "run", "stable", "What got lost while tracking, whether made good or not";
    COMPLETE = "vmafx_bypass_complete", Gauge, "0 or 1", [],
        "run", "stable", "Whether the table is exact: nothing was lost, or all was made good";
    CLIPS = "vmafx_bypass_clips", Gauge, "clips", ["state"],
        "run", "stable", "Open clips by how they could be read, by an estimate";
    CLIPS_SIZE = "vmafx_bypass_clips_size_bytes", Gauge, "bytes", [],
        "run", "stable", "Sizes of open clips, together";
    CLIPS_CACHED = "vmafx_bypass_clips_cached_bytes", Gauge, "bytes", [],
        "run", "stable", "Of these, bytes that rclone's metadata lists as cached";

    HANDOVER_CONNECTIONS = "vmafx_bypass_handover_connections_total", Counter, "connections", [],
        "run --socket", "stable", "Connections of clients";
    HANDOVER_CONNECTED = "vmafx_bypass_handover_connected", Gauge, "connections", [],
        "run --socket", "stable", "Connections that are open";
    HANDOVER_GIVEN = "vmafx_bypass_handover_given_total", Counter, "clips", ["kind"],
        "run --socket", "stable", "Clips handed over, by ranges and whole";
    HANDOVER_REFUSED = "vmafx_bypass_handover_refused_total", Counter, "clips", ["reason"],
        "run --socket", "stable", "Requests that got no clip; clients ask again for one that is not cached yet";
    HANDOVER_CHECKS = "vmafx_bypass_handover_checks_total", Counter, "requests", [],
        "run --socket", "stable", "Questions whether a proof still holds";
    HANDOVER_ENDED = "vmafx_bypass_handover_ended_total", Counter, "proofs", ["reason"],
        "run --socket", "stable", "Proofs that had ended when their client asked";
    HANDOVER_REJECTED = "vmafx_bypass_handover_rejected_total", Counter, "requests", [],
        "run --socket", "stable", "Requests that were none";
    HANDOVER_BUSY = "vmafx_bypass_handover_busy_total", Counter, "requests", [],
        "run --socket", "stable", "Requests put off because too many were worked on";
    HANDOVER_TURNED_AWAY = "vmafx_bypass_handover_turned_away_total", Counter, "connections", [],
        "run --socket", "stable", "Connections refused because there were too many";
    HANDOVER_DROPPED = "vmafx_bypass_handover_dropped_total", Counter, "connections", [],
        "run --socket", "stable", "Connections closed because their client did not read, or was silent";
    HANDOVER_PROOF = "vmafx_bypass_handover_proof_seconds", Histogram, "seconds",
        ["kind", "result"],
        "run --socket", "experimental", "From a client's descriptor to the proof, or to the refusal";

    FUSE_READS = "vmafx_bypass_fuse_reads_total", Counter, "reads", [],
        "run --account", "experimental", "Read calls through FUSE on tracked descriptors";
    FUSE_READ_SECONDS = "vmafx_bypass_fuse_read_seconds_total", Counter, "seconds", [],
        "run --account", "experimental", "Time that programs have spent in these calls";
    SAVABLE = "vmafx_bypass_savable_seconds", Gauge, "seconds", [],
        "run --account", "experimental", "Of this time, what the bypass would have saved, by an estimate";
    READ_BYTES = "vmafx_bypass_read_bytes_total", Counter, "bytes", ["path"],
        "run --account, mount", "stable",
        "Bytes read, from the cache and through FUSE; `run` sees those through FUSE alone";
    FUSE_READ_BYTES = "vmafx_bypass_fuse_read_bytes_total", Counter, "bytes", ["reason"],
        "mount", "stable", "Bytes read through FUSE, by why";
    MOUNT_OPENS = "vmafx_bypass_mount_opens_total", Counter, "opens", ["way"],
        "mount", "stable", "Clips opened, by how they are read";
    MOUNT_FAILED_OPENS = "vmafx_bypass_mount_failed_opens_total", Counter, "opens", [],
        "mount", "stable", "Opens that failed";
    MOUNT_NOT_PASSED = "vmafx_bypass_mount_not_passed_total", Counter, "opens", ["reason"],
        "mount", "stable", "Opens that were not by passthrough, unless none is";
    MOUNT_FAILED_READS = "vmafx_bypass_mount_failed_reads_total", Counter, "reads", [],
        "mount", "stable", "Reads that failed";
}
