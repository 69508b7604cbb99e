//! Readers: threads that read clips past FUSE in every way, and judge each
//! read by FUSE. They run in processes of their own.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use vmafx_bypass::BypassFile;

use crate::fuse::{self, Way};
use crate::journal::now;
use crate::judge::{Subject, Verdict, View, judge};
use crate::mutate::seconds;
use crate::random::Random;
use crate::told::{Clip, Kind, Suspect, Tally, Task, Told};

/// How long FUSE may account for a read after it: these pauses in turn, ms.
const REPEATS_MS: [u64; 5] = [0, 50, 200, 500, 1_200];
/// How long FUSE may answer with errors before a read stays unjudged.
const ERRORS_LAST: Duration = Duration::from_secs(4);
/// On a read-only mount `Read` may return what it read ahead up to a second
/// ago; with the clock's grain, a little more.
const READ_AHEAD_AGE: Duration = Duration::from_millis(1_100);
/// Clips rest in turn, so that rclone closes them and writes their metadata.
const REST_MS: u64 = 1_500;
/// How long a clip is hot.
pub const HOT_MS: u64 = 1_800;
/// How long dozing clips doze, and wake.
const DOZE_MS: u64 = 8_500;
/// Findings of a read that are told.
const TOLD: usize = 8;

const KINDS: [Kind; 5] = [
    Kind::OpenClose,
    Kind::Held,
    Kind::Sequential,
    Kind::Shared,
    Kind::FromFd,
];

/// The clip of a group whose turn it is: changed and read, after it has been
/// left alone long enough to be closed, uploaded and clean again. Now and then
/// another one.
pub fn hot<'a>(group: &'a [Clip], random: &mut Random) -> &'a Clip {
    if random.one_in(6) {
        return random.of(group);
    }
    &group[(now() / 1_000_000 / HOT_MS) as usize % group.len()]
}

/// Where a file of this size is changed, and read, more than elsewhere just now.
pub fn hot_place(size: u64, random: &mut Random) -> u64 {
    let place = Random::new(now() / 1_000_000 / HOT_MS + 1).below(size.max(1));
    place.saturating_sub(random.below(256)) + random.below(256)
}

/// Reads until it is to stop.
pub fn run(task: &Task, stop: &AtomicBool, told: &Sender<Told>) {
    let total = Mutex::new(Tally::default());
    thread::scope(|scope| {
        for thread in 0..task.threads {
            let (total, told) = (&total, told.clone());
            scope.spawn(move || {
                let seed = task.seed ^ (thread << 32);
                let mut reader = Reader {
                    task,
                    thread,
                    stop,
                    random: Random::new(seed),
                    seed,
                    told,
                    tally: Tally::default(),
                };
                while !reader.stopped() {
                    reader.session();
                }
                total.lock().unwrap().add(reader.tally);
            });
        }
    });
    let tally = total.into_inner().unwrap();
    // The other side has gone only where the test has failed already.
    let _ = told.send(Told::Done(Box::new(tally)));
}

struct Reader<'a> {
    task: &'a Task,
    thread: u64,
    stop: &'a AtomicBool,
    random: Random,
    seed: u64,
    told: Sender<Told>,
    tally: Tally,
}

/// What FUSE said before.
#[derive(Default)]
struct Before {
    /// How it was asked.
    way: String,
    /// What it says of the range.
    view: Option<View>,
    /// Of a file that changes as a whole: the version that it has elsewhere,
    /// and the size and time that it had shown before that.
    floor: u32,
    shown: Option<(u64, u64)>,
}

/// A bypassed read, and when.
struct Taken {
    view: View,
    cache_bytes: u64,
    time: [u64; 2],
}

/// What a session reads: a clip, in one way.
struct Session<'a> {
    clip: &'a Clip,
    path: PathBuf,
    kind: Kind,
    /// A plain descriptor, opened when the bypassed file was.
    held: Option<File>,
}

impl Reader<'_> {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn doing(&self, what: String) {
        let _ = self.told.send(Told::Doing(self.thread, what));
    }

    /// Opens a clip, reads it for a while in one way, and closes it.
    fn session(&mut self) {
        let task = self.task;
        let ms = now() / 1_000_000;
        let rests = |clip: &Clip| {
            let turn = (u64::from(clip.file) + ms / REST_MS).is_multiple_of(3);
            turn || clip.dozes && (ms / DOZE_MS).is_multiple_of(2)
        };
        let quiet = |clip: &Clip| !task.groups.iter().flatten().any(|c| c.file == clip.file);
        let only_quiet = !self.random.one_in(6);
        let readable = |clip: &&Clip| !rests(clip) && (quiet(clip) || !only_quiet);
        let mut awake: Vec<&Clip> = task.clips.iter().filter(readable).collect();
        if awake.is_empty() {
            awake.extend(&task.clips);
        }
        let clip = if !task.groups.is_empty() && !self.random.one_in(4) {
            // The last group is what is written through the mount, if it can be.
            let last = task.groups.len() - 1;
            let group = match self.random.below(3) {
                0 => self.random.of(&task.groups),
                _ => &task.groups[last],
            };
            hot(group, &mut self.random)
        } else {
            *self.random.of(&awake)
        };
        let kind = *self.random.of(&KINDS);
        let path = task.folder.join(&clip.name);
        self.doing(format!("opening {} for {kind:?}", clip.name));
        // In turn before and after, where another file may come to the path.
        let early = self.random.one_in(2);
        let mut held = early.then(|| File::open(&path).ok()).flatten();
        let opened = match kind {
            Kind::FromFd => File::open(&path).and_then(|file| BypassFile::from_fd(file.into())),
            _ => BypassFile::open(&path),
        };
        let mut file = match opened {
            Ok(file) => file,
            Err(e) => {
                self.error("open", &e);
                thread::sleep(Duration::from_millis(20));
                return;
            }
        };
        if held.is_none() {
            held = File::open(&path).ok();
        }
        self.tally.opens += 1;
        if let Some(refusal) = file.refusal() {
            let reason = refusal.reason.name().to_owned();
            *self.tally.refused_opens.entry(reason).or_default() += 1;
        }
        let session = Session {
            clip,
            path,
            kind,
            held,
        };
        let (rounds, lasts) = match kind {
            Kind::OpenClose | Kind::FromFd => (self.random.between(1, 3), 0),
            // Each further round waits for what was read ahead to be too old.
            Kind::Sequential if !task.writable => (1 + u64::from(self.random.one_in(4)), 0),
            Kind::Sequential | Kind::Shared => (self.random.between(1, 4), 0),
            Kind::Held => (2, self.random.between(200, 4_000)),
        };
        let opened = Instant::now();
        let mut round = 0;
        while !self.stopped() && (round < rounds || opened.elapsed() < Duration::from_millis(lasts))
        {
            self.round(&session, &mut file);
            round += 1;
        }
        self.doing(format!("closing {}", session.clip.name));
        let stats = file.stats();
        for (reason, bytes) in stats.by_reason {
            let sum = &mut self.tally.fuse_bytes_by_reason;
            *sum.entry(reason.name().to_owned()).or_default() += bytes;
        }
        self.tally.cache_bytes += stats.cache_bytes;
        let kind = format!("{kind:?}");
        *self.tally.cache_bytes_by_kind.entry(kind).or_default() += stats.cache_bytes;
        let name = session.clip.name.clone();
        *self.tally.cache_bytes_by_clip.entry(name).or_default() += stats.cache_bytes;
    }

    fn error(&mut self, call: &str, error: &io::Error) {
        let name = error.raw_os_error().map_or(error.to_string(), |n| {
            format!("{:?}", nix::errno::Errno::from_raw(n))
        });
        *self
            .tally
            .errors
            .entry(format!("{call} {name}"))
            .or_default() += 1;
    }

    /// FUSE, reads past it, FUSE; and the judgement.
    fn round(&mut self, session: &Session, file: &mut BypassFile) {
        let (offset, length) = self.region(file);
        let what = format!(
            "{} {:?} at {offset} +{length}",
            session.clip.name, session.kind
        );
        self.doing(format!("fuse before: {what}"));
        let start = now();
        let before = self.before(session, file, offset, length);
        // Often at once; sometimes later than any look that is kept.
        if self.random.one_in(12) {
            thread::sleep(Duration::from_millis(self.random.below(1_300)));
        }
        self.doing(format!("bypass: {what}"));
        let mut taken = Vec::new();
        if session.kind == Kind::Sequential {
            if !self.task.writable && file.stream_position().unwrap() > 0 {
                thread::sleep(READ_AHEAD_AGE);
            }
            self.sequential(file, offset, length, &mut taken);
        } else if session.kind == Kind::Shared {
            self.shared(file, offset, length, &mut taken);
        } else {
            for _ in 0..self.random.between(1, 6) {
                let (offset, length) = self.part(offset, length);
                match take(file, offset, length) {
                    Ok(one) => taken.push(one),
                    Err(e) => self.error("read", &e),
                }
                if self.random.one_in(12) {
                    thread::sleep(Duration::from_millis(self.random.below(300)));
                }
            }
        }
        self.doing(format!("fuse after: {what}"));
        let after = patiently(|| fuse::read(&session.path, Way::Direct, offset, length));
        let state = file
            .refusal()
            .map_or("active".into(), |refusal| refusal.to_string());
        for one in taken {
            self.tally.reads += 1;
            self.tally.bytes += one.view.bytes.len() as u64;
            self.judge(session, &before, one, after.as_ref(), |suspect| {
                suspect.before = start;
                suspect.state.clone_from(&state);
            });
        }
    }

    /// A range: of any size, anywhere, and sometimes over the end.
    fn region(&mut self, file: &BypassFile) -> (u64, usize) {
        let size = file.size().unwrap_or(1 << 20).max(1);
        let length = match self.random.below(4) {
            // A whole cell at least: less cannot name its version.
            0 => self.random.between(2 * crate::cells::CELL as u64, 100),
            1 => self.random.between(100, 8_192),
            2 => 4_096 << self.random.below(6),
            _ => self.random.between(8_192, 400_000),
        };
        let offset = match self.random.below(8) {
            0..=3 => hot_place(size, &mut self.random).saturating_sub(self.random.below(length)),
            4 => size.saturating_sub(self.random.below(2 * length)),
            5 => self.random.below(size) & !4_095,
            _ => self.random.below(size),
        };
        (offset, length as usize)
    }

    /// A part of a range, often all of it.
    fn part(&mut self, offset: u64, length: usize) -> (u64, usize) {
        if self.random.one_in(2) {
            return (offset, length);
        }
        let skip = self.random.below(length as u64);
        let part = self.random.between(1, length as u64 - skip + 1);
        (offset + skip, part as usize)
    }

    fn before(
        &mut self,
        session: &Session,
        file: &BypassFile,
        offset: u64,
        length: usize,
    ) -> Before {
        // What programs store in shared mappings shows in the page cache first.
        if self.task.writable
            && !self.random.one_in(3)
            && let Some(held) = &session.held
        {
            return Before {
                way: "held".into(),
                view: fuse::read_from(held, offset, length).ok(),
                ..Before::default()
            };
        }
        let way = *self.random.of(&[Way::Direct, Way::Fresh]);
        // Files that change as a whole: a byte elsewhere tells the version, and
        // rclone need not have fetched the range when it is read past FUSE.
        if !self.task.writable && self.random.one_in(2) {
            let place = self.random.below(file.size().unwrap_or(1).max(1));
            let shown = std::fs::metadata(&session.path).ok();
            let shown = shown.and_then(|m| Some((m.len(), seconds(m.modified().ok()?))));
            let view = fuse::read(&session.path, way, place, 1).ok();
            let floor = view.and_then(|view| view.newest()).unwrap_or(0);
            return Before {
                way: format!("{way:?} at {place}, version {floor}, size and time {shown:?}"),
                view: None,
                floor,
                shown,
            };
        }
        Before {
            way: format!("{way:?}"),
            view: fuse::read(&session.path, way, offset, length).ok(),
            ..Before::default()
        }
    }

    /// Small reads in a row, by position.
    fn sequential(
        &mut self,
        file: &mut BypassFile,
        offset: u64,
        length: usize,
        taken: &mut Vec<Taken>,
    ) {
        file.seek(SeekFrom::Start(offset)).unwrap();
        let mut at = offset;
        while at < offset + length as u64 {
            let left = (offset + length as u64 - at) as usize;
            let size = (self.random.between(1, 20_000) as usize).min(left);
            let mut bytes = vec![0; size];
            let cache = file.stats().cache_bytes;
            let begin = now();
            match file.read(&mut bytes) {
                Ok(n) => {
                    bytes.truncate(n);
                    taken.push(Taken {
                        // A short read says nothing, an empty one that it ended.
                        view: View {
                            offset: at,
                            asked: if n == 0 { size } else { n },
                            bytes,
                        },
                        cache_bytes: file.stats().cache_bytes - cache,
                        time: [begin, now()],
                    });
                    if n == 0 {
                        break;
                    }
                    at += n as u64;
                }
                Err(e) => {
                    self.error("read", &e);
                    break;
                }
            }
            if self.random.one_in(30) {
                thread::sleep(Duration::from_millis(self.random.below(100)));
            }
        }
    }

    /// Three threads on one file.
    fn shared(&mut self, file: &BypassFile, offset: u64, length: usize, taken: &mut Vec<Taken>) {
        let parts: Vec<_> = (0..12).map(|_| self.part(offset, length)).collect();
        let results = thread::scope(|scope| {
            let threads: Vec<_> = parts
                .chunks(4)
                .map(|parts| {
                    scope.spawn(move || {
                        let read = |&(offset, length): &(u64, usize)| take(file, offset, length);
                        parts.iter().map(read).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect::<Vec<_>>()
        });
        for result in results {
            match result {
                Ok(one) => taken.push(one),
                Err(e) => self.error("read", &e),
            }
        }
    }

    fn judge(
        &mut self,
        session: &Session,
        before: &Before,
        one: Taken,
        after: Option<&View>,
        complete: impl FnOnce(&mut Suspect),
    ) {
        let subject = Subject {
            file: session.clip.file,
            floor: before.floor,
        };
        let seen = before.view.as_ref();
        let verdict = judge(subject, seen, &one.view, after);
        let Verdict::Wrong(mut wrong) = verdict else {
            self.tally.right += 1;
            return;
        };
        if before.view.is_none() && before.floor == 0 && after.is_none() {
            self.tally.unjudged += 1;
            return;
        }
        self.doing(format!("judging {}", session.clip.name));
        let accounts = |later: io::Result<View>| {
            later.is_ok_and(|l| judge(subject, seen, &one.view, Some(&l)) == Verdict::Right)
        };
        let (offset, length) = (one.view.offset, one.view.asked);
        for pause in REPEATS_MS {
            thread::sleep(Duration::from_millis(pause));
            let held = session.held.as_ref();
            if accounts(fuse::read(&session.path, Way::Direct, offset, length))
                || held.is_some_and(|h| accounts(fuse::read_from(h, offset, length)))
                || held.is_some_and(|h| accounts(fuse::read_again(h, offset, length)))
            {
                self.tally.right_later += 1;
                return;
            }
        }
        if one.cache_bytes == 0 {
            self.tally.fuse_alone += 1;
            return;
        }
        self.tally.suspects += 1;
        let mut suspect = Suspect {
            clip: session.clip.name.clone(),
            kind: Some(session.kind),
            seed: self.seed,
            offset,
            asked: length,
            read_bytes: one.view.bytes.len(),
            cache_bytes: one.cache_bytes,
            read: one.time,
            way: before.way.clone(),
            floor: before.floor,
            shown: before.shown,
            more_wrong: wrong.len().saturating_sub(TOLD),
            ..Suspect::default()
        };
        wrong.truncate(TOLD);
        suspect.wrong = wrong;
        complete(&mut suspect);
        let _ = self.told.send(Told::Suspect(Box::new(suspect)));
    }
}

/// A read past FUSE. Where an error cut it short, it asks for less.
fn take(file: &BypassFile, offset: u64, length: usize) -> io::Result<Taken> {
    let mut bytes = vec![0; length];
    let cache = file.stats().cache_bytes;
    let begin = now();
    let n = file.read_at(&mut bytes, offset)?;
    let time = [begin, now()];
    let cache_bytes = file.stats().cache_bytes - cache;
    bytes.truncate(n);
    let ended = n < length && matches!(file.read_at(&mut [0], offset + n as u64), Ok(0));
    Ok(Taken {
        view: View {
            offset,
            asked: if ended { length } else { n },
            bytes,
        },
        cache_bytes,
        time,
    })
}

/// Asks FUSE until it answers: a daemon that was killed comes back.
fn patiently(mut ask: impl FnMut() -> io::Result<View>) -> Option<View> {
    let until = Instant::now() + ERRORS_LAST;
    loop {
        match ask() {
            Ok(view) => return Some(view),
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(30)),
            Err(_) => return None,
        }
    }
}
