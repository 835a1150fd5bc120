//! The network of a container that moves: what it finds on the destination is what it had, and nothing else is there.

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::container::{self, Run};
use crate::moves;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "net_arrives_exactly", needs: Needs::Migration, run: arrives_exactly },
    Scenario { name: "net_is_announced", needs: Needs::Migration, run: is_announced },
    Scenario { name: "net_private_namespace", needs: Needs::Migration, run: private_namespace },
];

const MAC: &str = "02:ab:cd:00:00:01";

/// A namespace that deviates from a plain one in every way that is moved.
const UNUSUAL: &str = "
    ip netns add n1
    ip -n n1 link set lo up
    ip link add vn1 type veth peer name net7 netns n1 address 02:ab:cd:00:00:01
    ip link set vn1 master cni0 up
    ip link set vn1 mtu 1400
    ip -n n1 link set net7 mtu 1400 txqueuelen 77 alias 'the odd one'
    ip netns exec n1 sysctl -qw net.ipv6.conf.net7.accept_ra=0 net.ipv4.conf.net7.rp_filter=2 \
        net.ipv4.tcp_keepalive_time=123 net.ipv4.ip_local_port_range='20000 30000' net.core.somaxconn=99 \
        net.ipv4.ip_forward=1
    ip -n n1 link set net7 up
    ip -n n1 addr add 10.77.6.1/16 brd + dev net7
    ip -n n1 addr add 10.77.6.2/16 dev net7
    ip -n n1 addr add 192.0.2.5/28 dev net7
    ip -n n1 addr add fd77::6:1/64 dev net7 nodad
    ip -n n1 addr add 2001:db8::5/128 dev net7 nodad
    ip -n n1 route add default via 10.77.0.254
    ip -n n1 route add 198.51.100.0/24 via 10.77.0.9 metric 5 mtu 1300
    ip -n n1 route add blackhole 203.0.113.0/24
    ip -n n1 -6 route add default via fd77::fe
    ip -n n1 -6 route add 2001:db8:1::/48 via fd77::9 metric 77
    ip -n n1 route add 10.99.0.0/16 dev net7 table 100
    ip -n n1 rule add from 192.0.2.5 lookup 100 priority 1000
    ip -n n1 neigh add 10.77.0.77 lladdr 02:00:00:00:00:77 dev net7 nud permanent";

/// All that `ip` and the sysctls tell of a namespace, one thing a line, without what differs between two equal ones. Nor `nodad`:
/// an address that moves is known to be nobody else's.
const TELL: &str = "
    ip -n n1 -d link show | sed -E 's/@if[0-9]+//; s/(link-netns(id)? |minmtu |numtxqueues |gso_max_)[^ ]*//g'
    until ! ip -n n1 addr show | grep -q tentative; do sleep 0.05; done
    ip -n n1 -4 addr show | grep inet
    ip -n n1 -6 addr show | grep inet | sed 's/ nodad//' | sort
    for f in -4 -6; do ip -n n1 $f route show table all | sort; ip -n n1 $f rule show; done
    ip -n n1 neigh show nud permanent
    ip netns exec n1 sh -c \"cd /proc/sys/net && grep -rs '' . | grep -vE 'nf_conntrack_count|/nr_|stable_secret|/route/flush|bridge/|_table|dev_weight|netfilter/nf_log|/flush:'\" | sort";

fn arrives_exactly(bed: &Bed) -> Result<()> {
    let rules = |node| bed.sh(node, "nft list ruleset; iptables-legacy-save 2>/dev/null; true");
    let tables = Node::ALL.map(rules);
    bed.sh(Node::A, UNUSUAL)?;
    let options = ["--null-io", "--with-ns", "network:/run/netns/n1"];
    Run::new(bed, "n1", "probe").options(&options).args(&["ts-probe", "sleep"]).start(Node::A)?;
    let wanted = bed.sh(Node::A, TELL)?;
    ensure!(wanted.contains(MAC) && wanted.contains("mtu 1400"), "{wanted}");
    for from in [Node::A, Node::B] {
        let to = from.other();
        moves::migrate(bed, "n1", from, to)?;
        let found = bed.sh(to, TELL)?;
        ensure!(
            found == wanted,
            "the network on node {} differs:\n{}",
            to.name(),
            difference(&wanted, &found)
        );
        let gone = bed.sh(from, "ls /run/netns; ip -br link show type veth | grep -v ^eth0@ || true")?;
        ensure!(gone.trim().is_empty(), "left on node {}: {gone}", from.name());
        let firewall =
            bed.sh(to, "ip netns exec n1 sh -c 'nft list ruleset; iptables-legacy-save 2>/dev/null; true'")?;
        ensure!(!firewall.contains("table") && !firewall.contains("*filter"), "rules stay: {firewall}");
        for target in ["10.77.0.9", "fd77::9"] {
            let ping = container::exec(bed, to, "n1", &["ping", "-c1", "-W2", target])?;
            ensure!(ping.status.success(), "{target} from node {}: {ping:?}", to.name());
        }
    }
    for (node, before) in Node::ALL.into_iter().zip(tables) {
        let (before, after) = (before?, rules(node)?);
        ensure!(after == before, "rules of node {}: {after}", node.name());
    }
    container::delete(bed, Node::A, "n1")?;
    // the agent removes it as soon as it hears of the deletion
    container::unpod(bed, Node::A, "n1")
}

/// The lines that only one of two texts has.
fn difference(wanted: &str, found: &str) -> String {
    let only = |mark: char, these: &str, others: &str| {
        let others: std::collections::HashSet<&str> = others.lines().collect();
        these.lines().filter(|l| !others.contains(l)).map(|l| format!("{mark} {l}\n")).collect::<String>()
    };
    only('-', wanted, found) + &only('+', found, wanted)
}

/// A container that sends nothing: the switch and the neighbours know its new place all the same.
fn is_announced(bed: &Bed) -> Result<()> {
    container::pod(bed, Node::A, "n1", "10.77.5.1")?;
    Run::new(bed, "n1", "probe")
        .pod("n1")
        .options(&["--null-io"])
        .args(&["ts-probe", "sleep"])
        .start(Node::A)?;
    let mac = "02:00:0a:4d:05:01";
    for from in [Node::A, Node::B] {
        // a neighbour that had another address in mind: the announcement has to correct it
        let spoil = "sysctl -qw net.ipv4.neigh.eth0.locktime=0; for a in 10.77.5.1 fd77::5:1; do ip neigh replace $a lladdr 02:00:00:00:00:99 dev eth0 nud stale; done";
        bed.hack(["client", "sh", "-ec", spoil])?;
        moves::migrate(bed, "n1", from, from.other())?;
        let known = bed.hack(["client", "sh", "-ec", "ip neigh show 10.77.5.1; ip neigh show fd77::5:1"])?;
        ensure!(known.matches(mac).count() == 2, "the client knows: {known}");
        let place = bed.hack(["switch", mac])?;
        ensure!(place.trim() == format!("p{}", from.other().name()), "the switch sends it to {place}");
    }
    container::delete(bed, Node::A, "n1")?;
    container::unpod(bed, Node::A, "n1")
}

/// Plain `ctr run`: a namespace of its own that has no name and only lo.
fn private_namespace(bed: &Bed) -> Result<()> {
    Run::new(bed, "n1", "probe").options(&["--null-io"]).args(&["ts-probe", "sleep"]).start(Node::A)?;
    let links = "ip -o link show | cut -d: -f2; ip -o addr show | sed 's/flags .. //'";
    let before = container::exec(bed, Node::A, "n1", &["sh", "-c", links])?.stdout;
    for from in [Node::A, Node::B, Node::A] {
        moves::migrate(bed, "n1", from, from.other())?;
        let after = container::exec(bed, from.other(), "n1", &["sh", "-c", links])?.stdout;
        ensure!(after == before, "{}", String::from_utf8_lossy(&after));
    }
    container::delete(bed, Node::B, "n1")
}
