//! What we ask of containerd over gRPC. Works with 1.7 and 2.x.
//!
//! | file | what lives there |
//! |---|---|
//! | [`client`] | the connection, namespaces, leases' header, errors |
//! | [`record`] | container records, in the form in which they travel |
//! | [`task`] | tasks |
//! | [`image`] | image records and the blobs that one image needs |
//! | [`content`] | blobs: info, read, write |
//! | [`snapshot`] | snapshots and their mounts |
//! | [`unpack`] | layers to snapshots, as containerd's own unpacker makes them |
//! | [`lease`] | leases, which keep what is being made from the garbage collector |
//! | [`event`] | events |
//!
//! No decision about a migration is taken here; see [`crate::agent`].

pub mod client;
pub mod content;
pub mod event;
pub mod image;
pub mod lease;
pub mod record;
pub mod snapshot;
pub mod task;
pub mod unpack;

pub use client::{Containerd, Namespace, is_already_exists, is_not_found};
