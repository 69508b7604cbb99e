//! Which operations there are, and how often each is made.

use std::sync::atomic::Ordering::SeqCst;

use crate::control::Control;
use crate::random::Random;

macro_rules! kinds {
    ($($kind:ident $name:literal $weight:literal,)*) => {
        /// A kind of operation.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Kind { $($kind,)* }
        /// All of them, with their names and how often they are made.
        pub const ALL: &[(Kind, &str, u32)] = &[$((Kind::$kind, $name, $weight),)*];
    };
}

kinds! {
    Open "open" 60,
    Openat "openat" 60,
    Openat2 "openat2" 30,
    Creat "creat" 5,
    Handle "open_by_handle_at" 10,
    Path "path" 10,
    Folder "folder" 10,
    Other "other" 20,
    Dup "dup" 30,
    Dup2 "dup2" 40,
    Dup3 "dup3" 30,
    Fcntl "fcntl" 30,
    FcntlCloexec "fcntl_cloexec" 30,
    Close "close" 170,
    CloseBad "close_bad" 5,
    CloseRange "close_range" 20,
    CloseRangeCloexec "close_range_cloexec" 6,
    CloseRangeUnshare "close_range_unshare" 2,
    Fork "fork" 8,
    Clone3 "clone3" 6,
    CloneFiles "clone_files" 4,
    Vfork "vfork" 3,
    Spawn "spawn" 3,
    Unshare "unshare" 2,
    Exec "exec" 4,
    Thread "thread" 8,
    ThreadApart "thread_apart" 2,
    ThreadExit "thread_exit" 6,
    LeaderExit "leader_exit" 1,
    Exit "exit" 2,
    Scm "scm" 15,
    ScmShort "scm_short" 8,
    ScmMany "recvmmsg" 8,
    ScmSend "scm_send" 8,
    ScmReceive "scm_recv" 12,
    Getfd "pidfd_getfd" 15,
    UringOpen "io_uring_openat" 10,
    UringClose "io_uring_close" 10,
    Addfd "addfd" 2,
    AddfdSend "addfd_send" 2,
    CompatOpen "compat_open" 15,
    CompatDup "compat_dup" 15,
    CompatClose "compat_close" 30,
}

pub const KINDS: usize = ALL.len();

impl Kind {
    /// Whether it needs what a kernel may lack, or a mount may not give.
    pub fn is_optional(self) -> bool {
        matches!(self, Self::Handle | Self::UringOpen | Self::UringClose)
            || matches!(self, Self::CompatOpen | Self::CompatDup | Self::CompatClose)
    }

    pub fn is_compat(self) -> bool {
        matches!(self, Self::CompatOpen | Self::CompatDup | Self::CompatClose)
    }

    /// Whether this kernel has it at all: 32-bit calls kill where it has not.
    pub fn is_there(self) -> bool {
        !self.is_compat() || std::fs::exists("/proc/sys/abi/vsyscall32").unwrap_or(false)
    }

    /// By the weights of this run.
    pub fn choose(control: &Control, random: &mut Random) -> Self {
        let mut at = random.below(u64::from(control.total.load(SeqCst)));
        for (weight, (kind, ..)) in control.weights.iter().zip(ALL) {
            let weight = u64::from(weight.load(SeqCst));
            if at < weight {
                return *kind;
            }
            at -= weight;
        }
        unreachable!("the total is the sum of the weights")
    }
}
