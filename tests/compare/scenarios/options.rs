//! The runtime's options: runc's own, and the general kind that containerd passes to runtimes that it does not know.

use std::os::unix::fs::PermissionsExt;

use anyhow::Result;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::Options;
use prost_types::Any;

use crate::calls::{Call, Checkpoint};
use crate::making::New;
use crate::spec::{self, Spec};
use crate::subject::Subject;

list![
    what_runc_is_told,
    binary_missing,
    another_root,
    no_pivot_and_keyring,
    owner_of_the_pipes,
    systemd_without_systemd,
    shim_cgroup_missing,
    generic_body,
    generic_path,
    generic_bad,
];

/// runc's options as a message.
pub fn encoded(options: &Options) -> Any {
    spec::any(spec::RUNC_OPTIONS, options.write_to_bytes().unwrap_or_default())
}

/// `runtimeoptions.v1.Options`: config_path is field 2, config_body field 3.
fn generic(field: u8, text: &str) -> Any {
    let mut bytes = vec![field << 3 | 2, text.len() as u8];
    bytes.extend_from_slice(text.as_bytes());
    spec::any(spec::GENERIC_OPTIONS, bytes)
}

/// A runc that writes down what it is told.
fn wrapper(s: &Subject) -> Result<String> {
    let path = s.scratch("runc");
    let script = format!("#!/bin/sh\necho \"$*\" >> {}\nexec runc \"$@\"\n", s.scratch("told"));
    std::fs::write(s.host(&path), script)?;
    std::fs::set_permissions(s.host(&path), std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn note_told(s: &mut Subject) {
    let text = s.scratched("told");
    for line in text.lines() {
        // what comes before the verb is the same for all of them
        let words: Vec<&str> = line.split(' ').collect();
        let verb = words.iter().position(|w| !w.starts_with("--") && VERBS.contains(w)).unwrap_or(0);
        s.note(format!("runc {}, in front", words[verb]), words[..verb].join(" "));
        s.note(format!("runc {}", words[verb]), words[verb + 1..].join(" "));
    }
}

const VERBS: [&str; 12] = [
    "create",
    "start",
    "state",
    "exec",
    "kill",
    "delete",
    "pause",
    "resume",
    "update",
    "ps",
    "checkpoint",
    "restore",
];

fn what_runc_is_told(s: &mut Subject) -> Result<()> {
    let binary_name = wrapper(s)?;
    let (stdio, streams) = s.fifos("t1", true, true)?;
    let options = encoded(&Options { binary_name, ..Default::default() });
    s.run(New::of(Spec::idle().terminal()).stdio(stdio).options(options))?;
    let _ = s.exec("x1", spec::script("exit 3"), Default::default());
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Delete("x1"));
    let _ = s.call(Call::Pids);
    let _ = s.call(Call::Pause);
    let _ = s.call(Call::Resume);
    let _ = s.call(Call::Update(r#"{"pids":{"limit":50}}"#.into()));
    // a terminal without the leave for it: it fails, the same way
    let (path, work) = (s.scratch("images"), s.scratch("work"));
    let _ = s.direct(Call::Checkpoint(Box::new(Checkpoint { path, work, ..Default::default() })));
    let _ = s.call(Call::KillAll(15));
    s.end();
    drop(streams);
    note_told(s);
    Ok(())
}

fn binary_missing(s: &mut Subject) -> Result<()> {
    let options = Options { binary_name: "/no/such/runc".into(), ..Default::default() };
    s.create(New::of(Spec::idle()).options(encoded(&options)))?;
    Ok(())
}

fn another_root(s: &mut Subject) -> Result<()> {
    s.roots.push("/run/compare-root");
    let options = Options { root: "/run/compare-root".into(), ..Default::default() };
    s.run(New::of(Spec::idle()).options(encoded(&options)))?;
    s.note_bundle("running");
    let there = s.host("/run/compare-root").join(s.stage.side.namespace()).join("t1/state.json").exists();
    s.note("runc's state is there", there.to_string());
    s.end();
    std::fs::remove_dir(s.host("/run/compare-root").join(s.stage.side.namespace()))?;
    Ok(())
}

fn no_pivot_and_keyring(s: &mut Subject) -> Result<()> {
    let binary_name = wrapper(s)?;
    let options = Options { binary_name, no_pivot_root: true, no_new_keyring: true, ..Default::default() };
    s.create(New::of(Spec::idle()).options(encoded(&options)))?;
    s.note_bundle("created");
    let _ = s.call(Call::Start(""));
    s.end();
    note_told(s);
    Ok(())
}

fn owner_of_the_pipes(s: &mut Subject) -> Result<()> {
    let options = Options { io_uid: 1234, io_gid: 2345, ..Default::default() };
    let (stdio, streams) = s.fifos("t1", true, false)?;
    let script = "for f in 0 1 2; do stat -L -c '%u %g %a %F' /proc/self/fd/$f; done; echo ready; sleep 1000";
    s.run(New::of(Spec::sh(script)).stdio(stdio).options(encoded(&options)))?;
    s.until("it is ready", |_| streams.stdout.text().contains("ready"));
    // a uid has four digits and means something here
    s.record.note("its pipes", streams.stdout.text().replace('\n', "|"));
    let (stdio, streams) = s.fifos("x1", true, false)?;
    let _ = s.exec("x1", spec::script(&script.replace("; sleep 1000", "")), stdio);
    let _ = s.call(Call::Wait("x1"));
    s.record.note("an exec's pipes", streams.stdout.finish());
    s.end();
    Ok(())
}

fn systemd_without_systemd(s: &mut Subject) -> Result<()> {
    let options = Options { systemd_cgroup: true, ..Default::default() };
    s.create(New::of(Spec::idle()).options(encoded(&options)))?;
    Ok(())
}

fn shim_cgroup_missing(s: &mut Subject) -> Result<()> {
    let options = Options { shim_cgroup: "/no-such-cgroup".into(), ..Default::default() };
    s.create(New::of(Spec::idle()).options(encoded(&options)))?;
    s.end();
    Ok(())
}

fn generic_body(s: &mut Subject) -> Result<()> {
    let toml = format!("BinaryName = \"{}\"\n", wrapper(s)?);
    s.create(New::of(Spec::idle()).options(generic(3, &toml)))?;
    let _ = s.call(Call::Start(""));
    s.end();
    note_told(s);
    Ok(())
}

fn generic_path(s: &mut Subject) -> Result<()> {
    let toml = format!("BinaryName = \"{}\"\n", wrapper(s)?);
    let path = s.scratch("options.toml");
    std::fs::write(s.host(&path), toml)?;
    s.create(New::of(Spec::idle()).options(generic(2, &path)))?;
    let _ = s.call(Call::Start(""));
    s.end();
    note_told(s);
    Ok(())
}

fn generic_bad(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()).options(generic(3, "= nonsense")))?;
    Ok(())
}
