#!/usr/bin/env bash
# Shows run, dump-map, read and bench on a real rclone mount, which it starts
# itself on loopback and removes again. As root: demo.sh [PROGRAM]
set -euo pipefail

bin=$(realpath "${1:-target/release/vmafx-bypass}")
[ "$(id -u)" -eq 0 ] || { echo "demo: run as root: tracking needs it" >&2; exit 3; }

work=$(mktemp -d "${TMPDIR:-/tmp}/vmafx-bypass-demo.XXXXXX")
pids=()
cleanup() {
    status=$?
    trap - EXIT INT TERM
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
        kill -TERM "${pids[i]}" 2>/dev/null || true
        wait "${pids[i]}" 2>/dev/null || true
    done
    mountpoint -q "$work/mount" && umount -l "$work/mount"
    rm -rf "$work"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
show() { printf '$ %s\n' "$*"; }
await() { # what, command …
    local what=$1
    shift
    for _ in $(seq 200); do
        "$@" && return
        sleep 0.1
    done
    echo "demo: $what did not happen" >&2
    exit 1
}
listening() { (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }

mkdir "$work/source" "$work/mount" "$work/cache"
clip=$work/mount/clip.y4m

step "a clip of raw video, served over HTTP and mounted with rclone's cache"
ffmpeg -v error -f lavfi -i testsrc2=size=1280x720:rate=30 -frames:v 90 \
    -pix_fmt yuv420p "$work/source/clip.y4m"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
rclone --config= serve http --read-only --addr "127.0.0.1:$port" "$work/source" \
    >"$work/serve.log" 2>&1 &
pids+=($!)
await "rclone serve" listening
rclone --config= mount ":http,url='http://127.0.0.1:$port':" "$work/mount" \
    --read-only --vfs-cache-mode full --cache-dir "$work/cache" >"$work/mount.log" 2>&1 &
pids+=($!)
await "rclone mount" mountpoint -q "$work/mount"
await "the clip" test -s "$clip"
stat -c "%s bytes  %n" "$clip"

step "read once through FUSE, so that rclone caches it"
show "sha256sum clip.y4m"
sum=$(sha256sum <"$clip" | cut -d' ' -f1)
echo "$sum"
# rclone 1.74 and newer writes its metadata 5 seconds after the last close.
cached() {
    "$bin" -q read "$clip" --stats=json -o /dev/null 2>&1 | grep -q '"state":"active"'
}
await "caching" cached

step "run: which clips do programs open?"
show "VMAFX_EBPF_BYPASS=1 vmafx-bypass run --prefix $work/mount &"
VMAFX_EBPF_BYPASS=1 "$bin" run --prefix "$work/mount" --pin-dir "/sys/fs/bpf/vmafx-demo-$$" \
    >"$work/run.log" 2>&1 &
run=$!
pids+=("$run")
await "attaching" grep -q "attached" "$work/run.log"

show "ffmpeg -i clip.y4m …, and meanwhile: vmafx-bypass dump-map"
ffmpeg -v error -re -i "$clip" -f null - &
pids+=($!)
await "ffmpeg's open" grep -q "ffmpeg" "$work/run.log"
"$bin" dump-map --pin-dir "/sys/fs/bpf/vmafx-demo-$$"
kill "${pids[-1]}" 2>/dev/null
wait "${pids[-1]}" 2>/dev/null || true
kill -INT "$run"
wait "$run"
echo
show "what run had printed, up to ^C"
cat "$work/run.log"

step "read: the same bytes, past FUSE"
show "vmafx-bypass read clip.y4m --stats | sha256sum"
past=$("$bin" read "$clip" --stats | sha256sum | cut -d' ' -f1)
echo "$past"
[ "$past" = "$sum" ] || { echo "demo: checksums differ" >&2; exit 4; }
echo "equal to what FUSE gave"

step "mount: the same clips at another place, for programs as they are"
mkdir "$work/clips"
show "vmafx-bypass mount --snapshot copy -f $work/mount $work/clips &"
"$bin" -q mount --snapshot copy -f "$work/mount" "$work/clips" >"$work/shown.log" &
shown=$!
pids+=("$shown")
await "mounting" grep -q "is mounted" "$work/shown.log"
cat "$work/shown.log"
TIMEFORMAT='%3R s'
for way in "on rclone's mount:$work/mount" "here, the first time:$work/clips" \
    "here, again:$work/clips"; do
    show "time ffmpeg -i ${way#*:}/clip.y4m -f null -    # ${way%%:*}"
    time ffmpeg -v error -i "${way#*:}/clip.y4m" -f null -
done
again=$(sha256sum <"$work/clips/clip.y4m" | cut -d' ' -f1)
[ "$again" = "$sum" ] || { echo "demo: checksums differ" >&2; exit 4; }
kill -TERM "$shown"
wait "$shown"

step "bench: how much faster?"
show "vmafx-bypass bench clip.y4m --block-size 4KiB,64KiB --runs 5"
"$bin" bench "$clip" --block-size 4KiB,64KiB --runs 5

step "done; unmounting and cleaning up"
