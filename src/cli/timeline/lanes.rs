//! What both nodes did when: the phases of each, below them the rounds and what followed.

use super::scale::Time;
use super::style::{BAR, LEFT, RIGHT, width};
use super::xml::Xml;
use super::{Bar, label, line};
use crate::cli::units;
use crate::migrate::report::{Phase, Report, Round, fused};

/// Between two rows.
const STEP: f64 = BAR + 4.0;
/// Between the two nodes.
const GAP: f64 = 14.0;
/// Above and below the rows of a lane.
const PAD: f64 = 5.0;

fn rows(report: &Report) -> (f64, f64) {
    let copying = !report.rounds.is_empty() || report.post_copy.is_some();
    (if copying { 2.0 } else { 1.0 }, if report.fill_ms > 0.0 { 2.0 } else { 1.0 })
}

/// Height of both lanes.
pub fn height(report: &Report) -> f64 {
    let (source, destination) = rows(report);
    (source + destination) * STEP + 4.0 * PAD + GAP
}

/// Left end and width of the freeze, if it is known when it was.
pub fn still(report: &Report, time: &Time) -> Option<(f64, f64)> {
    let from = report.frozen_at()?;
    (report.freeze_ms > 0.0).then(|| time.bar(from, report.freeze_ms))
}

/// The freeze, behind what was done in it.
pub fn band(xml: &mut Xml, x: f64, wide: f64, top: f64, bottom: f64) {
    xml.empty(
        "rect",
        &[
            ("class", "still".into()),
            ("x", x.into()),
            ("y", top.into()),
            ("width", wide.into()),
            ("height", (bottom - top).into()),
        ],
    );
}

/// Where the freeze begins and ends, and how long it is; over everything else.
pub fn edges(xml: &mut Xml, report: &Report, x: f64, wide: f64, top: f64, bottom: f64) {
    line(xml, "edge", x, top - 4.0, x, bottom);
    line(xml, "edge", x + wide, top - 4.0, x + wide, bottom);
    let text = format!("frozen {}", units::ms(report.freeze_ms));
    let half = width(&text) * 0.58; // it is bold
    let middle = (x + wide / 2.0).clamp(LEFT + half, RIGHT - half);
    label(xml, "stilltext", middle, top - 8.0, "middle", &text);
}

/// Where the rows of the two lanes begin.
fn starts(report: &Report, top: f64) -> (f64, f64) {
    (top + PAD, top + rows(report).0 * STEP + 3.0 * PAD + GAP - 4.0)
}

/// The lanes' grounds and names.
pub fn grounds(xml: &mut Xml, report: &Report, top: f64) {
    let (source, destination) = starts(report, top);
    let count = rows(report);
    for (name, y, rows) in [("source", source, count.0), ("destination", destination, count.1)] {
        xml.empty(
            "rect",
            &[
                ("class", "lane".into()),
                ("x", LEFT.into()),
                ("y", (y - PAD).into()),
                ("width", (RIGHT - LEFT).into()),
                ("height", (rows * STEP - 4.0 + 2.0 * PAD).into()),
                ("fill-opacity", 0.6.into()),
            ],
        );
        label(xml, "head", 20.0, y + 16.0, "start", name);
    }
}

/// Draws both lanes' bars.
pub fn draw(xml: &mut Xml, report: &Report, time: &Time, top: f64) {
    let (source, destination) = starts(report, top);
    let count = rows(report);
    phases(xml, "source", &report.phases, 0.0, time, source);
    if count.0 > 1.0 {
        for round in &report.rounds {
            round_bar(xml, round, time, source + STEP);
        }
        after(xml, report, time, source + STEP);
    }
    phases(xml, "destination", &report.destination_phases, report.destination_offset_ms, time, destination);
    if count.1 > 1.0 {
        let (x, width) = time.bar(report.frozen_at().unwrap_or(0.0) + report.freeze_ms, report.fill_ms);
        let more = format!(
            "fill in the background: {} in {}",
            units::bytes(report.fill_bytes),
            units::ms(report.fill_ms)
        );
        let y = destination + STEP;
        Bar { class: "destination odd", x, y, width, name: "fill", more: &more }.draw(xml);
    }
}

fn phases(xml: &mut Xml, class: &str, phases: &[Phase], offset: f64, time: &Time, y: f64) {
    let odd = format!("{class} odd");
    for (n, phase) in fused(phases).iter().enumerate() {
        let (x, width) = time.bar(offset + phase.start_ms, phase.ms);
        let more = format!(
            "{}: {} from {}",
            phase.name,
            units::ms(phase.ms),
            units::ms((offset + phase.start_ms).max(0.0))
        );
        let class = if n % 2 == 0 { class } else { &odd };
        Bar { class, x, y, width, name: &phase.name, more: &more }.draw(xml);
    }
}

fn round_bar(xml: &mut Xml, round: &Round, time: &Time, y: f64) {
    let (x, width) = time.bar(round.start_ms, round.ms);
    let class = if round.n % 2 == 1 { "copy" } else { "copy odd" };
    let name = if width > 60.0 { format!("round {}", round.n) } else { round.n.to_string() };
    Bar { class, x, y, width, name: &name, more: &tell(round) }.draw(xml);
}

/// Everything about a round.
fn tell(round: &Round) -> String {
    format!(
        "round {}: {} in {} ({} over the link, {} zero pages), {} written meanwhile ({}/s), layer {} in {} entries, tmpfs {}",
        round.n,
        units::bytes(round.bytes),
        units::ms(round.ms),
        units::bytes(round.wire_bytes),
        round.zero_pages,
        units::bytes(round.dirty_after_bytes),
        units::bytes(round.dirty_rate),
        units::bytes(round.layer_bytes),
        round.layer_entries,
        units::bytes(round.tmpfs_bytes)
    )
}

fn after(xml: &mut Xml, report: &Report, time: &Time, y: f64) {
    let Some(post) = &report.post_copy else { return };
    let (x, width) = time.bar(report.frozen_at().unwrap_or(0.0) + report.freeze_ms, post.ms);
    let mut more =
        format!("post-copy: {} ({} pages) in {}", units::bytes(post.bytes), post.pages, units::ms(post.ms));
    if post.lost > 0 {
        more.push_str(&format!("; {} lost", units::bytes(post.lost)));
        label(xml, "lost", (x + width + 6.0).min(RIGHT - 90.0), y + 15.0, "start", "memory lost");
    }
    Bar { class: "copy odd", x, y, width, name: "post-copy", more: &more }.draw(xml);
}
