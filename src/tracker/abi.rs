//! The ABI shared with the BPF programs: the generated skeleton, and bytes to
//! values and back. The only user of `plain`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use libbpf_rs::{MapCore, MapFlags, MapHandle, ProgramInput, ProgramMut};
use plain::Plain;

use super::{Loss, Losses};
use crate::mounts::Dev;

#[allow(
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    missing_docs,
    unsafe_op_in_unsafe_fn,
    dead_code
)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/rclone_bypass.skel.rs"));
}

pub(super) use skeleton::types::{vb_account, vb_account_key, vb_fd, vb_fd_key, vb_meta, vb_reads};
use skeleton::types::{vb_event, vb_path, vb_path_key, vb_proc, vb_reconcile, vb_stats};
pub(super) use skeleton::{OpenRcloneBypassSkel, RcloneBypassSkel, RcloneBypassSkelBuilder};

/// `VB_ABI_VERSION`.
pub(super) const VERSION: u32 = 4;
/// `VB_DEV_SLOTS`.
const DEV_SLOTS: u32 = 4096;
/// `enum vb_event_kind`.
const EVENT_OPEN: u8 = 1;
const EVENT_DUP: u8 = 2;
const EVENT_CLOSE: u8 = 3;
const EVENT_EXIT: u8 = 4;
const EVENT_INHERIT: u8 = 5;
const EVENT_RECEIVE: u8 = 6;
const EVENT_ADOPT: u8 = 7;
const EVENT_MARK: u8 = 8;
/// `VB_MARK_FORKED` and so on.
const MARK_FOUND: u32 = 1;
const MARK_FORKED: u32 = 2;
const MARK_URING: u32 = 8;
/// `VB_MARK_ALL`.
pub(super) const MARK_ALL: u32 = 0;
/// `VB_PROC_SHARED`.
const PROC_SHARED: u64 = 2;
/// `VB_SYNC_RESEND` and `VB_SYNC_ALONE`.
const SYNC_RESEND: u64 = 0x200;
const SYNC_ALONE: u64 = 0x400;
/// `VB_RECONCILE_DONE` and those below it.
const RECONCILE_DONE: u32 = 0xffff_ffff;
const RECONCILE_GONE: u32 = 0xffff_fffe;
/// `VB_LOSS_MAX`.
const KERNEL_LOSSES: usize = 10;
/// `VB_PATH_CHUNK`.
const PATH_CHUNK: usize = 240;

const _: () = assert!(size_of::<vb_reconcile>() == 24);
const _: () = assert!(size_of::<vb_proc>() == 16);
const _: () = assert!(size_of::<vb_fd_key>() == 8);
const _: () = assert!(size_of::<vb_fd>() == 72);
const _: () = assert!(size_of::<vb_event>() == 96);
const _: () = assert!(size_of::<vb_path_key>() == 24);
const _: () = assert!(size_of::<vb_path>() == 248);
const _: () = assert!(size_of::<vb_meta>() == 152);
const _: () = assert!(size_of::<vb_stats>() == 88);
const _: () = assert!(size_of::<vb_account_key>() == 16);
const _: () = assert!(size_of::<vb_account>() == 56);
const _: () = assert!(size_of::<vb_reads>() == 32);
const _: () = assert!(size_of::<vb_stats>() == 8 * (KERNEL_LOSSES + 1));

// SAFETY: integers and arrays of them, `repr(C)`, without padding as the size
// asserts of both sides say: every bit pattern is a value.
unsafe impl Plain for vb_fd_key {}
// SAFETY: as above.
unsafe impl Plain for vb_proc {}
// SAFETY: as above.
unsafe impl Plain for vb_reconcile {}
// SAFETY: as above.
unsafe impl Plain for vb_fd {}
// SAFETY: as above.
unsafe impl Plain for vb_event {}
// SAFETY: as above.
unsafe impl Plain for vb_path_key {}
// SAFETY: as above.
unsafe impl Plain for vb_path {}
// SAFETY: as above.
unsafe impl Plain for vb_meta {}
// SAFETY: as above.
unsafe impl Plain for vb_stats {}
// SAFETY: as above.
unsafe impl Plain for vb_account_key {}
// SAFETY: as above.
unsafe impl Plain for vb_account {}
// SAFETY: as above.
unsafe impl Plain for vb_reads {}

/// Which libbpf is linked: major and minor.
pub(crate) fn libbpf_version() -> (u32, u32) {
    // SAFETY: no arguments, no state: they return constants.
    unsafe {
        (
            libbpf_rs::libbpf_sys::libbpf_major_version(),
            libbpf_rs::libbpf_sys::libbpf_minor_version(),
        )
    }
}

/// The bytes of an ABI value, as a map's key or value.
pub(super) fn bytes<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `Plain` above is only implemented for types without padding.
    unsafe { plain::as_bytes(value) }
}

/// A value from map or ring bytes, which need not be aligned.
pub(super) fn value<T: Plain + Default>(bytes: &[u8]) -> Option<T> {
    let mut value = T::default();
    plain::copy_from_bytes(&mut value, bytes).ok()?;
    Some(value)
}

/// What the kernel reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Open,
    Dup,
    Close,
    Exit,
    Inherit,
    Receive,
    Adopt,
    Mark,
}

/// A ring buffer record, decoded: what the kernel tells of a descriptor or a
/// process, with the path as it is inside the superblock. `Debug` shows its fields.
#[derive(Debug, Clone)]
pub struct RawEvent {
    pub(super) kind: Kind,
    pub(super) ts: u64,
    pub(super) opened_at: u64,
    pub(super) ino: u64,
    pub(super) size: u64,
    pub(super) open_ns: u64,
    pub(super) pid: u32,
    pub(super) tid: u32,
    pub(super) fd: u32,
    pub(super) dev: Dev,
    pub(super) flags: u32,
    pub(super) own_pid: u32,
    pub(super) mount_id: u64,
    pub(super) comm: OsString,
    /// Inside the superblock; `None`: it could not be read.
    pub(super) path: Option<OsString>,
}

impl RawEvent {
    /// Decodes a record: `struct vb_event` of `src/bpf/rclone_bypass.h`, in this
    /// machine's byte order, and what is behind it. `None` where it is none of
    /// ours: too short, of an unknown kind, or with a path that is not all there.
    pub fn decode(record: &[u8]) -> Option<Self> {
        let event: vb_event = value(record)?;
        let kind = match event.kind {
            EVENT_OPEN => Kind::Open,
            EVENT_DUP => Kind::Dup,
            EVENT_CLOSE => Kind::Close,
            EVENT_EXIT => Kind::Exit,
            EVENT_INHERIT => Kind::Inherit,
            EVENT_RECEIVE => Kind::Receive,
            EVENT_ADOPT => Kind::Adopt,
            EVENT_MARK => Kind::Mark,
            _ => return None,
        };
        let start = usize::from(event.path_off);
        let path = match usize::from(event.path_len) {
            0 => None,
            length => Some(record.get(start..start + length)?),
        };
        Some(Self {
            kind,
            ts: event.ts,
            opened_at: event.opened_at,
            ino: event.ino,
            size: event.size,
            open_ns: event.open_ns,
            pid: event.pid,
            tid: event.tid,
            fd: event.fd,
            dev: Dev(event.dev),
            flags: event.flags,
            own_pid: event.own_pid,
            mount_id: event.mnt_id.into(),
            comm: comm(&event.comm),
            path: path.map(|bytes| OsStr::from_bytes(bytes).to_os_string()),
        })
    }
}

/// A thread's name: up to 15 bytes, ended by a NUL.
pub(super) fn comm(raw: &[i8]) -> OsString {
    let bytes = raw.iter().map(|&b| b as u8).take_while(|&b| b != 0);
    OsString::from_vec(bytes.collect())
}

/// The element of the `watched_slots` map for a device: `VB_DEV_SLOT`.
pub(super) fn dev_slot(dev: Dev) -> u32 {
    (dev.0 ^ (dev.0 >> 20)) % DEV_SLOTS
}

/// The processes, and threads with tables of their own, that share a table with
/// others, by the `procs` map; none where it cannot be read.
pub(super) fn sharers(procs: &impl MapCore) -> Vec<u32> {
    let elements = procs.lookup_batch(procs.max_entries(), MapFlags::ANY, MapFlags::ANY);
    let shares = |(key, proc): (Vec<u8>, Vec<u8>)| {
        let proc: vb_proc = value(&proc)?;
        let pid = u32::from_ne_bytes(key.try_into().ok()?);
        (proc.flags & PROC_SHARED != 0).then_some(pid)
    };
    elements.map_or_else(|_| Vec::new(), |all| all.filter_map(shares).collect())
}

/// Why a process is to be reconciled; reasons add up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark(u32);

impl Mark {
    /// It may have descriptors that no call told of.
    pub(super) const FOUND: Self = Self(MARK_FOUND);

    /// It is none, but shares a table with one that is; its threads are marked
    /// by themselves.
    pub(super) const SHARER: Self = Self(0);

    /// Decodes a value of the `marks` map.
    pub(super) fn decode(bytes: &[u8]) -> Self {
        bytes
            .try_into()
            .map_or(Self::FOUND, |bytes| Self(u32::from_ne_bytes(bytes)))
    }

    fn is_alone(self) -> bool {
        self == Self::SHARER
    }

    /// What the descriptors that are found are said to be.
    fn event(self) -> u8 {
        match self.0 {
            // Copied by a fork, too many for its own handler.
            MARK_FORKED => EVENT_INHERIT,
            // Opened by io_uring.
            MARK_URING => EVENT_OPEN,
            _ => EVENT_ADOPT,
        }
    }
}

/// What a run of the `reconcile` program came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reconciled {
    Done,
    /// There is no such process, and nothing left of it.
    Gone,
    /// The ring wants to be emptied, or there is more: go on from here.
    From(u32),
}

/// Runs the `reconcile` program on a process's descriptors, from `from` on; in
/// the kernel, as this thread. With `resend` it tells of those that are known,
/// too.
pub(super) fn reconcile(
    program: &ProgramMut<'_>,
    (pid, from): (u32, u32),
    mark: Mark,
    resend: bool,
) -> libbpf_rs::Result<Reconciled> {
    let flag = |set, flag| if set { flag } else { 0 };
    let arguments = vb_reconcile {
        pid: pid.into(),
        from: from.into(),
        kind: u64::from(mark.event())
            | flag(resend, SYNC_RESEND)
            | flag(mark.is_alone(), SYNC_ALONE),
    };
    let mut context = bytes(&arguments).to_vec();
    let output = program.test_run(ProgramInput {
        context_in: Some(&mut context),
        ..ProgramInput::default()
    })?;
    Ok(match output.return_value {
        RECONCILE_DONE => Reconciled::Done,
        RECONCILE_GONE => Reconciled::Gone,
        from => Reconciled::From(from),
    })
}

/// The kernel's counters.
pub(super) struct Stats(MapHandle);

impl Stats {
    pub(super) fn new(map: MapHandle) -> Self {
        Self(map)
    }

    /// Every cause that the kernel counts; zeros where the map cannot be read.
    pub(super) fn losses(&self) -> Losses {
        let key = 0u32.to_ne_bytes();
        let stats: vb_stats = self
            .0
            .lookup(&key, MapFlags::ANY)
            .ok()
            .flatten()
            .and_then(|bytes| value(&bytes))
            .unwrap_or_default();
        Loss::ALL.iter().copied().zip(stats.losses).collect()
    }
}

/// The path of one open descriptor, in the pinned map.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum StoredPath {
    /// Absolute.
    Known(OsString),
    /// Not below a watched prefix.
    Outside,
}

fn path_key(pid: u32, fd: u32, opened_at: u64, chunk: u32) -> vb_path_key {
    vb_path_key {
        opened_at,
        pid,
        fd,
        chunk,
        pad: 0,
    }
}

/// Stores a path in chunks; `None`: the descriptor is outside every prefix.
/// False where the map has no room, and then nothing is stored.
pub(super) fn store_path(
    map: &impl MapCore,
    (pid, fd, opened_at): (u32, u32, u64),
    path: Option<&Path>,
) -> bool {
    let text = path.map_or(&[][..], |p| p.as_os_str().as_bytes());
    let Ok(total) = u16::try_from(text.len()) else {
        return false;
    };
    let empty: &[u8] = &[];
    let chunks = text
        .chunks(PATH_CHUNK)
        .chain(text.is_empty().then_some(empty));
    for (index, chunk) in (0u32..).zip(chunks) {
        let mut element = vb_path {
            total,
            outside: u8::from(path.is_none()),
            pad: [0; 5],
            bytes: [0; PATH_CHUNK],
        };
        element.bytes[..chunk.len()].copy_from_slice(chunk);
        let key = path_key(pid, fd, opened_at, index);
        if map
            .update(bytes(&key), bytes(&element), MapFlags::ANY)
            .is_err()
        {
            delete_path(map, (pid, fd, opened_at));
            return false;
        }
    }
    true
}

/// Removes a path's chunks.
pub(super) fn delete_path(map: &impl MapCore, (pid, fd, opened_at): (u32, u32, u64)) {
    // The longest path: its mount point's and its own 4,095 bytes.
    for chunk in 0..=(2 * 4096 / PATH_CHUNK) as u32 {
        let key = path_key(pid, fd, opened_at, chunk);
        if map.delete(bytes(&key)).is_err() {
            break;
        }
    }
}

/// Reads a stored path by `lookup`, which has the map's value of a key; `None`
/// where there is none, or not all of it.
pub(super) fn load_path<V: AsRef<[u8]>>(
    lookup: impl Fn(&[u8]) -> Option<V>,
    (pid, fd, opened_at): (u32, u32, u64),
) -> Option<StoredPath> {
    let mut text = Vec::new();
    for chunk in 0.. {
        let key = path_key(pid, fd, opened_at, chunk);
        let element: vb_path = value(lookup(bytes(&key))?.as_ref())?;
        if element.outside != 0 {
            return Some(StoredPath::Outside);
        }
        let total = usize::from(element.total);
        let left = total.checked_sub(text.len())?;
        text.extend_from_slice(&element.bytes[..left.min(PATH_CHUNK)]);
        if text.len() == total {
            break;
        }
    }
    Some(StoredPath::Known(OsString::from_vec(text)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn constants_are_the_header_s() {
        let header = include_str!("../bpf/rclone_bypass.h");
        for (name, expected) in [
            ("VB_ABI_VERSION", VERSION as usize),
            ("VB_DEV_SLOTS", DEV_SLOTS as usize),
            ("VB_PATH_CHUNK", PATH_CHUNK),
            ("VB_COMM_LEN", vb_event::default().comm.len()),
            ("VB_PROC_SHARED", PROC_SHARED as usize),
            ("VB_MARK_ALL", MARK_ALL as usize),
            ("VB_MARK_FOUND", MARK_FOUND as usize),
            ("VB_MARK_FORKED", MARK_FORKED as usize),
            ("VB_MARK_URING", MARK_URING as usize),
        ] {
            let mut lines = header.lines().map(str::split_whitespace);
            let found = lines.find(|line| line.clone().nth(1) == Some(name));
            let value = found.and_then(|mut line| line.nth(2)?.parse().ok());
            assert_eq!(value, Some(expected), "{name}");
        }
        for (name, expected) in [
            ("VB_EVENT_OPEN", EVENT_OPEN),
            ("VB_EVENT_DUP", EVENT_DUP),
            ("VB_EVENT_CLOSE", EVENT_CLOSE),
            ("VB_EVENT_EXIT", EVENT_EXIT),
            ("VB_EVENT_INHERIT", EVENT_INHERIT),
            ("VB_EVENT_RECEIVE", EVENT_RECEIVE),
            ("VB_EVENT_ADOPT", EVENT_ADOPT),
            ("VB_EVENT_MARK", EVENT_MARK),
        ] {
            assert!(header.contains(&format!("{name} = {expected},")), "{name}");
        }
        for (name, expected) in [
            ("VB_RECONCILE_DONE", RECONCILE_DONE),
            ("VB_RECONCILE_GONE", RECONCILE_GONE),
        ] {
            assert!(
                header.contains(&format!("#define {name} {expected:#x}U")),
                "{name}"
            );
        }
        for (name, expected) in [
            ("VB_SYNC_RESEND", SYNC_RESEND),
            ("VB_SYNC_ALONE", SYNC_ALONE),
        ] {
            assert!(
                header.contains(&format!("#define {name} {expected:#x}")),
                "{name}"
            );
        }
    }

    #[test]
    fn losses_are_the_header_s_in_its_order() {
        let header = include_str!("../bpf/rclone_bypass.h");
        let start = header.find("enum vb_loss {").unwrap();
        let body = &header[start..start + header[start..].find("};").unwrap()];
        let names: Vec<String> = body
            .lines()
            .filter_map(|line| {
                let name = line.trim().strip_prefix("VB_LOSS_")?;
                let end = name.find([' ', ','])?;
                Some(name[..end].to_lowercase())
            })
            .filter(|name| name != "max")
            .collect();
        let ours: Vec<&str> = Loss::ALL
            .iter()
            .take(KERNEL_LOSSES)
            .map(|l| l.name())
            .collect();
        assert_eq!(names, ours);
    }

    #[test]
    fn a_record_decodes_with_and_without_a_path() {
        let mut event = vb_event {
            kind: EVENT_DUP,
            pid: 7,
            path_off: 99,
            path_len: 3,
            ..Default::default()
        };
        event.comm[0] = b'x' as i8;
        let mut record = bytes(&event).to_vec();
        record.extend_from_slice(b"...a\nb..");
        let raw = RawEvent::decode(&record).unwrap();
        assert_eq!((raw.kind, raw.pid), (Kind::Dup, 7));
        assert_eq!(raw.path.unwrap(), "a\nb");
        assert_eq!(raw.comm, "x");
        event.path_len = 0;
        assert_eq!(RawEvent::decode(bytes(&event)).unwrap().path, None);
        event.kind = 99;
        assert!(RawEvent::decode(bytes(&event)).is_none());
    }

    proptest! {
        #[test]
        fn any_record_decodes_or_not(record: Vec<u8>, kind in 0u8..6, off: u16, len: u16) {
            let _ = RawEvent::decode(&record);
            let event = vb_event { kind, path_off: off, path_len: len, ..Default::default() };
            let mut long = bytes(&event).to_vec();
            long.extend_from_slice(&record);
            let _ = RawEvent::decode(&long);
        }
    }
}
