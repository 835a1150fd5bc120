//! The node's end of a container's veth. It is made up but in no bridge, so that the inside has a carrier, complete
//! routes and usable addresses and yet no frame reaches the segment; the release puts it into the bridge.
//!
//! Entering a bridge (without STP) means forwarding at once, while a link that is set up instead takes the kernel's link
//! watch some milliseconds on both sides. The end carries what is still to do in its alias (`ip link` shows it), so no
//! other process needs to be told.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::socket::Netlink;
use super::wire::{self, Request};

const PENDING: &str = "transship pending bridge=";
const ATTACHED: &str = "transship";

/// `struct ifinfomsg` for link `index`, with the flags in `mask` set to `flags`.
pub fn ifinfomsg(index: u32, flags: u32, mask: u32) -> [u8; 16] {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&mask.to_ne_bytes());
    body
}

/// Name of the node's end: `ts` and 12 hexadecimal digits. `attempt` makes another one when it is taken.
pub fn name(netns_path: &str, link: &str, attempt: u32) -> String {
    let digest = Sha256::digest(format!("{netns_path}\0{link}\0{attempt}"));
    digest.iter().take(6).fold(String::from("ts"), |name, byte| format!("{name}{byte:02x}"))
}

/// Hardware address of the node's end: high, because a bridge without an address of its own takes the lowest one of its
/// ports and must not change it when a container comes.
pub fn mac(name: &str) -> [u8; 6] {
    let digest = Sha256::digest(name);
    [0xfe, digest[0], digest[1], digest[2], digest[3], digest[4]]
}

/// A link as far as it matters here.
pub struct Seen {
    pub index: u32,
    pub flags: u32,
    /// Index of the other end or of the lower link.
    pub link: u32,
    /// Whether that is in another namespace.
    pub elsewhere: bool,
    pub name: String,
    pub alias: String,
    pub kind: String,
    pub operstate: u8,
    pub data: Vec<u8>,
}

/// Reads all links of the socket's namespace.
pub fn links(socket: &mut Netlink) -> Result<Vec<Seen>> {
    let all = socket.dump(Request::new(libc::RTM_GETLINK, 0, &[0; 16])).context("listing the links")?;
    Ok(all.iter().filter(|m| m.body.len() >= 16).map(|m| seen(&m.body)).collect())
}

pub(super) fn seen(body: &[u8]) -> Seen {
    let attrs = &body[16..];
    let number = |kind| wire::find(attrs, kind).map(wire::u32_of).unwrap_or(0);
    let string = |kind| wire::find(attrs, kind).map(wire::text).unwrap_or_default();
    let info = wire::find(attrs, libc::IFLA_LINKINFO).unwrap_or_default();
    Seen {
        index: wire::u32_of(&body[4..8]),
        flags: wire::u32_of(&body[8..12]),
        link: number(libc::IFLA_LINK),
        elsewhere: wire::find(attrs, libc::IFLA_LINK_NETNSID).is_some(),
        name: string(libc::IFLA_IFNAME),
        alias: string(libc::IFLA_IFALIAS),
        kind: wire::find(info, libc::IFLA_INFO_KIND).map(wire::text).unwrap_or_default(),
        operstate: wire::find(attrs, libc::IFLA_OPERSTATE).and_then(|v| v.first().copied()).unwrap_or(0),
        data: wire::find(info, libc::IFLA_INFO_DATA).unwrap_or_default().to_vec(),
    }
}

/// Finds the bridge that agent.toml names, and makes sure that it forwards.
pub fn bridge(node: &mut Netlink, name: &str) -> Result<u32> {
    let hint = "see `bridge = \"...\"` in agent.toml";
    let all = links(node)?;
    let Some(found) = all.iter().find(|l| l.name == name) else {
        bail!("this node has no link {name} to attach the container to: {hint}");
    };
    if found.kind != "bridge" {
        bail!("link {name} on this node is not a bridge: {hint}");
    }
    if found.flags & libc::IFF_UP as u32 == 0 {
        bail!("bridge {name} on this node is down: {hint}");
    }
    let value = |kind| wire::find(&found.data, kind).map(wire::u32_of).unwrap_or(0);
    // IFLA_BR_FORWARD_DELAY is 1, IFLA_BR_STP_STATE is 5.
    if value(5) != 0 && value(1) != 0 {
        log::warn!("bridge {name} runs STP: a moved container is cut off until its port forwards");
    }
    Ok(found.index)
}

/// Prepares the node's end `index` for a later [`attach_all`]: tries the bridge once while it is down (the release comes after
/// the commit, where nothing may fail any more), leaves it again, then sets the end up.
pub fn prepare(node: &mut Netlink, index: u32, bridge_index: u32, bridge_name: &str) -> Result<()> {
    let mut set = |flags: u32, fill: &dyn Fn(&mut Request)| {
        let up = libc::IFF_UP as u32;
        let mut request = Request::new(libc::RTM_NEWLINK, 0, &ifinfomsg(index, flags, up));
        fill(&mut request);
        node.request(request)
    };
    set(0, &|m| {
        m.put_str(libc::IFLA_IFALIAS, &format!("{PENDING}{bridge_name}"));
    })
    .context("marking the node's end of the veth")?;
    // No IPv6 address of its own. Refused only where there is no IPv6, where it is not needed.
    let _ = set(0, &|m| addr_gen_none(m));
    set(0, &|m| {
        m.put_u32(libc::IFLA_MASTER, bridge_index);
    })
    .with_context(|| format!("trying whether the veth can enter bridge {bridge_name}"))?;
    set(0, &|m| {
        m.put_u32(libc::IFLA_MASTER, 0);
    })
    .with_context(|| format!("taking the veth out of bridge {bridge_name}"))?;
    set(libc::IFF_UP as u32, &|_| {}).context("setting the node's end of the veth up")
}

/// IFLA_AF_SPEC { AF_INET6 { IFLA_INET6_ADDR_GEN_MODE (8) = none (1) } }.
pub fn addr_gen_none(request: &mut Request) {
    addr_gen_mode(request, 1);
}

/// IFLA_AF_SPEC { AF_INET6 { IFLA_INET6_ADDR_GEN_MODE (8) = mode } }.
pub fn addr_gen_mode(request: &mut Request, mode: u8) {
    request.nest(libc::IFLA_AF_SPEC, |spec| {
        spec.nest(libc::AF_INET6 as u16, |inet6| {
            inet6.put_u8(8, mode);
        });
    });
}

/// The veths in the namespace of `inside`, each with its end in the calling thread's. A veth whose other end is elsewhere is none of
/// ours.
pub fn ends(inside: &mut Netlink) -> Result<Vec<(Seen, Seen)>> {
    let mut outside = links(inside)?;
    outside.retain(|l| l.kind == "veth" && l.elsewhere);
    if outside.is_empty() {
        return Ok(Vec::new());
    }
    let mut all = links(&mut Netlink::route()?)?;
    let mut end_of = |link: &Seen| {
        let found = all.iter().position(|e| e.index == link.link && e.link == link.index && e.kind == "veth");
        found.map(|n| all.swap_remove(n))
    };
    Ok(outside.into_iter().filter_map(|link| end_of(&link).map(|end| (link, end))).collect())
}

/// Names of links by their indexes.
pub type Names = BTreeMap<u32, String>;

/// The names of all links of the socket's namespace.
pub fn names(socket: &mut Netlink) -> Result<Names> {
    Ok(links(socket)?.into_iter().map(|l| (l.index, l.name)).collect())
}

/// Puts the node's ends of all veths in the namespace of `inside` that are still pending into their bridges.
pub fn attach_all(inside: &mut Netlink) -> Result<()> {
    let ends = ends(inside)?;
    if ends.is_empty() {
        return Ok(());
    }
    let mut node = Netlink::route()?;
    let names = names(&mut node)?;
    for (link, end) in ends {
        let Some(bridge) = end.alias.strip_prefix(PENDING) else { continue };
        let Some((master, _)) = names.iter().find(|(_, name)| *name == bridge) else {
            bail!("bridge {bridge} is gone from this node, {} cannot be attached", link.name);
        };
        let mut request = Request::new(libc::RTM_NEWLINK, 0, &ifinfomsg(end.index, 0, 0));
        request.put_u32(libc::IFLA_MASTER, *master).put_str(libc::IFLA_IFALIAS, ATTACHED);
        node.request(request).with_context(|| {
            format!("putting {} (the node's end of {}) into bridge {bridge}", end.name, link.name)
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let a = name("/run/netns/x", "eth0", 0);
        assert_eq!(a.len(), 14, "IFNAMSIZ is 16 with its NUL");
        assert!(a.starts_with("ts") && a[2..].bytes().all(|b| b.is_ascii_hexdigit()));
        assert_ne!(a, name("/run/netns/x", "eth1", 0));
        assert_ne!(a, name("/run/netns/x", "eth0", 1));
        assert_eq!(mac(&a)[0] & 3, 2, "local, not multicast");
    }
}
