//! A small writer of XML: elements, attributes and texts, everything escaped. It cannot make a document that is not well-formed.

use std::fmt::Write as _;

/// What is written so far, and the elements that are open.
#[derive(Debug, Default)]
pub struct Xml {
    out: String,
    open: Vec<&'static str>,
}

/// An attribute's value.
#[derive(Clone, Debug)]
pub enum Value<'a> {
    /// A length or a coordinate; two digits behind the point.
    Number(f64),
    /// Anything else; escaped when written.
    Text(&'a str),
}

impl From<f64> for Value<'_> {
    fn from(n: f64) -> Self {
        Value::Number(n)
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Value::Text(text)
    }
}

impl Xml {
    /// Begins an element.
    pub fn begin(&mut self, name: &'static str, attributes: &[(&str, Value<'_>)]) {
        self.tag(name, attributes);
        self.out.push('>');
        self.open.push(name);
    }

    /// Ends the element that was begun last.
    pub fn end(&mut self) {
        if let Some(name) = self.open.pop() {
            let _ = write!(self.out, "</{name}>");
        }
    }

    /// An element without content.
    pub fn empty(&mut self, name: &'static str, attributes: &[(&str, Value<'_>)]) {
        self.tag(name, attributes);
        self.out.push_str("/>");
    }

    /// An element that holds only a text.
    pub fn leaf(&mut self, name: &'static str, attributes: &[(&str, Value<'_>)], text: &str) {
        self.begin(name, attributes);
        self.text(text);
        self.end();
    }

    /// A text.
    pub fn text(&mut self, text: &str) {
        escape(text, &mut self.out);
    }

    /// What is XML already: a constant of ours, or another document of this writer.
    pub fn raw(&mut self, xml: &str) {
        self.out.push_str(xml);
    }

    /// A line break, for those who read the source.
    pub fn newline(&mut self) {
        self.out.push('\n');
    }

    /// The document; what is still open is ended.
    pub fn finish(mut self) -> String {
        while !self.open.is_empty() {
            self.end();
        }
        self.out
    }

    fn tag(&mut self, name: &str, attributes: &[(&str, Value<'_>)]) {
        let _ = write!(self.out, "<{name}");
        for (key, value) in attributes {
            let _ = write!(self.out, " {key}=\"");
            match value {
                Value::Number(n) => self.out.push_str(&number(*n)),
                Value::Text(text) => escape(text, &mut self.out),
            }
            self.out.push('"');
        }
    }
}

/// At most two digits behind the point; what is no number is 0.
pub fn number(n: f64) -> String {
    let rounded = (n * 100.0).round() / 100.0;
    if rounded.is_finite() { format!("{}", if rounded == 0.0 { 0.0 } else { rounded }) } else { "0".into() }
}

/// Escapes for content and for attributes alike. Characters that XML 1.0 has no way to hold become U+FFFD.
fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\t' | '\n' | '\r' => out.push(' '),
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_put_in_comes_out_of_a_parser_again() {
        let nasty = "</title><script>alert(1)</script> \"&' \u{1}\u{fffe} ü";
        let mut xml = Xml::default();
        xml.begin("a", &[("k", nasty.into()), ("n", 1.005f64.into())]);
        xml.leaf("b", &[], nasty);
        xml.empty("c", &[]);
        let text = xml.finish();
        let document = roxmltree::Document::parse(&text).unwrap();
        let want = nasty.replace(['\u{1}', '\u{fffe}'], "\u{fffd}");
        assert_eq!(document.root_element().attribute("k"), Some(want.as_str()));
        let b = document.descendants().find(|n| n.has_tag_name("b")).unwrap();
        assert_eq!((b.text(), b.children().count()), (Some(want.as_str()), 1));
    }

    #[test]
    fn numbers_are_short_and_always_numbers() {
        for (n, want) in [(1.0, "1"), (0.126, "0.13"), (-0.001, "0"), (f64::NAN, "0"), (f64::INFINITY, "0")] {
            assert_eq!(number(n), want);
        }
    }
}
