"""The guests' root: an initramfs with what the tests need, at the same paths as here."""

import json
import os
import re
import shutil
import subprocess

PYTHON = "/usr/bin/python3"
# Of the standard library, what no worker uses and is large.
LEFT_OUT = {"test", "idlelib", "tkinter", "ensurepip", "lib2to3", "pydoc_data", "dist-packages"}


def built_tests(names):
    """Builds the tests and the program, as `cargo test` does: path by name."""
    command = ["cargo", "test", "--locked", "--no-run", "--message-format=json"]
    for name in names:
        command += ["--test", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    built = {}
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message["reason"] == "compiler-artifact" and message.get("executable"):
            target = message["target"]
            if target["kind"] == ["test"] or not message["profile"]["test"]:
                built[target["name"]] = message["executable"]
    return built


class Root:
    """A folder that becomes a guest's root."""

    def __init__(self, folder):
        self.folder, self.done = folder, set()
        for name in ["bin", "sbin", "lib", "lib64"]:
            os.makedirs(f"{folder}/usr/{name}")
            os.symlink(f"usr/{name}", f"{folder}/{name}")
        for name in ["proc", "sys", "dev", "tmp", "run", "root", "mnt", "etc", "usr/share"]:
            os.makedirs(f"{folder}/{name}")

    def place(self, path):
        """Where a file of this path belongs; its folder is made."""
        parent, name = os.path.split(path)
        place = self.folder + os.path.join(os.path.realpath(parent), name)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        return place

    def write(self, path, text):
        with open(self.place(path), "w") as f:
            f.write(text)

    def file(self, path, strip=False):
        """A file at its own path; where it is a link, what it leads to."""
        if path in self.done:
            return
        self.done.add(path)
        place = self.place(path)
        if strip:
            subprocess.run(["strip", "--strip-debug", "-o", place, path], check=True)
        else:
            shutil.copy(path, place)

    def program(self, path, strip=False):
        """A program or library, with the libraries that it needs."""
        self.file(path, strip)
        # Of a static one it tells that, and fails.
        listed = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
        for library in re.findall(r"(/\S+) \(0x", listed):
            self.file(library)

    def package(self, name):
        """The programs of an installed Debian package."""
        listed = subprocess.run(["dpkg", "-L", name], check=True, text=True, stdout=subprocess.PIPE)
        for path in listed.stdout.splitlines():
            if re.fullmatch(r"(/usr)?/s?bin/[^/]+", path):
                self.program(path)

    def python(self):
        """Debian's, whichever python3 this is: a script's interpreter may be another."""
        self.program(PYTHON)
        ask = "import sysconfig; print(sysconfig.get_path('stdlib'))"
        library = subprocess.run([PYTHON, "-c", ask], check=True, text=True, stdout=subprocess.PIPE)
        for folder, folders, names in os.walk(library.stdout.strip()):
            folders[:] = [f for f in folders if f not in LEFT_OUT and not f.startswith("config-")]
            for name in names:
                path = f"{folder}/{name}"
                self.program(path) if name.endswith(".so") else self.file(path)

    def pack(self, archive):
        pack_folder(self.folder, archive)


def pack_folder(folder, archive):
    """An initramfs of a folder: the kernel unpacks several, one after another."""
    names = subprocess.run(["find", ".", "-print0"], cwd=folder, check=True, stdout=subprocess.PIPE)
    with open(archive, "ab") as out:
        subprocess.run(["cpio", "--null", "-o", "-H", "newc", "--quiet", "-R", "0:0"],
                       cwd=folder, check=True, input=names.stdout, stdout=out)
