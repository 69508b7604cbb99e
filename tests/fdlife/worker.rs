//! A worker: processes with threads that make calls, until they are stopped.

use std::ffi::c_void;
use std::fmt::Write;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;

use nix::libc;

use crate::calls::{self, Fork};
use crate::control::{Control, FREE, RESERVED};
use crate::kinds::Kind;
use crate::ops::{self, Place};
use crate::random::Random;

/// The variable by which a process knows that it is a worker's.
pub const TASK: &str = "FDLIFE_TASK";
/// Loops of one worker at once.
const MOST: usize = 20;
/// The same for one with many descriptors.
const MOST_WIDE: usize = 6;
/// How many descriptors a process may have.
const DESCRIPTORS: u64 = 200;
const DESCRIPTORS_WIDE: u64 = 3_000;
/// How many more the loader may have, to start a program.
const ROOM: u64 = 50;
/// Calls that a loop makes, unless it is a worker's first ones.
const LIFE: u64 = 300;
const FOR_GOOD: u64 = u64::MAX;

static CONTROL: OnceLock<&'static Control> = OnceLock::new();

/// What a process is started with.
pub struct Task<'a> {
    pub control: &'a Path,
    pub slot: usize,
    pub worker: u32,
    pub seed: u64,
    /// Threads to start with, this one included; 0: it is not the first, but has
    /// become this program again.
    pub threads: u32,
    pub life: u64,
}

impl Task<'_> {
    /// Writes it as a variable's value.
    pub fn write(&self, to: &mut impl Write) -> std::fmt::Result {
        let Self {
            slot,
            worker,
            seed,
            threads,
            life,
            ..
        } = self;
        let path = self.control.to_str().ok_or(std::fmt::Error)?;
        write!(to, "{slot} {worker} {seed} {threads} {life} {path}")
    }

    fn read(text: &str) -> Option<Task<'_>> {
        let mut fields = text.splitn(6, ' ');
        Some(Task {
            slot: fields.next()?.parse().ok()?,
            worker: fields.next()?.parse().ok()?,
            seed: fields.next()?.parse().ok()?,
            threads: fields.next()?.parse().ok()?,
            life: fields.next()?.parse().ok()?,
            control: Path::new(fields.next()?),
        })
    }
}

/// A loop: what it is at any moment.
pub struct Loop {
    pub control: &'static Control,
    pub slot: usize,
    pub worker: u32,
    pub tgid: i32,
    pub tid: i32,
    pub random: Random,
    life: u64,
}

/// Whether a worker has one process with many descriptors.
pub fn is_wide(worker: u32) -> bool {
    worker % 4 == 3
}

/// As a worker's process, from its start to its end.
pub fn begin(task: &str) -> ! {
    let task = Task::read(task).expect("a task");
    let control = calls::map(task.control);
    CONTROL.get_or_init(|| control);
    calls::make_stacks();
    if task.threads > 0 {
        be_first();
    }
    set_limit(descriptors(task.worker));
    let mut own = Loop::new(control, task.slot, task.worker, task.seed, task.life);
    if task.threads == 0 {
        control.abandon(own.tgid);
    }
    for _ in 1..task.threads {
        own.start_thread(libc::CLONE_FILES, FOR_GOOD);
    }
    own.run()
}

fn descriptors(worker: u32) -> u64 {
    if is_wide(worker) {
        DESCRIPTORS_WIDE
    } else {
        DESCRIPTORS
    }
}

/// Limits descriptors.
fn set_limit(most: u64) {
    // struct rlimit: soft and hard.
    let mut limit = [most, DESCRIPTORS_WIDE + ROOM];
    calls::with(
        libc::SYS_setrlimit,
        &[libc::RLIMIT_NOFILE as usize],
        1,
        &mut limit,
    );
}

/// A session of its own, by which the harness finds all that comes of it.
fn be_first() {
    calls::plain(libc::SYS_setsid, &[]);
    // Nobody waits for children.
    calls::ignore_children();
    calls::plain(libc::SYS_close_range, &[3, usize::MAX, 0]);
}

extern "C" fn run_thread(slot: *mut c_void) -> i32 {
    let control = CONTROL.get().copied().expect("a process has begun");
    let slot = slot.addr();
    let shared = &control.slots[slot];
    let seed = shared.seed.load(SeqCst);
    Loop::new(
        control,
        slot,
        shared.worker.load(SeqCst),
        seed,
        shared.life.load(SeqCst),
    )
    .run()
}

impl Loop {
    fn new(control: &'static Control, slot: usize, worker: u32, seed: u64, life: u64) -> Self {
        let (tgid, tid) = (calls::getpid(), calls::gettid());
        if !control.claim(slot, tgid, tid) {
            calls::exit_thread();
        }
        Self {
            control,
            slot,
            worker,
            tgid,
            tid,
            random: Random::new(seed),
            life,
        }
    }

    fn run(&mut self) -> ! {
        while self.life > 0 {
            self.control.park_here(self.slot);
            if self.control.stop.load(SeqCst) != 0 {
                break;
            }
            if self.life != FOR_GOOD {
                self.life -= 1;
            }
            let kind = Kind::choose(self.control, &mut self.random);
            ops::perform(self, kind);
        }
        self.leave();
        if self.is_leader() {
            calls::exit_group(0);
        }
        calls::exit_thread();
    }

    /// No more is to be expected of it.
    pub fn leave(&self) {
        self.control.slots[self.slot].state.store(FREE, SeqCst);
    }

    pub fn is_leader(&self) -> bool {
        self.tid == self.tgid
    }

    pub fn record(&self, kind: Kind, args: [i64; 2], ret: i64) {
        self.control
            .record(self.worker, self.tgid, self.tid, kind as usize, args, ret);
    }

    /// Descriptors are below this.
    pub fn limit(&self) -> u64 {
        descriptors(self.worker)
    }

    fn reserve(&mut self, life: u64) -> Option<usize> {
        let most = if is_wide(self.worker) {
            MOST_WIDE
        } else {
            MOST
        };
        let slot = self
            .control
            .reserve(self.worker, most, self.tgid, self.tid)?;
        let shared = &self.control.slots[slot];
        shared.seed.store(self.random.next(), SeqCst);
        shared.life.store(life, SeqCst);
        Some(slot)
    }

    fn give_back(&self, slot: usize) {
        let state = &self.control.slots[slot].state;
        // It may be reclaimed by now.
        let _ = state.compare_exchange(RESERVED, FREE, SeqCst, SeqCst);
    }

    pub fn start_thread(&mut self, flags: i32, life: u64) -> i64 {
        let Some(slot) = self.reserve(life) else {
            return i64::from(-libc::EAGAIN);
        };
        let ret = calls::thread(run_thread, slot, flags);
        if ret < 0 {
            self.give_back(slot);
        }
        ret
    }

    pub fn life(&mut self) -> u64 {
        self.random.between(1, LIFE)
    }

    /// Forks: in the child, this becomes the child's loop. The child's slot.
    pub fn fork(&mut self, how: Fork) -> (i64, usize) {
        let life = self.life();
        let Some(slot) = self.reserve(life) else {
            return (i64::from(-libc::EAGAIN), 0);
        };
        let ret = calls::fork(how);
        if ret == 0 {
            let seed = self.control.slots[slot].seed.load(SeqCst);
            *self = Self::new(self.control, slot, self.worker, seed, life);
        } else if ret < 0 {
            self.give_back(slot);
        }
        (ret, slot)
    }

    /// Becomes this program again; returns only where that failed.
    pub fn exec(&mut self) -> i64 {
        let mut text = Text {
            bytes: [0; 1024],
            length: 0,
        };
        let life = if self.life == FOR_GOOD {
            FOR_GOOD
        } else {
            self.life + 1
        };
        let control = Place::Control.text(self.control);
        let task = Task {
            control: Path::new(control.as_str()),
            slot: self.slot,
            worker: self.worker,
            seed: self.random.next(),
            threads: 0,
            life,
        };
        let written = write!(text, "{TASK}=").and_then(|()| task.write(&mut text));
        if written.is_err() {
            return i64::from(-libc::E2BIG);
        }
        let slot = &self.control.slots[self.slot];
        // Then it is the only thread of its process.
        slot.tid.store(self.tgid, SeqCst);
        set_limit(self.limit() + ROOM);
        let ret = calls::exec(
            self.control.path(Place::Program.index()),
            &text.bytes[..=text.length],
        );
        set_limit(self.limit());
        slot.tid.store(self.tid, SeqCst);
        ret
    }
}

/// Text without an allocation; a zero follows it.
pub struct Text {
    bytes: [u8; 1024],
    length: usize,
}

impl Text {
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.length]).unwrap_or_default()
    }

    pub fn of(bytes: impl Iterator<Item = u8>) -> Self {
        let mut text = Self {
            bytes: [0; 1024],
            length: 0,
        };
        for byte in bytes.take(1023) {
            text.bytes[text.length] = byte;
            text.length += 1;
        }
        text
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.length + text.len();
        if end >= self.bytes.len() {
            return Err(std::fmt::Error);
        }
        self.bytes[self.length..end].copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}
