//! `run`: events as they happen.

#[cfg(feature = "ebpf")]
mod printer;

use std::process;

use anyhow::Result;

use crate::cli::RunArgs;
use crate::exit::{Coded, Exit};
use crate::output::Notes;
use crate::signals::Signals;
use vmafx_bypass::optin::{self, OptIn};

/// Checks the opt-in and tracks until a signal.
pub fn run(args: &RunArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
    match optin::from_env() {
        OptIn::Killed => {
            return Err(Coded::error(
                Exit::Environment,
                format!(
                    "{0}=0 switches tracking off on this host: unset it or set {0}=1",
                    optin::VARIABLE
                ),
            ));
        }
        OptIn::Unset if !args.enable => {
            return Err(Coded::error(
                Exit::Environment,
                format!(
                    "tracking is opt-in: set {}=1, or start with --enable",
                    optin::VARIABLE
                ),
            ));
        }
        OptIn::Unset | OptIn::Yes => {}
    }
    notes.detail(format_args!("pid {}", process::id()));
    tracking::run(args, notes, signals)
}

#[cfg(not(feature = "ebpf"))]
mod tracking {
    use super::{Coded, Exit, Notes, Result, RunArgs, Signals};

    pub fn run(_: &RunArgs, _: &Notes, _: Signals) -> Result<Exit> {
        Err(Coded::error(
            Exit::Environment,
            "this build has no tracker: build it with the cargo feature `ebpf`",
        ))
    }
}

#[cfg(feature = "ebpf")]
mod tracking {
    use std::sync::mpsc::RecvTimeoutError;
    use std::sync::{Arc, Mutex, PoisonError};
    use std::time::{Duration, Instant};

    use anyhow::Context;
    #[cfg(feature = "metrics")]
    use vmafx_bypass::handover;
    use vmafx_bypass::tracker::{AttachMode, Stopper, Subscription, TrackerError, Update};
    use vmafx_bypass::{Tracker, TrackerOptions};

    use super::printer::Printer;
    use super::{Coded, Exit, Notes, Result, RunArgs, Signals};
    use crate::cli::{Attach, Wait};
    #[cfg(feature = "metrics")]
    use crate::commands::metrics;
    use crate::commands::notify::Service;
    use crate::commands::{confine, serve};
    use crate::signals::Interrupted;

    pub fn run(args: &RunArgs, notes: &Notes, signals: Signals) -> Result<Exit> {
        // Nothing that it does starts a program.
        rustix::thread::set_no_new_privs(true).context("no_new_privs")?;
        let service = Service::from_env(notes);
        let (args, given) = serve::given(args)?;
        let args = &args;
        #[cfg(feature = "metrics")]
        let metrics = metrics::serve(
            args.metrics.metrics,
            metrics::Run::new(args),
            confine::lasting(),
            notes,
        )?;
        // Signals first: a prefix on a mount that hangs would hang the start.
        let stopper: Arc<Mutex<Option<Stopper>>> = Arc::default();
        let interrupted = signals.powerless().watch({
            let stopper = Arc::clone(&stopper);
            move || {
                let stopper = stopper.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(stopper) = &*stopper {
                    stopper.stop();
                }
            }
        });
        let (tracker, updates) = Tracker::start_subscribed(TrackerOptions {
            prefixes: args.prefix.clone(),
            allow_missing: args.wait.is_some(),
            attach: mode(args.attach),
            log: notes.libbpf_log(),
            pin_dir: Some(args.pin_dir.clone()),
            max_fds: args.max_fds,
            ring_bytes: args.ring_size.0 as u32,
            account: args.account,
            keep: Some(confine::lasting()),
        })
        .map_err(coded)?;
        *stopper.lock().unwrap_or_else(PoisonError::into_inner) = Some(tracker.stopper());
        if interrupted.exit().is_some() {
            tracker.stopper().stop();
        }
        tell_how(&tracker, args, notes);
        let bound = serve::bind(args, notes, given)?;
        confine::before_serving(args, notes);
        let server = serve::start(args, notes, bound)?;
        confine::after_serving(args, notes);
        #[cfg(feature = "metrics")]
        metrics.counted().attached(
            tracker.observer(),
            server.as_ref().map(handover::Server::observer),
        );
        let telling = service.ready(tracker.observer());
        let mut printer = Printer::new(args, notes, &tracker);
        let ended = printer
            .begin(&tracker.watches())
            .map_err(Into::into)
            .and_then(|()| {
                if let Some(Wait::AtMost(limit)) = args.wait
                    && tracker.watches().is_empty()
                    && interrupted.exit().is_none()
                {
                    wait_for_mount(&updates, *limit, &mut printer)?;
                }
                let end = tracker.stopper();
                let duration = args.duration.map(|d| *d);
                follow(&updates, duration, &end, &interrupted, &mut printer)
            });
        let stopping = telling.stopping();
        // Before `stop`, where the kernel may take seconds to detach.
        let entries = tracker.entries();
        let (events, losses) = (tracker.events(), tracker.losses());
        let complete = losses.complete() && entries.iter().all(|fd| fd.path.is_some());
        let tracked = entries.len();
        let accounts = match &ended {
            Ok(()) => printer.accounts(|| {
                interrupted.note_progress();
                stopping.goes_on();
            }),
            // Nobody reads it.
            Err(_) => Ok(None),
        };
        let handover = server.as_ref().map(|server| server.stats().into());
        drop(server);
        let summarised = printer.end(
            events,
            tracked,
            complete,
            &losses,
            accounts.as_ref().ok().and_then(Option::as_ref),
            handover.as_ref(),
        );
        if ended.is_ok() && summarised.is_ok() {
            interrupted.note_told();
        }
        // The tracker's own errors come first.
        tracker.stop().map_err(coded)?;
        ended?;
        summarised?;
        accounts?;
        Ok(Exit::Done)
    }

    /// Tells what is not as it would be elsewhere.
    fn tell_how(tracker: &Tracker, args: &RunArgs, notes: &Notes) {
        if tracker.replaced_pins() {
            notes.note(format_args!(
                "warning: replaced the pins that a dead process had left at `{}`",
                args.pin_dir.display()
            ));
        }
        for (mode, error) in tracker.refused_modes() {
            notes.detail(format_args!("not attached by {}: {error}", mode.name()));
        }
        if tracker.attach_mode() == Some(AttachMode::Tracepoint) {
            notes.note("note: 32-bit programs are not seen by --attach tracepoint");
        }
        if tracker.in_pid_namespace() {
            notes.note(
                "warning: in a pid namespace of its own: processes outside of it are not shown",
            );
        }
    }

    fn mode(attach: Attach) -> Option<AttachMode> {
        match attach {
            Attach::Auto => None,
            Attach::Fentry => Some(AttachMode::Fentry),
            Attach::Raw => Some(AttachMode::Raw),
            Attach::Tracepoint => Some(AttachMode::Tracepoint),
        }
    }

    fn coded(error: TrackerError) -> anyhow::Error {
        match &error {
            TrackerError::Environment(_) | TrackerError::Prefix(_) => {
                Coded::error(Exit::Environment, error.to_string())
            }
            _ => error.into(),
        }
    }

    fn wait_for_mount(
        updates: &Subscription,
        limit: Duration,
        printer: &mut Printer<'_>,
    ) -> Result<()> {
        let started = Instant::now();
        loop {
            match updates.recv_timeout(limit.saturating_sub(started.elapsed())) {
                Ok(update) => {
                    printer.update(&update)?;
                    if matches!(update, Update::Mounted(_)) {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Coded::error(
                        Exit::Environment,
                        format!(
                            "no prefix came on an rclone mount within {}",
                            humantime::format_duration(limit)
                        ),
                    ));
                }
            }
        }
    }

    /// Prints until tracking ends, by itself or when the time is over.
    fn follow(
        updates: &Subscription,
        duration: Option<Duration>,
        end: &Stopper,
        interrupted: &Interrupted,
        printer: &mut Printer<'_>,
    ) -> Result<()> {
        // One beyond the clock's range never comes.
        let mut deadline = duration.and_then(|d| Instant::now().checked_add(d));
        loop {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                // What was sent before is still printed.
                end.stop();
                deadline = None;
            }
            // Rows are flushed when there is nothing more to print at once.
            let update = match updates.recv_timeout(Duration::ZERO) {
                Err(RecvTimeoutError::Timeout) => {
                    printer.flush()?;
                    match deadline {
                        None => updates.recv().ok_or(RecvTimeoutError::Disconnected),
                        Some(deadline) => {
                            updates.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                        }
                    }
                }
                ready => ready,
            };
            match update {
                Ok(update) => {
                    printer.update(&update)?;
                    interrupted.note_progress();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }
}
