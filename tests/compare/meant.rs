//! The differences from runc's shim that are meant, each with its reason. One that no longer occurs is an error too: the list is what
//! a user of runc's shim has to know, and nothing else.

use crate::bed::Containerd;
use crate::record::Difference;

/// A difference that is meant.
#[derive(Debug)]
pub struct Meant {
    /// The scenario; empty: any.
    pub scenario: &'static str,
    /// The observation's name; `*` at its end stands for the rest of it.
    pub observation: &'static str,
    /// What our side's value contains (empty: anything).
    pub ours: &'static str,
    /// On which containerd; none: on both.
    pub only: Option<Containerd>,
    /// Whether it occurs in every run; what depends on the moment does not.
    pub always: bool,
    /// Why we are different.
    pub reason: &'static str,
}

/// All of them.
pub const LIST: &[Meant] = &[];

impl Meant {
    fn applies(&self, containerd: Containerd) -> bool {
        self.only.is_none_or(|only| only == containerd)
    }

    fn covers(&self, scenario: &str, containerd: Containerd, difference: &Difference) -> bool {
        let named = match self.observation.strip_suffix('*') {
            Some(start) => difference.name.starts_with(start),
            None => difference.name == self.observation,
        };
        let ours = difference.ours.as_deref().unwrap_or_default();
        self.applies(containerd)
            && (self.scenario.is_empty() || self.scenario == scenario)
            && named
            && ours.contains(self.ours)
    }
}

/// The differences of one scenario: what is meant (by its place in the list), and what is not.
pub fn judge(
    list: &[Meant],
    scenario: &str,
    containerd: Containerd,
    differences: Vec<Difference>,
) -> (Vec<(usize, Difference)>, Vec<Difference>) {
    let (mut meant, mut real) = (Vec::new(), Vec::new());
    for difference in differences {
        match list.iter().position(|m| m.covers(scenario, containerd, &difference)) {
            Some(place) => meant.push((place, difference)),
            None => real.push(difference),
        }
    }
    (meant, real)
}

/// The entries that should have occurred and did not: of the scenarios that ran, those of any scenario only if all ran.
pub fn outdated<'a>(
    list: &'a [Meant],
    containerd: Containerd,
    ran: &[&str],
    all_ran: bool,
    occurred: &[usize],
) -> Vec<&'a Meant> {
    let due = |m: &Meant| if m.scenario.is_empty() { all_ran } else { ran.contains(&m.scenario) };
    let entries = list.iter().enumerate();
    let missing =
        entries.filter(|(n, m)| m.always && m.applies(containerd) && due(m) && !occurred.contains(n));
    missing.map(|(_, m)| m).collect()
}

/// The runner's own test.
pub fn takes_only_what_is_listed() -> Result<(), String> {
    let entry = |scenario, observation, ours, only| Meant {
        scenario,
        observation,
        ours,
        only,
        always: true,
        reason: "a test",
    };
    let list =
        [entry("a", "x*", "our", None), entry("", "y", "", Some(Containerd::V17)), entry("b", "z", "", None)];
    let difference = |name: &str, ours: &str| Difference {
        name: name.into(),
        theirs: Some("theirs".into()),
        ours: Some(ours.into()),
    };
    let all = || vec![difference("x1", "ours"), difference("x2", "else"), difference("y", "")];
    let (meant, real) = judge(&list, "a", Containerd::V17, all());
    let names = |d: &[Difference]| d.iter().map(|d| d.name.clone()).collect::<Vec<_>>();
    if meant.iter().map(|(n, _)| *n).collect::<Vec<_>>() != [0, 1] || names(&real) != ["x2"] {
        return Err(format!("{meant:?} {real:?}"));
    }
    let (_, real) = judge(&list, "c", Containerd::V21, all());
    if real.len() != 3 {
        return Err(format!("taken for another scenario or containerd: {real:?}"));
    }
    let missing = outdated(&list, Containerd::V17, &["a", "b"], false, &[0]);
    if missing.len() != 1 || missing[0].scenario != "b" {
        return Err(format!("{missing:?}"));
    }
    Ok(())
}
