//! The list of containers under transship, and the versions of this node's parts.

use std::collections::HashMap;

use anyhow::Result;

use super::{
    Agent,
    api::{ErrorReport, ExitCode, PsEntry, Reply, VersionReport},
    departed::Departed,
    host::HostFacts,
    message::VERSIONS,
    placed::Placed,
};
use crate::{
    containerd::{Containerd, record::Record, task::Task},
    control::{self, Inspected, MigrationState},
    migrate::{loss::megabytes, tuning::OnPostCopyFailure},
};

/// Of one that has moved.
const LEAVING: &str = "runs on another node; what is left here is being removed";

/// Lists the containers of a namespace, or of all.
pub async fn list(agent: &Agent, namespace: &str) -> Result<Reply, ErrorReport> {
    let listed = async {
        let containerd = Containerd::connect(&agent.config.containerd).await?;
        let namespaces = match namespace {
            "" => containerd.namespaces().await?,
            one => vec![one.to_string()],
        };
        let mut entries = Vec::new();
        for namespace in namespaces {
            let inside = containerd.namespace(&namespace)?;
            let records = inside.container_list().await?;
            if records.is_empty() {
                continue;
            }
            let tasks: HashMap<_, _> =
                inside.task_list().await?.into_iter().map(|t| (t.id.clone(), t)).collect();
            for record in records.into_iter().filter(|r| is_ours(&namespace, r)) {
                let task = tasks.get(&record.id);
                let shim = match task {
                    Some(_) => control::client::inspect(&namespace, &record.id).await.ok(),
                    None => None,
                };
                let busy = agent.busy.what(&namespace, &record.id);
                let mut listed = entry(&namespace, &record, task, shim.as_ref(), busy);
                if Departed::is(&namespace, &record) {
                    (listed.state, listed.detail) = ("moved".into(), LEAVING.into());
                }
                entries.push(listed);
            }
        }
        entries.sort_by(|a, b| (&a.namespace, &a.container).cmp(&(&b.namespace, &b.container)));
        Ok::<_, anyhow::Error>(Reply::Ps { containers: entries })
    };
    listed.await.map_err(|error| ErrorReport::new(ExitCode::Failed, format!("{error:#}")))
}

/// Whether a container's runtime is transship: by its name, or by what its shim shows. CRI does not record that its handler has a
/// `runtime_path`.
pub fn is_ours(namespace: &str, record: &Record) -> bool {
    names_us(record) || control::socket_path(namespace, &record.id).exists()
}

/// By its name or by the path of its shim.
fn names_us(record: &Record) -> bool {
    let options = record.runtime_options.as_ref().map(|o| String::from_utf8_lossy(&o.value));
    record.runtime.contains("transship") || options.is_some_and(|o| o.contains("shim-transship"))
}

fn entry(
    namespace: &str,
    record: &Record,
    task: Option<&Task>,
    shim: Option<&Inspected>,
    busy: Option<String>,
) -> PsEntry {
    let migration = shim.map(|s| &s.migration);
    let (state, detail) = match (migration, task) {
        (Some(MigrationState::Undecided { peer, .. }), _) => (
            "undecided".to_string(),
            format!(
                "frozen: its move to {peer} was committed without an answer; if it runs there `transship resolve --moved`, else `--run-here`"
            ),
        ),
        (Some(MigrationState::Sending { .. }), _) => ("migrating-out".into(), busy.unwrap_or_default()),
        (Some(MigrationState::Receiving { .. }), _) => ("migrating-in".into(), busy.unwrap_or_default()),
        (Some(MigrationState::Feeding { peer, left, .. }), _) => {
            ("post-copy".into(), format!("runs on {peer}; {} of its memory are still here", megabytes(*left)))
        }
        (Some(MigrationState::Filling { peer, left, .. }), Some(_)) if *left > 0 => (
            // it runs here, whatever is missing of it
            shim.map_or("running", |s| s.status.as_str()).to_string(),
            format!("{} of its memory are still on {peer}", megabytes(*left)),
        ),
        (Some(MigrationState::Lost { peer, bytes, choice, .. }), _) => (
            "lost".into(),
            format!(
                "killed: {} of its memory were lost with {peer}; {}",
                megabytes(*bytes),
                aftermath(*choice, peer)
            ),
        ),
        (Some(MigrationState::Moved { .. }), _) => ("moved".into(), LEAVING.into()),
        (_, None) => ("none".into(), busy.unwrap_or_default()),
        (None, Some(task)) if task.pid != 0 => (task.status.name().into(), "its shim does not answer".into()),
        (_, Some(task)) => {
            (shim.map_or(task.status.name(), |s| s.status.as_str()).to_string(), busy.unwrap_or_default())
        }
    };
    PsEntry {
        namespace: namespace.into(),
        container: record.id.clone(),
        image: record.image.clone(),
        state: if state == "incoming" { "migrating-in".into() } else { state },
        pid: task.map_or(0, |t| t.pid),
        detail,
        from: Placed::load(namespace, &record.id).map(|p| p.from).unwrap_or_default(),
    }
}

/// What a loss leaves to do.
fn aftermath(choice: OnPostCopyFailure, peer: &str) -> String {
    match choice {
        OnPostCopyFailure::Kill => "delete it and start it anew".into(),
        OnPostCopyFailure::Thaw => {
            format!("{peer} runs it on from its freeze if that node is alive; delete it here")
        }
    }
}

/// The versions of this node's parts.
pub async fn version(agent: &Agent) -> Result<Reply, ErrorReport> {
    let containerd = match Containerd::connect(&agent.config.containerd).await {
        Ok(containerd) => containerd.version().await.unwrap_or_default(),
        Err(_) => String::new(),
    };
    let criu = agent.config.criu.clone();
    let gathered = tokio::task::spawn_blocking(move || HostFacts::gather(criu.as_deref(), "runc")).await;
    let facts = gathered.unwrap_or_default();
    Ok(Reply::Version(VersionReport {
        node: agent.node.clone(),
        agent: env!("CARGO_PKG_VERSION").into(),
        protocol: VERSIONS,
        containerd,
        criu: facts.criu,
        runc: facts.runc,
        kernel: facts.kernel,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::{record::Opaque, task::Status};

    #[test]
    fn states() {
        let record =
            Record { id: "c".into(), runtime: "io.containerd.transship.v2".into(), ..Record::default() };
        let task = Task {
            id: "c".into(),
            pid: 5,
            status: Status::Running,
            terminal: false,
            stdio: Default::default(),
        };
        let state =
            |task: Option<&Task>, shim: Option<&Inspected>| entry("default", &record, task, shim, None).state;
        assert_eq!(state(None, None), "none");
        assert_eq!(state(Some(&task), None), "running");
        let mut shim = Inspected { status: "running".into(), ..Inspected::default() };
        assert_eq!(state(Some(&task), Some(&shim)), "running");
        shim.migration =
            MigrationState::Undecided { migration_id: "m".into(), peer: "b".into(), address: String::new() };
        assert_eq!(state(Some(&task), Some(&shim)), "undecided");
        shim.migration =
            MigrationState::Filling { migration_id: "m".into(), peer: "node-a".into(), left: 240_000_000 };
        let filling = entry("default", &record, Some(&task), Some(&shim), None);
        assert_eq!(
            (filling.state.as_str(), filling.detail.as_str()),
            ("running", "240.0 MB of its memory are still on node-a")
        );
        shim.migration =
            MigrationState::Feeding { migration_id: "m".into(), peer: "node-b".into(), left: 1_000_000 };
        let feeding = entry("default", &record, Some(&task), Some(&shim), None);
        assert_eq!(
            (feeding.state.as_str(), feeding.detail.as_str()),
            ("post-copy", "runs on node-b; 1.0 MB of its memory are still here")
        );
        shim.migration = MigrationState::Lost {
            migration_id: "m".into(),
            peer: "node-a".into(),
            bytes: 1_000_000,
            choice: OnPostCopyFailure::Kill,
        };
        assert_eq!(state(Some(&task), Some(&shim)), "lost");
        shim = Inspected { status: "incoming".into(), ..Inspected::default() };
        assert_eq!(state(Some(&task), Some(&shim)), "migrating-in");
    }

    #[test]
    fn ours() {
        let mut record = Record { runtime: "io.containerd.runc.v2".into(), ..Record::default() };
        assert!(!names_us(&record));
        let value = b"\x0a\x28/usr/local/bin/containerd-shim-transship-v2".to_vec();
        record.runtime_options = Some(Opaque { type_url: String::new(), value });
        assert!(names_us(&record));
    }
}
