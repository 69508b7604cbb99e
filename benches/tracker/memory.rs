//! Memory, and what `dump-map` takes, by the number of tracked descriptors.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::host::Spread;
use crate::tracked::{Rows, Tracked, lost, wait_for_silence};
use crate::worker::{Worker, most_held};
use crate::{Bench, Outcome};

const COUNTS: [usize; 3] = [0, 1_000, 100_000];
/// Enough for all of them; what the table below calls "with room".
const ROOM: &str = "--max-fds=131072";
const DUMPS: usize = 7;
/// How long the last events may take to arrive.
const PATIENCE: Duration = Duration::from_secs(20);

/// What `run` takes while it tracks so many descriptors.
#[derive(Debug, Serialize)]
pub struct MemoryFigures {
    pub mode: String,
    pub arguments: Vec<&'static str>,
    pub tracked: usize,
    /// VmRSS, bytes, and its parts.
    pub rss: u64,
    pub anonymous: u64,
    pub files: u64,
    pub shared: u64,
    /// The most that it ever was.
    pub peak: u64,
    /// Of each map, bytes, in the kernel.
    pub maps: BTreeMap<String, u64>,
    /// `dump-map`, milliseconds.
    pub dump_json_ms: Spread,
    pub dump_table_ms: Spread,
    pub lost: BTreeMap<String, u64>,
}

fn look(
    tracked: &Tracked,
    mode: &str,
    arguments: &[&'static str],
    count: usize,
) -> Outcome<MemoryFigures> {
    let deadline = Instant::now() + PATIENCE;
    let dump = loop {
        let dump = tracked.dump_json()?;
        let entries = dump["entries"].as_array().map_or(0, Vec::len);
        if entries == count || Instant::now() >= deadline {
            break dump;
        }
        sleep(Duration::from_millis(100));
    };
    if dump["complete"] != true {
        return Err(format!("a dump of {count} is not complete: {:?}", lost(&dump)).into());
    }
    let time = |format: &str| -> Outcome<Spread> {
        let mut samples = Vec::new();
        for _ in 0..DUMPS {
            let start = Instant::now();
            tracked.dump(format)?;
            samples.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(Spread::of(samples))
    };
    Ok(MemoryFigures {
        mode: mode.to_owned(),
        arguments: arguments.to_vec(),
        tracked: count,
        rss: tracked.status("VmRSS")?,
        anonymous: tracked.status("RssAnon")?,
        files: tracked.status("RssFile")?,
        shared: tracked.status("RssShmem")?,
        peak: tracked.status("VmHWM")?,
        maps: tracked.maps()?,
        dump_json_ms: time("json")?,
        dump_table_ms: time("table")?,
        lost: lost(&dump),
    })
}

/// Lets workers hold so many descriptors together, each as many as it can.
fn hold(holders: &mut Vec<Worker>, clip: &str, count: usize) -> Outcome<()> {
    let most = most_held()?;
    for index in 0..count.div_ceil(most) {
        if index == holders.len() {
            holders.push(Worker::start(&["hold", clip])?);
        }
        holders[index].tell(most.min(count - index * most))?;
        holders[index].answer()?;
    }
    Ok(())
}

/// By mode: idle with the defaults, then with room for all, from none on.
pub fn measure(bench: &Bench) -> Outcome<Vec<MemoryFigures>> {
    let clip = bench.clip.to_string_lossy();
    let mut figures = Vec::new();
    for mode in bench.modes.iter().filter(|mode| mode.not_here.is_none()) {
        wait_for_silence()?;
        let idle = bench.program.start(&mode.name, Rows::None, &[])??;
        figures.push(look(&idle, &mode.name, &[], 0)?);
        idle.stop()?;
        wait_for_silence()?;
        let tracked = bench.program.start(&mode.name, Rows::None, &[ROOM])??;
        let mut holders = Vec::new();
        for count in COUNTS {
            hold(&mut holders, &clip, count)?;
            figures.push(look(&tracked, &mode.name, &[ROOM], count)?);
        }
        drop(holders);
        tracked.stop()?;
    }
    Ok(figures)
}
