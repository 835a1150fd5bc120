//! `/proc/sys/net` as a map. Which namespace's it is depends on the thread that reads: call these inside.
//!
//! Keys are paths below `/proc/sys/net`, as a link's name may contain dots.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Result, bail};

const ROOT: &str = "/proc/sys/net";

/// Key -> value.
pub type Tree = BTreeMap<String, String>;

/// Reads every sysctl of the calling thread's namespace that can be written.
pub fn read() -> Tree {
    let mut tree = Tree::new();
    walk(Path::new(ROOT), &mut tree);
    tree
}

fn walk(dir: &Path, tree: &mut Tree) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            walk(&path, tree);
        } else if metadata.permissions().mode() & 0o600 == 0o600
            && let Ok(key) = path.strip_prefix(ROOT)
            && let Some(key) = key.to_str()
            && !is_excluded(key)
            // Some refuse to be read until they are set (stable_secret).
            && let Ok(value) = fs::read_to_string(&path)
        {
            tree.insert(key.to_string(), value.trim_end().to_string());
        }
    }
}

/// Not configuration, or carried elsewhere: a link's `addr_gen_mode` and MTU belong to the link.
fn is_excluded(key: &str) -> bool {
    let of_link = link_of(key).is_some();
    key.ends_with("/route/flush")
        || of_link && (key.ends_with("/addr_gen_mode") || key.starts_with("ipv6/") && key.ends_with("/mtu"))
}

/// The link that a key belongs to: `ipv4/conf/eth0/rp_filter` -> `eth0`. `all` and `default` are none.
pub fn link_of(key: &str) -> Option<&str> {
    let mut parts = key.split('/');
    let (_, group, name) = (parts.next()?, parts.next()?, parts.next()?);
    parts.next()?;
    (matches!(group, "conf" | "neigh") && !matches!(name, "all" | "default")).then_some(name)
}

/// Splits what a namespace has into what was changed there and what it was born with. `fresh` is a new namespace's.
/// What a link took over from its namespace's `default`, as each new link does, is in neither.
pub fn split(tree: Tree, fresh: &Tree) -> (Tree, Tree) {
    let other = |of: &Tree, key: &str, link: &str| {
        let name = link_of(key)?;
        of.get(&key.replacen(&format!("/{name}/"), &format!("/{link}/"), 1)).cloned()
    };
    let (mut changed, mut born) = (Tree::new(), Tree::new());
    for (key, value) in &tree {
        if !fresh.contains_key(key) && other(&tree, key, "default").as_ref() == Some(value) {
            continue;
        }
        // `neigh/default` is the machine's and not seen inside: a link has from it what a new loopback has.
        let at_birth =
            fresh.get(key).cloned().or_else(|| other(fresh, key, "lo").filter(|_| key.contains("/neigh/")));
        let into = if at_birth.as_ref() == Some(value) { &mut born } else { &mut changed };
        into.insert(key.clone(), value.clone());
    }
    (changed, born)
}

/// Which keys [`write`] is to treat.
#[derive(Clone, Copy, PartialEq)]
pub enum Part {
    /// Those of the namespace, `all` and `default`.
    Namespace,
    /// Those of links.
    Links,
}

/// Gives the calling thread's namespace the values of `changed`, and those of `inherited` as far as it can.
///
/// # Errors
/// When a value of `changed` cannot be reached; the message names it.
pub fn write(changed: &Tree, inherited: &Tree, part: Part) -> Result<()> {
    let wanted = |key: &str| link_of(key).is_some() == (part == Part::Links);
    let mut keys: Vec<(&String, &String)> =
        inherited.iter().chain(changed).filter(|(key, _)| wanted(key)).collect();
    keys.sort_by_key(|(key, _)| (rank(key), *key));
    // Setting one can change others (ip_forward, conf/all/...), so until nothing has to be changed any more.
    let mut failed = BTreeMap::new();
    for _ in 0..4 {
        let mut wrote = false;
        failed.clear();
        for (key, value) in &keys {
            let path = Path::new(ROOT).join(key);
            let now = fs::read_to_string(&path).map(|v| v.trim_end().to_string());
            if matches!(&now, Ok(now) if now == *value) {
                continue;
            }
            match fs::write(&path, value.as_bytes()) {
                Ok(()) => wrote = true,
                Err(e) => drop(failed.insert(key.as_str(), e)),
            }
        }
        if !wrote {
            break;
        }
    }
    for (key, value) in keys {
        let now = fs::read_to_string(Path::new(ROOT).join(key)).unwrap_or_default();
        if now.trim_end() != *value && !failed.contains_key(key.as_str()) {
            let error = std::io::Error::other(format!("it reads {:?} afterwards", now.trim_end()));
            failed.insert(key, error);
        }
    }
    for (key, error) in failed {
        if changed.contains_key(key) {
            bail!("sysctl net/{key} cannot be set to {:?} on this node: {error}", changed[key]);
        }
        log::debug!("sysctl net/{key} keeps this node's value: {error}");
    }
    Ok(())
}

/// Switches that change others come before what they change.
fn rank(key: &str) -> u8 {
    if key == "ipv4/ip_forward" {
        0
    } else if key.contains("/all/") {
        1
    } else if key.contains("/default/") {
        2
    } else {
        3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(items: &[(&str, &str)]) -> Tree {
        items.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn links_in_keys() {
        assert_eq!(link_of("ipv4/conf/eth0.5/rp_filter"), Some("eth0.5"));
        assert_eq!(link_of("ipv6/neigh/eth0/gc_stale_time"), Some("eth0"));
        assert_eq!(link_of("ipv4/conf/all/rp_filter"), None);
        assert_eq!(link_of("ipv4/ip_forward"), None);
        assert_eq!(link_of("core/somaxconn"), None);
        assert!(is_excluded("ipv6/conf/eth0/addr_gen_mode"));
        assert!(!is_excluded("ipv6/conf/default/addr_gen_mode"));
    }

    #[test]
    fn a_link_is_compared_with_default() {
        let fresh = tree(&[
            ("core/somaxconn", "4096"),
            ("ipv4/conf/default/rp_filter", "0"),
            ("ipv4/conf/lo/rp_filter", "0"),
        ]);
        let now = tree(&[
            ("core/somaxconn", "100"),
            ("ipv4/conf/default/rp_filter", "1"),
            ("ipv4/conf/lo/rp_filter", "0"),
            ("ipv4/conf/eth0/rp_filter", "1"),
            ("ipv4/conf/eth1/rp_filter", "2"),
        ]);
        let (changed, born) = split(now, &fresh);
        let changed: Vec<&str> = changed.keys().map(String::as_str).collect();
        assert_eq!(changed, ["core/somaxconn", "ipv4/conf/default/rp_filter", "ipv4/conf/eth1/rp_filter"]);
        assert_eq!(born, tree(&[("ipv4/conf/lo/rp_filter", "0")]), "eth0's comes with `default`");
    }

    #[test]
    fn neighbour_settings_are_compared_with_a_new_loopback() {
        let fresh = tree(&[("ipv4/neigh/lo/gc_stale_time", "60")]);
        let now = tree(&[("ipv4/neigh/eth0/gc_stale_time", "60"), ("ipv4/neigh/eth1/gc_stale_time", "9")]);
        let (changed, born) = split(now, &fresh);
        assert_eq!(changed, tree(&[("ipv4/neigh/eth1/gc_stale_time", "9")]));
        assert_eq!(born.len(), 1);
    }

    #[test]
    fn switches_first() {
        let mut keys = ["ipv4/conf/lo/x", "ipv4/conf/default/x", "ipv4/conf/all/x", "ipv4/ip_forward"];
        keys.sort_by_key(|k| rank(k));
        assert_eq!(keys[0], "ipv4/ip_forward");
        assert_eq!(keys[3], "ipv4/conf/lo/x");
    }
}
