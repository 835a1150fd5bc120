//! Freezing and thawing, and what can be done to a frozen container.

use anyhow::Result;

use crate::bed::patient;
use crate::calls::{Call, NewExec};
use crate::making::New;
use crate::spec::{self, Spec};
use crate::subject::Subject;

list![
    pause_and_resume,
    pause_twice,
    resume_running,
    pause_created,
    pause_stopped,
    paused_killed,
    paused_killed_all,
    paused_deleted,
    paused_exec,
    paused_others,
];

fn pause_and_resume(s: &mut Subject) -> Result<()> {
    s.run_ready(Spec::sh("trap 'echo heard' USR1; sleep 1000 & echo ready; wait; wait"))?;
    let _ = s.call(Call::Pause);
    let _ = s.call(Call::State(""));
    let _ = s.direct(Call::State(""));
    // it hears of it when it goes on
    let _ = s.call(Call::Kill("", 10));
    std::thread::sleep(std::time::Duration::from_millis(100));
    let text = s.scratched("t1.log");
    s.note("while paused", text);
    let _ = s.call(Call::Resume);
    let _ = s.call(Call::State(""));
    s.until("it has heard", |s| s.scratched("t1.log").contains("heard"));
    s.end();
    Ok(())
}

fn pause_twice(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.call(Call::Pause);
    let _ = s.call(Call::Pause);
    let _ = s.direct(Call::Pause);
    let _ = s.call(Call::Resume);
    let _ = s.call(Call::Resume);
    s.end();
    Ok(())
}

fn resume_running(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.call(Call::Resume);
    let _ = s.direct(Call::Resume);
    s.end();
    Ok(())
}

fn pause_created(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()))?;
    let _ = s.call(Call::Pause);
    let _ = s.call(Call::Resume);
    let _ = s.call(Call::Start(""));
    s.end();
    Ok(())
}

fn pause_stopped(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::sh("exit 4")))?;
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Pause);
    let _ = s.direct(Call::Pause);
    let _ = s.call(Call::Resume);
    let _ = s.direct(Call::Resume);
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn paused_killed(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.call(Call::Pause);
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn paused_killed_all(s: &mut Subject) -> Result<()> {
    s.run_ready(Spec::sh("sleep 1000 & echo ready; wait").no_pid_namespace())?;
    let _ = s.call(Call::Pause);
    // on cgroup v1 the signal waits with them, on v2 they end
    let _ = s.call(Call::KillAll(9));
    std::thread::sleep(patient(std::time::Duration::from_millis(200)));
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Resume);
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn paused_deleted(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.call(Call::Pause);
    let _ = s.call(Call::Delete(""));
    let _ = s.direct(Call::Delete(""));
    let _ = s.call(Call::Resume);
    s.end();
    Ok(())
}

fn paused_exec(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", spec::script("sleep 1000"), Default::default());
    let described = NewExec { id: "x2", spec: spec::script("exit 3"), ..Default::default() };
    let _ = s.call(Call::Exec(Box::new(described)));
    let _ = s.call(Call::Pause);
    for exec in ["x1", "x2"] {
        let _ = s.call(Call::State(exec));
        let _ = s.direct(Call::State(exec));
    }
    let _ = s.exec("x3", spec::script("true"), Default::default());
    let new = NewExec { id: "x3", spec: spec::script("true"), ..Default::default() };
    let _ = s.direct(Call::Exec(Box::new(new)));
    let _ = s.call(Call::Start("x2"));
    let _ = s.call(Call::Resume);
    let _ = s.call(Call::State("x1"));
    let _ = s.call(Call::State("x2"));
    s.end();
    Ok(())
}

fn paused_others(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.call(Call::Pause);
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::Update(r#"{"pids":{"limit":50}}"#.into()));
    let _ = s.call(Call::Pids);
    let _ = s.call(Call::Stats);
    let _ = s.call(Call::Resume);
    s.end();
    Ok(())
}
