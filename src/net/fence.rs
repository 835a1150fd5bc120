//! Nothing goes in or out of a namespace while it is fenced: no IP, no ARP, no neighbour discovery. The rules are
//! `nft`'s; the node's end of a rebuilt namespace is `port`'s.

use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};

use super::socket::{Netlink, errno_of, unless};
use super::{netns, nft, port};

/// Fences the namespace `netns`. When it returns, every packet that enters or leaves is dropped, on the loopback too
/// (the two ends of a local connection must not talk while CRIU reads one after the other), except for those that CRIU
/// itself marks. `Ok` also when it is fenced already.
///
/// Needs a kernel with nf_tables for `inet` and `arp`. Forks nothing and takes well below a millisecond.
pub fn fence(netns: BorrowedFd<'_>) -> Result<()> {
    let mut socket = netns::inside(netns, Netlink::netfilter)?;
    let there = present(&mut socket)?;
    if there.len() == nft::FAMILIES.len() {
        return Ok(());
    }
    // What is left of a fence that somebody damaged is replaced.
    let mut messages: Vec<_> = there.into_iter().map(nft::delete).collect();
    messages.extend(nft::fence());
    socket.transaction(&messages).context("fencing the namespace (nf_tables, table transship)")
}

/// Lifts the fence: for a namespace made by `build` the node's ends enter their bridge first, then, for any namespace,
/// the tables go. Nothing is left behind. `Ok` also when there is no fence.
///
/// Call it from the namespace in which the bridge is: the node's.
pub fn unfence(netns: BorrowedFd<'_>) -> Result<()> {
    let (mut filter, mut route) = netns::inside(netns, || Ok((Netlink::netfilter()?, Netlink::route()?)))?;
    port::attach_all(&mut route)?;
    let tables: Vec<_> = present(&mut filter)?.into_iter().map(nft::delete).collect();
    if tables.is_empty() {
        return Ok(());
    }
    let lifted = unless(filter.transaction(&tables), libc::ENOENT);
    // Closing this socket waits some 10 ms for the kernel to free the tables. They are out of effect already.
    let close = std::thread::Builder::new().name("unfenced".into());
    close.spawn(move || drop(filter)).context("starting a thread to close a socket")?;
    lifted.context("lifting the fence (nf_tables, table transship)")
}

/// Whether the fence stands.
pub fn is_fenced(netns: BorrowedFd<'_>) -> Result<bool> {
    Ok(present(&mut netns::inside(netns, Netlink::netfilter)?)?.len() == nft::FAMILIES.len())
}

/// The families that have a table of ours.
fn present(socket: &mut Netlink) -> Result<Vec<u8>> {
    let mut families = Vec::new();
    for family in nft::FAMILIES {
        match socket.request(nft::get(family)) {
            Ok(()) => families.push(family),
            Err(e) if errno_of(&e) == Some(libc::ENOENT) => {}
            Err(e) => return Err(e).context("asking for the fence's tables (nf_tables)"),
        }
    }
    Ok(families)
}
