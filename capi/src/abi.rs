//! The functions that C calls. `make header` writes `include/vmafx_bypass.h` from
//! them, comments included: these are for who writes C.

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fs::OpenOptions;
use std::mem::size_of;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::{ptr, slice};

use bypass::snapshot::{SnapshotMode, SnapshotOptions, Snapshots};
use bypass::{BypassFile, Reason, Verify};
use nix::errno::Errno;
use nix::libc::{self, ssize_t};

use crate::failure::{self, Failure, call};

/// The version of this interface. It changes where programs must be compiled
/// anew; functions may be added without a change. Part of the library's soname.
pub const VMAFX_ABI_VERSION: u32 = 1;

/// Flag of vmafx_open(): up to 4 KiB of the first read and of every 64th that
/// come from the cache are read through FUSE, too, and compared.
pub const VMAFX_VERIFY_SAMPLE: u32 = 1;

/// Flag of vmafx_open(): all that comes from the cache is read through FUSE, too,
/// and compared.
pub const VMAFX_VERIFY_FULL: u32 = 2;

/// Mode of vmafx_store_new(): clips are handed over as reflinks where the cache's
/// file system can, else as sealed copies in memory. Their bytes never change.
pub const VMAFX_SNAPSHOT_AUTO: u32 = 0;

/// Mode of vmafx_store_new(): the cache file itself is handed over, whose bytes
/// change where the clip's do: for remotes whose clips never change.
pub const VMAFX_SNAPSHOT_OFF: u32 = 1;

/// `mismatch` of vmafx_counts where no difference was found.
pub const VMAFX_NO_MISMATCH: u64 = u64::MAX;

/// A file that is open for reading; from vmafx_open() or vmafx_open_fd().
pub struct File(BypassFile);

/// The snapshots that vmafx_whole_fd() hands over; from vmafx_store_new().
pub struct Store(Snapshots);

/// What was read of a file, and by which way. Later versions add at the end.
#[repr(C)]
pub struct Counts {
    /// Bytes read from the cache.
    pub cache_bytes: u64,
    /// Bytes read through FUSE, or plainly where the file is on no FUSE mount.
    pub fuse_bytes: u64,
    /// Of those from the cache, compared with FUSE's, and equal.
    pub verified_bytes: u64,
    /// Where the first byte was found that the cache had otherwise than FUSE;
    /// VMAFX_NO_MISMATCH: nowhere.
    pub mismatch: u64,
}

/// The version of the library, as in "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn vmafx_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// VMAFX_ABI_VERSION of the library that is running.
#[unsafe(no_mangle)]
pub extern "C" fn vmafx_abi_version() -> u32 {
    VMAFX_ABI_VERSION
}

/// Why this thread's last call that failed did so: one line; "" before the first.
/// Valid until another call of this thread fails, or the thread ends.
#[unsafe(no_mangle)]
pub extern "C" fn vmafx_last_error() -> *const c_char {
    failure::last_message()
}

/// What errno was after this thread's last call that failed; 0 before the first.
/// For languages where errno itself does not last.
#[unsafe(no_mangle)]
pub extern "C" fn vmafx_last_errno() -> c_int {
    failure::last_errno()
}

/// Opens a file for reading. Any regular file: where it cannot be bypassed, it is
/// read through FUSE, and vmafx_state() says why.
///
/// `flags`: 0, VMAFX_VERIFY_SAMPLE or VMAFX_VERIFY_FULL.
///
/// Returns a handle that is yours, for vmafx_close(); NULL on failure: EINVAL for
/// NULL, unknown flags and what is no regular file; EISDIR; those of open(2). What
/// it opens is closed by exec.
///
/// # Safety
/// `path` is NULL or ends with NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_open(path: *const c_char, flags: u32) -> *mut File {
    call(ptr::null_mut(), || {
        // SAFETY: as the caller promises.
        let path = unsafe { path_of(path) }?;
        let verify = verify_of(flags)?;
        let file = BypassFile::open(path)?.verifying(verify);
        Ok(Box::into_raw(Box::new(File(file))))
    })
}

/// As vmafx_open(), of a file that is open for reading: by the descriptor itself,
/// not by its path. The descriptor stays yours, is not changed, and may be closed
/// at once; its offset is not used.
///
/// Returns as vmafx_open(); EBADF where `fd` is not open.
#[unsafe(no_mangle)]
pub extern "C" fn vmafx_open_fd(fd: c_int, flags: u32) -> *mut File {
    call(ptr::null_mut(), || {
        let verify = verify_of(flags)?;
        let file = BypassFile::from_fd(duplicate(fd)?)?.verifying(verify);
        Ok(Box::into_raw(Box::new(File(file))))
    })
}

/// Closes a file. No other call on it may be running, or follow.
///
/// Returns 0; -1 with EINVAL for NULL.
///
/// # Safety
/// `file` is NULL, or a handle that was not closed and that no other thread uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_close(file: *mut File) -> c_int {
    call(-1, || {
        check(file)?;
        // SAFETY: from Box::into_raw, and given up by the caller.
        drop(unsafe { Box::from_raw(file) });
        Ok(0)
    })
}

/// Reads at an offset, until `length` bytes are read or the file ends: fewer are
/// returned at its end alone, or where an error follows, which the next call
/// returns. EINTR is handled. Any number of threads may read one file at once.
///
/// Returns the bytes read, 0 at the end; -1 on failure: EINVAL for NULL, a negative
/// offset and a length beyond SSIZE_MAX; those of pread(2) on the mount.
///
/// # Safety
/// `file` is NULL or open; `buffer` has `length` bytes which nobody else uses
/// during the call, or `length` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_pread(
    file: *const File,
    buffer: *mut c_void,
    length: usize,
    offset: i64,
) -> ssize_t {
    call(-1, || {
        // SAFETY: as the caller promises.
        let file = unsafe { file_of(file) }?;
        let offset =
            u64::try_from(offset).map_err(|_| Failure::invalid("the offset is negative"))?;
        // SAFETY: as the caller promises.
        let buffer = unsafe { bytes_of(buffer.cast(), length) }?;
        Ok(file.read_at(buffer, offset)? as ssize_t)
    })
}

/// The file's size as FUSE shows it now, bytes.
///
/// Returns -1 on failure: EINVAL for NULL; those of fstat(2).
///
/// # Safety
/// `file` is NULL or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_size(file: *const File) -> i64 {
    call(-1, || {
        // SAFETY: as the caller promises.
        let size = unsafe { file_of(file) }?.size()?;
        i64::try_from(size).map_err(|_| Failure::new(Errno::EOVERFLOW, "the size is beyond 2^63"))
    })
}

/// Bytes of the file that are proven to be in the cache now; 0 while it is not
/// bypassed.
///
/// Returns -1 with EINVAL for NULL.
///
/// # Safety
/// `file` is NULL or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_proven_bytes(file: *const File) -> i64 {
    call(-1, || {
        // SAFETY: as the caller promises.
        let proven = unsafe { file_of(file) }?.proven_bytes();
        Ok(i64::try_from(proven).unwrap_or(i64::MAX))
    })
}

/// "active" while what is proven of the file is read from the cache; else the
/// reason for which all of it is read through FUSE: "partial", "changed" and so
/// on, see docs/REFERENCE.md. It may be another after each read.
///
/// Returns NULL with EINVAL for NULL.
///
/// # Safety
/// `file` is NULL or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_state(file: *const File) -> *const c_char {
    call(ptr::null(), || {
        // SAFETY: as the caller promises.
        let refusal = unsafe { file_of(file) }?.refusal();
        Ok(refusal.map_or(ACTIVE, |r| r.reason.name_c()).as_ptr())
    })
}

/// The reason with what was found, as in "dirty: `/cache/clip`: 3 bytes wait", of
/// the state that the file has now; "" while it is "active". As snprintf(3) does,
/// it writes up to `size` bytes, NUL included.
///
/// Returns the length of the whole text, without NUL, of which `size` and more was
/// cut off; -1 on failure: EINVAL for NULL, but for `buffer` where `size` is 0.
///
/// # Safety
/// `file` is NULL or open; `buffer` has `size` bytes, or `size` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_reason(
    file: *const File,
    buffer: *mut c_char,
    size: usize,
) -> ssize_t {
    call(-1, || {
        // SAFETY: as the caller promises.
        let refusal = unsafe { file_of(file) }?.refusal();
        // SAFETY: as the caller promises.
        let buffer = unsafe { bytes_of(buffer.cast(), size) }?;
        let text = refusal.map_or_else(String::new, |r| r.to_string());
        if let Some(room) = buffer.len().checked_sub(1) {
            let length = room.min(text.len());
            buffer[..length].copy_from_slice(&text.as_bytes()[..length]);
            buffer[length] = 0;
        }
        Ok(text.len() as ssize_t)
    })
}

/// What an operator can do about a reason that vmafx_state() or vmafx_whole_fd()
/// gave: one sentence; "" for "active".
///
/// Returns NULL with EINVAL for NULL, and for what is no reason.
///
/// # Safety
/// `reason` is NULL or ends with NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_remedy(reason: *const c_char) -> *const c_char {
    call(ptr::null(), || {
        // SAFETY: as the caller promises.
        let name = unsafe { text_of(reason) }?;
        if name == ACTIVE {
            return Ok(c"".as_ptr());
        }
        Ok(reason_of(name)?.remedy_c().as_ptr())
    })
}

/// Tells what was read of a file so far. `size` is `sizeof(vmafx_counts)`: what a
/// later version of the library has beyond it is left out, and what an older one
/// does not know is set to 0.
///
/// Returns 0; -1 with EINVAL for NULL.
///
/// # Safety
/// `file` is NULL or open; `counts` is NULL or has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_stats(file: *const File, counts: *mut Counts, size: usize) -> c_int {
    call(-1, || {
        // SAFETY: as the caller promises.
        let file = unsafe { file_of(file) }?;
        check(counts)?;
        let stats = file.stats();
        let all = Counts {
            cache_bytes: stats.cache_bytes,
            fuse_bytes: stats.fuse_bytes(),
            verified_bytes: stats.verified_bytes,
            mismatch: file.mismatch().unwrap_or(VMAFX_NO_MISMATCH),
        };
        // SAFETY: `size` bytes are the caller's to be written, and no more are; of
        // `all`, which is of integers without padding, no more than it has is read.
        unsafe {
            ptr::write_bytes(counts.cast::<u8>(), 0, size);
            let known = size.min(size_of::<Counts>());
            ptr::copy_nonoverlapping((&raw const all).cast::<u8>(), counts.cast(), known);
        }
        Ok(0)
    })
}

/// Of `fuse_bytes`, those read so for this reason.
///
/// Returns -1 with EINVAL for NULL, and for what is no reason.
///
/// # Safety
/// `file` is NULL or open; `reason` is NULL or ends with NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_fuse_bytes(file: *const File, reason: *const c_char) -> i64 {
    call(-1, || {
        // SAFETY: as the caller promises.
        let file = unsafe { file_of(file) }?;
        // SAFETY: as the caller promises.
        let reason = reason_of(unsafe { text_of(reason) }?)?;
        let bytes = file.stats().by_reason.get(&reason).copied();
        Ok(i64::try_from(bytes.unwrap_or(0)).unwrap_or(i64::MAX))
    })
}

/// Makes a store of snapshots, empty. A program needs one: those of one store are
/// shared, one for each clip and version, and kept with three descriptors each
/// until the clip changes or is evicted from rclone's cache.
///
/// `mode`: VMAFX_SNAPSHOT_AUTO or VMAFX_SNAPSHOT_OFF. `copy_budget`: bytes of memory
/// that sealed copies may take at once, those included that were handed over and
/// are still open.
///
/// Returns a handle that is yours, for vmafx_store_free(); NULL with EINVAL for an
/// unknown mode.
#[unsafe(no_mangle)]
pub extern "C" fn vmafx_store_new(mode: u32, copy_budget: u64) -> *mut Store {
    call(ptr::null_mut(), || {
        let mode = match mode {
            VMAFX_SNAPSHOT_AUTO => SnapshotMode::Auto,
            VMAFX_SNAPSHOT_OFF => SnapshotMode::Off,
            _ => return Err(Failure::invalid("no such mode")),
        };
        let store = Snapshots::new(SnapshotOptions { mode, copy_budget });
        Ok(Box::into_raw(Box::new(Store(store))))
    })
}

/// Frees a store. Descriptors that it has handed over stay valid. No other call on
/// it may be running, or follow.
///
/// Returns 0; -1 with EINVAL for NULL.
///
/// # Safety
/// `store` is NULL, or a handle that was not freed and that no other thread uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_store_free(store: *mut Store) -> c_int {
    call(-1, || {
        check(store)?;
        // SAFETY: from Box::into_raw, and given up by the caller.
        drop(unsafe { Box::from_raw(store) });
        Ok(0)
    })
}

/// Opens a clip as a descriptor for read(2), mmap(2) and whatever else, where all
/// of it is in the cache and proven to be the version that an open through FUSE
/// gives now. It opens the clip through FUSE first, and so checks permission.
///
/// `how`, unless NULL, is set to a string that is not to be freed: on success
/// "reflink", "copy" or "live"; with ENODATA the reason; else NULL.
///
/// Returns a descriptor that is yours, for close(2): read-only, close-on-exec, at
/// offset 0, with a description of its own. -1 on failure: ENODATA where the clip
/// is to be read through FUSE (use open(2) or vmafx_open() instead); EINVAL for
/// NULL; those of open(2).
///
/// # Safety
/// `store` is NULL or not freed; `path` is NULL or ends with NUL; `how` is NULL or
/// may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_whole_fd(
    store: *const Store,
    path: *const c_char,
    how: *mut *const c_char,
) -> c_int {
    let clip = || {
        // SAFETY: as the caller promises.
        let path = unsafe { path_of(path) }?;
        // Not to hang where it is a FIFO.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let clip = OpenOptions::new().read(true).custom_flags(flags).open(path);
        Ok(clip?.into())
    };
    // SAFETY: as the caller promises.
    unsafe { whole(store, how, clip) }
}

/// As vmafx_whole_fd(), of a clip that is open for reading through FUSE. `fd` stays
/// yours, and is not changed. To close it soon after helps: while a clip is open,
/// rclone makes no new cache file for a new version.
///
/// Returns as vmafx_whole_fd(); EBADF where `fd` is not open, or open by O_PATH.
///
/// # Safety
/// `store` is NULL or not freed; `how` is NULL or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmafx_whole_fd_of(
    store: *const Store,
    fd: c_int,
    how: *mut *const c_char,
) -> c_int {
    let clip = || {
        let clip = duplicate(fd)?;
        let flags = nix::fcntl::fcntl(&clip, nix::fcntl::FcntlArg::F_GETFL);
        let flags = flags.map_err(|e| Failure::new(e, "fcntl of the descriptor"))?;
        // Such a one proves no permission to read.
        if flags & libc::O_PATH != 0 {
            return Err(Failure::new(Errno::EBADF, "the descriptor is O_PATH"));
        }
        Ok(clip)
    };
    // SAFETY: as the caller promises.
    unsafe { whole(store, how, clip) }
}

/// Hands a clip over, and says how.
///
/// # Safety
/// `store` is null or not freed; `how` is null or may be written.
unsafe fn whole(
    store: *const Store,
    how: *mut *const c_char,
    clip: impl FnOnce() -> Result<OwnedFd, Failure>,
) -> c_int {
    let mut said = ptr::null();
    let fd = call(-1, || {
        check(store)?;
        // SAFETY: not null, and alive as the caller promises.
        let Store(store) = unsafe { &*store };
        match store.open(clip()?.as_fd()) {
            Ok(whole) => {
                said = whole.kind.name_c().as_ptr();
                Ok(whole.fd.into_raw_fd())
            }
            Err(refusal) => {
                said = refusal.reason.name_c().as_ptr();
                Err(refusal.into())
            }
        }
    });
    if !how.is_null() {
        // SAFETY: not null, and may be written as the caller promises.
        unsafe { how.write(said) };
    }
    fd
}

const ACTIVE: &CStr = c"active";

fn check<T>(handle: *const T) -> Result<(), Failure> {
    if handle.is_null() {
        return Err(Failure::invalid("an argument is NULL"));
    }
    Ok(())
}

/// # Safety
/// `file` is null, or a handle that stays open during the call.
unsafe fn file_of<'a>(file: *const File) -> Result<&'a BypassFile, Failure> {
    check(file)?;
    // SAFETY: not null, and alive as the caller promises; shared, for all that is
    // done to a file but closing it goes by `&self`.
    Ok(&unsafe { &*file }.0)
}

/// # Safety
/// `text` is null, or ends with NUL and stays during the call.
unsafe fn text_of<'a>(text: *const c_char) -> Result<&'a CStr, Failure> {
    check(text)?;
    // SAFETY: not null, and a string as the caller promises.
    Ok(unsafe { CStr::from_ptr(text) })
}

/// # Safety
/// As of [`text_of`].
unsafe fn path_of<'a>(path: *const c_char) -> Result<&'a Path, Failure> {
    // SAFETY: as the caller promises.
    let text = unsafe { text_of(path) }?;
    Ok(Path::new(OsStr::from_bytes(text.to_bytes())))
}

/// # Safety
/// `start` has `length` bytes that nobody else uses during the call; or `length`
/// is 0, or beyond what is possible.
unsafe fn bytes_of<'a>(start: *mut u8, length: usize) -> Result<&'a mut [u8], Failure> {
    if length == 0 {
        return Ok(&mut []);
    }
    check(start)?;
    if isize::try_from(length).is_err() {
        return Err(Failure::invalid("the length is beyond SSIZE_MAX"));
    }
    // SAFETY: the caller's alone during the call. That it may not have written to
    // them is not visible from here; they are written to, and not read before.
    Ok(unsafe { slice::from_raw_parts_mut(start, length) })
}

/// Another descriptor of what `fd` is of.
fn duplicate(fd: c_int) -> Result<OwnedFd, Failure> {
    // SAFETY: takes and returns numbers; one that is not open gives EBADF.
    let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    let own = Errno::result(own).map_err(|e| Failure::new(e, format!("descriptor {fd}: {e}")))?;
    // SAFETY: just made, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(own) })
}

fn verify_of(flags: u32) -> Result<Verify, Failure> {
    match flags {
        0 => Ok(Verify::Off),
        VMAFX_VERIFY_SAMPLE => Ok(Verify::Sample),
        VMAFX_VERIFY_FULL => Ok(Verify::Full),
        _ => Err(Failure::invalid("no such flags")),
    }
}

fn reason_of(name: &CStr) -> Result<Reason, Failure> {
    let reason = Reason::ALL.iter().find(|r| r.name_c() == name);
    reason
        .copied()
        .ok_or_else(|| Failure::invalid("no such reason"))
}
