//! OCI hooks: their order, what they are told, and what a failing one does.

use anyhow::Result;
use serde_json::{Value, json};

use crate::calls::Call;
use crate::making::New;
use crate::spec::Spec;
use crate::subject::{ID, Subject};

list![
    hooks_in_order,
    prestart_fails,
    create_container_fails,
    start_container_fails,
    poststart_fails,
    poststop_fails
];

/// A hook that writes its name and the state that it is told into the scratch folder.
fn hook(s: &Subject, name: &str, rest: &str) -> Value {
    let script = format!("echo \"{name} $(cat)\" >> {}; {rest}", s.scratch("hooks"));
    json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
}

fn note_hooks(s: &mut Subject) {
    let text = s.scratched("hooks");
    for (n, line) in text.lines().enumerate() {
        let (name, state) = line.split_once(' ').unwrap_or((line, ""));
        let state: Value = serde_json::from_str(state).unwrap_or_default();
        let word = |key: &str| state[key].to_string();
        let shown = format!("{name} id={} status={} bundle={}", word("id"), word("status"), word("bundle"));
        s.note(format!("hook {}", n + 1), shown);
    }
}

fn hooks_in_order(s: &mut Subject) -> Result<()> {
    let mut spec = Spec::sh("cat /hooked; echo ready; sleep 1000");
    for name in ["prestart", "createRuntime", "createContainer", "poststart", "poststop"] {
        spec = spec.with(&format!("/hooks/{name}"), hook(s, name, "true"));
    }
    // this one runs in the container's root
    let inside =
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", "echo started > /hooked; cat > /dev/null"] }]);
    s.run_ready(spec.with("/hooks/startContainer", inside))?;
    note_hooks(s);
    let text = s.scratched("t1.log");
    s.note("the container saw", text);
    s.end();
    note_hooks(s);
    Ok(())
}

fn fails(s: &mut Subject, name: &str) -> Result<()> {
    let spec = Spec::idle().with(&format!("/hooks/{name}"), hook(s, name, "echo woe >&2; exit 4"));
    s.create(New::of(spec))?;
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Start(""));
    // a start that failed may have ended it
    s.until("it is settled", |s| {
        s.heard("/tasks/exit") || s.heard("/tasks/start") || !s.heard("/tasks/create")
    });
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    note_hooks(s);
    let left = s.host(&s.bundle(ID)).exists();
    s.note("a bundle is left", left.to_string());
    Ok(())
}

fn prestart_fails(s: &mut Subject) -> Result<()> {
    fails(s, "prestart")
}

fn create_container_fails(s: &mut Subject) -> Result<()> {
    fails(s, "createContainer")
}

fn start_container_fails(s: &mut Subject) -> Result<()> {
    let inside = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "exit 4"] }]);
    s.create(New::of(Spec::idle().with("/hooks/startContainer", inside)))?;
    let _ = s.call(Call::Start(""));
    s.until("it has ended", |s| s.heard("/tasks/exit"));
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn poststart_fails(s: &mut Subject) -> Result<()> {
    fails(s, "poststart")
}

fn poststop_fails(s: &mut Subject) -> Result<()> {
    fails(s, "poststop")
}
