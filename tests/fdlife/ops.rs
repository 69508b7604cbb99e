//! The calls that make, copy, pass and end descriptors.

use std::ffi::c_void;
use std::sync::atomic::Ordering::SeqCst;

use nix::libc;

use crate::calls::{self, Fork, close, plain, with, with_path};
use crate::control::{Control, PARKED, RUNNING, SLOTS, Slot};
use crate::kinds::Kind;
use crate::passing;
use crate::supervised;
use crate::uring;
use crate::worker::{Loop, Text, is_wide};

pub const CLIPS: usize = 8;
/// Opens at once, of a worker with many descriptors.
const BURST: u32 = 150;

/// Paths that [`Control`] holds behind those of clips, absolute and relative.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    Mount = 2 * CLIPS as isize,
    Nested,
    Scratch,
    Null,
    Missing,
    Link,
    Program,
    Short,
    Control,
}

impl Place {
    pub fn index(self) -> usize {
        self as usize
    }

    pub fn text(self, control: &Control) -> Text {
        let bytes = control.paths[self.index()]
            .iter()
            .map(|byte| byte.load(SeqCst));
        Text::of(bytes.take_while(|byte| *byte != 0))
    }
}

const AT_FDCWD: usize = libc::AT_FDCWD as usize;

impl Loop {
    /// A descriptor's number, below the limit, never one of the first three.
    pub fn number(&mut self) -> usize {
        let limit = self.limit();
        let end = match self.random.below(8) {
            0..=3 => 24,
            4 | 5 => 64.min(limit),
            _ => limit,
        };
        self.random.between(3, end) as usize
    }

    /// A descriptor, open more often than not.
    pub fn fd(&mut self) -> usize {
        for _ in 0..3 {
            let fd = self.number();
            if plain(libc::SYS_fcntl, &[fd, libc::F_GETFD as usize]) >= 0 {
                return fd;
            }
        }
        self.number()
    }

    pub fn path(&self, place: Place) -> usize {
        self.control.path(place.index())
    }

    pub fn clip(&mut self) -> usize {
        let clips = u64::from(self.control.clips.load(SeqCst));
        self.control.path(self.random.below(clips) as usize)
    }

    fn relative_clip(&mut self) -> usize {
        let clips = u64::from(self.control.clips.load(SeqCst));
        self.control.path(CLIPS + self.random.below(clips) as usize)
    }

    /// What to open: mostly a clip.
    fn target(&mut self) -> usize {
        match self.random.below(16) {
            0 => self.path(Place::Scratch),
            1 => self.path(Place::Null),
            2 => self.path(Place::Missing),
            3 => self.path(Place::Link),
            // Relative to the working folder, which is the mount.
            4 | 5 => self.relative_clip(),
            _ => self.clip(),
        }
    }

    /// Flags to open by; to write is refused on the mount.
    pub fn flags(&mut self) -> usize {
        let mode = match self.random.below(12) {
            0 => libc::O_RDWR,
            1 => libc::O_WRONLY,
            2 => libc::O_RDONLY | libc::O_NONBLOCK,
            _ => libc::O_RDONLY,
        };
        (mode | self.cloexec()) as usize
    }

    pub fn cloexec(&mut self) -> i32 {
        if self.random.one_in(2) {
            libc::O_CLOEXEC
        } else {
            0
        }
    }

    /// A folder of the mount, by a descriptor.
    fn folder(&mut self) -> i64 {
        let kind = if self.random.one_in(2) {
            libc::O_PATH
        } else {
            0
        };
        let path = self.path(Place::Mount);
        with_path(
            libc::SYS_openat,
            &[AT_FDCWD, path, (kind | libc::O_DIRECTORY) as usize],
        )
    }

    /// Opens a clip relative to a descriptor of the mount.
    fn open_below(&mut self, open: impl FnOnce(&mut Self, usize, usize) -> i64) -> i64 {
        let folder = self.folder();
        if folder < 0 {
            return folder;
        }
        let path = self.relative_clip();
        let ret = open(self, folder as usize, path);
        close(folder);
        ret
    }
}

/// Makes one operation and records it.
pub fn perform(own: &mut Loop, kind: Kind) {
    // Those that may not return are told before.
    let (args, ret) = match kind {
        Kind::Exec => {
            own.record(kind, [0, 0], 0);
            ([1, 0], own.exec())
        }
        Kind::ThreadExit if own.is_leader() => return,
        Kind::LeaderExit if !own.is_leader() => return,
        Kind::ThreadExit | Kind::LeaderExit => {
            own.record(kind, [0, 0], 0);
            own.leave();
            calls::exit_thread();
        }
        Kind::Exit => {
            own.record(kind, [0, 0], 0);
            own.leave();
            calls::exit_group(0);
        }
        _ => {
            // Many at once, where there may be many.
            if kind == Kind::Open && is_wide(own.worker) && own.random.one_in(8) {
                for _ in 0..BURST {
                    let (args, ret) = make(own, kind);
                    own.record(kind, args, ret);
                }
            }
            make(own, kind)
        }
    };
    own.record(kind, args, ret);
}

/// Its main arguments, and what it returned.
fn make(own: &mut Loop, kind: Kind) -> ([i64; 2], i64) {
    match kind {
        Kind::Open | Kind::Openat | Kind::Openat2 | Kind::Creat => open(own, kind),
        Kind::Handle => ([0, 0], open_by_handle(own)),
        Kind::Path => {
            let flags = libc::O_PATH | own.cloexec();
            (
                [0, 0],
                with_path(libc::SYS_openat, &[AT_FDCWD, own.clip(), flags as usize]),
            )
        }
        Kind::Folder => {
            let place = if own.random.one_in(2) {
                Place::Mount
            } else {
                Place::Nested
            };
            let path = own.path(place);
            let flags = libc::O_DIRECTORY | own.cloexec();
            (
                [0, 0],
                with_path(libc::SYS_openat, &[AT_FDCWD, path, flags as usize]),
            )
        }
        Kind::Other => ([0, 0], other(own)),
        Kind::Dup | Kind::Dup2 | Kind::Dup3 | Kind::Fcntl | Kind::FcntlCloexec => dup(own, kind),
        Kind::Close => {
            let fd = own.fd();
            ([fd as i64, 0], close(fd as i64))
        }
        Kind::CloseBad => {
            let fd = *own.random.of(&[-1, i64::from(u32::MAX), 5_000, 1 << 20]);
            // Its error is what is wanted.
            ([fd, 0], i64::from(close(fd) >= 0))
        }
        Kind::CloseRange => close_range(own, 0),
        Kind::CloseRangeCloexec => close_range(own, libc::CLOSE_RANGE_CLOEXEC),
        Kind::CloseRangeUnshare => close_range(own, libc::CLOSE_RANGE_UNSHARE),
        Kind::Fork => ([0, 0], own.fork(Fork::Plain).0),
        Kind::Clone3 => ([0, 0], own.fork(Fork::Clone3).0),
        Kind::CloneFiles => ([0, 0], own.fork(Fork::SharedTable).0),
        Kind::Vfork | Kind::Spawn => {
            let program = if kind == Kind::Spawn {
                own.path(Place::Short)
            } else {
                0
            };
            let mut argument = [own.clip(), own.fd(), own.number(), program];
            let shown = [argument[1] as i64, argument[2] as i64];
            (shown, calls::vfork(short_life, &mut argument))
        }
        Kind::Unshare => (
            [0, 0],
            plain(libc::SYS_unshare, &[libc::CLONE_FILES as usize]),
        ),
        Kind::Thread => {
            let life = own.life();
            ([0, 0], own.start_thread(libc::CLONE_FILES, life))
        }
        Kind::ThreadApart => {
            let life = own.life();
            ([0, 0], own.start_thread(0, life))
        }
        Kind::Scm => passing::within(own, false),
        Kind::ScmShort => passing::within(own, true),
        Kind::ScmMany => passing::many(own),
        Kind::ScmSend => passing::send(own),
        Kind::ScmReceive => passing::receive(own),
        Kind::Getfd => getfd(own),
        Kind::UringOpen => {
            let (path, flags, later) = (own.clip(), own.flags(), own.random.one_in(2));
            (
                [flags as i64, i64::from(later)],
                uring::open(path, flags, later),
            )
        }
        Kind::UringClose => {
            let (fd, later) = (own.fd(), own.random.one_in(2));
            ([fd as i64, i64::from(later)], uring::close(fd, later))
        }
        Kind::Addfd => supervised::given(own, false),
        Kind::AddfdSend => supervised::given(own, true),
        Kind::CompatOpen | Kind::CompatDup | Kind::CompatClose => compat(own, kind),
        Kind::Exec | Kind::ThreadExit | Kind::LeaderExit | Kind::Exit => {
            unreachable!("made by perform()")
        }
    }
}

fn open(own: &mut Loop, kind: Kind) -> ([i64; 2], i64) {
    let flags = own.flags();
    let (at, path) = (AT_FDCWD, own.target());
    let below = own.random.one_in(4);
    let openat = |_: &mut Loop, at, path| with_path(libc::SYS_openat, &[at, path, flags]);
    let ret = match kind {
        #[cfg(target_arch = "x86_64")]
        Kind::Open => with_path(libc::SYS_open, &[path, flags]),
        #[cfg(target_arch = "x86_64")]
        Kind::Creat => {
            let path = own.path(Place::Scratch);
            with_path(libc::SYS_creat, &[path, 0o600])
        }
        Kind::Openat2 => {
            // struct open_how: flags, mode, resolve.
            let openat2 = |own: &mut Loop, at: usize, path| {
                let beneath = at != AT_FDCWD && own.random.one_in(2);
                let resolve = if beneath { libc::RESOLVE_BENEATH } else { 0 };
                let mut how = [flags as u64, 0, resolve];
                let size = size_of_val(&how);
                with(libc::SYS_openat2, &[at, path, 0, size], 2, &mut how)
            };
            if below {
                own.open_below(openat2)
            } else {
                openat2(own, at, path)
            }
        }
        _ if below => own.open_below(openat),
        _ => openat(own, at, path),
    };
    ([flags as i64, 0], ret)
}

fn open_by_handle(own: &mut Loop) -> i64 {
    /// struct file_handle, with room.
    #[repr(C)]
    struct Handle {
        size: u32,
        kind: i32,
        bytes: [u8; 128],
    }
    let mut handle = Handle {
        size: 128,
        kind: 0,
        bytes: [0; 128],
    };
    let mut mount = 0i32;
    let mount = std::ptr::from_mut(&mut mount).addr();
    let path = own.clip();
    let ret = with(
        libc::SYS_name_to_handle_at,
        &[AT_FDCWD, path, 0, mount, 0],
        2,
        &mut handle,
    );
    if ret < 0 {
        return ret;
    }
    let folder = own.folder();
    let flags = own.flags();
    let ret = with(
        libc::SYS_open_by_handle_at,
        &[folder as usize, 0, flags],
        1,
        &mut handle,
    );
    close(folder);
    ret
}

/// Something that is no file of the mount.
fn other(own: &mut Loop) -> i64 {
    let mut two = [0i32; 2];
    let flags = own.cloexec() as usize;
    match own.random.below(4) {
        0 => with(libc::SYS_pipe2, &[0, flags], 0, &mut two),
        1 => {
            let kind = libc::SOCK_STREAM as usize | flags;
            with(
                libc::SYS_socketpair,
                &[libc::AF_UNIX as usize, kind, 0],
                3,
                &mut two,
            )
        }
        2 => with(
            libc::SYS_memfd_create,
            &[0, usize::from(flags != 0)],
            0,
            &mut { *b"fdlife\0" },
        ),
        _ => plain(libc::SYS_eventfd2, &[0, flags]),
    }
}

fn dup(own: &mut Loop, kind: Kind) -> ([i64; 2], i64) {
    let fd = own.fd();
    // Onto itself, onto any other, or onto what is not open.
    let to = match own.random.below(8) {
        0 => fd,
        1..=4 => own.fd(),
        _ => own.number(),
    };
    // As low as there is room, or as high.
    let least = if own.random.one_in(2) {
        3
    } else {
        own.number()
    };
    let ret = match kind {
        Kind::Dup => plain(libc::SYS_dup, &[fd]),
        #[cfg(target_arch = "x86_64")]
        Kind::Dup2 => plain(libc::SYS_dup2, &[fd, to]),
        Kind::Fcntl => plain(libc::SYS_fcntl, &[fd, libc::F_DUPFD as usize, least]),
        Kind::FcntlCloexec => plain(
            libc::SYS_fcntl,
            &[fd, libc::F_DUPFD_CLOEXEC as usize, least],
        ),
        _ => plain(libc::SYS_dup3, &[fd, to, own.cloexec() as usize]),
    };
    let second = if matches!(kind, Kind::Fcntl | Kind::FcntlCloexec) {
        least
    } else {
        to
    };
    ([fd as i64, second as i64], ret)
}

fn close_range(own: &mut Loop, flags: u32) -> ([i64; 2], i64) {
    let first = own.number();
    let last = match own.random.below(8) {
        0 => u32::MAX as usize,
        1 => own.limit() as usize,
        _ => first + own.random.below(8) as usize,
    };
    let ret = plain(libc::SYS_close_range, &[first, last, flags as usize]);
    ([first as i64, last as i64], ret)
}

/// What a child does that has its parent's memory and a table of its own.
extern "C" fn short_life(argument: *mut c_void) -> i32 {
    let [clip, fd, to, program] = calls::vfork_argument(argument);
    let opened = with_path(libc::SYS_openat, &[AT_FDCWD, clip, 0]);
    close(fd as i64);
    plain(libc::SYS_dup3, &[opened as usize, to, 0]);
    if program != 0 {
        calls::exec(program, b"NONE=\0");
    }
    0
}

/// Takes a descriptor from another process, of any worker.
fn getfd(own: &mut Loop) -> ([i64; 2], i64) {
    let control = own.control;
    let start = own.random.below(SLOTS as u64) as usize;
    let slots = control.slots[start..].iter().chain(&control.slots[..start]);
    let there = |slot: &&Slot| matches!(slot.state.load(SeqCst), RUNNING | PARKED);
    let mut pids = slots.filter(there).map(|slot| slot.tgid.load(SeqCst));
    let Some(pid) = pids.find(|pid| *pid != own.tgid) else {
        return ([0, 0], i64::from(-libc::ESRCH));
    };
    let fd = own.random.between(3, 24) as usize;
    ([i64::from(pid), fd as i64], take_from(pid, fd))
}

/// As by pidfd_getfd(2).
pub fn take_from(pid: i32, fd: usize) -> i64 {
    let pidfd = plain(libc::SYS_pidfd_open, &[pid as usize, 0]);
    if pidfd < 0 {
        return pidfd;
    }
    let ret = plain(libc::SYS_pidfd_getfd, &[pidfd as usize, fd, 0]);
    close(pidfd);
    ret
}

/// As a 32-bit program does: see arch/x86/entry/syscalls/syscall_32.tbl.
fn compat(own: &mut Loop, kind: Kind) -> ([i64; 2], i64) {
    let (fd, to) = (own.fd() as u32, own.number() as u32);
    let (path, flags) = (own.target() as u32, own.flags() as u32);
    let fd = [fd, to, 0, 0];
    let (args, ret) = match (kind, own.random.below(3)) {
        (Kind::CompatOpen, 0) => (fd, calls::compat(295, [AT_FDCWD as u32, path, flags, 0])),
        (Kind::CompatOpen, _) => (fd, calls::compat(5, [path, flags, 0, 0])),
        (Kind::CompatDup, 0) => (fd, calls::compat(41, fd)),
        (Kind::CompatDup, 1) => (fd, calls::compat(63, fd)),
        // fcntl64(2)
        (Kind::CompatDup, _) => (fd, calls::compat(221, [fd[0], libc::F_DUPFD as u32, to, 0])),
        _ => (fd, calls::compat(6, fd)),
    };
    ([i64::from(args[0]), i64::from(args[1])], ret)
}
