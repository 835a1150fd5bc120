# shellcheck shell=bash
# Debian packages without dpkg: a private apt downloads packages and all they depend on, signatures checked as always;
# the machine's own packages are neither asked nor changed. Sourced, never run.

DEB_MIRROR=${DEB_MIRROR:-http://deb.debian.org/debian}
# needed by maintainer scripts only, which never run here
DEB_SKIP='perl*|debconf*|adduser*|passwd*|login*|systemd*|dpkg_*|tar_*|init-system*|libperl*|lsb-*|sysvinit*|cdebconf*'

# debs_fetch DIR SUITE PKG...: the .deb files come to lie in DIR/cache/archives. DEB_ARCHITECTURES: more than amd64, separated by spaces
debs_fetch() {
  local dir=$1 suite=$2 trust='' archs a; shift 2
  archs='APT::Architectures {'
  for a in ${DEB_ARCHITECTURES:-amd64}; do archs+=" \"$a\";"; done
  archs+=' };'
  mkdir -p "$dir"/{state/lists/partial,cache/archives/partial,etc/{apt.conf.d,preferences.d,sources.list.d,trusted.gpg.d}}
  # the Release files of testing and unstable may have run out on a mirror; this waives their date, not their signature
  case $suite in forky | sid) trust=' check-valid-until=no' ;; esac
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg$trust] $DEB_MIRROR $suite main" > "$dir/etc/sources.list"
  : > "$dir/state/status"
  cat > "$dir/apt.conf" <<CONF
Dir::State "$dir/state"; Dir::State::status "$dir/state/status"; Dir::Cache "$dir/cache"; Dir::Etc "$dir/etc";
APT::Install-Recommends "false"; APT::Sandbox::User "root"; APT::Architecture "amd64"; $archs Acquire::Languages "none"; Acquire::Retries "3";
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
#clear APT::Update::Post-Invoke;
CONF
  APT_CONFIG=$dir/apt.conf retry 3 apt-get update -qq >&2
  APT_CONFIG=$dir/apt.conf retry 3 apt-get install -y --download-only "$@" > "$dir/apt.log" 2>&1 || { tail -5 "$dir/apt.log" >&2; return 1; }
}

# debs_unpack DIR ROOT: unpacks what debs_fetch brought; a merged /usr, no documentation
debs_unpack() {
  local dir=$1 root=$2 d deb
  for d in bin sbin lib lib64; do mkdir -p "$root/usr/$d"; ln -sfn "usr/$d" "$root/$d"; done
  for deb in "$dir"/cache/archives/*.deb; do
    # shellcheck disable=SC2254  # DEB_SKIP is a pattern on purpose
    eval "case \$(basename \"\$deb\") in $DEB_SKIP) continue ;; esac"
    dpkg-deb --fsys-tarfile "$deb" | tar -C "$root" --keep-directory-symlink -xf - \
      --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' --exclude='./usr/share/i18n/*'
  done
}

# debs_programs ROOT PROGRAM...: puts the programs into ROOT/bin. runc, crun, criu and checkpointctl get ROOT's own ld.so and libraries,
# so that they run whatever libc the machine has. Patched, not wrapped: runc executes /proc/self/exe again.
# containerd's programs want no more than libc 2.34 and stay as they are (they crash when patched).
debs_programs() {
  local root=$1 p f ld lib=$1/usr/lib/x86_64-linux-gnu; shift
  ld=$lib/ld-linux-x86-64.so.2
  [ -f "$ld" ] || ld=$root/usr/lib64/ld-linux-x86-64.so.2
  rm -f "$root/bin"; mkdir -p "$root/bin"
  for p in "$@"; do
    f=$(readlink -f "$root/usr/sbin/$p" 2>/dev/null || true)
    [ -f "$f" ] || f=$(readlink -f "$root/usr/bin/$p" 2>/dev/null || true)
    [ -f "$f" ] || { say "no $p in the packages under $root"; return 1; }
    cp -f "$f" "$root/bin/$p"
    case $p in
      runc | crun | criu | checkpointctl)
        "$ld" --library-path "$lib" "$root/usr/bin/patchelf" --set-interpreter "$ld" --force-rpath --set-rpath "$lib" "$root/bin/$p" ;;
    esac
    "$root/bin/$p" -h > /dev/null 2>&1 || "$root/bin/$p" --version > /dev/null 2>&1 || { say "$root/bin/$p does not run here"; return 1; }
  done
}
