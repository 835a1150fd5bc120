//! The fuzz target of a network namespace's description and of netlink: see [`crate::fuzz`].

/// What the kernel lists, what a peer describes, and the requests that are made of it.
pub mod net_config {
    use std::collections::BTreeMap;

    use super::super::config::{Attr, NetConfig};
    use super::super::wire::{self, Request};
    use super::super::{announce, backlog, build, capture, links, packets, port, routes};
    use crate::fuzz::{Input, json};

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        match input.byte() {
            0 => listed(input.rest()),
            1 => described(input.rest()),
            _ => packet(&mut input),
        }
    }

    /// Messages of the kernel. Callers look at those only that have their fixed part.
    fn listed(bytes: &[u8]) {
        let names: BTreeMap<u32, String> = [(1, "lo".into()), (2, "eth0".into())].into();
        for message in wire::split(bytes) {
            let body = &message.body;
            drop(capture::address(body, &names));
            if body.len() >= 12 {
                drop((capture::rule(body), capture::neighbour(body, &names)));
                if let Some(route) = capture::route(body, &names) {
                    let made = names.iter().map(|(index, name)| (name.clone(), *index)).collect();
                    whole(&routes::encode(libc::RTM_NEWROUTE, 0, &route, &made), 12, &route.attrs);
                }
            }
            if body.len() >= 16 {
                port::seen(body);
                drop(capture::link(body, &names));
            }
        }
    }

    /// A peer's description. What is asked of the kernel is what it says, or the request is known to be too long.
    fn described(bytes: &[u8]) {
        json::<NetConfig>(bytes);
        let Ok(config) = serde_json::from_slice::<NetConfig>(bytes) else { return };
        if build::check_keys(&config).is_ok() {
            let keys = config.sysctls.keys().chain(config.inherited_sysctls.keys());
            keys.for_each(|key| assert!(!key.starts_with('/') && !key.contains(".."), "{key}"));
        }
        let made = config.links.iter().map(|l| (l.name.clone(), l.index)).collect();
        for route in &config.routes {
            whole(&routes::encode(libc::RTM_NEWROUTE, 0, route, &made), 12, &route.attrs);
        }
        for rule in &config.rules {
            whole(&routes::encode_rule(libc::RTM_NEWRULE, 0, rule), 12, &rule.attrs);
        }
        for neighbour in &config.neighbours {
            whole(&routes::neighbour(neighbour, &made), 12, &[]);
        }
        let Ok(order) = links::order(&config) else { return };
        assert_eq!(order.len(), config.links.len());
        for link in &config.links {
            whole(&links::request(&config, link, None, &made, true), 16, &[]);
            for address in &link.addresses {
                whole(&routes::address(libc::RTM_NEWADDR, 0, link.index, address, &link.name), 8, &[]);
            }
            for frame in announce::frames(&config, &link.name) {
                announce::frame_address(link.index, &frame);
            }
        }
    }

    /// The request is one message, and has these attributes with these values.
    fn whole(request: &Request, fixed: usize, attrs: &[Attr]) {
        if request.is_too_long() {
            return;
        }
        let bytes = request.finish(1);
        let all = wire::split(&bytes);
        assert_eq!((all.len(), all[0].body.len() + wire::HEADER), (1, bytes.len()), "not one message");
        let mut found = wire::attributes(&all[0].body[fixed..]);
        for attr in attrs {
            let is = |(kind, value): (u16, &[u8])| kind == attr.kind & 0x3fff && value == attr.value;
            assert!(found.any(is), "{attr:?} is not in the request");
        }
        let used: usize =
            wire::attributes(&all[0].body[fixed..]).map(|(_, v)| (v.len() + 4).next_multiple_of(4)).sum();
        assert_eq!(fixed + used, all[0].body.len(), "something else is in the request");
    }

    /// A frame that came with its offload; and errors about a segment.
    fn packet(input: &mut Input<'_>) {
        let head = input.take(10);
        let Ok(head) = <[u8; 10]>::try_from(head) else { return };
        let offload = backlog::Offload::from_bytes(&head);
        assert_eq!(backlog::Offload::from_bytes(&offload.to_bytes()), offload);
        let packet = backlog::Packet { link: "eth0".into(), offload, frame: input.rest().to_vec() };
        if packet.is_sane() {
            announce::frame_address(1, &packet.frame);
            let end = usize::from(offload.csum_start) + usize::from(offload.csum_offset) + 2;
            assert!(offload.flags == 0 || end <= packet.frame.len());
        }
        let ip = |n: u8| std::net::IpAddr::from([10, 0, 0, n]);
        packets::unreachable((ip(head[0]), 1), (ip(head[1]), 2), 3).expect("one family");
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let config = serde_json::json!({
            "links": [
                {"name": "lo", "index": 1, "kind": {"type": "loopback"}, "mtu": 65536, "up": true},
                {"name": "eth0", "index": 2, "kind": {"type": "veth"}, "mac": "02:00:0a:ff:00:01", "mtu": 1450, "up": true,
                 "queues": [1, 1], "addr_gen_mode": 0, "addresses": [
                    {"address": "10.0.0.5", "prefix": 24, "scope": 0, "flags": 128, "broadcast": "10.0.0.255"},
                    {"address": "fd00::5", "prefix": 64, "scope": 0, "flags": 128, "lifetime": [9, 5]}]},
                {"name": "br", "index": 3, "kind": {"type": "bridge", "options": [{"kind": 1, "value": "05000000"}]},
                 "mtu": 1500, "up": false},
                {"name": "v7", "index": 4, "kind": {"type": "vlan", "parent": "eth0", "options": [{"kind": 1, "value": "0700"}]},
                 "mtu": 1500, "up": true, "master": "br"}
            ],
            "routes": [{"family": 2, "dst_len": 0, "src_len": 0, "tos": 0, "table": 254, "protocol": 3, "scope": 0, "kind": 1,
                "flags": 0, "dev": "eth0", "attrs": [{"kind": 5, "value": "0a0000fe"}],
                "hops": [{"dev": "eth0", "flags": 0, "weight": 1, "attrs": [{"kind": 5, "value": "0a0000fd"}]}]}],
            "rules": [{"family": 2, "dst_len": 0, "src_len": 0, "tos": 0, "table": 254, "action": 1, "flags": 0,
                "attrs": [{"kind": 6, "value": "0000fe"}]}],
            "neighbours": [{"dev": "eth0", "address": "10.0.0.9", "mac": "02:00:00:00:00:09"}],
            "sysctls": {"ipv4/ip_forward": "1"},
            "inherited_sysctls": {"ipv4/conf/eth0/rp_filter": "2"},
            "firewall": ["ip filter"]
        });
        let parsed: NetConfig = serde_json::from_value(config.clone()).expect("a description");
        let made = parsed.links.iter().map(|l| (l.name.clone(), l.index)).collect();
        let route = routes::encode(libc::RTM_NEWROUTE, 0, &parsed.routes[0], &made);
        let rule = routes::encode_rule(libc::RTM_NEWRULE, 0, &parsed.rules[0]);
        let address = routes::address(libc::RTM_NEWADDR, 0, 2, &parsed.links[1].addresses[0], "eth0");
        let mut requests = vec![route, rule, address, routes::neighbour(&parsed.neighbours[0], &made)];
        requests.extend(parsed.links.iter().map(|l| links::request(&parsed, l, None, &made, true)));
        let listed: Vec<u8> = requests.iter().flat_map(|r| r.finish(1)).collect();
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&[8, 0]);
        let mut seeds: Vec<_> = requests.iter().map(|r| [&[0][..], &r.finish(1)].concat()).collect();
        seeds.push([&[0][..], &listed].concat());
        seeds.push([&[1][..], config.to_string().as_bytes()].concat());
        seeds.push([&[2, 1, 0, 54, 0, 0, 0, 34, 0, 16, 0][..], &frame].concat());
        seeds
    }
}
