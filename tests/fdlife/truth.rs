//! The descriptors of all workers: as /proc tells them, and as `dump-map` does.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::libc;
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
use serde_json::Value;

use crate::calls::plain;
use crate::common::fds;

/// linux/kcmp.h
const KCMP_FILES: usize = 2;
/// linux/sched.h: a thread of io_uring's, which works for its process's threads.
const PF_IO_WORKER: u64 = 0x10;

/// A file that a descriptor is of: its path, inode and access mode.
pub type File = (PathBuf, u64, i32);
/// Descriptors of the mount, by process, or thread with a table of its own, and
/// by number.
pub type Table = BTreeMap<(u32, u32), File>;

/// A process without its first thread, whose table is nobody's now: one of those
/// that are left, or none, counts as the process's, beside being that of threads that
/// count by themselves.
pub struct Headless {
    pid: u32,
    tables: Vec<Shared>,
}

/// A table, and the threads that have it.
struct Shared {
    tids: Vec<u32>,
    files: Vec<(u32, File)>,
}

#[derive(Default)]
pub struct Truth {
    table: Table,
    headless: Vec<Headless>,
}

/// What of /proc/PID/stat counts here.
struct Stat {
    exited: bool,
    session: i32,
    flags: u64,
}

fn stat(folder: &Path) -> Option<Stat> {
    let text = fs::read_to_string(folder.join("stat")).ok()?;
    let mut fields = text.rsplit(") ").next()?.split(' ');
    let exited = matches!(fields.next()?, "Z" | "X");
    let session = fields.nth(2)?.parse().ok()?;
    let flags = fields.nth(2)?.parse().ok()?;
    Some(Stat {
        exited,
        session,
        flags,
    })
}

fn numbers(folder: &Path) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn same_table(a: u32, b: u32) -> bool {
    plain(libc::SYS_kcmp, &[a as usize, b as usize, KCMP_FILES, 0, 0]) == 0
}

/// The processes of sessions.
pub fn family(sessions: &[i32]) -> Vec<u32> {
    let of_ours = |pid: &u32| {
        let stat = stat(&PathBuf::from(format!("/proc/{pid}")));
        stat.is_some_and(|stat| sessions.contains(&stat.session))
    };
    numbers(Path::new("/proc")).filter(of_ours).collect()
}

/// Reads tables, of processes that are all at rest.
pub struct Reader {
    device: (u32, u32),
}

impl Reader {
    pub fn new(mount: &Path) -> Self {
        let it = statx(CWD, mount, AtFlags::empty(), StatxFlags::BASIC_STATS).unwrap();
        Self {
            device: (it.stx_dev_major, it.stx_dev_minor),
        }
    }

    pub fn truth(&self, sessions: &[i32]) -> Truth {
        let mut truth = Truth::default();
        for pid in family(sessions) {
            self.add(pid, &mut truth);
        }
        truth
    }

    fn add(&self, pid: u32, truth: &mut Truth) {
        let tasks = PathBuf::from(format!("/proc/{pid}/task"));
        let there = |tid: &u32| {
            let stat = stat(&tasks.join(tid.to_string()));
            stat.is_some_and(|stat| !stat.exited && stat.flags & PF_IO_WORKER == 0)
        };
        let mut tables: Vec<Shared> = Vec::new();
        // The first thread is the first.
        for tid in numbers(&tasks).filter(there) {
            if let Some(known) = tables
                .iter_mut()
                .find(|table| same_table(table.tids[0], tid))
            {
                known.tids.push(tid);
            } else {
                let files = self.files(&tasks.join(tid.to_string()).join("fd"));
                tables.push(Shared {
                    tids: vec![tid],
                    files,
                });
            }
        }
        if !tables.iter().any(|table| table.tids.contains(&pid)) {
            truth.headless.push(Headless { pid, tables });
            return;
        }
        let own = tables.iter().position(|table| table.tids.contains(&pid));
        truth.table.extend(entries(pid, &tables, own, &[]));
    }

    /// The mount's regular files that a table has open for reading or writing.
    fn files(&self, folder: &Path) -> Vec<(u32, File)> {
        let file = |fd: u32| {
            let link = folder.join(fd.to_string());
            let path = fs::read_link(&link)
                .ok()
                .filter(|path| path.is_absolute())?;
            let flags = AtFlags::STATX_DONT_SYNC;
            let it = statx(CWD, &link, flags, StatxFlags::BASIC_STATS).ok()?;
            let device = (it.stx_dev_major, it.stx_dev_minor);
            let kind = FileType::from_raw_mode(it.stx_mode.into());
            if device != self.device || kind != FileType::RegularFile {
                return None;
            }
            // The link's own permissions tell how the file is open.
            let mode = fs::symlink_metadata(&link).ok()?.permissions().mode();
            let access = match (mode & 0o400 != 0, mode & 0o200 != 0) {
                (true, true) => libc::O_RDWR,
                (true, false) => libc::O_RDONLY,
                (false, true) => libc::O_WRONLY,
                (false, false) => return None,
            };
            Some((fd, (path, it.stx_ino, access)))
        };
        numbers(folder).filter_map(file).collect()
    }
}

/// The entries of a process that has the table `own`, the threads that have
/// others by themselves, and those that have the former and count by themselves.
fn entries(pid: u32, tables: &[Shared], own: Option<usize>, apart: &[u32]) -> Table {
    let mut all = Table::new();
    for (index, table) in tables.iter().enumerate() {
        let is_own = own == Some(index);
        let tids = table.tids.iter().copied();
        let tids = tids.filter(|tid| !is_own || apart.contains(tid));
        for id in tids.chain(is_own.then_some(pid)) {
            let files = table.files.iter().cloned();
            all.extend(files.map(|(fd, file)| ((id, fd), file)));
        }
    }
    all
}

/// What `dump-map` has.
pub fn dumped(dump: &Value) -> Table {
    let entry = |entry: &Value| {
        let number = |name: &str| entry[name].as_u64().unwrap();
        let access = number("flags") as i32 & libc::O_ACCMODE;
        let key = (number("pid") as u32, number("fd") as u32);
        (key, (fds::path(entry), number("ino"), access))
    };
    let entries = dump["entries"].as_array().unwrap();
    let table: Table = entries.iter().map(entry).collect();
    assert_eq!(table.len(), entries.len(), "each descriptor has one entry");
    table
}

/// A difference: whose, and what either side has.
pub type Difference = ((u32, u32), Option<File>, Option<File>);

impl Truth {
    pub fn descriptors(&self) -> usize {
        let headless = self.headless.iter().flat_map(|process| &process.tables);
        self.table.len() + headless.map(|table| table.files.len()).sum::<usize>()
    }

    /// What differs from a dump: of /proc, and of the dump.
    pub fn differences(&self, dump: &Table) -> Vec<Difference> {
        let mut table = self.table.clone();
        for Headless { pid, tables } in &self.headless {
            let tids = tables.iter().flat_map(|table| &table.tids);
            let ids: Vec<u32> = tids.chain([pid]).copied().collect();
            let ours: Table = dump
                .iter()
                .filter(|((id, _), _)| ids.contains(id))
                .map(|(key, file)| (*key, file.clone()))
                .collect();
            // Threads that had it while the first one had another count by themselves
            // for good; one that nobody had asked about until then does not.
            let named: Vec<u32> = ours.keys().map(|(id, _)| *id).collect();
            let owns = (0..tables.len()).map(Some).chain([None]);
            let ways = owns.map(|own| entries(*pid, tables, own, &named));
            let apart = |way: &Table| {
                let theirs = way.iter().filter(|(key, file)| ours.get(key) != Some(file));
                let too_many = ours.keys().filter(|key| !way.contains_key(key));
                theirs.count() + too_many.count()
            };
            table.extend(ways.min_by_key(apart).expect("none is one"));
        }
        let keys = table
            .keys()
            .chain(dump.keys().filter(|key| !table.contains_key(key)));
        keys.filter(|key| table.get(key) != dump.get(key))
            .map(|key| (*key, table.get(key).cloned(), dump.get(key).cloned()))
            .collect()
    }
}

/// Whose number it is, now.
fn whose(pid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    match status.lines().find_map(|line| line.strip_prefix("Tgid:\t")) {
        Some(tgid) if tgid == pid.to_string() => String::new(),
        Some(tgid) => format!(", a thread of {tgid}"),
        None => ", which is gone".into(),
    }
}

/// How many differ of each, and the first of all.
pub fn describe(differences: &[Difference], most: usize) -> String {
    let mut text = String::new();
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for ((pid, _), ..) in differences {
        *counts.entry(*pid).or_default() += 1;
    }
    for (pid, count) in counts {
        let _ = writeln!(text, "  pid {pid}{}: {count}", whose(pid));
    }
    let shown = |file: &Option<File>| match file {
        Some((path, ino, access)) => format!("{} inode {ino} access {access}", path.display()),
        None => "nothing".into(),
    };
    for ((pid, fd), truth, dump) in differences.iter().take(most) {
        let (truth, dump) = (shown(truth), shown(dump));
        let _ = writeln!(
            text,
            "  pid {pid} fd {fd}: /proc has {truth}, dump-map {dump}"
        );
    }
    text
}
