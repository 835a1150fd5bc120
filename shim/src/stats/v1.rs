//! The fields of `io.containerd.cgroups.v1.Metrics` from the controllers' files.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use containerd_shim_protos::{
    cgroups::metrics::{
        BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat,
        Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
    },
    protobuf::MessageField,
};

use super::{fill, huge_page_sizes, number, rdma, table};

/// All metrics; `dirs` has a directory for each controller.
pub fn metrics(dirs: &HashMap<String, PathBuf>) -> Metrics {
    let dir = |controller: &str| dirs.get(controller).map(PathBuf::as_path).filter(|dir| dir.exists());
    let mut metrics =
        Metrics { cpu: MessageField::some(cpu(dir("cpuacct"), dir("cpu"))), ..Default::default() };
    if let Some(dir) = dir("memory") {
        metrics.memory = MessageField::some(memory(dir));
        metrics.memory_oom_control = MessageField::some(oom_control(dir));
    }
    if let Some(dir) = dir("pids") {
        let (current, limit) = (number(dir.join("pids.current"), 0), number(dir.join("pids.max"), 0));
        metrics.pids = MessageField::some(PidsStat { current, limit, ..Default::default() });
    }
    if let Some(dir) = dir("blkio") {
        metrics.blkio =
            MessageField::some(blkio(dir, &fs::read_to_string("/proc/partitions").unwrap_or_default()));
    }
    if let Some(dir) = dir("hugetlb") {
        metrics.hugetlb = huge_page_sizes().into_iter().map(|size| hugetlb(dir, size)).collect();
    }
    if let Some(dir) = dir("rdma") {
        let entry = |(device, hca_handles, hca_objects)| RdmaEntry {
            device,
            hca_handles,
            hca_objects,
            ..Default::default()
        };
        metrics.rdma = MessageField::some(RdmaStat {
            current: rdma(dir.join("rdma.current")).into_iter().map(entry).collect(),
            limit: rdma(dir.join("rdma.max")).into_iter().map(entry).collect(),
            ..Default::default()
        });
    }
    metrics
}

/// CPU time in nanoseconds, and throttling.
fn cpu(acct: Option<&Path>, cpu: Option<&Path>) -> CPUStat {
    let mut usage = CPUUsage::default();
    if let Some(dir) = acct {
        usage.total = number(dir.join("cpuacct.usage"), 0);
        let (mut user, mut system) = (0, 0);
        fill(&mut [("user", &mut user), ("system", &mut system)], &table(dir.join("cpuacct.stat")));
        usage.user = from_ticks(user);
        usage.kernel = from_ticks(system);
        let all = fs::read_to_string(dir.join("cpuacct.usage_percpu")).unwrap_or_default();
        usage.per_cpu = all.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    }
    let mut throttling = Throttle::default();
    if let Some(dir) = cpu {
        fill(
            &mut [
                ("nr_periods", &mut throttling.periods),
                ("nr_throttled", &mut throttling.throttled_periods),
                ("throttled_time", &mut throttling.throttled_time),
            ],
            &table(dir.join("cpu.stat")),
        );
    }
    CPUStat {
        usage: MessageField::some(usage),
        throttling: MessageField::some(throttling),
        ..Default::default()
    }
}

/// The kernel's user-visible clock ticks are 1/100 s on every architecture that containers run on (USER_HZ).
fn from_ticks(ticks: u64) -> u64 {
    ticks * (1_000_000_000 / 100)
}

fn memory(dir: &Path) -> MemoryStat {
    let mut m = MemoryStat::default();
    fill(
        &mut [
            ("cache", &mut m.cache),
            ("rss", &mut m.rss),
            ("rss_huge", &mut m.rss_huge),
            ("mapped_file", &mut m.mapped_file),
            ("dirty", &mut m.dirty),
            ("writeback", &mut m.writeback),
            ("pgpgin", &mut m.pg_pg_in),
            ("pgpgout", &mut m.pg_pg_out),
            ("pgfault", &mut m.pg_fault),
            ("pgmajfault", &mut m.pg_maj_fault),
            ("inactive_anon", &mut m.inactive_anon),
            ("active_anon", &mut m.active_anon),
            ("inactive_file", &mut m.inactive_file),
            ("active_file", &mut m.active_file),
            ("unevictable", &mut m.unevictable),
            ("hierarchical_memory_limit", &mut m.hierarchical_memory_limit),
            ("hierarchical_memsw_limit", &mut m.hierarchical_swap_limit),
            ("total_cache", &mut m.total_cache),
            ("total_rss", &mut m.total_rss),
            ("total_rss_huge", &mut m.total_rss_huge),
            ("total_mapped_file", &mut m.total_mapped_file),
            ("total_dirty", &mut m.total_dirty),
            ("total_writeback", &mut m.total_writeback),
            ("total_pgpgin", &mut m.total_pg_pg_in),
            ("total_pgpgout", &mut m.total_pg_pg_out),
            ("total_pgfault", &mut m.total_pg_fault),
            ("total_pgmajfault", &mut m.total_pg_maj_fault),
            ("total_inactive_anon", &mut m.total_inactive_anon),
            ("total_active_anon", &mut m.total_active_anon),
            ("total_inactive_file", &mut m.total_inactive_file),
            ("total_active_file", &mut m.total_active_file),
            ("total_unevictable", &mut m.total_unevictable),
        ],
        &table(dir.join("memory.stat")),
    );
    let entry = |prefix: &str| {
        let read = |name: &str| number(dir.join(format!("memory.{prefix}{name}")), 0);
        MessageField::some(MemoryEntry {
            usage: read("usage_in_bytes"),
            max: read("max_usage_in_bytes"),
            failcnt: read("failcnt"),
            limit: read("limit_in_bytes"),
            ..Default::default()
        })
    };
    (m.usage, m.swap, m.kernel, m.kernel_tcp) =
        (entry(""), entry("memsw."), entry("kmem."), entry("kmem.tcp."));
    m
}

fn oom_control(dir: &Path) -> MemoryOomControl {
    let mut control = MemoryOomControl::default();
    fill(
        &mut [
            ("oom_kill_disable", &mut control.oom_kill_disable),
            ("under_oom", &mut control.under_oom),
            ("oom_kill", &mut control.oom_kill),
        ],
        &table(dir.join("memory.oom_control")),
    );
    control
}

fn hugetlb(dir: &Path, size: String) -> HugetlbStat {
    let read = |name: &str| number(dir.join(format!("hugetlb.{size}.{name}")), 0);
    HugetlbStat {
        usage: read("usage_in_bytes"),
        max: read("max_usage_in_bytes"),
        failcnt: read("failcnt"),
        pagesize: size,
        ..Default::default()
    }
}

/// The counters of the CFQ scheduler where there is one and it has counted something, else those of the throttling layer.
fn blkio(dir: &Path, partitions: &str) -> BlkIOStat {
    let read = |name: &str| {
        let text = fs::read_to_string(dir.join(format!("blkio.{name}"))).unwrap_or_default();
        blkio_entries(&text, partitions)
    };
    if dir.join("blkio.io_serviced_recursive").exists() {
        let stat = BlkIOStat {
            sectors_recursive: read("sectors_recursive"),
            io_service_bytes_recursive: read("io_service_bytes_recursive"),
            io_serviced_recursive: read("io_serviced_recursive"),
            io_queued_recursive: read("io_queued_recursive"),
            io_service_time_recursive: read("io_service_time_recursive"),
            io_wait_time_recursive: read("io_wait_time_recursive"),
            io_merged_recursive: read("io_merged_recursive"),
            io_time_recursive: read("time_recursive"),
            ..Default::default()
        };
        if stat != BlkIOStat::default() {
            return stat;
        }
    }
    BlkIOStat {
        io_serviced_recursive: read("throttle.io_serviced"),
        io_service_bytes_recursive: read("throttle.io_service_bytes"),
        ..Default::default()
    }
}

/// Lines `major:minor [operation] value`; the line `Total value` is left out.
fn blkio_entries(text: &str, partitions: &str) -> Vec<BlkIOEntry> {
    let entry = |line: &str| {
        let words: Vec<&str> = line.split([' ', ':']).filter(|word| !word.is_empty()).collect();
        let (major, minor, op, value) = match words[..] {
            [major, minor, value] => (major, minor, "", value),
            [major, minor, op, value] => (major, minor, op, value),
            _ => return None,
        };
        Some(BlkIOEntry {
            device: device_name(partitions, major, minor),
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            op: op.to_string(),
            value: value.parse().ok()?,
            ..Default::default()
        })
    };
    text.lines().filter_map(entry).collect()
}

/// A device's path by `/proc/partitions` (`major minor blocks name`), empty when it is not there.
fn device_name(partitions: &str, major: &str, minor: &str) -> String {
    let name = partitions.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        matches!(words[..], [a, b, _, _] if (a, b) == (major, minor)).then(|| format!("/dev/{}", words[3]))
    });
    name.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_v1() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let write = |name: &str, text: &str| fs::write(path(name), text).unwrap();
        write("cpuacct.usage", "12345\n");
        write("cpuacct.stat", "user 3\nsystem 4\n");
        write("cpuacct.usage_percpu", "1 2 3 \n");
        write("cpu.stat", "nr_periods 5\nnr_throttled 6\nthrottled_time 7\n");
        write("memory.stat", "cache 8\nrss 9\nhierarchical_memsw_limit 10\ntotal_unevictable 11\n");
        write("memory.usage_in_bytes", "12\n");
        write("memory.memsw.limit_in_bytes", "13\n");
        write("memory.kmem.tcp.failcnt", "14\n");
        write("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\noom_kill 15\n");
        write("pids.current", "16\n");
        write("pids.max", "max\n");
        write("blkio.throttle.io_serviced", "254:0 Read 17\n254:0 Total 17\nTotal 17\n");
        write("rdma.current", "mlx4_0 hca_handle=2 hca_object=max\n");
        let names = ["cpu", "cpuacct", "memory", "pids", "blkio", "rdma"];
        let m = metrics(&names.iter().map(|name| (name.to_string(), dir.path().to_path_buf())).collect());
        assert_eq!(
            (m.cpu.usage.total, m.cpu.usage.user, m.cpu.usage.kernel),
            (12345, 30_000_000, 40_000_000)
        );
        assert_eq!(m.cpu.usage.per_cpu, [1, 2, 3]);
        let t = &m.cpu.throttling;
        assert_eq!((t.periods, t.throttled_periods, t.throttled_time), (5, 6, 7));
        let s = &m.memory;
        assert_eq!((s.cache, s.rss, s.hierarchical_swap_limit, s.total_unevictable), (8, 9, 10, 11));
        assert_eq!((s.usage.usage, s.swap.limit, s.kernel_tcp.failcnt), (12, 13, 14));
        assert_eq!((m.memory_oom_control.oom_kill_disable, m.memory_oom_control.oom_kill), (1, 15));
        assert_eq!((m.pids.current, m.pids.limit), (16, 0));
        assert_eq!(m.blkio.io_serviced_recursive.len(), 2);
        assert_eq!(m.blkio.io_serviced_recursive[0].op, "Read");
        assert_eq!((m.rdma.current[0].hca_handles, m.rdma.current[0].hca_objects), (2, u32::MAX));
        let named = blkio_entries("8:16 Read 1\n", "major minor  #blocks  name\n\n   8       16    1 sdb\n");
        assert_eq!((named[0].device.as_str(), named[0].value), ("/dev/sdb", 1));
    }
}
