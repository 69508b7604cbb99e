#!/usr/bin/env bash
# Installs a Debian package on this machine's own root, uses it, removes and
# purges it, and looks for what is left. All of it happens on an overlay in a
# mount namespace of its own: nothing of it is seen outside, nor stays.
#
#   unshare --mount --propagation private tests/package/install.sh DEB VERSION
set -euo pipefail
deb=$1 version=$2
here=$(dirname "$0")

fail() { echo "install.sh: $*" >&2; exit 1; }
same() { [ "$1" = "$2" ] || fail "$3: found '$1', not '$2'"; }

mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root /mnt/home
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
for folder in proc sys dev; do mount --rbind /$folder /mnt/root/$folder; done
# A bpffs of its own: the package clears a folder in it.
mount -t bpf bpf /mnt/root/sys/fs/bpf
# Files that are no change of the root's.
mount --bind /mnt/home /mnt/root/mnt
cp "$deb" /mnt/home/package.deb
cp "$here/complete.bash" "$here/complete.zsh" /mnt/home

within() {
    chroot /mnt/root env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/mnt TERM=dumb \
        LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"
}
# Without other packages' triggers: man-db's looks at all pages each time.
package() { within dpkg --no-triggers "$@" >/dev/null; }
owned() { within dpkg-query -W -f '${Status}' vmafx-bypass 2>/dev/null || true; }

same "$(owned)" "" "the package before it is installed"
package --install /mnt/package.deb
same "$(owned)" "install ok installed" "the package"
same "$(within dpkg --verify vmafx-bypass)" "" "changed files"
same "$(within vmafx-bypass --version)" "$version" "--version"
within vmafx-bypass doctor >/mnt/home/doctor || fail "doctor: $(cat /mnt/home/doctor)"

for page in vmafx-bypass vmafx-bypass-read; do
    text=$(MANPAGER=cat within man "$page" 2>&1)
    [[ $text == *"EXIT STATUS"*VMAFX_EBPF_BYPASS* ]] || fail "man $page: $text"
done
engines="auto fuse mmap pread"
same "$(within bash /mnt/complete.bash)" "$engines" "bash completes"
same "$(within fish -c 'complete -C "vmafx-bypass read --engine "' | cut -f 1 | sort | xargs)" \
    "$engines" "fish completes"
[[ $(within timeout 60 zsh -f /mnt/complete.zsh) == *"vmafx-bypass warm --check"* ]] ||
    fail "zsh does not complete"

for unit in vmafx-bypass.service vmafx-bypass.socket; do
    same "$(systemctl --root=/mnt/root is-enabled "$unit" || true)" disabled "$unit"
    page=$(sed -n 's|^Documentation=.*file://||p' "/mnt/root/usr/lib/systemd/system/$unit")
    [ -f "/mnt/root$page" ] || fail "$unit names $page, which is not there"
done

# As an operator would: a mount, numbers for a dashboard, a look, a clip explained.
await() { # what, command …
    local what=$1
    shift
    for _ in $(seq 300); do
        "$@" && return
        sleep 0.1
    done
    fail "$what did not happen; run said: $(cat /mnt/home/run.log 2>/dev/null)"
}
mkdir /mnt/home/source /mnt/home/media /mnt/home/cache
head -c 1M /dev/urandom >/mnt/home/source/clip.y4m
within rclone --config= mount --read-only --vfs-cache-mode full --cache-dir /mnt/cache \
    --daemon /mnt/source /mnt/media
clip=/mnt/root/mnt/media/clip.y4m
await "a mount" test -e "$clip"
cat "$clip" >/dev/null
within env VMAFX_EBPF_BYPASS=1 vmafx-bypass run --prefix /mnt/media --account \
    --metrics=127.0.0.1:0 --no-events 2>/mnt/home/run.log &
await "an address" grep -q "metrics at" /mnt/home/run.log
await "attaching" grep -q "attached by" /mnt/home/run.log
port=$(sed -n 's|^metrics at http://127.0.0.1:\([0-9]*\)/metrics$|\1|p' /mnt/home/run.log)
scrape() {
    exec 8<>"/dev/tcp/127.0.0.1/$port"
    printf 'GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n' >&8
    cat <&8
}
is_told() { [[ $(scrape) == *"vmafx_bypass_tracked_fds 1"* ]]; }
exec 9<"$clip"
await "a number" is_told
[[ $(within vmafx-bypass top --count 1) == *active*/mnt/media/clip.y4m* ]] || fail "top"
[[ $(within vmafx-bypass explain --format json /mnt/media/clip.y4m) == *'"state":"active"'* ]] ||
    fail "explain"
exec 9<&-
kill -TERM "$(within vmafx-bypass dump-map --format json | sed 's/.*"owner":{"pid":\([0-9]*\).*/\1/')"
wait || fail "run: $(cat /mnt/home/run.log)"
grep -q "summary: .* nothing lost" /mnt/home/run.log || fail "run: $(cat /mnt/home/run.log)"
umount /mnt/root/mnt/media

# An upgrade keeps what was set, and so does a removal.
echo "# ours" >>/mnt/root/etc/default/vmafx-bypass
systemctl --root=/mnt/root --quiet enable vmafx-bypass.service
package --install /mnt/package.deb
same "$(systemctl --root=/mnt/root is-enabled vmafx-bypass.service)" enabled "after an upgrade"
package --remove vmafx-bypass
same "$(tail -n 1 /mnt/root/etc/default/vmafx-bypass)" "# ours" "settings after removal"
[ ! -e /mnt/root/usr/bin/vmafx-bypass ] || fail "the program stays"

mkdir /mnt/root/sys/fs/bpf/vmafx-bypass
package --purge vmafx-bypass
same "$(owned)" "" "the package after purging"
[ ! -e /mnt/root/sys/fs/bpf/vmafx-bypass ] || fail "pins stay"
# What the upper folder holds and the root does not: by name, then by content.
cd /mnt/upper
left=$(find . ! -type d ! -path './var/lib/dpkg/*' ! -path './var/log/*' ! -path './var/cache/*')
same "$left" "" "files that are left, or changed"
left=$(find . -type d | while read -r folder; do [ -d "/$folder" ] || echo "$folder"; done)
same "$left" "" "folders that are left"
# Its own journal, and the state before, are dpkg's.
left=$(grep -rl --exclude-dir=log --exclude=status-old vmafx . || true)
same "$left" "" "files that name it"
echo "installed, used, removed and purged"
