//! The filter that sends opens to the supervisor: classic BPF, as data.
//!
//! It runs before every system call of the command, so it decides all that can
//! be decided by registers; what it lets pass costs a few nanoseconds. The
//! kernel even skips it for calls that it allows whatever their arguments are.

use nix::libc::{self, c_long, sock_filter};

/// Flags of an open that may be answered with another descriptor: reading, and
/// what changes nothing of what is read. O_LARGEFILE by the kernel's number,
/// which libc gives as 0 on 64-bit hosts.
pub(super) const MAY_SUBSTITUTE: u32 =
    (libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NOCTTY | libc::O_NONBLOCK) as u32
        | KERNEL_O_LARGEFILE;

#[cfg(target_arch = "aarch64")]
const KERNEL_O_LARGEFILE: u32 = 0o400_000;
#[cfg(not(target_arch = "aarch64"))]
const KERNEL_O_LARGEFILE: u32 = 0o100_000;

/// landlock_restrict_self(2): the same number on every architecture, 32-bit ones
/// included.
const SYS_LANDLOCK_RESTRICT_SELF: c_long = 446;
/// Set in the numbers of x32.
const X32: c_long = 0x4000_0000;

/// Whether a notified call is landlock_restrict_self, by whatever interface.
pub(super) fn restricts_itself(nr: c_long) -> bool {
    nr & !X32 == SYS_LANDLOCK_RESTRICT_SELF
}

/// Calls after which a process may see other files below the same paths than
/// the supervisor does. They are rare, and only told of.
pub(super) const CHANGES_THE_VIEW: [c_long; 6] = [
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_setns,
];

/// AUDIT_ARCH_… of the kernel's linux/audit.h: the machine, 64 bits, little endian.
#[cfg(target_arch = "x86_64")]
const ARCH: Option<u32> = Some(0xc000_003e);
#[cfg(target_arch = "aarch64")]
const ARCH: Option<u32> = Some(0xc000_00b7);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCH: Option<u32> = None;

// Offsets in struct seccomp_data; of an argument its low half.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const fn offset_of_argument(index: u32) -> u32 {
    16 + 8 * index
}

/// Where a jump goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    Next,
    FlagsSecond,
    FlagsThird,
    Foreign,
    Check,
    Notify,
    Allow,
}

/// An instruction, or a place to jump to.
enum Step {
    Place(To),
    Load(u32),
    /// Condition, its operand, and where to go if it holds and if not.
    If(u32, u32, To, To),
    Return(u32),
}

/// The filter; `None` on machines that it is not written for.
pub(super) fn program() -> Option<Vec<sock_filter>> {
    let arch = ARCH?;
    let is = |nr: c_long, to| Step::If(libc::BPF_JEQ, nr as u32, to, To::Next);
    let mut steps = vec![
        // 32-bit calls have other numbers.
        Step::Load(OFFSET_ARCH),
        Step::If(libc::BPF_JEQ, arch, To::Next, To::Foreign),
        Step::Load(OFFSET_NR),
    ];
    #[cfg(target_arch = "x86_64")]
    {
        // And so have those of x32, which set this bit.
        steps.push(Step::If(libc::BPF_JGE, X32 as u32, To::Foreign, To::Next));
        steps.push(is(libc::SYS_open, To::FlagsSecond));
    }
    steps.push(is(libc::SYS_openat, To::FlagsThird));
    // Its flags are in memory.
    steps.push(is(libc::SYS_openat2, To::Notify));
    steps.push(is(SYS_LANDLOCK_RESTRICT_SELF, To::Notify));
    steps.extend(CHANGES_THE_VIEW.map(|nr| is(nr, To::Notify)));
    let unwanted = !MAY_SUBSTITUTE;
    steps.extend([
        Step::Return(libc::SECCOMP_RET_ALLOW),
        // What restricts itself by such a call may then open by ours, or start
        // who does.
        Step::Place(To::Foreign),
        Step::Load(OFFSET_NR),
        is(SYS_LANDLOCK_RESTRICT_SELF, To::Notify),
        is(X32 | SYS_LANDLOCK_RESTRICT_SELF, To::Notify),
        Step::Return(libc::SECCOMP_RET_ALLOW),
        Step::Place(To::FlagsSecond),
        Step::Load(offset_of_argument(1)),
        Step::If(libc::BPF_JA, 0, To::Check, To::Check),
        Step::Place(To::FlagsThird),
        Step::Load(offset_of_argument(2)),
        Step::Place(To::Check),
        // O_RDONLY is 0: any bit of another mode is among the unwanted ones.
        Step::If(libc::BPF_JSET, unwanted, To::Allow, To::Notify),
        Step::Place(To::Notify),
        Step::Return(libc::SECCOMP_RET_USER_NOTIF),
        Step::Place(To::Allow),
        Step::Return(libc::SECCOMP_RET_ALLOW),
    ]);
    Some(assemble(&steps))
}

/// Turns places into distances.
fn assemble(steps: &[Step]) -> Vec<sock_filter> {
    let mut index = 0;
    let mut places = Vec::new();
    for step in steps {
        match step {
            Step::Place(to) => places.push((*to, index)),
            _ => index += 1,
        }
    }
    let instruction = |code: u32, jt: u8, jf: u8, k: u32| sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut out = Vec::with_capacity(index);
    for step in steps {
        // Backward and missing places do not occur: a test runs the program.
        let distance = |to: To| {
            let place = places.iter().find(|(name, _)| *name == to);
            place.map_or(0, |(_, at)| at.saturating_sub(out.len() + 1)) as u8
        };
        let next = match *step {
            Step::Place(_) => continue,
            Step::Load(offset) => {
                instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
            }
            Step::If(libc::BPF_JA, _, to, _) => {
                instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, distance(to).into())
            }
            Step::If(condition, operand, yes, no) => instruction(
                libc::BPF_JMP | condition | libc::BPF_K,
                distance(yes),
                distance(no),
                operand,
            ),
            Step::Return(value) => instruction(libc::BPF_RET | libc::BPF_K, 0, 0, value),
        };
        out.push(next);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::c_int;

    /// Runs the program as the kernel does.
    fn verdict(arch: u32, nr: u32, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(nr.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend([0; 8]);
        data.extend(arguments.iter().flat_map(|a| a.to_le_bytes()));
        let program = program().unwrap();
        let (mut pc, mut a) = (0, 0);
        loop {
            let i = program[pc];
            pc += 1;
            let code = u32::from(i.code);
            let mut jump = |taken: bool| pc += usize::from(if taken { i.jt } else { i.jf });
            if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS {
                let at = i.k as usize;
                a = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
            } else if code == libc::BPF_RET | libc::BPF_K {
                return i.k;
            } else if code == libc::BPF_JMP | libc::BPF_JA {
                pc += i.k as usize;
            } else if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K {
                jump(a == i.k);
            } else if code == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K {
                jump(a >= i.k);
            } else if code == libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K {
                jump(a & i.k != 0);
            } else {
                panic!("instruction {code:#x}");
            }
        }
    }

    fn notifies(nr: c_long, arguments: [u64; 6]) -> bool {
        match verdict(ARCH.unwrap(), nr as u32, arguments) {
            libc::SECCOMP_RET_USER_NOTIF => true,
            libc::SECCOMP_RET_ALLOW => false,
            other => panic!("{other:#x}"),
        }
    }

    fn openat(flags: c_int) -> bool {
        notifies(libc::SYS_openat, [0, 0, u64::from(flags as u32), 0, 0, 0])
    }

    #[test]
    fn plain_reads_are_told_of_and_nothing_else() {
        for flags in [
            libc::O_RDONLY,
            libc::O_CLOEXEC,
            libc::O_NOFOLLOW | libc::O_NOCTTY,
            libc::O_NONBLOCK,
            KERNEL_O_LARGEFILE as c_int,
        ] {
            assert!(openat(flags), "{flags:#o}");
        }
        for flags in [
            libc::O_WRONLY,
            libc::O_RDWR,
            libc::O_ACCMODE,
            libc::O_CREAT,
            libc::O_TRUNC,
            libc::O_PATH | libc::O_CLOEXEC,
            libc::O_DIRECTORY,
            libc::O_TMPFILE,
            libc::O_DIRECT,
            libc::O_NOATIME,
            libc::O_APPEND,
            libc::O_SYNC,
        ] {
            assert!(!openat(flags), "{flags:#o}");
        }
        // The kernel takes an int.
        assert!(notifies(libc::SYS_openat, [0, 0, 1 << 40, 0, 0, 0]));
    }

    #[test]
    fn calls_are_told_apart_by_number_and_machine() {
        let none = [0; 6];
        #[cfg(target_arch = "x86_64")]
        {
            assert!(notifies(libc::SYS_open, none));
            assert!(!notifies(libc::SYS_open, [0, 1, 0, 0, 0, 0]));
            // The third argument of open is a mode.
            assert!(notifies(libc::SYS_open, [0, 0, 0o101, 0, 0, 0]));
            let x32 = 0x4000_0000 | libc::SYS_openat as u32;
            assert_eq!(verdict(ARCH.unwrap(), x32, none), libc::SECCOMP_RET_ALLOW);
            assert!(notifies(X32 | SYS_LANDLOCK_RESTRICT_SELF, none));
            assert!(restricts_itself(X32 | SYS_LANDLOCK_RESTRICT_SELF));
        }
        assert!(notifies(libc::SYS_openat2, [0; 6]));
        assert!(notifies(SYS_LANDLOCK_RESTRICT_SELF, none));
        for nr in CHANGES_THE_VIEW {
            assert!(notifies(nr, none), "{nr}");
        }
        for nr in [
            libc::SYS_read,
            libc::SYS_close,
            libc::SYS_execve,
            libc::SYS_clone3,
            libc::SYS_open_by_handle_at,
            libc::SYS_io_uring_enter,
        ] {
            assert!(!notifies(nr, none), "{nr}");
        }
        let i386 = |nr: c_long| verdict(0x4000_0003, nr as u32, none);
        assert_eq!(i386(libc::SYS_openat), libc::SECCOMP_RET_ALLOW);
        assert_eq!(i386(libc::SYS_openat2), libc::SECCOMP_RET_ALLOW);
        assert_eq!(
            i386(SYS_LANDLOCK_RESTRICT_SELF),
            libc::SECCOMP_RET_USER_NOTIF
        );
        assert!(restricts_itself(SYS_LANDLOCK_RESTRICT_SELF));
        assert!(!restricts_itself(libc::SYS_openat));
    }
}
