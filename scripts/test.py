#!/usr/bin/env python3
"""Runs `cargo test ARGS...`, and what failed once more, alone.

The tests run real daemons on a machine that others use too, where a process may
not be given the processor for seconds. A test that fails and then succeeds by
itself is named in a line `unstable:` at the end, and is to be looked into; one
that fails twice fails the run. Whatever else goes wrong, a crash or a failed
build, fails it at once.
"""

import os
import re
import subprocess
import sys

RUNNING = re.compile(r"^\s+Running (\S.*) \((\S+)\)$")
RESULT = re.compile(r"^test result: (ok|FAILED)\.")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Reader:
    """Follows the output, and gathers the tests that failed by executable."""

    def __init__(self):
        self.executable = None
        self.failed = {}
        self.listing = False
        # Executables that ended by no result of their own.
        self.unfinished = set()
        # A part that is no executable: documentation tests.
        self.other = False

    def line(self, line):
        line = COLOURS.sub("", line.rstrip("\n"))
        if running := RUNNING.match(line):
            self.executable = running[2]
            self.unfinished.add(self.executable)
            self.listing = False
        elif line.lstrip().startswith("Doc-tests "):
            self.executable = None
        elif line == "failures:":
            # Printed twice; before the names, and before their output.
            self.listing = True
        elif self.listing and re.fullmatch(r" {4}\S+", line):
            self.failed.setdefault(self.executable, set()).add(line.strip())
        elif result := RESULT.match(line):
            self.listing = False
            self.unfinished.discard(self.executable)
            self.other |= self.executable is None and result[1] == "FAILED"
        elif line and not line.startswith("    "):
            self.listing = False


def cargo(arguments):
    command = ["cargo", "test", "--no-fail-fast", *arguments]
    reader = Reader()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            reader.line(line)
    return process.returncode, reader


def packages_folder(arguments):
    """Where cargo runs the tests: the package's folder."""
    for option, value in zip(arguments, arguments[1:]):
        if option in ("-p", "--package"):
            return {"vmafx-bypass-capi": "capi"}.get(value, ".")
    return "."


def again(executable, tests, folder):
    """Runs tests of an executable one by one; those that failed."""
    path = os.path.abspath(executable)
    failed = []
    for test in sorted(tests):
        command = [path, "--exact", test, "--nocapture"]
        print(f"test.py: once more: {' '.join(command)}", flush=True)
        environment = dict(os.environ, CARGO_MANIFEST_DIR=os.path.abspath(folder))
        if subprocess.run(command, cwd=folder, env=environment).returncode != 0:
            failed.append(test)
    return failed


def main():
    arguments = sys.argv[1:]
    code, reader = cargo(arguments)
    if code == 0:
        return 0
    if reader.other or reader.unfinished or not reader.failed or None in reader.failed:
        print("test.py: failed, and not by tests that can be tried again", flush=True)
        return code
    folder = packages_folder(arguments)
    failed = []
    for executable, tests in reader.failed.items():
        failed += again(executable, tests, folder)
    for executable, tests in reader.failed.items():
        for test in sorted(tests - set(failed)):
            print(f"unstable: {test} of {executable} failed, and succeeded by itself", flush=True)
    for test in failed:
        print(f"failed twice: {test}", flush=True)
    return code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
