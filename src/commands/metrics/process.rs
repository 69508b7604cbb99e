//! What every process of Prometheus's tells of itself, by the usual names.

use std::fmt;

use procfs::ProcResult;
use procfs::process::{LimitValue, Process};
use vmafx_bypass::version;

use super::family::{
    BUILD_INFO, PROCESS_CPU, PROCESS_FDS, PROCESS_MAX_FDS, PROCESS_RESIDENT, PROCESS_START,
};
use super::page::Page;

struct Own {
    cpu_seconds: f64,
    fds: usize,
    max_fds: f64,
    resident: u64,
    started: f64,
}

fn own() -> ProcResult<Own> {
    let process = Process::myself()?;
    let stat = process.stat()?;
    let seconds = |ticks: u64| ticks as f64 / procfs::ticks_per_second() as f64;
    Ok(Own {
        cpu_seconds: seconds(stat.utime + stat.stime),
        fds: process.fd_count()?,
        max_fds: match process.limits()?.max_open_files.soft_limit {
            LimitValue::Value(limit) => limit as f64,
            LimitValue::Unlimited => f64::INFINITY,
        },
        resident: stat.rss * procfs::page_size(),
        started: procfs::boot_time_secs()? as f64 + seconds(stat.starttime),
    })
}

/// The build, the command and the process.
pub fn write(page: &mut Page<'_>, command: &str) -> fmt::Result {
    let build = version::build();
    page.info(&BUILD_INFO, [build.version, build.revision, command])?;
    // Where /proc is closed the rest is still worth having.
    let Ok(own) = own() else { return Ok(()) };
    page.one(&PROCESS_CPU, own.cpu_seconds)?;
    page.one(&PROCESS_FDS, own.fds)?;
    page.one(&PROCESS_MAX_FDS, own.max_fds)?;
    page.one(&PROCESS_RESIDENT, own.resident)?;
    page.one(&PROCESS_START, own.started)
}
