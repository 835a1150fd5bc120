//! Neighbours and switches learn where a container's addresses live now.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, sendto, socket};

use super::config::NetConfig;
use super::netns;
use super::packets;
use super::port;
use super::socket::Netlink;

/// Pauses before the repetitions: a frame can be lost, and a neighbour can be too busy.
const AGAIN: [Duration; 2] = [Duration::from_millis(40), Duration::from_millis(250)];

struct Out {
    socket: OwnedFd,
    index: u32,
    frames: Vec<Vec<u8>>,
}

/// Announces all addresses of `config` from all links that are up: gratuitous ARP as request and as reply, unsolicited
/// neighbour advertisement with override. Once before it returns, then twice more from a thread of its own.
///
/// Frames go past the fence: call it after `unfence`.
pub fn announce(netns: BorrowedFd<'_>, config: &NetConfig) -> Result<()> {
    let outs = netns::inside(netns, || {
        let links = port::links(&mut Netlink::route()?)?;
        let mut outs = Vec::new();
        for link in &config.links {
            let frames = frames(config, &link.name);
            let Some(found) = links.iter().find(|l| l.name == link.name) else { continue };
            if frames.is_empty() {
                continue;
            }
            let raw = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
                .context("opening a packet socket")?;
            outs.push(Out { socket: raw, index: found.index, frames });
        }
        Ok(outs)
    })?;
    if outs.is_empty() {
        return Ok(());
    }
    send(&outs).context("announcing the container's addresses")?;
    let repeat = move || {
        for pause in AGAIN {
            std::thread::sleep(pause);
            if let Err(error) = send(&outs) {
                // The container may have ended by now.
                log::debug!("announcing again: {error:#}");
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("announce".into())
        .spawn(repeat)
        .context("starting a thread to announce")?;
    Ok(())
}

/// What a link has to say.
pub(super) fn frames(config: &NetConfig, name: &str) -> Vec<Vec<u8>> {
    let Some(link) = config.links.iter().find(|l| l.name == name) else { return Vec::new() };
    let Some(mac) = link.mac.filter(|_| link.up && link.flags & libc::IFF_NOARP as u32 == 0) else {
        return Vec::new();
    };
    let key = format!("ipv6/conf/{name}/forwarding");
    let forwards =
        |tree: &std::collections::BTreeMap<String, String>| tree.get(&key).is_some_and(|v| v != "0");
    let router = forwards(&config.sysctls) || forwards(&config.inherited_sysctls);
    let mut frames = Vec::new();
    for address in &link.addresses {
        match address.address {
            IpAddr::V4(v4) => {
                frames.push(packets::gratuitous_arp(mac.0, v4, false));
                frames.push(packets::gratuitous_arp(mac.0, v4, true));
            }
            IpAddr::V6(v6) => frames.push(packets::neighbour_advertisement(mac.0, v6, router)),
        }
    }
    frames
}

fn send(outs: &[Out]) -> Result<()> {
    for out in outs {
        for frame in &out.frames {
            let address = frame_address(out.index, frame);
            sendto(out.socket.as_raw_fd(), frame, &address, MsgFlags::MSG_DONTWAIT)
                .context("sending a frame")?;
        }
    }
    Ok(())
}

/// Where this frame goes from a packet socket: out of link `index`, to whom and as what its header says.
pub(super) fn frame_address(index: u32, frame: &[u8]) -> nix::sys::socket::LinkAddr {
    let to = [frame[0], frame[1], frame[2], frame[3], frame[4], frame[5]];
    link_address(index, u16::from_ne_bytes([frame[12], frame[13]]), to)
}

/// The address of a packet socket. `protocol` is in network order, as in a frame; link 0 stands for all.
pub(super) fn link_address(index: u32, protocol: u16, to: [u8; 6]) -> nix::sys::socket::LinkAddr {
    use nix::sys::socket::SockaddrLike;
    // SAFETY: sockaddr_ll is plain data for which all zeroes are a value.
    let mut raw: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    raw.sll_family = libc::AF_PACKET as u16;
    raw.sll_protocol = protocol;
    raw.sll_ifindex = index as i32;
    raw.sll_halen = 6;
    raw.sll_addr[..6].copy_from_slice(&to);
    let len = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the pointer is to a complete sockaddr_ll of that length, with its family set.
    unsafe { nix::sys::socket::LinkAddr::from_raw((&raw const raw).cast(), Some(len)) }
        .unwrap_or_else(|| unreachable!("a sockaddr_ll of the family AF_PACKET"))
}
