#!/usr/bin/env python3
"""Writes a clip's bytes to standard output, past FUSE where that is proven, and
says on standard error which way they came.

    python3 read.py /rclone-mount/clip.y4m | sha256sum
"""

import ctypes
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_ssize_t, c_uint32, c_uint64, c_void_p

# use_errno: ctypes keeps errno of each call, for each thread. While a call runs,
# other Python threads do, too.
library = ctypes.CDLL("libvmafx_bypass.so.1", use_errno=True)


class Counts(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in ("cache_bytes", "fuse_bytes", "verified_bytes", "mismatch")]


def declare(name, result, *arguments):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


# Handles are c_void_p: Python's default of c_int would cut them off.
vmafx_last_error = declare("vmafx_last_error", c_char_p)
vmafx_open = declare("vmafx_open", c_void_p, c_char_p, c_uint32)
vmafx_close = declare("vmafx_close", c_int, c_void_p)
vmafx_pread = declare("vmafx_pread", c_ssize_t, c_void_p, c_void_p, c_size_t, c_int64)
vmafx_size = declare("vmafx_size", c_int64, c_void_p)
vmafx_state = declare("vmafx_state", c_char_p, c_void_p)
vmafx_remedy = declare("vmafx_remedy", c_char_p, c_char_p)
vmafx_stats = declare("vmafx_stats", c_int, c_void_p, POINTER(Counts), c_size_t)


def failure(path):
    return OSError(ctypes.get_errno(), vmafx_last_error().decode(errors="replace"), path)


class Clip:
    """A clip that is open; any number of threads may read it, and then one closes it."""

    def __init__(self, path, flags=0):
        self.path = path
        self.handle = vmafx_open(os.fsencode(path), flags)
        if not self.handle:
            raise failure(path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        vmafx_close(self.handle)
        self.handle = None

    def readinto(self, buffer, offset):
        """Fills a bytearray, an array of numpy or the like; returns the bytes read."""
        view = memoryview(buffer)
        memory = (ctypes.c_char * view.nbytes).from_buffer(view)
        n = vmafx_pread(self.handle, memory, view.nbytes, offset)
        if n < 0:
            raise failure(self.path)
        return n

    def size(self):
        size = vmafx_size(self.handle)
        if size < 0:
            raise failure(self.path)
        return size

    def state(self):
        return vmafx_state(self.handle).decode()

    def stats(self):
        counts = Counts()
        vmafx_stats(self.handle, byref(counts), ctypes.sizeof(counts))
        return counts


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: read.py CLIP")
    try:
        with Clip(sys.argv[1]) as clip:
            block, offset = bytearray(1 << 20), 0
            while n := clip.readinto(block, offset):
                sys.stdout.buffer.write(memoryview(block)[:n])
                offset += n
            counts, state = clip.stats(), clip.state()
    except OSError as error:
        sys.exit(f"read.py: {error}")
    print(f"{state}: {counts.cache_bytes} bytes from the cache, {counts.fuse_bytes} through FUSE", file=sys.stderr)
    if remedy := vmafx_remedy(state.encode()):
        print(remedy.decode(), file=sys.stderr)


if __name__ == "__main__":
    main()
