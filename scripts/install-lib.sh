#!/usr/bin/env bash
# Installs the library for C: shared, static, header, pkg-config file.
#
#   DESTDIR=… PREFIX=/usr/local LIBDIR=$PREFIX/lib scripts/install-lib.sh FOLDER
#
# FOLDER is where cargo has built it. `make install-lib` does both.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: ${0##*/} FOLDER" >&2; exit 2; }
built=$(realpath "$1")
cd "$(dirname "$0")/.."

prefix=${PREFIX:-/usr/local}
libdir=${LIBDIR:-$prefix/lib}
to=${DESTDIR:-}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
abi=$(sed -n 's/^#define VMAFX_ABI_VERSION //p' capi/include/vmafx_bypass.h)

install -D -m 755 "$built/libvmafx_bypass.so" "$to$libdir/libvmafx_bypass.so.$abi"
ln -sf "libvmafx_bypass.so.$abi" "$to$libdir/libvmafx_bypass.so"
install -D -m 644 "$built/libvmafx_bypass.a" "$to$libdir/libvmafx_bypass.a"
install -D -m 644 capi/include/vmafx_bypass.h "$to$prefix/include/vmafx_bypass.h"
install -d "$to$libdir/pkgconfig"
sed -e "s|@PREFIX@|$prefix|; s|@LIBDIR@|$libdir|; s|@VERSION@|$version|" \
    capi/vmafx_bypass.pc.in >"$to$libdir/pkgconfig/vmafx_bypass.pc"
