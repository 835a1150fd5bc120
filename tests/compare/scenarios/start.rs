//! Starts, and ends that come at once; waiting for an end.

use anyhow::Result;

use crate::calls::Call;
use crate::making::New;
use crate::spec::Spec;
use crate::subject::Subject;

list![
    double_start,
    start_after_exit,
    start_deleted,
    exit_at_once,
    exit_at_once_uncollected,
    killed_by_a_signal,
    wait_many,
    wait_after_exit,
    wait_unknown,
    delete_running,
];

fn double_start(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.call(Call::Start(""));
    let _ = s.direct(Call::Start(""));
    let _ = s.call(Call::State(""));
    s.end();
    Ok(())
}

fn start_after_exit(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::sh("exit 4")))?;
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Start(""));
    let _ = s.direct(Call::Start(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn start_deleted(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::sh("exit 4")))?;
    let _ = s.call(Call::Wait(""));
    // the shim lives as long as containerd has not been told
    let _ = s.direct(Call::Delete(""));
    for call in [
        Call::Start(""),
        Call::State(""),
        Call::Delete(""),
        Call::Kill("", 9),
        Call::Pause,
        Call::Resume,
        Call::Pids,
        Call::Stats,
        Call::Wait(""),
        Call::CloseIo(""),
        Call::Resize("", 80, 25),
        Call::Update("{}".into()),
        Call::Connect,
    ] {
        let _ = s.direct(call);
    }
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn exit_at_once(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::run(&["true"])))?;
    let waiting = s.begin(Call::Wait(""), false);
    let _ = s.call(Call::Start(""));
    s.ended("wait that was begun before", waiting);
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

/// Nobody waits, and nobody deletes for a while.
fn exit_at_once_uncollected(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::sh("exit 255")))?;
    s.until("its exit is told", |s| s.heard("/tasks/exit"));
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Pids);
    let _ = s.direct(Call::Stats);
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn killed_by_a_signal(s: &mut Subject) -> Result<()> {
    // a process 1 takes no signal without a handler from itself
    s.run(New::of(Spec::sh("ulimit -c 0; kill -SEGV $$; sleep 9").no_pid_namespace()))?;
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn wait_many(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let waiting: Vec<_> = (0..12).map(|n| s.begin(Call::Wait(""), n % 2 == 0)).collect();
    let _ = s.call(Call::Kill("", 9));
    for wait in waiting {
        s.ended("one of many waits", wait);
    }
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn wait_after_exit(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::sh("exit 4")))?;
    s.until("its exit is told", |s| s.heard("/tasks/exit"));
    let _ = s.call(Call::Wait(""));
    let _ = s.direct(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    let _ = s.call(Call::Wait(""));
    Ok(())
}

fn wait_unknown(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.call(Call::Wait("x9"));
    let _ = s.direct(Call::Wait("x9"));
    let _ = s.call_for("t9", Call::Wait(""));
    s.end();
    Ok(())
}

fn delete_running(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.call(Call::Delete(""));
    let _ = s.direct(Call::Delete(""));
    let _ = s.call(Call::State(""));
    s.end();
    Ok(())
}
