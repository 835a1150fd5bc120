//! Tasks: `inventory.img`, `pstree.img`, `ids-*.img`, `core-*.img`, `userns-*.img`.

use std::cell::RefCell;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::limits::{Bounds, Inherited, Limits};
use super::namespaces::{has_own, is_apart};
use super::seccomp::Judge;
use super::{Caps, Measure, Subject, image, limits, namespaces};
use crate::policy::config::Required;
use crate::policy::model::{IdMapping, Spec};

const INVENTORY_MAGIC: u32 = 0x5831_3116;
const PSTREE_MAGIC: u32 = 0x5027_3030;
const IDS_MAGIC: u32 = 0x5443_2030;
const CORE_MAGIC: u32 = 0x5505_3847;
const USERNS_MAGIC: u32 = 0x5547_4906;

/// Where a security module shows that it is there.
const APPARMOR: &str = "/sys/kernel/security/apparmor";

#[derive(Clone, PartialEq, prost::Message)]
pub struct Inventory {
    #[prost(message, optional, tag = "3")]
    pub root_ids: Option<Ids>,
}

/// `task_kobj_ids_entry`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Ids {
    #[prost(uint32, optional, tag = "5")]
    pub pid: Option<u32>,
    #[prost(uint32, optional, tag = "6")]
    pub net: Option<u32>,
    #[prost(uint32, optional, tag = "7")]
    pub ipc: Option<u32>,
    #[prost(uint32, optional, tag = "8")]
    pub uts: Option<u32>,
    #[prost(uint32, optional, tag = "9")]
    pub mnt: Option<u32>,
    #[prost(uint32, optional, tag = "10")]
    pub user: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Process {
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    #[prost(uint32, required, tag = "2")]
    pub ppid: u32,
}

/// `core_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Core {
    #[prost(message, optional, tag = "3")]
    pub task: Option<Task>,
    #[prost(message, optional, tag = "4")]
    pub ids: Option<Ids>,
    #[prost(message, optional, tag = "5")]
    pub thread: Option<Thread>,
}

/// `task_core_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Task {
    #[prost(uint32, required, tag = "1")]
    pub state: u32,
    #[prost(message, optional, tag = "8")]
    pub rlimits: Option<Limits>,
    #[prost(uint32, optional, tag = "11")]
    pub old_seccomp_mode: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    pub old_seccomp_filter: Option<u32>,
    #[prost(int32, optional, tag = "14")]
    pub oom_score_adj: Option<i32>,
}

/// `thread_core_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Thread {
    #[prost(sint32, optional, tag = "3")]
    pub nice: Option<i32>,
    #[prost(uint32, optional, tag = "4")]
    pub sched_policy: Option<u32>,
    #[prost(message, optional, tag = "10")]
    pub creds: Option<Creds>,
    #[prost(uint32, optional, tag = "11")]
    pub seccomp_mode: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    pub seccomp_filter: Option<u32>,
}

/// `creds_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Creds {
    #[prost(uint32, required, tag = "1")]
    pub uid: u32,
    #[prost(uint32, required, tag = "2")]
    pub gid: u32,
    #[prost(uint32, required, tag = "3")]
    pub euid: u32,
    #[prost(uint32, required, tag = "4")]
    pub egid: u32,
    #[prost(uint32, required, tag = "5")]
    pub suid: u32,
    #[prost(uint32, required, tag = "6")]
    pub sgid: u32,
    #[prost(uint32, required, tag = "7")]
    pub fsuid: u32,
    #[prost(uint32, required, tag = "8")]
    pub fsgid: u32,
    #[prost(uint32, repeated, tag = "9")]
    pub inheritable: Vec<u32>,
    #[prost(uint32, repeated, tag = "10")]
    pub permitted: Vec<u32>,
    #[prost(uint32, repeated, tag = "11")]
    pub effective: Vec<u32>,
    #[prost(uint32, repeated, tag = "12")]
    pub bounding: Vec<u32>,
    #[prost(uint32, repeated, tag = "14")]
    pub groups: Vec<u32>,
    #[prost(string, optional, tag = "15")]
    pub lsm_profile: Option<String>,
    #[prost(string, optional, tag = "16")]
    pub lsm_sockcreate: Option<String>,
    #[prost(bytes = "vec", optional, tag = "17")]
    pub apparmor_data: Option<Vec<u8>>,
    #[prost(uint32, optional, tag = "18")]
    pub no_new_privs: Option<u32>,
    #[prost(uint32, repeated, tag = "19")]
    pub ambient: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct UserNamespace {
    #[prost(message, repeated, tag = "1")]
    pub uids: Vec<Extent>,
    #[prost(message, repeated, tag = "2")]
    pub gids: Vec<Extent>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Extent {
    #[prost(uint32, required, tag = "1")]
    pub first: u32,
    #[prost(uint32, required, tag = "2")]
    pub lower_first: u32,
    #[prost(uint32, required, tag = "3")]
    pub count: u32,
}

// compel's states of a task
const ALIVE: u32 = 1;
const STOPPED: u32 = 3;
/// `SECCOMP_MODE_FILTER`
const FILTER: u32 = 2;

/// What is demanded of every task.
struct Demands<'a> {
    subject: &'a Subject<'a>,
    spec: &'a Spec,
    caps: Caps,
    /// CRIU's own namespaces.
    outside: Ids,
    /// The lowest `oom_score_adj`.
    oom: i64,
    bounds: Bounds,
    /// None: the spec has no filter.
    filters: Option<RefCell<Judge>>,
}

pub(super) fn check(subject: &Subject<'_>, spec: &Spec, caps: Caps) -> Result<()> {
    let images = subject.images;
    let inventory: Vec<Inventory> = one(&images.join("inventory.img"), INVENTORY_MAGIC)?;
    let outside = inventory.first().and_then(|i| i.root_ids).context("inventory.img names no namespaces")?;
    ensure!(inventory.len() == 1, "inventory.img has {} entries", inventory.len());
    let tree: Vec<Process> = one(&images.join("pstree.img"), PSTREE_MAGIC)?;
    let roots: Vec<_> = tree.iter().filter(|p| p.ppid == 0).collect();
    // CRIU makes a pid namespace for a process 1 alone; in one of somebody else's there is one already
    let others = matches!(subject.measure, Measure::Spec { .. }) && !has_own(spec, "pid");
    ensure!(
        matches!(roots[..], [first] if (first.pid == 1 || others) && first == &tree[0]),
        "the checkpoint's first process is not process 1 of a pid namespace of its own"
    );
    let bounds = Bounds::of(spec, caps, &subject.measure, Inherited::here());
    let filters = Judge::new(images, spec)?.map(RefCell::new);
    let demands = Demands {
        subject,
        spec,
        caps,
        outside,
        oom: oom_floor(&subject.measure, spec, caps),
        bounds,
        filters,
    };
    for process in &tree {
        let ids: Vec<Ids> =
            image::read(&images.join(format!("ids-{}.img", process.pid)), IDS_MAGIC)?.unwrap_or_default();
        let core = images.join(format!("core-{}.img", process.pid));
        ensure!(core.exists(), "the checkpoint has no core-{}.img", process.pid);
        ensure!(
            *process != tree[0] || !ids.is_empty(),
            "the checkpoint does not say in which namespaces process {} is",
            process.pid
        );
        for ids in &ids {
            demands.namespaces(ids).with_context(|| format!("process {}", process.pid))?;
        }
    }
    // also those that are in nobody's tree
    for (number, path) in image::all(images, "ids-")? {
        for ids in one::<Ids>(&path, IDS_MAGIC)? {
            demands.namespaces(&ids).with_context(|| format!("process {number}"))?;
        }
    }
    for (number, path) in image::all(images, "core-")? {
        for core in one::<Core>(&path, CORE_MAGIC)? {
            demands.core(&core).with_context(|| format!("process or thread {number} of the checkpoint"))?;
        }
    }
    limits::check_old(images, &demands.bounds)?;
    user_namespace(images, spec)
}

/// The lowest `oom_score_adj` that a task may have.
fn oom_floor(measure: &Measure<'_>, spec: &Spec, caps: Caps) -> i64 {
    let asked = spec.process.as_ref().and_then(|p| p.oom_score_adj);
    // without any wish of the spec's it is what this process would hand down
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|t| t.trim().parse().ok());
    match measure.policy() {
        Some(policy) => [Some(policy.min_oom_score_adj), asked, own].into_iter().flatten().min().unwrap_or(0),
        None if caps.has("CAP_SYS_RESOURCE") => -1000,
        None => asked.or(own).unwrap_or(0),
    }
}

fn one<M: prost::Message + Default>(path: &Path, magic: u32) -> Result<Vec<M>> {
    image::read(path, magic)?.with_context(|| format!("{} is missing", path.display()))
}

impl Demands<'_> {
    fn namespaces(&self, ids: &Ids) -> Result<()> {
        let out = &self.outside;
        for (what, inside, outside) in [
            ("mount", ids.mnt, out.mnt),
            ("pid", ids.pid, out.pid),
            ("ipc", ids.ipc, out.ipc),
            ("uts", ids.uts, out.uts),
        ] {
            let has = is_apart(self.spec, what);
            let own = inside.unwrap_or(0) != outside.unwrap_or(0) && inside.unwrap_or(0) != 0;
            ensure!(own || !has, "it would be in this node's {what} namespace");
        }
        let net = ids.net.unwrap_or(0) != 0 && ids.net != out.net;
        let may = match self.subject.measure {
            Measure::Policy { in_netns, .. } => in_netns,
            Measure::Spec { .. } => !is_apart(self.spec, "network"),
        };
        ensure!(net || may, "it would be in this node's network namespace");
        let user = ids.user.unwrap_or(0) != out.user.unwrap_or(0);
        ensure!(
            user == has_user(self.spec),
            "it is {} a user namespace of its own, which is not what the spec says",
            if user { "in" } else { "not in" }
        );
        Ok(())
    }

    fn core(&self, core: &Core) -> Result<()> {
        if let Some(ids) = &core.ids {
            self.namespaces(ids)?;
        }
        if let Some(limits) = core.task.as_ref().and_then(|t| t.rlimits.as_ref()) {
            self.bounds.limits(&limits.all)?;
        }
        if let Some(adjust) = core.task.as_ref().and_then(|t| t.oom_score_adj).map(i64::from)
            && adjust < self.oom
        {
            bail!(
                "it is spared when memory runs out (oom_score_adj {adjust}); {}",
                self.subject.measure.allowed_by("min_oom_score_adj")
            );
        }
        let Some(thread) = &core.thread else {
            let state = core.task.as_ref().map_or(ALIVE, |t| t.state);
            ensure!(!matches!(state, ALIVE | STOPPED), "nothing is said of what it may do");
            return Ok(());
        };
        self.thread(thread, core.task.as_ref())
    }

    fn thread(&self, thread: &Thread, task: Option<&Task>) -> Result<()> {
        let creds = match (&thread.creds, task) {
            (Some(creds), _) => creds,
            // what has ended needs none
            (None, Some(task)) if !matches!(task.state, ALIVE | STOPPED) => return Ok(()),
            _ => bail!("nothing is said of what it may do"),
        };
        for (set, words) in [
            ("bounding", &creds.bounding),
            ("permitted", &creds.permitted),
            ("effective", &creds.effective),
            ("inheritable", &creds.inheritable),
            ("ambient", &creds.ambient),
        ] {
            ensure!(words.len() <= 2, "{} words of capabilities", words.len());
            let mask = words.iter().rev().fold(0u64, |mask, word| mask << 32 | u64::from(*word));
            let more = self.caps.missing(mask);
            ensure!(
                more.is_empty(),
                "it has {} ({set}), which the container's spec does not give it",
                more.join(", ")
            );
        }
        let process = self.spec.process.as_ref();
        let measure = &self.subject.measure;
        let asked = process.is_some_and(|p| p.no_new_privileges == Some(true));
        if asked || measure.policy().is_some_and(|p| p.requires(Required::NoNewPrivileges)) {
            let advice = if asked { "the spec forbids that".into() } else { measure.allowed_by("require") };
            ensure!(creds.no_new_privs == Some(1), "it may gain privileges by setuid programs; {advice}");
        }
        if asked {
            self.user(creds)?;
        }
        if let Some(judge) = &self.filters {
            let mode = thread.seccomp_mode.or(task.and_then(|t| t.old_seccomp_mode));
            ensure!(mode == Some(FILTER), "it has no seccomp filter, which the spec has");
            judge.borrow_mut().judge(thread.seccomp_filter.or(task.and_then(|t| t.old_seccomp_filter)))?;
        }
        ensure!(creds.apparmor_data.is_none(), "it brings a policy of AppArmor");
        let profile =
            process.and_then(|p| p.apparmor_profile.as_deref()).filter(|p| !matches!(*p, "" | "unconfined"));
        if let Some(profile) = profile.filter(|_| Path::new(APPARMOR).exists()) {
            let is = creds.lsm_profile.as_deref().unwrap_or_default();
            // or one that the profile itself brings, as this node has it
            let below =
                is.strip_prefix(profile).is_some_and(|rest| rest.is_empty() || rest.starts_with("//"));
            ensure!(below, "it has the AppArmor profile {is:?}, the spec {profile:?}");
        }
        if let Some(label) = process.and_then(|p| p.selinux_label.as_deref()).filter(|l| !l.is_empty()) {
            let is = creds.lsm_profile.as_deref().unwrap_or_default();
            ensure!(is == label, "it has the SELinux label {is:?}, the spec {label:?}");
            let sockets = creds.lsm_sockcreate.as_deref().unwrap_or_default();
            ensure!(
                sockets.is_empty() || sockets == label,
                "it makes sockets with the SELinux label {sockets:?}"
            );
        }
        self.bounds.priority(thread.sched_policy.unwrap_or(0), thread.nice.unwrap_or(0))
    }

    /// Without new privileges and without the capabilities for it nobody becomes somebody else.
    fn user(&self, creds: &Creds) -> Result<()> {
        let user = self.spec.process.as_ref().and_then(|p| p.user.as_ref());
        let number = |name: &str| user.and_then(|u| u.get(name)).and_then(Value::as_u64).unwrap_or(0);
        let (uid, gid) = (number("uid"), number("gid"));
        if !self.caps.has("CAP_SETUID") {
            let other =
                [creds.uid, creds.euid, creds.suid, creds.fsuid].into_iter().find(|u| u64::from(*u) != uid);
            ensure!(other.is_none(), "it is user {}, the spec's is {uid}", other.unwrap_or_default());
        }
        if !self.caps.has("CAP_SETGID") {
            let more = user.and_then(|u| u.get("additionalGids")).and_then(Value::as_array);
            let more: Vec<u64> = more.into_iter().flatten().filter_map(Value::as_u64).collect();
            let main =
                [creds.gid, creds.egid, creds.sgid, creds.fsgid].into_iter().find(|g| u64::from(*g) != gid);
            let fits = |g: &&u32| u64::from(**g) == gid || more.contains(&u64::from(**g));
            let other = main.or(creds.groups.iter().find(|g| !fits(g)).copied());
            ensure!(
                other.is_none(),
                "it is in the group {}, which the spec does not name",
                other.unwrap_or_default()
            );
        }
        Ok(())
    }
}

fn has_user(spec: &Spec) -> bool {
    namespaces::all(spec).any(|n| n.kind == "user")
}

fn user_namespace(images: &Path, spec: &Spec) -> Result<()> {
    let all = image::all(images, "userns-")?;
    if !has_user(spec) {
        ensure!(all.is_empty(), "the checkpoint has a user namespace, the spec has none");
        return Ok(());
    }
    if !has_own(spec, "user") {
        return Ok(()); // somebody else's, with the maps that it has
    }
    let linux = spec.linux.as_ref();
    for (_, path) in all {
        for found in one::<UserNamespace>(&path, USERNS_MAGIC)? {
            let given = |map: Option<&Vec<IdMapping>>| -> Vec<Extent> {
                let extent =
                    |m: &IdMapping| Extent { first: m.container_id, lower_first: m.host_id, count: m.size };
                sorted(map.into_iter().flatten().map(extent).collect())
            };
            let uids = given(linux.and_then(|l| l.uid_mappings.as_ref()));
            let gids = given(linux.and_then(|l| l.gid_mappings.as_ref()));
            ensure!(
                sorted(found.uids) == uids && sorted(found.gids) == gids,
                "the checkpoint maps IDs otherwise than the spec"
            );
        }
    }
    Ok(())
}

/// The kernel shows long maps in an order of its own.
fn sorted(mut all: Vec<Extent>) -> Vec<Extent> {
    all.sort_by_key(|e| (e.first, e.lower_first, e.count));
    all
}
