//! What an OCI spec says that matters to a move, and the few changes made to it on the destination. Pure.

use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};

/// A namespace as a spec asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpecNamespace {
    /// The node's.
    Host,
    /// A new one.
    Own,
    /// The one at this path.
    At(PathBuf),
}

/// Which namespace of a kind (`network`, `pid`, `ipc`, ...) the container has.
pub fn namespace(spec: &Value, kind: &str) -> SpecNamespace {
    let list = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    let entry = list.into_iter().flatten().find(|n| n["type"] == kind);
    match entry {
        None => SpecNamespace::Host,
        Some(entry) => match entry["path"].as_str() {
            None | Some("") => SpecNamespace::Own,
            Some(path) => SpecNamespace::At(path.into()),
        },
    }
}

/// Sets the path of the network namespace.
pub fn set_network(spec: &mut Value, path: &Path) {
    let list = spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut);
    for entry in list.into_iter().flatten().filter(|n| n["type"] == "network") {
        entry["path"] = json!(path.to_string_lossy());
    }
}

/// Gives a container with another name (namespace and id) the cgroup of that name, if it had the one of its own name.
pub fn move_cgroup(spec: &mut Value, was: (&str, &str), is: (&str, &str)) {
    if let Some(path) = spec.pointer_mut("/linux/cgroupsPath")
        && *path == format!("/{}/{}", was.0, was.1)
    {
        *path = json!(format!("/{}/{}", is.0, is.1));
    }
}

/// Sources of mounts from the node's filesystem.
pub fn host_mounts(spec: &Value) -> Vec<PathBuf> {
    let mounts = spec["mounts"].as_array();
    let binds = mounts.into_iter().flatten().filter(|m| {
        let options = m["options"].as_array();
        m["type"] == "bind" || options.into_iter().flatten().any(|o| o == "bind" || o == "rbind")
    });
    binds.map(|m| PathBuf::from(m["source"].as_str().unwrap_or_default())).collect()
}

/// Is `path` one of the listed ones or below one? A path with `..` in it never is.
pub fn is_listed(path: &Path, listed: &[PathBuf]) -> bool {
    path.is_absolute()
        && path.components().all(|c| c != Component::ParentDir)
        && listed.iter().any(|l| path.starts_with(l))
}

/// Whether the container has a terminal.
pub fn terminal(spec: &Value) -> bool {
    spec.pointer("/process/terminal").and_then(Value::as_bool).unwrap_or(false)
}

/// The path at which a network namespace of that path on the source is made on the destination: the same one if it is a
/// plain name in the directory of named namespaces, else `None`. The path comes from another node.
pub fn safe_netns(path: &Path) -> Option<PathBuf> {
    let name = path.strip_prefix("/run/netns").or_else(|_| path.strip_prefix("/var/run/netns")).ok()?;
    let mut parts = name.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(only)), None) if only.len() <= 200 => {
            Some(Path::new("/run/netns").join(only))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces() {
        let mut spec = json!({"linux": {"namespaces": [
            {"type": "pid"}, {"type": "network", "path": "/run/netns/x"}, {"type": "ipc", "path": ""}]}});
        assert_eq!(namespace(&spec, "pid"), SpecNamespace::Own);
        assert_eq!(namespace(&spec, "ipc"), SpecNamespace::Own);
        assert_eq!(namespace(&spec, "network"), SpecNamespace::At("/run/netns/x".into()));
        assert_eq!(namespace(&spec, "user"), SpecNamespace::Host);
        assert_eq!(namespace(&Value::Null, "pid"), SpecNamespace::Host);
        set_network(&mut spec, Path::new("/run/netns/y"));
        assert_eq!(namespace(&spec, "network"), SpecNamespace::At("/run/netns/y".into()));
        assert_eq!(namespace(&spec, "pid"), SpecNamespace::Own);
    }

    #[test]
    fn a_cgroup_of_its_own_name_goes_along() {
        let of = |path: &str| {
            let mut spec = json!({"linux": {"cgroupsPath": path}});
            move_cgroup(&mut spec, ("default", "a"), ("other", "b"));
            spec["linux"]["cgroupsPath"].as_str().map(str::to_string)
        };
        assert_eq!(of("/default/a").as_deref(), Some("/other/b"));
        assert_eq!(of("/default/c").as_deref(), Some("/default/c"));
    }

    #[test]
    fn mounts_from_the_node() {
        let spec = json!({"mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/a", "type": "bind", "source": "/srv/a"},
            {"destination": "/b", "type": "none", "source": "/srv/b", "options": ["rbind", "ro"]}]});
        assert_eq!(host_mounts(&spec), [PathBuf::from("/srv/a"), "/srv/b".into()]);
        let listed = [PathBuf::from("/srv")];
        assert!(is_listed(Path::new("/srv/a"), &listed) && is_listed(Path::new("/srv"), &listed));
        for bad in ["/srvx", "/srv/../etc", "srv/a", "", "/"] {
            assert!(!is_listed(Path::new(bad), &listed), "{bad}");
        }
    }

    #[test]
    fn paths_of_network_namespaces() {
        assert_eq!(safe_netns(Path::new("/var/run/netns/cni-1")), Some("/run/netns/cni-1".into()));
        for bad in ["/run/netns", "/run/netns/a/b", "/run/netns/../x", "/proc/1/ns/net", "/run/netns/..", "x"]
        {
            assert_eq!(safe_netns(Path::new(bad)), None, "{bad}");
        }
    }
}
