#!/usr/bin/env bash
# Makes a Debian package of the program that cargo has built, optimised; prints
# its path.
#
#   scripts/deb.sh [CARGO-DEB'S OPTIONS]
#
# The program is that in the release folder of CARGO_TARGET_DIR. `make deb`
# builds it before. For another architecture: TRIPLE, Rust's name of it; STRIP;
# and RUNNER, which runs a program of it.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
release=$target/${TRIPLE:+$TRIPLE/}release
package=$release/package
tools=${TOOLS:-$target/tools}
program() { ${RUNNER:-} "$release/vmafx-bypass" "$@"; }

rm -rf "$package"
mkdir -p "$package"
"${STRIP:-strip}" -o "$package/vmafx-bypass" "$release/vmafx-bypass"
program generate man "$package/man"
gzip -9n "$package"/man/*
for shell in bash zsh fish; do
    program generate completions "$shell" >"$package/$shell"
done

# What Debian wants to know of a version, and what users do.
version=$(program -V)
maintainer=$(sed -n 's/^maintainer = "\(.*\)"$/\1/p' Cargo.toml)
# The commit's time, so that a commit gives the same package each time.
time=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
gzip -9n >"$package/changelog.Debian.gz" <<CHANGELOG
vmafx-bypass (${version##* }-1) unstable; urgency=medium

  * Built from revision $(program --version | sed 's/^.*(\([^,]*\),.*$/\1/').

 -- $maintainer  $(date -uRd "@$time")
CHANGELOG
gzip -9n <CHANGELOG.md >"$package/changelog.gz"

SOURCE_DATE_EPOCH=$time "$tools/bin/cargo-deb" --no-build --quiet --locked \
    ${TRIPLE:+--target "$TRIPLE"} "$@"
