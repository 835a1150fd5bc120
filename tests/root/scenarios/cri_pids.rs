//! One pid namespace for a whole pod, and a container that looks into another's.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::Scenario;
use crate::bed::wait_for;
use crate::cri::client::Cri;
use crate::cri::compare;
use crate::cri::config::{
    ContainerConfig, ContainerSecurity, Mode, NamespaceOption, SandboxConfig, SandboxSecurity,
};
use crate::cri::pod::{EXITED, Pod};
use crate::cri::record::Record;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "cri_pids_shared", needs: Needs::Pods, run: |bed| compare::same(bed, shared) },
    Scenario { name: "cri_pids_of_another", needs: Needs::Pods, run: |bed| compare::same(bed, of_another) },
];

fn pids(mode: Mode, target: &str) -> NamespaceOption {
    NamespaceOption { pid: mode as i32, target_id: target.to_owned(), ..Default::default() }
}

fn with_pids(mode: Mode, target: &str) -> impl FnOnce(&mut ContainerConfig) {
    let options = pids(mode, target);
    move |config| {
        let security = ContainerSecurity { namespace_options: Some(options), ..Default::default() };
        config.linux.as_mut().expect("set").security_context = Some(security);
    }
}

/// Every process of the pod sees all others; a container's end takes its own processes, whoever is their parent, and no others.
fn shared(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run_with(cri, handler, "shared", record, |config: &mut SandboxConfig| {
        let security = SandboxSecurity { namespace_options: Some(pids(Mode::Pod, "")) };
        config.linux.as_mut().expect("set").security_context = Some(security);
    })?;
    let looker = pod.start_with("looker", &["sleep", "1001"], record, with_pids(Mode::Pod, ""))?;
    // a daemon whose parent has ended is a child of the pod's process 1
    let script = "(setsid sleep 1003 &); sleep 1002 & echo up; wait";
    let tree = pod.start_with("tree", &["sh", "-c", script], record, with_pids(Mode::Pod, ""))?;
    pod.wait_log("tree", "up")?;
    // without those that look
    let seen =
        || cri.output(&looker, &["sh", "-c", "ps -o args > /tmp/ps; grep -E 'pause|sleep' /tmp/ps | sort"]);
    // who is killed is a zombie until the pod's process 1 has seen to it
    let without = |gone: [&str; 2]| -> Result<String> {
        wait_for(Duration::from_secs(5), "the end of what a container left", || {
            let seen = seen()?;
            Ok(!gone.iter().any(|g| seen.contains(g)) && !seen.contains("[sleep]"))
        })?;
        seen()
    };
    record.note("all", seen()?);
    record.note("process 1", cri.output(&looker, &["cat", "/proc/1/comm"])?);
    record.outcome("stop", &cri.stop(&tree, 0));
    record.outcome("tree", &cri.verbose(&tree));
    record.note("without the tree", without(["1002", "1003"])?);
    // one that ends by itself leaves nothing either
    let script = "(setsid sleep 1004 &); sleep 0.2; exit 3";
    let short = pod.start_with("short", &["sh", "-c", script], record, with_pids(Mode::Pod, ""))?;
    cri.wait_state(&short, EXITED)?;
    record.outcome("short", &cri.verbose(&short));
    record.note("without the short one", without(["1004", "exit 3"])?);
    record.outcome("exec", &cri.exec(&looker, &["sh", "-c", "exit 8"], 5));
    pod.remove()
}

/// As `kubectl debug --target` does it.
fn of_another(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run_with(cri, handler, "target", record, |config: &mut SandboxConfig| {
        let security = SandboxSecurity { namespace_options: Some(pids(Mode::Container, "")) };
        config.linux.as_mut().expect("set").security_context = Some(security);
    })?;
    let target = pod.start_with("target", &["sleep", "1001"], record, with_pids(Mode::Container, ""))?;
    let debugger =
        pod.start_with("debugger", &["sleep", "1002"], record, with_pids(Mode::Target, &target))?;
    record.note(
        "seen",
        cri.output(
            &debugger,
            &[
                "sh",
                "-c",
                "ps -o args > /tmp/ps; grep '^sleep' /tmp/ps | sort; tr '\\0' ' ' < /proc/1/cmdline",
            ],
        )?,
    );
    record.outcome("debugger", &cri.verbose(&debugger));
    record.outcome("stop", &cri.stop(&debugger, 0));
    record.note("left", cri.output(&target, &["ps", "-o", "args"])?);
    let debugger = pod.start_with("debugger", &["sleep", "1003"], record, |config| {
        with_pids(Mode::Target, &target)(config);
        config.metadata.as_mut().expect("set").attempt = 1;
    })?;
    record.call(&debugger, "<debugger, second>");
    // its process 1 goes, and with it everything in its pid namespace
    record.outcome("stop of the target", &cri.stop(&target, 0));
    let ended = cri.wait_state(&debugger, EXITED).context("the debugger after its target")?;
    record.fields("debugger after its target", &ended);
    pod.remove()
}
