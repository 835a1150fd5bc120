//! Images of an OCI runtime's dump, which a container with a spec of this node's is to be restored from; and what both kinds of images must
//! not say of descriptors, cgroups, users and limits.

use std::fs;

use super::cgroups::{Cgroups, Controller, Dir, Member, Property, Set};
use super::limits::{Limit, Limits};
use super::mounts::{Mount, TMPFS};
use super::seccomp::{Filter, Filters};
use super::tasks::{Creds, Ids, Process, Thread};
use super::tests::{Bed, at};

const RUNC_CGROUPS: &[u8] = include_bytes!("recorded/runc-cgroup.img");
const CRUN_SECCOMP: &[u8] = include_bytes!("recorded/crun-seccomp.img");
const CRUN_CGROUPS: &[u8] = include_bytes!("recorded/crun-cgroup.img");

/// As containerd passes them to a shim.
fn bed() -> Bed {
    let mut bed = Bed::new();
    bed.runtimes = Some("");
    bed.change::<Ids>("ids-1.img", |all| all[0].net = Some(50));
    fs::write(bed.images().join("cgroup.img"), RUNC_CGROUPS).unwrap();
    // the machine that made the images had not all of these
    for list in ["maskedPaths", "readonlyPaths"] {
        let there = |p: &serde_json::Value| {
            let path = p.as_str().unwrap();
            !bed.policy.unmasked_paths.iter().any(|u| u == path)
        };
        let kept: Vec<_> =
            bed.spec["linux"][list].as_array().unwrap().iter().filter(|p| there(p)).cloned().collect();
        bed.spec["linux"][list] = kept.into();
    }
    bed
}

fn creds(bed: &Bed, change: impl FnOnce(&mut Creds)) {
    bed.core(|c| change(c.thread.as_mut().unwrap().creds.as_mut().unwrap()));
}

#[test]
fn what_runtimes_dump_passes() {
    let bed = bed();
    bed.verdict().unwrap();
    fs::write(bed.images().join("cgroup.img"), CRUN_CGROUPS).unwrap();
    for name in
        ["descriptors.json", "dump.log", "stats-dump", "netdev-9.img", "route6-9.img", "nftables-9.img"]
    {
        fs::write(
            bed.images().join(name),
            if name.ends_with("json") { "[\"\",\"pipe:[7]\",\"\"]" } else { "" },
        )
        .unwrap();
    }
    bed.verdict().unwrap();
    // a dump of ours has no cgroups, and no network
    let mut ours = bed;
    ours.runtimes = None;
    ours.refused("netdev-9.img");
    for name in ["dump.log", "netdev-9.img", "route6-9.img", "nftables-9.img"] {
        fs::remove_file(ours.images().join(name)).unwrap();
    }
    ours.refused("which cgroups of this node");
}

#[test]
fn a_spec_may_have_what_is_new() {
    let mut bed = bed();
    bed.spec["linux"]["netDevices"] = serde_json::json!({"eth0": {}});
    bed.verdict().unwrap();
    bed.runtimes = None;
    bed.refused("netDevices");
}

#[test]
fn the_spec_alone_counts() {
    let bed = bed();
    creds(&bed, |c| c.effective = vec![1 << 21, 0]);
    bed.refused("CAP_SYS_ADMIN");
    let mut bed = self::bed();
    bed.policy.unmasked_paths.push("/proc/keys".into());
    bed.mounts(|all| all.retain(|m| m.at != "/proc/keys"));
    if std::path::Path::new("/proc/keys").exists() {
        bed.refused("/proc/keys masked");
    }
    let mut bed = self::bed();
    bed.spec["process"]["oomScoreAdj"] = 500.into();
    bed.core(|c| c.task.as_mut().unwrap().oom_score_adj = Some(499));
    bed.refused("spared when memory runs out");
    bed.core(|c| c.task.as_mut().unwrap().oom_score_adj = Some(500));
    bed.verdict().unwrap();
}

#[test]
fn links_in_the_folder_of_images() {
    let bed = bed();
    std::os::unix::fs::symlink("/etc/shadow", bed.images().join("pages-1.img")).unwrap();
    bed.refused("pages-1.img");
    fs::remove_file(bed.images().join("pages-1.img")).unwrap();
    std::os::unix::fs::symlink("../elsewhere", bed.images().join("parent")).unwrap();
    bed.refused("a parent (../elsewhere)");
    let mut bed = bed;
    bed.runtimes = Some("../elsewhere");
    bed.verdict().unwrap();
    bed.runtimes = Some("../other");
    bed.refused("a parent");
    bed.runtimes = None;
    bed.refused("parent");
    for name in ["apparmor.img", "binfmt-misc.img", "reg-files.img", "autofs-3.img", "amdgpu-kfd-1.img"] {
        let bed = self::bed();
        fs::write(bed.images().join(name), "").unwrap();
        bed.refused(name);
    }
    let mut bed = self::bed();
    fs::write(bed.images().join("amdgpu-kfd-1.img"), "").unwrap();
    bed.spec["linux"]["devices"] = serde_json::json!([{"path": "/dev/kfd", "type": "c"}]);
    bed.verdict().unwrap();
    let bed = self::bed();
    fs::write(bed.images().join("iptables-9.img"), "*filter\n-A INPUT --modprobe=/x -m no\nCOMMIT\n")
        .unwrap();
    bed.refused("firewall rules (iptables-9.img)");
}

/// runc would have CRIU pass on descriptors of its own.
#[test]
fn descriptors_behind_the_third() {
    for runtimes in [None, Some("")] {
        let mut bed = if runtimes.is_some() { bed() } else { Bed::new() };
        bed.runtimes = runtimes;
        let write = |text: &str| fs::write(bed.images().join("descriptors.json"), text).unwrap();
        for fine in ["null", "[]", "[\"pipe:[1]\",null,\"\"]"] {
            write(fine);
            bed.verdict().unwrap();
        }
        write("[\"\",\"\",\"\",\"pipe:[1]\"]");
        bed.refused("names 4 descriptors");
        write("{}");
        bed.refused("descriptors.json");
        write(&" ".repeat(1 << 17));
        bed.refused("bytes");
    }
}

#[test]
fn namespaces_that_are_shared() {
    // of a pod: by path, with any pid; of the node: not in the spec
    let mut bed = bed();
    let kind = |spec: &mut serde_json::Value, kind: &str, path: Option<&str>| {
        let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
        all.retain(|n| n["type"] != kind);
        if let Some(path) = path {
            all.push(serde_json::json!({"type": kind, "path": path}));
        }
    };
    for name in ["ids", "core"] {
        fs::rename(bed.images().join(format!("{name}-1.img")), bed.images().join(format!("{name}-7.img")))
            .unwrap();
    }
    bed.change::<Process>("pstree.img", |all| all[0].pid = 7);
    bed.refused("not process 1");
    kind(&mut bed.spec, "pid", Some("/proc/9999999/ns/pid"));
    bed.verdict().unwrap();
    bed.change::<Ids>("ids-7.img", |all| all[0].net = None);
    bed.refused("network namespace");
    kind(&mut bed.spec, "network", None);
    bed.verdict().unwrap();
    bed.change::<Ids>("ids-7.img", |all| all[0].pid = None);
    bed.refused("pid namespace");
    kind(&mut bed.spec, "pid", Some("/proc/self/ns/pid"));
    bed.verdict().unwrap();
    kind(&mut bed.spec, "pid", None);
    bed.verdict().unwrap();
    // nobody else's policy says so
    bed.runtimes = None;
    bed.refused("not process 1");
}

#[test]
fn users_that_nobody_can_become() {
    let mut bed = bed();
    let user = serde_json::json!({"uid": 1000, "gid": 1000, "additionalGids": [4]});
    bed.spec["process"]["user"] = user;
    // with CAP_SETUID and CAP_SETGID
    bed.verdict().unwrap();
    for set in ["bounding", "effective", "permitted"] {
        bed.spec["process"]["capabilities"][set] = serde_json::json!([]);
    }
    creds(&bed, |c| {
        (c.bounding, c.effective, c.permitted) = (vec![], vec![], vec![]);
    });
    bed.refused("it is user 0, the spec's is 1000");
    creds(&bed, |c| (c.uid, c.euid, c.suid, c.fsuid) = (1000, 1000, 1000, 1000));
    bed.refused("the group 0");
    creds(&bed, |c| (c.gid, c.egid, c.sgid, c.fsgid, c.groups) = (1000, 1000, 1000, 1000, vec![4, 1000]));
    bed.verdict().unwrap();
    creds(&bed, |c| c.groups.push(6));
    bed.refused("the group 6");
    // it may by a setuid program
    bed.spec["process"]["noNewPrivileges"] = false.into();
    bed.verdict().unwrap();
}

#[test]
fn limits_and_priorities_in_images() {
    let thread = |change: fn(&mut Thread)| {
        let bed = Bed::new();
        bed.core(|c| change(c.thread.as_mut().unwrap()));
        bed
    };
    thread(|t| t.nice = Some(19)).verdict().unwrap();
    thread(|t| t.nice = Some(-20)).refused("`realtime`");
    let high = |bed: &Bed| {
        let limits = || vec![Limit { soft: 1 << 20, hard: 1 << 20 }; 8];
        bed.core(|c| c.task.as_mut().unwrap().rlimits = Some(Limits { all: limits() }));
        limits()
    };
    // the spec of the bed has 1024
    let bed = Bed::new();
    let limits = high(&bed);
    bed.refused("RLIMIT_NOFILE is 1048576, here it would be 1024");
    // in the old place
    let bed = Bed::new();
    let head = [crate::criu::images::IMG_COMMON_MAGIC.to_le_bytes(), 0x5711_3925u32.to_le_bytes()].concat();
    bed.write("rlimit-1.img", &head, &limits);
    bed.refused("RLIMIT_NOFILE");
    let mut bed = bed;
    bed.spec["process"]["rlimits"] = serde_json::json!([]);
    bed.verdict().unwrap();
}

#[test]
fn cgroups_of_others() {
    let bed = bed();
    let member = |name: &str, path: &str, prefix| Member { name: name.into(), path: path.into(), prefix };
    let dir = |name: &str| Dir { name: name.into(), ..Dir::default() };
    let try_it = |name: &str, path: &str, prefix, dirs: &[&str]| {
        bed.change::<Cgroups>("cgroup.img", |all| {
            all[0].sets = vec![Set { id: 2, members: vec![member(name, path, prefix)] }];
            let dirs = dirs.iter().map(|d| dir(d)).collect();
            all[0].controllers = vec![Controller { names: vec![name.into()], dirs }];
        });
        bed.verdict().map_err(|e| format!("{e:#}"))
    };
    for (path, prefix, dirs) in [
        ("/default/c1", None, &["default/c1"][..]),
        ("/default/c1/sub", None, &["default/c1"]),
        ("/", None, &[""]),
        ("/default/c1/a", Some(11), &["default/c1"]),
    ] {
        for name in ["memory", "name=systemd", ""] {
            try_it(name, path, prefix, dirs).unwrap();
        }
    }
    let mut able = self::bed();
    able.spec["process"]["capabilities"]["bounding"].as_array_mut().unwrap().push("CAP_SYS_ADMIN".into());
    let two = |bed: &Bed| {
        bed.change::<Cgroups>("cgroup.img", |all| {
            let members = ["/default/c1/a", "/default/c1/b"].map(|p| member("", p, Some(11))).to_vec();
            all[0].sets = vec![Set { id: 2, members }];
            let dirs = vec![dir("default/c1/a"), dir("default/c1/b")];
            all[0].controllers = vec![Controller { names: vec![String::new()], dirs }];
        });
    };
    two(&able);
    able.verdict().unwrap();
    two(&bed);
    bed.refused("2 folders");
    for (path, prefix, dirs, word) in [
        // half a name, which CRIU would continue
        ("/default/c12", None, &["default/c1"][..], "no task"),
        ("/default/c1", None, &[""], "no task"),
        ("/default/c1", None, &["/default/c1"], "makes the cgroup"),
        ("/default/c1/x", None, &["default/c1/"], "no task"),
        ("/default/c1", None, &[], "0 folders"),
        ("/default/c1/a", None, &["default/c1", "default/c1/a"], "2 folders"),
        ("/default/c1/a", Some(11), &["default/c1", "default/c1/a"], "2 folders"),
        ("/default/../c1", None, &["default/../c1"], "makes the cgroup"),
        ("/default/c1", Some(40), &["default/c1"], "behind the end"),
        ("/default/c1", Some(10), &["default/c1"], "half a name"),
        ("/default/c1/a", Some(11), &["default"], "beside its root"),
        ("default/c1", None, &["default/c1"], "no path"),
    ] {
        let said = try_it("memory", path, prefix, dirs).expect_err(path);
        assert!(said.contains(word), "{path} {prefix:?} {dirs:?}: {said}");
    }
    // a name is a path, and options of a mount
    for name in
        ["name=../../x", "memory,release_agent=/x", "name=x,release_agent=/x", "name=", "name=..", "a/b"]
    {
        let said = try_it(name, "/default/c1", None, &["default/c1"]).expect_err(name);
        assert!(said.contains("a hierarchy of cgroups"), "{said}");
    }
    bed.change::<Cgroups>("cgroup.img", |all| {
        all[0].controllers =
            vec![Controller { names: vec!["memory".into()], dirs: vec![dir("default/c1")] }; 2];
        all[0].sets = vec![Set { id: 2, members: vec![member("memory", "/default/c1", None)] }];
    });
    bed.refused("twice");
    bed.change::<Cgroups>("cgroup.img", |all| all[0].controllers.clear());
    bed.refused("of no hierarchy");
    for (name, value, fine) in [
        ("tasks", "", true),
        ("tasks", "1", false),
        ("cgroup.procs", "1\n", false),
        ("notify_on_release", "0", true),
        ("notify_on_release", "1", false),
        ("release_agent", "", false),
        ("../x", "", false),
        ("memory.limit_in_bytes", "7", true),
    ] {
        bed.change::<Cgroups>("cgroup.img", |all| {
            let property = Property { name: name.into(), value: value.into() };
            let dirs = vec![Dir { properties: vec![property], ..dir("default/c1") }];
            all[0].controllers = vec![Controller { names: vec!["memory".into()], dirs }];
        });
        assert_eq!(bed.verdict().is_ok(), fine, "{name} {value:?}");
    }
}

#[test]
fn mounts_of_a_spec_of_this_node() {
    let bed = bed();
    let wants = |bed: &mut Bed, mount: serde_json::Value| {
        bed.spec["mounts"].as_array_mut().unwrap().push(mount);
    };
    // the root that the spec wants read-only
    let writable = |bed: &Bed| bed.mounts(|all| (at(all, "/").flags, at(all, "/").sb_flags) = (0, Some(0)));
    writable(&bed);
    bed.refused("mount at /: it can be written to");
    let mut ours = Bed::new();
    writable(&ours);
    ours.refused("mount at /: it can be written to");
    ours.spec["root"]["readonly"] = false.into();
    ours.verdict().unwrap();
    // another type of file system
    let mut bed = self::bed();
    let more = |kind, at: &str, fsname: Option<&str>| Mount {
        kind,
        id: 990 + kind,
        device: 990 + kind,
        parent: 164,
        root: "/".into(),
        at: at.into(),
        fsname: fsname.map(str::to_string),
        ..Mount::default()
    };
    bed.mounts(|all| all.extend([more(11, "/debug", None), more(16, "/huge", Some("hugetlbfs"))]));
    bed.refused("/debug");
    wants(&mut bed, serde_json::json!({"destination": "/debug", "type": "debugfs"}));
    bed.refused("unusual at /huge");
    wants(&mut bed, serde_json::json!({"destination": "/huge", "type": "ext4"}));
    bed.refused("unusual at /huge");
    bed.spec["mounts"].as_array_mut().unwrap().pop();
    wants(&mut bed, serde_json::json!({"destination": "/huge", "type": "hugetlbfs"}));
    bed.verdict().unwrap();
    // the tmpfs in which runc binds the hierarchies of cgroup v1 can be written to
    let mut bed = self::bed();
    wants(&mut bed, serde_json::json!({"destination": "/cg", "type": "cgroup", "options": ["ro"]}));
    bed.mounts(|all| all.push(more(TMPFS, "/cg", None)));
    bed.verdict().unwrap();
    // what is mounted in a folder of the node that comes with it
    let mut bed = self::bed();
    bed.mounts(|all| {
        all.push(Mount { key: Some("/data".into()), flags: 2, ..more(0, "/data", None) });
        all.push(more(TMPFS, "/data/a/sub", None));
    });
    wants(
        &mut bed,
        serde_json::json!({"destination": "/data", "type": "bind", "source": "/x", "options": ["bind", "nosuid"]}),
    );
    bed.refused("/data/a/sub");
    bed.spec["mounts"].as_array_mut().unwrap().last_mut().unwrap()["options"][0] = "rbind".into();
    bed.verdict().unwrap();
    // flags that take something away
    bed.mounts(|all| at(all, "/data").flags = 0);
    bed.refused("mount at /data: it is not nosuid");
    bed.spec["mounts"].as_array_mut().unwrap().last_mut().unwrap()["options"][1] = "suid".into();
    bed.verdict().unwrap();
    // an empty folder over what crun masks
    let bed = self::bed();
    bed.mounts(|all| at(all, "/sys/firmware").key = Some("/run/crun/.empty-directory".into()));
    bed.verdict().unwrap();
}

/// containerd's default profile on x86-64, by runc's and by crun's libseccomp.
#[test]
#[cfg_attr(not(target_arch = "x86_64"), ignore = "the recorded filters are of x86-64")]
fn filters_of_runtimes_are_what_the_spec_says() {
    let mut bed = bed();
    bed.spec["linux"]["seccomp"] = bed.profile.clone();
    bed.verdict().unwrap();
    fs::write(bed.images().join("seccomp.img"), CRUN_SECCOMP).unwrap();
    bed.verdict().unwrap();
    // a word less in the spec than the filter lets through, in each ABI that it lists
    for name in ["read", "socket", "msync", "chown32", "pwritev2"] {
        let spec = bed.spec.clone();
        for entry in bed.spec["linux"]["seccomp"]["syscalls"].as_array_mut().unwrap() {
            entry["names"].as_array_mut().unwrap().retain(|n| n != name);
        }
        bed.refused(&format!("laxer than the spec: {name} "));
        bed.spec = spec;
    }
    // everything allowed by the old ABI alone
    let allow = [0x06u16.to_ne_bytes().to_vec(), vec![0, 0], 0x7fff_0000u32.to_ne_bytes().to_vec()].concat();
    bed.change::<Filters>("seccomp.img", |all| {
        all[0].all = vec![Filter { program: allow, ..Filter::default() }]
    });
    bed.refused("is allowed");
    bed.change::<Filters>("seccomp.img", |all| all[0].all[0].flags = Some(4));
    bed.refused("flags 0x4");
    bed.change::<Filters>("seccomp.img", |all| all[0].all[0].flags = Some(3));
    bed.refused("is allowed");
    bed.change::<Filters>("seccomp.img", |all| all[0].all[0].program.truncate(7));
    bed.refused("7 bytes");
    bed.change::<Filters>("seccomp.img", |all| all[0].all.clear());
    bed.refused("no seccomp filter 0");
}
