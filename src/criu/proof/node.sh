#!/bin/bash
# A node of the proof: its own net, mount, pid, cgroup, uts and ipc namespaces. node.sh NAME SCRATCH COMMAND ...
# Adapted from the test bed's nodes. The cgroup hierarchies are mounted again so that their roots are the node's own.
set -e
name=$1 scratch=$2; shift 2
# pure v2: one hierarchy, mounted at /sys/fs/cgroup itself
hierarchies=(/sys/fs/cgroup/*/)
[ ! -f /sys/fs/cgroup/cgroup.controllers ] || hierarchies=(/sys/fs/cgroup/)
if [ -z "$IN_NODE" ]; then
  for d in "${hierarchies[@]}"; do
    mkdir -p "$d$name"
    [ ! -f "$d/cpuset.cpus" ] || [ ${#hierarchies[@]} = 1 ] || { cat "$d/cpuset.cpus" > "$d$name/cpuset.cpus"; cat "$d/cpuset.mems" > "$d$name/cpuset.mems"; }
  done
  here=$(readlink -f "$0")
  ( for d in "${hierarchies[@]/%/$name}"; do echo $BASHPID > "$d/cgroup.procs"; done
    # v2: a cgroup that gives controllers to children holds no process itself. From here: the node does not see who waits for it
    [ ${#hierarchies[@]} != 1 ] || {
      until [ -d "$hierarchies$name/init" ]; do sleep 0.02; done
      for p in $(cat "$hierarchies$name/cgroup.procs") $(cat "$hierarchies$name/cgroup.procs"); do echo "$p" > "$hierarchies$name/init/cgroup.procs" || true; done
    } 2> /dev/null &
    IN_NODE=1 exec unshare -C -m -n -p -u -i -f --kill-child --propagation private bash "$here" "$name" "$scratch" "$@" ) && rc=0 || rc=$?
  for i in 1 2 3 4 5 6 7 8 9 10; do
    for d in "${hierarchies[@]/%/$name}"; do [ ! -d "$d" ] || find "$d" -depth -type d -exec rmdir {} \; 2>/dev/null || true; done
    ls -d "${hierarchies[@]/%/$name}" >/dev/null 2>&1 || break
    sleep 0.2
  done
  exit $rc
fi
hostname "$name"
mount -t proc proc /proc
for m in $(awk '$3=="cgroup"||$3=="cgroup2"{print $2}' /proc/mounts); do umount -l "$m"; done
umount -l /sys/fs/cgroup 2>/dev/null || true
umount -l /sys
mount -t sysfs sysfs /sys
if [ ${#hierarchies[@]} = 1 ]; then
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  mkdir /sys/fs/cgroup/init
  while [ -n "$(cat /sys/fs/cgroup/cgroup.procs)" ]; do sleep 0.02; done
else
mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
for c in cpu cpuacct cpuset memory devices freezer blkio pids; do
  grep -qw "^$c" /proc/cgroups && mkdir -p /sys/fs/cgroup/$c && mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c || true
done
mkdir -p /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
fi
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns
mount -t tmpfs tmpfs "$scratch"
ip link set lo up
# Not exec: this shell stays pid 1 and reaps what a detached runc leaves.
"$@" && rc=0 || rc=$?
exit $rc
