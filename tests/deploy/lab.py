"""What the tests of deploy/ share: the chart rendered by helm, a node with an rclone,
and pods that runc runs as they were rendered."""

import atexit
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "deploy-tools"
if not (TOOLS / "installed").exists():
    sys.exit(f"`{TOOLS}` is missing: run `scripts/deploy-tools.sh`")
sys.path.insert(0, str(TOOLS))

import yaml  # noqa: E402

CHART = ROOT / "deploy/helm/vmafx-bypass"
NODE_CHART = ROOT / "deploy/helm/vmafx-node"
SECCOMP = ROOT / "deploy/seccomp/vmafx-bypass.json"
HELM = TOOLS / "bin/helm"
PROGRAM = os.environ.get("VMAFX_BYPASS", str(ROOT / "target/debug/vmafx-bypass"))
PATIENCE = float(os.environ.get("TEST_PATIENCE", "20"))

BASE = ["CAP_BPF", "CAP_PERFMON", "CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE"]
MOUNTING = ["CAP_SYS_ADMIN", "CAP_SYS_CHROOT"]


def run(*command, **options):
    options = {"check": True, "text": True, "capture_output": True, **options}
    try:
        return subprocess.run([str(part) for part in command], **options)
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"{command}: {error.stdout}{error.stderr}") from error


@functools.cache
def helm(chart, files, values):
    arguments = [part for file in files for part in ("-f", file)]
    return run(HELM, "template", "test", chart, *arguments, "-f", "-", input=values).stdout


def render(values=None, chart=CHART, files=()):
    """The objects that helm makes of values, a dict, after values files."""
    text = helm(chart, tuple(files), yaml.safe_dump(values or {}))
    return [document for document in yaml.safe_load_all(text) if document]


def node_chart(folder):
    """A chart that has taken over deploy/helm/vmafx-node, in `folder`."""
    chart = folder / "node"
    shutil.copytree(ROOT / "tests/deploy/node", chart)
    shutil.copy(NODE_CHART / "values.yaml", chart)
    shutil.copy(NODE_CHART / "_ebpf-bypass.tpl", chart / "templates")
    return chart


def find(documents, kind):
    found = [document for document in documents if document["kind"] == kind]
    assert len(found) == 1, f"{len(found)} of {kind}"
    return found[0]


def until(what, ask):
    """What `ask` answers, as soon as it is true."""
    end = time.monotonic() + PATIENCE
    while not (answer := ask()):
        assert time.monotonic() < end, f"not in {PATIENCE} s: {what() if callable(what) else what}"
        time.sleep(0.02)
    return answer


@functools.cache
def image():
    """The files of the image, with the program that is tested."""
    folder = tempfile.mkdtemp(prefix="vmafx-image-")
    atexit.register(shutil.rmtree, folder)
    run(ROOT / "deploy/container/rootfs.sh", PROGRAM, folder)
    return folder


def remove_pins(folder):
    """Those of a `run` that was killed; one that ends has removed them."""
    if folder.exists():
        shutil.rmtree(folder)


class Node:
    """A folder with a mount root that is shared, as a node's is, and an rclone that
    mounts below it."""

    def __init__(self, test):
        if os.geteuid() != 0:
            raise AssertionError("this test needs root: run `make test`")
        # Where another user may go to, too.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vmafx-node-", dir="/var/tmp"))
        test.addCleanup(shutil.rmtree, self.folder)
        self.folder.chmod(0o755)
        self.mounts, self.source = self.folder / "mounts", self.folder / "source"
        self.cache, self.socket = self.folder / "cache", self.folder / "socket"
        self.media = self.mounts / "media"
        self.media.mkdir(parents=True)
        self.source.mkdir()
        self.content = os.urandom(1 << 20)
        (self.source / "clip").write_bytes(self.content)
        self.pins = pathlib.Path("/sys/fs/bpf", self.folder.name)
        test.addCleanup(remove_pins, self.pins)
        self.rclone = None
        run("mount", "--bind", self.mounts, self.mounts)
        test.addCleanup(run, "umount", "--lazy", self.mounts)
        run("mount", "--make-shared", self.mounts)
        test.addCleanup(self.unmount)

    def mount(self):
        command = ["rclone", "mount", self.source, self.media, "--read-only", "--allow-other"]
        command += ["--vfs-cache-mode", "full", "--cache-dir", self.cache, "--config", "/dev/null"]
        self.rclone = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until("rclone mounts", self.media.is_mount)

    def unmount(self):
        if self.rclone:
            self.rclone.terminate()
            self.rclone.wait(PATIENCE)
            self.rclone = None

    def read(self):
        """Reads the clip through FUSE, as a program of the node."""
        assert (self.media / "clip").read_bytes() == self.content

    def values(self, **more):
        """Of the chart, for this node."""
        return {
            "mountRoot": str(self.mounts),
            "prefixes": [str(self.media)],
            "pinDir": str(self.pins),
            "log": "json",
            **more,
        }


class Pod:
    """A container of a pod as it was rendered, run by runc."""

    def __init__(self, test, pod, name="run", seccomp=None, drop=(), arguments=None):
        self.name = f"vmafx-{uuid.uuid4().hex[:12]}"
        self.bundle = pathlib.Path(tempfile.mkdtemp(prefix="vmafx-pod-"))
        test.addCleanup(shutil.rmtree, self.bundle)
        # A sidecar's are named by its pod.
        test.addCleanup(remove_pins, pathlib.Path("/sys/fs/bpf", self.bundle.name))
        container = next(c for c in pod["containers"] if c["name"] == name)
        spec = oci(self.bundle, pod, container, seccomp, drop)
        if arguments:
            spec["process"]["args"] = arguments
        (self.bundle / "config.json").write_text(json.dumps(spec))
        self.log = self.bundle / "log"
        self.errors = self.bundle / "errors"
        command = ["runc", "run", "--bundle", str(self.bundle), self.name]
        # What the seccomp profile is made from: seccomp.py.
        if folder := os.environ.get("TRACE_FOLDER"):
            trace = f"{folder}/{self.name}"
            command = ["strace", "-f", "-qq", "-e", "signal=none", "-o", trace, *command]
        with self.log.open("w") as log, self.errors.open("w") as errors:
            self.runc = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=errors,
            )
        test.addCleanup(self.end)

    def pid(self):
        """The program's, once runc has started it."""

        def started():
            done = run("runc", "state", self.name, check=False)
            state = json.loads(done.stdout) if done.returncode == 0 else {}
            pid = state.get("status") == "running" and state["pid"]
            return pid and "vmafx-bypass" in os.readlink(f"/proc/{pid}/exe") and pid

        return until(self.told, started)

    def events(self):
        lines = self.log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, count=1, **fields):
        """The events with these fields, once there are so many."""

        def matching():
            assert self.runc.poll() is None, self.told()
            found = [e for e in self.events() if fields.items() <= e.items()]
            return len(found) >= count and found

        return until(lambda: f"{fields}: {self.told()}", matching)

    def told(self):
        return self.errors.read_text() + self.log.read_text()

    def terminate(self):
        """Ends it as the kubelet does; its exit code."""
        run("runc", "kill", self.name, "TERM")
        return self.runc.wait(PATIENCE)

    def wait(self):
        return self.runc.wait(PATIENCE)

    def end(self):
        if self.runc.poll() is None:
            run("runc", "delete", "--force", self.name, check=False)
            self.runc.wait(PATIENCE)


def oci(bundle, pod, container, seccomp, drop):
    """The runtime's configuration, as a kubelet and containerd make it of a pod."""
    security = container["securityContext"]
    added = ["CAP_" + name for name in security["capabilities"].get("add", [])]
    capabilities = [name for name in added if name not in drop]
    pod_security = pod.get("securityContext", {})
    user = security.get("runAsUser", pod_security.get("runAsUser", 0))
    group = pod_security.get("runAsGroup", 0)
    groups = [*pod_security.get("supplementalGroups", [])]
    groups += [pod_security["fsGroup"]] if "fsGroup" in pod_security else []
    variables = {"PATH": "/usr/bin"}
    for variable in container.get("env", []):
        # The only field that is referred to.
        variables[variable["name"]] = variable.get("value", bundle.name)
    arguments = container.get("command", ["/usr/bin/vmafx-bypass"]) + container["args"]
    for name, value in variables.items():
        arguments = [argument.replace(f"$({name})", value) for argument in arguments]
    namespaces = ["mount", "ipc", "uts", "network"] + ["pid"] * (not pod.get("hostPID"))
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": user, "gid": group, "additionalGids": groups},
            "args": arguments,
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": "/",
            "capabilities": {
                # Those of a user other than root are gone after execve(2).
                kind: capabilities
                for kind in ("bounding", "effective", "permitted")
            },
            "noNewPrivileges": not security["allowPrivilegeEscalation"],
        },
        "root": {"path": str(image()), "readonly": security["readOnlyRootFilesystem"]},
        "mounts": mounts(pod, container, bundle),
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "rootfsPropagation": "rslave",
            "resources": {"memory": {"limit": quantity(container["resources"]["limits"]["memory"])}},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
        },
    }
    profile = security["seccompProfile"]
    if profile["type"] == "Localhost":
        assert profile["localhostProfile"] == SECCOMP.name
        spec["linux"]["seccomp"] = seccomp or json.loads(SECCOMP.read_text())
    return spec


def mounts(pod, container, bundle):
    """Those that each container has, and the pod's volumes."""
    all_mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "mode=755", "size=64k"],
        },
        {
            "destination": "/sys",
            "type": "sysfs",
            "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"],
        },
    ]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        volume = volumes[mount["name"]]
        if "emptyDir" in volume:
            # One for all of the pod, which the test has put there.
            source = pathlib.Path(volume["emptyDir"]["testFolder"])
        else:
            source = pathlib.Path(volume["hostPath"]["path"])
            if volume["hostPath"]["type"] == "DirectoryOrCreate":
                source.mkdir(mode=0o755, exist_ok=True)
            else:
                assert volume["hostPath"]["type"] == "Directory" and source.is_dir(), volume
        propagation = {"None": "rprivate", "HostToContainer": "rslave"}
        options = ["rbind", propagation[mount.get("mountPropagation", "None")]]
        options += ["ro" if mount.get("readOnly") else "rw"]
        target = {"destination": mount["mountPath"], "type": "bind", "source": str(source)}
        all_mounts.append({**target, "options": options})
    return all_mounts


def quantity(text):
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
    return int(text[:-2]) * units[text[-2:]]
