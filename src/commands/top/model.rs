//! What `top` shows, made of what was seen: pure.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmafx_bypass::mounts::Dev;
use vmafx_bypass::tracker::{Account, Accounts, ReadCost};

use crate::output::escape;

/// A clip, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClipId {
    pub dev: Dev,
    pub ino: u64,
}

/// A tracked descriptor.
#[derive(Debug, Clone)]
pub struct Fd {
    pub pid: u32,
    pub comm: String,
    pub clip: ClipId,
}

/// What is known of a clip beside its descriptors.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// `None`: it got lost.
    pub path: Option<PathBuf>,
    /// FUSE's size, bytes.
    pub size: Option<u64>,
    /// An estimate, as in `dump-map`; `None`: not known, or not estimated yet.
    pub cached: Option<u64>,
    /// Likewise; empty: not estimated yet.
    pub state: &'static str,
}

/// What was read: in all, and a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    pub total: ReadCost,
    /// `None` at the first look.
    pub rate: Option<Rate>,
}

/// What was read, a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rate {
    pub reads: f64,
    pub bytes: f64,
    /// Nanoseconds in reads, by all threads together.
    pub ns: f64,
}

impl Rate {
    fn of(counts: ReadCost, elapsed: Duration) -> Self {
        // Two looks are never at the same time; no division by zero if they were.
        let seconds = elapsed.as_secs_f64().max(1e-9);
        Self {
            reads: counts.reads as f64 / seconds,
            bytes: counts.bytes as f64 / seconds,
            ns: counts.ns as f64 / seconds,
        }
    }

    /// The share of the time that was spent in reads; over 1 by several threads.
    pub fn busy(self) -> f64 {
        self.ns / 1e9
    }
}

/// What `run` was seen to have.
#[derive(Debug)]
pub struct Sample {
    pub at: Instant,
    /// The pid of the `run` whose counters these are.
    pub owner: u32,
    pub fds: Vec<Fd>,
    /// `None`: it does not count.
    pub accounts: Option<Accounts>,
}

/// A clip's row.
#[derive(Debug, Clone)]
pub struct Clip {
    pub id: ClipId,
    /// To be filled in.
    pub facts: Facts,
    pub fds: u32,
    /// Who has it open, or read it since the last look; in order.
    pub pids: Vec<u32>,
    /// `None`: not counted.
    pub usage: Option<Usage>,
}

/// A process's row.
#[derive(Debug, Clone)]
pub struct Process {
    pub pid: u32,
    pub comm: String,
    pub fds: u32,
    pub clips: u32,
    pub usage: Option<Usage>,
}

/// All rows, by their keys, and what they sum up to.
#[derive(Debug, Clone, Default)]
pub struct Picture {
    pub clips: Vec<Clip>,
    pub processes: Vec<Process>,
    pub fds: usize,
    /// Of all reads on the watched mounts.
    pub usage: Option<Usage>,
    /// Accounts that had to make room for newer ones.
    pub forgotten: u64,
}

/// The counters of the look before, of which rates are made.
#[derive(Debug, Default)]
pub struct Meter(Option<Before>);

#[derive(Debug)]
struct Before {
    at: Instant,
    owner: u32,
    total: ReadCost,
    each: HashMap<AccountId, ReadCost>,
}

/// An account, and what came to it since the look before.
type Measured<'a> = (&'a Account, Option<ReadCost>);

impl Meter {
    /// Makes the rows of a sample; the next one's rates are from here.
    pub fn picture(&mut self, sample: &Sample) -> Picture {
        let before = self.0.take().filter(|b| b.owner == sample.owner);
        let Some(accounts) = &sample.accounts else {
            return rows(sample, None, None);
        };
        let elapsed = before
            .as_ref()
            .map(|b| sample.at.saturating_duration_since(b.at));
        let each = accounts.each.iter();
        let measured = each.map(|account| {
            let since = before.as_ref().map(|before| {
                let then = before.each.get(&AccountId::of(account));
                // Who was not counted before has read all of it since.
                since(account.cost, then.copied().unwrap_or_default())
            });
            (account, since)
        });
        let measured: Vec<Measured> = measured.collect();
        let mut picture = rows(sample, Some(&measured), elapsed);
        picture.forgotten = accounts.forgotten;
        picture.usage = Some(Usage {
            total: accounts.total,
            rate: before
                .zip(elapsed)
                .map(|(b, elapsed)| Rate::of(since(accounts.total, b.total), elapsed)),
        });
        let each = accounts.each.iter();
        self.0 = Some(Before {
            at: sample.at,
            owner: sample.owner,
            total: accounts.total,
            each: each.map(|a| (AccountId::of(a), a.cost)).collect(),
        });
        picture
    }
}

/// An account: after a remount a clip has another one.
#[derive(Debug, PartialEq, Eq, Hash)]
struct AccountId {
    pid: u32,
    mount: u32,
    ino: u64,
}

impl AccountId {
    fn of(account: &Account) -> Self {
        Self {
            pid: account.pid,
            mount: account.mount,
            ino: account.ino,
        }
    }
}

impl ClipId {
    /// That of an account.
    pub fn of(account: &Account) -> Self {
        Self {
            dev: account.dev,
            ino: account.ino,
        }
    }
}

/// What was counted since `before`: all, where counting has begun anew.
fn since(now: ReadCost, before: ReadCost) -> ReadCost {
    if now.reads < before.reads || now.bytes < before.bytes || now.ns < before.ns {
        return now;
    }
    ReadCost {
        reads: now.reads - before.reads,
        bytes: now.bytes - before.bytes,
        ns: now.ns - before.ns,
    }
}

fn add(to: &mut ReadCost, more: ReadCost) {
    to.reads = to.reads.saturating_add(more.reads);
    to.bytes = to.bytes.saturating_add(more.bytes);
    to.ns = to.ns.saturating_add(more.ns);
}

/// What gathers in a row.
#[derive(Default)]
struct Gathered {
    comm: String,
    fds: u32,
    total: ReadCost,
    since: ReadCost,
}

impl Gathered {
    fn add(&mut self, total: ReadCost, since: Option<ReadCost>) {
        add(&mut self.total, total);
        add(&mut self.since, since.unwrap_or_default());
    }

    fn usage(&self, elapsed: Option<Duration>) -> Usage {
        Usage {
            total: self.total,
            rate: elapsed.map(|elapsed| Rate::of(self.since, elapsed)),
        }
    }
}

/// Without `measured` nothing is counted; without `elapsed` there is no rate yet.
fn rows(sample: &Sample, measured: Option<&[Measured]>, elapsed: Option<Duration>) -> Picture {
    let mut clips: BTreeMap<ClipId, Gathered> = BTreeMap::new();
    let mut processes: BTreeMap<u32, Gathered> = BTreeMap::new();
    let mut pairs: Vec<(ClipId, u32)> = Vec::new();
    for fd in &sample.fds {
        clips.entry(fd.clip).or_default().fds += 1;
        let process = processes.entry(fd.pid).or_default();
        process.fds += 1;
        if process.comm.is_empty() {
            process.comm.clone_from(&fd.comm);
        }
        pairs.push((fd.clip, fd.pid));
    }
    for (account, since) in measured.unwrap_or_default() {
        let id = ClipId::of(account);
        // Closed, and read since the look before: shown once more.
        let active = since.is_some_and(|counts| counts.reads > 0);
        if active || clips.contains_key(&id) {
            let clip = clips.entry(id).or_default();
            clip.add(account.cost, *since);
        }
        if active || processes.contains_key(&account.pid) {
            let process = processes.entry(account.pid).or_default();
            process.add(account.cost, *since);
            if process.comm.is_empty() {
                process.comm = escape(&account.comm);
            }
        }
        if active {
            pairs.push((id, account.pid));
        }
    }
    pairs.sort_unstable();
    pairs.dedup();
    let mut count: HashMap<u32, u32> = HashMap::new();
    for (_, pid) in &pairs {
        *count.entry(*pid).or_default() += 1;
    }
    let usage = |gathered: &Gathered| measured.map(|_| gathered.usage(elapsed));
    // Both are in order.
    let mut pairs = pairs.into_iter().peekable();
    let clips = clips.into_iter().map(|(id, gathered)| {
        let mut pids = Vec::new();
        while let Some((_, pid)) = pairs.next_if(|(clip, _)| *clip == id) {
            pids.push(pid);
        }
        Clip {
            id,
            facts: Facts::default(),
            fds: gathered.fds,
            pids,
            usage: usage(&gathered),
        }
    });
    let clips = clips.collect();
    let processes = processes.into_iter().map(|(pid, gathered)| Process {
        pid,
        fds: gathered.fds,
        clips: count.get(&pid).copied().unwrap_or(0),
        usage: usage(&gathered),
        comm: gathered.comm,
    });
    Picture {
        clips,
        processes: processes.collect(),
        fds: sample.fds.len(),
        ..Picture::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clip(ino: u64) -> ClipId {
        let dev = Dev::new(0, 50);
        ClipId { dev, ino }
    }

    fn fd(pid: u32, ino: u64) -> Fd {
        Fd {
            pid,
            comm: format!("p{pid}"),
            clip: clip(ino),
        }
    }

    fn account(pid: u32, ino: u64, reads: u64, bytes: u64, ns: u64) -> Account {
        Account {
            pid,
            comm: format!("p{pid}").into(),
            dev: clip(ino).dev,
            mount: 1,
            ino,
            path: None,
            size: 0,
            cost: ReadCost { reads, bytes, ns },
        }
    }

    fn sample(start: Instant, ms: u64, fds: Vec<Fd>, each: Option<Vec<Account>>) -> Sample {
        let accounts = each.map(|each| Accounts {
            // As if others had read as much again, of clips that are not tracked.
            total: each.iter().fold(ReadCost::default(), |mut sum, account| {
                add(&mut sum, account.cost);
                add(&mut sum, account.cost);
                sum
            }),
            each,
            forgotten: 0,
        });
        Sample {
            at: start + Duration::from_millis(ms),
            owner: 1,
            fds,
            accounts,
        }
    }

    #[test]
    fn descriptors_become_rows_of_clips_and_of_processes() {
        let fds = vec![fd(7, 2), fd(5, 1), fd(7, 1), fd(7, 1)];
        let picture = Meter::default().picture(&sample(Instant::now(), 0, fds, None));
        let clips: Vec<_> = picture
            .clips
            .iter()
            .map(|c| (c.id.ino, c.fds, c.pids.clone()))
            .collect();
        assert_eq!(clips, [(1, 3, vec![5, 7]), (2, 1, vec![7])]);
        let processes: Vec<_> = picture
            .processes
            .iter()
            .map(|p| (p.pid, &*p.comm, p.fds, p.clips))
            .collect();
        assert_eq!(processes, [(5, "p5", 1, 1), (7, "p7", 3, 2)]);
        assert_eq!(picture.fds, 4);
        assert!(picture.usage.is_none() && picture.clips[0].usage.is_none());
    }

    #[test]
    fn rates_are_what_two_looks_differ_by() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        let accounts = vec![account(5, 1, 10, 1_000, 100), account(7, 1, 1, 1, 1)];
        let first = meter.picture(&sample(start, 0, vec![fd(5, 1)], Some(accounts)));
        let usage = first.clips[0].usage.unwrap();
        assert_eq!(usage.total.bytes, 1_001);
        assert_eq!(usage.rate, None, "nothing to compare with");

        let accounts = vec![
            account(5, 1, 30, 5_000, 1_000_000_100),
            account(7, 1, 1, 1, 1),
            // Not counted before; and it has closed the clip.
            account(9, 2, 4, 400, 40),
            // Counted anew, since this pid is another process's.
            account(5, 3, 2, 200, 20),
        ];
        let second = meter.picture(&sample(start, 2_000, vec![fd(5, 1)], Some(accounts)));
        let rate = |usage: Option<Usage>| usage.unwrap().rate.unwrap();
        let shown: Vec<_> = second
            .clips
            .iter()
            .map(|c| (c.id.ino, c.fds, c.pids.clone(), rate(c.usage).bytes))
            .collect();
        assert_eq!(
            shown,
            [
                (1, 1, vec![5], 2_000.0),
                (2, 0, vec![9], 200.0),
                (3, 0, vec![5], 100.0)
            ]
        );
        let first = rate(second.clips[0].usage);
        assert_eq!((first.reads, first.busy()), (10.0, 0.5));
        let pids: Vec<_> = second.processes.iter().map(|p| p.pid).collect();
        assert_eq!(
            pids,
            [5, 9],
            "who neither reads nor has a clip is not shown"
        );
        assert_eq!(rate(second.usage).bytes as u64, 4_600);
    }

    #[test]
    fn what_was_read_before_a_remount_is_not_read_again() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        let before = account(5, 1, 10, 1_000, 1_000);
        let after = |bytes| Account {
            mount: 2,
            ..account(5, 1, 1, bytes, bytes)
        };
        let look = |ms, each| sample(start, ms, vec![fd(5, 1)], Some(each));
        meter.picture(&look(0, vec![before.clone(), after(100)]));
        let picture = meter.picture(&look(1_000, vec![before, after(150)]));
        let usage = picture.clips[0].usage.unwrap();
        assert_eq!(usage.total.bytes, 1_150);
        assert_eq!(usage.rate.unwrap().bytes as u64, 50);
    }

    #[test]
    fn counters_that_begin_anew_are_no_negative_rates() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        let look = |ms, bytes| {
            let accounts = vec![account(5, 1, bytes, bytes, bytes)];
            sample(start, ms, vec![fd(5, 1)], Some(accounts))
        };
        meter.picture(&look(0, 1_000));
        let anew = meter.picture(&look(1_000, 10));
        assert_eq!(anew.usage.unwrap().rate.unwrap().bytes as u64, 20);
        // Another `run` counts from nothing, too, and nothing tells since when.
        let mut other = look(2_000, 5_000);
        other.owner = 2;
        assert_eq!(meter.picture(&other).usage.unwrap().rate, None);
        // As long as nothing is counted there is nothing to compare with.
        meter.picture(&sample(start, 3_000, vec![], None));
        let again = meter.picture(&look(4_000, 9_000));
        assert_eq!(again.usage.unwrap().rate, None);
    }
}
