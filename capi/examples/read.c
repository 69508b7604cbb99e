/* Writes a clip's bytes to standard output, past FUSE where that is proven, and
 * says on standard error which way they came.
 *
 *     cc -o read read.c $(pkg-config --cflags --libs vmafx_bypass)
 *     ./read /rclone-mount/clip.y4m | sha256sum */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <vmafx_bypass.h>

int main(int count, char **arguments)
{
    static char block[1 << 20];
    if (count != 2) {
        fprintf(stderr, "usage: read CLIP\n");
        return 2;
    }
    vmafx_file *clip = vmafx_open(arguments[1], 0);
    if (!clip) {
        fprintf(stderr, "%s: %s\n", arguments[1], vmafx_last_error());
        return 1;
    }
    int64_t offset = 0;
    ssize_t n;
    while ((n = vmafx_pread(clip, block, sizeof block, offset)) > 0) {
        if (fwrite(block, 1, (size_t)n, stdout) != (size_t)n)
            break;
        offset += n;
    }
    if (n < 0)
        fprintf(stderr, "%s: %s\n", arguments[1], vmafx_last_error());

    vmafx_counts counts;
    vmafx_stats(clip, &counts, sizeof counts);
    const char *state = vmafx_state(clip);
    fprintf(stderr, "%s: %" PRIu64 " bytes from the cache, %" PRIu64 " through FUSE\n",
            state, counts.cache_bytes, counts.fuse_bytes);
    if (*vmafx_remedy(state))
        fprintf(stderr, "%s\n", vmafx_remedy(state));
    vmafx_close(clip);
    return n != 0 || fflush(stdout) != 0;
}
