//! System calls as they are: by number, with descriptors as numbers, and what
//! they return, an error below zero.
//!
//! Not libc's functions, and neither allocation nor locks: whatever runs in a
//! worker may be a thread without storage of its own, or the copy of one among
//! many in the middle of anything.

use std::arch::asm;
use std::ffi::c_void;
use std::fs::OpenOptions;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::{from_mut, from_ref, null_mut};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};

use nix::libc;

use crate::control::Control;

/// Stacks for threads of a process, and their size.
const STACKS: usize = 8;
const STACK: usize = 512 << 10;

/// Where the stacks of this process are, and which are in use: the kernel takes
/// the mark away when the thread has ended (`CLONE_CHILD_CLEARTID`).
static STACKS_AT: AtomicUsize = AtomicUsize::new(0);
static IN_USE: [AtomicU32; STACKS] = [const { AtomicU32::new(0) }; STACKS];

/// A call, as the kernel takes it.
///
/// # Safety
/// As of the call itself.
#[cfg(target_arch = "x86_64")]
unsafe fn raw(number: libc::c_long, a: [usize; 6]) -> i64 {
    let ret: i64;
    // SAFETY: the kernel's convention: it changes rax, rcx and r11, and what
    // the call itself does is the caller's.
    unsafe {
        asm!("syscall", inlateout("rax") number => ret, in("rdi") a[0], in("rsi") a[1],
             in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    ret
}

/// A call, as the kernel takes it.
///
/// # Safety
/// As of the call itself.
#[cfg(target_arch = "aarch64")]
unsafe fn raw(number: libc::c_long, a: [usize; 6]) -> i64 {
    let ret: i64;
    // SAFETY: the kernel's convention: it changes x0, and what the call itself
    // does is the caller's.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a[0] => ret, in("x1") a[1],
             in("x2") a[2], in("x3") a[3], in("x4") a[4], in("x5") a[5], options(nostack));
    }
    ret
}

fn padded(args: &[usize]) -> [usize; 6] {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    all
}

/// A call whose arguments are numbers alone.
pub fn plain(number: libc::c_long, args: &[usize]) -> i64 {
    // SAFETY: no memory of ours is given. Descriptors are: this test owns none
    // by a type, which the module says.
    unsafe { raw(number, padded(args)) }
}

/// A call with a structure, whose address is the argument at `at`.
pub fn with<T>(number: libc::c_long, args: &[usize], at: usize, value: &mut T) -> i64 {
    let mut all = padded(args);
    all[at] = from_mut(value).addr();
    // SAFETY: the structure is the call's own type, borrowed for as long as the
    // call lasts; what it points to in turn, its maker keeps alive.
    unsafe { raw(number, all) }
}

/// A call with the address of a path of [`Control`], which is mapped for good.
pub fn with_path(number: libc::c_long, args: &[usize]) -> i64 {
    // SAFETY: the path ends with a zero and stays; the kernel only reads it.
    unsafe { raw(number, padded(args)) }
}

pub fn getpid() -> i32 {
    plain(libc::SYS_getpid, &[]) as i32
}

pub fn gettid() -> i32 {
    plain(libc::SYS_gettid, &[]) as i32
}

/// Whether a thread of a process is there.
pub fn is_alive(tgid: i32, tid: i32) -> bool {
    plain(libc::SYS_tgkill, &[tgid as usize, tid as usize, 0]) == 0
}

pub fn is_alive_process(tgid: i32) -> bool {
    plain(libc::SYS_kill, &[tgid as usize, 0]) == 0
}

pub fn exit_group(code: usize) -> ! {
    plain(libc::SYS_exit_group, &[code]);
    unreachable!()
}

/// Ends this thread alone, even if it is the first of its process.
pub fn exit_thread() -> ! {
    plain(libc::SYS_exit, &[0]);
    unreachable!()
}

pub fn close(fd: i64) -> i64 {
    plain(libc::SYS_close, &[fd as usize])
}

pub fn sleep_us(us: i64) {
    let mut time = [0, us * 1000];
    with(libc::SYS_nanosleep, &[], 0, &mut time);
}

/// Waits while the word has this value; for a second at most.
pub fn futex_wait(word: &AtomicU32, value: u32) {
    let mut second = [1i64, 0];
    let args = [
        from_ref(word).addr(),
        libc::FUTEX_WAIT as usize,
        value as usize,
        0,
    ];
    with(libc::SYS_futex, &args, 3, &mut second);
}

pub fn futex_wake(word: &AtomicU32) {
    let args = [
        from_ref(word).addr(),
        libc::FUTEX_WAKE as usize,
        i32::MAX as usize,
    ];
    plain(libc::SYS_futex, &args);
}

/// Maps what all share, so low that 32-bit calls can name its paths.
pub fn map(path: &Path) -> &'static Control {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    #[cfg(target_arch = "x86_64")]
    let low = libc::MAP_32BIT;
    #[cfg(not(target_arch = "x86_64"))]
    let low = 0;
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags = (libc::MAP_SHARED | low) as usize;
    let size = size_of::<Control>();
    let fd = file.as_raw_fd() as usize;
    let at = plain(libc::SYS_mmap, &[0, size, prot, flags, fd, 0]);
    assert!(at > 0, "mmap: {at}");
    // SAFETY: the file is as long as the structure, zeroes at first, which all
    // its atomics may be, and mapped until the process ends.
    unsafe { &*(at as *const Control) }
}

/// Has stacks for threads at hand.
pub fn make_stacks() {
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let size = STACKS * STACK;
    let at = plain(
        libc::SYS_mmap,
        &[0, size, prot, flags as usize, usize::MAX, 0],
    );
    assert!(at > 0, "mmap: {at}");
    STACKS_AT.store(at as usize, SeqCst);
}

fn take_stack() -> Option<usize> {
    let free = |s: &AtomicU32| s.compare_exchange(0, 1, SeqCst, SeqCst).is_ok();
    IN_USE.iter().position(free)
}

/// In a process that was just forked, all threads but this one are gone.
fn release_stacks_of_others() {
    let here = from_ref(&padded(&[])).addr();
    let base = STACKS_AT.load(SeqCst);
    for (index, used) in IN_USE.iter().enumerate() {
        let bottom = base + index * STACK;
        let own = (bottom..bottom + STACK).contains(&here);
        used.store(u32::from(own), SeqCst);
    }
}

/// Starts a thread, by `flags` more or less of one. It has no storage of its
/// own: none is used here.
pub fn thread(run: extern "C" fn(*mut c_void) -> i32, argument: usize, flags: i32) -> i64 {
    let Some(index) = take_stack() else {
        return i64::from(-libc::EAGAIN);
    };
    let top = STACKS_AT.load(SeqCst) + (index + 1) * STACK;
    let flags = flags
        | libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_CHILD_CLEARTID;
    let used = IN_USE[index].as_ptr();
    // SAFETY: nobody else has the stack until the kernel says so in `used`, and
    // the argument is a number.
    let tid = unsafe {
        let none = null_mut::<c_void>();
        libc::clone(
            run,
            top as *mut c_void,
            flags,
            argument as *mut c_void,
            none,
            none,
            used,
        )
    };
    if tid < 0 {
        IN_USE[index].store(0, SeqCst);
        return i64::from(-libc::EAGAIN);
    }
    i64::from(tid)
}

/// Runs `run` in a child that has this process's memory; returns when the child
/// has ended or made another program of itself.
pub fn vfork(run: extern "C" fn(*mut c_void) -> i32, argument: &mut [usize; 4]) -> i64 {
    let Some(index) = take_stack() else {
        return i64::from(-libc::EAGAIN);
    };
    let top = STACKS_AT.load(SeqCst) + (index + 1) * STACK;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let argument = from_mut(argument).cast::<c_void>();
    // SAFETY: nobody else has the stack, and both live on until this returns.
    let pid = unsafe { libc::clone(run, top as *mut c_void, flags, argument) };
    IN_USE[index].store(0, SeqCst);
    if pid < 0 {
        return i64::from(-libc::EAGAIN);
    }
    // Its end: children are not waited for by signal, so that this fails then.
    plain(
        libc::SYS_wait4,
        &[pid as usize, 0, libc::__WALL as usize, 0],
    );
    i64::from(pid)
}

/// The argument of [`vfork`]'s child.
pub fn vfork_argument(argument: *mut c_void) -> [usize; 4] {
    // SAFETY: it is the one of vfork(), which waits.
    unsafe { *argument.cast::<[usize; 4]>() }
}

/// A way to make a child.
#[derive(Debug, Clone, Copy)]
pub enum Fork {
    /// fork(2).
    Plain,
    /// clone3(2) with nothing shared.
    Clone3,
    /// clone(2) with the table shared.
    SharedTable,
}

/// Makes a child with memory of its own: 0 in the child.
pub fn fork(how: Fork) -> i64 {
    let sigchld = libc::SIGCHLD as usize;
    let pid = match how {
        #[cfg(target_arch = "x86_64")]
        Fork::Plain => plain(libc::SYS_fork, &[]),
        #[cfg(not(target_arch = "x86_64"))]
        Fork::Plain => plain(libc::SYS_clone, &[sigchld]),
        Fork::Clone3 => {
            // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, ...
            let mut args = [0, 0, 0, 0, sigchld as u64, 0, 0, 0];
            let size = size_of_val(&args);
            with(libc::SYS_clone3, &[0, size], 0, &mut args)
        }
        Fork::SharedTable => plain(libc::SYS_clone, &[libc::CLONE_FILES as usize | sigchld]),
    };
    if pid == 0 {
        release_stacks_of_others();
    }
    pid
}

/// Becomes another program; returns only where that failed.
pub fn exec(path: usize, variable: &[u8]) -> i64 {
    assert_eq!(variable.last(), Some(&0));
    let argv = [path, 0];
    let envp = [variable.as_ptr().addr(), 0];
    // SAFETY: both lists end with a null, their strings with a zero.
    unsafe {
        raw(
            libc::SYS_execve,
            padded(&[path, argv.as_ptr().addr(), envp.as_ptr().addr()]),
        )
    }
}

/// A call of 32-bit programs.
#[cfg(target_arch = "x86_64")]
pub fn compat(number: u32, args: [u32; 4]) -> i64 {
    let ret: u32;
    // SAFETY: the kernel's convention; addresses are of `Control`, mapped low.
    // rbx is LLVM's own, and older kernels clear r8 to r11.
    unsafe {
        asm!("xchg rbx, {b}", "int 0x80", "xchg rbx, {b}", b = inout(reg) u64::from(args[0]) => _,
             inlateout("eax") number => ret, in("ecx") args[1], in("edx") args[2],
             in("esi") args[3], in("edi") 0,
             lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _);
    }
    i64::from(ret as i32)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn compat(_: u32, _: [u32; 4]) -> i64 {
    i64::from(-libc::ENOSYS)
}

/// A message without anything; libc's has padding that cannot be named.
pub fn empty_message() -> libc::mmsghdr {
    // SAFETY: numbers and pointers, which may all be zero.
    unsafe { std::mem::zeroed() }
}

/// Has the kernel forget children that ended.
pub fn ignore_children() {
    // SAFETY: there is no handler to be run.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

extern "C" fn interrupted(_: i32) {}

/// Has calls end with EINTR in two seconds, once; or not any more.
pub fn interrupt(soon: bool) {
    let handler = libc::sigaction {
        sa_sigaction: interrupted as *const () as usize,
        sa_mask: nix::sys::signal::SigSet::empty().as_ref().to_owned(),
        sa_flags: 0,
        sa_restorer: None,
    };
    // SAFETY: the handler does nothing.
    unsafe { libc::sigaction(libc::SIGALRM, &raw const handler, null_mut()) };
    let mut time = [0, 0, if soon { 2i64 } else { 0 }, 0];
    with(libc::SYS_setitimer, &[0, 0, 0], 1, &mut time);
}

/// Reads or writes a word of an io_uring's memory.
pub fn word(base: usize, offset: u32) -> &'static AtomicU32 {
    // SAFETY: the ring is mapped while it is used, and has its words, which the
    // kernel also writes, where the kernel said.
    unsafe { &*((base + offset as usize) as *const AtomicU32) }
}

/// Writes an io_uring's one request.
pub fn write_request(base: usize, request: [u64; 8]) {
    // SAFETY: the ring's requests are mapped while it is used, 64 bytes each.
    unsafe { (base as *mut [u64; 8]).write_volatile(request) };
}

/// Reads the result of an io_uring's one request.
pub fn read_result(base: usize, offset: u32) -> i64 {
    // SAFETY: as above; struct io_uring_cqe is 16 bytes, `res` at 8.
    let result = unsafe { ((base + offset as usize + 8) as *const i32).read_volatile() };
    i64::from(result)
}

/// Runs before main(): a worker's process never gets there. What the test
/// harness does at its start would be in a worker's way: it has threads of its
/// own, and needs its standard output.
#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

extern "C" fn begin() {
    if let Ok(task) = std::env::var(crate::worker::TASK) {
        crate::worker::begin(&task);
    }
}
