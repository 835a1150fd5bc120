//! Does the destination want this container? Every reason against it is found before anything is made. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use super::{
    host::HostFacts,
    message::{Offer, Refusal},
    pod,
    spec::{self, SpecNamespace},
};
use crate::{
    containerd::content::check_digest,
    policy::{self, Policy, Violation, host::Source},
};

/// The most blobs that one image may bring.
const BLOBS: usize = 4096;
/// So many things against a spec are named; the rest is counted.
const NAMED: usize = 5;

/// CPU features of x86 that programs use without asking the kernel first, in the kernel's words. Others in
/// `/proc/cpuinfo` are the kernel's own business (mitigations, virtualisation, power) and may differ.
const X86_USER: &[&str] = &[
    "3dnow",
    "3dnowext",
    "3dnowprefetch",
    "abm",
    "adx",
    "aes",
    "amx_bf16",
    "amx_complex",
    "amx_fp16",
    "amx_int8",
    "amx_tile",
    "avx",
    "avx2",
    "avx512_4fmaps",
    "avx512_4vnniw",
    "avx512_bf16",
    "avx512_bitalg",
    "avx512_fp16",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_vp2intersect",
    "avx512_vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vbmi",
    "avx512vl",
    "avx_ifma",
    "avx_ne_convert",
    "avx_vnni",
    "avx_vnni_int16",
    "avx_vnni_int8",
    "bmi1",
    "bmi2",
    "cldemote",
    "clflushopt",
    "clwb",
    "clzero",
    "cmov",
    "cmpccxadd",
    "cx16",
    "cx8",
    "enqcmd",
    "erms",
    "f16c",
    "fma",
    "fma4",
    "fsgsbase",
    "fsrm",
    "fxsr",
    "gfni",
    "hle",
    "lahf_lm",
    "lwp",
    "mmx",
    "mmxext",
    "movbe",
    "movdir64b",
    "movdiri",
    "mwaitx",
    "ospke",
    "pclmulqdq",
    "pku",
    "pni",
    "popcnt",
    "ptwrite",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha512",
    "sha_ni",
    "sm3",
    "sm4",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "user_shstk",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "x87",
    "xop",
    "xsave",
    "xsavec",
    "xsaveopt",
];

/// CPU features that programs on the source could be using and that the destination lacks.
pub fn missing_features(arch: &str, source: &BTreeSet<String>, here: &BTreeSet<String>) -> Vec<String> {
    // on arm64 the kernel lists only what is meant for programs
    let for_programs = |f: &&String| arch != "x86_64" || X86_USER.contains(&f.as_str());
    source.difference(here).filter(for_programs).cloned().collect()
}

/// What the destination looked up before it decides.
#[derive(Clone, Debug, Default)]
pub struct Situation {
    /// This node.
    pub host: HostFacts,
    /// A container, task or snapshot of that name is there; in words.
    pub taken: Option<String>,
    /// Free bytes where images are kept.
    pub images_free: u64,
    /// Images are kept in memory.
    pub images_in_memory: bool,
    /// Memory that can be had, in bytes.
    pub memory_available: u64,
    /// The snapshotter's complaint, if it does not work.
    pub snapshotter: Option<String>,
    /// The configured bridge; `Err`: its name, but it does not exist.
    pub bridge: Option<Result<String, String>>,
    /// What containers may be here.
    pub policy: Policy,
    /// What the folders are that the spec mounts.
    pub mounts: BTreeMap<PathBuf, Source>,
    /// The place for the network namespace is taken.
    pub netns_taken: Option<PathBuf>,
}

impl Situation {
    /// Bytes of memory that a container may bring along, whatever its offer said of them.
    pub fn memory_cap(&self) -> u64 {
        let memory = if self.images_in_memory { self.memory_available / 2 } else { self.memory_available };
        self.images_free.min(memory)
    }
}

/// Decides.
///
/// # Errors
/// The first reason against it.
pub fn check(offer: &Offer, now: &Situation) -> Result<(), Refusal> {
    let no = |code: &str, message: String, advice: &str| {
        Err(Refusal { code: code.into(), message, advice: advice.into() })
    };
    if let Some(taken) = &now.taken {
        return no("name", taken.clone(), "delete it, or move to another node");
    }
    check_spec(offer, now)?;
    let (host, there) = (&now.host, &offer.host);
    if host.arch != there.arch {
        return no(
            "cpu",
            format!("this node is {}, the container runs on {}", host.arch, there.arch),
            "move to a node of the same architecture",
        );
    }
    if let Some(complaint) = &now.snapshotter {
        return no(
            "snapshotter",
            format!("the snapshotter {} does not work here: {complaint}", offer.record.snapshotter),
            "configure it in this node's containerd",
        );
    }
    if offer.cold {
        return Ok(());
    }
    check_live(offer, now)
}

/// Whether a version's major and minor numbers are lower than another's. What is no version is not older.
fn older(version: &str, than: &str) -> bool {
    let numbers = |v: &str| {
        let mut parts = v.split('.').map(|p| p.parse::<u32>().ok());
        Some((parts.next()??, parts.next().flatten().unwrap_or(0)))
    };
    match (numbers(version), numbers(than)) {
        (Some(version), Some(than)) => version < than,
        _ => false,
    }
}

fn check_live(offer: &Offer, now: &Situation) -> Result<(), Refusal> {
    let no = |code: &str, message: String, advice: &str| {
        Err(Refusal { code: code.into(), message, advice: advice.into() })
    };
    let (host, there) = (&now.host, &offer.host);
    if host.page_size != there.page_size {
        return no(
            "cpu",
            format!("pages have {} bytes here and {} there", host.page_size, there.page_size),
            "",
        );
    }
    let missing = missing_features(&host.arch, &there.cpu, &host.cpu);
    if !offer.ignore_cpu && !missing.is_empty() {
        return no(
            "cpu",
            format!("this node's CPU lacks {}, which the processes could be using", missing.join(", ")),
            "move to a node with these features, or take the risk with --ignore-cpu",
        );
    }
    if host.criu.is_empty() {
        return no("criu", "CRIU was not found on this node".into(), "run `transship doctor` there");
    }
    if older(&host.criu, &there.criu) {
        return no(
            "criu",
            format!(
                "CRIU {} of this node is older than {} of the other, whose images it may not understand",
                host.criu, there.criu
            ),
            "install the same CRIU on both nodes",
        );
    }
    if host.runc.is_empty() {
        return no(
            "runtime",
            format!("the runtime {} was not found on this node", offer.runtime),
            "install it, or put it into the PATH of the agent",
        );
    }
    if host.cgroup != there.cgroup {
        return no(
            "cgroup",
            format!("this node has cgroup {}, the other {}", host.cgroup, there.cgroup),
            "boot both nodes with the same cgroup mode",
        );
    }
    match (&now.bridge, &offer.net) {
        (Some(Err(name)), _) => {
            return no(
                "bridge",
                format!("the bridge {name} does not exist on this node"),
                "make it, or correct `bridge` in agent.toml",
            );
        }
        (None, Some(net)) if super::netns::has_links(net) => {
            return no(
                "bridge",
                "this node has no bridge for the container's network".into(),
                "set `bridge` in agent.toml",
            );
        }
        _ => {}
    }
    let images = room(offer.memory, 1);
    if now.images_free < images {
        return no(
            "room",
            format!("the images need about {} where {} are free", mib(images), mib(now.images_free)),
            "make room, or set `images_dir` in agent.toml to a larger tmpfs",
        );
    }
    // Restored memory exists beside its image until the restore is complete.
    let memory = room(offer.memory, if now.images_in_memory { 2 } else { 1 });
    if now.memory_available < memory {
        return no(
            "memory",
            format!("it needs about {} of memory, {} are available", mib(memory), mib(now.memory_available)),
            "make room on this node, or move to another one",
        );
    }
    Ok(())
}

fn check_spec(offer: &Offer, now: &Situation) -> Result<(), Refusal> {
    let no = |code: &str, message: String, advice: &str| {
        Err(Refusal { code: code.into(), message, advice: advice.into() })
    };
    pod::check(&offer.record)?;
    check_movable(&offer.record.spec)?;
    let against = policy::check(&now.policy, &offer.namespace, &offer.record);
    if !against.is_empty() {
        return Err(refusal(&against));
    }
    check_blobs(offer)?;
    for mount in spec::host_mounts(&offer.record.spec) {
        let what = format!("it mounts {} of the node", mount.display());
        match now.mounts.get(&mount).unwrap_or(&Source::Unlisted) {
            Source::Fine => {}
            Source::Unlisted => {
                return no(
                    "mounts",
                    format!("{what}, which is not allowed on this one"),
                    "list it under `host_mounts` in this node's agent.toml if its content is the same on both",
                );
            }
            Source::Missing => {
                return no(
                    "mounts",
                    format!("{what}, which does not exist on this one"),
                    "make it available here (a shared filesystem, or a copy)",
                );
            }
            Source::Astray(why) => {
                return no(
                    "mounts",
                    format!("{what}, on whose way here is a link below the listed folder ({why})"),
                    "list the folder itself that is meant",
                );
            }
        }
    }
    if offer.net.is_none() && !offer.cold {
        return no("network", "the other node does not say what its network is".into(), "");
    }
    if let Some(path) = &now.netns_taken {
        return no(
            "netns",
            format!("a network namespace {} is there already", path.display()),
            "if nothing uses it, remove it with `ip netns delete`",
        );
    }
    Ok(())
}

/// What the other side is told of things that the policy does not allow.
fn refusal(against: &[Violation]) -> Refusal {
    let mut message: Vec<String> = against.iter().take(NAMED).map(|v| format!("it {}", v.what)).collect();
    if against.len() > NAMED {
        message.push(format!("and {} more", against.len() - NAMED));
    }
    let mut advice: Vec<String> = Vec::new();
    for one in against.iter().take(NAMED).map(Violation::advice) {
        if !advice.contains(&one) {
            advice.push(one);
        }
    }
    Refusal {
        code: "policy".into(),
        message: format!(
            "this node's policy does not allow what the container asks for: {}",
            message.join("; ")
        ),
        advice: advice.join("; "),
    }
}

fn check_blobs(offer: &Offer) -> Result<(), Refusal> {
    let no = |message: String| Err(Refusal { code: "image".into(), message, advice: String::new() });
    if offer.blobs.len() > BLOBS {
        return no(format!("its image has {} blobs", offer.blobs.len()));
    }
    let mut total = 0u64;
    for blob in &offer.blobs {
        if check_digest(&blob.digest).is_err() {
            return no(format!("its image has a blob {:?}", blob.digest));
        }
        match total.checked_add(blob.size).filter(|t| *t <= i64::MAX as u64) {
            Some(sum) => total = sum,
            None => return no(format!("its image has a blob of {} bytes", blob.size)),
        }
    }
    Ok(())
}

/// What no move can do, whatever the destination; the source asks this too, before it dials.
///
/// # Errors
/// The reason.
pub fn check_movable(spec: &serde_json::Value) -> Result<(), Refusal> {
    let no = |code: &str, message: &str, advice: &str| {
        Err(Refusal { code: code.into(), message: message.into(), advice: advice.into() })
    };
    if spec::namespace(spec, "network") == SpecNamespace::Host {
        return no(
            "network",
            "it uses the node's network, whose addresses cannot move",
            "give it a network namespace of its own",
        );
    }
    if spec::namespace(spec, "pid") != SpecNamespace::Own {
        return no(
            "pid",
            "it has no PID namespace of its own, and its PIDs may be taken on another node",
            "give it a PID namespace of its own",
        );
    }
    Ok(())
}

/// Bytes to have free for `memory` bytes, held so many times: a tenth and 16 MiB more, for what else images hold and for
/// what the processes allocate until the freeze.
fn room(memory: u64, times: u64) -> u64 {
    memory.saturating_mul(times).saturating_add(memory / 10).saturating_add(16 << 20)
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
        assert!(
            !older("4.2", "4.2.1") && !older("4.2.1", "4.2") && !older("", "4.2") && !older("4.2", "git")
        );
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
            ("mounts", |_, s| {
                *s.mounts.get_mut(Path::new("/srv/data")).unwrap() = Source::Astray("x".into())
            }),
            ("network", |o, _| o.net = None),
            ("policy", |o, _| o.record.spec["hooks"] = json!({"prestart": [{"path": "/bin/sh"}]})),
            ("policy", |o, _| o.record.runtime = "/tmp/shim".into()),
            ("image", |o, _| o.blobs = vec![blob("sha256:../../x", 1)]),
            ("image", |o, _| {
                o.blobs = vec![blob(&digest_of(b"a"), 1 << 62), blob(&digest_of(b"b"), 1 << 62)]
            }),
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
    fn what_the_policy_does_not_allow_is_named_with_its_key() {
        let (mut offer, mut situation) = (offer(), situation());
        offer.record.spec["process"]["capabilities"]["bounding"] = json!(["CAP_SYS_ADMIN"]);
        let said = check(&offer, &situation).unwrap_err();
        assert!(said.message.contains("CAP_SYS_ADMIN") && said.advice.contains("`capabilities`"), "{said:?}");
        situation.policy.capabilities = vec!["CAP_SYS_ADMIN".into()];
        check(&offer, &situation).unwrap();
        offer.record.labels = (0..9).map(|n| (format!("nerdctl/{n}"), String::new())).collect();
        let said = check(&offer, &situation).unwrap_err();
        assert!(
            said.message.ends_with("and 4 more") && said.advice.matches("`labels`").count() == 1,
            "{said:?}"
        );
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
}
