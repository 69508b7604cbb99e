"""Python's threads on one clip, and its errors: check.py CLIP COPY."""

import errno
import os
import random
import sys
import threading

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../examples"))
import read  # noqa: E402


def main():
    path, copy = sys.argv[1:]
    with open(copy, "rb") as file:
        content = file.read()
    failures = []

    def reader(clip, seed):
        try:
            choose, block = random.Random(seed), bytearray(100_000)
            for _ in range(100):
                offset = choose.randrange(len(content))
                n = clip.readinto(block, offset)
                assert n == min(len(block), len(content) - offset)
                assert block[:n] == content[offset:offset + n]
                try:
                    clip.readinto(block, -1)
                    raise AssertionError("a negative offset")
                except OSError as error:
                    assert error.errno == errno.EINVAL, error
        except BaseException as error:
            failures.append(error)
            raise

    # The process keeps a descriptor for its mount table, from the first clip on.
    with read.Clip(path):
        pass
    before = os.listdir("/proc/self/fd")
    with read.Clip(path) as clip:
        assert clip.size() == len(content)
        threads = [threading.Thread(target=reader, args=(clip, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert clip.state() == "active"
        assert clip.stats().fuse_bytes == 0
    assert os.listdir("/proc/self/fd") == before


main()
