//! The gaps as a picture: one group of bars for each workload, on a logarithmic scale, as SVG.

use std::fmt::Write;

use crate::summary::{Row, ratio};

const LEFT: f64 = 250.0;
const WIDTH: f64 = 520.0;
const RIGHT: f64 = 190.0;
const BAR: f64 = 17.0;
const PAUSE: f64 = 30.0;
const TOP: f64 = 68.0;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn color(system: &str) -> &'static str {
    match system {
        "transship" => "#0a7d5a",
        "runc" => "#b5482f",
        "runc-page-server" => "#c98a2b",
        "runc-lazy-pages" => "#5b6fae",
        _ => "#8a8a8a",
    }
}

/// Powers of ten around all values.
fn scale(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.filter(|v| *v > 0.0).fold((f64::MAX, 0.0f64), |(l, h), v| (l.min(v), h.max(v)));
    if high == 0.0 {
        return (0.0, 1.0);
    }
    let (low, high) = (low.log10().floor(), high.log10().ceil());
    (low, high.max(low + 1.0))
}

fn length(ms: f64) -> String {
    match ms {
        ms if ms < 100.0 => format!("{ms:.1} ms"),
        ms if ms < 10_000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.1} s", ms / 1e3),
    }
}

/// `about`: a line that says where and when.
pub fn svg(rows: &[Row], about: &str) -> String {
    let (low, high) = scale(rows.iter().filter_map(Row::gap_ms));
    let x = |ms: f64| LEFT + (ms.max(1e-3).log10() - low) / (high - low) * WIDTH;
    let mut y = TOP;
    let mut body = String::new();
    let mut workload = "";
    for row in rows {
        if row.workload != workload {
            y += if workload.is_empty() { 0.0 } else { PAUSE - BAR };
            workload = row.workload;
            let _ =
                writeln!(body, r#"<text x="12" y="{:.0}" font-weight="bold">{workload}</text>"#, y + 12.0);
        }
        let _ = writeln!(
            body,
            r##"<text x="{}" y="{:.0}" text-anchor="end">{}</text>"##,
            LEFT - 8.0,
            y + 12.0,
            row.system
        );
        match (row.gap_ms(), row.gap_range()) {
            (Some(gap), Some((least, most))) => {
                let times = ratio(rows, row).filter(|_| row.system != "transship");
                let times = times.map_or(String::new(), |r| format!(" ({r:.1} x)"));
                let _ = writeln!(
                    body,
                    r##"<rect x="{LEFT}" y="{y:.0}" width="{:.1}" height="{}" fill="{}"/><path d="M{:.1} {m:.1}H{:.1}" stroke="#222"/><text x="{:.1}" y="{:.0}">{}{times}</text>"##,
                    (x(gap) - LEFT).max(1.0),
                    BAR - 4.0,
                    color(row.system),
                    x(least),
                    x(most),
                    x(most.max(gap)) + 6.0,
                    y + 11.0,
                    length(gap),
                    m = y + (BAR - 4.0) / 2.0,
                );
            }
            _ => {
                let _ = writeln!(
                    body,
                    r##"<text x="{}" y="{:.0}" fill="#888">no figure, see the table</text>"##,
                    LEFT + 4.0,
                    y + 11.0
                );
            }
        }
        y += BAR;
    }
    let mut grid = String::new();
    for power in low as i32..=high as i32 {
        let at = x(10f64.powi(power));
        let _ = writeln!(
            grid,
            r##"<path d="M{at:.1} {:.0}V{y:.0}" stroke="#ddd"/><text x="{at:.1}" y="{:.0}" text-anchor="middle" fill="#666">{}</text>"##,
            TOP - 6.0,
            TOP - 10.0,
            length(10f64.powi(power)).replace(".0", ""),
        );
    }
    let (width, height) = (LEFT + WIDTH + RIGHT, y + 16.0);
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">
<rect width="{width}" height="{height}" fill="#fff"/>
<text x="12" y="20" font-size="15" font-weight="bold">How long the workload or its client sees nothing: median gap of a move</text>
<text x="12" y="36" fill="#666">{}; line: shortest to longest; logarithmic</text>
{grid}{body}</svg>
"##,
        escape(about)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cell::Figures;

    #[test]
    fn a_bar_for_each_row_longer_for_longer_gaps() {
        let row = |system: &'static str, gap_ms: f64| Row {
            workload: "w",
            system,
            runs: if gap_ms > 0.0 { vec![Figures { gap_ms, ..Figures::default() }] } else { vec![] },
            errors: vec![],
            skipped: None,
        };
        let text = svg(&[row("transship", 50.0), row("runc", 1500.0), row("lazy", 0.0)], "a <machine>");
        let widths: Vec<f64> = text
            .lines()
            .filter(|l| l.starts_with("<rect x="))
            .filter_map(|l| l.split("width=\"").nth(1)?.split('"').next()?.parse().ok())
            .collect();
        assert!(widths.len() == 2 && widths[0] < widths[1], "{widths:?}");
        for part in ["30.0 x", "1500 ms", "a &lt;machine&gt;", "no figure"] {
            assert!(text.contains(part), "{part}");
        }
    }
}
