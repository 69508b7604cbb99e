#!/usr/bin/env bash
# Builds for arm64 on Debian for amd64: `cargo ARGS... --target …`, with Debian's
# cross compiler and its libraries for arm64.
#
#   scripts/arm64.sh build --release --locked
#   scripts/arm64.sh test --locked --lib --bins      runs them by QEMU's emulation
#
# docs/INSTALL.md tells what must be installed; nothing is, by this.
set -euo pipefail
cd "$(dirname "$0")/.."

triple=aarch64-unknown-linux-gnu
libraries=/usr/lib/aarch64-linux-gnu

need() { [ -e "$1" ] || { echo "arm64.sh: \`$1\` is missing: $2" >&2; exit 3; }; }
need /usr/bin/aarch64-linux-gnu-gcc "install gcc-aarch64-linux-gnu"
need $libraries/libelf.so "dpkg --add-architecture arm64, and install libelf-dev:arm64"
need $libraries/libz.so "dpkg --add-architecture arm64, and install zlib1g-dev:arm64"
need "$("${RUSTC:-rustc}" --print sysroot)/lib/rustlib/$triple/lib" \
    "add the target to Rust: rustup target add $triple, or libstd-rust-web-dev:arm64 with RUSTC=/usr/bin/rustc"

if [ "$1" != build ]; then
    need /usr/bin/qemu-aarch64-static "install qemu-user-static"
fi

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64-static
export LIBBPF_SYS_LIBRARY_PATH_aarch64_unknown_linux_gnu=$libraries
command=$1
shift
exec cargo "$command" --target $triple "$@"
