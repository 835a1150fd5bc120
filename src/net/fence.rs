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
    unless(socket.transaction(&nft::fence()), libc::EEXIST)
        .context("fencing the namespace (nf_tables, table transship)")
}

/// Lifts the fence: for a namespace made by `build` the node's ends enter their bridge first, then, for any namespace,
/// the tables go. Nothing is left behind. `Ok` also when there is no fence.
///
/// Call it from the namespace in which the bridge is: the node's.
pub fn unfence(netns: BorrowedFd<'_>) -> Result<()> {
    let (mut filter, mut route) = netns::inside(netns, || Ok((Netlink::netfilter()?, Netlink::route()?)))?;
    port::attach_all(&mut route)?;
    let both: Vec<_> = nft::FAMILIES.map(nft::delete).into();
    match filter.transaction(&both) {
        // One of them may be missing: each on its own then.
        Err(e) if errno_of(&e) == Some(libc::ENOENT) => {
            for family in nft::FAMILIES {
                unless(filter.transaction(&[nft::delete(family)]), libc::ENOENT)
                    .context("lifting the fence (nf_tables, table transship)")?;
            }
            Ok(())
        }
        other => other.context("lifting the fence (nf_tables, table transship)"),
    }
}

/// Whether the fence stands.
pub fn is_fenced(netns: BorrowedFd<'_>) -> Result<bool> {
    let mut socket = netns::inside(netns, Netlink::netfilter)?;
    for family in nft::FAMILIES {
        match socket.request(nft::get(family)) {
            Ok(()) => {}
            Err(e) if errno_of(&e) == Some(libc::ENOENT) => return Ok(false),
            Err(e) => return Err(e).context("asking for the fence's tables"),
        }
    }
    Ok(true)
}
