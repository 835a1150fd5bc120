//! What is captured is what is built; what fails or is destroyed leaves nothing.

use std::os::fd::{AsFd, BorrowedFd};

use super::*;

/// Compares what is there with what was wanted. The kernel makes the routes of IPv6 addresses to itself in the background.
fn assert_made(wanted: &NetConfig, made: BorrowedFd<'_>) {
    let mut got = capture(made).unwrap();
    for _ in 0..100 {
        if got.routes.len() >= wanted.routes.len() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        got = capture(made).unwrap();
    }
    assert_same(wanted, &got);
}

/// Compares part by part, so that a difference is found in the output.
fn assert_same(wanted: &NetConfig, got: &NetConfig) {
    let lines = |config: &NetConfig| {
        let mut lines: Vec<String> = Vec::new();
        for link in &config.links {
            let mut bare = link.clone();
            lines.extend(std::mem::take(&mut bare.addresses).iter().map(|a| format!("{}: {a:?}", link.name)));
            lines.push(format!("{bare:?}"));
        }
        lines.extend(config.routes.iter().map(|r| format!("{r:?}")));
        lines.extend(config.rules.iter().map(|r| format!("{r:?}")));
        lines.extend(config.neighbours.iter().map(|r| format!("{r:?}")));
        lines.extend(config.sysctls.iter().map(|r| format!("changed {r:?}")));
        lines.extend(config.inherited_sysctls.iter().map(|r| format!("inherited {r:?}")));
        lines.sort();
        lines
    };
    let (wanted, got) = (lines(wanted), lines(got));
    let missing: Vec<_> = wanted.iter().filter(|l| !got.contains(l)).collect();
    let extra: Vec<_> = got.iter().filter(|l| !wanted.contains(l)).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing: {missing:#?}\nextra: {extra:#?}");
}

const RICH: &str = "
    ip addr add 10.99.0.2/24 brd + dev eth0
    ip addr add 10.99.0.3/24 dev eth0 label eth0:two
    ip addr add 10.98.0.1 peer 10.98.0.2/32 dev eth0
    ip addr add 10.97.0.2/24 dev eth0 noprefixroute scope link
    ip addr add 10.255.0.1/32 dev lo
    ip addr add fd99::2/64 dev eth0
    ip addr add fd98::2/128 dev eth0 nodad
    ip link set eth0 txqueuelen 500 alias 'the uplink'
    ip link add in0 type veth peer name in1
    ip link set in0 up; ip link set in1 address 02:00:00:00:77:01
    ip link add inner type bridge ageing_time 1000
    ip link set in1 master inner up; ip link set inner address 02:00:00:00:77:02 up
    ip addr add 10.50.0.1/24 dev inner
    ip link add mv0 link eth0 address 02:00:00:00:77:03 type macvlan mode private
    ip link set mv0 up; ip addr add 10.51.0.1/24 dev mv0
    ip link add off0 type veth peer name off1
    ip route add default via 169.254.1.1 dev eth0 onlink
    ip route add 10.1.0.0/16 via 10.99.0.254 mtu 1300 metric 7
    ip route add 10.2.0.0/16 via 10.1.0.9 dev eth0 onlink table 100 proto static
    ip route add 10.3.0.0/16 nexthop via 10.99.0.250 weight 2 nexthop via 10.50.0.9 weight 1
    ip route add blackhole 10.4.0.0/16
    ip route add unreachable 10.5.0.0/16 metric 4278198272
    ip route add 10.97.0.0/25 dev eth0 src 10.97.0.2
    ip route add local 10.6.0.0/24 dev lo
    ip route del 10.51.0.0/24 dev mv0
    ip -6 route add default via fe80::1 dev eth0 metric 50
    ip -6 route add fd01::/64 via fd99::1 mtu 1290
    ip -6 route add fd02::/64 nexthop via fd99::5 dev eth0 nexthop via fd99::6 dev eth0
    ip -6 route add unreachable fd03::/64
    ip -6 route add fd04::/64 dev eth0 table 1000
    ip rule add from 10.99.0.3 table 100 pref 100
    ip rule add not fwmark 0x5/0xff iif eth0 lookup 1000 pref 101
    ip -6 rule add to fd04::/64 lookup 1000 pref 200
    ip neigh add 10.99.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent
    ip neigh add fd99::77 lladdr 02:00:00:00:00:78 dev eth0 nud permanent
    ip neigh add proxy 10.99.0.88 dev eth0
    cd /proc/sys/net
    echo 0 > ipv4/ip_unprivileged_port_start
    echo '0 2147483647' > ipv4/ping_group_range
    echo 300 > ipv4/tcp_keepalive_time
    echo '20000 30000' > ipv4/ip_local_port_range
    echo 128 > core/somaxconn
    echo 1 > ipv4/ip_forward
    echo 2 > ipv4/conf/eth0/rp_filter
    echo 0 > ipv4/conf/all/accept_redirects
    echo 1 > ipv6/conf/eth0/forwarding
    echo 0 > ipv6/conf/mv0/accept_ra
    echo 1 > ipv6/conf/in0/disable_ipv6
";

#[test]
fn a_rich_namespace_is_rebuilt_equal() {
    on_node(|| {
        let source = container("tnet-a", "02:00:0a:63:00:02");
        sh(&format!("ip netns exec tnet-a sh -ec \"{RICH}\""));
        settle("tnet-a");
        let config = timed("capture", || capture(source.as_fd())).unwrap();
        let json = serde_json::to_vec(&config).unwrap();
        println!("encoded: {} bytes", json.len());
        let changed: Vec<&str> = config.sysctls.keys().map(String::as_str).collect();
        for key in ["core/somaxconn", "ipv4/ip_forward", "ipv4/ping_group_range", "ipv4/conf/eth0/rp_filter"]
        {
            assert!(changed.contains(&key), "{key} in {changed:?}");
        }
        let config: NetConfig = serde_json::from_slice(&json).unwrap();
        timed("build", || build(&config, &path("tnet-b"), &attach())).unwrap();
        assert!(sh("ip netns list").contains("tnet-b"));
        let made = open(&path("tnet-b")).unwrap();
        assert!(is_fenced(made.as_fd()).unwrap());
        assert_made(&config, made.as_fd());
        sh("ip link set tnet-a-h nomaster"); // one of them at a time on the segment
        timed("release", || unfence(made.as_fd())).unwrap();
        assert!(!is_fenced(made.as_fd()).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_made(&config, made.as_fd());
        timed("announce", || announce(made.as_fd(), &config)).unwrap();
        drop(made);
        timed("destroy", || destroy(&path("tnet-b"))).unwrap();
        nothing_left();
        destroy(&path("tnet-b")).expect("gone already is fine");
    });
}

fn nothing_left() {
    let links = sh("ip -o link");
    assert!(!links.contains(": ts"), "{links}");
    assert!(!sh("ip netns list").contains("tnet-b"));
    assert!(!path("tnet-b").exists());
    assert!(!sh("cat /proc/self/mountinfo").contains("tnet-b"));
}

#[test]
fn a_plain_pod() {
    on_node(|| {
        let source = container("tnet-a", "02:00:0a:63:00:02");
        sh("ip -n tnet-a addr add 10.99.0.2/24 dev eth0; ip -n tnet-a route add default via 10.99.0.1
            ip -n tnet-a addr add fd99::2/64 dev eth0");
        settle("tnet-a");
        for _ in 0..3 {
            let config = timed("plain capture", || capture(source.as_fd())).unwrap();
            println!(
                "plain: {} bytes, changed {:?}",
                serde_json::to_vec(&config).unwrap().len(),
                config.sysctls
            );
            timed("plain build", || build(&config, &path("tnet-b"), &attach())).unwrap();
            let made = open(&path("tnet-b")).unwrap();
            assert_made(&config, made.as_fd());
            timed("plain release", || unfence(made.as_fd())).unwrap();
            timed("plain announce", || announce(made.as_fd(), &config)).unwrap();
            timed("plain fence", || fence(made.as_fd())).unwrap();
            timed("plain unfence", || unfence(made.as_fd())).unwrap();
            timed("plain destroy", || destroy(&path("tnet-b"))).unwrap();
        }
        nothing_left();
    });
}

#[test]
fn only_a_loopback_needs_no_bridge() {
    on_node(|| {
        sh("ip netns add tnet-a; ip -n tnet-a link set lo up");
        let config = capture(open(&path("tnet-a")).unwrap().as_fd()).unwrap();
        build(&config, Path::new("/run/elsewhere/deep/tnet-b"), &Attach::default()).unwrap();
        let made = open(Path::new("/run/elsewhere/deep/tnet-b")).unwrap();
        assert_made(&config, made.as_fd());
        unfence(made.as_fd()).unwrap();
        announce(made.as_fd(), &config).unwrap();
        destroy(Path::new("/run/elsewhere/deep/tnet-b")).unwrap();
    });
}

#[test]
fn failures_are_named_and_leave_nothing() {
    on_node(|| {
        let source = container("tnet-a", "02:00:0a:63:00:02");
        sh("ip -n tnet-a addr add 10.99.0.2/24 dev eth0");
        settle("tnet-a");
        let good = capture(source.as_fd()).unwrap();
        let refused = |config: &NetConfig, attach: &Attach, part: &str| {
            let error = format!("{:#}", build(config, &path("tnet-b"), attach).unwrap_err());
            assert!(error.contains(part), "{error}");
            nothing_left();
        };
        refused(&good, &Attach::default(), "`bridge = \"...\"` in agent.toml");
        refused(&good, &Attach { bridge: Some("br7".into()) }, "no link br7");
        refused(&good, &Attach { bridge: Some("lo".into()) }, "not a bridge");
        let mut bad = good.clone();
        let gateway = config::Attr::new(libc::RTA_GATEWAY, &[172, 31, 0, 1]);
        let mut route = bad.routes[0].clone();
        (route.table, route.protocol, route.kind, route.scope) = (254, 3, 1, 0);
        (route.dst_len, route.attrs) = (0, vec![gateway]);
        bad.routes.push(route);
        refused(&bad, &attach(), "adding the route default via 172.31.0.1");
        let mut bad = good.clone();
        bad.sysctls.insert("ipv4/no_such_thing".into(), "1".into());
        refused(&bad, &attach(), "net/ipv4/no_such_thing cannot be set");
        bad.sysctls = [("ipv4/../../kernel/hostname".to_string(), "x".to_string())].into();
        refused(&bad, &attach(), "not the name of a sysctl");
        let mut bad = good.clone();
        bad.links[1].addresses[0].prefix = 77;
        refused(&bad, &attach(), "the address 10.99.0.2/77");
        sh("ip link set br0 down");
        refused(&good, &attach(), "br0 on this node is down");
        sh("ip link set br0 up");
        sh("ip netns add tnet-x; touch /run/netns/tnet-f; echo 1 > /run/netns/tnet-g");
        assert!(build(&good, &path("tnet-x"), &attach()).is_err(), "somebody else's");
        assert!(sh("ip netns list").contains("tnet-x"));
        destroy(&path("tnet-f")).expect("a file whose mount is gone");
        assert!(destroy(&path("tnet-g")).is_err() && path("tnet-g").exists());
    });
}

#[test]
fn what_cannot_be_moved_is_refused_at_capture() {
    on_node(|| {
        sh("ip netns add tnet-a; ip -n tnet-a link add vx9 type vxlan id 9 dstport 4789 local 127.0.0.1");
        let netns = open(&path("tnet-a")).unwrap();
        let error = capture(netns.as_fd()).unwrap_err().to_string();
        assert!(error.contains("link vx9 is of type vxlan"), "{error}");
    });
}

#[test]
fn the_fence_is_lifted_exactly() {
    on_node(|| {
        let source = container("tnet-a", "02:00:0a:63:00:02");
        let nft = has("nft").then(|| {
            sh("ip netns exec tnet-a nft 'add table inet theirs; add chain inet theirs c { type filter hook input priority 0; }'");
            let rules = || sh("ip netns exec tnet-a nft list ruleset");
            (rules(), rules)
        });
        unfence(source.as_fd()).expect("no fence to lift");
        timed("fence", || fence(source.as_fd())).unwrap();
        timed("fence again", || fence(source.as_fd())).unwrap();
        assert!(is_fenced(source.as_fd()).unwrap());
        if let Some((_, rules)) = &nft {
            println!("{}", rules());
            assert!(rules().contains("meta mark 0x0000c114 accept"));
            assert_eq!(capture(source.as_fd()).unwrap().firewall, ["inet theirs"]);
            // Half a fence, after somebody's interference: made whole, and lifted also as a half.
            sh("ip netns exec tnet-a nft delete table inet transship");
            assert!(!is_fenced(source.as_fd()).unwrap());
            fence(source.as_fd()).unwrap();
            assert!(is_fenced(source.as_fd()).unwrap());
            sh("ip netns exec tnet-a nft delete table arp transship");
        }
        timed("unfence", || unfence(source.as_fd())).unwrap();
        timed("unfence again", || unfence(source.as_fd())).unwrap();
        if let Some((before, rules)) = &nft {
            assert_eq!(*before, rules());
        }
        for _ in 0..5 {
            timed("fence", || fence(source.as_fd())).unwrap();
            timed("unfence", || unfence(source.as_fd())).unwrap();
        }
    });
}
