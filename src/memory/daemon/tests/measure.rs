//! Figures, not assertions: `cargo test --release -p transship --lib memory::daemon::tests::measure -- --ignored --nocapture --test-threads 1`

use super::*;

/// Processor time of this thread: on a busy machine the only time that tells something.
fn cpu() -> Duration {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    now.into()
}

fn show(name: &str, bed: &Bed, what: &str, set: impl FnOnce(&mut DaemonConfig)) {
    let mut begun = Duration::ZERO;
    let (stats, status) = bed.local(what, 0, |c| {
        set(c);
        begun = cpu();
    });
    let took = cpu() - begun;
    assert!(status.success() && stats.complete);
    let per_cpu = (stats.filled_bytes + stats.fault_bytes) as f64 / (1 << 30) as f64 / took.as_secs_f64();
    let rate = stats.filled_bytes as f64 / (1 << 30) as f64 / (stats.fill_ms.max(1) as f64 / 1e3);
    println!(
        "{name}: fill {} MB in {} ms = {rate:.2} GiB/s, {per_cpu:.2} GiB per second of processor; {} faults from the store, served in {} us (median), {} (p99)",
        stats.filled_bytes >> 20,
        stats.fill_ms,
        stats.faults_local,
        stats.fault_median_us,
        stats.fault_p99_us
    );
}

#[test]
#[ignore = "figures"]
fn the_fill_by_size_of_batch() {
    for (name, pages) in [
        ("runs of 56 KiB", task::DENSE),
        ("one run of 1 GiB, and before it runs of 56 KiB", task::DENSE + (1 << 18)),
    ] {
        for batch in [64 << 10, 256 << 10, 1 << 20, 4 << 20] {
            let name = format!("{name}, batches of {} KiB", batch >> 10);
            show(&name, &Bed::new(pages), "sleep1", |c| {
                c.batch = batch;
                c.fill_delay = Duration::ZERO;
            });
        }
    }
}

#[test]
#[ignore = "figures"]
fn how_long_an_access_takes() {
    for batch in [64 << 10, 256 << 10, 1 << 20, 4 << 20] {
        let name = format!("batches of {} KiB", batch >> 10);
        show(&name, &Bed::new(task::DENSE + (1 << 18)), "latency", |c| {
            c.batch = batch;
            c.fill_delay = Duration::from_millis(350);
        });
    }
}

#[test]
#[ignore = "figures"]
fn what_a_gibibyte_costs() {
    let bed = Bed::new(task::DENSE + (1 << 18));
    let (mut store, _) = bed.store(|n| n >= task::DENSE);
    let dense = BASE + task::DENSE * P..BASE + bed.pages * P;
    for len in [64 << 10, 256 << 10, 1 << 20] {
        let mut buf = vec![0; len as usize];
        let begun = cpu();
        (dense.start..dense.end)
            .step_by(len as usize)
            .for_each(|at| store.read_at(SPACE, at, &mut buf).unwrap());
        println!("read in pieces of {} KiB: {:?}", len >> 10, cpu() - begun);
    }
    let begun = cpu();
    (dense.start..dense.end).step_by(256 << 10).for_each(|at| {
        store.free(SPACE, at..at + (256 << 10)).unwrap();
    });
    println!("freed: {:?}", cpu() - begun);
    let bytes = vec![1; 256 << 10];
    let begun = cpu();
    (dense.start..dense.end).step_by(256 << 10).for_each(|at| store.put(SPACE, at, &bytes).unwrap());
    println!("put: {:?}", cpu() - begun);
}

/// The fill reads into a buffer. Mapping the store's pages instead, window by window, costs about the same processor time at 256 KiB and
/// some 10 % less at 1 MiB.
#[test]
#[ignore = "figures"]
fn read_or_mapped() {
    use std::os::fd::AsRawFd;
    let bed = Bed::new(task::DENSE + (1 << 18));
    let dense = task::DENSE * P..bed.pages * P;
    for mapped in [false, true, false, true] {
        for len in [64 << 10, 256 << 10, 1 << 20, 4 << 20u64] {
            let (mut store, _) = bed.store(|n| n >= task::DENSE);
            let uffd = uffd::Uffd::new(task::registered(BASE, bed.pages)).unwrap();
            let mut buf = vec![0; len as usize];
            let begun = cpu();
            for at in dense.clone().step_by(len as usize).map(|a| BASE + a) {
                if mapped {
                    let file = store.file(SPACE).unwrap().as_raw_fd();
                    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
                    unsafe {
                        let p = libc::mmap(
                            std::ptr::null_mut(),
                            len as usize,
                            libc::PROT_READ,
                            flags,
                            file,
                            at as i64,
                        );
                        let bytes = std::slice::from_raw_parts(p.cast::<u8>(), len as usize);
                        assert_eq!(uffd.copy(at, bytes).unwrap(), uffd::Placed::Done(len));
                        libc::munmap(p, len as usize);
                    }
                } else {
                    store.read_at(SPACE, at, &mut buf).unwrap();
                    assert_eq!(uffd.copy(at, &buf).unwrap(), uffd::Placed::Done(len));
                }
                store.free(SPACE, at..at + len).unwrap();
            }
            println!(
                "1 GiB in pieces of {} KiB, {}: {:?}",
                len >> 10,
                if mapped { "mapped" } else { "read" },
                cpu() - begun
            );
        }
    }
}
