//! Where the tasks are to be put: `cgroup.img`.
//!
//! runc tells CRIU the container's own cgroup in each hierarchy. CRIU puts that in place of the start of a path when one of the image's
//! folders is that start, compared letter by letter, folder after folder: a path that no folder fits stays as it is, and one of which a
//! folder is only half a name comes out beside the container's cgroup. Names of hierarchies become a path, and options of a mount (one of
//! them names a program that the kernel starts).

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};

use super::{Caps, Measure, Subject, image, namespaces};
use crate::policy::model::Spec;

pub(super) const CGROUP_MAGIC: u32 = 0x5938_3330;

/// `cgroup_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cgroups {
    #[prost(message, repeated, tag = "1")]
    pub sets: Vec<Set>,
    #[prost(message, repeated, tag = "2")]
    pub controllers: Vec<Controller>,
}

/// `cg_set_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Set {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(message, repeated, tag = "2")]
    pub members: Vec<Member>,
}

/// `cg_member_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Member {
    #[prost(string, required, tag = "1")]
    pub name: String,
    #[prost(string, required, tag = "2")]
    pub path: String,
    #[prost(uint32, optional, tag = "3")]
    pub prefix: Option<u32>,
}

/// `cg_controller_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Controller {
    #[prost(string, repeated, tag = "1")]
    pub names: Vec<String>,
    #[prost(message, repeated, tag = "2")]
    pub dirs: Vec<Dir>,
}

/// `cgroup_dir_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Dir {
    #[prost(string, required, tag = "1")]
    pub name: String,
    #[prost(message, repeated, tag = "2")]
    pub children: Vec<Dir>,
    #[prost(message, repeated, tag = "3")]
    pub properties: Vec<Property>,
}

/// `cgroup_prop_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Property {
    #[prost(string, required, tag = "1")]
    pub name: String,
    #[prost(string, required, tag = "2")]
    pub value: String,
}

pub(super) fn check(subject: &Subject<'_>, spec: &Spec, caps: Caps) -> Result<()> {
    let Some(all) = image::read::<Cgroups>(&subject.images.join("cgroup.img"), CGROUP_MAGIC)? else {
        return Ok(());
    };
    // runc has put CRIU, and so the tasks, where they belong; a dump of ours leaves the rest out
    let none = matches!(subject.measure, Measure::Policy { .. }) && !namespaces::has_own(spec, "cgroup");
    ensure!(all.len() <= 1, "cgroup.img has {} entries", all.len());
    for cgroups in &all {
        let empty = members(cgroups).next().is_none() && cgroups.controllers.is_empty();
        ensure!(
            empty || !none,
            "the checkpoint says which cgroups of this node its tasks are to be put into"
        );
        // systemd in a container has several folders, and no task in the one above them; it has to be able to make them
        one(cgroups, caps.has("CAP_SYS_ADMIN"))?;
    }
    Ok(())
}

fn members(cgroups: &Cgroups) -> impl Iterator<Item = &Member> {
    cgroups.sets.iter().flat_map(|s| &s.members)
}

/// `many`: a hierarchy may have several folders.
pub(super) fn one(cgroups: &Cgroups, many: bool) -> Result<()> {
    let mut seen = HashSet::new();
    for controller in &cgroups.controllers {
        ensure!(!controller.names.is_empty(), "the checkpoint has a hierarchy of cgroups without a name");
        for name in &controller.names {
            ensure!(is_hierarchy(name), "the checkpoint has a hierarchy of cgroups {name:?}");
            ensure!(seen.insert(name), "the checkpoint has the hierarchy of cgroups {name:?} twice");
        }
        controller.dirs.iter().try_for_each(|d| dir(d, 0))?;
        // a second folder is compared with what the first has made of the paths
        let folders = controller.dirs.len();
        ensure!(folders <= 1 || many, "the checkpoint has {folders} folders of cgroups, not one");
        for dir in &controller.dirs {
            ensure!(!dir.name.starts_with('/'), "the checkpoint makes the cgroup {:?}", dir.name);
            let used =
                members(cgroups).any(|m| controller.names.contains(&m.name) && is_below(&m.path, &dir.name));
            // nothing would be put in place of its name
            ensure!(used, "the checkpoint makes the cgroup {:?}, in which it has no task", dir.name);
        }
    }
    for member in members(cgroups) {
        let of = cgroups.controllers.iter().find(|c| c.names.contains(&member.name));
        of.context("of no hierarchy").and_then(|c| put(member, &c.dirs)).with_context(|| {
            format!("the checkpoint has a task in the cgroup {} of {:?}", member.path, member.name)
        })?;
    }
    Ok(())
}

/// A member ends up below the container's own cgroup.
fn put(member: &Member, dirs: &[Dir]) -> Result<()> {
    ensure!(plain(&member.path) && member.path.starts_with('/'), "no path");
    let parts = |at: u32| member.path.split_at_checked(at as usize);
    match member.prefix.filter(|p| *p > 0) {
        // the root of its namespace is replaced, however often
        Some(at) => {
            let (prefix, rest) = parts(at).context("a root behind the end of the path")?;
            ensure!(rest.is_empty() || rest.starts_with('/'), "half a name as the root");
            let fits = |d: &Dir| {
                let at = format!("/{}", d.name);
                at.len() >= prefix.len() && is_below(&at, prefix)
            };
            ensure!(dirs.iter().all(fits), "folders beside its root");
            ensure!(dirs.iter().any(|d| is_below(&member.path, &d.name)), "no folder for it");
        }
        None => {
            ensure!(dirs.len() == 1, "{} folders, not one", dirs.len());
            ensure!(is_below(&member.path, &dirs[0].name), "its folder is {:?}", dirs[0].name);
        }
    }
    Ok(())
}

/// A name that can be a folder and a mount option: `cpu`, `name=systemd`, or none for cgroup v2.
fn is_hierarchy(name: &str) -> bool {
    let own = name.strip_prefix("name=");
    let word = own.unwrap_or(name);
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    word.bytes().all(fine) && (own.is_none() || !word.is_empty()) && !matches!(word, "." | "..")
}

fn dir(dir: &Dir, depth: usize) -> Result<()> {
    ensure!(plain(&dir.name) && depth < 64, "the checkpoint makes the cgroup {:?}", dir.name);
    for property in &dir.properties {
        let fine = match property.name.as_str() {
            "release_agent" => false,
            // CRIU notes them for the sake of their modes
            "cgroup.procs" | "tasks" => property.value.is_empty(),
            "notify_on_release" => property.value.trim() == "0",
            name => !name.contains('/'),
        };
        ensure!(fine, "the checkpoint writes to {} of the cgroup {}", property.name, dir.name);
    }
    dir.children.iter().try_for_each(|child| self::dir(child, depth + 1))
}

fn plain(path: &str) -> bool {
    !path.split('/').any(|part| part == "..")
}

/// The same, or below it by whole names. Below the root there is only the root: its name is empty, and what is put in its place would
/// have no end.
fn is_below(path: &str, dir: &str) -> bool {
    let (path, dir) = (path.strip_prefix('/').unwrap_or(path), dir.strip_prefix('/').unwrap_or(dir));
    path == dir || !dir.is_empty() && path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
}

/// What CRIU makes of an image (`rewrite_cgroup_roots`): paths of members and folders, for this cgroup of the container.
#[cfg(any(test, fuzzing))]
fn rewritten(mut cgroups: Cgroups, root: &str) -> (Vec<String>, Vec<String>) {
    let mut folders = Vec::new();
    for controller in cgroups.controllers.clone() {
        for dir in &controller.dirs {
            let mut folder = None;
            let members = cgroups.sets.iter_mut().flat_map(|s| &mut s.members);
            for member in members.filter(|m| controller.names.contains(&m.name)) {
                if !member.path.get(1..).is_some_and(|p| p.starts_with(&dir.name)) {
                    continue;
                }
                match member.prefix.filter(|p| *p > 0) {
                    Some(prefix) => {
                        member.path = [root, &member.path[prefix as usize..]].concat();
                        folder.get_or_insert([root, &dir.name[prefix as usize - 1..]].concat());
                        member.prefix = Some(root.len() as u32);
                    }
                    None => {
                        member.path = [root, &member.path[dir.name.len() + 1..]].concat();
                        folder.get_or_insert(root.to_string());
                    }
                }
            }
            folders.push(folder.unwrap_or_else(|| dir.name.clone()));
        }
    }
    (members(&cgroups).map(|m| m.path.clone()).collect(), folders)
}

/// Everything that CRIU would make or use of it lies in the container's cgroup.
#[cfg(any(test, fuzzing))]
pub(super) fn stays_below(cgroups: &Cgroups, root: &str) {
    let (members, folders) = rewritten(cgroups.clone(), root);
    let fine = |p: &String| p == root || p.starts_with(&format!("{root}/"));
    assert!(members.iter().chain(&folders).all(fine), "{cgroups:?} in {root}: {members:?} {folders:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is let through ends up in the container's own cgroup, wherever that is: tried with all small images of one hierarchy.
    #[test]
    fn nothing_that_passes_ends_up_beside_the_containers_cgroup() {
        let names = ["", "a", "ab", "a/b", "a/bc", "b"];
        let (mut passed, mut refused) = (0, 0);
        let mut paths: Vec<(String, Option<u32>)> = Vec::new();
        for name in names {
            let path = format!("/{name}");
            paths.extend((0..=path.len() as u32 + 1).map(|p| (path.clone(), (p > 0).then_some(p))));
        }
        let mut folders: Vec<Vec<&str>> = names.iter().map(|n| vec![*n]).collect();
        folders.extend(names.iter().flat_map(|a| names.iter().map(move |b| vec![*a, *b])));
        for first in &paths {
            for second in &paths {
                for dirs in &folders {
                    let member = |(path, prefix): &(String, Option<u32>)| Member {
                        name: "memory".into(),
                        path: path.clone(),
                        prefix: *prefix,
                    };
                    let dir = |name: &&str| Dir { name: name.to_string(), ..Dir::default() };
                    let cgroups = Cgroups {
                        sets: vec![Set { id: 2, members: vec![member(first), member(second)] }],
                        controllers: vec![Controller {
                            names: vec!["memory".into()],
                            dirs: dirs.iter().map(dir).collect(),
                        }],
                    };
                    if one(&cgroups, false).is_err() {
                        refused += 1;
                        continue;
                    }
                    passed += 1;
                    for root in ["/a", "/ab", "/a/b", "/x"] {
                        stays_below(&cgroups, root);
                    }
                }
            }
        }
        assert!(passed > 50 && refused > 1000, "{passed} {refused}");
    }
}
