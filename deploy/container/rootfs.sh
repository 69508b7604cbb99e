#!/usr/bin/env bash
# Usage: rootfs.sh PROGRAM FOLDER
#
# Lays out all that the image holds: the program, the libraries that it is linked
# to, their packages' records, so that scanners know them, and the names of two
# users. The Dockerfile and the tests call it, so that what is tested is the image.
set -euo pipefail
program=$1 root=$2

install -D -m 755 "$program" "$root/usr/bin/vmafx-bypass"
# All but the line numbers of a release build, which are most of it.
strip --strip-debug "$root/usr/bin/vmafx-bypass"

mkdir -p "$root/var/lib/dpkg/status.d" "$root/etc" "$root/proc" "$root/sys" "$root/dev"
# The libraries, and the loader, as `ldd` names them: lines without a path are the
# kernel's own.
ldd "$program" | grep -o '/[^ ]*' | while read -r library; do
    cp -L --parents "$library" "$root"
    # A package may name the file by /usr/lib or by /lib, which is a link to it.
    owner=$(dpkg -S "$library" 2>/dev/null || dpkg -S "/usr$library")
    package=${owner%%:*}
    dpkg -s "$package" > "$root/var/lib/dpkg/status.d/$package"
done
cp -L /etc/os-release "$root/etc/os-release"
cat > "$root/etc/passwd" <<'PASSWD'
root:x:0:0:root:/:/usr/sbin/nologin
nonroot:x:65532:65532:nonroot:/:/usr/sbin/nologin
PASSWD
cat > "$root/etc/group" <<'GROUP'
root:x:0:
nonroot:x:65532:
GROUP
chmod 755 "$root"
# The same bytes for the same commit, whenever it is built.
find "$root" -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH:-0}" {} +
