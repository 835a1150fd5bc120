//! Statistics, and limits that are changed while it runs.

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::cri::client::{Answer, Cri};
use crate::cri::compare;
use crate::cri::config::{Filter, Id, ListOf, Resources, UpdateResources};
use crate::cri::pod::Pod;
use crate::cri::record::Record;
use crate::cri::stats::{ManyContainerStats, ManyPodStats, OneContainerStats, OnePodStats};
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "cri_stats", needs: Needs::Pods, run: |bed| compare::same(bed, stats) },
    Scenario { name: "cri_update", needs: Needs::Pods, run: |bed| compare::same(bed, update) },
];

/// Every field that runc's has, and none besides.
fn stats(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "stats", record)?;
    let script = "dd if=/dev/zero of=/tmp/x bs=1M count=3 2> /dev/null; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo up; sleep 1000";
    let id = pod.start("main", &["sh", "-c", script], record)?;
    pod.wait_log("main", "up")?;
    let of_pod = || ListOf { filter: Some(Filter { id: pod.id.clone(), ..Default::default() }) };
    let of_container =
        || ListOf { filter: Some(Filter { pod_sandbox_id: pod.id.clone(), ..Default::default() }) };
    let one: Answer<OneContainerStats> = cri.ask("ContainerStats", Id { id: id.clone() });
    if let Ok(OneContainerStats { stats: Some(stats) }) = &one {
        let used = |n: &Option<crate::cri::stats::Number>| n.as_ref().map_or(0, |n| n.value);
        let cpu = stats.cpu.as_ref().map_or(0, |c| used(&c.usage_core_nano_seconds));
        let memory = stats.memory.as_ref().map_or(0, |m| used(&m.working_set_bytes));
        ensure!(cpu > 1_000_000 && (100_000..100 << 20).contains(&memory), "{stats:?}");
    }
    record.outcome("container", &steady(one)?);
    let many: Answer<ManyContainerStats> = cri.ask("ListContainerStats", of_container());
    record.outcome("containers", &steady(many)?);
    let one: Answer<OnePodStats> = cri.ask("PodSandboxStats", Id { id: pod.id.clone() });
    record.outcome("pod", &steady(one)?);
    let many: Answer<ManyPodStats> = cri.ask("ListPodSandboxStats", of_pod());
    record.outcome("pods", &steady(many)?);
    cri.stop(&id, 0)?;
    let after: Answer<OneContainerStats> = cri.ask("ContainerStats", Id { id });
    record.outcome("after its end", &steady(after)?);
    pod.remove()
}

/// Without what containerd itself counts at a time of its own: the size of the layer, the rate between two looks, faults that read a disk.
fn steady<T: serde::Serialize>(answer: Answer<T>) -> Result<Answer<serde_json::Value>> {
    fn strip(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(fields) => {
                for key in ["writable_layer", "usage_nano_cores", "major_page_faults", "rx_bytes", "tx_bytes"]
                {
                    fields.remove(key);
                }
                fields.values_mut().for_each(strip);
            }
            serde_json::Value::Array(items) => items.iter_mut().for_each(strip),
            _ => {}
        }
    }
    Ok(match answer {
        Ok(answer) => {
            let mut value = serde_json::to_value(answer)?;
            strip(&mut value);
            Ok(value)
        }
        Err(status) => Err(status),
    })
}

/// The limits in a container's cgroup, whichever version it is of.
fn limits(bed: &Bed, id: &str) -> Result<String> {
    let script = format!(
        "cd /sys/fs/cgroup; for f in cpu.shares cpu.cfs_quota_us cpu.cfs_period_us cpuset.cpus memory.limit_in_bytes memory.memsw.limit_in_bytes \
         cpu.weight cpu.max memory.max memory.swap.max pids.max; do
           for p in $(find . -path \"*{id}/$f\" | sort -u | head -n 1); do echo $f $(cat $p); done; done"
    );
    bed.sh(Node::A, &script)
}

/// What `kubectl patch --subresource resize` comes to.
fn update(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "update", record)?;
    let id = pod.start_with("main", &["sleep", "1000"], record, |config| {
        let resources = Resources {
            cpu_shares: 256,
            cpu_period: 100_000,
            cpu_quota: 50_000,
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        };
        config.linux.as_mut().expect("set").resources = Some(resources);
    })?;
    record.note("at first", limits(cri.bed, &id)?);
    record.outcome("status at first", &cri.verbose(&id));
    let change = |resources: Resources| {
        cri.tell("UpdateContainerResources", UpdateResources { id: id.clone(), linux: Some(resources) })
    };
    let bigger = Resources {
        cpu_shares: 512,
        cpu_quota: 100_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 128 << 20,
        ..Default::default()
    };
    record.outcome("bigger", &change(bigger));
    record.note("then", limits(cri.bed, &id)?);
    record.outcome("status then", &cri.verbose(&id));
    record.outcome("one cpu", &change(Resources { cpuset_cpus: "0".into(), ..Default::default() }));
    record.note("on one cpu", limits(cri.bed, &id)?);
    // less than it uses is refused by the kernel of cgroup v1, and kills on v2
    record.outcome("no such cpu", &change(Resources { cpuset_cpus: "4000".into(), ..Default::default() }));
    record.note("at last", limits(cri.bed, &id)?);
    cri.stop(&id, 0)?;
    record.outcome("after its end", &change(Resources { cpu_shares: 300, ..Default::default() }));
    pod.remove()
}
