#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-2-Clause
#
# Regenerate the CO-RE headers vmlinux/x86_64/vmlinux.h and
# vmlinux/aarch64/vmlinux.h from the BTF inside two Debian 12 kernel packages.
#
# Usage: scripts/vmlinux.sh          (no arguments; about 100 MB of free space
#                                     needed in $TMPDIR, default /tmp)
#
# Runs on Debian 12, as root or not, on either architecture. Packages come
# through apt from the sources the machine already has; apt works on a private
# state directory, so neither the package lists, nor the cache, nor dpkg's
# foreign architectures of the machine are touched. Nothing is installed.
#
# Needs the packages bpftool, lz4 and python3, besides what Debian always has.
# (zstd too, but only for a kernel packed with it, not for those pinned below.)

set -euo pipefail

# The pinned kernel. To bump it: set KERNEL_ABI and KERNEL_VERSION to what
# Debian has, run the script, put the two SHA-256 sums it reports in here and in
# vmlinux/README.md, run it again.
KERNEL_SUITE=bookworm
KERNEL_ABI=6.1.0-50
KERNEL_VERSION=6.1.176-1
SHA256_AMD64=efe19f605b6f54a8352e68d85a629abb2d30b72a085faef603a9152590baa791
SHA256_ARM64=9d41a53f5d687ae1a33cf546d0ed8be955f72e5f9e97b2b4e45e41dff3353b97

PROG=${0##*/}
ROOT=$(cd -- "$(dirname -- "$0")/.." && pwd)
OUT=$ROOT/vmlinux

say() { printf '%s: %s\n' "$PROG" "$*" >&2; }
die() { say "error: $*"; exit 1; }

[ $# -eq 0 ] || die "takes no arguments"

# bpftool lives in /usr/sbin, which is not on every user's path.
PATH=$PATH:/usr/sbin:/sbin
for tool in apt-get apt-cache dpkg-deb tar sha256sum bpftool lz4 python3; do
    command -v "$tool" >/dev/null || die "$tool not found; install it first"
done

WORK=$(mktemp -d)
trap 'rm -rf -- "$WORK"' EXIT
trap 'exit 1' HUP INT TERM

# Everything apt may write goes below $WORK. The file is read after the
# machine's own configuration (-c), so proxies and the like still hold, while
# the hooks that would act on the machine's cache are dropped.
setup_apt() {
    mkdir -p "$WORK/apt/state/lists/partial" "$WORK/apt/cache/archives/partial" \
        "$WORK/apt/log"
    : >"$WORK/apt/state/status"
    cat >"$WORK/apt/apt.conf" <<CONF
#clear APT::Architectures;
APT::Architectures { "amd64"; "arm64"; };
APT::Sandbox::User "root";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages "none";
Dir::State "$WORK/apt/state";
Dir::State::status "$WORK/apt/state/status";
Dir::Cache "$WORK/apt/cache";
Dir::Log "$WORK/apt/log";
CONF
    say "fetching package lists"
    apt-get -c "$WORK/apt/apt.conf" -qq update || die "apt-get update failed"
}

# List what apt has of a package: versions PACKAGE..., as "package | version | source"
versions() {
    apt-cache -c "$WORK/apt/apt.conf" madison "$@" 2>/dev/null
}

# Download and check one kernel package: fetch_deb DEBIAN_ARCH SHA256
# Leaves it in $WORK/DEBIAN_ARCH/, and sets mismatch if the sum is another.
fetch_deb() {
    local arch=$1 want=$2 pkg have
    pkg=linux-image-$KERNEL_ABI-cloud-$arch

    if ! versions "$pkg:$arch" |
        awk -F ' *[|] *' -v v="$KERNEL_VERSION" '$2 == v { ok = 1 } END { exit !ok }'
    then
        say "kernels that apt has for $arch:"
        apt-cache -c "$WORK/apt/apt.conf" pkgnames linux-image- |
            grep -E "^linux-image-[0-9.]+-[0-9]+-cloud-$arch\$" | sort -V |
            while read -r pkg; do versions "$pkg:$arch" >&2 || true; done || true
        die "apt has no $pkg:$arch=$KERNEL_VERSION (suite $KERNEL_SUITE);" \
            "bump KERNEL_ABI and KERNEL_VERSION in $PROG"
    fi

    mkdir -p "$WORK/$arch"
    say "downloading $pkg:$arch=$KERNEL_VERSION"
    (cd "$WORK/$arch" &&
        apt-get -c "$WORK/apt/apt.conf" -qq download "$pkg:$arch=$KERNEL_VERSION") ||
        die "download of $pkg:$arch=$KERNEL_VERSION failed"

    have=$(sha256sum "$WORK/$arch"/*.deb | cut -d ' ' -f 1)
    if [ "$have" != "$want" ]; then
        say "$pkg:$arch has SHA-256 $have, pinned is ${want:-nothing}"
        mismatch=1
    fi
}

# Take the raw BTF out of a kernel image: extract_btf IMAGE BTF_FILE
extract_btf() {
    python3 - "$1" "$2" <<'PYTHON'
import lzma, re, struct, subprocess, sys, zlib


def unpack(data):
    """What one compressed stream holds; any other data as it is."""
    if data.startswith(b"\x1f\x8b\x08"):
        return zlib.decompressobj(wbits=31).decompress(data)
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data)
    # With these two, the last four bytes are the unpacked size, which the
    # kernel's build adds and the tools would trip over.
    if data.startswith(b"\x02\x21\x4c\x18"):
        return pipe(["lz4", "-dcq"], data[:-4])
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return pipe(["zstd", "-dcq"], data[:-4])
    return data


def pipe(command, data):
    try:
        return subprocess.run(command, input=data, check=True,
                              stdout=subprocess.PIPE).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        sys.exit("cannot unpack the kernel: %s" % e)


def kernel(image):
    """The unpacked kernel in an x86 bzImage or an arm64 Image or Image.gz."""
    if image[0x202:0x206] == b"HdrS":
        # x86 boot protocol, 2.08 or later: the payload follows the setup code.
        version, = struct.unpack_from("<H", image, 0x206)
        if version < 0x208:
            sys.exit("bzImage: boot protocol too old")
        setup_sects = image[0x1f1] or 4
        offset, length = struct.unpack_from("<II", image, 0x248)
        start = (setup_sects + 1) * 512 + offset
        data = unpack(image[start:start + length])
        if not data.startswith(b"\x7fELF"):
            sys.exit("bzImage: payload does not unpack to an ELF file")
        return data
    data = unpack(image)
    if data[0x38:0x3c] != b"ARM\x64":
        sys.exit("neither an x86 bzImage nor an arm64 Image")
    return data


def btf_blobs(data):
    """Every stretch of data that is a well-formed little-endian BTF blob."""
    # struct btf_header: magic, version, flags, hdr_len, then
    # type_off, type_len, str_off, str_len, relative to the header's end.
    for match in re.finditer(re.escape(b"\x9f\xeb\x01\x00\x18\0\0\0"), data):
        start = match.start()
        if start + 24 > len(data):
            continue
        type_off, type_len, str_off, str_len = struct.unpack_from("<4I", data, start + 8)
        end = start + 24 + str_off + str_len
        if (type_off == 0 and type_len and type_len % 4 == 0 and str_len
                and str_off == type_len and end <= len(data)
                and data[start + 24 + str_off] == 0 and data[end - 1] == 0):
            yield data[start:end]


with open(sys.argv[1], "rb") as f:
    blobs = list(btf_blobs(kernel(f.read())))
if not blobs:
    sys.exit("no BTF in the kernel image")
with open(sys.argv[2], "wb") as f:
    f.write(max(blobs, key=len))
PYTHON
}

# Make one header: make_header DEBIAN_ARCH HEADER
make_header() {
    local arch=$1 header=$2 dir=$WORK/$1 image
    image=boot/vmlinuz-$KERNEL_ABI-cloud-$arch
    dpkg-deb --fsys-tarfile "$dir"/*.deb | tar -x -C "$dir" -f - "./$image" ||
        die "no $image in the $arch package"
    extract_btf "$dir/$image" "$dir/btf" || die "$arch: cannot get the BTF"
    bpftool btf dump file "$dir/btf" format c >"$header" || die "$arch: bpftool failed"
    grep -q '^struct task_struct {' "$header" || die "$arch: header looks incomplete"
}

mismatch=
setup_apt
fetch_deb amd64 "$SHA256_AMD64"
fetch_deb arm64 "$SHA256_ARM64"
[ -z "$mismatch" ] || die "packages differ from those pinned; nothing written"
make_header amd64 "$WORK/x86_64.h"
make_header arm64 "$WORK/aarch64.h"

# Only now that both are good, replace what is there.
for arch in x86_64 aarch64; do
    mkdir -p "$OUT/$arch"
    install -m 644 "$WORK/$arch.h" "$OUT/$arch/vmlinux.h"
    say "wrote vmlinux/$arch/vmlinux.h ($(wc -c <"$OUT/$arch/vmlinux.h") bytes)"
done
