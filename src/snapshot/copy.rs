//! Sealed copies in memory.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::{dress, reopen};
use crate::aligned::AlignedBuffer;
use crate::reader::WholeClip;
use crate::reason::{Reason, Refusal};

/// Bytes that are copied at once. What takes time is the kernel's making of
/// pages: neither other sizes, nor sendfile(2), mmap(2) or a second thread were
/// faster.
const CHUNK: usize = 1 << 20;

/// Copies a clip into memory, and seals it. What the copy takes of the budget
/// is for the caller to reserve.
///
/// # Errors
/// Where the clip changes meanwhile, or a system call fails.
pub(super) fn of(clip: &WholeClip) -> Result<OwnedFd, Refusal> {
    let failed = |call: &str, e: std::io::Error| {
        Refusal::new(Reason::IoError, format!("{call} of a copy in memory: {e}"))
    };
    let file = File::from(create().map_err(|e| failed("memfd_create", e.into()))?);
    let size = clip.size();
    fill(&file, clip)?;
    dress(&file, clip)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(|e| failed("sealing", e.into()))?;
    let set = rustix::fs::fcntl_get_seals(&file).map_err(|e| failed("seals", e.into()))?;
    let length = file.metadata().map_err(|e| failed("fstat", e))?.len();
    if !set.contains(seals) || length != size {
        let detail = format!("a copy in memory has {length} bytes of {size}, and {set:?}");
        return Err(Refusal::new(Reason::IoError, detail));
    }
    reopen(&file).map_err(|e| failed("reopening", e))
}

/// Copies a clip into a file, which has its bytes if nothing failed.
pub(super) fn fill(file: &File, clip: &WholeClip) -> Result<(), Refusal> {
    let size = clip.size();
    let mut buffer = AlignedBuffer::new(CHUNK);
    let mut offset = 0;
    while offset < size {
        let length = usize::try_from(size - offset).map_or(CHUNK, |rest| rest.min(CHUNK));
        let part = &mut buffer[..length];
        clip.read(part, offset)?;
        file.write_all_at(part, offset).map_err(|e| {
            // Full, it is as if the budget were.
            let reason = match e.kind() {
                std::io::ErrorKind::StorageFull => Reason::Budget,
                _ => Reason::IoError,
            };
            Refusal::new(reason, format!("write of a copy in memory: {e}"))
        })?;
        offset += length as u64;
    }
    clip.check()
}

/// A file in memory that cannot be executed, from Linux 6.3 on.
fn create() -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let create = |flags| rustix::fs::memfd_create("vmafx-bypass-clip", flags);
    match create(flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => create(flags),
        created => created,
    }
}
