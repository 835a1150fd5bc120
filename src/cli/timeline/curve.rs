//! Bytes over time: what each round sent, what was written meanwhile; in the post-copy what is still on the source, and the faults
//! that had to wait for it.

use super::scale::{Bytes, Time};
use super::style::{LEFT, RIGHT, width};
use super::xml::{Xml, number};
use super::{label, line};
use crate::cli::units;
use crate::migrate::report::{PostCopy, Report};

/// Height of the curves.
const HIGH: f64 = 120.0;
/// Above them.
const GAP: f64 = 30.0;
/// More rounds than this are drawn without a dot each.
const DOTS: usize = 40;

fn samples(report: &Report) -> Option<&PostCopy> {
    report.post_copy.as_ref().filter(|p| p.samples.len() > 1)
}

/// Height, 0 if there is nothing to show.
pub fn height(report: &Report) -> f64 {
    if report.rounds.is_empty() && samples(report).is_none() { 0.0 } else { GAP + HIGH }
}

/// Draws it.
pub fn draw(xml: &mut Xml, report: &Report, time: &Time, top: f64) {
    if height(report) == 0.0 {
        return;
    }
    let top = top + GAP;
    let of_rounds = report.rounds.iter().flat_map(|r| [r.bytes, r.dirty_after_bytes]);
    let of_samples = samples(report).into_iter().flat_map(|p| p.samples.iter().map(|s| s.left_bytes));
    let scale = Bytes::new(top, top + HIGH, of_rounds.chain(of_samples));
    for tick in scale.ticks() {
        let y = scale.y(tick);
        line(xml, "grid", LEFT, y, RIGHT, y);
        label(xml, "dim", LEFT - 6.0, y + 4.0, "end", &units::bytes(tick).replace(".0 ", " "));
    }
    key(xml, report, top);
    rounds(xml, report, time, &scale);
    if let Some(post) = samples(report) {
        post_copy(xml, report, post, time, &scale);
    }
}

/// What is what, in one line above.
fn key(xml: &mut Xml, report: &Report, top: f64) {
    let mut entries = Vec::new();
    if !report.rounds.is_empty() {
        entries.extend([("sourcetext", "▮ copied in a round"), ("dirtytext", "● written again meanwhile")]);
    }
    if samples(report).is_some() {
        entries
            .extend([("sourcetext", "╌ still on the source"), ("faultstext", "— faults that waited for it")]);
    }
    let mut x = LEFT + 4.0;
    for (class, what) in entries {
        label(xml, class, x, top - 8.0, "start", what);
        x += width(what) + 22.0;
    }
}

fn rounds(xml: &mut Xml, report: &Report, time: &Time, scale: &Bytes) {
    let mut path = String::new();
    for round in &report.rounds {
        let (x, wide) = time.bar(round.start_ms, round.ms);
        let y = scale.y(round.bytes);
        xml.empty(
            "rect",
            &[
                ("class", "sent".into()),
                ("x", x.into()),
                ("y", y.into()),
                ("width", wide.into()),
                ("height", (scale.bottom - y).into()),
            ],
        );
        let (x, y) = (time.x(round.start_ms + round.ms), scale.y(round.dirty_after_bytes));
        path.push_str(&format!("{},{} ", number(x), number(y)));
        if report.rounds.len() <= DOTS {
            xml.empty(
                "circle",
                &[("class", "dot".into()), ("cx", x.into()), ("cy", y.into()), ("r", 3.0.into())],
            );
        }
    }
    xml.empty("polyline", &[("class", "dirty".into()), ("points", path.trim_end().into())]);
    xml.newline();
    if let Some(last) = report.rounds.last() {
        let text = units::bytes(last.dirty_after_bytes);
        let (x, y) = (time.x(last.start_ms + last.ms), scale.y(last.dirty_after_bytes));
        // the line comes from above, as a rule
        let y = if y + 18.0 < scale.bottom { y + 15.0 } else { y - 8.0 };
        let (x, anchor) = if x - width(&text) > LEFT + 8.0 { (x - 7.0, "end") } else { (x + 7.0, "start") };
        label(xml, "dirtytext", x, y, anchor, &text);
    }
}

fn post_copy(xml: &mut Xml, report: &Report, post: &PostCopy, time: &Time, scale: &Bytes) {
    let from = report.frozen_at().unwrap_or(0.0) + report.freeze_ms;
    let most = post.samples.iter().map(|s| s.faults).max().unwrap_or(0);
    let (mut left, mut faults) = (String::new(), String::new());
    for sample in &post.samples {
        let x = number(time.x(from + sample.at_ms));
        left.push_str(&format!("{x},{} ", number(scale.y(sample.left_bytes))));
        let share = sample.faults as f64 / most.max(1) as f64;
        faults.push_str(&format!("{x},{} ", number(scale.bottom - share * (scale.bottom - scale.top))));
    }
    xml.empty("polyline", &[("class", "left".into()), ("points", left.trim_end().into())]);
    if most > 0 {
        xml.empty("polyline", &[("class", "faults".into()), ("points", faults.trim_end().into())]);
        let at = time.x(from + post.samples.last().map_or(0.0, |s| s.at_ms));
        label(xml, "faultstext", at.min(RIGHT - 2.0), scale.top - 5.0, "end", &format!("{most} faults"));
    }
    xml.newline();
}
