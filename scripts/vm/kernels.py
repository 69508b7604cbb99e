"""Debian's kernels, through apt: fetched once, and unpacked where they are kept."""

import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile

# What a kernel is made of: since 7.x its image is a metapackage.
PARTS = re.compile(r"linux-(?:image|binary|modules)-\S+")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Missing(Exception):
    """A kernel that cannot be had, and why."""


def output(*command):
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def mirror():
    """Where the machine has Debian itself from."""
    form = "$(ORIGIN)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)"
    targets = output("apt-get", "indextargets", "--format", form, "Created-By: Packages")
    rows = [line.split("|") for line in targets.splitlines()]
    with open("/etc/os-release") as f:
        codename = re.search(r"^VERSION_CODENAME=(\S+)", f.read(), re.M).group(1)
    rows = [row for row in rows if row[1:3] == [codename, "main"]]
    # The origin is known of lists that were fetched, alone.
    rows.sort(key=lambda row: row[0] != "Debian")
    if not rows:
        raise Missing(f"apt has no source of Debian's {codename} main")
    return rows[0][3]


class Apt:
    """apt on a state of its own with one suite alone: nothing of the machine's
    is written. Its configuration is read first, so proxies still hold."""

    def __init__(self, folder, suite):
        self.folder, self.suite = folder, suite
        for part in ["state/lists/partial", "cache/archives/partial", "log"]:
            os.makedirs(f"{folder}/{part}")
        open(f"{folder}/state/status", "w").close()
        with open(f"{folder}/sources.list", "w") as f:
            f.write(f"deb [arch=amd64 target=Packages signed-by={KEYRING}] {mirror()} {suite} main\n")
        with open(f"{folder}/apt.conf", "w") as f:
            f.write(f"""#clear APT::Architectures;
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "root";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
Dir::Log "{folder}/log";
""")
        self.run("apt-get", "-qq", "update", "--error-on=any")

    def run(self, tool, *arguments, folder=None):
        command = [tool, "-c", f"{self.folder}/apt.conf", *arguments]
        done = subprocess.run(command, text=True, capture_output=True, cwd=folder)
        if done.returncode != 0:
            raise Missing(f"{self.suite}: `{tool} {' '.join(arguments)}` failed:\n{done.stderr}")
        return done.stdout

    def parts(self, package):
        """The package and what it depends on of a kernel, with their versions."""
        found, wanted = {}, [package]
        while wanted:
            name = wanted.pop()
            if name in found:
                continue
            about = self.run("apt-cache", "show", "--no-all-versions", name)
            fields = dict(re.findall(r"^(Version|Depends): (.*)$", about, re.M))
            found[name] = fields["Version"]
            wanted += PARTS.findall(fields.get("Depends", ""))
        return found


def fetch(folder, suite, package):
    """Downloads a kernel into the folder, unless it is there."""
    listed = f"{folder}/packages.json"
    if os.path.exists(listed):
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with tempfile.TemporaryDirectory() as work:
        apt = Apt(work, suite)
        parts = apt.parts(package)
        print(f"vm: fetching {' '.join(sorted(parts))} of {suite}", flush=True)
        wanted = [f"{name}={version}" for name, version in parts.items()]
        apt.run("apt-get", "-qq", "download", *wanted, folder=folder)
    for name in sorted(os.listdir(folder)):
        subprocess.run(["dpkg-deb", "-x", f"{folder}/{name}", f"{folder}/tree"], check=True)
        os.remove(f"{folder}/{name}")
    # Written last: what has it is whole.
    with open(listed + ".new", "w") as f:
        json.dump(parts, f, indent=1)
    os.rename(listed + ".new", listed)


class Kernel:
    """A kernel that was fetched."""

    def __init__(self, folder):
        self.image, self.modules = None, {}
        for path, _, names in os.walk(f"{folder}/tree"):
            for name in names:
                if name.startswith("vmlinuz"):
                    self.image = f"{path}/{name}"
                elif match := re.fullmatch(r"(.*)\.ko(\.xz)?", name):
                    self.modules[match[1].replace("-", "_")] = f"{path}/{name}"
        if not self.image:
            raise Missing(f"no kernel image in {folder}")
        with open(f"{folder}/packages.json") as f:
            self.version = max(json.load(f).values())

    def unpack_modules(self, names, folder):
        """Modules for a guest, unpacked; what is built in has no file. They are
        loaded in the order of `names`."""
        os.makedirs(folder)
        for number, name in enumerate(names):
            if path := self.modules.get(name):
                opened = lzma.open if path.endswith(".xz") else open
                with opened(path, "rb") as module, open(f"{folder}/{number}-{name}.ko", "wb") as out:
                    shutil.copyfileobj(module, out)
