//! Signals, and who gets them.

use anyhow::Result;

use crate::calls::Call;
use crate::making::New;
use crate::spec::Spec;
use crate::subject::{ID, Subject};

list![
    kill_dead,
    kill_bad_signal,
    kill_by_number,
    kill_all,
    kill_all_shared_pids,
    end_without_pid_namespace,
    kill_unknown_container,
];

fn kill_dead(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::sh("exit 4")))?;
    let _ = s.call(Call::Wait(""));
    for call in [Call::Kill("", 15), Call::Kill("", 9), Call::KillAll(9)] {
        let _ = s.call(call.clone());
        let _ = s.direct(call);
    }
    let _ = s.call(Call::Delete(""));
    let _ = s.call(Call::Kill("", 9));
    Ok(())
}

fn kill_bad_signal(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    for signal in [0, 99, 1000] {
        let _ = s.call(Call::Kill("", signal));
        let _ = s.direct(Call::Kill("", signal));
    }
    let _ = s.call(Call::State(""));
    s.end();
    Ok(())
}

fn kill_by_number(s: &mut Subject) -> Result<()> {
    s.run_ready(Spec::sh(
        // a signal in the middle of a foreground command is lost by busybox's shell now and then
        "trap 'exit 21' USR1; trap 'echo hup' HUP; sleep 1000 & echo ready; wait; wait",
    ))?;
    let _ = s.call(Call::Kill("", 1));
    s.until("it has heard", |s| s.scratched("t1.log").contains("hup"));
    let _ = s.call(Call::Kill("", 10));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn kill_all(s: &mut Subject) -> Result<()> {
    s.run_ready(Spec::sh("trap 'exit 5' TERM; sleep 1000 & sleep 1000 & echo ready; wait; wait"))?;
    let _ = s.call(Call::Pids);
    let _ = s.call(Call::KillAll(15));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn kill_all_shared_pids(s: &mut Subject) -> Result<()> {
    s.run_ready(Spec::sh("sleep 1000 & sleep 1000 & echo ready; wait").no_pid_namespace())?;
    let _ = s.exec("x1", crate::spec::script("sleep 1000"), Default::default());
    let waiting = s.begin(Call::Wait("x1"), false);
    let _ = s.call(Call::KillAll(9));
    let _ = s.call(Call::Wait(""));
    s.ended("wait for x1", waiting);
    let _ = s.call(Call::Delete(""));
    Ok(())
}

/// No kernel ends its other processes with it: the shim has to.
fn end_without_pid_namespace(s: &mut Subject) -> Result<()> {
    s.run_ready(Spec::sh("sleep 1000 & sleep 1000 & echo ready; wait").no_pid_namespace())?;
    let _ = s.call(Call::Pids);
    let _ = s.exec("x1", crate::spec::script("sleep 1000 & wait"), Default::default());
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Delete("x1"));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn kill_unknown_container(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    // the shim of t1 is asked for another one
    let shim = s.shim(ID).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    for call in [
        Call::Kill("", 9),
        Call::Start(""),
        Call::Delete(""),
        Call::State(""),
        Call::Pause,
        Call::Resume,
        Call::Pids,
        Call::Stats,
        Call::Wait(""),
        Call::CloseIo(""),
        Call::Resize("", 80, 25),
        Call::Update("{}".into()),
        Call::Checkpoint(Default::default()),
        Call::Connect,
    ] {
        let name = format!("shim: {}", call.name("t9"));
        let _ = s.call_for("t9", call.clone());
        let outcome = s.stage.handle.block_on(shim.call("t9", call));
        let shown = crate::calls::shown(&outcome, &s.normal).replace(ID, "t9");
        s.note(name, shown);
    }
    s.end();
    Ok(())
}
