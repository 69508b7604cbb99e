#!/bin/sh
# A case of matrix.toml, in a guest: `run` on an rclone mount, where there is a
# script in a mount namespace that it has changed: case.sh PROGRAM MODE SCRIPT
set -eu
work=$(mktemp -d)
mkdir "$work/source" "$work/mount"
echo clip >"$work/source/clip"
rclone --config= mount "$work/source" "$work/mount" --read-only --vfs-cache-mode full \
    --cache-dir "$work/cache" >"$work/log" 2>&1 &
trap 'umount -l "$work/mount"; wait' EXIT
tries=0
until mountpoint -q "$work/mount"; do
    [ $((tries += 1)) -lt 300 ] || { cat "$work/log" >&2; exit 99; }
    sleep 0.1
done
set -- "$3" "$1" --quiet run --enable --attach "$2" --duration 200ms --format json \
    --prefix "$work/mount" --pin-dir "/sys/fs/bpf/case-$2"
script=$1
shift
if [ "$script" ]; then
    unshare --mount sh -ec "$script"' exec "$@"' sh "$@"
else
    "$@"
fi
