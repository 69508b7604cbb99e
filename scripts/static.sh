#!/usr/bin/env bash
# Builds the program, optimised, with libelf and zlib in it, into static/ of
# cargo's target folder; fails if it then needs more than the C library's and
# the compiler's own.
#
#   scripts/static.sh [CARGO'S OPTIONS]
#
# Needs libelf.a and libz.a: Debian's libelf-dev and zlib1g-dev have them.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
# rustc looks for libelf.a in its own folders alone.
LIBBPF_SYS_LIBRARY_PATH=${LIBBPF_SYS_LIBRARY_PATH:-$(pkg-config --variable=libdir libelf)}
export LIBBPF_SYS_LIBRARY_PATH
cargo build --release --locked --features static "$@"

mkdir -p "$target/static"
strip -o "$target/static/vmafx-bypass" "$target/release/vmafx-bypass"
needed=$(readelf --dynamic --wide "$target/static/vmafx-bypass" |
    sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort | xargs)
for library in $needed; do
    case $library in
        ld-linux-*.so.* | libc.so.6 | libm.so.6 | libgcc_s.so.1) ;;
        *) echo "static.sh: the program needs $library" >&2; exit 1 ;;
    esac
done
glibc=$(objdump -T "$target/static/vmafx-bypass" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
echo "$target/static/vmafx-bypass needs $needed, of ${glibc/_/ } or newer" | tr '\n' ' '
echo
