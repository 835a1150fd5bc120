//! What differs from run to run and means nothing: pids, namespaces, the two runtimes' names, snapshots' numbers, sockets' names. Pure.

/// Knows one side's names, and writes a text as both sides would have it.
#[derive(Default)]
pub struct Normal {
    words: Vec<(String, &'static str)>,
    pids: Vec<(u32, String)>,
}

impl Normal {
    /// Writes `word` as `name` wherever it occurs.
    pub fn word(&mut self, word: &str, name: &'static str) {
        if !word.is_empty() {
            self.words.push((word.to_owned(), name));
        }
    }

    /// Gives a process a name; the first one counts.
    pub fn name_pid(&mut self, pid: u32, name: &str) {
        if pid != 0 && !self.pids.iter().any(|(p, _)| *p == pid) {
            self.pids.push((pid, format!("<{name}>")));
        }
    }

    /// A process by its name; an unknown one is another.
    pub fn pid(&self, pid: u32) -> String {
        let known = self.pids.iter().find(|(p, _)| *p == pid).map(|(_, name)| name.clone());
        known.unwrap_or_else(|| if pid == 0 { "0".into() } else { "<other>".into() })
    }

    /// A text: words, then numbers. A number of four digits or more that is no known pid is `N`; 64 hex digits are `HASH`.
    pub fn text(&self, text: &str) -> String {
        // runc's own last newline stands before what containerd puts behind it
        let mut text = text.trim_end().replace("\n: ", ": ");
        for (word, name) in &self.words {
            text = text.replace(word, name);
        }
        let mut out = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let hex = rest.find(|c: char| !matches!(c, '0'..='9' | 'a'..='f')).unwrap_or(rest.len());
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let taken = if hex == 64 {
                out.push_str("HASH");
                hex
            } else if digits > 0 {
                out.push_str(&self.number(&rest[..digits]));
                digits
            } else {
                let plain = rest.find(|c: char| matches!(c, '0'..='9' | 'a'..='f')).unwrap_or(rest.len());
                let plain = plain.max(rest.chars().next().map_or(1, char::len_utf8));
                out.push_str(&rest[..plain]);
                plain
            };
            rest = &rest[taken..];
        }
        // a snapshot's number may be short
        for (before, after) in [("/snapshots/", "/fs"), ("/snapshots/", "/work")] {
            out = unnumbered(&out, before, after);
        }
        out
    }

    fn number(&self, digits: &str) -> String {
        let known = digits.parse().ok().and_then(|pid: u32| self.pids.iter().find(|(p, _)| *p == pid));
        match known {
            // a small one is more likely a status or a line number
            Some((pid, name)) if *pid > 255 => name.clone(),
            _ if digits.len() >= 4 => "N".into(),
            _ => digits.to_owned(),
        }
    }
}

/// Replaces the digits between `before` and `after` by N.
fn unnumbered(text: &str, before: &str, after: &str) -> String {
    let mut parts = text.split(before);
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out.push_str(before);
        let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        if digits > 0 && part[digits..].starts_with(after) {
            out.push('N');
            out.push_str(&part[digits..]);
        } else {
            out.push_str(part);
        }
    }
    out
}

/// The runner's own test.
pub fn hides_only_names_and_numbers() -> Result<(), String> {
    let mut normal = Normal::default();
    normal.word("nsrunc", "NS");
    normal.name_pid(4711, "t1");
    let hash = "0123456789abcdef".repeat(4);
    for (text, wanted) in [
        ("pid 4711 of 47110, status 137\n", "pid <t1> of N, status 137"),
        ("/run/nsrunc/t1: feed", "/run/NS/t1: feed"),
        ("/a/snapshots/12/fs:/a/snapshots/7/work", "/a/snapshots/N/fs:/a/snapshots/N/work"),
        (&format!("unix:///run/s/{hash}"), "unix:///run/s/HASH"),
        ("é ü 12", "é ü 12"),
    ] {
        let got = normal.text(text);
        if got != wanted {
            return Err(format!("{text:?} became {got:?}, wanted {wanted:?}"));
        }
    }
    Ok(())
}
