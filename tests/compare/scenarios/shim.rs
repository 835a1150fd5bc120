//! The shim as a process: who it serves, when it ends, and what becomes of its containers when it is killed.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::bed::Node;
use crate::calls::{Call, Field};
use crate::making::New;
use crate::spec::Spec;
use crate::subject::{ID, Subject};

list![
    connect,
    shutdown_with_containers,
    shutdown_after_delete,
    shim_of_a_group,
    shim_killed,
    shim_terminated,
    unknown_method
];

/// The pid of the usual container's shim.
fn shim_pid(s: &mut Subject) -> u32 {
    let fields = s.direct(Call::Connect).unwrap_or_default();
    fields
        .into_iter()
        .find_map(|f| if let Field::Pid("shim", pid) = f { Some(pid) } else { None })
        .unwrap_or(0)
}

fn connect(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()))?;
    let _ = s.direct(Call::Connect);
    let _ = s.call(Call::Start(""));
    let _ = s.direct(Call::Connect);
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Wait(""));
    let _ = s.direct(Call::Connect);
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn shutdown_with_containers(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.direct(Call::Shutdown(false));
    let _ = s.direct(Call::Shutdown(true));
    std::thread::sleep(std::time::Duration::from_millis(200));
    let _ = s.direct(Call::Connect);
    let _ = s.call(Call::State(""));
    s.end();
    Ok(())
}

/// containerd is not told of the deletion: the shim waits for it.
fn shutdown_after_delete(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::sh("exit 3")))?;
    let _ = s.call(Call::Wait(""));
    let _ = s.direct(Call::Delete(""));
    let process = s.host("/proc").join(shim_pid(s).to_string());
    let _ = s.direct(Call::Shutdown(false));
    s.until("its socket is gone", |s| {
        crate::shim::Address::of_bundle(&s.host(&s.bundle(ID))).map_or(true, |a| !s.host(&a.path).exists())
    });
    s.until("it has ended", |_| !process.exists());
    // containerd answers in other words until it has done with it, which ends with the bundle and then its list
    s.until("containerd has noticed", |s| !s.host(&s.bundle(ID)).exists());
    std::thread::sleep(Duration::from_millis(200));
    let _ = s.call(Call::State(""));
    Ok(())
}

/// Containers of one sandbox have one shim, which ends with the last of them.
fn shim_of_a_group(s: &mut Subject) -> Result<()> {
    for annotation in ["io.kubernetes.cri.sandbox-id", "io.containerd.runc.v2.group"] {
        let grouped = || Spec::idle().with("/annotations", json!({ annotation: "t1" }));
        let ids: [&str; 3] = if annotation.contains("cri") { ["t1", "t2", "t3"] } else { ["g1", "g2", "g3"] };
        for id in ids {
            s.run(New::of(grouped()).id(id))?;
            let _ = s.direct_for(id, Call::Connect);
        }
        for id in [ids[2], ids[0], ids[1]] {
            let _ = s.call_for(id, Call::Kill("", 9));
            let _ = s.call_for(id, Call::Wait(""));
            let _ = s.call_for(id, Call::Delete(""));
            let _ = s.call_for(ids[1], Call::State(""));
        }
    }
    Ok(())
}

fn shim_killed(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.exec("x1", crate::spec::script("sleep 1000"), Default::default());
    let waiting = s.begin(Call::Wait(""), false);
    let pid = shim_pid(s);
    s.bed.ok(Node::A, &["kill", "-9", &pid.to_string()])?;
    s.until("its end is told", |s| s.heard("/tasks/exit"));
    s.until("its deletion is told", |s| s.heard("/tasks/delete"));
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    s.note("the wait that was begun before has ended", waiting.is_finished().to_string());
    waiting.abort();
    s.note_bundle("afterwards");
    // the same again is as new
    let mounts = s.stage.handle.block_on(s.stage.namespace.snapshot_mounts("overlayfs", ID))?;
    s.create_task(&New::of(Spec::sh("exit 3")), mounts);
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn shim_terminated(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let pid = shim_pid(s);
    s.bed.ok(Node::A, &["kill", "-15", &pid.to_string()])?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    let alive = s.bed.run(Node::A, &["kill", "-0", &pid.to_string()])?.status.success();
    s.note("it lives on", alive.to_string());
    let _ = s.call(Call::State(""));
    s.end();
    Ok(())
}

fn unknown_method(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let shim = s.shim(ID).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let request = containerd_shim_protos::api::StateRequest { id: ID.into(), ..Default::default() };
    let asked = shim.ask::<containerd_shim_protos::api::Empty>("NoSuchMethod", &request);
    let outcome = s.stage.handle.block_on(asked).map(|_| Vec::new());
    let shown = crate::calls::shown(&outcome, &s.normal);
    s.note("shim: no such method", shown);
    s.end();
    Ok(())
}
