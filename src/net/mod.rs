//! A container's network namespace: captured, rebuilt, fenced, announced.
//!
//! | file | what lives there |
//! |---|---|
//! | [`config`] | [`NetConfig`] and its parts: what travels between nodes |
//! | [`netns`] | descriptors and paths of namespaces, work done inside one |
//! | [`capture`] | a namespace's links, addresses, routes, rules, neighbours, sysctls read into a `NetConfig` |
//! | [`build`] | a `NetConfig` turned into a new, fenced namespace; and its destruction |
//! | [`links`] | one link made from its description, or put into the state described |
//! | [`routes`] | addresses, neighbours, routes and rules brought to the state described |
//! | [`port`] | the node's end of a container's veth: made unattached, attached at the release |
//! | [`sysctl`] | `/proc/sys/net` read and written as a tree |
//! | [`fence`] | nothing in, nothing out, by a handmade nftables transaction ([`nft`]) |
//! | [`backlog`] | what reaches a fenced namespace, kept and delivered later |
//! | [`announce`] | gratuitous ARP and unsolicited neighbour advertisements ([`packets`]) |
//! | [`kick`] | peers whose retransmission timers have backed off are made to send at once |
//! | [`silence`] | the sockets of a container that has moved end without FIN or RST |
//! | [`repair`] | TCP sockets of other processes, examined from outside |
//! | [`wire`], [`socket`] | netlink messages and a blocking netlink socket |
//!
//! Everything here is synchronous, forks nothing and leaves the calling thread's namespace as it is: what has to
//! happen inside a namespace is done by a short-lived thread, or by a socket that such a thread opened.
//! The calling thread's namespace is taken for the node's: the bridge is looked for there.
//!
//! # The life of a rebuilt namespace
//!
//! ```text
//!   build    netns made -> fenced (nft) -> links, addresses, routes: usable inside; the node's end is NOT in the bridge
//!   (restore in it)
//!   unfence  the node's end enters the bridge -> the nft tables go
//!   announce neighbours and switches learn where the addresses live now
//!   deliver  what came to the fenced source comes here
//!   kick     peers retransmit at once
//! ```
//!
//! While the source still runs, two namespaces with the same IP and MAC exist on one segment. A single frame from the
//! second would divert the first one's traffic, so nothing but the release connects it to the bridge.

pub mod announce;
pub mod backlog;
pub mod build;
pub mod capture;
pub mod config;
pub mod fence;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod kick;
mod links;
pub mod netns;
mod nft;
mod packets;
mod port;
mod repair;
mod routes;
pub mod silence;
mod socket;
mod sysctl;
mod wire;

pub use announce::announce;
pub use backlog::{Backlog, Packet, deliver};
pub use build::{Attach, build, destroy};
pub use capture::capture;
pub use config::NetConfig;
pub use fence::{fence, is_fenced, unfence};
pub use kick::Kick;
pub use netns::{inode, netns_of_pid, open};
pub use silence::{silence, unsilence};

#[cfg(test)]
mod tests;
