//! The cgroup freezer, v1 and v2.
