# shellcheck shell=bash
# Names and places of a bed: two nodes (a, b) and a client (c) on one machine. Sourced by hack/nodes and node-init.
#
# Everything of a bed carries its prefix: netns PREFIX-a, -b, -c, -sw; cgroups PREFIX-a, PREFIX-b; the folder $BED.

PREFIX=${TRANSSHIP_BED:-ts}
CONTAINERD=${TRANSSHIP_CONTAINERD:-1.7}
BED=${TRANSSHIP_BED_DIR:-/var/lib/transship-bed}/$PREFIX
NODES="a b"

# host part of an address in 10.77.0.0/16 and fd77::/64
host_of() { case $1 in a) echo 1 ;; b) echo 2 ;; c) echo 9 ;; gw) echo 254 ;; *) die "no such node: $1 (a, b; c is the client)" ;; esac; }
addr4() { echo "10.77.0.$(host_of "$1")"; }
addr6() { echo "fd77::$(host_of "$1")"; }

# the PATH inside a node: our programs, then the bed's containerd and runc, then CRIU
node_path() {
  local d
  d=$(cat "$BED/bin_dir" 2> /dev/null || bin_dir)
  echo "$d:$TRANSSHIP_OPT/containerd-$(cat "$BED/containerd" 2> /dev/null || echo "$CONTAINERD")/bin:$TRANSSHIP_OPT/${TRANSSHIP_CRIU_PREFIX:-criu}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

# the mounted cgroup hierarchies of this machine, one a line: "v1 OPTIONS MOUNTPOINT" or "v2 - MOUNTPOINT"
cgroup_hierarchies() {
  # mountinfo: ... mountpoint ... - fstype source superoptions
  awk '{ for (i = 7; i <= NF; i++) if ($i == "-") break
         if (index($5, "/sys/fs/cgroup") != 1) next
         if ($(i+1) == "cgroup2") print "v2 -", $5
         if ($(i+1) == "cgroup") { o = $(i+3); sub(/^rw,?/, "", o); sub(/^ro,?/, "", o); print "v1", o, $5 } }' /proc/self/mountinfo
}

# pure v2: one hierarchy, mounted at /sys/fs/cgroup itself
cgroup_is_v2() { [ -f /sys/fs/cgroup/cgroup.controllers ]; }

# the node's cgroup folders, as this machine sees them
node_cgroups() {
  local kind opts mp
  while read -r kind opts mp; do echo "$mp/$PREFIX-$1"; done < <(cgroup_hierarchies)
}
