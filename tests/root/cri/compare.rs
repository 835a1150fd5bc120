//! One scene under runc's handler and under ours: all lines of their records must be the same, but for the differences that are meant.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::client::Cri;
use super::record::Record;
use crate::bed::Bed;

/// Does something under a handler and records what it sees.
pub trait Scene: Fn(&Cri<'_>, &str, &mut Record) -> Result<()> + Sync {}
impl<S: Fn(&Cri<'_>, &str, &mut Record) -> Result<()> + Sync> Scene for S {}

/// What all others are compared with.
pub const RUNC: &str = "runc";
/// Ours, by the name of its type.
pub const OURS: &str = "transship";
/// Ours, under the name of runc's type, by its path.
pub const BY_PATH: &str = "transship-path";

/// Differences that are meant: the end of a line's name (or its middle, where it ends in a slash), and why.
const MEANT: &[(&str, &str)] = &[
    ("/runtime_handler", "the handler's own name"),
    ("/runtimeHandler", "the handler's own name"),
    ("/RuntimeHandler", "the handler's own name"),
    ("/runtimeType", "the type's own name"),
    ("checkpointctl/runtime", "the type's own name"),
    ("/runtimeOptions", "runc's options have a type of their own in containerd"),
    ("/runtimeOptions/", "runc's options have a type of their own in containerd"),
];

/// Runs the scene under runc's handler and under ours, both at the same time, and compares.
pub fn same(bed: &Bed, scene: impl Scene) -> Result<()> {
    let records = std::thread::scope(|scope| {
        let scene = &scene;
        let running = [RUNC, OURS].map(|handler| scope.spawn(move || watch(bed, handler, scene)));
        running.map(|r| r.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked"))))
    });
    match records {
        [Ok(runc), Ok(ours)] => judge(&runc, &ours),
        [Err(runc), Err(ours)] => Err(anyhow::anyhow!("{ours:#}\nand {runc:#}")),
        [Err(e), _] | [_, Err(e)] => Err(e),
    }
}

/// The same one after the other, under one more handler too: ours by its path.
pub fn same_in_turn(bed: &Bed, scene: impl Scene) -> Result<()> {
    let runc = watch(bed, RUNC, &scene)?;
    for handler in [OURS, BY_PATH] {
        judge(&runc, &watch(bed, handler, &scene)?).with_context(|| handler)?;
    }
    Ok(())
}

/// The scene's lines under one handler.
pub fn watch(bed: &Bed, handler: &str, scene: &impl Scene) -> Result<Vec<(String, String)>> {
    let cri = Cri::connect(bed)?;
    cri.expect_images()?;
    let mut record = Record::default();
    scene(&cri, handler, &mut record).with_context(|| format!("under {handler}"))?;
    Ok(record.lines())
}

/// The same name twice gets a number.
fn by_name(lines: &[(String, String)]) -> BTreeMap<String, &str> {
    let mut named = BTreeMap::new();
    for (name, value) in lines {
        let mut key = name.clone();
        let mut n = 1;
        while named.contains_key(&key) {
            n += 1;
            key = format!("{name} ({n})");
        }
        named.insert(key, value.as_str());
    }
    named
}

fn judge(runc: &[(String, String)], ours: &[(String, String)]) -> Result<()> {
    ensure!(!runc.is_empty(), "nothing was recorded");
    let (runc, ours) = (by_name(runc), by_name(ours));
    let mut names: Vec<&String> = runc.keys().chain(ours.keys()).collect();
    names.sort();
    names.dedup();
    let is =
        |name: &str, part: &str| if part.ends_with('/') { name.contains(part) } else { name.ends_with(part) };
    let meant = |name: &str| {
        let name = name.split(" (").next().unwrap_or_default();
        MEANT.iter().any(|(part, _)| is(name, part))
    };
    let different = names.into_iter().filter(|n| !meant(n) && runc.get(*n) != ours.get(*n));
    let shown: Vec<String> = different
        .map(|n| {
            let side =
                |of: &BTreeMap<String, &str>| of.get(n).map_or("(none)".to_owned(), |v| format!("{v:?}"));
            format!("{n}\n    runc: {}\n    ours: {}", side(&runc), side(&ours))
        })
        .collect();
    ensure!(shown.is_empty(), "{} differences from runc's handler:\n  {}", shown.len(), shown.join("\n  "));
    Ok(())
}
