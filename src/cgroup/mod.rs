//! The cgroup freezer, v1 and v2: where a container's cgroup is, and holding everything in it still. And entering one.
//!
//! | module | what lives there |
//! |---|---|
//! | [`locate`] | `/proc/PID/cgroup` and `mountinfo` read, and the directory that they mean (pure) |
//! | [`freezer`] | freeze, thaw, list, kill |
//! | [`enter`] | CRIU put where crun's restore wants its tasks |
//!
//! Limits, statistics and moving tasks between cgroups are otherwise runc's business.

pub mod enter;
pub mod freezer;
pub mod locate;

pub use enter::{enter, made_by_crun};
pub use freezer::Freezer;
pub use locate::{is_unified, v1_hierarchies};
