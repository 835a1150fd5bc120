//! Where the tasks are to be put: `cgroup.img`.

use std::path::Path;

use anyhow::{Result, ensure};

use super::image;
use crate::policy::model::Spec;

const CGROUP_MAGIC: u32 = 0x5938_3330;

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
}

pub(super) fn check(images: &Path, spec: &Spec) -> Result<()> {
    let Some(all) = image::read::<Cgroups>(&images.join("cgroup.img"), CGROUP_MAGIC)? else { return Ok(()) };
    let own = spec.linux.iter().flat_map(|l| l.namespaces.iter().flatten()).any(|n| n.kind == "cgroup");
    all.iter().try_for_each(|c| one(c, own))
}

fn one(cgroups: &Cgroups, own: bool) -> Result<()> {
    let members = || cgroups.sets.iter().flat_map(|s| &s.members);
    if !own {
        // runc has put CRIU, and so the tasks, where they belong
        let none = members().next().is_none() && cgroups.controllers.is_empty();
        ensure!(none, "the checkpoint says which cgroups of this node its tasks are to be put into");
        return Ok(());
    }
    for controller in &cgroups.controllers {
        controller.dirs.iter().try_for_each(|d| dir(d, 0))?;
    }
    for member in members() {
        let plain = plain(&member.path);
        // only what lies below such a directory is put below the container's cgroup
        let controllers = cgroups.controllers.iter().filter(|c| c.names.contains(&member.name));
        let known = controllers.flat_map(|c| &c.dirs).any(|d| is_below(&member.path, &d.name));
        ensure!(
            plain && known,
            "the checkpoint has a task in the cgroup {} of {:?}",
            member.path,
            member.name
        );
    }
    Ok(())
}

fn dir(dir: &Dir, depth: usize) -> Result<()> {
    ensure!(plain(&dir.name) && depth < 64, "the checkpoint makes the cgroup {:?}", dir.name);
    for property in &dir.properties {
        let fine = !property.name.contains('/')
            && !matches!(
                property.name.as_str(),
                "release_agent" | "notify_on_release" | "cgroup.procs" | "tasks"
            );
        ensure!(fine, "the checkpoint writes to {} of the cgroup {}", property.name, dir.name);
    }
    dir.children.iter().try_for_each(|child| self::dir(child, depth + 1))
}

fn plain(path: &str) -> bool {
    !path.split('/').any(|part| part == "..")
}

fn is_below(path: &str, dir: &str) -> bool {
    let (path, dir) = (path.trim_matches('/'), dir.trim_matches('/'));
    dir.is_empty() || path == dir || path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
}
