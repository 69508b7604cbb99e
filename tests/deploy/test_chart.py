#!/usr/bin/env python3
"""The charts as helm renders them, against the API's schemas and what docs/KUBERNETES.md
says; the values' schema, the profiles and the Dockerfile by their own tools."""

import functools
import json
import pathlib
import re
import tempfile
import unittest

import lab

import jsonschema
import kubernetes_validate
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

FILES = sorted((lab.CHART / "ci").glob("*.yaml"))
GUIDE = (lab.ROOT / "docs/KUBERNETES.md").read_text()
# The oldest version that the chart is for, and the newest with a schema. appArmorProfile
# is a field from 1.30 on.
VERSIONS = ("1.25", "1.30", "1.37")


def strict(schema):
    """A schema under which an unknown field is an error, as for the API server."""
    if isinstance(schema, dict):
        if "properties" in schema and isinstance(schema["properties"], dict):
            schema = {"additionalProperties": False, **schema}
        return {key: strict(value) for key, value in schema.items()}
    return [strict(part) for part in schema] if isinstance(schema, list) else schema


@functools.cache
def service_monitor_schema():
    return strict(ServiceMonitor.model_json_schema())


def validate(document, version):
    if document["kind"] == "ServiceMonitor":
        jsonschema.validate(document, service_monitor_schema())
    else:
        kubernetes_validate.validate(document, version, strict=True)


def everything(node, path=()):
    """All values in a document, with the keys that lead to them."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from everything(value, (*path, key))
    elif isinstance(node, list):
        for value in node:
            yield from everything(value, path)
    else:
        yield path, node


@functools.cache
def run_options():
    text = lab.run(lab.PROGRAM, "run", "--help").stdout
    return set(re.findall(r"--[a-z-]+", text))


class ChartTest(unittest.TestCase):
    def each_file(self):
        self.assertGreaterEqual(len(FILES), 5)
        for file in FILES:
            with self.subTest(file.name):
                yield file, lab.render(files=[file])

    def pod(self, documents):
        return lab.find(documents, "DaemonSet")["spec"]["template"]["spec"]

    def container(self, values):
        documents = lab.render({"ebpfBypass": {"enabled": True, **values}})
        return self.pod(documents)["containers"][0]

    def capabilities(self, **values):
        return self.container(values)["securityContext"]["capabilities"]

    def test_by_default_nothing_is_rendered(self):
        self.assertEqual(lab.render(), [])
        off = {"enabled": False, "socket": {"enabled": True, "privilegedClients": True}}
        off["metrics"] = {"enabled": True, "serviceMonitor": {"enabled": True}}
        self.assertEqual(lab.render({"ebpfBypass": off}), [])

    def test_every_object_is_one_of_the_api(self):
        for file, documents in self.each_file():
            lab.run(lab.HELM, "lint", "--strict", lab.CHART, "-f", file)
            for document in documents:
                for version in VERSIONS:
                    if version == VERSIONS[0] and "appArmorProfile" in str(document):
                        continue
                    validate(document, version)

    def test_the_api_s_schemas_see_mistakes(self):
        documents = lab.render(files=[lab.CHART / "ci/socket-metrics.yaml"])
        pod = self.pod(documents)
        pod["hostPid"] = True
        with self.assertRaises(kubernetes_validate.ValidationError):
            validate(lab.find(documents, "DaemonSet"), VERSIONS[-1])
        monitor = lab.find(documents, "ServiceMonitor")
        monitor["spec"]["endpoints"][0]["intervall"] = "30s"
        with self.assertRaises(jsonschema.ValidationError):
            validate(monitor, VERSIONS[-1])

    def test_nothing_is_privileged(self):
        for _, documents in self.each_file():
            pod = self.pod(documents)
            self.assertTrue(pod["hostPID"])
            for name in ("hostNetwork", "hostIPC", "hostUsers"):
                self.assertNotIn(name, pod)
            for path, value in everything(documents):
                if path[-1] in ("privileged", "allowPrivilegeEscalation"):
                    self.assertIs(value, False, path)
                # Bidirectional needs a privileged container.
                self.assertNotEqual(value, "Bidirectional", path)
            for container in pod["containers"]:
                security = container["securityContext"]
                self.assertIs(security["privileged"], False)
                self.assertIs(security["allowPrivilegeEscalation"], False)
                self.assertIs(security["readOnlyRootFilesystem"], True)
                self.assertEqual(security["capabilities"]["drop"], ["ALL"])
                self.assertNotEqual(security["seccompProfile"]["type"], "Unconfined")
            self.assertIs(pod["automountServiceAccountToken"], False)

    def test_capabilities_are_those_of_the_guide(self):
        short = [name.removeprefix("CAP_") for name in lab.BASE]
        for values in (
            {},
            {"attach": "tracepoint"},
            {"socket": {"enabled": True, "group": 5}},
            {"socket": {"enabled": False, "privilegedClients": True}},
            {"metrics": {"enabled": True}},
        ):
            self.assertEqual(self.capabilities(**values)["add"], short, values)
        mounting = [name.removeprefix("CAP_") for name in lab.MOUNTING]
        socket = {"enabled": True, "privilegedClients": True}
        self.assertEqual(self.capabilities(socket=socket)["add"], short + mounting)
        table = re.findall(r"^\| `(CAP_\w+)` \|", GUIDE, re.MULTILINE)
        self.assertEqual(table, lab.BASE + lab.MOUNTING)

    def test_host_paths_are_those_of_the_guide(self):
        expected = {
            "minimal": ["/sys/fs/bpf", "/mnt/rclone"],
            "socket-metrics": ["/sys/fs/bpf", "/mnt/rclone", "/run/vmafx-bypass"],
            "tight": ["/sys/fs/bpf", "/srv/media", "/var/cache/rclone", "/sys/kernel/tracing"],
        }
        for name, paths in expected.items():
            pod = self.pod(lab.render(files=[lab.CHART / f"ci/{name}.yaml"]))
            self.assertEqual([v["hostPath"]["path"] for v in pod["volumes"]], paths)
            mounts = {m["name"]: m for m in pod["containers"][0]["volumeMounts"]}
            self.assertEqual(set(mounts), {v["name"] for v in pod["volumes"]})
            self.assertEqual(mounts["mounts"]["mountPropagation"], "HostToContainer")
            writable = {n for n, mount in mounts.items() if not mount.get("readOnly")}
            self.assertEqual(writable, {"bpffs", "socket"} & set(mounts))

    def test_every_option_is_one_of_run(self):
        used = set()
        for _, documents in self.each_file():
            arguments = self.pod(documents)["containers"][0]["args"]
            self.assertEqual(arguments[0], "run")
            used |= {argument.split("=")[0] for argument in arguments[1:]}
        self.assertLessEqual({"--prefix", "--socket", "--metrics", "--account"}, used)
        self.assertLessEqual(used, run_options())

    def test_the_opt_in_is_the_program_s(self):
        for _, documents in self.each_file():
            environment = self.pod(documents)["containers"][0]["env"]
            self.assertEqual(environment, [{"name": "VMAFX_EBPF_BYPASS", "value": "1"}])

    def test_metrics_are_served_and_probed_only_where_they_are_on(self):
        container = self.container({})
        self.assertFalse({"ports", "livenessProbe", "readinessProbe"} & set(container))
        self.assertNotIn("--metrics", str(container["args"]))
        container = self.container({"metrics": {"enabled": True}})
        self.assertIn("--metrics=0.0.0.0:9779", container["args"])
        self.assertEqual(container["readinessProbe"]["httpGet"]["path"], "/readyz")
        self.assertEqual(container["livenessProbe"]["httpGet"]["path"], "/healthz")

    def test_prometheus_finds_the_pods(self):
        documents = lab.render(files=[lab.CHART / "ci/socket-metrics.yaml"])
        monitor, service = (lab.find(documents, kind) for kind in ("ServiceMonitor", "Service"))
        daemonset = lab.find(documents, "DaemonSet")

        def selects(selector, labels):
            return selector.items() <= labels.items()

        labels = service["metadata"]["labels"]
        self.assertTrue(selects(monitor["spec"]["selector"]["matchLabels"], labels))
        template = daemonset["spec"]["template"]
        self.assertTrue(selects(service["spec"]["selector"], template["metadata"]["labels"]))
        port = template["spec"]["containers"][0]["ports"][0]
        self.assertEqual(service["spec"]["ports"][0]["targetPort"], port["name"])
        self.assertEqual(monitor["spec"]["endpoints"][0]["port"], port["name"])
        self.assertEqual(monitor["metadata"]["labels"]["release"], "prometheus")
        # The alerts go by the job's name.
        self.assertEqual(labels[monitor["spec"]["jobLabel"]], "vmafx-bypass")

    def test_wrong_values_are_refused(self):
        schema = json.loads((lab.CHART / "values.schema.json").read_text())
        jsonschema.Draft7Validator.check_schema(schema)
        defaults = lab.yaml.safe_load((lab.CHART / "values.yaml").read_text())
        jsonschema.validate(defaults, schema)
        for wrong in (
            {"ebpfBypass": {"enabled": "yes"}},
            {"ebpfBypass": {"enabel": True}},
            {"ebpfBypass": {"prefixes": []}},
            {"ebpfBypass": {"prefixes": ["media"]}},
            {"ebpfBypass": {"prefixes": ["/mnt/rclone/a b"]}},
            {"ebpfBypass": {"mountRoot": "/"}},
            {"ebpfBypass": {"attach": "kprobe"}},
            {"ebpfBypass": {"pinDir": "/run/pins"}},
            {"ebpfBypass": {"maxFds": 0}},
            {"ebpfBypass": {"maxFds": 4194305}},
            {"ebpfBypass": {"prefixes": ["/mnt/rclone/a,b"]}},
            {"ebpfBypass": {"socket": {"mode": "660"}}},
            {"ebpfBypass": {"socket": {"group": "encoders"}}},
            {"ebpfBypass": {"socket": {"copyBudget": "1Gi"}}},
            {"ebpfBypass": {"metrics": {"port": 80}}},
            {"ebpfBypass": {"metrics": {"address": "localhost"}}},
            {"ebpfBypass": {"metrics": {"address": "127.0.0.1"}}},
            {"ebpfBypass": {"metrics": {"address": "[::1]"}}},
            {"ebpfBypass": {"metrics": {"address": "::"}}},
            {"image": {"digest": "latest"}},
            {"seccompProfile": {"type": "Localhost"}},
            {"appArmorProfile": {"type": "RuntimeDefault", "localhostProfile": "x"}},
            {"updateStrategy": {"rollingUpdate": {"maxSurge": 1}}},
            {"securityContext": {"privileged": True}},
        ):
            with self.subTest(wrong):
                with self.assertRaises(jsonschema.ValidationError):
                    jsonschema.validate(wrong, schema)
        for address in ("0.0.0.0", "10.1.2.3", "[::]", "[fd00::1]"):
            jsonschema.validate({"ebpfBypass": {"metrics": {"address": address}}}, schema)
        with self.assertRaisesRegex(AssertionError, "don't meet the specifications"):
            lab.render({"ebpfBypass": {"attach": "kprobe"}})

    def test_a_prefix_outside_of_the_mount_root_is_refused(self):
        for prefix in ("/mnt/rclone2/media", "/mnt/rclone"):
            with self.assertRaisesRegex(AssertionError, "is not below ebpfBypass.mountRoot"):
                self.container({"prefixes": [prefix]})


class NodeChartTest(unittest.TestCase):
    def rendered(self, values):
        with tempfile.TemporaryDirectory() as folder:
            return lab.render(values, lab.node_chart(pathlib.Path(folder)))

    def test_by_default_the_pod_stays_as_it_was(self):
        pod = lab.find(self.rendered({}), "Deployment")["spec"]["template"]["spec"]
        self.assertEqual(set(pod), {"securityContext", "containers", "volumes"})
        self.assertEqual([c["name"] for c in pod["containers"]], ["vmafx-node"])
        self.assertEqual([v["name"] for v in pod["volumes"]], ["tmp"])
        self.assertEqual(len(pod["containers"][0]["env"]), 1)
        self.assertEqual(len(pod["containers"][0]["volumeMounts"]), 1)

    def test_the_sidecar_alone_has_capabilities(self):
        documents = self.rendered({"ebpfBypass": {"enabled": True}})
        for version in VERSIONS:
            validate(documents[0], version)
        pod = documents[0]["spec"]["template"]["spec"]
        self.assertTrue(pod["hostPID"])
        node, sidecar = pod["containers"]
        self.assertNotIn("add", node["securityContext"]["capabilities"])
        chart = lab.find(lab.render({"ebpfBypass": {"enabled": True}}), "DaemonSet")
        ours = chart["spec"]["template"]["spec"]["containers"][0]["securityContext"]
        self.assertEqual(sidecar["securityContext"], ours)
        options = {argument.split("=")[0] for argument in sidecar["args"][1:]}
        self.assertLessEqual(options, run_options())
        variables = {v["name"]: v.get("value") for v in node["env"]}
        self.assertIn(f"--socket={variables['VMAFX_BYPASS_SOCKET']}", sidecar["args"])

    def test_the_client_s_values_are_of_the_socket(self):
        values = lab.yaml.safe_load((lab.NODE_CHART / "client-values.yaml").read_text())
        pod = lab.render(files=[lab.CHART / "ci/socket-metrics.yaml"])
        served = lab.find(pod, "DaemonSet")["spec"]["template"]["spec"]["containers"][0]
        self.assertIn(f"--socket={values['env']['VMAFX_BYPASS_SOCKET']}", served["args"])
        volumes = {v["name"]: v["hostPath"]["path"] for v in values["node"]["volumes"]}
        mounts = {m["name"]: m for m in values["node"]["volumeMounts"]}
        self.assertEqual({n: m["mountPath"] for n, m in mounts.items()}, volumes)
        self.assertTrue(all(mount["readOnly"] for mount in mounts.values()))


class ToolsTest(unittest.TestCase):
    def test_the_dockerfile_is_clean(self):
        lab.run(lab.TOOLS / "bin/hadolint", lab.ROOT / "deploy/container/Dockerfile")

    def test_the_apparmor_profile_parses(self):
        profile = lab.ROOT / "deploy/apparmor/vmafx-bypass"
        parse = ("apparmor_parser", "--skip-kernel-load", "--skip-cache")
        lab.run(*parse, profile)
        text = profile.read_text()
        names = set(re.findall(r"^  capability (\w+),", text, re.MULTILINE))
        self.assertEqual({f"CAP_{n.upper()}" for n in names}, {*lab.BASE, *lab.MOUNTING})
        wrong = text.replace("capability bpf,", "capability bpff,")
        self.assertNotEqual(lab.run(*parse, input=wrong, check=False).returncode, 0)

    def test_the_seccomp_profile_lets_nothing_else_through(self):
        profile = json.loads(lab.SECCOMP.read_text())
        self.assertEqual(profile["defaultAction"], "SCMP_ACT_ERRNO")
        allowed = [r for r in profile["syscalls"] if r["action"] == "SCMP_ACT_ALLOW"]
        names = {name for rule in allowed for name in rule["names"]}
        dangerous = {"ptrace", "process_vm_readv", "process_vm_writev", "mount", "umount2"}
        dangerous |= {"init_module", "finit_module", "kexec_load", "pivot_root", "chroot"}
        dangerous |= {"open_by_handle_at", "keyctl", "userfaultfd", "io_uring_setup", "reboot"}
        self.assertEqual(names & dangerous, set())
        # These with some arguments alone.
        for rule in allowed:
            if set(rule["names"]) & {"bpf", "socket", "clone", "unshare", "setns"}:
                self.assertTrue(rule.get("args"), rule)


if __name__ == "__main__":
    unittest.main(verbosity=2)
