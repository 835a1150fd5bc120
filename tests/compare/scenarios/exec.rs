//! Processes added to a container, and what can be wrong with them.

use anyhow::Result;

use crate::calls::{Call, NewExec};
use crate::making::New;
use crate::spec::{self, Spec};
use crate::subject::Subject;

list![
    story,
    exec_life,
    exec_same_id,
    exec_id_again,
    exec_bad_id,
    exec_bad_spec,
    exec_missing_program,
    exec_missing_program_again,
    exec_not_executable,
    exec_in_created,
    exec_in_stopped,
    exec_started_twice,
    exec_never_started,
    exec_killed,
    exec_unknown,
    exec_delete_running,
    exec_ends_with_init,
    exec_exit_at_once,
    exec_outlives_nobody,
];

/// A life with everything in it that containerd is told of.
fn story(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", spec::script("exit 3"), Default::default());
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Delete("x1"));
    let _ = s.exec("x2", spec::process(&["/no/such/program"]).to_string(), Default::default());
    let _ = s.call(Call::Pause);
    let _ = s.call(Call::Resume);
    s.end();
    Ok(())
}

fn exec_life(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let log = s.log("x1.log");
    let spec = spec::script(
        "echo out; echo err >&2; cat /proc/1/cmdline; sleep 1000 > /dev/null 2>&1 & trap 'exit 7' TERM; echo ready; wait",
    );
    s.call(Call::Exec(Box::new(NewExec { id: "x1", spec, stdio: log }))).ok();
    let _ = s.call(Call::State("x1"));
    let _ = s.direct(Call::State("x1"));
    s.note_bundle("described");
    let _ = s.call(Call::Start("x1"));
    s.until("it is ready", |s| s.scratched("x1.log").contains("ready"));
    s.note_bundle("running");
    let _ = s.call(Call::State("x1"));
    let _ = s.direct(Call::State("x1"));
    let _ = s.call(Call::Pids);
    let _ = s.direct(Call::Pids);
    let _ = s.call(Call::Kill("x1", 15));
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::State("x1"));
    let _ = s.direct(Call::State("x1"));
    let _ = s.call(Call::Delete("x1"));
    s.note_bundle("deleted");
    let _ = s.call(Call::State("x1"));
    let text = s.scratched("x1.log");
    // the two streams have no order
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    s.note("what it printed", lines.join("|"));
    s.end();
    Ok(())
}

fn exec_same_id(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", spec::script("sleep 1000"), Default::default());
    let _ = s.exec("x1", spec::script("true"), Default::default());
    let again = NewExec { id: "x1", spec: spec::script("true"), ..Default::default() };
    let _ = s.direct(Call::Exec(Box::new(again)));
    let _ = s.call(Call::State("x1"));
    let _ = s.call(Call::Kill("x1", 9));
    let _ = s.call(Call::Wait("x1"));
    // it has ended, but is not deleted
    let _ = s.exec("x1", spec::script("true"), Default::default());
    s.end();
    Ok(())
}

fn exec_id_again(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    for status in ["5", "6"] {
        let _ = s.exec("x1", spec::script(&format!("exit {status}")), Default::default());
        let _ = s.call(Call::Wait("x1"));
        let _ = s.call(Call::Delete("x1"));
        let _ = s.call(Call::Delete("x1"));
        let _ = s.direct(Call::Delete("x1"));
    }
    s.end();
    Ok(())
}

fn exec_bad_id(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    for id in ["../x", "a/b", "", "t1"] {
        let spec = spec::script("true");
        let _ = s.call(Call::Exec(Box::new(NewExec { id, spec, ..Default::default() })));
    }
    s.end();
    Ok(())
}

fn exec_bad_spec(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    for spec in ["{", "[]", "{}", r#"{"args":["true"]}"#] {
        let _ = s.exec("x1", spec.into(), Default::default());
        let _ = s.call(Call::Delete("x1"));
    }
    s.end();
    Ok(())
}

fn exec_missing_program(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let log = s.log("x1.log");
    let _ = s.exec("x1", spec::process(&["/no/such/program"]).to_string(), log);
    let _ = s.call(Call::State("x1"));
    let _ = s.direct(Call::State("x1"));
    let _ = s.call(Call::Wait("x1"));
    let _ = s.direct(Call::Wait("x1"));
    let _ = s.call(Call::Kill("x1", 9));
    let _ = s.call(Call::Delete("x1"));
    let text = s.scratched("x1.log");
    s.note("what it printed", text);
    let _ = s.exec("x1", spec::script("exit 6"), Default::default());
    let _ = s.call(Call::Wait("x1"));
    s.end();
    Ok(())
}

/// A start that has failed, once more.
fn exec_missing_program_again(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", spec::process(&["/no/such/program"]).to_string(), Default::default());
    let _ = s.call(Call::Start("x1"));
    s.end();
    Ok(())
}

fn exec_not_executable(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", spec::process(&["/etc/passwd"]).to_string(), Default::default());
    let _ = s.call(Call::Delete("x1"));
    s.end();
    Ok(())
}

fn exec_in_created(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()))?;
    let started = s.exec("x1", spec::script("exit 6"), Default::default());
    if started.is_ok() {
        let _ = s.call(Call::Wait("x1"));
    }
    let _ = s.call(Call::Delete("x1"));
    let _ = s.call(Call::Start(""));
    s.end();
    Ok(())
}

fn exec_in_stopped(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::sh("exit 4")))?;
    let _ = s.call(Call::Wait(""));
    let _ = s.exec("x1", spec::script("true"), Default::default());
    let new = NewExec { id: "x1", spec: spec::script("true"), ..Default::default() };
    let _ = s.direct(Call::Exec(Box::new(new)));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn exec_started_twice(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", spec::script("sleep 1000"), Default::default());
    let _ = s.call(Call::Start("x1"));
    let _ = s.direct(Call::Start("x1"));
    let _ = s.call(Call::Kill("x1", 9));
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Start("x1"));
    let _ = s.direct(Call::Start("x1"));
    s.end();
    Ok(())
}

fn exec_never_started(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    for id in ["x1", "x2", "x3"] {
        let spec = spec::script("true");
        let _ = s.call(Call::Exec(Box::new(NewExec { id, spec, ..Default::default() })));
    }
    let _ = s.call(Call::Kill("x1", 9));
    let _ = s.direct(Call::Kill("x1", 9));
    let _ = s.call(Call::CloseIo("x1"));
    let _ = s.call(Call::Resize("x1", 80, 25));
    let _ = s.call(Call::Delete("x1"));
    let waiting = s.begin(Call::Wait("x2"), true);
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Start("x2"));
    let _ = s.direct(Call::Start("x2"));
    let _ = s.call(Call::State("x3"));
    // the one that waits for what never ran has to go with the container
    let _ = s.call(Call::Delete(""));
    s.ended("shim: wait for one that never ran", waiting);
    Ok(())
}

fn exec_killed(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", spec::script("sleep 1000"), Default::default());
    let _ = s.call(Call::Kill("x1", 99));
    let _ = s.direct(Call::Kill("x1", 99));
    let _ = s.call(Call::Kill("x1", 0));
    let _ = s.call(Call::Kill("x1", 9));
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Kill("x1", 9));
    let _ = s.direct(Call::Kill("x1", 9));
    let _ = s.call(Call::State(""));
    s.end();
    Ok(())
}

fn exec_unknown(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    for call in [
        Call::Start("x9"),
        Call::State("x9"),
        Call::Kill("x9", 9),
        Call::Delete("x9"),
        Call::Wait("x9"),
        Call::CloseIo("x9"),
        Call::Resize("x9", 80, 25),
    ] {
        let _ = s.call(call.clone());
        let _ = s.direct(call);
    }
    s.end();
    Ok(())
}

fn exec_delete_running(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", spec::script("sleep 1000"), Default::default());
    let _ = s.call(Call::Delete("x1"));
    let _ = s.direct(Call::Delete("x1"));
    let _ = s.call(Call::State("x1"));
    s.end();
    Ok(())
}

/// Its exit comes before that of the container's first process.
fn exec_ends_with_init(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", spec::script("sleep 1000"), Default::default());
    let waiting = s.begin(Call::Wait("x1"), false);
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Wait(""));
    s.ended("wait for x1", waiting);
    let _ = s.call(Call::State("x1"));
    let _ = s.call(Call::Delete("x1"));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn exec_exit_at_once(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    for id in ["x1", "x2", "x3"] {
        let _ = s.exec(id, spec::process(&["false"]).to_string(), Default::default());
        let _ = s.call(Call::Wait(id));
        let _ = s.call(Call::Delete(id));
    }
    s.end();
    Ok(())
}

/// What an exec leaves running belongs to the container.
fn exec_outlives_nobody(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let log = s.log("x1.log");
    let _ = s.exec("x1", spec::script("(sleep 1000 &) ; echo done"), log);
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Pids);
    s.end();
    Ok(())
}
