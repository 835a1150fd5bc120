use super::*;

fn blocks(all: &[(u64, Hash)]) -> Blocks<Hash> {
    let mut blocks = Blocks::new(4096, 1);
    all.iter().for_each(|(n, hash)| blocks.push(*n, *hash));
    blocks
}

#[test]
fn only_blocks_that_differ_are_sent_and_zeros_apart() {
    let was = blocks(&[(0, 5), (1, 6), (3, ZERO), (4, 9)]);
    let now = [5, 7, 8, ZERO, ZERO, ZERO, 3];
    let runs = changed(&now, |i| was.get(i as u64));
    assert_eq!(runs, [(1..3, false), (4..6, true), (6..7, false)]);
    assert_eq!(changed(&now, |i| Some(now[i])), []);
    assert_eq!(changed(&now[..3], |_| None), [(0..3, false)]);
}

#[test]
fn what_has_no_data_any_more_is_a_hole() {
    let of = |old: &[(u64, Hash)], new: &[(u64, Hash)], size| {
        let mut all = Vec::new();
        holes(&blocks(old), &blocks(new), size, &mut |offset, len| {
            all.push((offset, len));
            Ok(())
        })
        .unwrap();
        all
    };
    let old = [(0, 1), (1, 2), (2, 3), (5, 4), (6, ZERO), (9, 1)];
    assert_eq!(of(&old, &[(0, 1), (5, 4)], 6 * 4096 + 100), [(4096, 8192), (6 * 4096, 100)]);
    assert_eq!(of(&old, &old, 1 << 20), []);
    assert_eq!(of(&old, &[], 4096), [(0, 4096)]);
    assert_eq!(of(&[], &old, 1 << 20), []);
}
