//! Fails one system call of another process, by ptrace(2).

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::libc::{self, c_long, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;
use vmafx_bypass::rig::Rig;

use crate::common::clips::clip;
use crate::driver::Driver;
use crate::sites::Names;

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// With an error: the call is not made, but for close(2), which closes
    /// whatever it answers.
    Error(Errno),
    /// A read gives nothing.
    Nothing,
    /// A read gives half of what was asked for.
    Short,
}

/// Which call fails.
#[derive(Debug, Clone)]
pub struct Fault {
    /// The part of the work and the call, as [`Episode::calls`] has it.
    pub site: String,
    /// The how many-th of this name, from 1; 0: each.
    pub occurrence: usize,
    pub kind: Kind,
}

/// What came of one command.
#[derive(Debug)]
pub struct Episode {
    /// The calls in order.
    pub calls: Vec<String>,
    /// How many were failed.
    pub failed: usize,
    pub report: Value,
    /// What the driver has open afterwards.
    pub open: Vec<String>,
}

/// A driver whose calls are seen.
pub struct Traced {
    driver: Driver,
    memory: File,
    names: Names,
}

impl Traced {
    pub fn start(rig: &Rig) -> Self {
        let driver = Driver::start(&clip(rig), &rig.source().join("clip"));
        ptrace::seize(
            driver.thread,
            Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL,
        )
        .unwrap();
        ptrace::interrupt(driver.thread).unwrap();
        wait(driver.thread);
        ptrace::syscall(driver.thread, None).unwrap();
        Self {
            memory: File::open(format!("/proc/{}/mem", driver.pid())).unwrap(),
            names: Names::new(rig, driver.pid()),
            driver,
        }
    }

    /// Runs a command and fails a call of it.
    pub fn run(&mut self, command: &str, fault: Option<&Fault>) -> Episode {
        let mut seen = HashMap::<String, usize>::new();
        let mut phase = String::new();
        let mut after = After::Nothing;
        let mut episode = Episode {
            calls: Vec::new(),
            failed: 0,
            report: Value::Null,
            open: Vec::new(),
        };
        let thread = self.driver.thread;
        self.driver.send(command);
        loop {
            let signal = match wait(thread) {
                WaitStatus::PtraceSyscall(_) => None,
                WaitStatus::Stopped(_, signal) => Some(signal),
                WaitStatus::PtraceEvent(..) => None,
                ended => panic!("the driver ended in {command:?} with {fault:?}: {ended:?}"),
            };
            if signal.is_some() {
                ptrace::syscall(thread, signal).unwrap();
                continue;
            }
            match ptrace::syscall_info(thread).unwrap().op {
                libc::PTRACE_SYSCALL_INFO_ENTRY => {
                    let mut regs = ptrace::getregs(thread).unwrap();
                    if let Some(text) = self.said(&regs) {
                        if let Some(name) = text.strip_prefix('@') {
                            name.trim().clone_into(&mut phase);
                        } else if text.starts_with('{') {
                            after = After::Report;
                        }
                    } else if !phase.is_empty()
                        && let Some(call) = self.names.call(&regs, &self.memory)
                    {
                        let site = format!("{phase}: {call}");
                        let count = seen.entry(site.clone()).or_default();
                        *count += 1;
                        if let Some(fault) = fault
                            && fault.site == site
                            && [0, *count].contains(&fault.occurrence)
                        {
                            after = fault.kind.enter(thread, &mut regs);
                            episode.failed += 1;
                        }
                        episode.calls.push(site);
                    }
                }
                libc::PTRACE_SYSCALL_INFO_EXIT => {
                    match std::mem::replace(&mut after, After::Nothing) {
                        After::Nothing => {}
                        After::Report => {
                            episode.report = self.driver.report();
                            episode.open = self.open();
                            ptrace::syscall(thread, None).unwrap();
                            return episode;
                        }
                        After::Answer(errno) => {
                            let mut regs = ptrace::getregs(thread).unwrap();
                            regs.rax = -i64::from(errno as i32) as u64;
                            ptrace::setregs(thread, regs).unwrap();
                        }
                        After::Length(length) => {
                            let mut regs = ptrace::getregs(thread).unwrap();
                            regs.rdx = length;
                            ptrace::setregs(thread, regs).unwrap();
                        }
                    }
                }
                _ => {}
            }
            ptrace::syscall(thread, None).unwrap();
        }
    }

    /// What the call writes to standard output.
    fn said(&self, regs: &user_regs_struct) -> Option<String> {
        if regs.orig_rax as c_long != libc::SYS_write || regs.rdi != 1 {
            return None;
        }
        let mut bytes = vec![0; regs.rdx.min(64) as usize];
        self.memory.read_exact_at(&mut bytes, regs.rsi).unwrap();
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn open(&self) -> Vec<String> {
        let mut open: Vec<String> = fs::read_dir(format!("/proc/{}/fd", self.driver.pid()))
            .unwrap()
            .map(|entry| {
                self.names
                    .path(&fs::read_link(entry.unwrap().path()).unwrap())
            })
            .collect();
        open.sort();
        open
    }
}

impl Drop for Traced {
    /// A traced thread stays until its tracer has seen its end.
    fn drop(&mut self) {
        self.driver.kill();
        while let Ok(WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..)) =
            waitpid(self.driver.thread, Some(WaitPidFlag::__WALL))
        {}
    }
}

/// What is to be done when the call returns.
enum After {
    Nothing,
    /// It reported: this was all.
    Report,
    Answer(Errno),
    /// Give it back the length that it had asked for.
    Length(u64),
}

impl Kind {
    fn enter(self, thread: Pid, regs: &mut user_regs_struct) -> After {
        let asked = regs.rdx;
        let after = match self {
            Self::Error(errno) => {
                if regs.orig_rax as c_long != libc::SYS_close {
                    regs.orig_rax = u64::MAX;
                }
                After::Answer(errno)
            }
            Self::Nothing => {
                regs.rdx = 0;
                After::Length(asked)
            }
            Self::Short => {
                regs.rdx = asked.div_ceil(2);
                After::Length(asked)
            }
        };
        ptrace::setregs(thread, *regs).unwrap();
        after
    }
}

fn wait(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap()
}
