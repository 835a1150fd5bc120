//! Each item of the list in the module's documentation, as a hostile source would send it; and what real programs make, which passes.

use serde_json::{Value, json};

use super::record::image_name;
use super::{Policy, Violation, check};
use crate::containerd::record::{Opaque, Record};

/// A container's record as a real run has made it.
pub fn record(name: &str) -> Record {
    let text = match name {
        "ctr-1.7" => include_str!("recorded/ctr-1.7.json"),
        "ctr-1.7-seccomp" => include_str!("recorded/ctr-1.7-seccomp.json"),
        "ctr-1.7-privileged" => include_str!("recorded/ctr-1.7-privileged.json"),
        "ctr-2.1" => include_str!("recorded/ctr-2.1.json"),
        "cri-2.1-container" => include_str!("recorded/cri-2.1-container.json"),
        "cri-2.1-sandbox" => include_str!("recorded/cri-2.1-sandbox.json"),
        other => panic!("{other} was not recorded"),
    };
    serde_json::from_str(text).unwrap()
}

fn judge(policy: &Policy, record: &Record) -> Vec<Violation> {
    check(policy, "default", record)
}

fn policy(text: &str) -> Policy {
    let policy: Policy = toml::from_str(text).unwrap();
    policy.validate().unwrap();
    policy
}

/// What is against the record of `ctr run` when it is changed in this way.
fn against(change: impl FnOnce(&mut Record)) -> Vec<Violation> {
    let mut record = record("ctr-1.7");
    change(&mut record);
    judge(&Policy::default(), &record)
}

/// Changes one place of the spec, found by a JSON pointer; places that are not there are made.
fn set(pointer: &str, value: Value) -> impl FnOnce(&mut Record) {
    let pointer = pointer.to_string();
    move |record: &mut Record| {
        let mut at = &mut record.spec;
        for part in pointer.split('/').skip(1) {
            at = match part.parse::<usize>() {
                Ok(n) if at.is_array() => &mut at[n],
                _ if part == "+" => {
                    let list = at.as_array_mut().unwrap();
                    list.push(Value::Null);
                    list.last_mut().unwrap()
                }
                _ => &mut at[part],
            };
        }
        *at = value;
    }
}

/// It is refused for exactly this, with this key; and the key, if there is one, allows it.
#[track_caller]
fn refused(pointer: &str, value: Value, word: &str, key: Option<&'static str>, allow: &str) {
    let mut record = record("ctr-1.7");
    set(pointer, value)(&mut record);
    let found = judge(&Policy::default(), &record);
    assert_eq!(found.len(), 1, "{pointer}: {found:#?}");
    assert!(found[0].what.contains(word), "{pointer}: {found:?} without {word:?}");
    assert_eq!(found[0].key, key, "{found:?}");
    if let Some(key) = key {
        assert!(found[0].advice().contains(key));
        assert!(allow.contains(key), "{allow}");
        assert_eq!(judge(&policy(allow), &record), [], "{allow}");
    } else {
        assert_eq!(judge(&policy("privileged = true"), &record).len(), 1, "{pointer} is never allowed");
    }
}

#[test]
fn what_ctr_makes_passes() {
    for name in ["ctr-1.7", "ctr-1.7-seccomp", "ctr-2.1"] {
        assert_eq!(judge(&Policy::default(), &record(name)), [], "{name}");
    }
    let seccomp = policy("require = ['seccomp', 'no-new-privileges']");
    assert_eq!(judge(&seccomp, &record("ctr-1.7-seccomp")), []);
    assert_eq!(judge(&seccomp, &record("ctr-1.7")).len(), 1, "plain `ctr run` sets no seccomp filter");
}

/// Containers of pods do not move anyway; but nothing that CRI gives to every container is taken for more than it is.
#[test]
fn what_cri_makes_is_refused_for_its_pod_alone() {
    let pods = policy(
        "annotations = ['io.kubernetes.cri.*']\n labels = ['io.*']\n extensions = ['io.cri-containerd.*']\n
         cgroup_parents = ['/kubepods/three-under-transship']\n unmasked_paths = ['/proc/acpi', '/proc/asound', '/proc/kcore',
         '/proc/keys', '/proc/latency_stats', '/proc/timer_list', '/proc/sched_debug', '/proc/scsi', '/sys/firmware',
         '/proc/bus', '/proc/fs', '/proc/irq', '/proc/sys', '/proc/sysrq-trigger']",
    );
    assert_eq!(judge(&pods, &record("cri-2.1-sandbox")), []);
    let found = judge(&pods, &record("cri-2.1-container"));
    let what: Vec<_> = found.iter().map(|v| v.what.split(" /proc/").next().unwrap_or_default()).collect();
    assert!(what[0].starts_with("belongs to the sandbox"), "{what:?}");
    let joins = ["joins the ipc namespace", "joins the uts namespace", "joins the network namespace"];
    assert_eq!(what[1..], joins);
    let keys: Vec<_> =
        judge(&Policy::default(), &record("cri-2.1-sandbox")).iter().filter_map(|v| v.key).collect();
    for key in ["annotations", "labels", "extensions", "cgroup_parents"] {
        assert!(keys.contains(&key), "{key}: {keys:?}");
    }
}

#[test]
fn privileged_only_where_it_is_allowed() {
    let found = judge(&Policy::default(), &record("ctr-1.7-privileged"));
    for key in ["capabilities", "devices", "unmasked_paths", "privileged"] {
        assert!(found.iter().any(|v| v.key == Some(key)), "{key}: {found:#?}");
    }
    assert_eq!(judge(&policy("privileged = true"), &record("ctr-1.7-privileged")), []);
}

#[test]
fn hooks_never() {
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", "id"]}]);
    for kind in
        ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop", "new"]
    {
        refused("/hooks", json!({ kind: hook.clone() }), "hooks", None, "");
    }
    assert_eq!(against(set("/hooks", json!({}))), []);
    assert_eq!(against(set("/hooks", json!({"prestart": []}))), []);
}

#[test]
fn fields_that_are_not_known_and_other_spellings_never() {
    for pointer in [
        "/Process",
        "/LINUX",
        "/windows",
        "/vm",
        "/process/Capabilities",
        "/linux/netDevices",
        "/linux/Devices",
        "/linux/resources/Devices",
        "/mounts/0/Type",
        "/root/Path",
        "/linux/namespaces/0/Path",
        "/x",
    ] {
        refused(pointer, json!({"a": 1}), "does not understand", None, "");
    }
    // a field of the wrong type is not passed over either
    for pointer in [
        "/mounts",
        "/linux/namespaces",
        "/linux/maskedPaths",
        "/process/capabilities/bounding",
        "/annotations",
    ] {
        refused(pointer, json!("x"), "does not understand", None, "");
    }
}

#[test]
fn the_root_is_the_bundles() {
    for bad in ["/", "/etc", "../x", "rootfs/..", "", "rootfs/"] {
        refused("/root/path", json!(bad), "root", None, "");
    }
    refused("/root", Value::Null, "root", None, "");
}

#[test]
fn capabilities_of_all_five_sets() {
    for kind in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
        let pointer = format!("/process/capabilities/{kind}");
        refused(
            &pointer,
            json!(["CAP_SYS_ADMIN"]),
            "CAP_SYS_ADMIN",
            Some("capabilities"),
            "capabilities = ['CAP_SYS_ADMIN']",
        );
    }
    // an unknown one is none of the allowed ones
    assert_eq!(against(set("/process/capabilities/bounding", json!(["cap_sys_admin"]))).len(), 1);
    assert_eq!(against(set("/process/capabilities", Value::Null)), []);
}

#[test]
fn what_a_node_can_require() {
    let required = |what: &str| policy(&format!("require = ['{what}']"));
    let judged = |what: &str, pointer: &str, value: Value| {
        let mut record = record("ctr-1.7-seccomp");
        set(pointer, value)(&mut record);
        judge(&required(what), &record).len()
    };
    assert_eq!(judged("seccomp", "/linux/seccomp/defaultAction", json!("SCMP_ACT_ALLOW")), 1);
    assert_eq!(judged("seccomp", "/linux/seccomp", Value::Null), 1);
    assert_eq!(judged("no-new-privileges", "/process/noNewPrivileges", json!(false)), 1);
    assert_eq!(judged("no-new-privileges", "/process/noNewPrivileges", json!(true)), 0);
    assert_eq!(judged("apparmor", "/process/apparmorProfile", json!("unconfined")), 1);
    assert_eq!(judged("apparmor", "/process/apparmorProfile", json!("cri-containerd.apparmor.d")), 0);
    assert_eq!(judged("user-namespace", "/linux/namespaces/+", json!({"type": "user"})), 0);
    assert_eq!(judged("user-namespace", "/process/terminal", json!(false)), 1);
}

#[test]
fn seccomp_asks_nobody_on_the_node() {
    let filter = |change: Value| {
        let mut filter = json!({"defaultAction": "SCMP_ACT_ERRNO"});
        filter.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        filter
    };
    refused("/linux/seccomp", filter(json!({"listenerPath": "/run/x.sock"})), "listenerPath", None, "");
    refused("/linux/seccomp", filter(json!({"listenerMetadata": "x"})), "listenerPath", None, "");
    let notify = json!([{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]);
    refused("/linux/seccomp", filter(json!({"syscalls": notify})), "NOTIFY", None, "");
    refused("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "NOTIFY", None, "");
}

#[test]
fn labels_of_selinux() {
    let label = "system_u:system_r:spc_t:s0";
    let allow = "selinux_types = ['spc_t']";
    refused("/process/selinuxLabel", json!(label), "spc_t", Some("selinux_types"), allow);
    refused("/linux/mountLabel", json!(label), "spc_t", Some("selinux_types"), allow);
    assert_eq!(against(set("/process/selinuxLabel", json!("system_u:system_r:container_t:s0:c1,c2"))), []);
}

#[test]
fn scheduling_that_keeps_others_out() {
    let allow = "realtime = true";
    refused(
        "/process/scheduler",
        json!({"policy": "SCHED_FIFO", "priority": 99}),
        "scheduling",
        Some("realtime"),
        allow,
    );
    refused("/process/ioPriority", json!({"class": "IOPRIO_CLASS_RT"}), "I/O", Some("realtime"), allow);
    refused("/process/execCPUAffinity", json!({"initial": "0"}), "affinity", Some("realtime"), allow);
    for name in ["RLIMIT_NICE", "RLIMIT_RTPRIO"] {
        let limit = json!([{"type": name, "hard": 40, "soft": 0}]);
        refused("/process/rlimits", limit, name, Some("realtime"), allow);
    }
    refused("/linux/resources/cpu/realtimeRuntime", json!(950_000), "real-time", Some("realtime"), allow);
    refused("/linux/resources/cpu/RealTimeRuntime", json!(950_000), "real-time", Some("realtime"), allow);
    refused("/linux/intelRdt", json!({"closID": "x"}), "intelRdt", Some("realtime"), allow);
    refused("/linux/memoryPolicy", json!({"mode": "MPOL_BIND"}), "memoryPolicy", Some("realtime"), allow);
    let spared = "min_oom_score_adj = -1000";
    refused("/process/oomScoreAdj", json!(-999), "oomScoreAdj", Some("min_oom_score_adj"), spared);
    assert_eq!(against(set("/process/oomScoreAdj", json!(500))), []);
}

#[test]
fn the_working_directory_is_the_containers() {
    for bad in ["/proc/self/fd/7", "/proc", "x", "/a/../../proc/1/root"] {
        refused("/process/cwd", json!(bad), "working directory", None, "");
    }
}

#[test]
fn types_of_mounts() {
    let mount = |kind: &str, at: &str, options: &[&str]| json!({"destination": at, "type": kind, "source": kind, "options": options});
    for kind in [
        "overlay",
        "nfs",
        "ext4",
        "fuse",
        "devtmpfs",
        "binfmt_misc",
        "debugfs",
        "securityfs",
        "bpf",
        "none",
        "",
    ] {
        let allow = format!("mount_types = ['{kind}']");
        refused("/mounts/+", mount(kind, "/x", &[]), "file system of type", Some("mount_types"), &allow);
    }
    let allow = "privileged = true";
    refused("/mounts/+", mount("proc", "/proc2", &[]), "proc at /proc2", Some("privileged"), allow);
    refused("/mounts/+", mount("sysfs", "/x", &["ro"]), "sysfs at /x", Some("privileged"), allow);
    refused(
        "/mounts/5/options",
        json!(["nosuid", "ro", "rw"]),
        "can write to /sys",
        Some("privileged"),
        allow,
    );
    refused("/mounts/5/options", json!([]), "can write to /sys", Some("privileged"), allow);
    refused(
        "/mounts/+",
        mount("cgroup", "/sys/fs/cgroup", &["rw"]),
        "can write to /sys/fs/cgroup",
        Some("privileged"),
        allow,
    );
    assert_eq!(against(set("/mounts/+", mount("cgroup", "/sys/fs/cgroup", &["ro"]))), []);
    assert_eq!(against(set("/mounts/+", mount("tmpfs", "/scratch", &["size=1m"]))), []);
    refused("/mounts/+", mount("proc", "/proc", &[]), "/proc twice", None, "");
    refused("/mounts/+", mount("tmpfs", "//proc/.", &[]), "/proc twice", None, "");
    for bad in ["x", "/a/../..", ".."] {
        refused("/mounts/+", mount("tmpfs", bad, &[]), "mounts something", None, "");
    }
}

#[test]
fn mounts_stay_in_the_container() {
    let bind = |option: &str| json!({"destination": "/x", "type": "bind", "source": "/srv", "options": ["rbind", option]});
    for shared in ["shared", "rshared"] {
        refused("/mounts/+", bind(shared), "back to the node", Some("shared_mounts"), "shared_mounts = true");
        refused(
            "/linux/rootfsPropagation",
            json!(shared),
            "back to the node",
            Some("shared_mounts"),
            "shared_mounts = true",
        );
    }
    assert_eq!(
        against(set("/mounts/+", bind("rslave"))),
        [],
        "whether /srv is listed is looked up elsewhere"
    );
    assert_eq!(against(set("/mounts/+", bind("ridmap"))).len(), 1);
}

#[test]
fn masked_and_read_only_paths() {
    for (at, path) in super::linux::MASKED.iter().enumerate() {
        let mut record = record("ctr-1.7");
        record.spec["linux"]["maskedPaths"].as_array_mut().unwrap().retain(|p| p != path);
        let found = judge(&Policy::default(), &record);
        assert!(found.len() == 1 && found[0].what.contains(path), "{at}: {found:?}");
        assert_eq!(judge(&policy(&format!("unmasked_paths = ['{path}']")), &record), []);
    }
    for path in super::linux::READONLY {
        let mut record = record("ctr-1.7");
        record.spec["linux"]["readonlyPaths"].as_array_mut().unwrap().retain(|p| p != path);
        let found = judge(&Policy::default(), &record);
        assert!(found.len() == 1 && found[0].what.contains(path), "{found:?}");
        assert_eq!(found[0].key, Some("unmasked_paths"));
    }
}

#[test]
fn namespaces_are_its_own() {
    for kind in ["mount", "pid", "network"] {
        let found = against(|r| remove_namespace(r, kind));
        assert!(found.len() == 1 && found[0].what.contains(kind) && found[0].key.is_none(), "{found:?}");
    }
    for kind in ["ipc", "uts"] {
        let mut record = record("ctr-1.7");
        remove_namespace(&mut record, kind);
        let found = judge(&Policy::default(), &record);
        assert!(found.len() == 1 && found[0].key == Some("host_namespaces"), "{found:?}");
        assert_eq!(judge(&policy(&format!("host_namespaces = ['{kind}']")), &record), []);
    }
    for (at, kind) in ["pid", "ipc", "uts", "mount", "network"].iter().enumerate() {
        refused(&format!("/linux/namespaces/{at}/path"), json!("/proc/1/ns/x"), kind, None, "");
    }
    refused("/linux/namespaces/4/path", json!("/run/netns/../../proc/1/ns/net"), "network", None, "");
    assert_eq!(against(set("/linux/namespaces/4/path", json!("/run/netns/pod"))), []);
    refused("/linux/namespaces/+", json!({"type": "pid", "path": ""}), "two pid namespaces", None, "");
    refused("/linux/namespaces/+", json!({"type": "new"}), "unknown kind", None, "");
    refused("/linux/namespaces/+", json!({"type": "user", "path": "/proc/1/ns/user"}), "user", None, "");
    assert!(!against(set("/linux", Value::Null)).is_empty());
}

fn remove_namespace(record: &mut Record, kind: &str) {
    record.spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != kind);
}

#[test]
fn ids_are_not_the_nodes_own() {
    let map = |host: u32, size: u32| json!([{"containerID": 0, "hostID": host, "size": size}]);
    for field in ["/linux/uidMappings", "/linux/gidMappings"] {
        refused(field, map(0, 1), "IDs 0 to 0", Some("host_ids"), "host_ids = ['0:1']");
        refused(field, map(65_535, 2), "65535", Some("host_ids"), "host_ids = ['65535:2']");
        assert_eq!(against(set(field, map(100_000, 65_536))), []);
    }
}

#[test]
fn devices_and_their_rules() {
    let node = |path: &str, kind: &str, a: i64, b: i64| json!([{"path": path, "type": kind, "major": a, "minor": b}]);
    refused(
        "/linux/devices",
        node("/dev/kmsg", "c", 1, 11),
        "/dev/kmsg",
        Some("devices"),
        "devices = ['/dev/kmsg']",
    );
    assert_eq!(against(set("/linux/devices", node("/dev/sda", "b", 8, 0)))[0].key, Some("devices"));
    assert_eq!(against(set("/linux/devices", node("/dev/../etc/x", "c", 1, 3))).len(), 1);
    assert_eq!(against(set("/linux/devices", node("/dev/null", "c", 1, 3))), []);
    // what the policy names is a device of this node, not whatever the peer calls so
    let mut liar = record("ctr-1.7");
    set("/linux/devices", node("/dev/zero", "c", 1, 1))(&mut liar);
    assert_eq!(judge(&policy("devices = ['/dev/zero']"), &liar).len(), 1);
    for rule in [
        json!({"allow": true, "access": "rwm"}),
        json!({"allow": true, "type": "a", "access": "rwm"}),
        json!({"allow": true, "type": "b", "access": "r"}),
        json!({"allow": true, "type": "b", "major": 8, "minor": -1, "access": "r"}),
        json!({"allow": true, "type": "c", "major": 1, "access": "rwm"}),
        json!({"allow": true, "type": "c", "major": 1, "minor": 1, "access": "r"}),
        json!({"allow": true, "type": "a", "access": "m"}),
    ] {
        let found = against(set("/linux/resources/devices/+", rule.clone()));
        assert!(found.len() == 1 && found[0].key == Some("devices"), "{rule}: {found:?}");
    }
    assert_eq!(
        against(set("/linux/resources/devices/+", json!({"allow": true, "type": "c", "access": "m"}))),
        []
    );
    assert_eq!(against(set("/linux/resources/devices", json!([]))).len(), 1, "nothing is denied");
    assert_eq!(against(set("/linux/resources", Value::Null)).len(), 1, "nothing is denied");
}

#[test]
fn the_cgroup_is_its_own() {
    for bad in [
        "/",
        "/default",
        "/default/other",
        "/default/s1/..",
        "/default/../s1",
        "/system.slice/s1",
        "default/s1",
        "..",
        "//s1",
        "/default/s1/s1",
    ] {
        let found = against(set("/linux/cgroupsPath", json!(bad)));
        assert!(found.len() == 1 && found[0].key == Some("cgroup_parents"), "{bad}: {found:?}");
    }
    refused(
        "/linux/cgroupsPath",
        json!("/pods/a/s1"),
        "/pods/a/s1",
        Some("cgroup_parents"),
        "cgroup_parents = ['/pods/a']",
    );
    refused(
        "/linux/cgroupsPath",
        json!("my.slice:x:s1"),
        "my.slice",
        Some("cgroup_parents"),
        "cgroup_parents = ['my.slice']".replace("my", "/my").as_str(),
    );
    assert_eq!(against(set("/linux/cgroupsPath", json!("system.slice:nerdctl:s1"))), []);
    for bad in ["system.slice:nerdctl:other", "init.scope:x:s1", ":..:s1"] {
        assert_eq!(against(set("/linux/cgroupsPath", json!(bad))).len(), 1, "{bad}");
    }
    for name in ["cgroup.procs", "cgroup.kill", "memory.max/../../x", "../x", "release_agent"] {
        refused("/linux/resources/unified", json!({ name: "1" }), "of its cgroup", None, "");
    }
    assert_eq!(against(set("/linux/resources/unified", json!({"memory.high": "1000"}))), []);
}

#[test]
fn sysctls_of_the_whole_node_never() {
    for bad in [
        "kernel.core_pattern",
        "kernel/core_pattern",
        "vm.swappiness",
        "kernel.modprobe",
        "fs.suid_dumpable",
        "user.max_user_namespaces",
        "net",
        "net.",
        "net./../kernel.core_pattern",
    ] {
        refused("/linux/sysctl", json!({ bad: "1" }), "sysctl", None, "");
    }
    let own = json!({"net.core.somaxconn": "1", "kernel.shmmax": "1", "fs.mqueue.msg_max": "1", "net/ipv4/ip_forward": "1"});
    assert_eq!(against(set("/linux/sysctl", own)), []);
    let mut shared = record("ctr-1.7");
    remove_namespace(&mut shared, "ipc");
    set("/linux/sysctl", json!({"kernel.shmmax": "1"}))(&mut shared);
    assert_eq!(judge(&policy("host_namespaces = ['ipc']"), &shared).len(), 1);
}

#[test]
fn annotations_that_programs_act_on() {
    for name in [
        "org.criu.config",
        "run.oci.handler",
        "run.oci.hooks.stdout",
        "cdi.k8s.io/x",
        "org.systemd.property.ExecStart",
        "io.kubernetes.cri.sandbox-id",
        "io.containerd.runc.v2.group",
        "com.nvidia.x",
        "anything",
    ] {
        let allow = format!("annotations = ['{name}']");
        refused("/annotations", json!({ name: "/x" }), name, Some("annotations"), &allow);
    }
    assert_eq!(against(set("/annotations", json!({"org.opencontainers.image.title": "x"}))), []);
}

#[test]
fn labels_that_programs_act_on() {
    for name in [
        "containerd.io/restart.loguri",
        "containerd.io/restart.logpath",
        "containerd.io/gc.ref.content.x",
        "io.containerd.runtime.x",
        "nerdctl/log-uri",
        "io.cri-containerd.kind",
    ] {
        let change = |r: &mut Record| drop(r.labels.insert(name.into(), "binary:///bin/sh".into()));
        let found = against(change);
        assert!(
            found.len() == 1 && found[0].key == Some("labels") && found[0].what.contains(name),
            "{found:?}"
        );
        let mut labelled = record("ctr-1.7");
        change(&mut labelled);
        assert_eq!(judge(&policy(&format!("labels = ['{name}']")), &labelled), []);
    }
    for name in ["mine", "org.opencontainers.image.title", "containerd.io/restart.status"] {
        assert_eq!(against(|r| drop(r.labels.insert(name.into(), "x".into()))), []);
    }
}

#[test]
fn what_else_is_in_a_record() {
    let key = |change: fn(&mut Record)| {
        let found = against(change);
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].key
    };
    assert_eq!(key(|r| r.runtime = "/tmp/x".into()), Some("runtimes"));
    assert_eq!(key(|r| r.runtime = String::new()), Some("runtimes"));
    assert_eq!(key(|r| drop(r.extensions.insert("x".into(), Opaque::default()))), Some("extensions"));
    assert_eq!(key(|r| r.sandbox = "pod".into()), None);
    assert_eq!(key(|r| r.snapshotter = "../x".into()), None);
    assert_eq!(key(|r| r.snapshot_key = "a/b".into()), None);
    assert_eq!(key(|r| r.spec_type = "x".into()), None);
    assert_eq!(key(|r| r.image = String::new()), None);
    assert_eq!(key(|r| r.image = "a\nb".into()), None);
    assert_eq!(key(|r| r.spec = Value::Null), None);
}

#[test]
fn options_of_the_runtime() {
    let given = |kind: &str, value: Vec<u8>| {
        against(|r| r.runtime_options = Some(Opaque { type_url: kind.into(), value }))
    };
    // a field of type string: its number, its length, its bytes
    let text = |number: u8, text: &str| [&[number << 3 | 2, text.len() as u8][..], text.as_bytes()].concat();
    let runc = "containerd.runc.v1.Options";
    let binary = given(runc, text(6, "/tmp/evil"));
    assert!(binary.len() == 1 && binary[0].key == Some("oci_runtimes"), "{binary:?}");
    assert_eq!(given(runc, text(6, "crun")), []);
    assert_eq!(given(runc, vec![]), []);
    assert_eq!(given(runc, vec![9 << 3, 1]), [], "SystemdCgroup");
    for number in [3, 7, 8, 10, 11, 12] {
        let found = given(runc, text(number, "/x"));
        assert!(found.len() == 1 && found[0].key.is_none(), "{number}: {found:?}");
    }
    assert_eq!(given(runc, vec![1 << 3, 1]).len(), 1, "NoPivotRoot");
    assert_eq!(given(runc, vec![4 << 3, 7]).len(), 1, "IoUid");
    assert_eq!(given(runc, vec![0xff]).len(), 1);
    assert_eq!(given("x.Options", vec![]).len(), 1);
    let generic = "runtimeoptions.v1.Options";
    let file = given(generic, text(2, "/tmp/x.toml"));
    assert!(file.len() == 1 && file[0].key == Some("runtime_configs"), "{file:?}");
    assert_eq!(given(generic, text(3, "BinaryName = '/tmp/x'"))[0].key, Some("oci_runtimes"));
    assert_eq!(given(generic, text(3, "binary_name = '/tmp/x'"))[0].key, Some("oci_runtimes"));
    assert_eq!(given(generic, text(3, "Root = '/tmp/x'"))[0].key, None);
    assert_eq!(given(generic, text(3, "SystemdCgroup = true\nRoot = ''")), []);
    assert_eq!(given(generic, text(3, "]")).len(), 1);
}

#[test]
fn an_image_takes_no_name_of_this_nodes() {
    let (policy, free) = (Policy::default(), policy("image_names = ['localhost/*']"));
    let (mine, other) = ("sha256:aa", "sha256:bb");
    let name = "docker.io/library/redis:7";
    assert_eq!(image_name(&policy, name, mine, Some(mine)), name, "the very same is here");
    for here in [None, Some(other)] {
        assert_eq!(image_name(&policy, name, mine, here), format!("{name}@{mine}"));
        // moved on, it stays what it is, and does not grow
        assert_eq!(image_name(&policy, &format!("{name}@{mine}"), mine, here), format!("{name}@{mine}"));
    }
    assert_eq!(
        image_name(&policy, &format!("{name}@{mine}"), mine, Some(mine)),
        name,
        "back where it came from"
    );
    assert_eq!(image_name(&free, "localhost/a:1", mine, None), "localhost/a:1");
    assert_eq!(image_name(&free, "localhost/a:1", mine, Some(other)), format!("localhost/a:1@{mine}"));
    assert_eq!(image_name(&free, name, mine, None), format!("{name}@{mine}"));
}
