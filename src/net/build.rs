//! A namespace made from its description, fenced and not yet on the segment; and the namespace destroyed again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::config::{Kind, Link, NetConfig};
use super::links::{self, Made, NodeEnd};
use super::socket::{Netlink, errno_of, unless};
use super::sysctl::{self, Part};
use super::wire::Request;
use super::{fence, netns, port, routes};

/// How this node attaches containers, from its agent.toml.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attach {
    /// The bridge in the node's namespace that containers' veths go into.
    pub bridge: Option<String>,
}

/// Makes the namespace that `config` describes and binds it at `path`, as `ip netns add` does.
///
/// Afterwards its addresses and routes can be used from inside (sockets bind, repaired connections connect), but it is
/// fenced and the node's ends of its links are in no bridge: nothing of it can be seen outside until [`fence::unfence`].
/// Call it from the namespace in which the bridge is: the node's.
///
/// # Errors
/// A missing bridge, a path that exists, whatever the kernel refuses. What was made is removed again.
pub fn build(config: &NetConfig, path: &Path, attach: &Attach) -> Result<()> {
    let order = links::order(config)?;
    check_keys(config)?;
    let mut node = Netlink::route()?;
    let node_netns = netns::current()?;
    let bridge = match config.links.iter().find(|l| l.needs_attachment()) {
        None => None,
        Some(link) => {
            let Some(name) = attach.bridge.as_deref() else {
                bail!(
                    "link {} has to be attached to this node's network, but no bridge is configured: \
                     set `bridge = \"...\"` in agent.toml",
                    link.name
                );
            };
            Some((port::bridge(&mut node, name)?, name))
        }
    };
    let made = netns::create(path)?;
    let work = Work { config, order, path, node_netns, bridge };
    let done = fence::fence(made.as_fd()).and_then(|()| work.populate(made.as_fd(), &mut node));
    drop(made);
    if let Err(error) = done {
        return Err(match destroy(path) {
            Ok(()) => error,
            Err(again) => {
                error.context(format!("and {} could not be removed again: {again:#}", path.display()))
            }
        });
    }
    Ok(())
}

/// Sysctl keys become paths.
pub(super) fn check_keys(config: &NetConfig) -> Result<()> {
    for key in config.sysctls.keys().chain(config.inherited_sysctls.keys()) {
        if key.is_empty() || key.split('/').any(|part| matches!(part, "" | "." | "..")) || key.contains('\0')
        {
            bail!("{key:?} is not the name of a sysctl");
        }
    }
    Ok(())
}

struct Work<'a> {
    config: &'a NetConfig,
    order: Vec<usize>,
    path: &'a Path,
    node_netns: OwnedFd,
    bridge: Option<(u32, &'a str)>,
}

impl Work<'_> {
    fn populate(&self, netns: BorrowedFd<'_>, node: &mut Netlink) -> Result<()> {
        let config = self.config;
        let sysctls = |part| {
            netns::inside(netns, || {
                sysctl::write(&config.sysctls, &config.inherited_sysctls, part)?;
                Netlink::route()
            })
        };
        let mut inside = sysctls(Part::Namespace)?;
        let made = self.make_links(&mut inside, node)?;
        for link in self.in_order() {
            links::configure(&mut inside, link, &made)?;
        }
        sysctls(Part::Links)?;
        for link in self.in_order().filter(|l| l.up) {
            links::up(&mut inside, link, &made)?;
        }
        wait_for_carrier(&mut inside, config)?;
        routes::addresses(&mut inside, config, &made)?;
        for link in &config.links {
            links::addr_gen_mode(&mut inside, link, &made)?;
        }
        routes::neighbours(&mut inside, config, &made)?;
        routes::rules(&mut inside, config)?;
        // Setting a link up can change some of its sysctls (and forwarding those of others).
        sysctls(Part::Links)?;
        routes::remove_extra_addresses(&mut inside, config, &made)?;
        routes::routes(&mut inside, config, &made)
    }

    fn in_order(&self) -> impl Iterator<Item = &Link> {
        self.order.iter().map(|at| &self.config.links[*at])
    }

    fn make_links(&self, inside: &mut Netlink, node: &mut Netlink) -> Result<Made> {
        let mut made = Made::new();
        let index = |socket: &mut Netlink, name: &str| -> Result<u32> {
            let found = port::links(socket)?.into_iter().find(|l| l.name == name);
            Ok(found.with_context(|| format!("link {name} is not there after it was made"))?.index)
        };
        for link in self.in_order() {
            if link.kind != Kind::Loopback && !made.contains_key(&link.name) {
                match self.bridge.filter(|_| link.needs_attachment()) {
                    Some((bridge, name)) => {
                        let end = self.make_veth(inside, link)?;
                        let end = index(node, &end)?;
                        port::prepare(node, end, bridge, name)?;
                    }
                    None => links::create(inside, self.config, link, None, &made)?,
                }
            }
            made.insert(link.name.clone(), index(inside, &link.name)?);
            if let Kind::Veth { peer: Some(peer) } = &link.kind
                && !made.contains_key(peer)
            {
                made.insert(peer.clone(), index(inside, peer)?);
            }
        }
        Ok(made)
    }

    /// Makes a veth to the node; returns the name of the node's end.
    fn make_veth(&self, inside: &mut Netlink, link: &Link) -> Result<String> {
        let path = self.path.to_string_lossy();
        let mut attempt = 0;
        loop {
            let name = port::name(&path, &link.name, attempt);
            let end = NodeEnd { netns: self.node_netns.as_fd(), name: name.clone() };
            match links::create(inside, self.config, link, Some(&end), &Made::new()) {
                Ok(()) => return Ok(name),
                Err(e) if attempt < 4 && errno_of(&e) == Some(libc::EEXIST) => attempt += 1,
                Err(e) => return Err(e),
            }
        }
    }
}

/// Waits until the links to the node can carry: the kernel's link watch tells IPv6 some milliseconds later.
fn wait_for_carrier(inside: &mut Netlink, config: &NetConfig) -> Result<()> {
    const IF_OPER_UP: u8 = 6;
    let limit = Instant::now() + Duration::from_secs(3);
    let wanted = |name: &str| config.links.iter().any(|l| l.name == name && l.up && l.needs_attachment());
    loop {
        let all = port::links(inside)?;
        let Some(down) = all.iter().find(|l| wanted(&l.name) && l.operstate != IF_OPER_UP) else {
            return Ok(());
        };
        if Instant::now() > limit {
            bail!("link {} got no carrier within 3 s", down.name);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Destroys the namespace bound at `path`: its links (with their ends on the node), the mount, the file.
/// `Ok` when it is gone already. What processes in it still hold goes with them.
pub fn destroy(path: &Path) -> Result<()> {
    match netns::open(path) {
        Ok(netns) => {
            if netns::same(&netns, netns::current()?)? {
                bail!("{} is the namespace of the node itself", path.display());
            }
            delete_links(netns.as_fd())?;
        }
        Err(_) if !path.exists() => return Ok(()),
        // A file whose mount is gone: `remove` decides.
        Err(_) => {}
    }
    netns::remove(path)
}

/// Left to itself the kernel deletes them some time after the last user of the namespace is gone.
fn delete_links(netns: BorrowedFd<'_>) -> Result<()> {
    let mut inside = netns::inside(netns, Netlink::route)?;
    for link in port::links(&mut inside)? {
        if matches!(link.kind.as_str(), "veth" | "macvlan" | "vlan" | "dummy" | "bridge") {
            let request = Request::new(libc::RTM_DELLINK, 0, &port::ifinfomsg(link.index, 0, 0));
            // Gone together with its other end or its parent.
            unless(inside.request(request), libc::ENODEV)
                .with_context(|| format!("deleting link {}", link.name))?;
        }
    }
    Ok(())
}
