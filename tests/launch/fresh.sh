#!/usr/bin/env bash
# From nothing to the end on a bare Debian, as a new user: launch/test.sh fresh
#
#   DEBIAN=trixie   the release: bookworm has Python 3.11, trixie 3.13
#
# debootstrap makes a system with python3, python3-venv and nothing else: no compiler, no git, no pip settings, no GPU, 64 MB of
# shared memory, as in a container. A user without rights gets a clone of the last commit in a folder whose name has a space, and
# runs launch/demo.sh and launch/test.sh fast. Packages come from the public index. Of this machine's settings only those apply
# that say how to reach it: name servers, proxies, certificates. Needs root, 20 GB in $TMPDIR and 25 minutes on two cores.
set -euo pipefail
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/../.."
release=${DEBIAN:-trixie}
refuse() { printf 'fresh: %s\n' "$1" >&2; exit 2; }
say() { printf '\n=== fresh, %d s, %d MB received: %s\n' "$SECONDS" "$((($(received) - start) / 1000000))" "$1"; }
received() { awk '/:/ { sub(/:/, " ") } $1 != "lo" && NR > 2 { sum += $2 } END { printf "%.0f\n", sum }' /proc/net/dev; }

[[ $(id -u) -eq 0 ]] || refuse "only root can make another system; run it as root"
command -v debootstrap unshare git >/dev/null || refuse "needs debootstrap, unshare and git; install them"
start=$(received)
place=$(mktemp -d)
trap 'rm -rf --one-file-system "$place"' EXIT
system=$place/system

say "making a Debian $release"
debootstrap --variant=minbase --include=python3,python3-venv "$release" "$system" >"$place/debootstrap.log" 2>&1 ||
    refuse "debootstrap: $(tail -n 1 "$place/debootstrap.log")"
chroot "$system" useradd --create-home --shell /bin/bash newcomer
folder="/home/newcomer/my work/tandem"
git clone --quiet --no-hardlinks . "$system$folder"
chroot "$system" chown -R newcomer: "/home/newcomer"

settings=(HOME=/home/newcomer USER=newcomer PATH=/usr/local/bin:/usr/bin:/bin FOLDER="$folder")
for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
    [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
done
for name in PIP_CERT SSL_CERT_FILE REQUESTS_CA_BUNDLE; do
    [[ -n ${!name:-} ]] || continue
    cp -L "${!name}" "$system/etc/authorities.crt"
    settings+=("$name=/etc/authorities.crt")
done
cp -L /etc/resolv.conf /etc/hosts "$system/etc/"

# Processes and mounts of their own: what is left running or mounted ends with them.
inside() {
    # shellcheck disable=SC2016 # expanded inside
    unshare --mount --pid --fork --kill-child bash -euo pipefail -c '
        system=$1 && shift
        mount -t proc proc "$system/proc"
        mount -t tmpfs -o mode=755 dev "$system/dev"
        mkdir "$system/dev/shm" "$system/dev/pts"
        mount -t tmpfs -o size=64m,mode=1777 shm "$system/dev/shm"
        mount -t devpts -o newinstance,ptmxmode=0666 devpts "$system/dev/pts"
        for device in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 "$system/dev/${device%:*}" c 1 "${device#*:}"; done
        mknod -m 666 "$system/dev/tty" c 5 0
        ln -s pts/ptmx "$system/dev/ptmx"
        ln -s /proc/self/fd "$system/dev/fd"
        ln -s fd/1 "$system/dev/stdout"
        ln -s fd/2 "$system/dev/stderr"
        exec chroot --userspec=newcomer:newcomer "$system" "$@"
    ' bash "$system" env -i "${settings[@]}" bash -c "cd \"\$FOLDER\" && $1" </dev/null
}

say "$(inside 'python3 --version'), $(inside 'id -un'), $folder"
inside launch/demo.sh
say "the demo is done; launch/test.sh fast"
inside 'launch/test.sh fast'
say "done"
