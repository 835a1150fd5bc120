//! Links made from their description and put into the state described. Their order is decided here too.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result, bail};

use super::capture::LINK_FLAGS;
use super::config::{Attr, Kind, Link, NetConfig};
use super::port::{self, ifinfomsg};
use super::socket::{Netlink, errno_of};
use super::wire::Request;

/// Name -> index, of the links made so far.
pub type Made = BTreeMap<String, u32>;

/// The end on the node of a veth under construction.
pub struct NodeEnd<'a> {
    /// The node's namespace.
    pub netns: BorrowedFd<'a>,
    /// Name of the end.
    pub name: String,
}

/// Indices into `config.links` in an order in which each link's parent comes before it.
///
/// # Errors
/// Names that no link can have, names used twice, parents that do not exist or depend on each other.
pub fn order(config: &NetConfig) -> Result<Vec<usize>> {
    let mut known: BTreeMap<&str, bool> = BTreeMap::new();
    for link in &config.links {
        if !is_name(&link.name) {
            bail!("{:?} is not the name of a link", link.name);
        }
        if known.insert(&link.name, false).is_some() {
            bail!("there are two links named {}", link.name);
        }
    }
    for link in &config.links {
        for other in [&link.master, &parent(link).map(str::to_string)].into_iter().flatten() {
            if !known.contains_key(other.as_str()) {
                bail!("link {} refers to {other}, which is not in the namespace", link.name);
            }
        }
    }
    let mut done = Vec::new();
    while done.len() < config.links.len() {
        let before = done.len();
        for (at, link) in config.links.iter().enumerate() {
            let ready = parent(link).is_none_or(|p| known[p]) || matches!(link.kind, Kind::Veth { .. });
            if ready && !known[link.name.as_str()] {
                known.insert(&link.name, true);
                done.push(at);
            }
        }
        if done.len() == before {
            bail!("links of the namespace depend on each other in a circle");
        }
    }
    Ok(done)
}

/// The kernel's rule (`dev_valid_name`).
fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < libc::IFNAMSIZ
        && !matches!(name, "." | "..")
        && name.bytes().all(|b| b != b'/' && b != b':' && !b.is_ascii_whitespace() && b != 0)
}

/// The link in the same namespace on which this one sits.
fn parent(link: &Link) -> Option<&str> {
    match &link.kind {
        Kind::Veth { peer } => peer.as_deref(),
        Kind::Macvlan { parent, .. } => parent.as_deref(),
        Kind::Vlan { parent, .. } => Some(parent),
        Kind::Loopback | Kind::Dummy | Kind::Bridge { .. } => None,
    }
}

/// Makes `link` (down) by a socket inside the new namespace. With `end`, it is a veth to the node.
pub fn create(
    inside: &mut Netlink,
    config: &NetConfig,
    link: &Link,
    end: Option<&NodeEnd<'_>>,
    made: &Made,
) -> Result<()> {
    let result = inside.request(request(config, link, end, made, true));
    let result = match result {
        // The index may belong to a link that this node's modules put into every namespace.
        Err(e) if matches!(errno_of(&e), Some(libc::EEXIST | libc::EBUSY)) => {
            inside.request(request(config, link, end, made, false))
        }
        other => other,
    };
    result.with_context(|| format!("making link {} of type {}", link.name, link.kind.name()))
}

pub(super) fn request(
    config: &NetConfig,
    link: &Link,
    end: Option<&NodeEnd<'_>>,
    made: &Made,
    keep_index: bool,
) -> Request {
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    let index_of = |link: &Link| if keep_index { link.index } else { 0 };
    let mut request = Request::new(libc::RTM_NEWLINK, flags, &ifinfomsg(index_of(link), 0, 0));
    describe(&mut request, link);
    let options = |m: &mut Request, options: &[Attr]| {
        for option in options {
            m.put(option.kind, &option.value);
        }
    };
    if let Kind::Macvlan { parent: Some(parent), .. } | Kind::Vlan { parent, .. } = &link.kind {
        request.put_u32(libc::IFLA_LINK, made.get(parent).copied().unwrap_or(0));
    }
    // VETH_INFO_PEER (1): struct ifinfomsg and the attributes of the other end.
    request.nest(libc::IFLA_LINKINFO, |info| {
        let kind = if end.is_some() { "veth" } else { link.kind.name() };
        info.put_str(libc::IFLA_INFO_KIND, kind);
        info.nest(libc::IFLA_INFO_DATA, |data| match (&link.kind, end) {
            (_, Some(end)) => {
                data.nest(1, |peer| {
                    peer.raw(&ifinfomsg(0, 0, 0)).put_str(libc::IFLA_IFNAME, &end.name);
                    peer.put(libc::IFLA_ADDRESS, &port::mac(&end.name)).put_u32(libc::IFLA_MTU, link.mtu);
                    peer.put_u32(libc::IFLA_NET_NS_FD, end.netns.as_raw_fd() as u32);
                });
            }
            (Kind::Veth { peer: Some(name) }, None) => {
                if let Some(other) = config.links.iter().find(|l| l.name == *name) {
                    data.nest(1, |peer| {
                        peer.raw(&ifinfomsg(index_of(other), 0, 0));
                        describe(peer, other);
                    });
                }
            }
            (
                Kind::Macvlan { options: o, .. }
                | Kind::Vlan { options: o, .. }
                | Kind::Bridge { options: o },
                None,
            ) => {
                options(data, o);
            }
            _ => {}
        });
    });
    request
}

fn describe(request: &mut Request, link: &Link) {
    request.put_str(libc::IFLA_IFNAME, &link.name).put_u32(libc::IFLA_MTU, link.mtu);
    request.put_u32(libc::IFLA_TXQLEN, link.txqueuelen);
    if let Some(mac) = link.mac {
        request.put(libc::IFLA_ADDRESS, &mac.0);
    }
    let (tx, rx) = link.queues;
    if tx != 0 && rx != 0 {
        request.put_u32(libc::IFLA_NUM_TX_QUEUES, tx).put_u32(libc::IFLA_NUM_RX_QUEUES, rx);
    }
}

/// Gives a link that is down everything but addresses, and no IPv6 address of the kernel's making.
pub fn configure(inside: &mut Netlink, link: &Link, made: &Made) -> Result<()> {
    let index = made[&link.name];
    let mut request = Request::new(libc::RTM_NEWLINK, 0, &ifinfomsg(index, link.flags, LINK_FLAGS));
    request.put_u32(libc::IFLA_GROUP, link.group);
    if link.kind == Kind::Loopback {
        request.put_u32(libc::IFLA_MTU, link.mtu).put_u32(libc::IFLA_TXQLEN, link.txqueuelen);
    }
    if let Some(alias) = &link.alias {
        request.put_str(libc::IFLA_IFALIAS, alias);
    }
    if let Some(master) = &link.master {
        request.put_u32(libc::IFLA_MASTER, made[master]);
    }
    inside.request(request).with_context(|| format!("configuring link {}", link.name))?;
    if link.addr_gen_mode.is_some() {
        let mut request = Request::new(libc::RTM_NEWLINK, 0, &ifinfomsg(index, 0, 0));
        port::addr_gen_none(&mut request);
        inside.request(request).with_context(|| format!("IPv6 of link {}", link.name))?;
    }
    Ok(())
}

/// Sets a link up.
pub fn up(inside: &mut Netlink, link: &Link, made: &Made) -> Result<()> {
    let up = libc::IFF_UP as u32;
    let request = Request::new(libc::RTM_NEWLINK, 0, &ifinfomsg(made[&link.name], up, up));
    inside.request(request).with_context(|| format!("setting link {} up", link.name))
}

/// Restores how IPv6 link-local addresses are made from now on; this way it makes none by itself.
pub fn addr_gen_mode(inside: &mut Netlink, link: &Link, made: &Made) -> Result<()> {
    let Some(mode) = link.addr_gen_mode else { return Ok(()) };
    let mut request = Request::new(libc::RTM_NEWLINK, 0, &ifinfomsg(made[&link.name], 0, 0));
    port::addr_gen_mode(&mut request, mode);
    inside.request(request).with_context(|| format!("IPv6 address generation of link {}", link.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, kind: Kind) -> Link {
        Link {
            name: name.into(),
            index: 1,
            kind,
            mac: None,
            mtu: 1500,
            up: true,
            flags: 0,
            txqueuelen: 0,
            queues: (0, 0),
            group: 0,
            alias: None,
            master: None,
            addr_gen_mode: None,
            addresses: vec![],
        }
    }

    fn config(links: Vec<Link>) -> NetConfig {
        NetConfig { links, ..NetConfig::default() }
    }

    fn vlan(name: &str, parent: &str) -> Link {
        link(name, Kind::Vlan { parent: parent.into(), options: vec![] })
    }

    #[test]
    fn parents_come_first() {
        let c = config(vec![vlan("a.1", "a.0"), vlan("a.0", "a"), link("a", Kind::Dummy)]);
        assert_eq!(order(&c).unwrap(), [2, 1, 0]);
    }

    #[test]
    fn nonsense_is_refused() {
        let refused = |links, part: &str| {
            let error = order(&config(links)).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refused(vec![vlan("a", "b"), vlan("b", "a")], "circle");
        refused(vec![vlan("a", "b")], "refers to b");
        refused(vec![link("a", Kind::Dummy), link("a", Kind::Dummy)], "two links named a");
        for name in ["", "..", "a/b", "a b", "0123456789abcdef"] {
            refused(vec![link(name, Kind::Dummy)], "not the name of a link");
        }
    }
}
