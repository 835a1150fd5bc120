//! The freeze, enlarged to the whole width: one row an item, both nodes in the order in which things began.

use super::scale::Time;
use super::style::{BAR, LEFT, RIGHT, SMALL, width};
use super::xml::{Xml, number};
use super::{AXIS, Bar, grid, label};
use crate::cli::units;
use crate::migrate::report::{Report, Side};

/// Between the whole and its enlargement.
pub const GAP: f64 = 34.0;
/// From one row to the next.
const STEP: f64 = BAR + 3.0;
/// More rows are not read by anybody.
const MOST: usize = 48;

/// From the freeze as it is in the whole to its enlargement.
pub fn funnel(xml: &mut Xml, x: f64, width: f64, top: f64, bottom: f64) {
    let corners = [(x, top), (x + width, top), (RIGHT, bottom), (LEFT, bottom)];
    let points: Vec<String> = corners.iter().map(|(x, y)| format!("{},{}", number(*x), number(*y))).collect();
    xml.empty("polygon", &[("class", "zoom".into()), ("points", points.join(" ").as_str().into())]);
    xml.newline();
}

/// Draws it; returns where it ends.
pub fn draw(xml: &mut Xml, report: &Report, top: f64) -> f64 {
    let items = report.freeze_items();
    let time = Time::new(LEFT, RIGHT, report.freeze_ms);
    let rows = items.len().min(MOST);
    let bottom = top + rows as f64 * STEP + 8.0;
    xml.empty(
        "rect",
        &[
            ("class", "zoom".into()),
            ("x", LEFT.into()),
            ("y", top.into()),
            ("width", (RIGHT - LEFT).into()),
            ("height", (bottom - top).into()),
        ],
    );
    label(xml, "head", 20.0, top - 10.0, "start", "the freeze, item by item");
    grid(xml, &time, top, bottom);
    for (n, item) in items.iter().take(MOST).enumerate() {
        let y = top + 4.0 + n as f64 * STEP;
        let (x, wide) = time.bar(item.start_ms, item.ms);
        let (class, side) = match item.side {
            Side::Source => ("source", "source"),
            Side::Destination => ("destination", "destination"),
        };
        let name = shortened(&item.name, LEFT - 30.0);
        label(xml, "", LEFT - 8.0, y + 15.0, "end", &name);
        let took = units::ms(item.ms);
        let more = format!("{} ({side}): {took} from {}", item.name, units::ms(item.start_ms.max(0.0)));
        let inside = width(&took) + 8.0 <= wide;
        Bar { class, x, y, width: wide, name: if inside { &took } else { "" }, more: &more }.draw(xml);
        if !inside {
            // beside the bar, on the side where there is room
            let after = x + wide + width(&took) + 8.0 < RIGHT;
            let (x, anchor) = if after { (x + wide + 5.0, "start") } else { (x - 5.0, "end") };
            label(xml, "dim", x, y + 15.0, anchor, &took);
        }
    }
    let mut end = bottom + AXIS;
    if items.len() > MOST {
        label(xml, "dim", LEFT, end + SMALL, "start", &format!("and {} more", items.len() - MOST));
        end += 18.0;
    }
    end
}

/// A text that fits into a width.
fn shortened(text: &str, room: f64) -> String {
    if width(text) <= room {
        return text.to_string();
    }
    let mut short = String::new();
    for c in text.chars() {
        if width(&short) + width("m…") > room {
            break;
        }
        short.push(c);
    }
    short + "…"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_cut_and_short_ones_are_not() {
        assert_eq!(shortened("CRIU dump", 100.0), "CRIU dump");
        let long = shortened(&"x".repeat(500), 100.0);
        assert!(long.ends_with('…') && width(&long) <= 100.0 && long.len() > 8, "{long}");
    }
}
