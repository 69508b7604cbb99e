//! What `mount` counts.

use std::fmt;
use std::sync::OnceLock;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use vmafx_bypass::metrics::Health;
use vmafx_bypass::reexport::{Watch, Way};

use super::page::Page;
use super::{family, process};

/// Where `mount`'s numbers come from: not before it is mounted.
#[derive(Default)]
pub struct Mount(OnceLock<Watch>);

impl Mount {
    pub fn mounted(&self, watch: Watch) {
        // It comes to this once.
        let _ = self.0.set(watch);
    }

    fn write(&self, page: &mut Page<'_>) -> fmt::Result {
        process::write(page, "mount")?;
        page.one(&family::READY, self.readiness().is_ok())?;
        let Some(watch) = self.0.get() else {
            return Ok(());
        };
        let stats = watch.stats();
        let bytes = [(["cache"], stats.cache_bytes), (["fuse"], stats.fuse_bytes)];
        page.each(&family::READ_BYTES, bytes)?;
        let ways = Way::all().map(|way| {
            let count = stats.opens.get(way.name()).copied().unwrap_or(0);
            ([way.name()], count)
        });
        page.each(&family::MOUNT_OPENS, ways)?;
        page.one(&family::MOUNT_FAILED_OPENS, stats.failed)?;
        page.one(&family::MOUNT_FAILED_READS, stats.failed_reads)?;
        page.by_reason(&family::FUSE_READ_BYTES, &stats.fuse_by_reason)?;
        page.by_reason(&family::MOUNT_NOT_PASSED, &stats.by_reason)
    }
}

impl Health for Mount {
    fn health(&self) -> Result<String, String> {
        Ok("ok".into())
    }

    fn readiness(&self) -> Result<String, String> {
        match self.0.get() {
            Some(_) => Ok("mounted".into()),
            None => Err("not mounted yet".into()),
        }
    }
}

impl Collector for Mount {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        self.write(&mut Page::new(encoder))
    }
}

impl fmt::Debug for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mount").finish_non_exhaustive()
    }
}
