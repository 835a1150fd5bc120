//! What `transship` says of pods: its list has them, and nothing of a pod leaves it.

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::cri::client::Cri;
use crate::cri::compare;
use crate::cri::pod::{EXITED, Pod};
use crate::cri::record::Record;
use crate::requirements::Needs;
use crate::transship;
use crate::trouble;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "cri_transship_ps", needs: Needs::Pods, run: ps },
    Scenario { name: "cri_transship_refuses", needs: Needs::Pods, run: refuses },
];

const NAMESPACE: [&str; 2] = ["--namespace", "k8s.io"];

/// Sandboxes and containers under our handlers, by name and by path, and none of runc's.
fn ps(bed: &Bed) -> Result<()> {
    let cri = Cri::connect(bed)?;
    cri.expect_images()?;
    let mut pods = Vec::new();
    for handler in [compare::RUNC, compare::OURS, compare::BY_PATH] {
        let mut record = Record::default();
        let pod = Pod::run(&cri, handler, "ps", &mut record)?;
        let id = pod.start("main", &["sleep", "1000"], &mut record)?;
        pods.push((handler, pod, id));
    }
    let json = transship::ok(bed, Node::A, &[&["ps"][..], &NAMESPACE].concat())?;
    let listed = json["containers"].as_array().context("containers")?;
    let state = |id: &str| listed.iter().find(|c| c["container"] == id).map(|c| c["state"].clone());
    for (handler, pod, id) in &pods {
        let wanted = (*handler != compare::RUNC).then(|| serde_json::json!("running"));
        ensure!(state(&pod.id) == wanted && state(id) == wanted, "{handler}: {json:#}");
    }
    for (_, pod, _) in pods {
        pod.remove()?;
    }
    Ok(())
}

/// Containers, sandboxes, running or not, by a move or into a file: refused with a reason, and left as they were.
fn refuses(bed: &Bed) -> Result<()> {
    let cri = Cri::connect(bed)?;
    cri.expect_images()?;
    for handler in [compare::OURS, compare::BY_PATH] {
        let mut record = Record::default();
        let pod = Pod::run(&cri, handler, "stays", &mut record)?;
        let id = pod.start("main", &["sleep", "1000"], &mut record)?;
        let stopped = pod.start("short", &["true"], &mut record)?;
        cri.wait_state(&stopped, EXITED)?;
        let name = format!("stays-under-{handler}");
        let there = ["--to", Node::B.address()];
        let refused = |args: &[&str], texts: &[&str]| -> Result<()> {
            let args = [args, &NAMESPACE].concat();
            texts.iter().try_for_each(|text| transship::refused(bed, Node::A, &args, 5, text))
        };
        refused(&[&["migrate", &id][..], &there].concat(), &["a container of the Kubernetes pod", &name])?;
        refused(&[&["migrate", &pod.id][..], &there].concat(), &["the sandbox of the Kubernetes pod"])?;
        refused(
            &[&["migrate", &stopped, "--cold"][..], &there].concat(),
            &["a container of the Kubernetes pod"],
        )?;
        refused(
            &["checkpoint", &id, "-o", "/run/pod.ckpt"],
            &["a container of the Kubernetes pod", "kubelet's checkpoint API"],
        )?;
        ensure!(cri.output(&id, &["echo", "here"])? == "here\n");
        let status = cri.status(&stopped)?;
        ensure!(status.state == EXITED && status.exit_code == 0, "{status:?}");
        trouble::nothing_on(bed, Node::B)?;
        pod.remove()?;
    }
    Ok(())
}
