//! The frames and packets that are made by hand: ARP, neighbour advertisement, ICMP errors. No I/O here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_ICMPV6: u8 = 58;

/// Gratuitous ARP (RFC 5944, section 4.6): sender and target are the address itself. There are hosts that listen to the
/// request only, and hosts that listen to the reply only.
pub fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr, reply: bool) -> Vec<u8> {
    let mut frame = [&BROADCAST[..], &mac, &ETHERTYPE_ARP].concat();
    // Ethernet, IPv4, lengths 6 and 4, operation.
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, if reply { 2 } else { 1 }]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&address.octets());
    frame.extend_from_slice(if reply { &mac } else { &[0; 6] });
    frame.extend_from_slice(&address.octets());
    frame
}

/// Unsolicited neighbour advertisement with the override flag to all nodes (RFC 4861, section 7.2.6).
pub fn neighbour_advertisement(mac: [u8; 6], address: Ipv6Addr, router: bool) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Type 136, code 0, checksum, flags (router, override), target, option 2: target's link-layer address.
    let mut icmp = vec![136, 0, 0, 0, if router { 0xa0 } else { 0x20 }, 0, 0, 0];
    icmp.extend_from_slice(&address.octets());
    icmp.extend_from_slice(&[2, 1]);
    icmp.extend_from_slice(&mac);
    let mut pseudo = [address.octets(), all_nodes.octets()].concat();
    pseudo.extend_from_slice(&(icmp.len() as u32).to_be_bytes());
    pseudo.extend_from_slice(&[0, 0, 0, PROTOCOL_ICMPV6]);
    pseudo.extend_from_slice(&icmp);
    let sum = checksum(&pseudo);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [&[0x33, 0x33, 0, 0, 0, 1][..], &mac, &ETHERTYPE_IPV6].concat();
    frame.extend_from_slice(&[0x60, 0, 0, 0, 0, icmp.len() as u8, PROTOCOL_ICMPV6, 255]);
    frame.extend_from_slice(&address.octets());
    frame.extend_from_slice(&all_nodes.octets());
    frame.extend_from_slice(&icmp);
    frame
}

/// The ICMP error "unreachable" about the segment `sequence` that `peer` once sent to `own`: the body for a raw ICMP
/// socket. For IPv6 the kernel fills in the checksum. None for addresses of different families.
pub fn unreachable(peer: (IpAddr, u16), own: (IpAddr, u16), sequence: u32) -> Option<Vec<u8>> {
    let mut tcp = peer.1.to_be_bytes().to_vec();
    tcp.extend_from_slice(&own.1.to_be_bytes());
    tcp.extend_from_slice(&sequence.to_be_bytes());
    match (peer.0, own.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            // A header of 20 bytes; 40 in all, do not fragment, 64 hops.
            let mut quoted = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, PROTOCOL_TCP, 0, 0];
            quoted.extend_from_slice(&from.octets());
            quoted.extend_from_slice(&to.octets());
            let sum = checksum(&quoted);
            quoted[10..12].copy_from_slice(&sum.to_be_bytes());
            // Destination unreachable: host.
            let mut icmp = vec![3, 1, 0, 0, 0, 0, 0, 0];
            icmp.extend(quoted);
            icmp.extend(tcp);
            let sum = checksum(&icmp);
            icmp[2..4].copy_from_slice(&sum.to_be_bytes());
            Some(icmp)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // Destination unreachable: no route.
            let mut icmp = vec![1, 0, 0, 0, 0, 0, 0, 0];
            icmp.extend_from_slice(&[0x60, 0, 0, 0, 0, 20, PROTOCOL_TCP, 64]);
            icmp.extend_from_slice(&from.octets());
            icmp.extend_from_slice(&to.octets());
            icmp.extend(tcp);
            Some(icmp)
        }
        _ => None,
    }
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_come_out_zero() {
        // RFC 1071's example.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        let v4 = |n| IpAddr::from([10, 0, 0, n]);
        let icmp = unreachable((v4(1), 40000), (v4(2), 6379), 77).unwrap();
        assert_eq!(checksum(&icmp), 0);
        assert_eq!(checksum(&icmp[8..28]), 0);
        assert!(unreachable((v4(1), 1), (IpAddr::from([0u16; 8]), 1), 0).is_none());
    }

    #[test]
    fn frames_have_their_lengths() {
        let mac = [2, 0, 0, 0, 0, 9];
        let arp = gratuitous_arp(mac, Ipv4Addr::new(10, 0, 0, 1), true);
        assert_eq!(arp.len(), 42);
        assert_eq!((&arp[6..12], arp[21]), (&mac[..], 2));
        let na = neighbour_advertisement(mac, "fd00::1".parse().unwrap(), false);
        assert_eq!(na.len(), 14 + 40 + 32);
        let mut pseudo = na[22..54].to_vec();
        pseudo.extend_from_slice(&[0, 0, 0, 32, 0, 0, 0, 58]);
        pseudo.extend_from_slice(&na[54..]);
        assert_eq!(checksum(&pseudo), 0);
    }
}
