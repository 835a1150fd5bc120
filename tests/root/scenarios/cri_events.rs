//! The events by which kubelet learns what became of its containers.

use anyhow::Result;

use crate::Scenario;
use crate::bed::Bed;
use crate::cri::client::Cri;
use crate::cri::compare;
use crate::cri::config::Id;
use crate::cri::events::Events;
use crate::cri::pod::{EXITED, Pod};
use crate::cri::record::Record;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[Scenario { name: "cri_events", needs: Needs::Pods, run: all }];

/// One listener for all handlers: of containerd 1.7 each that has gone still takes an event from the next.
fn all(bed: &Bed) -> Result<()> {
    let heard = Events::listen(bed)?;
    compare::same_in_turn(bed, |cri: &Cri<'_>, handler: &str, record: &mut Record| {
        events(cri, handler, record, &heard)
    })
}

fn events(cri: &Cri<'_>, handler: &str, record: &mut Record, heard: &Events) -> Result<()> {
    let pod = Pod::run(cri, handler, "events", record)?;
    let short = pod.start("short", &["sh", "-c", "sleep 0.3; exit 3"], record)?;
    cri.wait_state(&short, EXITED)?;
    let killed = pod.start("killed", &["sleep", "1000"], record)?;
    cri.exec(&killed, &["true"], 5)?;
    cri.stop(&killed, 0)?;
    cri.remove(&short)?;
    let id = pod.id.clone();
    pod.remove()?;
    // those of a container in their order; between containers there is none
    for (name, of, wanted) in [("pod", &id, 4), ("short", &short, 4), ("killed", &killed, 4)] {
        for (n, mut event) in heard.of(&[of], wanted)?.into_iter().enumerate() {
            // the others' states when it was sent are a matter of chance
            event.containers_statuses.retain(|s| &s.id == of);
            if let Some(sandbox) = &mut event.pod_sandbox_status {
                sandbox.state = 0;
            }
            record.fields(&format!("{name} {n}"), &event);
        }
    }
    let gone = cri.tell("PodSandboxStatus", Id { id });
    record.outcome("pod", &gone);
    Ok(())
}
