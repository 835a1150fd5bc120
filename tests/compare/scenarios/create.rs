//! A task's creation, what can be wrong with it, and a task that was created and never started.

use anyhow::Result;
use containerd_client::types::Mount;
use containerd_shim_protos::api;
use serde_json::json;

use crate::calls::{Call, Field};
use crate::left;
use crate::making::{Named, New};
use crate::spec::Spec;
use crate::subject::{ID, Subject};

list![
    life,
    by_path,
    as_runc,
    double_create,
    create_missing_program,
    create_not_executable,
    create_bad_spec,
    create_bad_mount,
    create_bad_options,
    created_killed,
    created_killed_then_started,
    created_deleted,
    created_asked,
    user_namespace,
    other_id_again,
];

/// Ends with 3 when it is asked to.
const POLITE: &str = "trap 'exit 3' TERM; sleep 1000 & echo ready; wait";

fn whole_life(s: &mut Subject, named: Named) -> Result<()> {
    let log = s.log("t1.log");
    let new = New { named, ..New::of(Spec::sh(POLITE)).stdio(log) };
    s.create(new)?;
    s.note_bundle("created");
    let _ = s.call(Call::State(""));
    let _ = s.direct(Call::State(""));
    let _ = s.call(Call::Start(""));
    s.until("it is ready", |s| s.scratched("t1.log").contains("ready"));
    s.note_bundle("running");
    let namespace = s.stage.side.namespace();
    let cgroups = left::cgroups(&s.host("/sys/fs/cgroup"), namespace);
    s.note("cgroups", cgroups.join(" "));
    let _ = s.call(Call::State(""));
    let _ = s.direct(Call::State(""));
    let _ = s.call(Call::Pids);
    let _ = s.direct(Call::Connect);
    let _ = s.call(Call::Kill("", 15));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::State(""));
    let _ = s.direct(Call::State(""));
    s.note_bundle("stopped");
    let _ = s.call(Call::Delete(""));
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    s.note_bundle("deleted");
    Ok(())
}

fn life(s: &mut Subject) -> Result<()> {
    whole_life(s, Named::Type)
}

fn by_path(s: &mut Subject) -> Result<()> {
    whole_life(s, Named::Path)
}

fn as_runc(s: &mut Subject) -> Result<()> {
    whole_life(s, Named::AsRunc)
}

fn double_create(s: &mut Subject) -> Result<()> {
    let new = New::of(Spec::idle());
    s.run(new.clone())?;
    s.create_task(&new, Vec::new());
    let request = api::CreateTaskRequest { id: ID.into(), bundle: s.bundle(ID), ..Default::default() };
    let shim = s.shim(ID).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let answer = s.stage.handle.block_on(shim.ask::<api::CreateTaskResponse>("Create", &request));
    let answer = answer.map(|a| vec![Field::Pid("pid", a.pid)]);
    let shown = crate::calls::shown(&answer, &s.normal);
    s.note("shim: create t1 again", shown);
    // the first one has taken no harm
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Pids);
    s.end();
    Ok(())
}

fn create_missing_program(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::run(&["/no/such/program"])))?;
    let _ = s.call(Call::State(""));
    s.note_bundle("refused");
    Ok(())
}

fn create_not_executable(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::run(&["/etc/passwd"])))?;
    let _ = s.call(Call::State(""));
    Ok(())
}

fn create_bad_spec(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle().with("/process/cwd", json!("not/absolute"))))?;
    Ok(())
}

fn create_bad_mount(s: &mut Subject) -> Result<()> {
    let mount = Mount { r#type: "nosuchfs".into(), source: "none".into(), ..Default::default() };
    s.create(New { rootfs: Some(vec![mount]), ..New::of(Spec::idle()) })?;
    Ok(())
}

fn create_bad_options(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()).options(crate::spec::any("containerd.runc.v1.Options", vec![0xff])))?;
    Ok(())
}

fn created_killed(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()))?;
    let _ = s.call(Call::Pids);
    s.end();
    Ok(())
}

fn created_killed_then_started(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()))?;
    let _ = s.call(Call::KillAll(9));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn created_deleted(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()))?;
    let waiting = s.begin(Call::Wait(""), true);
    let _ = s.call(Call::Delete(""));
    s.ended("shim: wait that was begun before", waiting);
    Ok(())
}

fn created_asked(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()))?;
    let _ = s.direct(Call::Pause);
    let _ = s.direct(Call::Resume);
    let _ = s.direct(Call::Checkpoint(Default::default()));
    let _ = s.direct(Call::Update("{}".into()));
    let _ = s.direct(Call::CloseIo(""));
    let _ = s.direct(Call::Stats);
    let _ = s.call(Call::Kill("", 0));
    s.end();
    Ok(())
}

fn user_namespace(s: &mut Subject) -> Result<()> {
    let log = s.log("t1.log");
    let spec =
        Spec::sh("cat /proc/self/uid_map; id -u; touch /tmp/f && stat -c %u /tmp/f; echo ready; sleep 1000");
    // root of the namespace may not read a bundle that is root's
    let options = super::options::encoded(&containerd_shim_protos::shim::oci::Options {
        io_uid: 100_000,
        io_gid: 100_000,
        ..Default::default()
    });
    s.create(New::of(spec.user_namespace(100_000)).stdio(log).options(options))?;
    let _ = s.call(Call::Start(""));
    s.until("it is ready", |s| s.scratched("t1.log").contains("ready"));
    let text = s.scratched("t1.log");
    s.note("what it says", text);
    let status = s.exec("x1", crate::spec::script("exit $(id -u)"), Default::default());
    if status.is_ok() {
        let _ = s.call(Call::Wait("x1"));
        let _ = s.call(Call::Delete("x1"));
    }
    s.end();
    Ok(())
}

/// The same id after a deletion.
fn other_id_again(s: &mut Subject) -> Result<()> {
    let new = New::of(Spec::idle());
    s.run(new.clone())?;
    s.end();
    let mounts = s.stage.handle.block_on(s.stage.namespace.snapshot_mounts("overlayfs", ID))?;
    s.create_task(&new, mounts);
    let _ = s.call(Call::Start(""));
    s.end();
    Ok(())
}
