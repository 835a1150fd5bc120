//! What is known of a namespace and travels to the other node. Plain data: reading is `capture`'s, making is `build`'s.
//!
//! Names, not indices, refer to links, because the other kernel may have given the number away. What the kernel lists of
//! routes, rules and a link's own options is kept as raw attributes: nothing is lost that this program does not know.
//! The receiver caps the encoded size before it decodes.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A network namespace's configuration.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct NetConfig {
    /// Links in the order of their index; the loopback is among them.
    #[serde(default)]
    pub links: Vec<Link>,
    /// Routes of all tables, those made by the kernel for addresses included.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Policy rules, the three default ones included.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Permanent and proxy neighbours.
    #[serde(default)]
    pub neighbours: Vec<Neighbour>,
    /// Sysctls that differ from a fresh namespace on the same machine. Path below `/proc/sys/net` -> value.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
    /// The other writable sysctls: a fresh namespace inherits some of them from its node, so the other node's may be
    /// different. Set where they differ and can be set; not being able to is no error.
    #[serde(default)]
    pub inherited_sysctls: BTreeMap<String, String>,
    /// Firewall tables found in the namespace. They are NOT moved; whether that matters is the caller's decision.
    #[serde(default)]
    pub firewall: Vec<String>,
}

/// A link with its addresses.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Link {
    /// Interface name.
    pub name: String,
    /// Interface index: kept if it is free, as sockets can be bound to it.
    pub index: u32,
    /// Type and what belongs to it.
    pub kind: Kind,
    /// Hardware address, for links that have one of six bytes.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is up (administratively).
    pub up: bool,
    /// The `IFF_*` flags that a user can set, without `IFF_UP`.
    #[serde(default)]
    pub flags: u32,
    /// Transmit queue length in packets.
    #[serde(default)]
    pub txqueuelen: u32,
    /// Number of transmit and receive queues (0: the kernel's choice).
    #[serde(default)]
    pub queues: (u32, u32),
    /// Interface group.
    #[serde(default)]
    pub group: u32,
    /// `ip link ... alias`.
    #[serde(default)]
    pub alias: Option<String>,
    /// The bridge, bond or VRF in the same namespace that it is part of.
    #[serde(default)]
    pub master: Option<String>,
    /// `IFLA_INET6_ADDR_GEN_MODE`: how IPv6 link-local addresses are made; None without IPv6.
    #[serde(default)]
    pub addr_gen_mode: Option<u8>,
    /// Addresses in the kernel's order (the first of a subnet is the primary one).
    #[serde(default)]
    pub addresses: Vec<Address>,
}

impl Link {
    /// Whether the link's other side lies outside of the namespace, so that the node has to attach it to something.
    pub fn needs_attachment(&self) -> bool {
        matches!(self.kind, Kind::Veth { peer: None } | Kind::Macvlan { parent: None, .. })
    }
}

/// A link's type.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Kind {
    /// `lo`.
    Loopback,
    /// One end of a veth pair; `peer` is the other if it is in the same namespace, else it is the node's.
    Veth {
        /// The other end's name.
        #[serde(default)]
        peer: Option<String>,
    },
    /// A MAC-VLAN; without a `parent` in the namespace it is rebuilt as a veth with the same name and MAC.
    Macvlan {
        /// The link below.
        #[serde(default)]
        parent: Option<String>,
        /// `IFLA_INFO_DATA`, as far as it can be set.
        #[serde(default)]
        options: Vec<Attr>,
    },
    /// A dummy.
    Dummy,
    /// A bridge inside the namespace.
    Bridge {
        /// `IFLA_INFO_DATA`, as far as it can be set.
        #[serde(default)]
        options: Vec<Attr>,
    },
    /// A VLAN on `parent`.
    Vlan {
        /// The link below.
        parent: String,
        /// `IFLA_INFO_DATA`, as far as it can be set.
        #[serde(default)]
        options: Vec<Attr>,
    },
}

impl Kind {
    /// The kernel's name of the type.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Loopback => "loopback",
            Kind::Veth { .. } => "veth",
            Kind::Macvlan { .. } => "macvlan",
            Kind::Dummy => "dummy",
            Kind::Bridge { .. } => "bridge",
            Kind::Vlan { .. } => "vlan",
        }
    }
}

/// An address of a link.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Address {
    /// The address itself.
    pub address: IpAddr,
    /// The other end of a point-to-point link.
    #[serde(default)]
    pub peer: Option<IpAddr>,
    /// Length of the prefix in bits.
    pub prefix: u8,
    /// `RT_SCOPE_*`.
    #[serde(default)]
    pub scope: u8,
    /// Those of the `IFA_F_*` that a user can set.
    #[serde(default)]
    pub flags: u32,
    /// IPv4 broadcast address.
    #[serde(default)]
    pub broadcast: Option<IpAddr>,
    /// IPv4 label, when it is not the link's name.
    #[serde(default)]
    pub label: Option<String>,
    /// Metric of the prefix route.
    #[serde(default)]
    pub metric: Option<u32>,
    /// `IFAPROT_*`: who made it.
    #[serde(default)]
    pub protocol: Option<u8>,
    /// Seconds that a dynamic address is still valid and still preferred; None: for ever.
    #[serde(default)]
    pub lifetime: Option<(u32, u32)>,
}

/// A route: `struct rtmsg`, the links by name, and the attributes.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Route {
    /// Address family.
    pub family: u8,
    /// Length of the destination's prefix in bits.
    pub dst_len: u8,
    /// Length of the source's prefix in bits.
    #[serde(default)]
    pub src_len: u8,
    /// Type of service.
    #[serde(default)]
    pub tos: u8,
    /// `RTPROT_*`: who made it.
    pub protocol: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTN_*`.
    pub kind: u8,
    /// Table number.
    pub table: u32,
    /// `RTNH_F_ONLINK` or 0.
    #[serde(default)]
    pub flags: u32,
    /// Outgoing link.
    #[serde(default)]
    pub dev: Option<String>,
    /// Next hops of a multipath route.
    #[serde(default)]
    pub hops: Vec<Hop>,
    /// Seconds until it expires (from a router advertisement).
    #[serde(default)]
    pub expires: Option<u32>,
    /// The other attributes (`RTA_*`), sorted.
    #[serde(default)]
    pub attrs: Vec<Attr>,
}

/// A next hop of a multipath route.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Hop {
    /// Outgoing link.
    #[serde(default)]
    pub dev: Option<String>,
    /// `RTNH_F_ONLINK` or 0.
    #[serde(default)]
    pub flags: u8,
    /// Weight minus one.
    #[serde(default)]
    pub weight: u8,
    /// `RTA_GATEWAY`, `RTA_VIA`, encapsulation.
    #[serde(default)]
    pub attrs: Vec<Attr>,
}

/// A policy rule: `struct fib_rule_hdr` and its attributes (`FRA_*`, links by name already).
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Rule {
    /// Address family.
    pub family: u8,
    /// Length of the destination's prefix in bits.
    #[serde(default)]
    pub dst_len: u8,
    /// Length of the source's prefix in bits.
    #[serde(default)]
    pub src_len: u8,
    /// Type of service.
    #[serde(default)]
    pub tos: u8,
    /// Table number.
    pub table: u32,
    /// `FR_ACT_*`.
    pub action: u8,
    /// `FIB_RULE_INVERT` or 0.
    #[serde(default)]
    pub flags: u32,
    /// The other attributes (`FRA_*`), sorted.
    #[serde(default)]
    pub attrs: Vec<Attr>,
}

/// A neighbour that does not expire.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Neighbour {
    /// Its link; a proxy entry may have none.
    #[serde(default)]
    pub dev: Option<String>,
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// Whether this is an entry of the proxy table (`ip neigh show proxy`).
    #[serde(default)]
    pub proxy: bool,
    /// `NTF_*` that a user can set (router).
    #[serde(default)]
    pub flags: u8,
}

/// A netlink attribute as the kernel wrote it.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attr {
    /// Type.
    pub kind: u16,
    /// Value; hexadecimal when encoded.
    #[serde(with = "hex")]
    pub value: Vec<u8>,
}

impl Attr {
    /// An attribute from its parts.
    pub fn new(kind: u16, value: &[u8]) -> Self {
        Self { kind, value: value.to_vec() }
    }
}

impl fmt::Debug for Attr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.kind, hex::encode(&self.value))
    }
}

/// A hardware address of six bytes.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Mac {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|part| {
                let plain = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
                plain.then(|| u8::from_str_radix(part, 16).ok()).flatten()
            })
            .collect();
        bytes
            .and_then(|b| b.try_into().ok())
            .map(Mac)
            .ok_or_else(|| format!("{text:?} is not a hardware address of six bytes"))
    }
}

mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn encode(bytes: &[u8]) -> String {
        use std::fmt::Write;
        bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
        let digits =
            digits.filter(|d| d.len() % 2 == 0).ok_or_else(|| D::Error::custom("not hexadecimal"))?;
        Ok(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_as_text() {
        assert_eq!("02:00:0a:ff:00:01".parse(), Ok(Mac([2, 0, 10, 255, 0, 1])));
        assert_eq!(Mac([2, 0, 10, 255, 0, 1]).to_string(), "02:00:0a:ff:00:01");
        for bad in
            ["", "02:00:0a:ff:00", "02:00:0a:ff:00:01:02", "0x:00:0a:ff:00:01", "+2:00:0a:ff:00:01", "é:00"]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn json_round_trip_and_fields_of_a_later_version() {
        let link = Link {
            name: "eth0".into(),
            index: 2,
            kind: Kind::Veth { peer: None },
            mac: Some(Mac([2, 0, 0, 0, 0, 1])),
            mtu: 1450,
            up: true,
            flags: 0x1000,
            txqueuelen: 1000,
            queues: (1, 1),
            group: 0,
            alias: None,
            master: None,
            addr_gen_mode: Some(0),
            addresses: vec![],
        };
        let config = NetConfig {
            links: vec![link],
            rules: vec![Rule {
                family: 2,
                dst_len: 0,
                src_len: 0,
                tos: 0,
                table: 254,
                action: 1,
                flags: 0,
                attrs: vec![Attr::new(6, &[0, 1, 0xfe])],
            }],
            ..NetConfig::default()
        };
        let mut json = serde_json::to_value(&config).unwrap();
        assert_eq!(serde_json::from_value::<NetConfig>(json.clone()).unwrap(), config);
        assert_eq!(json["rules"][0]["attrs"][0]["value"], "0001fe");
        json["something_new"] = 1.into();
        json.as_object_mut().unwrap().remove("sysctls");
        assert_eq!(serde_json::from_value::<NetConfig>(json).unwrap(), config);
    }
}
