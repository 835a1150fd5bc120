//! The node's daemon.

pub mod api;
