/* What the library promises, checked by who it is for.
 *
 *     check MODE CLIP COPY
 *
 * COPY is a local file with the bytes that CLIP has. Ends with 1 and a line on
 * what is not so. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <vmafx_bypass.h>

#define CHECK(so)                                                                  \
    do {                                                                           \
        if (!(so)) {                                                               \
            fprintf(stderr, "%s:%d: not so: %s (%s; %s)\n", __FILE__, __LINE__,    \
                    #so, strerror(errno), vmafx_last_error());                     \
            exit(1);                                                               \
        }                                                                          \
    } while (0)

/* That a call fails, sets errno to `number`, and says why. */
#define FAILS(call, failed, number)                                                \
    do {                                                                           \
        errno = 0;                                                                 \
        CHECK((call) == (failed));                                                 \
        CHECK(errno == (number));                                                  \
        CHECK(vmafx_last_errno() == (number));                                     \
        CHECK(*vmafx_last_error() != 0);                                           \
    } while (0)

static const char *path;
static unsigned char *bytes;
static size_t size;

static vmafx_counts stats(const vmafx_file *file)
{
    vmafx_counts counts;
    CHECK(vmafx_stats(file, &counts, sizeof counts) == 0);
    return counts;
}

static void read_all(const vmafx_file *file, size_t block)
{
    unsigned char *buffer = malloc(block);
    for (size_t offset = 0; offset < size + block; offset += block) {
        size_t want = offset >= size ? 0 : size - offset < block ? size - offset : block;
        ssize_t n = vmafx_pread(file, buffer, block, (int64_t)offset);
        CHECK(n == (ssize_t)want);
        CHECK(memcmp(buffer, bytes + offset, want) == 0);
    }
    free(buffer);
}

/* A clip that is cached whole. */
static void check_read(void)
{
    vmafx_file *file = vmafx_open(path, 0);
    CHECK(file);
    CHECK(vmafx_size(file) == (int64_t)size);
    CHECK(vmafx_proven_bytes(file) == (int64_t)size);
    CHECK(strcmp(vmafx_state(file), "active") == 0);
    CHECK(strcmp(vmafx_remedy(vmafx_state(file)), "") == 0);
    char text[4] = "xxx";
    CHECK(vmafx_reason(file, text, sizeof text) == 0 && *text == 0);
    read_all(file, 4096);
    read_all(file, 100001);
    read_all(file, size + 7);
    CHECK(stats(file).cache_bytes == 3 * size);
    CHECK(stats(file).fuse_bytes == 0);
    CHECK(stats(file).verified_bytes == 0);
    CHECK(stats(file).mismatch == VMAFX_NO_MISMATCH);
    CHECK(vmafx_fuse_bytes(file, "partial") == 0);
    /* An older program's struct, and a newer one's. */
    uint64_t numbers[6] = {1, 1, 1, 1, 1, 1};
    CHECK(vmafx_stats(file, (vmafx_counts *)numbers, 8) == 0);
    CHECK(numbers[0] == 3 * size && numbers[1] == 1);
    CHECK(vmafx_stats(file, (vmafx_counts *)numbers, 40) == 0);
    CHECK(numbers[3] == VMAFX_NO_MISMATCH && numbers[4] == 0 && numbers[5] == 1);
    CHECK(vmafx_close(file) == 0);

    file = vmafx_open(path, VMAFX_VERIFY_FULL);
    CHECK(file);
    read_all(file, 65536);
    CHECK(stats(file).verified_bytes == size);
    CHECK(vmafx_close(file) == 0);
}

/* A descriptor stays the caller's. */
static void check_fd(void)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK(lseek(fd, 5, SEEK_SET) == 5);
    vmafx_file *file = vmafx_open_fd(fd, 0);
    CHECK(file);
    read_all(file, 65536);
    CHECK(lseek(fd, 0, SEEK_CUR) == 5);
    CHECK(close(fd) == 0);
    read_all(file, 65536);
    CHECK(stats(file).cache_bytes == 2 * size);
    CHECK(vmafx_close(file) == 0);
}

/* A clip that is not cached comes through FUSE, and says why. */
static void check_uncached(void)
{
    vmafx_file *file = vmafx_open(path, 0);
    CHECK(file);
    const char *state = vmafx_state(file);
    CHECK(strcmp(state, "no_metadata") == 0);
    CHECK(strstr(vmafx_remedy(state), "read the clip once") != NULL);
    char some[9], all[512];
    ssize_t length = vmafx_reason(file, NULL, 0);
    CHECK(length > 12 && length < (ssize_t)sizeof all);
    CHECK(vmafx_reason(file, some, sizeof some) == length);
    CHECK(strcmp(some, "no_metad") == 0);
    CHECK(vmafx_reason(file, all, sizeof all) == length);
    CHECK(strncmp(all, "no_metadata: ", 13) == 0 && (ssize_t)strlen(all) == length);
    CHECK(vmafx_proven_bytes(file) == 0);
    char buffer[4096];
    CHECK(vmafx_pread(file, buffer, sizeof buffer, 0) == sizeof buffer);
    CHECK(memcmp(buffer, bytes, sizeof buffer) == 0);
    CHECK(stats(file).fuse_bytes == sizeof buffer);
    CHECK(vmafx_fuse_bytes(file, state) == sizeof buffer);
    read_all(file, 1 << 20);
    CHECK(vmafx_close(file) == 0);

    vmafx_store *store = vmafx_store_new(VMAFX_SNAPSHOT_AUTO, 0);
    const char *how = "";
    FAILS(vmafx_whole_fd(store, path, &how), -1, ENODATA);
    CHECK(how && *vmafx_remedy(how) != 0);
    CHECK(strncmp(vmafx_last_error(), how, strlen(how)) == 0);
    CHECK(vmafx_store_free(store) == 0);
}

/* VMAFX_EBPF_BYPASS=0. */
static void check_disabled(void)
{
    vmafx_file *file = vmafx_open(path, 0);
    CHECK(file);
    CHECK(strcmp(vmafx_state(file), "disabled") == 0);
    read_all(file, 65536);
    CHECK(stats(file).fuse_bytes == size);
    CHECK(vmafx_close(file) == 0);
}

static void *reader(void *argument)
{
    const vmafx_file *file = argument;
    unsigned seed = (unsigned)(uintptr_t)&seed;
    unsigned char *buffer = malloc(100000);
    for (int i = 0; i < 60; i++) {
        size_t length = (size_t)rand_r(&seed) % 100000;
        size_t offset = (size_t)rand_r(&seed) % size;
        size_t want = size - offset < length ? size - offset : length;
        ssize_t n = vmafx_pread(file, buffer, length, (int64_t)offset);
        CHECK(n == (ssize_t)want);
        CHECK(memcmp(buffer, bytes + offset, want) == 0);
        CHECK(strcmp(vmafx_state(file), "active") == 0);
        /* Each thread has its own message. */
        FAILS(vmafx_remedy(i % 2 ? NULL : "none"), NULL, EINVAL);
        CHECK(strcmp(vmafx_last_error(), i % 2 ? "an argument is NULL" : "no such reason") == 0);
    }
    free(buffer);
    return NULL;
}

/* Threads on one handle. */
static void check_threads(void)
{
    vmafx_file *file = vmafx_open(path, 0);
    CHECK(file);
    pthread_t threads[8];
    for (int i = 0; i < 8; i++)
        CHECK(pthread_create(&threads[i], NULL, reader, file) == 0);
    for (int i = 0; i < 8; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(stats(file).fuse_bytes == 0);
    CHECK(vmafx_close(file) == 0);
}

static void check_whole_fd(int fd, const char *how)
{
    CHECK(fd >= 0);
    CHECK(strcmp(how, "copy") == 0 || strcmp(how, "reflink") == 0);
    struct stat status;
    CHECK(fstat(fd, &status) == 0 && (size_t)status.st_size == size);
    CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
    CHECK((fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY);
    CHECK(lseek(fd, 0, SEEK_CUR) == 0);
    void *map = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(map != MAP_FAILED && memcmp(map, bytes, size) == 0);
    CHECK(munmap(map, size) == 0);
    char byte = 0;
    CHECK(read(fd, &byte, 1) == 1 && byte == (char)bytes[0]);
    CHECK(write(fd, &byte, 1) == -1 && errno == EBADF);
}

/* Whole clips as descriptors, which outlive the store. */
static void check_whole(void)
{
    vmafx_store *store = vmafx_store_new(VMAFX_SNAPSHOT_AUTO, 1 << 30);
    CHECK(store);
    const char *how = NULL;
    int first = vmafx_whole_fd(store, path, &how);
    check_whole_fd(first, how);
    int clip = open(path, O_RDONLY | O_CLOEXEC);
    int second = vmafx_whole_fd_of(store, clip, &how);
    CHECK(close(clip) == 0);
    CHECK(vmafx_store_free(store) == 0);
    check_whole_fd(second, how);
    CHECK(lseek(first, 0, SEEK_CUR) == 1);
    CHECK(close(first) == 0 && close(second) == 0);

    store = vmafx_store_new(VMAFX_SNAPSHOT_AUTO, 1);
    FAILS(vmafx_whole_fd(store, path, &how), -1, ENODATA);
    CHECK(strcmp(how, "budget") == 0);
    CHECK(vmafx_store_free(store) == 0);
}

/* A child goes on with what its parent has opened. */
static void check_fork(void)
{
    vmafx_file *file = vmafx_open(path, 0);
    CHECK(file);
    read_all(file, 65536);
    pid_t child = fork();
    read_all(file, 65536);
    CHECK(stats(file).cache_bytes == 2 * size);
    CHECK(vmafx_close(file) == 0);
    if (child > 0) {
        int status;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
}

/* A child learns of changes of the mount table that its parent has seen before. */
static void check_forked(void)
{
    char command[4096], byte = 0;
    snprintf(command, sizeof command, "mount -i -o remount,rw \"$(dirname '%s')\"", path);
    int parent_done[2];
    CHECK(pipe(parent_done) == 0);
    vmafx_file *file = vmafx_open(path, 0);
    CHECK(file && strcmp(vmafx_state(file), "active") == 0);
    read_all(file, 65536);
    CHECK(stats(file).fuse_bytes == 0);
    pid_t child = fork();
    if (child == 0) {
        CHECK(close(parent_done[1]) == 0);
        CHECK(read(parent_done[0], &byte, 1) == 0);
    } else {
        CHECK(system(command) == 0);
        /* It is looked at once a second. */
        usleep(1100000);
    }
    /* Now the proof is another, or there is none. */
    read_all(file, 65536);
    CHECK(stats(file).fuse_bytes > 0);
    CHECK(vmafx_close(file) == 0);
    if (child > 0) {
        int status;
        CHECK(close(parent_done[1]) == 0);
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
    close(parent_done[0]);
}

/* A file of no mount. */
static void check_plain(const char *copy)
{
    vmafx_file *file = vmafx_open(copy, VMAFX_VERIFY_SAMPLE);
    CHECK(file && strcmp(vmafx_state(file), "not_fuse") == 0);
    read_all(file, 65536);
    CHECK(vmafx_close(file) == 0);
}

static void check_errors(void)
{
    CHECK(vmafx_last_errno() == 0 && *vmafx_last_error() == 0);
    CHECK(vmafx_abi_version() == VMAFX_ABI_VERSION);
    CHECK(strchr(vmafx_version(), '.') != NULL);
    FAILS(vmafx_open("/no/such/clip", 0), NULL, ENOENT);
    FAILS(vmafx_open("", 0), NULL, ENOENT);
    FAILS(vmafx_open("/", 0), NULL, EISDIR);
    FAILS(vmafx_open("/dev/null", 0), NULL, EINVAL);
    FAILS(vmafx_open(NULL, 0), NULL, EINVAL);
    FAILS(vmafx_open(path, 4), NULL, EINVAL);
    FAILS(vmafx_open(path, VMAFX_VERIFY_SAMPLE | VMAFX_VERIFY_FULL), NULL, EINVAL);
    int fds[2];
    CHECK(pipe(fds) == 0);
    FAILS(vmafx_open_fd(fds[0], 0), NULL, EINVAL);
    FAILS(vmafx_open_fd(fds[0], 9), NULL, EINVAL);
    FAILS(vmafx_open_fd(-1, 0), NULL, EBADF);
    FAILS(vmafx_open_fd(9999, 0), NULL, EBADF);
    int named = open(path, O_PATH | O_CLOEXEC);
    FAILS(vmafx_open_fd(named, 0), NULL, EINVAL);

    vmafx_file *file = vmafx_open(path, 0);
    vmafx_counts counts;
    char buffer[8];
    FAILS(vmafx_pread(file, buffer, 8, -1), -1, EINVAL);
    FAILS(vmafx_pread(file, NULL, 8, 0), -1, EINVAL);
    FAILS(vmafx_pread(file, buffer, SIZE_MAX, 0), -1, EINVAL);
    FAILS(vmafx_pread(NULL, buffer, 8, 0), -1, EINVAL);
    CHECK(vmafx_pread(file, NULL, 0, 0) == 0);
    CHECK(vmafx_pread(file, buffer, 8, INT64_MAX) == 0);
    FAILS(vmafx_reason(file, NULL, 8), -1, EINVAL);
    FAILS(vmafx_stats(file, NULL, sizeof counts), -1, EINVAL);
    FAILS(vmafx_fuse_bytes(file, "active"), -1, EINVAL);
    FAILS(vmafx_fuse_bytes(file, NULL), -1, EINVAL);
    CHECK(vmafx_close(file) == 0);

    FAILS(vmafx_close(NULL), -1, EINVAL);
    FAILS(vmafx_size(NULL), -1, EINVAL);
    FAILS(vmafx_proven_bytes(NULL), -1, EINVAL);
    FAILS(vmafx_state(NULL), NULL, EINVAL);
    FAILS(vmafx_reason(NULL, buffer, 8), -1, EINVAL);
    FAILS(vmafx_remedy(NULL), NULL, EINVAL);
    FAILS(vmafx_remedy("Active"), NULL, EINVAL);
    FAILS(vmafx_stats(NULL, &counts, sizeof counts), -1, EINVAL);
    FAILS(vmafx_fuse_bytes(NULL, "dirty"), -1, EINVAL);

    FAILS(vmafx_store_new(2, 0), NULL, EINVAL);
    FAILS(vmafx_store_free(NULL), -1, EINVAL);
    vmafx_store *store = vmafx_store_new(VMAFX_SNAPSHOT_OFF, 0);
    const char *how = "";
    FAILS(vmafx_whole_fd(store, "/no/such/clip", &how), -1, ENOENT);
    CHECK(how == NULL);
    FAILS(vmafx_whole_fd(store, NULL, NULL), -1, EINVAL);
    FAILS(vmafx_whole_fd(NULL, path, &how), -1, EINVAL);
    FAILS(vmafx_whole_fd(store, "/etc/passwd", &how), -1, ENODATA);
    CHECK(strcmp(how, "not_fuse") == 0);
    FAILS(vmafx_whole_fd_of(store, -1, &how), -1, EBADF);
    CHECK(how == NULL);
    FAILS(vmafx_whole_fd_of(store, named, &how), -1, EBADF);
    FAILS(vmafx_whole_fd_of(store, fds[0], &how), -1, ENODATA);
    CHECK(strcmp(how, "unsupported") == 0);
    CHECK(vmafx_store_free(store) == 0);
    CHECK(close(fds[0]) == 0 && close(fds[1]) == 0 && close(named) == 0);
}

/* Descriptors that are open; after a mode there must be as many as before. */
static int open_descriptors(void)
{
    int count = 0;
    for (int fd = 0; fd < 1024; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

int main(int count, char **arguments)
{
    if (count != 4) {
        fprintf(stderr, "usage: check MODE CLIP COPY\n");
        return 2;
    }
    const char *mode = arguments[1];
    path = arguments[2];
    int copy = open(arguments[3], O_RDONLY | O_CLOEXEC);
    struct stat status;
    CHECK(copy >= 0 && fstat(copy, &status) == 0);
    size = (size_t)status.st_size;
    bytes = malloc(size);
    CHECK(read(copy, bytes, size) == status.st_size && close(copy) == 0);

    /* The process keeps one for its mount table, from the first clip on. */
    CHECK(*vmafx_last_error() == 0);
    CHECK(vmafx_close(vmafx_open(path, 0)) == 0);
    int before = open_descriptors();
    if (strcmp(mode, "cached") == 0) {
        check_errors();
        check_read();
        check_fd();
        check_threads();
        check_whole();
        check_plain(arguments[3]);
        check_fork();
    } else if (strcmp(mode, "uncached") == 0) {
        check_uncached();
    } else if (strcmp(mode, "forked") == 0) {
        check_forked();
    } else if (strcmp(mode, "disabled") == 0) {
        check_disabled();
    } else {
        CHECK(!"a mode");
    }
    CHECK(open_descriptors() == before);
    free(bytes);
    return 0;
}
