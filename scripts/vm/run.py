#!/usr/bin/env python3
"""Boots Debian's kernels under QEMU and runs tests in them: the rows of
matrix.toml, all of them or those that are named. Ends with 1 where a kernel
cannot be had, or where a step fails twice or no guest comes to its end.

    scripts/vm/run.py [--keep] [KERNEL ...]

--keep leaves consoles and initramfs in target/vm/guests. KVM is not used.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib

sys.dont_write_bytecode = True
import image  # noqa: E402
import kernels  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(os.path.dirname(HERE))
TARGET = os.path.abspath(os.environ.get("CARGO_TARGET_DIR", f"{REPO}/target"))
VM = f"{TARGET}/vm"
RCLONE_NEW = f"{TARGET}/rclone-new/rclone"
# Of a console, what is shown where a guest did not end.
TAIL = 100
# How many guests run at a time.
GUESTS = 2
PREPARE = "prepare"


def say(text):
    print(f"vm: {text}", flush=True)


def build_root(matrix, archive):
    """The initramfs that all guests share."""
    rows = matrix["kernel"]
    names = {name for row in rows for name in row.get("each_mode", []) + row.get("tests", [])}
    built = image.built_tests(sorted(names))
    folder = f"{VM}/root"
    shutil.rmtree(folder, ignore_errors=True)
    root = image.Root(folder)
    for path in built.values():
        root.program(path, strip=True)
    root.program(RCLONE_NEW)
    for package in matrix["guest"]["packages"]:
        root.package(package)
    root.python()
    root.file("/bin/busybox")
    for path in ["/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/fuse.conf"]:
        root.file(path)
    os.makedirs(root.folder + REPO, exist_ok=True)
    os.symlink("/proc/self/mounts", f"{folder}/etc/mtab")
    shutil.copy(f"{HERE}/init", f"{folder}/init")
    os.makedirs(f"{folder}/vm")
    for name in ["guest.py", "case.sh"]:
        shutil.copy(f"{HERE}/{name}", f"{folder}/vm/{name}")
    root.pack(archive)
    shutil.rmtree(folder)
    return built


def steps_of(kernel, matrix, built):
    """What a guest is to run, in order, and what is expected of each."""
    guest = matrix["guest"]
    env = {"TEST_PATIENCE": str(guest["patience"]), **guest["env"]}
    if kernel.get("both_rclones"):
        env["RCLONE_NEW"] = RCLONE_NEW

    def step(name, command, expect, **more):
        return {"name": name, "command": command, "cwd": REPO, "env": {**env, **more},
                "expect": expect, "seconds": guest["step_seconds"]}

    def test(name, mode):
        command = [built[name], "--exact"]
        for skip in matrix["skip"]:
            if kernel["name"] in skip["kernels"] and mode in skip.get("modes", [mode]):
                command += [word for skipped in skip["tests"] for word in ["--skip", skipped]]
        if mode:
            return step(f"{name}, {mode}", command, {"exit": 0}, TEST_ATTACH=mode)
        return step(name, command, {"exit": 0})

    steps = []
    if script := kernel.get("prepare"):
        steps.append(step(PREPARE, ["sh", "-ec", script], {"exit": 0}))
    for case in matrix["case"]:
        if kernel["name"] in case["kernels"]:
            for mode, expect in case["expect"].items():
                command = ["sh", "/vm/case.sh", built["vmafx-bypass"], mode, case["script"]]
                steps.append(step(f"{case['name']}, {mode}", command, expect))
    modes = kernel.get("attach", [None])
    for mode in modes:
        names = kernel.get("each_mode", [])
        if mode == modes[0]:
            names = names + kernel.get("tests", [])
        steps += [test(name, mode) for name in names]
    return steps


def boot(kernel, found, matrix, steps, root, folder, processors):
    """Runs a guest to its end: its results by line, and what was wrong, if so."""
    shutil.rmtree(folder, ignore_errors=True)
    found.unpack_modules(matrix["guest"]["modules"], f"{folder}/own/vm/modules")
    with open(f"{folder}/own/vm/steps.json", "w") as f:
        json.dump(steps, f)
    initramfs, console, port = (f"{folder}/{n}" for n in ["initramfs", "console", "results"])
    shutil.copy(root, initramfs)
    image.pack_folder(f"{folder}/own", initramfs)
    for name in [console, port]:
        # Where QEMU does not start, there is nothing in them.
        open(name, "w").close()
    guest = matrix["guest"]
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", guest["cpu"],
        "-smp", str(processors), "-m", guest["memory"],
        "-nodefaults", "-no-reboot", "-display", "none",
        "-serial", f"file:{console}", "-serial", f"file:{port}",
        "-kernel", found.image, "-initrd", initramfs,
        "-append", f"console=ttyS0 {guest['append']} {kernel.get('append', '')}",
    ]
    problem = None
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as qemu:
        end = time.monotonic() + guest["guest_seconds"]
        while (code := qemu.poll()) is None and not problem:
            time.sleep(1)
            if time.monotonic() > end:
                problem = f"the guest did not end within {guest['guest_seconds']} s"
            elif emulation_failed(console):
                problem = "the guest's kernel ran into a breakpoint of its own"
        qemu.kill()
        if code:
            problem = f"QEMU ended with {code}"
    with open(port, errors="replace") as f:
        lines = f.read().split("\n")[:-1]
    return [json.loads(line) for line in lines], problem


def is_expected(result, expect):
    """Whether a step ended as it should, with one line that says why if so told."""
    if result["code"] != expect["exit"]:
        return False
    message = expect.get("message")
    output = result["output"].strip()
    return message is None or (message in output and "\n" not in output)


def emulation_failed(console):
    """Whether a guest's kernel panicked on a breakpoint of its own, or is stuck at one:
    code that it changes while it runs, QEMU's other processor may run as it was
    (-accel tcg), when the kernel knows nothing of the breakpoint any more."""
    with open(console, errors="replace") as f:
        text = f.read()
    # At a function's first byte, where tracing is patched in.
    stuck = re.search(r"soft lockup - CPU(?:.*\n){1,8}.*RIP: 0010:\w+\+0x0/", text)
    return "int3: 0000" in text or stuck is not None


class Row:
    """A kernel of the matrix, and what is to run under it."""

    def __init__(self, kernel, matrix, built, root):
        self.kernel, self.matrix, self.root = kernel, matrix, root
        self.name = kernel["name"]
        self.folder = f"{VM}/guests/{self.name}"
        self.found = None
        self.steps = steps_of(kernel, matrix, built)

    def say(self, text):
        say(f"{self.name}: {text}")

    def fetch(self):
        store = f"{VM}/kernels/{self.kernel['suite']}"
        try:
            kernels.fetch(store, self.kernel["suite"], self.kernel["package"])
            self.found = kernels.Kernel(store)
        except kernels.Missing as missing:
            self.say(missing)
            return
        self.say(f"{self.found.version} of {self.kernel['suite']}")
        for skip in self.matrix["skip"]:
            if self.name in skip["kernels"]:
                modes = f" ({', '.join(skip['modes'])})" if "modes" in skip else ""
                self.say(f"without {', '.join(skip['tests'])}{modes}: {skip['reason']}")

    def with_preparation(self, steps):
        """Steps for a guest of their own."""
        first = self.steps[0]
        prepares = first["name"] == PREPARE and first not in steps
        return [first, *steps] if prepares else steps

    def boot(self, steps, processors):
        """Runs a guest: its results by step, and what was wrong with it, if so."""
        steps = self.with_preparation(steps)
        lines, problem = boot(
            self.kernel, self.found, self.matrix, steps, self.root, self.folder, processors)
        results = [(steps[line["step"]], line) for line in lines if "step" in line]
        for step, result in results:
            good = is_expected(result, step["expect"])
            self.say(f"{'ok    ' if good else 'FAILED'} {step['name']} ({result['seconds']} s)")
        if lines[-1:] != [{"ended": True}]:
            problem = problem or "the guest ended before it should"
        return results, problem

    def attempt(self, steps):
        """Runs steps: those that failed or that no guest has come to."""
        results, problem = self.boot(steps, self.matrix["guest"]["processors"])
        if problem and emulation_failed(f"{self.folder}/console"):
            left = [step for step in steps if step not in [done for done, _ in results]]
            self.say("QEMU has let the guest's kernel fail (int3): on with one processor")
            more, problem = self.boot(left or steps[-1:], 1)
            results += more
        failed = [step for step in steps if step not in [done for done, _ in results]]
        for step, result in results:
            if not is_expected(result, step["expect"]):
                self.say(f"{step['name']} ended with {result['code']}, expected was "
                         f"{step['expect']}:\n{result['output']}")
                failed.append(step)
        if problem:
            self.say(problem)
            with open(f"{self.folder}/console", errors="replace") as f:
                self.say("the console's end:\n" + "".join(f.readlines()[-TAIL:]))
            failed = failed or steps[-1:]
        return failed

    def run(self, keep):
        """Whether all of it is good, or is good when it runs once more: guests are
        slow, and the host may stop them for seconds."""
        if not self.found:
            return False
        before = time.monotonic()
        failed = self.attempt(self.steps)
        if failed:
            again = ", ".join(step["name"] for step in failed)
            self.say(f"once more: {again}")
            if not (failed := self.attempt(failed)):
                say(f"unstable: {again} of {self.name} failed, and then succeeded")
        self.say(f"{'FAILED' if failed else 'ok'}, {time.monotonic() - before:.0f} s")
        if not keep:
            shutil.rmtree(self.folder)
        return not failed


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("kernels", nargs="*")
    arguments = parser.parse_args()
    with open(f"{HERE}/matrix.toml", "rb") as f:
        matrix = tomllib.load(f)
    rows = matrix["kernel"]
    names = [row["name"] for row in rows]
    if unknown := set(arguments.kernels) - set(names):
        sys.exit(f"vm: no kernel {', '.join(unknown)}; there are {', '.join(names)}")
    if arguments.kernels:
        rows = [row for row in rows if row["name"] in arguments.kernels]
    if TARGET.startswith("/tmp/"):
        sys.exit(f"vm: `{TARGET}`: guests have a /tmp of their own; build elsewhere")
    os.makedirs(VM, exist_ok=True)
    root = f"{VM}/root.cpio"
    if os.path.exists(root):
        os.remove(root)
    before = time.monotonic()
    built = build_root(matrix, root)
    say(f"built the root in {time.monotonic() - before:.0f} s, "
        f"{os.path.getsize(root) >> 20} MiB")
    rows = [Row(kernel, matrix, built, root) for kernel in rows]
    for row in rows + rows:
        # The network may fail once.
        if not row.found:
            row.fetch()
    # Tests wait more than they compute; guests side by side take half the time.
    with concurrent.futures.ThreadPoolExecutor(GUESTS) as pool:
        good = list(pool.map(lambda row: row.run(arguments.keep), rows))
    if bad := [row.name for row, is_good in zip(rows, good) if not is_good]:
        sys.exit(f"vm: FAILED: {', '.join(bad)}")
    say(f"all good: {', '.join(row.name for row in rows)}")


if __name__ == "__main__":
    main()
