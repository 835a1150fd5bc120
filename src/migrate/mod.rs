//! The migration itself: what two shims say to each other and what each of them does.
//!
//! ```text
//! source                                     destination
//!   Hello (version, id, ticket)        ->
//!                                      <-      Welcome (version chosen)
//!   Manifest                           ->
//!   FREEZE   cgroup frozen, netns fenced, output drained
//!   Pages / Files / Layer / Stdio      ->      page store and images on tmpfs, layer applied
//!   Final                              ->      runc restore; tasks complete, held at the gate
//!                                      <-      Restored | Failed (the source thaws)
//!   Commit                             ->      fence lifted, gate opened, addresses announced
//!                                      <-      Running  (the source's tasks are killed)
//! ```
//!
//! The guarantee: before `Commit` is sent every failure leaves the source running as before; after it the source
//! never runs again unless the destination has said that it aborted.
//!
//! | file | what lives there |
//! |---|---|
//! | [`codec`] | bytes <-> frames: header, caps, checksums |
//! | [`protocol`] | the messages and the choice of a version (pure) |
//! | [`wire`] | a blocking connection that sends and receives frames, with a deadline by silence |
//! | `tls_io` | TLS under it, made for bulk data |
//! | [`source`] | freeze, dump, stream, commit, or roll back |
//! | [`stream`] | the container's state as frames: the same for a peer and for a checkpoint file |
//! | [`destination`] | receive, restore behind the gates, run, or undo |
//! | [`archive`] | a checkpoint file: the same stream, recorded |
//! | [`fault`] | standing still at a named point, for tests (debug builds only) |
//! | [`abort`] | giving up from another thread, up to the commit |
//! | [`report`] | phases, rounds, the freeze item by item, bytes, faults |
//! | [`loss`] | what is said when memory is lost in post-copy |
//! | [`tuning`], [`quantity`] | what the operator chooses, and the rates and durations that are written for it |
//!
//! What does not live here: containerd (the agent's room), runc and stdio (the shim's; both are reached through
//! the two traits [`source::SourceTask`] and [`destination::DestinationTask`]).

pub mod abort;
pub mod archive;
mod arrival;
mod capture;
mod code_pages;
pub mod codec;
mod copier;
pub mod destination;
pub mod fault;
pub mod filling;
mod layers;
mod link;
mod live;
pub mod loss;
mod postcopy;
mod precopy;
mod prepared;
pub mod protocol;
pub mod quantity;
pub mod report;
mod shared;
pub mod source;
mod still;
pub mod stream;
mod tls_io;
pub mod tuning;
pub mod wire;
