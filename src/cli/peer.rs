//! `HOST[:PORT]` of another node's agent.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// The port that agents listen on unless told otherwise.
pub const DEFAULT_PORT: u16 = crate::agent::config::DEFAULT_PORT;

/// A destination: displayed as `host:port`, IPv6 addresses in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// A name or an address, without brackets.
    pub host: String,
    /// The agent's port.
    pub port: u16,
}

impl FromStr for Peer {
    type Err = String;

    /// `node-b`, `node-b:7420`, `10.0.0.2`, `[::1]`, `[::1]:7420`, and `::1`, whose colons all belong to the address.
    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or("the bracket is not closed")?;
                let address = host.split_once('%').map_or(host, |(a, _)| a);
                address.parse::<Ipv6Addr>().map_err(|_| format!("{host:?} is no IPv6 address"))?;
                match rest.strip_prefix(':') {
                    Some(port) => (host, Some(port)),
                    None if rest.is_empty() => (host, None),
                    None => return Err(format!("{rest:?} after the bracket: expected :PORT")),
                }
            }
            None if text.matches(':').count() > 1 => {
                let address = text.split_once('%').map_or(text, |(a, _)| a);
                address
                    .parse::<Ipv6Addr>()
                    .map_err(|_| "more than one colon, and no IPv6 address".to_string())?;
                (text, None)
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/') {
            return Err(format!("{host:?} is no host"));
        }
        let port = match port {
            // parse() would take a sign as well
            Some(p) if p.bytes().all(|b| b.is_ascii_digit()) => {
                p.parse().ok().filter(|p| *p != 0).ok_or_else(|| format!("{p:?} is no port (1 to 65535)"))?
            }
            Some(p) => return Err(format!("{p:?} is no port (1 to 65535)")),
            None => DEFAULT_PORT,
        };
        Ok(Self { host: host.into(), port })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_peer() {
        for (text, want) in [
            ("node-b", "node-b:7420"),
            ("node-b:1", "node-b:1"),
            ("10.0.0.2", "10.0.0.2:7420"),
            ("10.0.0.2:65535", "10.0.0.2:65535"),
            ("[::1]", "[::1]:7420"),
            ("[::1]:7421", "[::1]:7421"),
            ("::1", "[::1]:7420"),
            ("fd00::a:7421", "[fd00::a:7421]:7420"),
            ("[fe80::1%eth0]:9", "[fe80::1%eth0]:9"),
        ] {
            let peer: Peer = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(peer.to_string(), want, "{text}");
            assert_eq!(peer.to_string().parse(), Ok(peer), "what is displayed is read back");
        }
    }

    #[test]
    fn what_is_no_peer() {
        for text in [
            "",
            ":7420",
            "node-b:",
            "node-b:0",
            "node-b:65536",
            "node-b:+1",
            "node-b:x",
            "a:b:c",
            "[::1",
            "[::1]x",
            "[node]:1",
            "no de",
            "https://x",
        ] {
            assert!(text.parse::<Peer>().is_err(), "{text:?}");
        }
    }
}
