//! Containers of Kubernetes pods, as containerd's CRI makes them: which they are, and why they stay. Pure.

use super::message::Refusal;
use crate::containerd::record::Record;

/// The label that CRI gives to its sandboxes and containers.
const KIND: &str = "io.cri-containerd.kind";

/// CRI's containers are kubelet's: elsewhere nobody would know of one, and here it would be missed. Nor can it do without its pod, whose
/// namespaces its sandbox holds.
///
/// # Errors
/// It is one.
pub fn check(record: &Record) -> Result<(), Refusal> {
    let label = |key: &str| record.labels.get(key).map(String::as_str);
    let what = match label(KIND) {
        None => return Ok(()),
        Some("sandbox") => "the sandbox",
        Some(_) => "a container",
    };
    let pod = match (label("io.kubernetes.pod.namespace"), label("io.kubernetes.pod.name")) {
        (Some(namespace), Some(name)) => format!(" {namespace}/{name}"),
        (None, Some(name)) => format!(" {name}"),
        _ => String::new(),
    };
    Err(Refusal {
        code: "pod".into(),
        message: format!("{} is {what} of the Kubernetes pod{pod}, and containers of a pod cannot leave it", record.id),
        advice: "let Kubernetes start the pod elsewhere; kubelet's checkpoint API saves the state of its containers".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_a_pod_stays() {
        let mut record = Record { id: "c1".into(), ..Record::default() };
        assert_eq!(check(&record), Ok(()));
        record.labels.insert("io.kubernetes.pod.name".into(), "web".into());
        assert_eq!(check(&record), Ok(()), "a label that anybody may set");
        record.labels.insert(KIND.into(), "container".into());
        let said = check(&record).unwrap_err();
        assert!(said.message.starts_with("c1 is a container of the Kubernetes pod web,"), "{}", said.message);
        record.labels.insert(KIND.into(), "sandbox".into());
        record.labels.insert("io.kubernetes.pod.namespace".into(), "shop".into());
        let said = check(&record).unwrap_err();
        assert!(said.message.contains("the sandbox of the Kubernetes pod shop/web"), "{}", said.message);
    }
}
