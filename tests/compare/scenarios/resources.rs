//! Limits, metrics, and want of memory.

use anyhow::Result;
use serde_json::json;

use crate::calls::Call;
use crate::making::New;
use crate::spec::{self, Spec};
use crate::subject::{ID, Subject};

list![
    stats,
    stats_of_created,
    stats_of_stopped,
    update,
    update_bad,
    update_of_others,
    limits_at_creation,
    oom,
    oom_of_an_exec,
    processes
];

/// Has used some of everything that is counted.
const BUSY: &str = "dd if=/dev/zero of=/tmp/f bs=1M count=4 2> /dev/null; i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done; \
                    cat /tmp/f > /dev/null; echo ready; sleep 1000";

fn limited() -> serde_json::Value {
    json!({ "memory": { "limit": 67_108_864 }, "pids": { "limit": 77 }, "cpu": { "shares": 512, "quota": 50_000, "period": 100_000 } })
}

fn stats(s: &mut Subject) -> Result<()> {
    let spec = Spec::sh(BUSY).with("/linux/resources/pids", json!({ "limit": 77 }));
    s.run_ready(spec.with("/linux/resources/memory", json!({ "limit": 67_108_864 })))?;
    let _ = s.call(Call::Stats);
    let _ = s.direct(Call::Stats);
    s.end();
    Ok(())
}

fn stats_of_created(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle().with("/linux/resources/pids", json!({ "limit": 77 }))))?;
    let _ = s.call(Call::Stats);
    s.end();
    Ok(())
}

fn stats_of_stopped(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::sh("exit 3").with("/linux/resources/pids", json!({ "limit": 77 }))))?;
    s.until("its exit is told", |s| s.heard("/tasks/exit"));
    let _ = s.call(Call::Stats);
    let _ = s.direct(Call::Stats);
    let _ = s.call(Call::Pids);
    let _ = s.call(Call::Delete(""));
    let _ = s.call(Call::Stats);
    Ok(())
}

/// What the kernel says of the usual container's limits, on cgroup v1 and v2.
fn note_limits(s: &mut Subject, when: &str) {
    let namespace = s.stage.side.namespace();
    for file in [
        "memory/{}/memory.limit_in_bytes",
        "pids/{}/pids.max",
        "cpu/{}/cpu.shares",
        "cpu/{}/cpu.cfs_quota_us",
        "{}/memory.max",
        "{}/pids.max",
        "{}/cpu.max",
        "{}/cpu.weight",
    ] {
        let path = format!("/sys/fs/cgroup/{}", file.replace("{}", &format!("{namespace}/{ID}")));
        let text = s.read(&path);
        if !text.is_empty() {
            // not through `note`: it hides large numbers
            s.record.note(format!("{when}: {}", file.replace("{}/", "")), text.trim());
        }
    }
}

fn update(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle().with("/linux/resources/memory", json!({ "limit": 134_217_728 }))))?;
    note_limits(s, "at first");
    let _ = s.call(Call::Update(limited().to_string()));
    note_limits(s, "afterwards");
    let _ = s.direct(Call::Update(json!({ "pids": { "limit": 55 } }).to_string()));
    note_limits(s, "at last");
    s.end();
    Ok(())
}

fn update_bad(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    for json in
        ["{", "[]", "", r#"{"memory":{"limit":"much"}}"#, r#"{"unheard":1}"#, r#"{"memory":{"limit":1}}"#]
    {
        let _ = s.call(Call::Update(json.into()));
        let _ = s.direct(Call::Update(json.into()));
    }
    s.end();
    Ok(())
}

fn update_of_others(s: &mut Subject) -> Result<()> {
    s.create(New::of(Spec::idle()))?;
    let _ = s.call(Call::Update(limited().to_string()));
    note_limits(s, "created");
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Update(limited().to_string()));
    let _ = s.direct(Call::Update(limited().to_string()));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn limits_at_creation(s: &mut Subject) -> Result<()> {
    let mut resources = limited();
    resources["devices"] = json!([{ "allow": false, "access": "rwm" }]);
    s.run(New::of(Spec::idle().with("/linux/resources", resources)))?;
    note_limits(s, "running");
    s.end();
    Ok(())
}

/// Wants more than there is.
const GREEDY: &str = "head -c 200000000 /dev/zero | tail -c 150000000 > /dev/null";

fn oom(s: &mut Subject) -> Result<()> {
    // older shims watch a moment after the start only
    let spec = Spec::sh(&format!("echo ready; sleep 0.3; {GREEDY}"))
        .with("/linux/resources/memory", json!({ "limit": 16_777_216 }));
    s.run_ready(spec)?;
    let _ = s.call(Call::Wait(""));
    s.until("it is told", |s| s.heard("/tasks/oom"));
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn oom_of_an_exec(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle().with("/linux/resources/memory", json!({ "limit": 16_777_216 }))))?;
    let _ = s.exec("x1", spec::script(GREEDY), Default::default());
    let _ = s.call(Call::Wait("x1"));
    s.until("it is told", |s| s.heard("/tasks/oom"));
    let _ = s.call(Call::State(""));
    s.end();
    Ok(())
}

fn processes(s: &mut Subject) -> Result<()> {
    s.run_ready(Spec::sh("sleep 1000 & sleep 1000 & echo ready; wait"))?;
    let log = s.log("x1.log");
    let _ = s.exec("x1", spec::script("sleep 1000 & echo ready; wait"), log);
    s.until("x1 is ready", |s| s.scratched("x1.log").contains("ready"));
    let _ = s.exec("x2", spec::process(&["sleep", "1000"]).to_string(), Default::default());
    let _ = s.call(Call::Pids);
    let _ = s.direct(Call::Pids);
    // which of two that end at once is told of first is up to the kernel
    for exec in ["x1", "x2"] {
        let _ = s.call(Call::Kill(exec, 9));
        let _ = s.call(Call::Wait(exec));
    }
    s.end();
    Ok(())
}
