//! The page around the picture: its numbers as tables, for those who cannot point at a bar.

use super::style::PAGE;
use super::xml::Xml;
use super::{Subject, title};
use crate::cli::tables::{self, Table};

/// A page with the picture `svg`, which is XML already.
pub fn html(subject: &Subject<'_>, svg: &str) -> String {
    let mut xml = Xml::default();
    xml.begin("html", &[("lang", "en".into())]);
    xml.begin("head", &[]);
    xml.empty("meta", &[("charset", "utf-8".into())]);
    xml.empty("meta", &[("name", "color-scheme".into()), ("content", "light dark".into())]);
    xml.leaf("title", &[], &title(subject));
    xml.raw("<style>");
    xml.raw(PAGE);
    xml.raw("</style>");
    xml.end();
    xml.newline();
    xml.begin("body", &[]);
    xml.raw(svg);
    let report = subject.report;
    for (heading, table) in [
        ("What the freeze was spent on", tables::freeze(report)),
        ("Rounds", tables::rounds(report, usize::MAX)),
        ("Phases", tables::phases(report)),
    ] {
        draw(&mut xml, heading, &table);
    }
    if !report.warnings.is_empty() {
        xml.leaf("h2", &[], "Warnings");
        for warning in &report.warnings {
            xml.leaf("p", &[], warning);
        }
    }
    format!("<!DOCTYPE html>\n{}\n", xml.finish())
}

fn draw(xml: &mut Xml, heading: &str, table: &Table) {
    if table.rows.is_empty() {
        return;
    }
    xml.leaf("h2", &[], heading);
    xml.begin("table", &[]);
    xml.begin("tr", &[]);
    for (column, _) in &table.columns {
        xml.leaf("th", &[], column);
    }
    xml.end();
    for row in &table.rows {
        xml.begin("tr", &[]);
        for cell in row {
            xml.leaf("td", &[], cell);
        }
        xml.end();
        xml.newline();
    }
    xml.end();
}
