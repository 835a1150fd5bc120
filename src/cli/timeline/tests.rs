//! What must hold of every picture, whatever the report: well-formed, nothing outside the canvas, widths that tell the truth.

use roxmltree::{Document, Node};

use super::style::{LEFT, RIGHT, WIDTH};
use super::{Subject, html, svg};
use crate::migrate::report::{Faults, Item, Phase, PostCopy, Report, Round, Sample, Side, items};

fn phase(name: &str, start_ms: f64, ms: f64) -> Phase {
    Phase { name: name.into(), start_ms, ms }
}

/// A live migration of so many rounds, with a post-copy of so many samples.
fn live(rounds: u32, samples: u64) -> Report {
    let mut report = Report { destination_offset_ms: 10.0, processes: 3, ..Report::default() };
    let mut at = 120.0;
    let mut bytes = 1_073_741_824u64;
    for n in 1..=rounds {
        let ms = 100.0 + bytes as f64 / 1e6;
        let dirty_after_bytes = (bytes / 3).max(8_000_000 + u64::from(n % 7) * 700_000);
        report.rounds.push(Round {
            n,
            start_ms: at,
            ms,
            pages: bytes / 4096,
            bytes,
            wire_bytes: bytes / 2,
            dirty_after_bytes,
            dirty_rate: 80_000_000,
            ..Round::default()
        });
        report.destination_phases.push(phase(&format!("round {n}"), at - 8.0, ms));
        at += ms + 2.0;
        bytes = dirty_after_bytes;
    }
    report.phases =
        vec![phase("prepare", 0.0, 120.0), phase("pre-copy", 120.0, at - 120.0), phase("freeze", at, 4.0)];
    report.phases.extend([phase("dump", at + 4.0, 28.0), phase("commit", at + 32.0, 36.0)]);
    report.destination_phases.insert(0, phase("prepare", 0.0, 95.0));
    report.destination_phases.push(phase("restore", at + 20.0, 38.0));
    report.freeze_start_ms = Some(at);
    report.freeze_ms = 68.0;
    let item = |name: &str, start_ms, ms, side| Item { name: name.into(), start_ms, ms, side };
    report.freeze = vec![
        item(items::FREEZE, 0.0, 1.6, Side::Source),
        item(items::FENCE, 1.6, 0.9, Side::Source),
        item(items::QUIESCE, 2.5, 1.2, Side::Source),
        item(items::FINAL_SCAN, 3.7, 2.2, Side::Source),
        item(items::CRIU_DUMP, 5.9, 21.0, Side::Source),
        item(items::FINAL_PAGES, 6.4, 11.5, Side::Source),
        item(items::LAYER, 20.0, 2.0, Side::Source),
        item(items::FILES, 26.9, 3.0, Side::Source),
        item(items::GATE, 31.0, 0.6, Side::Destination),
        item(items::CRIU_RESTORE, 31.6, 29.0, Side::Destination),
        item(items::NETWORK, 60.6, 2.4, Side::Destination),
        item(items::RESUME, 63.0, 5.0, Side::Destination),
    ];
    report.total_ms = at + 200.0;
    report.bytes_sent = 700_000_000;
    if samples > 0 {
        let mut post = PostCopy { ms: 900.0, pages: 9000, bytes: 36_864_000, ..PostCopy::default() };
        for n in 0..=samples {
            let share = n as f64 / samples as f64;
            let left_bytes = (36_864_000.0 * (1.0 - share)) as u64;
            post.sample(Sample { at_ms: 900.0 * share, left_bytes, faults: (share.sqrt() * 420.0) as u64 });
        }
        report.post_copy = Some(post);
        report.faults = Faults { local: 812, remote: 420, zero: 77, ..Faults::default() };
        report.mode = Some("post-copy".into());
    } else {
        report.mode = Some("pre-copy".into());
    }
    report.fill_ms = 400.0;
    report.fill_bytes = 900_000_000;
    report.store_peak_bytes = 1_100_000_000;
    (report.tracker, report.compression) = (Some("uffd-wp".into()), Some("auto".into()));
    report
}

fn subject(report: &Report) -> Subject<'_> {
    Subject { container: "redis", from: "node-a", to: "node-b", report }
}

fn number(node: &Node<'_, '_>, name: &str) -> f64 {
    node.attribute(name).unwrap_or("0").parse().unwrap_or_else(|_| panic!("{name} of {node:?}"))
}

/// Parses it and checks that everything lies on the canvas.
fn check(report: &Report) -> String {
    let text = svg(&subject(report));
    let document = Document::parse(&text).unwrap();
    let root = document.root_element();
    let (width, height) = (number(&root, "width"), number(&root, "height"));
    assert_eq!(width, WIDTH);
    let on = |x: f64, y: f64, what: &Node<'_, '_>| {
        assert!((0.0..=width).contains(&x) && (0.0..=height).contains(&y), "{x},{y} of {what:?}");
    };
    for node in document.descendants() {
        match node.tag_name().name() {
            "rect" => {
                let (x, y) = (number(&node, "x"), number(&node, "y"));
                on(x, y, &node);
                on(x + number(&node, "width"), y + number(&node, "height"), &node);
                assert!(number(&node, "width") > 0.0, "{node:?}");
            }
            "line" => {
                on(number(&node, "x1"), number(&node, "y1"), &node);
                on(number(&node, "x2"), number(&node, "y2"), &node);
            }
            "circle" => on(number(&node, "cx"), number(&node, "cy"), &node),
            "text" => on(number(&node, "x"), number(&node, "y"), &node),
            "polyline" | "polygon" => {
                for point in node.attribute("points").unwrap().split(' ') {
                    let (x, y) = point.split_once(',').unwrap();
                    on(x.parse().unwrap(), y.parse().unwrap(), &node);
                }
            }
            _ => {}
        }
    }
    text
}

/// Bars of that class with what they tell.
fn bars<'a>(document: &'a Document<'a>, class: &str) -> Vec<(f64, f64, String)> {
    let rects = document.descendants().filter(|n| n.has_tag_name("rect"));
    let of = rects.filter(|n| n.attribute("class").is_some_and(|c| c.split(' ').next() == Some(class)));
    of.filter_map(|n| {
        let more = n.children().find(|c| c.has_tag_name("title"))?.text()?.to_string();
        Some((number(&n, "x"), number(&n, "width"), more))
    })
    .collect()
}

#[test]
fn everything_lies_on_the_canvas_whatever_the_report() {
    let mut odd = live(2, 0);
    odd.freeze_start_ms = Some(-5.0);
    odd.phases.push(phase("endless", 1e12, f64::MAX));
    odd.phases.push(phase("backwards", 50.0, -3.0));
    odd.freeze.push(Item { name: "late".into(), start_ms: 1e9, ms: f64::NAN, side: Side::Source });
    odd.rounds[0].bytes = u64::MAX;
    let many = Report { freeze: vec![live(1, 0).freeze[0].clone(); 500], ..live(1, 0) };
    for report in [Report::default(), live(1, 0), live(3, 50), live(100, 0), live(400, 256), odd, many] {
        check(&report);
    }
    let old = Report { phases: live(0, 0).phases, freeze_ms: 60.0, ..Report::default() };
    assert!(check(&old).contains("dump (source)"), "without items the phases in the freeze are shown");
}

#[test]
fn widths_are_proportional_to_time() {
    let report = live(3, 0);
    let text = check(&report);
    let document = Document::parse(&text).unwrap();
    let rounds = bars(&document, "copy");
    assert_eq!(rounds.len(), 3);
    for (bar, round) in rounds.iter().zip(&report.rounds) {
        let ratio = bar.1 / rounds[0].1;
        assert!((ratio - round.ms / report.rounds[0].ms).abs() < 0.01, "{bar:?}");
        assert!(bar.2.starts_with(&format!("round {}: ", round.n)), "{bar:?}");
    }
    // in the freeze the whole width is its length
    let dump = bars(&document, "source").into_iter().find(|b| b.2.starts_with("CRIU dump (source)")).unwrap();
    let restore =
        bars(&document, "destination").into_iter().find(|b| b.2.starts_with("CRIU restore")).unwrap();
    let wide = RIGHT - LEFT;
    assert!(
        (dump.1 - 21.0 / 68.0 * wide).abs() < 0.1 && (dump.0 - LEFT - 5.9 / 68.0 * wide).abs() < 0.1,
        "{dump:?}"
    );
    assert!((restore.1 - 29.0 / 68.0 * wide).abs() < 0.1, "{restore:?}");
}

#[test]
fn a_hundred_rounds_neither_overlap_nor_drown_the_picture() {
    let text = check(&live(100, 0));
    let document = Document::parse(&text).unwrap();
    let rounds = bars(&document, "copy");
    assert_eq!(rounds.len(), 100);
    assert!(rounds.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0 + 1.0), "rounds overlap");
    // the destination's hundred phases are one bar
    assert_eq!(bars(&document, "destination").iter().filter(|b| b.2.starts_with("round")).count(), 1);
    assert_eq!(document.descendants().filter(|n| n.has_tag_name("circle")).count(), 0);
    assert!(text.len() < 120_000, "{}", text.len());
}

#[test]
fn post_copy_shows_what_is_left_and_the_faults() {
    let report = live(2, 40);
    let text = check(&report);
    let document = Document::parse(&text).unwrap();
    let points = |class: &str| {
        let line = document.descendants().find(|n| n.attribute("class") == Some(class)).unwrap();
        line.attribute("points").unwrap().split(' ').count()
    };
    assert_eq!((points("left"), points("faults")), (41, 41));
    assert!(document.descendants().any(|n| n.text() == Some("420 faults")));
    assert!(!text.contains("memory lost"));
    let mut lost = report.clone();
    lost.post_copy.as_mut().unwrap().lost = 5_000_000;
    assert!(check(&lost).contains("memory lost"));
}

#[test]
fn nothing_is_executed_or_fetched_and_texts_are_escaped() {
    let mut report = live(2, 0);
    let nasty = "</text><script src=\"https://x\">\"'&";
    report.freeze[0].name = nasty.into();
    report.phases[0].name = nasty.into();
    report.warnings.push(nasty.into());
    let subject = Subject { container: nasty, from: "a&b", to: "<c>", report: &report };
    for text in [svg(&subject), html(&subject)] {
        let body = text.trim_start_matches("<!DOCTYPE html>");
        let document = Document::parse(body).unwrap();
        for node in document.descendants().filter(Node::is_element) {
            let name = node.tag_name().name();
            assert!(
                !matches!(name, "script" | "image" | "use" | "link" | "foreignObject" | "a" | "iframe"),
                "{name}"
            );
            for attribute in node.attributes() {
                assert!(
                    !attribute.name().starts_with("on") && !attribute.name().contains("href"),
                    "{attribute:?}"
                );
            }
        }
        assert!(!text.contains("url(") && !text.contains("@import"));
        assert!(document.descendants().any(|n| n.text().is_some_and(|t| t.contains(nasty))));
    }
}

#[test]
fn light_and_dark_are_chosen_by_the_viewer() {
    let text = svg(&subject(&live(1, 0)));
    assert!(text.contains("@media (prefers-color-scheme:dark)"));
    // every class that is used has a colour of its own in both
    let document = Document::parse(&text).unwrap();
    let (light, dark) = super::style::CSS.split_once("@media").unwrap();
    for class in document.descendants().filter_map(|n| n.attribute("class")).flat_map(|c| c.split(' ')) {
        if matches!(class, "" | "title" | "head" | "odd") {
            continue;
        }
        assert!(light.contains(&format!(".{class}")) && dark.contains(&format!(".{class}")), "{class}");
    }
}

/// Writes pictures to look at: `TRANSSHIP_PICTURES=/tmp/x cargo test -p transship --lib pictures_to_look_at`.
#[test]
fn pictures_to_look_at() {
    let Some(dir) = std::env::var_os("TRANSSHIP_PICTURES").map(std::path::PathBuf::from) else { return };
    std::fs::create_dir_all(&dir).unwrap();
    let old = Report { phases: live(0, 0).phases, freeze_ms: 60.0, total_ms: 190.0, ..Report::default() };
    for (name, report) in [("few", live(3, 0)), ("many", live(100, 0)), ("post", live(4, 120)), ("old", old)]
    {
        std::fs::write(dir.join(format!("{name}.svg")), svg(&subject(&report))).unwrap();
        std::fs::write(dir.join(format!("{name}.html")), html(&subject(&report))).unwrap();
    }
}
