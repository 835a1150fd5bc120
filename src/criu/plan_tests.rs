use super::super::images::tests::{decode, entry};
use super::super::mm_image::tests::{vma, write};
use super::*;

const ANON: u32 = 0x22;
const FILE: u32 = 0x2;
const TASK: Space = Space { kind: ImageKind::Pid, id: 1 };
const SHARED: Space = Space { kind: ImageKind::Shmem, id: 5 };

fn size() -> u64 {
    page_size() as u64
}

fn pages(from: u64, to: u64) -> Range<u64> {
    from * size()..to * size()
}

fn set(ranges: &[(u64, u64)]) -> RangeSet {
    ranges.iter().map(|(a, b)| pages(*a, *b)).collect()
}

/// Pages 0..20 are anonymous, 20..30 a private file, 30..40 the stack.
fn planner(dir: &Path, eager_max: u64, hot_max: u64) -> Planner {
    let at = |from, to, flags, status| vma(from * size(), to * size(), flags, status);
    write(dir, 1, &[at(0, 20, ANON, 1 << 9), at(20, 30, FILE, 1 << 6), at(30, 40, ANON | 0x100, 2)]);
    Planner::new(dir, EagerPolicy { eager_max: eager_max * size(), hot_max: hot_max * size() })
}

fn holes(planner: &mut Planner, space: Space, ranges: &[(u64, u64)]) {
    planner.event(PageEvent::Open { kind: space.kind, id: space.id }).unwrap();
    for (from, to) in ranges {
        planner.event(PageEvent::Hole { vaddr: from * size(), pages: to - from, flags: 1 }).unwrap();
    }
    planner.event(PageEvent::Close).unwrap();
}

/// Every page is full of its number.
fn store(space: Space, data: &[(u64, u64)], zero: &[(u64, u64)]) -> Store {
    let mut store = Store::new(1 << 30).unwrap();
    for page in data.iter().flat_map(|(a, b)| *a..*b) {
        store.put(space, page * size(), &content(page)).unwrap();
    }
    for (from, to) in zero {
        store.zero(space, from * size(), (to - from) * size()).unwrap();
    }
    store
}

fn content(page: u64) -> Vec<u8> {
    vec![page as u8; size() as usize]
}

/// The image's entries in pages, and the first byte of each page in it.
fn written(dir: &Path, name: &str) -> (Vec<(u64, u64, u32)>, Vec<u8>) {
    let (id, entries) = decode(&dir.join(name));
    let bytes = std::fs::read(dir.join(format!("pages-{id}.img"))).unwrap();
    let runs = entries
        .iter()
        .map(|e| {
            assert_eq!(*e, entry(e.vaddr, e.compat_nr_pages, e.flags.unwrap()));
            (e.vaddr / size(), u64::from(e.compat_nr_pages), e.flags.unwrap())
        })
        .collect();
    (runs, bytes.chunks(size() as usize).map(|p| *p.iter().max().unwrap()).collect())
}

#[test]
fn small_memory_is_all_in_the_images() {
    let dir = tempfile::tempdir().unwrap();
    let mut planner = planner(dir.path(), 100, 0);
    holes(&mut planner, TASK, &[(1, 5), (21, 23), (38, 40)]);
    // zero pages: left out of anonymous memory, written into a file's mapping
    let store = store(TASK, &[(1, 3), (21, 22), (38, 40), (50, 60)], &[(3, 5), (22, 23)]);
    let plan = planner.finish(&store, &[], &[]).unwrap();
    assert!(plan.is_eager());
    assert_eq!((plan.eager_bytes, plan.lazy_bytes), (6 * size(), 0));
    let (runs, bytes) = written(dir.path(), "pagemap-1.img");
    assert_eq!(runs, [(1, 2, 4), (21, 2, 4), (38, 2, 4)]);
    assert_eq!(bytes, [1, 2, 21, 0, 38, 39]);
}

#[test]
fn large_memory_is_lazy_but_for_what_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let mut planner = planner(dir.path(), 3, 3);
    holes(&mut planner, TASK, &[(0, 10), (21, 23), (38, 40)]);
    let store = store(TASK, &[(0, 10), (21, 23), (38, 40)], &[]);
    let hot = [(TASK, set(&[(4, 9), (22, 30)])), (SHARED, set(&[(0, 9)]))];
    let plan = planner.finish(&store, &[], &hot).unwrap();
    // two pages of stack, then one of the hot ones
    assert_eq!(plan.lazy, [(TASK, set(&[(0, 4), (5, 10)]))]);
    assert_eq!((plan.eager_bytes, plan.lazy_bytes), (5 * size(), 9 * size()));
    let (runs, bytes) = written(dir.path(), "pagemap-1.img");
    assert_eq!(runs, [(0, 4, 2), (4, 1, 4), (5, 5, 2), (21, 2, 4), (38, 2, 4)]);
    assert_eq!(bytes, [4, 21, 22, 38, 39]);
}

#[test]
fn what_is_on_the_source_counts_and_not_the_older_copy() {
    let dir = tempfile::tempdir().unwrap();
    let mut planner = planner(dir.path(), 1000, 1000);
    holes(&mut planner, TASK, &[(0, 10)]);
    let store = store(TASK, &[(0, 8)], &[]);
    let remote = [(TASK, set(&[(4, 12)]))];
    let plan = planner.finish(&store, &remote, &[]).unwrap();
    assert_eq!(plan.remote, [(TASK, set(&[(4, 10)]))], "only what the container still has");
    assert_eq!(plan.lazy, [(TASK, set(&[(0, 4)]))], "not all eager while the source is needed");
    assert_eq!(written(dir.path(), "pagemap-1.img"), (vec![(0, 10, 2)], vec![]));
}

#[test]
fn a_page_that_nobody_has_is_an_error() {
    for (data, remote, said) in [
        ((0, 9), (0, 0), "0x9000..0xa000 never came"),
        ((0, 9), (9, 10), ""),
        ((0, 10), (21, 22), "cannot be lazy"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut planner = planner(dir.path(), 0, 0);
        holes(&mut planner, TASK, if said == "cannot be lazy" { &[(0, 10), (21, 22)] } else { &[(0, 10)] });
        let result = planner.finish(&store(TASK, &[data], &[]), &[(TASK, set(&[remote]))], &[]);
        match said {
            "" => drop(result.unwrap()),
            said => assert!(format!("{:#}", result.unwrap_err()).contains(said)),
        }
    }
}

#[test]
fn pages_with_bytes_keep_their_place_between_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut planner = planner(dir.path(), 0, 0);
    let (a, b, c) = (content(2), content(12), content(22));
    for event in [
        PageEvent::Open { kind: ImageKind::Pid, id: 1 },
        PageEvent::Pages { vaddr: 2 * size(), flags: PE_PRESENT | PE_LAZY, bytes: &a },
        PageEvent::Hole { vaddr: 3 * size(), pages: 2, flags: 1 },
        PageEvent::Pages { vaddr: 12 * size(), flags: PE_PRESENT, bytes: &b },
        PageEvent::Hole { vaddr: 21 * size(), pages: 1, flags: 1 },
        PageEvent::Pages { vaddr: 22 * size(), flags: PE_PRESENT, bytes: &c },
        PageEvent::Close,
        // a second image while the first waits
        PageEvent::Open { kind: ImageKind::Shmem, id: 5 },
        PageEvent::Pages { vaddr: 0, flags: PE_PRESENT, bytes: &a },
        PageEvent::Close,
    ] {
        planner.event(event).unwrap();
    }
    let plan = planner.finish(&store(TASK, &[(3, 5), (21, 22)], &[]), &[], &[]).unwrap();
    assert_eq!(plan.lazy, [(TASK, set(&[(3, 5)]))]);
    let (runs, bytes) = written(dir.path(), "pagemap-1.img");
    assert_eq!(runs, [(2, 1, 4), (3, 2, 2), (12, 1, 4), (21, 2, 4)]);
    assert_eq!(bytes, [2, 12, 21, 22]);
    assert_eq!(written(dir.path(), "pagemap-shmem-5.img"), (vec![(0, 1, 4)], vec![2]));
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 5, "{left:?}");
}

#[test]
fn shared_memory_is_never_lazy() {
    let dir = tempfile::tempdir().unwrap();
    let mut planner = planner(dir.path(), 0, 0);
    holes(&mut planner, SHARED, &[(0, 4)]);
    let plan = planner.finish(&store(SHARED, &[(1, 2)], &[(0, 1), (2, 4)]), &[], &[]).unwrap();
    assert!(plan.is_eager());
    assert_eq!(written(dir.path(), "pagemap-shmem-5.img"), (vec![(1, 1, 4)], vec![1]));
}

#[test]
fn events_out_of_order_are_refused() {
    let page = content(1);
    let open = PageEvent::Open { kind: ImageKind::Pid, id: 1 };
    let hole = |at, n| PageEvent::Hole { vaddr: at * size(), pages: n, flags: 1 };
    let bytes = |vaddr| PageEvent::Pages { vaddr, flags: PE_PRESENT, bytes: &page };
    for bad in [
        vec![hole(0, 1)],
        vec![PageEvent::Close],
        vec![open, open],
        vec![open, PageEvent::Close, open],
        vec![open, hole(4, 1), hole(4, 1)],
        vec![open, hole(4, 2), bytes(5 * size())],
        vec![open, hole(0, u64::MAX)],
        vec![open, bytes(1)],
        vec![open, bytes(0), bytes(size()), bytes(2 * size())],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut planner = planner(dir.path(), 0, 0).cap(2 * size());
        assert!(bad.iter().any(|e| planner.event(*e).is_err()), "{bad:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut planner = planner(dir.path(), 0, 0);
    planner.event(open).unwrap();
    assert!(planner.finish(&Store::new(0).unwrap(), &[], &[]).is_err(), "in the middle of an image");
}

#[test]
fn pieces_of_a_mapping_that_come_later_are_one_entry() {
    let dir = tempfile::tempdir().unwrap();
    let mut planner = planner(dir.path(), 0, 1);
    // pages 4 and 9 do not exist, 11 is zero, 13 is hot, 16 is on the source; after 17 nothing is lazy
    holes(&mut planner, TASK, &[(2, 4), (5, 9), (10, 12), (13, 15), (16, 17), (21, 22), (24, 25)]);
    let store = store(TASK, &[(2, 4), (5, 9), (10, 11), (13, 15), (21, 22), (24, 25)], &[(11, 12)]);
    let remote = [(TASK, set(&[(16, 17)]))];
    let plan = planner.finish(&store, &remote, &[(TASK, set(&[(13, 14)]))]).unwrap();
    assert_eq!(plan.lazy, [(TASK, set(&[(2, 4), (5, 9), (10, 11), (14, 15)]))], "what is served stays exact");
    let (runs, bytes) = written(dir.path(), "pagemap-1.img");
    assert_eq!(runs, [(2, 11, 2), (13, 1, 4), (14, 3, 2), (21, 1, 4), (24, 1, 4)]);
    assert_eq!(bytes, [13, 21, 24]);
}

#[test]
fn a_set_of_pages_is_as_good_as_its_runs() {
    let plan = |say: &dyn Fn(&mut Planner)| {
        let dir = tempfile::tempdir().unwrap();
        let mut planner = planner(dir.path(), 0, 2);
        say(&mut planner);
        planner.finish(&store(TASK, &[(1, 5), (21, 23)], &[]), &[], &[]).unwrap()
    };
    let open = PageEvent::Open { kind: TASK.kind, id: TASK.id };
    let runs = plan(&|planner| holes(planner, TASK, &[(1, 5), (21, 23)]));
    let sets = plan(&|planner| {
        planner.event(open).unwrap();
        planner.exist(&RangeSet::new()).unwrap();
        planner.exist(&set(&[(1, 5)])).unwrap();
        assert!(planner.exist(&set(&[(4, 5), (21, 22)])).is_err(), "ascending");
        planner.exist(&set(&[(21, 23)])).unwrap();
        planner.event(PageEvent::Close).unwrap();
        assert!(planner.exist(&set(&[(30, 31)])).is_err(), "outside of an image");
    });
    assert_eq!(runs, sets);
    assert!(runs.lazy_bytes > 0);
}
