#!/usr/bin/env python3
"""Tells which system calls `run` has made in pods, and whether the seccomp profile has
them:

    mkdir /tmp/traces
    TRACE_FOLDER=/tmp/traces TEST_PATIENCE=60 tests/deploy/test_pod.py
    tests/deploy/seccomp.py /tmp/traces/*
"""

import collections
import json
import pathlib
import re
import sys

PROFILE = pathlib.Path(__file__).resolve().parents[2] / "deploy/seccomp/vmafx-bypass.json"
# Of these the profile has the first argument, too.
BY_ARGUMENT = {"bpf", "socket", "unshare"}
CALL = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?:\(([^,)]*)| resumed>)")


def calls(trace):
    """The calls of `run` and its threads, from when runc has become it."""
    ours, found = set(), collections.Counter()
    for line in trace.read_text(errors="replace").splitlines():
        match = CALL.match(line)
        if not match:
            continue
        pid, name, argument = match.groups()
        if name == "execve" and '["/usr/bin/vmafx-bypass", "run"' in line:
            ours.add(pid)
        if pid not in ours:
            continue
        if name in ("clone", "clone3", "vfork", "fork"):
            ours.update(re.findall(r"= (\d+)$", line))
        if argument is not None:
            found[f"{name}({argument})" if name in BY_ARGUMENT else name] += 1
    return found


def main():
    allowed = {
        name
        for rule in json.loads(PROFILE.read_text())["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW"
        for name in rule["names"]
    }
    found = sum((calls(pathlib.Path(name)) for name in sys.argv[1:]), collections.Counter())
    missing = False
    for call, count in sorted(found.items()):
        known = call.split("(")[0] in allowed
        missing |= not known
        print(f"{count:7} {call}{'' if known else '   not in the profile'}")
    return missing


if __name__ == "__main__":
    sys.exit(main())
