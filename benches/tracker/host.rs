//! What the host pays: calls on files that are not tracked, and on one that is.

use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sched::sched_setaffinity;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use rustix::fs::{Mode as Permissions, OFlags};
use serde::Serialize;

use crate::tracked::{Rows, Tracked, tracing_programs, wait_for_silence};
use crate::{Bench, Outcome, pin_to_one_cpu};

/// How long one call is repeated in a round, and how often the clock is read.
const BATCH: Duration = Duration::from_millis(20);
const SLICES: u32 = 20;
/// After so long no further round begins: others may make each wait.
const LONGEST: Duration = Duration::from_secs(120);
/// How often a round is repeated where another program was loaded meanwhile.
const TRIES: usize = 5;

type Once = Box<dyn Fn()>;

/// A call that is measured.
struct Call {
    name: &'static str,
    /// CPU time of the thread, which others' work on the CPU does not change;
    /// where a daemon does the work, the time on the wall.
    clock: ClockId,
    /// Makes what is called: what it opens is open while it is measured.
    make: Box<dyn Fn() -> Outcome<Once>>,
}

impl Call {
    fn now(&self) -> Outcome<Duration> {
        Ok(clock_gettime(self.clock)?.into())
    }

    fn time(&self, once: &dyn Fn(), count: u32) -> Outcome<Duration> {
        let start = self.now()?;
        for _ in 0..count {
            once();
        }
        Ok(self.now()?.saturating_sub(start))
    }

    /// Nanoseconds for one call: the median over short slices.
    fn batch(&self) -> Outcome<f64> {
        let once = (self.make)()?;
        // It warms up, too.
        let mut count = 1;
        let slice = BATCH / SLICES;
        while self.time(&once, count)? < slice / 2 {
            count *= 2;
        }
        let mut slices = Vec::new();
        for _ in 0..SLICES {
            slices.push(self.time(&once, count)?.as_nanos() as f64 / f64::from(count));
        }
        Ok(Spread::of(slices).p50)
    }
}

/// A median and where half of the samples are.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    pub p25: f64,
    pub p50: f64,
    pub p75: f64,
}

impl Spread {
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let rank = |share: f64| {
            let index = (share * samples.len().saturating_sub(1) as f64).round() as usize;
            samples.get(index).copied().unwrap_or(f64::NAN)
        };
        Self {
            p25: rank(0.25),
            p50: rank(0.5),
            p75: rank(0.75),
        }
    }
}

/// The figures of one call in one mode.
#[derive(Debug, Serialize)]
pub struct CallFigures {
    pub call: &'static str,
    /// `None`: without `run`.
    pub mode: Option<String>,
    /// Rounds that there was time for.
    pub rounds: usize,
    pub ns: Spread,
    /// To the time without `run` in the same round.
    pub ratio: Spread,
}

fn calls(bench: &Bench) -> Outcome<Vec<Call>> {
    let put = |folder: &std::path::Path| -> Outcome<PathBuf> {
        let path = folder.join("file");
        fs::write(&path, vec![b'f'; 1 << 16])?;
        Ok(path)
    };
    let getppid = || {
        black_box(rustix::process::getppid());
    };
    let cpu = ClockId::CLOCK_THREAD_CPUTIME_ID;
    Ok(vec![
        Call {
            name: "getppid",
            clock: cpu,
            make: Box::new(move || Ok(Box::new(getppid))),
        },
        pread("pread 4 KiB", put(bench.memory.path())?),
        open_close("open+close, tmpfs", cpu, put(bench.memory.path())?)?,
        open_close("open+close, disk", cpu, put(bench.disk.path())?)?,
        open_close(
            "open+close, clip",
            ClockId::CLOCK_MONOTONIC,
            bench.clip.clone(),
        )?,
        // Of the kernel's pages. Last: from then on this process counts as tracked.
        pread("pread 4 KiB, clip", bench.clip.clone()),
    ])
}

fn pread(name: &'static str, path: PathBuf) -> Call {
    let make = move || -> Outcome<Once> {
        let file = File::open(&path)?;
        Ok(Box::new(move || {
            let mut block = [0; 4096];
            let read = file.read_at(&mut block, 8192);
            assert!(matches!(black_box(read), Ok(4096)));
            black_box(&block);
        }))
    };
    Call {
        name,
        clock: ClockId::CLOCK_THREAD_CPUTIME_ID,
        make: Box::new(make),
    }
}

/// The path is made ready for the call before, so that the calls alone count.
fn open_close(name: &'static str, clock: ClockId, path: PathBuf) -> Outcome<Call> {
    let path = std::ffi::CString::new(path.into_os_string().into_encoded_bytes())?;
    let path = std::rc::Rc::new(path);
    let once = move || {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path.as_c_str(), flags, Permissions::empty());
        assert!(black_box(opened).is_ok());
    };
    Ok(Call {
        name,
        clock,
        make: Box::new(move || Ok(Box::new(once.clone()))),
    })
}

/// Starts `run` in a mode; without a mode, nothing.
fn start_in(bench: &Bench, mode: Option<&str>) -> Outcome<Option<Tracked>> {
    wait_for_silence()?;
    let Some(mode) = mode else {
        return Ok(None);
    };
    match bench.program.start(mode, Rows::None, &[])? {
        Ok(tracked) => Ok(Some(tracked)),
        Err(message) => Err(message.into()),
    }
}

/// One round of one mode: every call's nanoseconds.
fn round(bench: &Bench, calls: &[Call], mode: Option<&str>) -> Outcome<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..TRIES {
        let tracked = start_in(bench, mode)?;
        let programs = tracing_programs();
        // This thread alone: `run` and rclone, its children, go where they like.
        let all = pin_to_one_cpu()?;
        times = calls.iter().map(Call::batch).collect::<Outcome<_>>()?;
        sched_setaffinity(Pid::from_raw(0), &all)?;
        let alone = tracing_programs() == programs;
        if let Some(tracked) = tracked {
            tracked.stop()?;
        }
        if alone {
            break;
        }
    }
    Ok(times)
}

/// Measures every call in every mode, in rounds that have all modes.
pub fn measure(bench: &Bench, rounds: usize) -> Outcome<Vec<CallFigures>> {
    let calls = calls(bench)?;
    let here = bench.modes.iter().filter(|mode| mode.not_here.is_none());
    let modes: Vec<Option<&str>> = std::iter::once(None)
        .chain(here.map(|mode| Some(mode.name.as_str())))
        .collect();
    // By mode, round, call.
    let mut times = vec![Vec::new(); modes.len()];
    let start = Instant::now();
    for number in 0..rounds {
        if number > 0 && start.elapsed() >= LONGEST {
            break;
        }
        // Each round begins with another mode: none is always the first.
        for offset in 0..modes.len() {
            let index = (number + offset) % modes.len();
            times[index].push(round(bench, &calls, modes[index])?);
        }
    }
    let mut figures = Vec::new();
    for (call, kind) in calls.iter().enumerate() {
        for (index, mode) in modes.iter().enumerate() {
            let of = |mode: usize| times[mode].iter().map(move |round| round[call]);
            figures.push(CallFigures {
                call: kind.name,
                mode: mode.map(str::to_owned),
                rounds: times[index].len(),
                ns: Spread::of(of(index).collect()),
                ratio: Spread::of(of(index).zip(of(0)).map(|(a, b)| a / b).collect()),
            });
        }
    }
    Ok(figures)
}
