//! Addresses, neighbours, routes and rules of a namespace brought to the state described: what is missing is added, what
//! the kernel made beyond it is removed. Works by a socket inside the namespace.

use std::net::IpAddr;

use anyhow::{Context, Result};

use super::capture;
use super::config::{Address, Hop, Link, Neighbour, NetConfig, Route, Rule};
use super::links::Made;
use super::port::Names;
use super::socket::{Netlink, errno_of, unless};
use super::wire::Request;

const IFA_F_NODAD: u32 = 0x02;
const RT_TABLE_LOCAL: u32 = 255;
const RTPROT_KERNEL: u8 = 2;

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

/// Gives the links their addresses, usable at once (no duplicate address detection: the source still has them).
pub fn addresses(inside: &mut Netlink, config: &NetConfig, made: &Made) -> Result<()> {
    let replace = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
    for link in &config.links {
        for a in &link.addresses {
            inside
                .request(address(libc::RTM_NEWADDR, replace, made[&link.name], a, &link.name))
                .with_context(|| {
                    format!("giving link {} the address {}/{}", link.name, a.address, a.prefix)
                })?;
        }
    }
    remove_extra_addresses(inside, config, made)
}

/// Removes addresses that the kernel made and the description does not have.
pub fn remove_extra_addresses(inside: &mut Netlink, config: &NetConfig, made: &Made) -> Result<()> {
    let names = Names::new();
    for message in
        inside.dump(Request::new(libc::RTM_GETADDR, 0, &[0; 8])).context("listing the addresses")?
    {
        let Some((index, found)) = capture::address(&message.body, &names) else { continue };
        let is_it = |link: &&Link| made.get(&link.name) == Some(&index);
        let Some(link) = config.links.iter().find(is_it) else { continue };
        if !link.addresses.iter().any(|a| (a.address, a.prefix) == (found.address, found.prefix)) {
            let request = address(libc::RTM_DELADDR, 0, index, &found, &link.name);
            unless(inside.request(request), libc::EADDRNOTAVAIL)
                .with_context(|| format!("removing {} from link {}", found.address, link.name))?;
        }
    }
    Ok(())
}

pub(super) fn address(kind: u16, flags: u16, index: u32, a: &Address, link: &str) -> Request {
    let is_v6 = a.address.is_ipv6();
    let ifa_flags = a.flags | if is_v6 { IFA_F_NODAD } else { 0 };
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let mut body = vec![family(a.address), a.prefix, ifa_flags as u8, a.scope];
    body.extend_from_slice(&index.to_ne_bytes());
    let mut request = Request::new(kind, flags, &body);
    request.put(libc::IFA_LOCAL, &octets(a.address));
    request.put(libc::IFA_ADDRESS, &octets(a.peer.unwrap_or(a.address)));
    request.put_u32(8, ifa_flags); // IFA_FLAGS
    if let Some(broadcast) = a.broadcast {
        request.put(libc::IFA_BROADCAST, &octets(broadcast));
    }
    if !is_v6 {
        request.put_str(libc::IFA_LABEL, a.label.as_deref().unwrap_or(link));
    }
    if let Some(metric) = a.metric {
        request.put_u32(9, metric); // IFA_RT_PRIORITY
    }
    if let Some(protocol) = a.protocol {
        request.put_u8(11, protocol); // IFA_PROTO
    }
    if let Some((valid, preferred)) = a.lifetime {
        // struct ifa_cacheinfo: preferred, valid, created, updated.
        let cache = [preferred, valid, 0, 0];
        request.put(libc::IFA_CACHEINFO, &cache.map(u32::to_ne_bytes).concat());
    }
    request
}

/// Adds the neighbours.
pub fn neighbours(inside: &mut Netlink, config: &NetConfig, made: &Made) -> Result<()> {
    for n in &config.neighbours {
        inside.request(neighbour(n, made)).with_context(|| format!("adding the neighbour {}", n.address))?;
    }
    Ok(())
}

pub(super) fn neighbour(n: &Neighbour, made: &Made) -> Request {
    // struct ndmsg: family, pad, u16 pad, index, u16 state, flags, type.
    let index = n.dev.as_ref().and_then(|d| made.get(d)).copied().unwrap_or(0);
    let mut body = vec![family(n.address), 0, 0, 0];
    body.extend_from_slice(&index.to_ne_bytes());
    body.extend_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
    body.extend_from_slice(&[n.flags | if n.proxy { libc::NTF_PROXY } else { 0 }, 0]);
    let mut request =
        Request::new(libc::RTM_NEWNEIGH, (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16, &body);
    request.put(libc::NDA_DST, &octets(n.address));
    if let Some(mac) = n.mac {
        request.put(libc::NDA_LLADDR, &mac.0);
    }
    request
}

/// Brings the routes to those described. What the kernel makes for addresses by itself is there already; it is touched
/// only where the container's is different (a prefix route that a CNI removed or replaced).
pub fn routes(inside: &mut Netlink, config: &NetConfig, made: &Made) -> Result<()> {
    let names: Names = made.iter().map(|(name, index)| (*index, name.clone())).collect();
    let present = capture::routes(inside, &names)?;
    let (missing, extra) = difference(&config.routes, &present);
    for route in extra {
        let gone = inside.request(encode(libc::RTM_DELROUTE, 0, route, made));
        unless(gone, libc::ESRCH).with_context(|| format!("removing the route {}", name(route)))?;
    }
    // A gateway has to be reachable by another route first: again and again, as long as that gets on.
    let mut left = missing;
    while !left.is_empty() {
        let mut refused = Vec::new();
        let mut error = None;
        for route in &left {
            let flags = (libc::NLM_F_CREATE | libc::NLM_F_APPEND) as u16;
            let added = inside.request(encode(libc::RTM_NEWROUTE, flags, route, made));
            match unless(added, libc::EEXIST) {
                Ok(()) => {}
                Err(e) if errno_of(&e).is_some() => {
                    error = Some(e.context(format!("adding the route {}", name(route))));
                    refused.push(*route);
                }
                Err(e) => return Err(e),
            }
        }
        if refused.len() == left.len()
            && let Some(error) = error
        {
            return Err(error);
        }
        left = refused;
    }
    Ok(())
}

/// What to add, and what to remove.
fn difference<'a>(wanted: &'a [Route], present: &'a [Route]) -> (Vec<&'a Route>, Vec<&'a Route>) {
    let same =
        |a: &Route, b: &Route| Route { expires: None, ..a.clone() } == Route { expires: None, ..b.clone() };
    let of_kernel = |r: &Route| r.table == RT_TABLE_LOCAL && r.protocol == RTPROT_KERNEL;
    let missing = wanted.iter().filter(|w| !of_kernel(w) && !present.iter().any(|p| same(p, w))).collect();
    let extra = present.iter().filter(|p| !of_kernel(p) && !wanted.iter().any(|w| same(p, w)));
    // A description without any route of a family says nothing about that family.
    let extra = extra.filter(|p| wanted.iter().any(|w| w.family == p.family)).collect();
    (missing, extra)
}

fn name(route: &Route) -> String {
    let at = |kind| route.attrs.iter().find(|a| a.kind == kind).map(|a| a.value.as_slice());
    let ip = |value: Option<&[u8]>| match value {
        Some(v) if v.len() == 4 => <[u8; 4]>::try_from(v).map(|o| IpAddr::from(o).to_string()).ok(),
        Some(v) if v.len() == 16 => <[u8; 16]>::try_from(v).map(|o| IpAddr::from(o).to_string()).ok(),
        _ => None,
    };
    let mut text = match ip(at(libc::RTA_DST)) {
        Some(address) => format!("{address}/{}", route.dst_len),
        None => "default".to_string(),
    };
    if let Some(gateway) = ip(at(libc::RTA_GATEWAY)) {
        text += &format!(" via {gateway}");
    }
    if let Some(dev) = &route.dev {
        text += &format!(" dev {dev}");
    }
    text + &format!(" table {}", route.table)
}

pub(super) fn encode(kind: u16, flags: u16, route: &Route, made: &Made) -> Request {
    let table = if route.table < 256 { route.table as u8 } else { 0 };
    let mut body = vec![route.family, route.dst_len, route.src_len, route.tos];
    body.extend_from_slice(&[table, route.protocol, route.scope, route.kind]);
    body.extend_from_slice(&route.flags.to_ne_bytes());
    let index = |dev: &Option<String>| dev.as_ref().and_then(|d| made.get(d)).copied();
    let mut request = Request::new(kind, flags, &body);
    request.put_u32(libc::RTA_TABLE, route.table);
    if let Some(index) = index(&route.dev) {
        request.put_u32(libc::RTA_OIF, index);
    }
    for attr in &route.attrs {
        request.put(attr.kind, &attr.value);
    }
    if !route.hops.is_empty() {
        let hops: Option<Vec<_>> =
            route.hops.iter().map(|h| encode_hop(h, index(&h.dev).unwrap_or(0))).collect();
        match hops {
            Some(hops) => drop(request.put(libc::RTA_MULTIPATH, &hops.concat())),
            None => request.set_too_long(),
        }
    }
    if let Some(seconds) = route.expires {
        request.put_u32(libc::RTA_EXPIRES, seconds);
    }
    request
}

/// `struct rtnexthop` and its attributes; none if they are too long for it.
fn encode_hop(hop: &Hop, index: u32) -> Option<Vec<u8>> {
    let mut attrs = Vec::new();
    for attr in &hop.attrs {
        attrs.extend_from_slice(&u16::try_from(attr.value.len() + 4).ok()?.to_ne_bytes());
        attrs.extend_from_slice(&attr.kind.to_ne_bytes());
        attrs.extend_from_slice(&attr.value);
        attrs.resize(attrs.len().next_multiple_of(4), 0);
    }
    let mut bytes = u16::try_from(attrs.len() + 8).ok()?.to_ne_bytes().to_vec();
    bytes.extend_from_slice(&[hop.flags, hop.weight]);
    bytes.extend_from_slice(&index.to_ne_bytes());
    bytes.extend(attrs);
    Some(bytes)
}

/// Brings the policy rules to those described.
pub fn rules(inside: &mut Netlink, config: &NetConfig) -> Result<()> {
    let present = capture::rules(inside)?;
    let wanted = &config.rules;
    for rule in wanted.iter().filter(|w| !present.contains(w)) {
        let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
        let added = inside.request(encode_rule(libc::RTM_NEWRULE, flags, rule));
        unless(added, libc::EEXIST).with_context(|| format!("adding the policy rule {rule:?}"))?;
    }
    // A description without any rule of a family says nothing about that family.
    let described = |rule: &Rule| wanted.iter().any(|w| w.family == rule.family);
    for rule in present.iter().filter(|p| described(p) && !wanted.contains(p)) {
        let gone = inside.request(encode_rule(libc::RTM_DELRULE, 0, rule));
        unless(gone, libc::ENOENT).with_context(|| format!("removing the policy rule {rule:?}"))?;
    }
    Ok(())
}

pub(super) fn encode_rule(kind: u16, flags: u16, rule: &Rule) -> Request {
    let table = if rule.table < 256 { rule.table as u8 } else { 0 };
    let mut body = vec![rule.family, rule.dst_len, rule.src_len, rule.tos, table, 0, 0, rule.action];
    body.extend_from_slice(&rule.flags.to_ne_bytes());
    let mut request = Request::new(kind, flags, &body);
    request.put_u32(15, rule.table); // FRA_TABLE
    for attr in &rule.attrs {
        request.put(attr.kind, &attr.value);
    }
    request
}

#[cfg(test)]
mod tests {
    use super::super::config::Attr;
    use super::*;

    fn route(table: u32, protocol: u8, dst: [u8; 4]) -> Route {
        Route {
            family: 2,
            dst_len: 24,
            src_len: 0,
            tos: 0,
            protocol,
            scope: 0,
            kind: 1,
            table,
            flags: 0,
            dev: Some("eth0".into()),
            hops: vec![],
            expires: None,
            attrs: vec![Attr::new(libc::RTA_DST, &dst)],
        }
    }

    #[test]
    fn only_what_differs_is_touched() {
        let (main, local) = (route(254, 2, [10, 0, 0, 0]), route(255, 2, [10, 0, 0, 1]));
        let own = route(254, 3, [10, 1, 0, 0]);
        let expiring = Route { expires: Some(9), ..own.clone() };
        let (present, wanted) = ([main.clone(), local.clone()], [own.clone()]);
        let (missing, extra) = difference(&wanted, &present);
        assert_eq!(
            (missing, extra),
            (vec![&own], vec![&main]),
            "the local table's are the kernel's business"
        );
        let (wanted, present) = ([main.clone(), own], [main, local, expiring]);
        let (missing, extra) = difference(&wanted, &present);
        assert!(missing.is_empty() && extra.is_empty(), "an expiry is not a difference");
        assert_eq!(difference(&[], &present).1.len(), 0, "nothing said, nothing removed");
    }

    #[test]
    fn a_hop_that_does_not_fit_is_not_cut() {
        let hop = |len| Hop { dev: None, flags: 0, weight: 0, attrs: vec![Attr::new(5, &vec![0; len])] };
        let one = |hop| Route { hops: vec![hop], ..route(254, 3, [10, 0, 0, 0]) };
        assert!(!encode(libc::RTM_NEWROUTE, 0, &one(hop(4)), &Made::new()).is_too_long());
        for len in [0xffff - 12, 0xffff, 0x1_0000] {
            assert!(encode(libc::RTM_NEWROUTE, 0, &one(hop(len)), &Made::new()).is_too_long(), "{len}");
        }
    }

    #[test]
    fn a_route_in_words() {
        let mut r = route(254, 3, [10, 1, 0, 0]);
        r.attrs.push(Attr::new(libc::RTA_GATEWAY, &[10, 0, 0, 254]));
        assert_eq!(name(&r), "10.1.0.0/24 via 10.0.0.254 dev eth0 table 254");
    }
}
