//! What a scene has seen, in lines of name and value, without what is different each time: names are replaced by what they stand for, times and
//! pids by saying so. Pure.

use serde::Serialize;
use serde_json::Value;

use super::client::Answer;

/// The lines so far.
#[derive(Default)]
pub struct Record {
    lines: Vec<(String, String)>,
    names: Vec<(String, String)>,
}

impl Record {
    /// From now on `text` is shown as `plain`.
    pub fn call(&mut self, text: &str, plain: &str) {
        if !text.is_empty() {
            self.names.retain(|(known, _)| known != text);
            self.names.push((text.to_owned(), plain.to_owned()));
            // a name within another must not cut that one
            self.names.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        }
    }

    /// A value as it is.
    pub fn note(&mut self, what: &str, value: impl std::fmt::Display) {
        let value = self.plain(&value.to_string());
        self.lines.push((what.to_owned(), value));
    }

    /// An answer, field by field.
    pub fn fields(&mut self, what: &str, answer: &impl Serialize) {
        let value = serde_json::to_value(answer).unwrap_or_else(|e| Value::String(e.to_string()));
        self.flatten(what, &value);
    }

    /// What a call came to: its answer's fields, or its refusal.
    pub fn outcome<T: Serialize>(&mut self, what: &str, answer: &Answer<T>) {
        match answer {
            Ok(answer) => {
                let before = self.lines.len();
                self.fields(what, answer);
                if self.lines.len() == before {
                    self.note(what, "done");
                }
            }
            Err(status) => self.note(what, format!("{:?}: {}", status.code(), status.message())),
        }
    }

    /// All of it.
    pub fn lines(self) -> Vec<(String, String)> {
        self.lines
    }

    fn flatten(&mut self, path: &str, value: &Value) {
        match value {
            Value::Object(fields) => {
                for (key, value) in fields {
                    let key = self.plain(key);
                    self.flatten(&format!("{path}/{key}"), value);
                }
            }
            Value::Array(items) => {
                for (n, item) in items.iter().enumerate() {
                    self.flatten(&format!("{path}/{n}"), item);
                }
            }
            // the CRI's verbose information is JSON in a string
            Value::String(text) if text.starts_with('{') => match serde_json::from_str(text) {
                Ok(inner) => self.flatten(path, &inner),
                Err(_) => self.note(path, text),
            },
            Value::String(text) if is_time(text) => self.note(path, "a time"),
            Value::String(text) => self.note(path, text),
            Value::Number(number) => {
                let shown = volatile(path, number.as_f64().unwrap_or_default());
                self.note(path, shown.unwrap_or_else(|| number.to_string()));
            }
            other => self.note(path, other),
        }
    }

    fn plain(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (name, plain) in &self.names {
            text = text.replace(name.as_str(), plain);
        }
        let text = runs(&text, 64, "<id>", |c| c.is_ascii_hexdigit());
        let text = after(&text, "/proc/", "<pid>", |c| c.is_ascii_digit());
        let text = after(&text, "/cni-", "<uuid>", |c| c.is_ascii_hexdigit() || c == '-');
        let text = after(&text, "veth", "<n>", |c| c.is_ascii_hexdigit());
        // hardware addresses: longer runs of these characters do not occur
        runs(&text, 17, "<mac>", |c| c.is_ascii_hexdigit() || c == ':')
    }
}

/// How a number is shown that is another one each time: whether there is one at all.
fn volatile(path: &str, number: f64) -> Option<String> {
    let key = path.rsplit('/').next().unwrap_or_default();
    let time = key.ends_with("_at") || key.ends_with("At") || key == "timestamp";
    // a measurement of the CRI is `{"value": n}`
    (time || key == "value" || key == "pid").then(|| {
        if number == 0.0 { "0".into() } else { format!("a {}", if time { "time" } else { "number" }) }
    })
}

/// RFC 3339, as JSON has times.
fn is_time(text: &str) -> bool {
    let at = |n: usize, c: u8| text.as_bytes().get(n) == Some(&c);
    at(4, b'-') && at(7, b'-') && at(10, b'T') && at(13, b':') && at(16, b':')
}

/// Every run of `length` such characters or more becomes `plain`.
fn runs(text: &str, length: usize, plain: &str, is: impl Fn(char) -> bool) -> String {
    let (mut out, mut run) = (String::new(), String::new());
    for c in text.chars().map(Some).chain([None]) {
        match c {
            Some(c) if is(c) => run.push(c),
            other => {
                out.push_str(if run.len() >= length { plain } else { &run });
                run.clear();
                out.extend(other);
            }
        }
    }
    out
}

/// The characters after every `start` become `plain`.
fn after(text: &str, start: &str, plain: &str, is: impl Fn(char) -> bool) -> String {
    let mut parts = text.split(start);
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(&is);
        let shown = if rest.len() < part.len() { plain } else { "" };
        out.extend([start, shown, rest]);
    }
    out
}

/// Checks that need no bed; run as a scenario, because these tests have a harness of their own.
pub fn check() -> anyhow::Result<()> {
    let mut record = Record::default();
    record.call("abc", "<pod>");
    record.call("abcdef", "<container>");
    record.fields(
        "x",
        &serde_json::json!({"id": "abcdef", "of": "abc", "created_at": 5, "state": 2, "cpu": {"value": 0}, "info": "{\"pid\": 7}",
            "ns": "/proc/123/ns/pid /proc/self/ns", "other": "f".repeat(64), "net": "/run/netns/cni-12-ab veth1f 0a:1b:2c:3d:4e:5f", "when": "2026-11-21T14:32:28.123456789Z"}),
    );
    let lines: Vec<String> = record.lines().into_iter().map(|(k, v)| format!("{k}={v}")).collect();
    let wanted = [
        "x/cpu/value=0",
        "x/created_at=a time",
        "x/id=<container>",
        "x/info/pid=a number",
        "x/net=/run/netns/cni-<uuid> veth<n> <mac>",
        "x/ns=/proc/<pid>/ns/pid /proc/self/ns",
        "x/of=<pod>",
        "x/other=<id>",
        "x/state=2",
        "x/when=a time",
    ];
    anyhow::ensure!(lines == wanted, "{lines:#?}");
    Ok(())
}
