//! Each reason against a container, one at a time; and what is none.

use std::{collections::BTreeSet, path::Path};

use serde_json::json;

use super::*;
use crate::containerd::image::{Blob, digest_of};

fn blob(digest: &str, size: u64) -> Blob {
    Blob { digest: digest.into(), size, ..Blob::default() }
}

fn set(words: &str) -> BTreeSet<String> {
    words.split_whitespace().map(String::from).collect()
}

fn host() -> HostFacts {
    HostFacts {
        arch: "x86_64".into(),
        cpu: set("sse2 avx2 ibrs"),
        kernel: "6.18".into(),
        page_size: 4096,
        criu: "4.2.1".into(),
        runc: "1.1.15".into(),
        cgroup: "v2".into(),
    }
}

fn offer() -> Offer {
    let mut offer = Offer { host: host(), memory: 1 << 30, runtime: "runc".into(), ..Default::default() };
    offer.namespace = "default".into();
    offer.net = Some(Default::default());
    offer.record = crate::policy::tests::record("ctr-1.7");
    offer.record.spec["linux"]["namespaces"][4]["path"] = json!("/run/netns/x");
    let mounts = offer.record.spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/data", "type": "bind", "source": "/srv/data"}));
    offer
}

fn situation() -> Situation {
    Situation {
        host: host(),
        images_free: 4 << 30,
        images_in_memory: true,
        memory_available: 4 << 30,
        bridge: Some(Ok("cni0".into())),
        mounts: [(PathBuf::from("/srv/data"), Source::Fine)].into(),
        ..Default::default()
    }
}

#[test]
fn versions_compare_by_major_and_minor() {
    assert!(older("3.17.1", "4.2") && older("4.1.1", "4.2.1"));
    assert!(!older("4.2", "4.2.1") && !older("4.2.1", "4.2") && !older("", "4.2") && !older("4.2", "git"));
}

#[test]
fn a_fit_node_takes_it() {
    check(&offer(), &situation()).unwrap();
}

type Change = fn(&mut Offer, &mut Situation);

#[test]
fn each_reason_has_its_code() {
    let cases: &[(&str, Change)] = &[
        ("name", |_, s| s.taken = Some("x".into())),
        ("cpu", |o, _| o.host.cpu.extend(set("avx512f ssbd"))),
        ("cpu", |o, _| o.host.arch = "aarch64".into()),
        ("cpu", |o, _| o.host.page_size = 65536),
        ("room", |_, s| s.images_free = 1 << 30),
        ("memory", |_, s| s.memory_available = 2 << 30),
        ("mounts", |_, s| s.mounts.clear()),
        ("mounts", |_, s| *s.mounts.get_mut(Path::new("/srv/data")).unwrap() = Source::Missing),
        ("mounts", |_, s| *s.mounts.get_mut(Path::new("/srv/data")).unwrap() = Source::Astray("x".into())),
        ("network", |o, _| o.net = None),
        ("policy", |o, _| o.record.spec["hooks"] = json!({"prestart": [{"path": "/bin/sh"}]})),
        ("policy", |o, _| o.record.runtime = "/tmp/shim".into()),
        ("image", |o, _| o.blobs = vec![blob("sha256:../../x", 1)]),
        ("image", |o, _| o.blobs = vec![blob(&digest_of(b"a"), 1 << 62), blob(&digest_of(b"b"), 1 << 62)]),
        ("image", |o, _| o.blobs = vec![blob(&digest_of(b"a"), 1); BLOBS + 1]),
        ("criu", |_, s| s.host.criu.clear()),
        ("runtime", |_, s| s.host.runc.clear()),
        ("cgroup", |_, s| s.host.cgroup = "v1".into()),
        ("bridge", |_, s| s.bridge = Some(Err("cni0".into()))),
        ("snapshotter", |_, s| s.snapshotter = Some("not loaded".into())),
        ("netns", |_, s| s.netns_taken = Some("/run/netns/x".into())),
        ("network", |o, _| o.record.spec["linux"]["namespaces"] = json!([{"type": "pid"}])),
        ("pid", |o, _| o.record.spec["linux"]["namespaces"] = json!([{"type": "network"}])),
    ];
    for (code, change) in cases {
        let (mut offer, mut situation) = (offer(), situation());
        change(&mut offer, &mut situation);
        let refusal = check(&offer, &situation).unwrap_err();
        assert_eq!(refusal.code, *code, "{refusal:?}");
        assert!(!refusal.message.is_empty());
    }
}

#[test]
fn memory_that_comes_by_pages_is_needed_once() {
    let fits = |offer: &Offer, available: u64| {
        check(offer, &Situation { memory_available: available, images_free: u64::MAX, ..situation() }).is_ok()
    };
    let gib = |n: f64| (n * (1u64 << 30) as f64) as u64;
    let mut offer = Offer { memory: 8 << 30, ..offer() };
    assert!(!fits(&offer, gib(16.5)) && fits(&offer, gib(17.0)), "from images: twice");
    offer.paged_memory = 8 << 30;
    assert!(!fits(&offer, gib(8.5)) && fits(&offer, gib(9.0)));
    // shared memory comes in images all the same
    offer = Offer { paged_memory: 6 << 30, shared_memory: 2 << 30, ..offer };
    assert!(!fits(&offer, gib(10.5)) && fits(&offer, gib(11.0)));
    // processes that shared pages with their parent have their own then
    offer = Offer { memory: 1 << 30, paged_memory: 10 << 30, shared_memory: 0, ..offer };
    assert!(!fits(&offer, gib(10.5)));
    // and little memory is restored at once, beside its images
    offer = Offer { memory: 8 << 20, paged_memory: 8 << 20, ..offer };
    assert!(!fits(&offer, 32 << 20) && fits(&offer, 34 << 20));
}

#[test]
fn what_the_policy_does_not_allow_is_named_with_its_key() {
    let (mut offer, mut situation) = (offer(), situation());
    offer.record.spec["process"]["capabilities"]["bounding"] = json!(["CAP_SYS_ADMIN"]);
    let said = check(&offer, &situation).unwrap_err();
    assert!(said.message.contains("CAP_SYS_ADMIN") && said.advice.contains("`capabilities`"), "{said:?}");
    situation.policy.capabilities = vec!["CAP_SYS_ADMIN".into()];
    check(&offer, &situation).unwrap();
    offer.record.labels = (0..9).map(|n| (format!("nerdctl/{n}"), String::new())).collect();
    let said = check(&offer, &situation).unwrap_err();
    assert!(said.message.ends_with("and 4 more") && said.advice.matches("`labels`").count() == 1, "{said:?}");
}

#[test]
fn only_features_for_programs_count() {
    assert!(missing_features("x86_64", &set("ibrs sse2"), &set("sse2")).is_empty());
    assert_eq!(missing_features("x86_64", &set("avx512f sse2"), &set("sse2")), ["avx512f"]);
    assert_eq!(missing_features("aarch64", &set("sve"), &set("")), ["sve"]);
    let (mut offer, situation) = (offer(), situation());
    offer.host.cpu.insert("avx512f".into());
    offer.ignore_cpu = true;
    check(&offer, &situation).unwrap();
}

#[test]
fn a_cold_move_needs_no_memory_nor_criu() {
    let (mut offer, mut situation) = (offer(), situation());
    (offer.cold, situation.images_free, situation.memory_available) = (true, 0, 0);
    situation.host.criu.clear();
    offer.host.cpu.insert("avx512f".into());
    check(&offer, &situation).unwrap();
}
