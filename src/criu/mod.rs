//! CRIU's RPC, images and gates.
//!
//! | module | what lives there |
//! |---|---|
//! | [`rpc`] | the messages |
//! | [`swrk`] | one CRIU worker process and the talk with it |
//! | [`version`] | finding CRIU, its version |
//! | [`probe`] | can this CRIU dump on this kernel? |
//! | [`log`] | the first error line of a log, and what to do about it |
//! | [`options`] | what a dump is asked for, so that stock `runc restore` takes the result |
//! | [`stdio`] | `descriptors.json` |
//! | [`prepared`] | a worker that waits for a dump |
//! | [`dump`] | the dump itself |
//! | [`kdat`], [`parent`], `conceal`, [`stand_in`] | what CRIU is shown so that it leaves memory alone |
//! | [`page_server`] | CRIU's page server protocol, receiving end |
//! | [`images`] | the destination's memory images, written from the pages of a full dump |
//! | [`plan`], [`mm_image`] | the same after a dump without memory: from the store, some of it left to the page daemon |
//! | [`tar`] | a quick `tar` for CRIU to call |
//! | [`vet`] | images from elsewhere, before CRIU believes them |
//! | [`gate`], [`gate_server`] | holding a stock `runc restore` at two places |
//!
//! Everything here blocks; there is no tokio.

mod cgroup_image;
pub mod conceal;
pub mod dump;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod gate;
pub mod gate_server;
pub mod images;
mod kdat;
mod listing;
pub mod log;
pub mod mm_image;
pub mod options;
pub mod page_server;
mod parent;
pub mod plan;
pub mod prepared;
pub mod probe;
#[cfg(test)]
mod proof;
pub mod rpc;
pub mod stand_in;
pub mod stdio;
pub mod swrk;
pub mod tar;
mod timerfd_image;
pub mod version;
pub mod vet;

pub use dump::{DumpRequest, DumpStats, Listing};
pub use gate_server::GateServer;
pub use images::PageStore;
pub use page_server::{ImageKind, PageEvent};
pub use plan::{EagerPolicy, Plan, Planner};
pub use prepared::{MemoryMode, PreparedDump, Worker};
pub use probe::MemoryModes;
pub use version::{Criu, Version};
