"""Runs in a guest: the steps of /vm/steps.json, one after another. For each it
writes a line of JSON to the port that it is given, and one more at the end."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time

# Of a step's output, what the host may show.
SHOWN = 20_000


def tell(port, **fields):
    port.write(json.dumps(fields) + "\n")
    port.flush()


def run(step):
    """A step to its end, or to the end of its time."""
    # Not by a pipe: a daemon that a test left behind would keep it open.
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            step["command"], env={**os.environ, **step["env"]}, cwd=step["cwd"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True)
        try:
            code = child.wait(timeout=step["seconds"])
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            code = "timeout"
        output.seek(0)
        return code, output.read().decode(errors="replace")


def raise_limits():
    """As a login on Debian has them: PID 1's are the kernel's, which are low."""
    most = 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))


def main():
    with open("/vm/steps.json") as f:
        steps = json.load(f)
    raise_limits()
    with open(sys.argv[1], "w") as port:
        tell(port, booted=os.uname().release)
        for number, step in enumerate(steps):
            print(f"vm: {step['name']}", flush=True)
            before = time.monotonic()
            code, output = run(step)
            tell(port, step=number, code=code, output=output[-SHOWN:],
                 seconds=round(time.monotonic() - before, 1))
            if code == "timeout":
                # What hangs may hang the next ones as well.
                return
        tell(port, ended=True)


main()
