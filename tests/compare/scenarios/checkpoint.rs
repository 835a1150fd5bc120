//! Checkpoints and restores as the Task API has them.

use anyhow::{Context, Result};
use containerd_client::types::Descriptor;

use crate::calls::{Call, Checkpoint, Field};
use crate::left;
use crate::making::{Named, New};
use crate::spec::Spec;
use crate::subject::{ID, Subject};

list![
    checkpoint_running,
    checkpoint_and_exit,
    checkpoint_paused,
    checkpoint_paused_and_exit,
    checkpoint_by_containerd,
    checkpoint_as_runc,
    checkpoint_of_others,
    checkpoint_bad,
    restore,
    restore_never_started,
    restore_bad,
];

/// Counts, so that it can be seen to go on.
const COUNTS: &str = "i=0; echo ready; while :; do i=$((i+1)); echo $i > /count; sleep 0.02; done";

fn count(s: &Subject) -> u64 {
    s.read(&format!("{}/rootfs/count", s.bundle(ID))).trim().parse().unwrap_or_default()
}

fn note_going_on(s: &mut Subject, when: &str) {
    let before = count(s);
    s.until(&format!("{when}: it goes on"), |s| count(s) > before);
}

/// containerd makes the folders that it passes.
fn folders(s: &Subject) -> Result<Checkpoint> {
    let (path, work) = (s.scratch("images"), s.scratch("work"));
    for dir in [&path, &work] {
        std::fs::create_dir_all(s.host(dir))?;
    }
    Ok(Checkpoint { path, work, ..Default::default() })
}

fn note_images(s: &mut Subject, c: &Checkpoint) {
    for (kind, dir) in [("image", &c.path), ("work", &c.work)] {
        let names: Vec<String> = left::entries(&s.host(dir)).into_keys().collect();
        // pages-1.img, mm-42.img: how many there are is the container's
        let mut names: Vec<String> =
            names.iter().map(|n| n.chars().filter(|c| !c.is_ascii_digit()).collect()).collect();
        names.dedup();
        s.note(format!("{kind} files"), names.join(" "));
    }
}

fn counting(s: &mut Subject) -> Result<()> {
    s.run_ready(counter())
}

/// A specification of its own: containerd does not store the same record twice when it checkpoints.
fn counter() -> Spec {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    Spec::sh(COUNTS).with("/annotations/compare.unique", now.to_string().into())
}

fn checkpoint_running(s: &mut Subject) -> Result<()> {
    counting(s)?;
    let c = folders(s)?;
    let _ = s.direct(Call::Checkpoint(Box::new(c.clone())));
    note_images(s, &c);
    let _ = s.call(Call::State(""));
    note_going_on(s, "afterwards");
    s.note_bundle("afterwards");
    s.end();
    Ok(())
}

fn checkpoint_and_exit(s: &mut Subject) -> Result<()> {
    counting(s)?;
    let c = Checkpoint { exit: true, ..folders(s)? };
    let waiting = s.begin(Call::Wait(""), false);
    let _ = s.direct(Call::Checkpoint(Box::new(c.clone())));
    note_images(s, &c);
    s.ended("wait that was begun before", waiting);
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Pids);
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn checkpoint_paused(s: &mut Subject) -> Result<()> {
    counting(s)?;
    let _ = s.call(Call::Pause);
    // no work folder of its own
    let c = Checkpoint { work: String::new(), ..folders(s)? };
    let _ = s.direct(Call::Checkpoint(Box::new(c.clone())));
    note_images(s, &c);
    let _ = s.call(Call::State(""));
    let before = count(s);
    std::thread::sleep(std::time::Duration::from_millis(100));
    s.note("it stands still", (count(s) == before).to_string());
    let _ = s.call(Call::Resume);
    note_going_on(s, "after the resume");
    s.end();
    Ok(())
}

fn checkpoint_paused_and_exit(s: &mut Subject) -> Result<()> {
    counting(s)?;
    let _ = s.call(Call::Pause);
    let c = Checkpoint { exit: true, ..folders(s)? };
    let waiting = s.begin(Call::Wait(""), false);
    let _ = s.direct(Call::Checkpoint(Box::new(c.clone())));
    s.ended("wait that was begun before", waiting);
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

/// containerd's own way: a folder of its own, and what is in it into the content store.
fn checkpoint_by_containerd(s: &mut Subject) -> Result<()> {
    counting(s)?;
    let _ = s.call(Call::Checkpoint(Default::default()));
    let _ = s.call(Call::State(""));
    // a folder that is named in the options
    let c = folders(s)?;
    let _ = s.call(Call::Checkpoint(Box::new(c.clone())));
    note_images(s, &c);
    s.end();
    Ok(())
}

/// A node that names our shim as runc's: containerd passes on what it knows of runc's options.
fn checkpoint_as_runc(s: &mut Subject) -> Result<()> {
    let log = s.log("t1.log");
    s.run(New { named: Named::AsRunc, ..New::of(counter()).stdio(log) })?;
    s.until("it is ready", |s| s.scratched("t1.log").contains("ready"));
    let c = folders(s)?;
    let _ = s.call(Call::Checkpoint(Box::new(c.clone())));
    note_images(s, &c);
    let _ = s.call(Call::State(""));
    s.end();
    Ok(())
}

fn checkpoint_of_others(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::sh(COUNTS)))?;
    let c = folders(s)?;
    let _ = s.direct(Call::Checkpoint(Box::new(c.clone())));
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Wait(""));
    let _ = s.direct(Call::Checkpoint(Box::new(c)));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn checkpoint_bad(s: &mut Subject) -> Result<()> {
    counting(s)?;
    let c = folders(s)?;
    let odd = Checkpoint { odd_options: Some("containerd.runc.v1.Options"), ..c.clone() };
    let _ = s.direct(Call::Checkpoint(Box::new(odd)));
    let odd = Checkpoint { odd_options: Some("no.such.Type"), ..c.clone() };
    let _ = s.direct(Call::Checkpoint(Box::new(odd)));
    let nowhere = Checkpoint { path: "/proc/no/such/folder".into(), ..c.clone() };
    let _ = s.direct(Call::Checkpoint(Box::new(nowhere)));
    // something that cannot be dumped: a session of an exec
    let _ = s.exec("x1", crate::spec::script("sleep 1000"), Default::default());
    let _ = s.direct(Call::Checkpoint(Box::new(c)));
    s.note_bundle("refused");
    let _ = s.call(Call::State(""));
    note_going_on(s, "afterwards");
    s.end();
    Ok(())
}

/// A checkpoint in containerd's store.
fn stored(s: &mut Subject) -> Result<Descriptor> {
    let ending = Checkpoint { exit: true, ..Default::default() };
    let lease = format!("compare-{}", std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos());
    let life = std::time::Duration::from_secs(600);
    let found = s.stage.handle.block_on(async {
        s.stage.namespace.lease_create(&lease, life).await?;
        let done = s.stage.daemon.checkpoint(ID, &ending, Some(&lease)).await;
        done.map_err(|e| anyhow::anyhow!("{e:?}"))
    })?;
    found.into_iter().find(|d| d.media_type.contains("criu.checkpoint")).context("no checkpoint in the store")
}

fn restore(s: &mut Subject) -> Result<()> {
    counting(s)?;
    s.until("it has counted", |s| count(s) > 3);
    let checkpoint = stored(s)?;
    let _ = s.call(Call::Wait(""));
    let before = count(s);
    let _ = s.call(Call::Delete(""));
    let mounts = s.stage.handle.block_on(s.stage.namespace.snapshot_mounts("overlayfs", ID))?;
    let log = s.log("t1.log");
    let new = New { checkpoint: Some(checkpoint), ..New::of(Spec::sh(COUNTS)).stdio(log) };
    s.create_task(&new, mounts);
    s.note_bundle("created");
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Stats);
    let _ = s.call(Call::Start(""));
    s.note("it goes on where it was", (count(s) >= before).to_string());
    note_going_on(s, "restored");
    s.note_bundle("restored");
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Stats);
    let _ = s.exec("x1", crate::spec::script("exit 6"), Default::default());
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Pause);
    let _ = s.call(Call::Resume);
    s.end();
    Ok(())
}

fn restore_never_started(s: &mut Subject) -> Result<()> {
    counting(s)?;
    let checkpoint = stored(s)?;
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    let mounts = s.stage.handle.block_on(s.stage.namespace.snapshot_mounts("overlayfs", ID))?;
    let new = New { checkpoint: Some(checkpoint), ..New::of(Spec::sh(COUNTS)) };
    s.create_task(&new, mounts);
    for call in [Call::Pause, Call::Resume, Call::Kill("", 9), Call::Pids, Call::Update("{}".into())] {
        let _ = s.direct(call);
    }
    let _ = s.exec("x1", crate::spec::script("exit 6"), Default::default());
    let _ = s.call(Call::Delete(""));
    Ok(())
}

/// The images are no images.
fn restore_bad(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let shim = s.shim(ID).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let images = s.scratch("images");
    std::fs::create_dir_all(s.host(&images))?;
    std::fs::write(s.host(&images).join("inventory.img"), "nonsense")?;
    // another container in the same shim, whose bundle is made by hand
    let bundle = s.scratch("bundle");
    let mounts = super::program::bundle_by_hand(s, &bundle, "t2", &Spec::sh(COUNTS))?;
    let request = containerd_shim_protos::api::CreateTaskRequest {
        id: "t2".into(),
        bundle: bundle.clone(),
        rootfs: mounts,
        checkpoint: images,
        ..Default::default()
    };
    let asked = shim.ask::<containerd_shim_protos::api::CreateTaskResponse>("Create", &request);
    let outcome = s.stage.handle.block_on(asked).map(|a| vec![Field::Pid("pid", a.pid)]);
    let shown = crate::calls::shown(&outcome, &s.normal);
    s.note("shim: create t2", shown);
    for call in [Call::State(""), Call::Start(""), Call::State(""), Call::Delete(""), Call::Delete("")] {
        let name = format!("shim: {}", call.name("t2"));
        let outcome = s.stage.handle.block_on(shim.call("t2", call));
        let shown = crate::calls::shown(&outcome, &s.normal);
        s.note(name, shown);
    }
    super::program::remove_by_hand(s, "t2")?;
    s.end();
    Ok(())
}
