//! The fields of `io.containerd.cgroups.v2.Metrics` from the cgroup's files.

use std::{fs, path::Path};

use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
        PidsStat, RdmaEntry, RdmaStat,
    },
    protobuf::MessageField,
};

use super::{fill, huge_page_sizes, number, rdma, table};

/// All metrics of a cgroup.
pub fn metrics(dir: &Path) -> Metrics {
    let one = |name: &str| number(dir.join(name), u64::MAX);
    let pids = PidsStat { current: one("pids.current"), limit: one("pids.max"), ..Default::default() };
    let entry = |(device, hca_handles, hca_objects)| RdmaEntry {
        device,
        hca_handles,
        hca_objects,
        ..Default::default()
    };
    let rdma = RdmaStat {
        current: rdma(dir.join("rdma.current")).into_iter().map(entry).collect(),
        limit: rdma(dir.join("rdma.max")).into_iter().map(entry).collect(),
        ..Default::default()
    };
    let io = IOStat {
        usage: io_entries(&fs::read_to_string(dir.join("io.stat")).unwrap_or_default()),
        psi: pressure(dir, "io.pressure"),
        ..Default::default()
    };
    let hugetlb = huge_page_sizes().into_iter().map(|size| HugeTlbStat {
        current: one(&format!("hugetlb.{size}.current")),
        max: one(&format!("hugetlb.{size}.max")),
        failcnt: table(dir.join(format!("hugetlb.{size}.events"))).get("max").copied().unwrap_or(0),
        pagesize: size,
        ..Default::default()
    });
    Metrics {
        pids: MessageField::some(pids),
        cpu: MessageField::some(cpu(dir)),
        memory: MessageField::some(memory(dir)),
        memory_events: memory_events(dir).into(),
        rdma: MessageField::some(rdma),
        io: MessageField::some(io),
        hugetlb: hugetlb.collect(),
        ..Default::default()
    }
}

/// CPU time in microseconds, and throttling.
fn cpu(dir: &Path) -> CPUStat {
    let mut c = CPUStat::default();
    fill(
        &mut [
            ("usage_usec", &mut c.usage_usec),
            ("user_usec", &mut c.user_usec),
            ("system_usec", &mut c.system_usec),
            ("nr_periods", &mut c.nr_periods),
            ("nr_throttled", &mut c.nr_throttled),
            ("throttled_usec", &mut c.throttled_usec),
            ("nr_bursts", &mut c.nr_bursts),
            ("burst_usec", &mut c.burst_usec),
        ],
        &table(dir.join("cpu.stat")),
    );
    c.psi = pressure(dir, "cpu.pressure");
    c
}

fn memory(dir: &Path) -> MemoryStat {
    let mut m = MemoryStat::default();
    // Without the controller containerd's shim answers zeroes, not "unlimited".
    if !dir.join("memory.stat").exists() {
        return m;
    }
    fill(
        &mut [
            ("anon", &mut m.anon),
            ("file", &mut m.file),
            ("kernel_stack", &mut m.kernel_stack),
            ("slab", &mut m.slab),
            ("sock", &mut m.sock),
            ("shmem", &mut m.shmem),
            ("file_mapped", &mut m.file_mapped),
            ("file_dirty", &mut m.file_dirty),
            ("file_writeback", &mut m.file_writeback),
            ("anon_thp", &mut m.anon_thp),
            ("inactive_anon", &mut m.inactive_anon),
            ("active_anon", &mut m.active_anon),
            ("inactive_file", &mut m.inactive_file),
            ("active_file", &mut m.active_file),
            ("unevictable", &mut m.unevictable),
            ("slab_reclaimable", &mut m.slab_reclaimable),
            ("slab_unreclaimable", &mut m.slab_unreclaimable),
            ("pgfault", &mut m.pgfault),
            ("pgmajfault", &mut m.pgmajfault),
            ("workingset_refault", &mut m.workingset_refault),
            ("workingset_activate", &mut m.workingset_activate),
            ("workingset_nodereclaim", &mut m.workingset_nodereclaim),
            ("pgrefill", &mut m.pgrefill),
            ("pgscan", &mut m.pgscan),
            ("pgsteal", &mut m.pgsteal),
            ("pgactivate", &mut m.pgactivate),
            ("pgdeactivate", &mut m.pgdeactivate),
            ("pglazyfree", &mut m.pglazyfree),
            ("pglazyfreed", &mut m.pglazyfreed),
            ("thp_fault_alloc", &mut m.thp_fault_alloc),
            ("thp_collapse_alloc", &mut m.thp_collapse_alloc),
        ],
        &table(dir.join("memory.stat")),
    );
    let one = |name: &str| number(dir.join(name), u64::MAX);
    m.usage = one("memory.current");
    m.usage_limit = one("memory.max");
    m.max_usage = one("memory.peak");
    m.swap_usage = one("memory.swap.current");
    m.swap_limit = one("memory.swap.max");
    m.swap_max_usage = one("memory.swap.peak");
    m.psi = pressure(dir, "memory.pressure");
    m
}

fn memory_events(dir: &Path) -> Option<MemoryEvents> {
    let events = table(dir.join("memory.events"));
    let mut e = MemoryEvents::default();
    fill(
        &mut [
            ("low", &mut e.low),
            ("high", &mut e.high),
            ("max", &mut e.max),
            ("oom", &mut e.oom),
            ("oom_kill", &mut e.oom_kill),
            ("oom_group_kill", &mut e.oom_group_kill),
        ],
        &events,
    );
    (!events.is_empty()).then_some(e)
}

/// Lines `major:minor rbytes=N wbytes=N rios=N wios=N ...`.
fn io_entries(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut entry =
            IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
        let mut any = false;
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            any = true;
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        any.then_some(entry)
    };
    text.lines().filter_map(entry).collect()
}

/// A pressure file; absent when the kernel has no PSI or it is switched off (reading says "not supported").
fn pressure(dir: &Path, name: &str) -> MessageField<PSIStats> {
    fs::read_to_string(dir.join(name)).ok().map(|text| parse_pressure(&text)).into()
}

/// Lines `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and `full ...`.
fn parse_pressure(text: &str) -> PSIStats {
    let mut stats = PSIStats::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let field = match words.next() {
            Some("some") => &mut stats.some,
            Some("full") => &mut stats.full,
            _ => continue,
        };
        let mut data = PSIData::default();
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        *field = MessageField::some(data);
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_v2() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("cpu.stat", "usage_usec 1\nuser_usec 2\nnr_throttled 3\nburst_usec 4\n");
        write("cpu.pressure", "some avg10=1.50 avg60=0.00 avg300=0.00 total=5\nfull avg10=0.00 total=6\n");
        write("memory.stat", "anon 7\nthp_collapse_alloc 8\n");
        write("memory.current", "9\n");
        write("memory.max", "max\n");
        write("memory.swap.max", "10\n");
        write("memory.events", "low 0\noom 11\noom_kill 12\n");
        write("pids.current", "13\n");
        write("pids.max", "max\n");
        write("io.stat", "8:16 rbytes=14 wbytes=15 rios=16 wios=17 dbytes=0\n8:0 \n");
        let m = metrics(dir.path());
        assert_eq!((m.cpu.usage_usec, m.cpu.user_usec, m.cpu.nr_throttled, m.cpu.burst_usec), (1, 2, 3, 4));
        assert_eq!((m.cpu.psi.some.avg10, m.cpu.psi.some.total, m.cpu.psi.full.total), (1.5, 5, 6));
        assert!(m.memory.psi.is_none());
        assert_eq!((m.memory.anon, m.memory.thp_collapse_alloc, m.memory.usage), (7, 8, 9));
        assert_eq!((m.memory.usage_limit, m.memory.swap_limit), (u64::MAX, 10));
        assert_eq!((m.memory_events.oom, m.memory_events.oom_kill), (11, 12));
        assert_eq!((m.pids.current, m.pids.limit), (13, u64::MAX));
        assert_eq!(m.io.usage.len(), 1);
        let io = &m.io.usage[0];
        assert_eq!((io.major, io.minor, io.rbytes, io.wbytes, io.rios, io.wios), (8, 16, 14, 15, 16, 17));
        let empty = metrics(Path::new("/nonexistent"));
        assert!(empty.memory_events.is_none() && empty.memory.usage_limit == 0);
    }
}
