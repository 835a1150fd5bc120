//! The cgroup freezer, v1 and v2: where a container's cgroup is, and holding everything in it still.
//!
//! | module | what lives there |
//! |---|---|
//! | [`locate`] | `/proc/PID/cgroup` and `mountinfo` read, and the directory that they mean (pure) |
//! | [`freezer`] | freeze, thaw, list, kill |
//!
//! Limits, statistics and moving tasks between cgroups are runc's business.

pub mod freezer;
pub mod locate;

pub use freezer::Freezer;
pub use locate::{is_unified, v1_hierarchies};
