//! The nftables messages of the fence, byte by byte (`linux/netfilter/nf_tables.h`). No I/O here.

use super::wire::Request;

/// Name of the tables, one in each of [`FAMILIES`].
pub const TABLE: &str = "transship";

/// The mark on the packets by which CRIU closes restored half-closed connections (libsoccr's `SOCCR_MARK`).
const CRIU_MARK: u32 = 0xC114;

const NFPROTO_INET: u8 = 1;
const NFPROTO_ARP: u8 = 3;

/// Families in which the fence has a table.
pub const FAMILIES: [u8; 2] = [NFPROTO_INET, NFPROTO_ARP];

/// A chain: (family, name, hook number, priority). Ahead of defragmentation (-400) and conntrack (-200), so that what is
/// dropped leaves no trace there. `prerouting` sees whatever comes in, to be delivered or forwarded.
const CHAINS: [(u8, &str, u32, i32); 4] = [
    (NFPROTO_INET, "prerouting", 0, -450),
    (NFPROTO_INET, "output", 3, -450),
    (NFPROTO_ARP, "input", 0, -450),
    (NFPROTO_ARP, "output", 1, -450),
];

fn message(operation: i32, family: u8, flags: i32) -> Request {
    // struct nfgenmsg: family, version 0, resource 0.
    let kind = ((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | operation as u16;
    Request::new(kind, flags as u16, &[family, 0, 0, 0])
}

/// The transaction that makes the fence; refused with EEXIST when it stands already.
///
/// The loopback is not excepted: CRIU reads the two ends of a local connection one after the other, and what they would
/// say to each other in between would be in one of the images only.
pub fn fence() -> Vec<Request> {
    let mut all = Vec::new();
    for family in FAMILIES {
        let mut table = message(libc::NFT_MSG_NEWTABLE, family, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        table.put_str(1, TABLE);
        all.push(table);
    }
    for (family, name, hook, priority) in CHAINS {
        let mut chain = message(libc::NFT_MSG_NEWCHAIN, family, libc::NLM_F_CREATE);
        chain.put_str(1, TABLE).put_str(3, name).put_str(7, "filter");
        chain.nest(4, |m| {
            m.put_be32(1, hook).put_be32(2, priority as u32);
        });
        chain.put_be32(5, 0); // policy: NF_DROP
        all.push(chain);
        if family == NFPROTO_INET {
            all.push(accept_mark(family, name, CRIU_MARK));
        }
    }
    all
}

/// `meta mark MARK accept`.
fn accept_mark(family: u8, chain: &str, mark: u32) -> Request {
    let mut rule = message(libc::NFT_MSG_NEWRULE, family, libc::NLM_F_CREATE | libc::NLM_F_APPEND);
    rule.put_str(1, TABLE).put_str(2, chain).nest(4, |list| {
        // Load meta key 3 (mark) into register 1; compare it for equality (0); set the verdict (register 0) to NF_ACCEPT.
        expression(list, "meta", |e| {
            e.put_be32(1, 1).put_be32(2, 3);
        });
        expression(list, "cmp", |e| {
            e.put_be32(1, 1).put_be32(2, 0).nest(3, |data| {
                data.put_u32(1, mark);
            });
        });
        expression(list, "immediate", |e| {
            e.put_be32(1, 0).nest(2, |data| {
                data.nest(2, |verdict| {
                    verdict.put_be32(1, 1);
                });
            });
        });
    });
    rule
}

fn expression(list: &mut Request, name: &str, fill: impl FnOnce(&mut Request)) {
    list.nest(1, |element| {
        element.put_str(1, name).nest(2, fill);
    });
}

/// Deletes the table of `family` with all that is in it; refused with ENOENT when there is none.
pub fn delete(family: u8) -> Request {
    let mut request = message(libc::NFT_MSG_DELTABLE, family, 0);
    request.put_str(1, TABLE);
    request
}

/// Asks for the table of `family`.
pub fn get(family: u8) -> Request {
    let mut request = message(libc::NFT_MSG_GETTABLE, family, 0);
    request.put_str(1, TABLE);
    request
}

/// Lists the tables of all families. In the answers: family in the first byte, name in attribute 1 after four bytes.
pub fn list() -> Request {
    message(libc::NFT_MSG_GETTABLE, 0, 0)
}

/// The name that `nft` has for a family.
pub fn family_name(family: u8) -> &'static str {
    match family {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "?",
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire;
    use super::*;

    #[test]
    fn the_fence_is_two_tables_four_chains_two_rules() {
        let kinds: Vec<u16> = fence().iter().map(|r| wire::split(&r.finish(1))[0].kind & 0xff).collect();
        assert_eq!(kinds, [0, 0, 3, 6, 3, 6, 3, 3]);
        let chain = &wire::split(&fence()[2].finish(1))[0];
        assert_eq!(chain.body[0], NFPROTO_INET);
        let attrs = &chain.body[4..];
        assert_eq!(wire::text(wire::find(attrs, 1).unwrap()), TABLE);
        assert_eq!(wire::find(attrs, 5), Some(&[0u8, 0, 0, 0][..]), "policy drop");
        let hook = wire::find(attrs, 4).unwrap();
        assert_eq!(wire::find(hook, 2), Some(&(-450i32).to_be_bytes()[..]));
    }
}
