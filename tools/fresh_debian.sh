#!/usr/bin/env bash
# Tries the repository on a fresh Debian 12: a chroot made by debootstrap with nothing but the minimal base
# system and git, in which a clone of HEAD is built, run and tested. Needs root and debootstrap.
#   tools/fresh_debian.sh [DIR]      DIR: where the chroot goes (default: a new directory under /tmp)
# Environment: DEBIAN_MIRROR (default http://deb.debian.org/debian), KEEP=1 keeps the chroot,
# SKIP_TEST=1 leaves ./test out.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tools/common.sh"
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
[ "$(id -u)" -eq 0 ] || die "a chroot needs root"
command -v debootstrap >/dev/null || die "debootstrap is not installed (apt-get install debootstrap)"
dir=${1:-$(mktemp -d /tmp/fresh-debian.XXXXXX)}
mkdir -p "$dir"
[ -z "$(ls -A "$dir")" ] || die "$dir is not empty"

mounted=()
clean_up() {
  local status=$? at
  for at in "${mounted[@]}"; do umount -l "$at" || true; done
  if [ -z "${KEEP:-}" ]; then rm -rf --one-file-system "$dir"; else say "kept: $dir"; fi
  exit "$status"
}
trap clean_up EXIT

say "debootstrap bookworm, minimal base and git"
debootstrap --variant=minbase --include=git bookworm "$dir" "$mirror" >"$dir.log" 2>&1 || { tail -n 20 "$dir.log" >&2; die "debootstrap failed"; }
rm -f "$dir.log"
# What an installed machine has and a bare chroot lacks: name resolution, /proc, pseudo-terminals, a user.
cp /etc/resolv.conf "$dir/etc/resolv.conf"
mount -t proc proc "$dir/proc" && mounted+=("$dir/proc")
mkdir -p "$dir/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$dir/dev/pts" && mounted+=("$dir/dev/pts")
rm -f "$dir/dev/ptmx" && ln -s pts/ptmx "$dir/dev/ptmx"
chroot "$dir" useradd -m person
git clone -q --no-hardlinks "$root" "$dir/srv/snapmla"
chroot "$dir" chown -R person /srv/snapmla

# inside USER COMMAND: in the clone, with nothing of this machine's environment.
inside() {
  chroot "$dir" /usr/bin/env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    TERM=dumb su "$1" -s /bin/bash -c "cd /srv/snapmla && $2"
}
timed() {
  local what=$1 start=$SECONDS status=0
  shift
  "$@" || status=$?
  printf 'fresh-debian: %-44s exit %d, %4d s\n' "$what" "$status" "$((SECONDS - start))" | tee -a "$dir/times" >&2
  return "$status"
}

say "as a user without sudo, nothing installed: one clear line is expected"
refusal=$(inside person ./run 2>&1) && die "./run succeeded where it could not install anything"
printf '%s\n' "$refusal"
[ "$(grep -c 'missing' <<<"$refusal")" -eq 1 ] && [ "$(wc -l <<<"$refusal")" -eq 1 ] || die "that was not one clear line"

chroot "$dir" chown -R root /srv/snapmla
timed "./run, nothing preinstalled" inside root ./run
timed "./run again" inside root ./run
[ -n "${SKIP_TEST:-}" ] || timed "./test" inside root ./test
say "times"
cat "$dir/times"
