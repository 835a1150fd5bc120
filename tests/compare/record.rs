//! What one run of a scenario has shown: named observations in their order, and how two runs differ. Pure.

use std::collections::BTreeMap;

/// The observations of one run. Names are unique.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    seen: Vec<(String, String)>,
}

/// One observation that is not the same in both runs; what only one of them has is `None` in the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The observation's name.
    pub name: String,
    /// With runc's shim.
    pub theirs: Option<String>,
    /// With ours.
    pub ours: Option<String>,
}

impl Record {
    /// Adds an observation; a name that is taken gets a number behind it.
    pub fn note(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let name = name.into();
        let numbered = |n: usize| if n == 1 { name.clone() } else { format!("{name} ({n})") };
        let free = (1..).map(numbered).find(|name| self.value(name).is_none());
        self.seen.push((free.unwrap_or_default(), value.into()));
    }

    /// The value of an observation.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.seen.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// Whether something was left behind: see `Subject::finish`.
    pub fn left(&self) -> bool {
        self.seen.iter().any(|(name, value)| name.starts_with("left: ") && value != "nothing")
    }

    /// How many observations there are.
    pub fn len(&self) -> usize {
        self.seen.len()
    }

    /// All of them, a line each.
    pub fn text(&self) -> String {
        self.seen.iter().map(|(name, value)| format!("  {name}: {value}\n")).collect()
    }
}

/// Where two runs of one scenario differ: in the order of `theirs`, then what only `ours` has.
pub fn differences(theirs: &Record, ours: &Record) -> Vec<Difference> {
    let mut rest: BTreeMap<&str, &str> = ours.seen.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let mut found = Vec::new();
    for (name, value) in &theirs.seen {
        let other = rest.remove(name.as_str());
        if other != Some(value) {
            let other = other.map(str::to_owned);
            found.push(Difference { name: name.clone(), theirs: Some(value.clone()), ours: other });
        }
    }
    let ours_only = ours.seen.iter().filter(|(name, _)| rest.contains_key(name.as_str()));
    found.extend(ours_only.map(|(name, value)| Difference {
        name: name.clone(),
        theirs: None,
        ours: Some(value.clone()),
    }));
    found
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |v: &Option<String>| v.clone().unwrap_or_else(|| "(no such observation)".into());
        let (theirs, ours) = (shown(&self.theirs), shown(&self.ours));
        write!(f, "{}\n    runc shim: {theirs}\n    transship: {ours}", self.name)
    }
}

/// The runner's own test: it would be worth nothing if it could not tell two runs apart.
pub fn tells_runs_apart() -> Result<(), String> {
    let record = |values: &[(&str, &str)]| {
        let mut record = Record::default();
        values.iter().for_each(|(name, value)| record.note(*name, *value));
        record
    };
    let theirs = record(&[("a", "1"), ("b", "2"), ("b", "3"), ("c", "4")]);
    let ours = record(&[("a", "1"), ("b", "2"), ("b", "9"), ("d", "5")]);
    let found = differences(&theirs, &ours);
    let wanted = [("b (2)", Some("3"), Some("9")), ("c", Some("4"), None), ("d", None, Some("5"))];
    let wanted = wanted.map(|(name, theirs, ours): (&str, Option<&str>, Option<&str>)| Difference {
        name: name.into(),
        theirs: theirs.map(str::to_owned),
        ours: ours.map(str::to_owned),
    });
    if found != wanted {
        return Err(format!("found {found:#?}"));
    }
    if !differences(&theirs, &theirs.clone()).is_empty() {
        return Err("a run differs from itself".into());
    }
    Ok(())
}
