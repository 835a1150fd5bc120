//! Images of a real container (`ctr run --seccomp --read-only` with a tmpfs of its own, CRIU 4.2), and what a hostile source could make of them.

use std::fs;
use std::path::Path;

use prost::Message;

use super::cgroups::{Cgroups, Controller, Dir, Member, Property, Set};
use super::files::{File, Inet, Regular};
use super::mounts::{Mount, PROC, SYSFS, TMPFS};
use super::tasks::{Core, Extent, Ids, Inventory, Process, UserNamespace};
use super::*;
use crate::criu::images::IMG_COMMON_MAGIC;
use crate::policy::config::Required;

pub(super) const RECORDED: [(&str, &[u8]); 8] = [
    ("inventory.img", include_bytes!("recorded/inventory.img")),
    ("pstree.img", include_bytes!("recorded/pstree.img")),
    ("ids-1.img", include_bytes!("recorded/ids-1.img")),
    ("core-1.img", include_bytes!("recorded/core-1.img")),
    ("files.img", include_bytes!("recorded/files.img")),
    ("cgroup.img", include_bytes!("recorded/cgroup.img")),
    ("mountpoints-12.img", include_bytes!("recorded/mountpoints-12.img")),
    // of another container with the same profile: runc 1.1, libseccomp 2.6
    ("seccomp.img", include_bytes!("recorded/seccomp.img")),
];

/// A bundle and images, as they lie before a restore.
pub(super) struct Bed {
    pub dir: tempfile::TempDir,
    pub policy: Policy,
    pub spec: serde_json::Value,
    pub in_netns: bool,
    /// Not a dump of ours, but one by an OCI runtime, with this parent.
    pub runtimes: Option<&'static str>,
    /// The seccomp profile that the container was made with. The spec has one that refuses nothing: looking at a filter takes its time.
    pub profile: serde_json::Value,
}

impl Bed {
    pub fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("bundle/rootfs/proc")).unwrap();
        fs::create_dir(dir.path().join("images")).unwrap();
        for (name, bytes) in RECORDED {
            fs::write(dir.path().join("images").join(name), bytes).unwrap();
        }
        let mut spec = crate::policy::tests::record("ctr-1.7-seccomp").spec;
        spec["process"]["oomScoreAdj"] = serde_json::json!(-1000); // whatever the machine of the test hands down
        let lax = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW"});
        let profile = std::mem::replace(&mut spec["linux"]["seccomp"], lax);
        // the machine that made the images had none of the others
        let policy = Policy {
            unmasked_paths: [
                "/proc/kcore",
                "/proc/asound",
                "/proc/scsi",
                "/proc/sched_debug",
                "/proc/latency_stats",
                "/proc/sysrq-trigger",
            ]
            .iter()
            .chain(&["/sys/devices/virtual/powercap"])
            .map(|p| p.to_string())
            .collect(),
            ..Policy::default()
        };
        // the dump was made inside the container's network
        Bed { dir, policy, spec, in_netns: true, runtimes: None, profile }
    }

    pub fn images(&self) -> std::path::PathBuf {
        self.dir.path().join("images")
    }

    pub fn verdict(&self) -> Result<()> {
        let bundle = self.dir.path().join("bundle");
        fs::write(bundle.join("config.json"), self.spec.to_string()).unwrap();
        let (images, in_netns) = (self.images(), self.in_netns);
        let measure = match self.runtimes {
            Some(parent) => Measure::Spec { parent },
            None => Measure::Policy { policy: &self.policy, in_netns },
        };
        check(&Subject { images: &images, bundle: &bundle, measure })
    }

    #[track_caller]
    pub fn refused(&self, word: &str) {
        let said = format!("{:#}", self.verdict().unwrap_err());
        assert!(said.contains(word), "{said:?} without {word:?}");
    }

    /// Rewrites an image's entries; fields that are not known here are lost, which changes nothing.
    pub fn change<M: Message + Default>(&self, name: &str, change: impl FnOnce(&mut Vec<M>)) {
        let path = self.images().join(name);
        let bytes = fs::read(&path).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let (head, magic) = if word(0) == IMG_COMMON_MAGIC { (8, word(4)) } else { (4, word(0)) };
        let mut all: Vec<M> = image::read(&path, magic).unwrap().unwrap();
        change(&mut all);
        self.write(name, &bytes[..head], &all);
    }

    pub fn write<M: Message>(&self, name: &str, head: &[u8], all: &[M]) {
        let mut out = head.to_vec();
        for entry in all {
            let entry = entry.encode_to_vec();
            out.extend((entry.len() as u32).to_le_bytes());
            out.extend(entry);
        }
        fs::write(self.images().join(name), out).unwrap();
    }

    pub fn core(&self, change: impl FnOnce(&mut Core)) {
        self.change::<Core>("core-1.img", |all| change(&mut all[0]));
    }

    pub fn mounts(&self, change: impl FnOnce(&mut Vec<Mount>)) {
        self.change::<Mount>("mountpoints-12.img", change);
    }
}

#[test]
fn what_a_real_dump_has_passes() {
    Bed::new().verdict().unwrap();
}

#[test]
fn only_images_of_a_dump() {
    for name in [
        "apparmor.img",
        "binfmt-misc.img",
        "binfmt-misc-9.img",
        "iptables-9.img",
        "nftables-9.img",
        "route-9.img",
        "netdev-9.img",
        "reg-files.img",
        "ext-files.img",
        "creds-1.img",
        "evil",
        "core-x.img",
        "autofs-1.img",
    ] {
        let bed = Bed::new();
        fs::write(bed.images().join(name), "").unwrap();
        bed.refused(name);
    }
    let bed = Bed::new();
    std::os::unix::fs::symlink("/etc/passwd", bed.images().join("fs-1.img")).unwrap();
    bed.refused("fs-1.img");
    for name in [
        "core-7.img",
        "ghost-file-beef.img",
        "pagemap-shmem-12.img",
        "tmpfs-dev-74.tar.gz.img",
        "tcp-stream-a1.img",
    ] {
        assert!(names::is_known(name), "{name}");
    }
    let bed = Bed::new();
    fs::remove_file(bed.images().join("inventory.img")).unwrap();
    bed.refused("inventory.img");
}

#[test]
fn namespaces_of_the_node() {
    type Which = fn(&mut Ids) -> &mut Option<u32>;
    let all: [(&str, Which); 5] = [
        ("mount namespace", |i| &mut i.mnt),
        ("pid namespace", |i| &mut i.pid),
        ("ipc namespace", |i| &mut i.ipc),
        ("uts namespace", |i| &mut i.uts),
        ("network namespace", |i| &mut i.net),
    ];
    for (word, which) in all {
        // CRIU's own, or none at all
        for number in [None, Some(0), Some(6)] {
            let mut bed = Bed::new();
            bed.in_netns = false;
            if word != "network namespace" {
                bed.change::<Ids>("ids-1.img", |all| all[0].net = Some(50));
            }
            let mut outside = 6;
            bed.change::<Inventory>("inventory.img", |all| {
                let ids = all[0].root_ids.as_mut().unwrap();
                *which(ids) = Some(6);
                outside = which(ids).unwrap();
            });
            assert_eq!(outside, 6);
            bed.change::<Ids>("ids-1.img", |all| *which(&mut all[0]) = number);
            bed.refused(word);
        }
    }
    let mut bed = Bed::new();
    bed.in_netns = false;
    bed.refused("network namespace");
    bed.change::<Ids>("ids-1.img", |all| all[0].net = Some(50));
    bed.verdict().unwrap();
    // of a second task, of one that is in no tree, of a core
    let bed = Bed::new();
    fs::copy(bed.images().join("ids-1.img"), bed.images().join("ids-9.img")).unwrap();
    bed.verdict().unwrap();
    bed.change::<Ids>("ids-9.img", |all| all[0].mnt = Some(6));
    bed.refused("mount namespace");
    let bed = Bed::new();
    bed.core(|c| c.ids = Some(Ids { mnt: Some(6), ..Ids::default() }));
    bed.refused("mount namespace");
    let bed = Bed::new();
    bed.change::<Inventory>("inventory.img", |all| all[0].root_ids = None);
    bed.refused("names no namespaces");
}

#[test]
fn the_first_process_is_the_first() {
    let bed = Bed::new();
    bed.change::<Process>("pstree.img", |all| all[0].pid = 7);
    bed.refused("process 1");
    let bed = Bed::new();
    bed.change::<Process>("pstree.img", |all| all.push(Process { pid: 9, ppid: 0 }));
    bed.refused("process 1");
    let bed = Bed::new();
    bed.change::<Process>("pstree.img", Vec::clear);
    bed.refused("process 1");
    let bed = Bed::new();
    bed.change::<Process>("pstree.img", |all| all.push(Process { pid: 9, ppid: 1 }));
    bed.refused("core-9.img");
    let bed = Bed::new();
    fs::remove_file(bed.images().join("ids-1.img")).unwrap();
    bed.refused("namespaces");
}

#[test]
fn user_namespaces_are_as_in_the_spec() {
    let bed = Bed::new();
    bed.change::<Ids>("ids-1.img", |all| all[0].user = Some(20));
    bed.refused("user namespace");
    let head = [IMG_COMMON_MAGIC.to_le_bytes(), 0x5547_4906u32.to_le_bytes()].concat();
    let extent = |lower_first| Extent { first: 0, lower_first, count: 1000 };
    let map = |host| UserNamespace { uids: vec![extent(host)], gids: vec![extent(100_000)] };
    bed.write("userns-20.img", &head, &[map(100_000)]);
    bed.refused("user namespace");
    let mut bed = Bed::new();
    bed.change::<Ids>("ids-1.img", |all| all[0].user = Some(20));
    bed.spec["linux"]["namespaces"].as_array_mut().unwrap().push(serde_json::json!({"type": "user"}));
    for field in ["uidMappings", "gidMappings"] {
        bed.spec["linux"][field] = serde_json::json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    }
    bed.write("userns-20.img", &head, &[map(100_000)]);
    bed.verdict().unwrap();
    bed.write("userns-20.img", &head, &[map(0)]);
    bed.refused("maps IDs otherwise");
}

#[test]
fn capabilities_beyond_the_spec() {
    type Which = fn(&mut super::tasks::Creds) -> &mut Vec<u32>;
    let sets: [(&str, Which); 5] = [
        ("(bounding)", |c| &mut c.bounding),
        ("(permitted)", |c| &mut c.permitted),
        ("(effective)", |c| &mut c.effective),
        ("(inheritable)", |c| &mut c.inheritable),
        ("(ambient)", |c| &mut c.ambient),
    ];
    for (word, which) in sets {
        let bed = Bed::new();
        bed.core(|c| which(c.thread.as_mut().unwrap().creds.as_mut().unwrap()).clone_from(&vec![1 << 21, 0]));
        bed.refused(word);
        bed.refused("CAP_SYS_ADMIN");
        let bed = Bed::new();
        bed.core(|c| *which(c.thread.as_mut().unwrap().creds.as_mut().unwrap()) = vec![0, 1 << 7]);
        bed.refused("CAP_BPF");
        let bed = Bed::new();
        bed.core(|c| *which(c.thread.as_mut().unwrap().creds.as_mut().unwrap()) = vec![0, 0, 1]);
        bed.refused("words");
    }
    // the spec of the bed was made with --cap-drop CAP_CHOWN
    let bed = Bed::new();
    bed.core(|c| c.thread.as_mut().unwrap().creds.as_mut().unwrap().effective = vec![1, 0]);
    bed.refused("CAP_CHOWN");
    // a thread beside the tree counts too
    let bed = Bed::new();
    fs::copy(bed.images().join("core-1.img"), bed.images().join("core-8.img")).unwrap();
    bed.change::<Core>("core-8.img", |all| all[0].thread.as_mut().unwrap().creds = None);
    bed.refused("thread 8");
}

#[test]
fn filters_labels_and_scheduling() {
    let thread = |change: fn(&mut super::tasks::Thread)| {
        let bed = Bed::new();
        bed.core(|c| change(c.thread.as_mut().unwrap()));
        bed
    };
    thread(|t| t.seccomp_mode = Some(0)).refused("seccomp");
    thread(|t| t.seccomp_mode = None).refused("seccomp");
    thread(|t| t.creds.as_mut().unwrap().apparmor_data = Some(vec![1])).refused("AppArmor");
    thread(|t| t.sched_policy = Some(1)).refused("`realtime`");
    thread(|t| t.creds = None).refused("what it may do");
    let mut bed = thread(|t| t.creds.as_mut().unwrap().no_new_privs = None);
    bed.refused("the spec forbids that");
    bed.spec["process"]["noNewPrivileges"] = false.into();
    bed.verdict().unwrap();
    bed.policy.require = vec![Required::NoNewPrivileges];
    bed.refused("setuid");
    let mut bed = thread(|t| t.creds.as_mut().unwrap().lsm_profile = Some("unconfined_t".into()));
    bed.spec["process"]["selinuxLabel"] = "a:b:container_t:s0".into();
    bed.refused("SELinux");
    let bed = Bed::new();
    bed.core(|c| c.thread = None);
    bed.refused("what it may do");
    let bed = Bed::new();
    bed.core(|c| c.task.as_mut().unwrap().oom_score_adj = Some(-1001));
    bed.refused("min_oom_score_adj");
    let bed = Bed::new();
    bed.core(|c| {
        c.thread = None;
        c.task.as_mut().unwrap().state = 6;
    });
    bed.verdict().unwrap();
}

#[test]
fn kinds_of_files() {
    let with = |file: File| {
        let bed = Bed::new();
        bed.change::<File>("files.img", |all| all.push(file));
        bed
    };
    let of = |kind| File { kind, ..File::default() };
    for (kind, word) in [(12, "whole file systems"), (15, "tunnel"), (16, "not the container's"), (19, "BPF")]
    {
        with(of(kind)).refused(word);
    }
    with(of(10)).verdict().unwrap();
    with(File { inet: Some(Inet { kind: Some(3) }), ..of(4) }).verdict().unwrap();
    let mut bed = with(File { inet: Some(Inet { kind: Some(3) }), ..of(4) });
    for set in ["bounding", "effective", "permitted"] {
        bed.spec["process"]["capabilities"][set] = serde_json::json!([]);
    }
    bed.core(|c| {
        let creds = c.thread.as_mut().unwrap().creds.as_mut().unwrap();
        (creds.bounding, creds.effective, creds.permitted) = (vec![], vec![], vec![]);
    });
    bed.refused("CAP_NET_RAW");
    bed.change::<File>("files.img", |all| all.last_mut().unwrap().inet = None);
    bed.change::<File>("files.img", |all| all.last_mut().unwrap().kind = 10);
    bed.refused("a packet socket");
    // a terminal takes nothing
    bed.change::<File>("files.img", |all| all.last_mut().unwrap().kind = 11);
    bed.verdict().unwrap();
    with(File { regular: Some(Regular { external: Some(true), name: None }), ..of(1) })
        .refused("not the container's");
}

#[test]
fn cgroups_of_the_node() {
    let set = |path: &str| Set {
        id: 2,
        members: vec![Member { name: "devices".into(), path: path.into(), prefix: None }],
    };
    let bed = Bed::new();
    bed.change::<Cgroups>("cgroup.img", |all| all[0].sets = vec![set("/")]);
    bed.refused("which cgroups of this node");
    let bed = Bed::new();
    let dir = |name: &str| Dir { name: name.into(), ..Dir::default() };
    let controller = |dir: Dir| Controller { names: vec!["devices".into()], dirs: vec![dir] };
    bed.change::<Cgroups>("cgroup.img", |all| all[0].controllers = vec![controller(dir("x"))]);
    bed.refused("which cgroups of this node");
    let mut bed = Bed::new();
    bed.spec["linux"]["namespaces"].as_array_mut().unwrap().push(serde_json::json!({"type": "cgroup"}));
    let try_it = |set: Set, dir: Dir| {
        bed.change::<Cgroups>("cgroup.img", |all| {
            (all[0].sets, all[0].controllers) = (vec![set], vec![controller(dir)]);
        });
        bed.verdict().map_err(|e| format!("{e:#}"))
    };
    try_it(set("/default/s2"), dir("default/s2")).unwrap();
    assert!(try_it(set("/"), dir("default/s2")).unwrap_err().contains("in which it has no task"));
    assert!(try_it(set("/default/s2/../../x"), dir("default/s2")).is_err());
    assert!(try_it(set("/default/s2"), dir("../default/s2")).is_err());
    let agent = Dir {
        properties: vec![Property { name: "release_agent".into(), value: "/x".into() }],
        ..dir("default/s2")
    };
    assert!(try_it(set("/default/s2"), agent.clone()).unwrap_err().contains("release_agent"));
    let nested = Dir { children: vec![agent], ..dir("default/s2") };
    assert!(try_it(set("/default/s2"), nested).is_err());
}

/// The entry at a place.
pub(super) fn at<'a>(all: &'a mut [Mount], place: &str) -> &'a mut Mount {
    all.iter_mut().find(|m| m.at == place).unwrap()
}

#[test]
fn bind_mounts_of_other_places() {
    for (place, root) in [
        ("/scratch", "/link"),
        ("/proc/sys", "/self/root"),
        ("/proc/sys", "/"),
        ("/proc/sys", "/../.."),
        ("/run", "/../../etc"),
        ("/dev/pts", "/0"),
    ] {
        let bed = Bed::new();
        bed.mounts(|all| at(all, place).root = root.into());
        bed.refused(place);
    }
    // the same with another file system of the container's said to be the same
    let bed = Bed::new();
    bed.mounts(|all| {
        let proc = at(all, "/proc").device;
        at(all, "/scratch").device = proc;
    });
    bed.refused("said to be one");
    let bed = Bed::new();
    bed.mounts(|all| at(all, "/proc/sys").kind = TMPFS);
    bed.refused("/proc/sys");
    let bed = Bed::new();
    bed.mounts(|all| {
        let scratch = at(all, "/scratch").clone();
        all.push(Mount { at: "/elsewhere".into(), id: 999, ..scratch });
    });
    bed.refused("/elsewhere");
}

#[test]
fn what_the_spec_hides_or_protects() {
    let bed = Bed::new();
    bed.mounts(|all| at(all, "/sys").flags &= !1);
    bed.mounts(|all| at(all, "/sys").sb_flags = Some(0));
    bed.refused("written to");
    let bed = Bed::new();
    bed.mounts(|all| at(all, "/proc/sys").flags &= !1);
    bed.refused("written to");
    for place in ["/proc/sys", "/proc/keys", "/sys/firmware"] {
        if !Path::new(place).exists() {
            continue;
        }
        let mut bed = Bed::new();
        bed.mounts(|all| all.retain(|m| m.at != place));
        bed.refused("unmasked_paths");
        bed.policy.unmasked_paths.push(place.into());
        bed.verdict().unwrap();
        // there, but below what it is to cover
        let bed = Bed::new();
        bed.mounts(|all| {
            let root = at(all, "/").id;
            at(all, place).parent = root;
        });
        bed.refused("unmasked_paths");
    }
    // a second view on what is masked
    let bed = Bed::new();
    bed.mounts(|all| at(all, "/run").kind = PROC);
    bed.refused("/run");
    let bed = Bed::new();
    bed.mounts(|all| at(all, "/scratch").kind = SYSFS);
    bed.refused("/scratch");
    let bed = Bed::new();
    bed.mounts(|all| {
        let again = Mount { id: 999, ..at(all, "/proc").clone() };
        all.push(again);
    });
    bed.refused("more often");
    let bed = Bed::new();
    bed.mounts(|all| at(all, "/proc/keys").key = Some("/data".into()));
    bed.refused("/data");
    let bed = Bed::new();
    bed.mounts(|all| at(all, "/sys/firmware").root = "/x".into());
    bed.refused("mask");
}

#[test]
fn file_systems_that_are_the_nodes() {
    for kind in [0, 3, 4, 8, 9, 11, 12, 15, 17, 18, 19, 23] {
        let bed = Bed::new();
        bed.mounts(|all| at(all, "/scratch").kind = kind);
        bed.refused("/scratch");
    }
    for change in [
        (|m: &mut Mount| m.with_plugin = Some(true)) as fn(&mut Mount),
        |m| m.deleted = Some(true),
        |m| m.kind = 16,
    ] {
        let bed = Bed::new();
        bed.mounts(|all| change(at(all, "/scratch")));
        bed.refused("unusual");
    }
    let bed = Bed::new();
    fs::copy(bed.images().join("mountpoints-12.img"), bed.images().join("mountpoints-13.img")).unwrap();
    bed.refused("several mount namespaces");
    let bed = Bed::new();
    fs::remove_file(bed.images().join("mountpoints-12.img")).unwrap();
    bed.refused("no table");
}

#[test]
fn folders_of_the_node_stay_read_only() {
    let mut bed = Bed::new();
    let data = serde_json::json!({"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"]});
    bed.spec["mounts"].as_array_mut().unwrap().push(data);
    let brought = Mount {
        kind: 0,
        id: 999,
        device: 999,
        parent: 164,
        flags: 1,
        root: "/".into(),
        at: "/data".into(),
        key: Some("/data".into()),
        ..Mount::default()
    };
    bed.mounts(|all| all.push(brought));
    bed.verdict().unwrap();
    bed.mounts(|all| at(all, "/data").flags = 0);
    bed.refused("written to");
    bed.mounts(|all| at(all, "/data").flags = 1);
    // a file system of its own that is said to be it
    bed.mounts(|all| at(all, "/scratch").device = 999);
    bed.refused("what runc brings for /data");
    bed.mounts(|all| at(all, "/scratch").device = 79);
    bed.verdict().unwrap();
    bed.mounts(|all| at(all, "/scratch").key = Some("/data".into()));
    bed.refused("/scratch");
}

#[test]
fn links_on_the_way_of_a_mount() {
    let bed = Bed::new();
    let rootfs = bed.dir.path().join("bundle/rootfs");
    fs::remove_dir(rootfs.join("proc")).unwrap();
    std::os::unix::fs::symlink("/etc", rootfs.join("proc")).unwrap();
    // the spec's /proc is said to be /etc by that link, the image's is still /proc
    bed.refused("/proc");
    let bed = Bed::new();
    let rootfs = bed.dir.path().join("bundle/rootfs");
    std::os::unix::fs::symlink("/etc", rootfs.join("scratch")).unwrap();
    bed.refused("/scratch");
}

#[test]
fn half_an_image_is_an_error() {
    for (name, bytes) in RECORDED {
        for cut in [0, 3, 7, bytes.len() - 1] {
            let bed = Bed::new();
            fs::write(bed.images().join(name), &bytes[..cut]).unwrap();
            assert!(bed.verdict().is_err(), "{name} cut at {cut}");
        }
    }
}
