//! A namespace's configuration read by netlink and from `/proc/sys/net`. Changes nothing.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, bail};

use super::config::{Address, Attr, Hop, Kind, Link, Mac, Neighbour, NetConfig, Route, Rule};
use super::port::{self, Names};
use super::socket::{Netlink, errno_of};
use super::sysctl::{self, Tree};
use super::wire::{self, Message, Request, attributes, find, text, u32_of};
use super::{netns, nft};

/// Link flags that a user can set, apart from `IFF_UP`.
pub(super) const LINK_FLAGS: u32 = (libc::IFF_DEBUG
    | libc::IFF_NOARP
    | libc::IFF_PROMISC
    | libc::IFF_ALLMULTI
    | libc::IFF_MULTICAST
    | libc::IFF_DYNAMIC) as u32;

/// Address flags that a user can set: HOMEADDRESS, MANAGETEMPADDR, NOPREFIXROUTE, MCAUTOJOIN. NODAD is set on every
/// rebuilt address, TENTATIVE and the like are states.
const ADDRESS_FLAGS: u32 = 0x10 | 0x100 | 0x200 | 0x400;

const IFA_F_DADFAILED: u32 = 0x08;
const FOREVER: u32 = u32::MAX;
/// The unit of `rta_cacheinfo.rta_expires`: clock ticks, 100 a second towards user space.
const USER_HZ: u32 = 100;

/// Reads the configuration of `netns`: links, addresses, routes, rules, permanent neighbours, sysctls.
///
/// # Errors
/// A link of a type that cannot be rebuilt elsewhere; the message names it.
pub fn capture(netns: BorrowedFd<'_>) -> Result<NetConfig> {
    // What a new namespace is born with on this machine, to tell what was changed in this one.
    let (born, born_links) =
        netns::inside_fresh(|| Ok((sysctl::read(), port::names(&mut Netlink::route()?)?)))
            .context("reading the defaults of a fresh network namespace")?;
    let (mut route, mut filter, tree, legacy) = netns::inside(netns, || {
        Ok((Netlink::route()?, Netlink::netfilter()?, sysctl::read(), legacy_tables()))
    })?;

    let born_links = born_links.into_values().collect();
    let (mut links, names) = read_links(&mut route, &born_links)?;
    let dump = |socket: &mut Netlink, kind, body: &[u8]| socket.dump(Request::new(kind, 0, body));
    for message in dump(&mut route, libc::RTM_GETADDR, &[0; 8]).context("listing the addresses")? {
        if let Some((index, address)) = address(&message.body, &names)
            && let Some(link) = links.iter_mut().find(|l| l.index == index)
        {
            link.addresses.push(address);
        }
    }
    let sysctls_of = |tree: Tree| -> Tree {
        let keep =
            |key: &String| sysctl::link_of(key).is_none_or(|name| links.iter().any(|l| l.name == name));
        tree.into_iter().filter(|(key, _)| keep(key)).collect()
    };
    let (sysctls, inherited_sysctls) = sysctl::split(sysctls_of(tree), &born);
    let mut firewall = legacy;
    firewall.extend(tables(&mut filter)?);
    let mut config = NetConfig { links, sysctls, inherited_sysctls, firewall, ..NetConfig::default() };
    config.routes = routes(&mut route, &names)?;
    config.rules = rules(&mut route)?;
    config.neighbours = neighbours(&mut route, &names)?;
    Ok(config)
}

fn read_links(socket: &mut Netlink, born: &BTreeSet<String>) -> Result<(Vec<Link>, Names)> {
    let all = socket.dump(Request::new(libc::RTM_GETLINK, 0, &[0; 16])).context("listing the links")?;
    let bodies: Vec<&[u8]> = all.iter().map(|m| m.body.as_slice()).filter(|b| b.len() >= 16).collect();
    let name = |body: &[u8]| find(&body[16..], libc::IFLA_IFNAME).map(text).unwrap_or_default();
    let names: Names = bodies.iter().map(|b| (u32_of(&b[4..8]), name(b))).collect();
    let mut links = Vec::new();
    for body in bodies {
        match link(body, &names) {
            Ok(link) => links.push(link),
            // Tunnel modules put an unused link (tunl0, sit0, ...) into every namespace.
            Err(_) if born.contains(&name(body)) && u32_of(&body[8..12]) & libc::IFF_UP as u32 == 0 => {}
            Err(e) => return Err(e),
        }
    }
    links.sort_by_key(|l| l.index);
    Ok((links, names))
}

/// A link from `struct ifinfomsg` and its attributes.
pub(super) fn link(body: &[u8], names: &Names) -> Result<Link> {
    let attrs = &body[16..];
    let (index, flags) = (u32_of(&body[4..8]), u32_of(&body[8..12]));
    let number = |kind| find(attrs, kind).map(u32_of).unwrap_or(0);
    let name = find(attrs, libc::IFLA_IFNAME).map(text).unwrap_or_default();
    let info = find(attrs, libc::IFLA_LINKINFO).unwrap_or_default();
    let data = find(info, libc::IFLA_INFO_DATA).unwrap_or_default();
    let kept = |allowed: &[u16]| -> Vec<Attr> {
        attributes(data).filter(|(k, _)| allowed.contains(k)).map(|(k, v)| Attr::new(k, v)).collect()
    };
    let inside = find(attrs, libc::IFLA_LINK_NETNSID).is_none();
    let lower = inside.then(|| names.get(&number(libc::IFLA_LINK)).cloned()).flatten();
    let master = names.get(&number(libc::IFLA_MASTER)).cloned();
    let kind = match find(info, libc::IFLA_INFO_KIND).map(text).as_deref() {
        None if flags & libc::IFF_LOOPBACK as u32 != 0 => Kind::Loopback,
        None => bail!("link {name} is a device of the machine, which cannot be moved"),
        Some("veth") => Kind::Veth { peer: lower },
        // IFLA_MACVLAN_MODE, _FLAGS, _BC_QUEUE_LEN: the others are counters.
        Some("macvlan") => Kind::Macvlan { parent: lower, options: kept(&[1, 2, 7]) },
        Some("dummy") => Kind::Dummy,
        // FORWARD_DELAY .. GROUP_FWD_MASK, MCAST_SNOOPING, NF_CALL_*, VLAN_DEFAULT_PVID: the others are states.
        Some("bridge") => {
            let mut options = kept(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 36, 37, 38, 39]);
            // "No VLAN filtering" is refused by kernels that have none.
            options.retain(|o| !(o.kind == 7 && o.value == [0]));
            Kind::Bridge { options }
        }
        Some("vlan") => match lower {
            // IFLA_VLAN_ID, _FLAGS, _EGRESS_QOS, _INGRESS_QOS, _PROTOCOL.
            Some(parent) => Kind::Vlan { parent, options: kept(&[1, 2, 3, 4, 5]) },
            None => bail!("link {name} is a VLAN on a link outside of the namespace, which cannot be moved"),
        },
        Some(other) => bail!(
            "link {name} is of type {other}, which cannot be moved (supported: veth, macvlan, vlan, bridge, dummy)"
        ),
    };
    let address = find(attrs, libc::IFLA_ADDRESS).and_then(|v| v.try_into().ok()).map(Mac);
    let inet6 = find(attrs, libc::IFLA_AF_SPEC).and_then(|spec| find(spec, libc::AF_INET6 as u16));
    let link = Link {
        index,
        mac: address.filter(|_| kind != Kind::Loopback),
        mtu: number(libc::IFLA_MTU),
        up: flags & libc::IFF_UP as u32 != 0,
        flags: flags & LINK_FLAGS,
        txqueuelen: number(libc::IFLA_TXQLEN),
        queues: (number(libc::IFLA_NUM_TX_QUEUES), number(libc::IFLA_NUM_RX_QUEUES)),
        group: number(libc::IFLA_GROUP),
        alias: find(attrs, libc::IFLA_IFALIAS).map(text),
        // IFLA_INET6_ADDR_GEN_MODE
        addr_gen_mode: inet6.and_then(|i| find(i, 8)).and_then(|v| v.first().copied()),
        addresses: Vec::new(),
        kind,
        master,
        name,
    };
    if link.needs_attachment()
        && let Some(master) = &link.master
    {
        bail!(
            "link {} is a port of {master} and its other end lies in another namespace: a container with containers \
             in it cannot be moved",
            link.name
        );
    }
    Ok(link)
}

pub(super) fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        _ => None,
    }
}

/// An address from `struct ifaddrmsg` { family, prefixlen, flags, scope, u32 index } and its attributes.
pub(super) fn address(body: &[u8], names: &Names) -> Option<(u32, Address)> {
    if body.len() < 8 {
        return None;
    }
    let (attrs, index) = (&body[8..], u32_of(&body[4..8]));
    // IFA_FLAGS (8) has all of them, the byte in the header the first eight.
    let flags = find(attrs, 8).map(u32_of).unwrap_or(u32::from(body[2]));
    if flags & IFA_F_DADFAILED != 0 {
        return None; // a duplicate: not in use
    }
    let other = find(attrs, libc::IFA_ADDRESS).and_then(ip)?;
    // Without IFA_LOCAL (IPv6, no peer) IFA_ADDRESS is the address; with it, the other end's if that differs.
    let own = find(attrs, libc::IFA_LOCAL).and_then(ip).unwrap_or(other);
    let cache = find(attrs, libc::IFA_CACHEINFO).filter(|c| c.len() >= 8);
    let lifetime = cache.map(|c| (u32_of(&c[4..8]), u32_of(&c[..4]))).filter(|l| *l != (FOREVER, FOREVER));
    let label = find(attrs, libc::IFA_LABEL).map(text);
    Some((
        index,
        Address {
            address: own,
            peer: (other != own).then_some(other),
            prefix: body[1],
            scope: body[3],
            flags: flags & ADDRESS_FLAGS,
            broadcast: find(attrs, libc::IFA_BROADCAST).and_then(ip),
            label: label.filter(|l| names.get(&index) != Some(l)),
            metric: find(attrs, 9).map(u32_of),
            protocol: find(attrs, 11).and_then(|v| v.first().copied()).filter(|p| *p != 0),
            lifetime,
        },
    ))
}

/// All routes of both families.
pub(super) fn routes(socket: &mut Netlink, names: &Names) -> Result<Vec<Route>> {
    Ok(both(socket, libc::RTM_GETROUTE, "routes", 12)?.iter().filter_map(|m| route(&m.body, names)).collect())
}

/// All rules of both families.
pub(super) fn rules(socket: &mut Netlink) -> Result<Vec<Rule>> {
    Ok(both(socket, libc::RTM_GETRULE, "policy rules", 12)?.iter().filter_map(|m| rule(&m.body)).collect())
}

/// Permanent neighbours and proxy entries of both families.
pub(super) fn neighbours(socket: &mut Netlink, names: &Names) -> Result<Vec<Neighbour>> {
    let mut all = both(socket, libc::RTM_GETNEIGH, "neighbours", 12)?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut body = [0; 12];
        (body[0], body[10]) = (family as u8, libc::NTF_PROXY);
        all.extend(supported(socket.dump(Request::new(libc::RTM_GETNEIGH, 0, &body)))?);
    }
    Ok(all.iter().filter_map(|m| neighbour(&m.body, names)).collect())
}

/// Dumps `kind` for IPv4 and IPv6, whose requests begin with the family and have `len` bytes.
fn both(socket: &mut Netlink, kind: u16, what: &str, len: usize) -> Result<Vec<Message>> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut body = vec![0; len];
        body[0] = family as u8;
        let answer = socket.dump(Request::new(kind, 0, &body));
        all.extend(supported(answer).with_context(|| format!("listing the {what}"))?);
    }
    // Where the kernel has no IPv6, or no such table, it answers for all families.
    all.retain(|m| m.body.len() >= len && matches!(i32::from(m.body[0]), libc::AF_INET | libc::AF_INET6));
    Ok(all)
}

fn supported(answer: Result<Vec<Message>>) -> Result<Vec<Message>> {
    match answer {
        Err(e) if matches!(errno_of(&e), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => Ok(Vec::new()),
        other => other,
    }
}

/// `RTNH_F_ONLINK`; the other next-hop flags are states.
const ONLINK: u32 = 4;
/// `RTM_F_CLONED`: a cache entry.
const CLONED: u32 = 0x200;

/// A route from `struct rtmsg` { family, dst_len, src_len, tos, table, protocol, scope, type, u32 flags }.
pub(super) fn route(body: &[u8], names: &Names) -> Option<Route> {
    let flags = u32_of(&body[8..12]);
    if flags & CLONED != 0 {
        return None;
    }
    let mut route = Route {
        family: body[0],
        dst_len: body[1],
        src_len: body[2],
        tos: body[3],
        table: u32::from(body[4]),
        protocol: body[5],
        scope: body[6],
        kind: body[7],
        flags: flags & ONLINK,
        dev: None,
        hops: Vec::new(),
        expires: None,
        attrs: Vec::new(),
    };
    for (kind, value) in attributes(&body[12..]) {
        match kind {
            libc::RTA_TABLE => route.table = u32_of(value),
            libc::RTA_OIF => route.dev = names.get(&u32_of(value)).cloned(),
            libc::RTA_MULTIPATH => route.hops = hops(value, names),
            // struct rta_cacheinfo: clntref, lastuse, expires, error, used, ...
            libc::RTA_CACHEINFO => {
                let ticks = value.get(8..12).map(u32_of).unwrap_or(0) as i32;
                route.expires = (ticks > 0).then(|| (ticks as u32).div_ceil(USER_HZ));
            }
            // RTA_NH_ID (30): next hop objects stay behind, the kernel lists what they mean beside them.
            30 | libc::RTA_MFC_STATS | libc::RTA_EXPIRES | libc::RTA_PAD => {}
            _ => route.attrs.push(Attr::new(kind, value)),
        }
    }
    route.attrs.sort();
    Some(route)
}

/// `struct rtnexthop` { u16 len, u8 flags, u8 hops, i32 ifindex } and attributes, repeated.
fn hops(mut bytes: &[u8], names: &Names) -> Vec<Hop> {
    let mut all = Vec::new();
    while bytes.len() >= 8 {
        let len = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        if len < 8 || len > bytes.len() {
            break;
        }
        all.push(Hop {
            dev: names.get(&u32_of(&bytes[4..8])).cloned(),
            flags: bytes[2] & ONLINK as u8,
            weight: bytes[3],
            attrs: attributes(&bytes[8..len]).map(|(k, v)| Attr::new(k, v)).collect(),
        });
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
    all
}

/// `FIB_RULE_INVERT`, the one flag that is not a state.
const RULE_INVERT: u32 = 2;

/// A rule from `struct fib_rule_hdr` { family, dst_len, src_len, tos, table, res1, res2, action, u32 flags }.
pub(super) fn rule(body: &[u8]) -> Option<Rule> {
    const FRA_TABLE: u16 = 15;
    let attrs = &body[12..];
    let mut rest: Vec<Attr> =
        attributes(attrs).filter(|(k, _)| *k != FRA_TABLE).map(|(k, v)| Attr::new(k, v)).collect();
    rest.sort();
    Some(Rule {
        family: body[0],
        dst_len: body[1],
        src_len: body[2],
        tos: body[3],
        table: find(attrs, FRA_TABLE).map(u32_of).unwrap_or(u32::from(body[4])),
        action: body[7],
        flags: u32_of(&body[8..12]) & RULE_INVERT,
        attrs: rest,
    })
}

/// A neighbour from `struct ndmsg` { family, pad, u16 pad, i32 ifindex, u16 state, u8 flags, u8 type }.
pub(super) fn neighbour(body: &[u8], names: &Names) -> Option<Neighbour> {
    let state = u16::from_ne_bytes([body[8], body[9]]);
    let proxy = body[10] & libc::NTF_PROXY != 0;
    if !proxy && state & libc::NUD_PERMANENT == 0 {
        return None;
    }
    let attrs = &body[12..];
    Some(Neighbour {
        dev: names.get(&u32_of(&body[4..8])).cloned(),
        address: find(attrs, libc::NDA_DST).and_then(ip)?,
        mac: find(attrs, libc::NDA_LLADDR).and_then(|v| v.try_into().ok()).map(Mac),
        proxy,
        flags: body[10] & libc::NTF_ROUTER,
    })
}

/// nftables tables other than our own, as `family name`.
fn tables(socket: &mut Netlink) -> Result<Vec<String>> {
    let all = match socket.dump(nft::list()) {
        Ok(all) => all,
        // No nf_tables in this kernel; `fence` will say so.
        Err(e) if errno_of(&e).is_some() => return Ok(Vec::new()),
        Err(e) => return Err(e).context("listing the nftables tables"),
    };
    Ok(all
        .iter()
        .filter(|m| m.body.len() >= 4)
        .map(|m| (m.body[0], find(&m.body[4..], 1).map(wire::text).unwrap_or_default()))
        .filter(|(_, name)| name != nft::TABLE)
        .map(|(family, name)| format!("{} {name}", nft::family_name(family)))
        .collect())
}

/// Tables of the older iptables in the calling thread's namespace, as `family-legacy name`.
fn legacy_tables() -> Vec<String> {
    let mut all = Vec::new();
    for (file, family) in [("ip_tables_names", "ip"), ("ip6_tables_names", "ip6")] {
        let names = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        all.extend(names.lines().map(|name| format!("{family}-legacy {name}")));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attrs(fill: impl FnOnce(&mut Request)) -> Vec<u8> {
        let mut request = Request::new(0, 0, &[]);
        fill(&mut request);
        request.finish(0)[wire::HEADER..].to_vec()
    }

    fn link_body(flags: i32, fill: impl FnOnce(&mut Request)) -> Vec<u8> {
        let mut body = super::super::port::ifinfomsg(7, flags as u32, 0).to_vec();
        body.extend(attrs(fill));
        body
    }

    fn kind(name: &str) -> impl FnOnce(&mut Request) {
        move |m| {
            m.put_str(libc::IFLA_IFNAME, "x0").put_u32(libc::IFLA_LINK, 3).nest(libc::IFLA_LINKINFO, |i| {
                i.put_str(libc::IFLA_INFO_KIND, name);
            });
        }
    }

    #[test]
    fn a_link_that_cannot_be_moved_is_named() {
        let error = link(&link_body(0, kind("wireguard")), &Names::new()).unwrap_err().to_string();
        assert!(error.contains("link x0 is of type wireguard"), "{error}");
        let device = link_body(0, |m| {
            m.put_str(libc::IFLA_IFNAME, "enp1s0");
        });
        let error = link(&device, &Names::new()).unwrap_err().to_string();
        assert!(error.contains("enp1s0 is a device of the machine"), "{error}");
    }

    #[test]
    fn a_veth_is_attached_unless_its_other_end_is_inside() {
        let names = Names::from([(3, "y0".to_string())]);
        let within = link(&link_body(0, kind("veth")), &names).unwrap();
        assert_eq!(within.kind, Kind::Veth { peer: Some("y0".into()) });
        let outside = link(
            &link_body(0, |m| {
                kind("veth")(m);
                m.put_u32(libc::IFLA_LINK_NETNSID, 0);
            }),
            &names,
        )
        .unwrap();
        assert!(outside.needs_attachment());
    }

    #[test]
    fn a_default_route_over_a_gateway_on_the_link() {
        let mut body = vec![2, 0, 0, 0, 254, 3, 0, 1];
        body.extend(4u32.to_ne_bytes());
        body.extend(attrs(|m| {
            m.put_u32(libc::RTA_TABLE, 254)
                .put(libc::RTA_GATEWAY, &[169, 254, 1, 1])
                .put_u32(libc::RTA_OIF, 7);
        }));
        let route = route(&body, &Names::from([(7, "eth0".to_string())])).unwrap();
        assert_eq!((route.flags, route.dev.as_deref(), route.table), (ONLINK, Some("eth0"), 254));
        assert_eq!(route.attrs, [Attr::new(libc::RTA_GATEWAY, &[169, 254, 1, 1])]);
    }

    #[test]
    fn lifetimes_and_labels_only_where_they_say_something() {
        let names = Names::from([(7, "eth0".to_string())]);
        let of = |valid: u32, label: &str| {
            let mut body = vec![2, 24, 0x80, 0, 7, 0, 0, 0];
            body.extend(attrs(|m| {
                m.put(libc::IFA_ADDRESS, &[10, 0, 0, 1]).put(libc::IFA_LOCAL, &[10, 0, 0, 1]);
                m.put_str(libc::IFA_LABEL, label);
                let cache: Vec<u8> = [valid, valid, 0, 0].iter().flat_map(|n| n.to_ne_bytes()).collect();
                m.put(libc::IFA_CACHEINFO, &cache);
            }));
            address(&body, &names).unwrap().1
        };
        let plain = of(FOREVER, "eth0");
        assert_eq!((plain.lifetime, plain.label, plain.peer, plain.flags), (None, None, None, 0));
        assert_eq!(of(60, "eth0:1").lifetime, Some((60, 60)));
        assert_eq!(of(60, "eth0:1").label.as_deref(), Some("eth0:1"));
    }
}
