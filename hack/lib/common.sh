# shellcheck shell=bash
# Shared by every script in hack/: where things are, how to speak, how to fail. Sourced, never run.
# Does not live here: private apt (debs.sh), the layout of a bed (bed.sh).

set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Everything that hack/setup unpacks (containerd, runc, CRIU in their versions) lies here; dpkg knows nothing of it.
TRANSSHIP_OPT=${TRANSSHIP_OPT:-/opt/transship}
# Downloads and images, rebuilt whenever missing.
TRANSSHIP_CACHE=${TRANSSHIP_CACHE:-/var/cache/transship}
# rustup's shims are not on root's PATH in a non-login shell
[ ! -d "${CARGO_HOME:-$HOME/.cargo}/bin" ] || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
# a plain `su` on Debian leaves sbin out, where ip, nft and runc are
case :$PATH: in *:/usr/sbin:*) ;; *) PATH=$PATH:/usr/sbin:/sbin ;; esac
export PATH

ME=$(basename "$0")
say() { printf '%s: %s\n' "$ME" "$*" >&2; }
die() { say "error: $*"; exit 1; }

# retry N CMD...: package mirrors and apt locks fail for a moment now and then
retry() {
  local n=$1 i; shift
  for ((i = 1; i <= n; i++)); do
    "$@" && return 0
    [ "$i" = "$n" ] || { say "failed ($i of $n), trying again: $*"; sleep $((i * 2)); }
  done
  return 1
}

need_root() { [ "$(id -u)" = 0 ] || die "must run as root (namespaces, mounts, cgroups)"; }

# exclusively LOCKNAME CMD...: two scripts at once must not unpack the same thing
exclusively() {
  local f=$TRANSSHIP_CACHE/$1.lock; shift
  mkdir -p "$TRANSSHIP_CACHE"
  ( flock 9; "$@" ) 9>"$f"
}

# the folder with our built programs: the newer of release and debug, unless TRANSSHIP_BIN_DIR names one
bin_dir() {
  local t=${CARGO_TARGET_DIR:-$REPO/target} d
  [ -z "${TRANSSHIP_BIN_DIR:-}" ] || { readlink -f "$TRANSSHIP_BIN_DIR"; return; }
  d=$t/debug
  [ ! -x "$t/release/transship" ] || [ "$t/debug/transship" -nt "$t/release/transship" ] || d=$t/release
  echo "$d"
}
