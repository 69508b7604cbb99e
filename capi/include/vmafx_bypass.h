/* vmafx-bypass: reads clips that rclone has cached past FUSE.
 *
 * How to use it from C, Python and Go: docs/LIBRARY.md.
 *
 * - Functions that fail return -1 or NULL, set errno, and leave a message for
 *   vmafx_last_error(). Pointers that must not be NULL and are give EINVAL.
 * - Strings are UTF-8 and end with NUL. What is returned as `const char *` is
 *   never to be freed; but for vmafx_last_error() it is valid for ever.
 * - All calls may be made by any thread at any time, on one handle as well, but
 *   for those that end a handle: vmafx_close() and vmafx_store_free().
 * - Nothing needs to be initialised. Signals are left alone, and nothing is printed.
 *
 * Written by `make header` from capi/src/abi.rs: change that. */

#ifndef VMAFX_BYPASS_H
#define VMAFX_BYPASS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/**
 * The version of this interface. It changes where programs must be compiled
 * anew; functions may be added without a change. Part of the library's soname.
 */
#define VMAFX_ABI_VERSION 1

/**
 * Flag of vmafx_open(): up to 4 KiB of the first read and of every 64th that
 * come from the cache are read through FUSE, too, and compared.
 */
#define VMAFX_VERIFY_SAMPLE 1

/**
 * Flag of vmafx_open(): all that comes from the cache is read through FUSE, too,
 * and compared.
 */
#define VMAFX_VERIFY_FULL 2

/**
 * Mode of vmafx_store_new(): clips are handed over as reflinks where the cache's
 * file system can, else as sealed copies in memory. Their bytes never change.
 */
#define VMAFX_SNAPSHOT_AUTO 0

/**
 * Mode of vmafx_store_new(): the cache file itself is handed over, whose bytes
 * change where the clip's do: for remotes whose clips never change.
 */
#define VMAFX_SNAPSHOT_OFF 1

/**
 * `mismatch` of vmafx_counts where no difference was found.
 */
#define VMAFX_NO_MISMATCH UINT64_MAX

/**
 * A file that is open for reading; from vmafx_open() or vmafx_open_fd().
 */
typedef struct vmafx_file vmafx_file;

/**
 * The snapshots that vmafx_whole_fd() hands over; from vmafx_store_new().
 */
typedef struct vmafx_store vmafx_store;

/**
 * What was read of a file, and by which way. Later versions add at the end.
 */
typedef struct vmafx_counts {
  /**
   * Bytes read from the cache.
   */
  uint64_t cache_bytes;
  /**
   * Bytes read through FUSE, or plainly where the file is on no FUSE mount.
   */
  uint64_t fuse_bytes;
  /**
   * Of those from the cache, compared with FUSE's, and equal.
   */
  uint64_t verified_bytes;
  /**
   * Where the first byte was found that the cache had otherwise than FUSE;
   * VMAFX_NO_MISMATCH: nowhere.
   */
  uint64_t mismatch;
} vmafx_counts;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the library, as in "0.1.0".
 */
const char *vmafx_version(void);

/**
 * VMAFX_ABI_VERSION of the library that is running.
 */
uint32_t vmafx_abi_version(void);

/**
 * Why this thread's last call that failed did so: one line; "" before the first.
 * Valid until another call of this thread fails, or the thread ends.
 */
const char *vmafx_last_error(void);

/**
 * What errno was after this thread's last call that failed; 0 before the first.
 * For languages where errno itself does not last.
 */
int vmafx_last_errno(void);

/**
 * Opens a file for reading. Any regular file: where it cannot be bypassed, it is
 * read through FUSE, and vmafx_state() says why.
 *
 * `flags`: 0, VMAFX_VERIFY_SAMPLE or VMAFX_VERIFY_FULL.
 *
 * Returns a handle that is yours, for vmafx_close(); NULL on failure: EINVAL for
 * NULL, unknown flags and what is no regular file; EISDIR; those of open(2). What
 * it opens is closed by exec.
 *
 * Undefined unless `path` is NULL or ends with NUL.
 */
struct vmafx_file *vmafx_open(const char *path, uint32_t flags);

/**
 * As vmafx_open(), of a file that is open for reading: by the descriptor itself,
 * not by its path. The descriptor stays yours, is not changed, and may be closed
 * at once; its offset is not used.
 *
 * Returns as vmafx_open(); EBADF where `fd` is not open.
 */
struct vmafx_file *vmafx_open_fd(int fd, uint32_t flags);

/**
 * Closes a file. No other call on it may be running, or follow.
 *
 * Returns 0; -1 with EINVAL for NULL.
 *
 * Undefined unless `file` is NULL, or a handle that was not closed and that no other thread uses.
 */
int vmafx_close(struct vmafx_file *file);

/**
 * Reads at an offset, until `length` bytes are read or the file ends: fewer are
 * returned at its end alone, or where an error follows, which the next call
 * returns. EINTR is handled. Any number of threads may read one file at once.
 *
 * Returns the bytes read, 0 at the end; -1 on failure: EINVAL for NULL, a negative
 * offset and a length beyond SSIZE_MAX; those of pread(2) on the mount.
 *
 * Undefined unless `file` is NULL or open; `buffer` has `length` bytes which nobody else uses
 * during the call, or `length` is 0.
 */
ssize_t vmafx_pread(const struct vmafx_file *file,
                    void *buffer,
                    size_t length,
                    int64_t offset);

/**
 * The file's size as FUSE shows it now, bytes.
 *
 * Returns -1 on failure: EINVAL for NULL; those of fstat(2).
 *
 * Undefined unless `file` is NULL or open.
 */
int64_t vmafx_size(const struct vmafx_file *file);

/**
 * Bytes of the file that are proven to be in the cache now; 0 while it is not
 * bypassed.
 *
 * Returns -1 with EINVAL for NULL.
 *
 * Undefined unless `file` is NULL or open.
 */
int64_t vmafx_proven_bytes(const struct vmafx_file *file);

/**
 * "active" while what is proven of the file is read from the cache; else the
 * reason for which all of it is read through FUSE: "partial", "changed" and so
 * on, see docs/REFERENCE.md. It may be another after each read.
 *
 * Returns NULL with EINVAL for NULL.
 *
 * Undefined unless `file` is NULL or open.
 */
const char *vmafx_state(const struct vmafx_file *file);

/**
 * The reason with what was found, as in "dirty: `/cache/clip`: 3 bytes wait", of
 * the state that the file has now; "" while it is "active". As snprintf(3) does,
 * it writes up to `size` bytes, NUL included.
 *
 * Returns the length of the whole text, without NUL, of which `size` and more was
 * cut off; -1 on failure: EINVAL for NULL, but for `buffer` where `size` is 0.
 *
 * Undefined unless `file` is NULL or open; `buffer` has `size` bytes, or `size` is 0.
 */
ssize_t vmafx_reason(const struct vmafx_file *file, char *buffer, size_t size);

/**
 * What an operator can do about a reason that vmafx_state() or vmafx_whole_fd()
 * gave: one sentence; "" for "active".
 *
 * Returns NULL with EINVAL for NULL, and for what is no reason.
 *
 * Undefined unless `reason` is NULL or ends with NUL.
 */
const char *vmafx_remedy(const char *reason);

/**
 * Tells what was read of a file so far. `size` is `sizeof(vmafx_counts)`: what a
 * later version of the library has beyond it is left out, and what an older one
 * does not know is set to 0.
 *
 * Returns 0; -1 with EINVAL for NULL.
 *
 * Undefined unless `file` is NULL or open; `counts` is NULL or has `size` bytes.
 */
int vmafx_stats(const struct vmafx_file *file, struct vmafx_counts *counts, size_t size);

/**
 * Of `fuse_bytes`, those read so for this reason.
 *
 * Returns -1 with EINVAL for NULL, and for what is no reason.
 *
 * Undefined unless `file` is NULL or open; `reason` is NULL or ends with NUL.
 */
int64_t vmafx_fuse_bytes(const struct vmafx_file *file, const char *reason);

/**
 * Makes a store of snapshots, empty. A program needs one: those of one store are
 * shared, one for each clip and version, and kept with three descriptors each
 * until the clip changes or is evicted from rclone's cache.
 *
 * `mode`: VMAFX_SNAPSHOT_AUTO or VMAFX_SNAPSHOT_OFF. `copy_budget`: bytes of memory
 * that sealed copies may take at once, those included that were handed over and
 * are still open.
 *
 * Returns a handle that is yours, for vmafx_store_free(); NULL with EINVAL for an
 * unknown mode.
 */
struct vmafx_store *vmafx_store_new(uint32_t mode, uint64_t copy_budget);

/**
 * Frees a store. Descriptors that it has handed over stay valid. No other call on
 * it may be running, or follow.
 *
 * Returns 0; -1 with EINVAL for NULL.
 *
 * Undefined unless `store` is NULL, or a handle that was not freed and that no other thread uses.
 */
int vmafx_store_free(struct vmafx_store *store);

/**
 * Opens a clip as a descriptor for read(2), mmap(2) and whatever else, where all
 * of it is in the cache and proven to be the version that an open through FUSE
 * gives now. It opens the clip through FUSE first, and so checks permission.
 *
 * `how`, unless NULL, is set to a string that is not to be freed: on success
 * "reflink", "copy" or "live"; with ENODATA the reason; else NULL.
 *
 * Returns a descriptor that is yours, for close(2): read-only, close-on-exec, at
 * offset 0, with a description of its own. -1 on failure: ENODATA where the clip
 * is to be read through FUSE (use open(2) or vmafx_open() instead); EINVAL for
 * NULL; those of open(2).
 *
 * Undefined unless `store` is NULL or not freed; `path` is NULL or ends with NUL; `how` is NULL or
 * may be written.
 */
int vmafx_whole_fd(const struct vmafx_store *store, const char *path, const char **how);

/**
 * As vmafx_whole_fd(), of a clip that is open for reading through FUSE. `fd` stays
 * yours, and is not changed. To close it soon after helps: while a clip is open,
 * rclone makes no new cache file for a new version.
 *
 * Returns as vmafx_whole_fd(); EBADF where `fd` is not open, or open by O_PATH.
 *
 * Undefined unless `store` is NULL or not freed; `how` is NULL or may be written.
 */
int vmafx_whole_fd_of(const struct vmafx_store *store, int fd, const char **how);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* VMAFX_BYPASS_H */
