//! The shim's program as containerd runs it: its actions and flags.

use std::time::Duration;

use anyhow::{Context, Result};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use containerd_shim_protos::types::mount::Mount;

use crate::bed::{Containerd, Node, wait_for};
use crate::calls::{Call, Field, Outcome, time};
use crate::left;
use crate::shim::Address;
use crate::spec::{self, Spec};
use crate::streams::Reader;
use crate::subject::Subject;

list![
    version_flag,
    info,
    info_with_options,
    wrong_use,
    start_action,
    start_action_without_bundle,
    delete_action
];

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The line with which containerd calls the shim's program, in the folder of a bundle.
fn line(s: &Subject, id: &str, action: &str) -> String {
    let opt = std::env::var("TRANSSHIP_OPT").unwrap_or_else(|_| "/opt/transship".into());
    let containerd = format!("{opt}/containerd-{}/bin/containerd", s.bed.containerd().version());
    let socket = "/run/containerd/containerd.sock";
    format!(
        "TTRPC_ADDRESS={socket}.ttrpc GRPC_ADDRESS={socket} NAMESPACE={ns} MAX_SHIM_VERSION=2 exec {program} -namespace {ns} \
         -address {socket} -publish-binary {containerd} -id {id} {action}",
        ns = s.stage.side.namespace(),
        program = s.program(),
    )
}

/// A bundle that containerd knows nothing of; the mounts of its root.
pub fn bundle_by_hand(s: &mut Subject, bundle: &str, id: &str, spec: &Spec) -> Result<Vec<Mount>> {
    std::fs::create_dir_all(s.host(bundle).join("rootfs"))?;
    std::fs::write(s.host(bundle).join("config.json"), spec.json(s.stage.side.namespace(), id))?;
    // no record refers to it: without the label containerd collects it at any moment
    let root = [("containerd.io/gc.root".to_owned(), id.to_owned())].into();
    let made = s.stage.namespace.snapshot_prepare("overlayfs", id, &s.stage.parent, root);
    let mounts = s.stage.handle.block_on(made)?;
    let mount = |m: containerd_client::types::Mount| Mount {
        type_: m.r#type,
        source: m.source,
        target: m.target,
        options: m.options,
        ..Default::default()
    };
    Ok(mounts.into_iter().map(mount).collect())
}

/// Removes the snapshot of [`bundle_by_hand`].
pub fn remove_by_hand(s: &mut Subject, id: &str) -> Result<()> {
    s.stage.handle.block_on(s.stage.namespace.snapshot_remove("overlayfs", id))
}

fn version_flag(s: &mut Subject) -> Result<()> {
    let output = s.command("-v", &format!("exec {} -v", s.program()))?;
    for line in text(&output.stdout).lines() {
        let key = line.split(':').next().unwrap_or_default().trim();
        s.note(format!("-v: {key}"), line);
    }
    Ok(())
}

fn note_info(s: &mut Subject, bytes: &[u8]) {
    let info = RuntimeInfo::parse_from_bytes(bytes).unwrap_or_default();
    s.note("name", info.name);
    s.note("version", &info.version.version);
    s.note("options", format!("{} {:?}", info.options.type_url, info.options.value));
    s.note("type of the features", &info.features.type_url);
    let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap_or_default();
    for (key, value) in features.as_object().into_iter().flatten() {
        s.note(format!("feature {key}"), value.to_string());
    }
    for (key, value) in info.annotations {
        s.note(format!("annotation {key}"), value);
    }
}

/// containerd 1.7 does not ask, and its own shim does not know the flag.
fn asked(s: &Subject) -> bool {
    s.bed.containerd() != Containerd::V17
}

fn info(s: &mut Subject) -> Result<()> {
    if !asked(s) {
        return Ok(());
    }
    let output = s.command("-info", &format!("exec {} -info < /dev/null", s.program()))?;
    note_info(s, &output.stdout);
    Ok(())
}

fn info_with_options(s: &mut Subject) -> Result<()> {
    if !asked(s) {
        return Ok(());
    }
    for binary_name in ["runc", "/no/such/runc", "/bin/false"] {
        let options = Options { binary_name: binary_name.into(), ..Default::default() };
        let any = containerd_shim_protos::protobuf::well_known_types::any::Any {
            type_url: spec::RUNC_OPTIONS.into(),
            value: options.write_to_bytes()?,
            ..Default::default()
        };
        let file = s.scratch("options");
        std::fs::write(s.host(&file), any.write_to_bytes()?)?;
        let output =
            s.command(&format!("-info of {binary_name}"), &format!("exec {} -info < {file}", s.program()))?;
        note_info(s, &output.stdout);
    }
    Ok(())
}

fn wrong_use(s: &mut Subject) -> Result<()> {
    let program = s.program();
    for (name, args) in [
        ("no flags", ""),
        ("no namespace", "-id t1 start"),
        ("an unknown flag", "-no-such-flag"),
        ("delete in no bundle", "-namespace nowhere -id t1 delete"),
    ] {
        let output = s.command(name, &format!("cd / && exec {program} {args} < /dev/null"))?;
        s.note(format!("{name}: stdout"), text(&output.stdout).is_empty().to_string());
    }
    Ok(())
}

/// Runs an action in a bundle; what it prints. Its streams are no pipe that its children could hold.
fn action(s: &mut Subject, name: &str, bundle: &str, line: &str) -> Result<Vec<u8>> {
    let out = s.scratch("action-out");
    let script = format!("cd {bundle} && {line} < /dev/null > {out}");
    let output = s.bed.run(Node::A, &["sh", "-c", &script])?;
    s.note(format!("{name}: status"), format!("{:?}", output.status.code()));
    // warnings may be there or not; after a failure it is what containerd shows
    if !output.status.success() {
        s.note(format!("{name}: stderr"), text(&output.stderr));
    }
    Ok(std::fs::read(s.host(&out))?)
}

fn note_outcome(s: &mut Subject, name: &str, outcome: Outcome) {
    let shown = crate::calls::shown(&outcome, &s.normal);
    s.note(name, shown);
}

fn start_action(s: &mut Subject) -> Result<()> {
    let bundle = s.scratch("hand/h1");
    bundle_by_hand(s, &bundle, "h1", &Spec::idle())?;
    let log = Reader::make(&s.host(&bundle).join("log"))?;
    let line = line(s, "h1", "start");
    let first = text(&action(s, "start", &bundle, &line)?);
    note_answer(s, &first);
    for (name, kind) in left::entries(&s.host(&bundle)) {
        s.note(format!("bundle/{name}"), kind);
    }
    let address = Address::parse(&first);
    s.note(
        "a word of the address file",
        s.read(&format!("{bundle}/address")).starts_with("unix://").to_string(),
    );
    let shim = s.connect(&address).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let outcome = s.stage.handle.block_on(shim.call("h1", Call::Connect));
    for field in outcome.iter().flatten() {
        if let Field::Pid("shim", pid) = field {
            s.normal.name_pid(*pid, "shim");
            let adj = s.bed.sh(Node::A, &format!("cat /proc/{pid}/oom_score_adj; readlink /proc/{pid}/cwd; tr '\\0' ' ' < /proc/{pid}/cmdline"))?;
            s.note("the shim's oom_score_adj, folder and line", adj.replace('\n', "|"));
        }
    }
    note_outcome(s, "connect", outcome);
    // a second start finds the first one's shim
    let second = text(&action(s, "second start", &bundle, &line)?);
    s.note("both starts answer the same", (first == second).to_string());
    let outcome = s.stage.handle.block_on(shim.call("h1", Call::Shutdown(false)));
    note_outcome(s, "shutdown", outcome);
    let socket = s.host(&address.path);
    s.until("its socket is gone", |_| !socket.exists());
    drop(log);
    remove_by_hand(s, "h1")
}

fn start_action_without_bundle(s: &mut Subject) -> Result<()> {
    let bundle = s.scratch("hand/h1");
    std::fs::create_dir_all(s.host(&bundle))?;
    let line = line(s, "h1", "start");
    let out = action(s, "start", &bundle, &line)?;
    s.note("stdout is empty", out.is_empty().to_string());
    Ok(())
}

/// What `start` answers, field by field: JSON, or an address alone.
fn note_answer(s: &mut Subject, answer: &str) {
    let json: serde_json::Value = serde_json::from_str(answer).unwrap_or_else(|_| answer.into());
    match json {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                s.note(format!("the answer's {name}"), value.to_string());
            }
        }
        other => s.note("the answer", other.to_string()),
    }
}

/// A container whose shim is killed, cleaned up by the program's `delete` as containerd would have it.
fn delete_action(s: &mut Subject) -> Result<()> {
    let bundle = s.scratch("hand/h1");
    let rootfs = bundle_by_hand(s, &bundle, "h1", &Spec::idle())?;
    let log = Reader::make(&s.host(&bundle).join("log"))?;
    let start = line(s, "h1", "start");
    let started = text(&action(s, "start", &bundle, &start)?);
    let shim = s.connect(&Address::parse(&started)).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let request =
        api::CreateTaskRequest { id: "h1".into(), bundle: bundle.clone(), rootfs, ..Default::default() };
    let created = s.stage.handle.block_on(shim.ask::<api::CreateTaskResponse>("Create", &request));
    let pid = created.map_err(|e| anyhow::anyhow!("{e:?}"))?.pid;
    s.normal.name_pid(pid, "h1");
    let outcome = s.stage.handle.block_on(shim.call("h1", Call::Start("")));
    note_outcome(s, "start h1", outcome);
    let connected =
        s.stage.handle.block_on(shim.call("h1", Call::Connect)).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let own = connected.iter().find_map(|f| if let Field::Pid("shim", pid) = f { Some(*pid) } else { None });
    s.bed.ok(Node::A, &["kill", "-9", &own.context("the shim's pid")?.to_string()])?;
    let delete =
        format!("{} ", line(s, "h1", "delete")).replace("-id h1", &format!("-bundle {bundle} -id h1"));
    let answer = action(s, "delete", &bundle, delete.trim())?;
    let response = api::DeleteResponse::parse_from_bytes(&answer)?;
    let at = time(response.exited_at.as_ref().map(|t| t.seconds));
    // the socket is nobody's now
    let socket = s.host(&Address::parse(&started).path);
    s.note("its socket is left", socket.exists().to_string());
    let _ = std::fs::remove_file(socket);
    s.note("its answer", format!("pid={} exit={} at={at}", s.normal.pid(response.pid), response.exit_status));
    let proc = s.host("/proc").join(pid.to_string());
    wait_for(Duration::from_secs(5), "the container's end", || Ok(!proc.exists()))?;
    for (name, kind) in left::entries(&s.host(&bundle)) {
        s.note(format!("bundle/{name}"), kind);
    }
    // once more: nothing is left to delete
    let answer = action(s, "delete again", &bundle, delete.trim())?;
    s.note("answers again", (!answer.is_empty()).to_string());
    drop(log);
    remove_by_hand(s, "h1")
}
