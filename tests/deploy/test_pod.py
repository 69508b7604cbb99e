#!/usr/bin/env python3
"""Pods as the charts render them, run by runc with their capabilities, mounts and
seccomp profile, on a node with a real rclone."""

import copy
import json
import pathlib
import re
import shutil
import tempfile
import unittest

import lab
from lab import BASE, MOUNTING, Node, Pod

LOCALHOST = {"type": "Localhost", "localhostProfile": lab.SECCOMP.name}

# What `run` says where it may not keep itself from system calls.
UNFILTERED = "no system call is refused"


def daemonset(values, **more):
    """The pod that the chart makes."""
    documents = lab.render({"ebpfBypass": {"enabled": True, **values}, **more})
    return lab.find(documents, "DaemonSet")["spec"]["template"]["spec"]


def tracker(node, **more):
    return daemonset(node.values(**more), seccompProfile=LOCALHOST)


def client(node, user):
    """A pod without any privileges that reads the clip by the socket."""
    volume = {"name": "mounts", "hostPath": {"path": str(node.mounts), "type": "Directory"}}
    socket = {"name": "socket", "hostPath": {"path": str(node.socket), "type": "Directory"}}
    container = {
        "name": "run",
        "args": ["read", "--stats=json", "--output=/dev/null", str(node.media / "clip")],
        "env": [{"name": "VMAFX_BYPASS_SOCKET", "value": f"{node.socket}/bypass.sock"}],
        "securityContext": {
            "runAsUser": user,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "resources": {"limits": {"memory": "64Mi"}},
        "volumeMounts": [
            {"name": "mounts", "mountPath": str(node.mounts), "readOnly": True},
            {"name": "socket", "mountPath": str(node.socket), "readOnly": True},
        ],
    }
    security = {"runAsGroup": user, "fsGroup": 65532 if user else 0}
    return {"containers": [container], "volumes": [volume, socket], "securityContext": security}


class PodTest(unittest.TestCase):
    def setUp(self):
        self.node = Node(self)

    def served(self, pod, name="run"):
        """What the client in this pod was told of the bytes that it has read."""
        reader = Pod(self, pod, name)
        self.assertEqual(reader.wait(), 0, reader.told())
        stats = json.loads(reader.errors.read_text().splitlines()[-1])
        self.assertEqual(stats["bytes"], len(self.node.content))
        return stats

    def status(self, pid):
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
        return dict(re.findall(r"^(\w+):\t(.*)$", text, re.MULTILINE))

    def assert_rights(self, pid, capabilities):
        """That a process has these capabilities at most, and is under the profile."""
        status = self.status(pid)
        bounding = int(status["CapBnd"], 16)
        numbers = {"CAP_DAC_READ_SEARCH": 2, "CAP_SYS_CHROOT": 18, "CAP_SYS_PTRACE": 19}
        numbers |= {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
        self.assertEqual(bounding, sum(1 << numbers[name] for name in capabilities))
        # It may have given some up.
        self.assertEqual(int(status["CapPrm"], 16) & ~bounding, 0)
        self.assertEqual((status["Seccomp"], status["NoNewPrivs"]), ("2", "1"))

    def assert_ends_well(self, pod):
        self.assertEqual(pod.terminate(), 0, pod.told())
        self.assertNotIn(UNFILTERED, pod.told())
        summary = pod.events()[-1]
        self.assertEqual(summary["event"], "summary")
        self.assertTrue(summary["complete"], summary)
        self.assertFalse(self.node.pins.exists())

    def test_a_pod_tracks_mounts_that_come_go_and_come_back(self):
        pod = Pod(self, tracker(self.node, account=True, metrics={"enabled": True}))
        # It is there before the node's rclone.
        self.assert_rights(pod.pid(), BASE)
        for round in (1, 2):
            self.node.mount()
            pod.wait_for(round, event="mount")
            self.node.read()
            opened = pod.wait_for(round, event="open", path=str(self.node.media / "clip"))
            self.node.unmount()
            pod.wait_for(round, event="unmount")
        # The first read has cached it, and the cache was found past the pod's own root.
        self.assertEqual(opened[-1]["state"], "active", opened)
        # Under the profile, in the pod's own network.
        get = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9779/metrics').read())"
        inside = ["nsenter", f"--target={pod.pid()}", "--net"]
        page = lab.run(*inside, "python3", "-c", get).stdout
        self.assertIn("vmafx_bypass_fuse_reads_total", page)
        self.assert_ends_well(pod)

    def test_the_mount_may_be_there_first(self):
        self.node.mount()
        pod = Pod(self, tracker(self.node, attach="tracepoint"))
        pod.wait_for(event="attach", attach="tracepoint")
        self.node.read()
        pod.wait_for(event="open", path=str(self.node.media / "clip"))
        self.node.unmount()
        pod.wait_for(event="unmount")
        self.node.mount()
        pod.wait_for(event="mount")
        self.assert_ends_well(pod)

    def serve(self, **socket):
        self.node.mount()
        self.node.read()
        settings = {"enabled": True, "hostPath": str(self.node.socket), "group": 65532, **socket}
        pod = Pod(self, tracker(self.node, socket=settings))
        lab.until(pod.told, (self.node.socket / "bypass.sock").is_socket)
        pod.wait_for(event="attach")
        return pod

    def test_clips_are_handed_over_to_pods_without_privileges(self):
        pod = self.serve()
        self.assert_rights(pod.pid(), BASE)
        stats = self.served(client(self.node, 65532))
        self.assertEqual(stats["cache_bytes"], stats["bytes"], stats)
        # A program that knows nothing of it gets a copy in memory, by a process of the node.
        program = shutil.copy(lab.PROGRAM, self.node.folder)
        user = ["setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", program]
        command = ["exec", f"--socket={self.node.socket}/bypass.sock", "--report=json", "--"]
        done = lab.run(*user, *command, "cat", self.node.media / "clip", text=False)
        self.assertEqual(done.stdout, self.node.content)
        report = json.loads(done.stderr.splitlines()[-1])
        self.assertEqual((report["by_server"], report["kinds"]), (1, {"copy": 1}), report)
        # Root has no name on the socket's list, and would have rclone's cache writable.
        stats = self.served(client(self.node, 0))
        self.assertEqual(stats["bytes_by_reason"], {"permission": stats["bytes"]}, stats)
        self.assert_ends_well(pod)

    def test_root_is_served_by_two_capabilities_more(self):
        pod = self.serve(privilegedClients=True, group=None)
        self.assert_rights(pod.pid(), BASE + MOUNTING)
        stats = self.served(client(self.node, 0))
        self.assertEqual(stats["cache_bytes"], stats["bytes"], stats)
        self.assert_ends_well(pod)

    def test_each_capability_is_needed(self):
        self.node.mount()
        self.node.read()
        # rclone's cache is another user's.
        lab.run("chown", "--recursive", "1234:1234", self.node.cache)
        pod = tracker(self.node)
        for name in ("CAP_BPF", "CAP_PERFMON"):
            less = Pod(self, pod, drop=[name])
            self.assertEqual(less.wait(), 3, less.told())
            self.assertIn("CAP_BPF and CAP_PERFMON", less.told())
        for name in ("CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", None):
            less = Pod(self, pod, drop=[name])
            less.wait_for(event="attach")
            self.node.read()
            state = less.wait_for(event="open")[0]["state"]
            self.assertEqual(state == "active", name is None, less.told())
            self.assert_ends_well(less)

    def test_without_the_profile_s_bpf_nothing_is_tracked(self):
        profile = json.loads(lab.SECCOMP.read_text())
        rules = copy.deepcopy(profile["syscalls"])
        profile["syscalls"] = [rule for rule in rules if rule["names"] != ["bpf"]]
        self.assertLess(len(profile["syscalls"]), len(rules))
        pod = Pod(self, tracker(self.node), seccomp=profile)
        self.assertEqual(pod.wait(), 3, pod.told())

    def test_without_the_profile_s_seccomp_it_says_that_it_has_no_filter_of_its_own(self):
        profile = json.loads(lab.SECCOMP.read_text())
        for rule in profile["syscalls"]:
            rule["names"] = [name for name in rule["names"] if name != "seccomp"]
        pod = Pod(self, tracker(self.node), seccomp=profile)
        lab.until(pod.told, lambda: UNFILTERED in pod.told())
        self.assertEqual(pod.terminate(), 0, pod.told())

    def test_a_sidecar_serves_the_containers_of_its_pod(self):
        self.node.mount()
        self.node.read()
        values = {
            "enabled": True,
            "mountRoot": str(self.node.mounts),
            "prefixes": [str(self.node.media)],
            "seccompProfile": LOCALHOST,
        }
        pod = node_pod(self, {"ebpfBypass": values})
        for volume in pod["volumes"]:
            if "emptyDir" in volume:
                folder = self.node.folder / volume["name"]
                folder.mkdir()
                folder.chmod(0o777)
                volume["emptyDir"]["testFolder"] = str(folder)
        sidecar = Pod(self, pod, "ebpf-bypass")
        socket = self.node.folder / "ebpf-bypass-socket" / "bypass.sock"
        lab.until(sidecar.told, socket.is_socket)
        self.assert_rights(sidecar.pid(), BASE)
        reader = next(c for c in pod["containers"] if c["name"] == "vmafx-node")
        reader["args"] = ["read", "--stats=json", "--output=/dev/null", f"{self.node.media}/clip"]
        stats = self.served(pod, "vmafx-node")
        self.assertEqual(stats["cache_bytes"], stats["bytes"], stats)
        self.assertEqual(sidecar.terminate(), 0, sidecar.told())


def node_pod(test, values):
    """The pod of a chart that has taken over the snippet."""
    folder = tempfile.TemporaryDirectory()
    test.addCleanup(folder.cleanup)
    documents = lab.render(values, lab.node_chart(pathlib.Path(folder.name)))
    return lab.find(documents, "Deployment")["spec"]["template"]["spec"]


if __name__ == "__main__":
    unittest.main(verbosity=2)
