//! A migration as a picture: an SVG, or a page that holds it beside its tables. Pure: a report in, a text out. No scripts, nothing
//! from elsewhere, every text escaped, readable on light and dark screens.
//!
//! | file | what lives there |
//! |---|---|
//! | `mod.rs` | the picture's order from top to bottom |
//! | [`lanes`] | what both nodes did when |
//! | [`curve`] | bytes of each round, what was written meanwhile, what followed in the post-copy |
//! | [`freeze`] | the freeze, enlarged |
//! | [`page`] | the page around it |
//! | [`scale`] | milliseconds and bytes to places |
//! | [`xml`], [`style`] | the writer; colours and sizes |

pub mod curve;
pub mod freeze;
pub mod lanes;
pub mod page;
pub mod scale;
pub mod style;
pub mod xml;

use crate::cli::units;
use crate::migrate::report::Report;
use scale::Time;
use style::{LEFT, RIGHT, WIDTH};
use xml::Xml;

/// What is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The container's id.
    pub container: &'a str,
    /// The node that it left.
    pub from: &'a str,
    /// The node that it runs on.
    pub to: &'a str,
    /// The source shim's report.
    pub report: &'a Report,
}

/// The picture, as a document of its own.
pub fn svg(subject: &Subject<'_>) -> String {
    let mut body = Xml::default();
    let height = draw(&mut body, subject);
    let body = body.finish();
    let mut xml = Xml::default();
    let view = format!("0 0 {} {}", xml::number(WIDTH), xml::number(height));
    xml.begin(
        "svg",
        &[
            ("xmlns", "http://www.w3.org/2000/svg".into()),
            ("viewBox", view.as_str().into()),
            ("width", WIDTH.into()),
            ("height", height.into()),
            ("role", "img".into()),
        ],
    );
    xml.leaf("title", &[], &title(subject));
    xml.newline();
    xml.begin("style", &[]);
    xml.raw(style::CSS);
    xml.end();
    let paper = [("class", "paper".into()), ("width", WIDTH.into()), ("height", height.into())];
    xml.empty("rect", &paper);
    xml.newline();
    xml.raw(&body);
    xml.finish() + "\n"
}

/// The picture within a page, with the numbers as tables.
pub fn html(subject: &Subject<'_>) -> String {
    page::html(subject, &svg(subject))
}

fn title(subject: &Subject<'_>) -> String {
    format!("{}: {} to {}", subject.container, subject.from, subject.to)
}

/// Draws everything; returns the height.
fn draw(xml: &mut Xml, subject: &Subject<'_>) -> f64 {
    let report = subject.report;
    label(xml, "title", 20.0, 36.0, "start", &title(subject));
    let mut y = 58.0;
    for line in headlines(report) {
        label(xml, "dim", 20.0, y, "start", &line);
        y += 16.0;
    }
    legend(xml, 36.0);
    let time = Time::new(LEFT, RIGHT, end(report));
    let top = y + 22.0;
    // the freeze is known before what it lies under is drawn
    let lanes_end = top + lanes::height(report);
    let curve_end = lanes_end + curve::height(report);
    let still = lanes::still(report, &time);
    if let Some((x, width)) = still {
        freeze::funnel(xml, x, width, curve_end, curve_end + AXIS + freeze::GAP);
    }
    grid(xml, &time, top, curve_end);
    lanes::grounds(xml, report, top);
    if let Some((x, width)) = still {
        lanes::band(xml, x, width, top, curve_end);
    }
    lanes::draw(xml, report, &time, top);
    curve::draw(xml, report, &time, lanes_end);
    if let Some((x, width)) = still {
        lanes::edges(xml, report, x, width, top, curve_end);
    }
    let mut bottom = curve_end + AXIS;
    if still.is_some() {
        bottom = freeze::draw(xml, report, bottom + freeze::GAP);
    }
    bottom + 16.0
}

/// Height of the numbers below an axis.
const AXIS: f64 = 24.0;

/// The end of everything that is drawn, ms.
fn end(report: &Report) -> f64 {
    let resumed = report.frozen_at().unwrap_or(0.0) + report.freeze_ms;
    let offset = report.destination_offset_ms;
    let phases = report.phases.iter().map(|p| p.start_ms + p.ms);
    let theirs = report.destination_phases.iter().map(|p| offset + p.start_ms + p.ms);
    let rounds = report.rounds.iter().map(|r| r.start_ms + r.ms);
    let after = report.post_copy.iter().map(|p| resumed + p.ms);
    let ends = phases.chain(theirs).chain(rounds).chain(after);
    ends.chain([resumed, resumed + report.fill_ms]).filter(|e| e.is_finite()).fold(0.0, f64::max)
}

fn headlines(report: &Report) -> Vec<String> {
    let mut first = vec![
        format!("frozen {}", units::ms(report.freeze_ms)),
        format!("in all {}", units::ms(report.total_ms)),
        format!("{} sent", units::bytes(report.bytes_sent)),
        counted(report.processes, "process", "processes"),
    ];
    if let Some(rate) = report.dirty_rate() {
        first.push(counted(report.rounds.len(), "round", "rounds"));
        first.push(format!("it wrote {}/s", units::bytes(rate)));
    }
    let named = [("", &report.mode), ("tracker ", &report.tracker), ("compression ", &report.compression)];
    let mut second: Vec<String> =
        named.iter().filter_map(|(what, value)| value.as_ref().map(|v| format!("{what}{v}"))).collect();
    let faults = &report.faults;
    if faults.total() > 0 {
        second.push(format!(
            "faults: {} served there, {} asked of the source, {} zero",
            faults.local, faults.remote, faults.zero
        ));
    }
    if let Some(post) = &report.post_copy {
        second.push(format!("{} followed in {}", units::bytes(post.bytes), units::ms(post.ms)));
    }
    if report.store_peak_bytes > 0 {
        second.push(format!("page store up to {}", units::bytes(report.store_peak_bytes)));
    }
    [first, second].iter().filter(|l| !l.is_empty()).map(|l| l.join("  ·  ")).collect()
}

fn counted(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

fn legend(xml: &mut Xml, y: f64) {
    let mut x = RIGHT;
    for (class, what) in [("still", "frozen"), ("destination", "destination"), ("source", "source")] {
        x -= style::width(what);
        label(xml, "", x, y, "start", what);
        x -= 16.0;
        xml.empty(
            "rect",
            &[
                ("class", class.into()),
                ("x", x.into()),
                ("y", (y - 9.0).into()),
                ("width", 11.0.into()),
                ("height", 11.0.into()),
            ],
        );
        x -= 18.0;
    }
}

/// Lines at round times, with their numbers below.
fn grid(xml: &mut Xml, time: &Time, top: f64, bottom: f64) {
    for tick in time.ticks(9) {
        let x = time.x(tick);
        line(xml, "grid", x, top, x, bottom);
        label(xml, "dim", x, bottom + 17.0, "middle", &tick_text(tick, time.span));
    }
}

/// A moment on an axis of that span: the same unit along it.
fn tick_text(ms: f64, span: f64) -> String {
    if span >= 2000.0 { format!("{} s", xml::number(ms / 1000.0)) } else { format!("{} ms", xml::number(ms)) }
}

fn label(xml: &mut Xml, class: &str, x: f64, y: f64, anchor: &str, text: &str) {
    let at = [("class", class.into()), ("x", x.into()), ("y", y.into()), ("text-anchor", anchor.into())];
    xml.leaf("text", &at, text);
    xml.newline();
}

fn line(xml: &mut Xml, class: &str, x1: f64, y1: f64, x2: f64, y2: f64) {
    xml.empty(
        "line",
        &[
            ("class", class.into()),
            ("x1", x1.into()),
            ("y1", y1.into()),
            ("x2", x2.into()),
            ("y2", y2.into()),
        ],
    );
}

/// A bar that tells more when it is pointed at, with a name inside if there is room for it.
struct Bar<'a> {
    class: &'a str,
    x: f64,
    y: f64,
    width: f64,
    name: &'a str,
    more: &'a str,
}

impl Bar<'_> {
    fn draw(&self, xml: &mut Xml) {
        let at = [
            ("class", self.class.into()),
            ("x", self.x.into()),
            ("y", self.y.into()),
            ("width", self.width.into()),
            ("height", style::BAR.into()),
            ("rx", if self.width > 6.0 { 2.0 } else { 0.0 }.into()),
        ];
        xml.begin("rect", &at);
        xml.leaf("title", &[], self.more);
        xml.end();
        xml.newline();
        if style::width(self.name) + 8.0 <= self.width {
            label(xml, "in", self.x + self.width / 2.0, self.y + 15.0, "middle", self.name);
        }
    }
}

#[cfg(test)]
mod tests;
