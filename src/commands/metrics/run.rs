//! What `run` counts.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use vmafx_bypass::handover::ServerObserver;
use vmafx_bypass::metrics::Health;
use vmafx_bypass::tracker::{Accounts, AttachMode, Observer};

use super::clips::{BUDGET, Clip, Clips, open_clips};
use super::page::Page;
use super::{family, process};
use crate::cli::RunArgs;
use crate::commands::account::{LocalRate, share};

/// A tracking thread that has done nothing for so long is stuck: it does something
/// once a second, and seldom needs ten to look at every process of a large host.
const STUCK: Duration = Duration::from_secs(60);

/// Where `run`'s numbers come from.
pub struct Run {
    prefixes: usize,
    /// Whether it may be that no prefix is mounted.
    waits: bool,
    clips: Mutex<Clips>,
    /// Measured when it is asked for; `None`: it cannot be.
    rate: OnceLock<Option<LocalRate>>,
    /// Not before it is attached.
    live: OnceLock<Live>,
}

struct Live {
    tracker: Observer,
    server: Option<ServerObserver>,
}

impl Run {
    pub fn new(args: &RunArgs) -> Self {
        Self {
            prefixes: args.prefix.len(),
            waits: args.wait.is_some(),
            clips: Mutex::new(Clips::new(args.cache_dir.clone())),
            rate: OnceLock::new(),
            live: OnceLock::new(),
        }
    }

    /// It is attached, and hands clips over if it is to.
    pub fn attached(&self, tracker: Observer, server: Option<ServerObserver>) {
        // It comes to this once.
        let _ = self.live.set(Live { tracker, server });
    }

    fn write(&self, page: &mut Page<'_>) -> fmt::Result {
        process::write(page, "run")?;
        page.one(&family::READY, self.readiness().is_ok())?;
        let Some(Live { tracker, server }) = self.live.get() else {
            return Ok(());
        };
        self.write_tracker(page, tracker)?;
        server
            .as_ref()
            .map_or(Ok(()), |server| write_server(page, server))
    }

    fn write_tracker(&self, page: &mut Page<'_>, tracker: &Observer) -> fmt::Result {
        let mode = tracker.attach_mode().map_or("", AttachMode::name);
        page.info(&family::ATTACH_INFO, [mode])?;
        let watches = tracker.watches();
        let prefixes = [
            (["watched"], watches.len()),
            (["waiting"], self.prefixes.saturating_sub(watches.len())),
        ];
        page.each(&family::PREFIXES, prefixes)?;
        let mounts: BTreeSet<_> = watches.iter().map(|watch| watch.mount.dev).collect();
        page.one(&family::MOUNTS, mounts.len())?;

        let (entries, losses) = (tracker.entries(), tracker.losses());
        page.one(&family::TRACKED_FDS, entries.len())?;
        let processes: BTreeSet<_> = entries.iter().map(|fd| fd.pid).collect();
        page.one(&family::TRACKED_PROCESSES, processes.len())?;
        let told = tracker.told().map(|(kind, n)| ([kind.name()], n));
        page.each(&family::EVENTS, told)?;
        page.each(&family::LOSSES, losses.iter().map(|(name, n)| ([name], n)))?;
        let complete = losses.complete() && entries.iter().all(|fd| fd.path.is_some());
        page.one(&family::COMPLETE, complete)?;

        // Where the maps cannot be read, the numbers are not there.
        let accounts = tracker.accounts().unwrap_or_default();
        let read = accounts.iter().flat_map(|accounts| &accounts.each);
        let read: HashSet<Clip> = read.map(Clip::from).collect();
        let open = open_clips(&entries);
        let mut clips = self.clips.lock().unwrap_or_else(PoisonError::into_inner);
        clips.refresh(&open.union(&read).cloned().collect(), BUDGET);
        let sample = clips.sample(&open);
        page.each(&family::CLIPS, sample.states().map(|(name, n)| ([name], n)))?;
        page.one(&family::CLIPS_SIZE, sample.size)?;
        page.one(&family::CLIPS_CACHED, sample.cached)?;
        accounts.map_or(Ok(()), |accounts| {
            self.write_accounts(page, &accounts, &clips)
        })
    }

    fn write_accounts(
        &self,
        page: &mut Page<'_>,
        accounts: &Accounts,
        clips: &Clips,
    ) -> fmt::Result {
        let total = accounts.total;
        page.one(&family::FUSE_READS, total.reads)?;
        page.one(&family::FUSE_READ_SECONDS, total.ns as f64 / 1e9)?;
        page.each(&family::READ_BYTES, [(["fuse"], total.bytes)])?;
        let Some(rate) = self.rate.get_or_init(LocalRate::measure) else {
            return Ok(());
        };
        let saved = accounts.each.iter().filter_map(|account| {
            let estimate = clips.estimate(&Clip::from(account))?;
            let share = share(estimate.cached_bytes, account.size, estimate.state);
            Some(rate.saved(account.cost.into(), share))
        });
        page.one(&family::SAVABLE, saved.sum::<u64>() as f64 / 1e9)
    }
}

fn write_server(page: &mut Page<'_>, server: &ServerObserver) -> fmt::Result {
    let stats = server.stats();
    for (family, n) in [
        (&family::HANDOVER_CONNECTIONS, stats.clients),
        (&family::HANDOVER_CONNECTED, stats.connected),
        (&family::HANDOVER_CHECKS, stats.checks),
        (&family::HANDOVER_REJECTED, stats.rejected),
        (&family::HANDOVER_BUSY, stats.busy),
        (&family::HANDOVER_TURNED_AWAY, stats.turned_away),
        (&family::HANDOVER_DROPPED, stats.dropped),
    ] {
        page.one(family, n)?;
    }
    let given = [(["ranges"], stats.ranges), (["whole"], stats.whole)];
    page.each(&family::HANDOVER_GIVEN, given)?;
    page.by_reason(&family::HANDOVER_REFUSED, &stats.refused)?;
    page.by_reason(&family::HANDOVER_ENDED, &stats.ended)?;
    let times = server.proof_times().into_iter().map(|times| {
        let kind = if times.whole { "whole" } else { "ranges" };
        let result = if times.given { "given" } else { "refused" };
        ([kind, result], times.durations)
    });
    page.durations(&family::HANDOVER_PROOF, times)
}

impl Health for Run {
    fn health(&self) -> Result<String, String> {
        match self.live.get() {
            Some(live) if live.tracker.has_ended() => Err("tracking has ended".into()),
            Some(live) if live.tracker.silence() > STUCK => Err(format!(
                "the tracking thread has done nothing for {} s: start run again",
                live.tracker.silence().as_secs()
            )),
            _ => Ok("ok".into()),
        }
    }

    fn readiness(&self) -> Result<String, String> {
        self.health()?;
        let Some(live) = self.live.get() else {
            return Err("not attached yet".into());
        };
        let (watched, all) = (live.tracker.watches().len(), self.prefixes);
        if watched == 0 && !self.waits {
            return Err("no prefix is on an rclone mount any more".into());
        }
        Ok(format!("{watched} of {all} prefixes watched"))
    }
}

impl Collector for Run {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        self.write(&mut Page::new(encoder))
    }
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").finish_non_exhaustive()
    }
}
