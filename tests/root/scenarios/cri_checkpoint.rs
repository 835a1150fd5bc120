//! CheckpointContainer (containerd 2.1; 1.7 does not have it): the archive, whether others can read it, and a container that CRI makes of it.
//!
//! podman (4.3) restores no archive of containerd's, runc's no more than ours: they name containerd's runtime ("was created with runtime
//! 'io.containerd.runc.v2' and cannot be restored with runtime 'runc'").

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::cri_containers::without_times;
use crate::Scenario;
use crate::bed::{Bed, Containerd, Node, wait_for};
use crate::cri::client::{Answer, Cri};
use crate::cri::compare;
use crate::cri::config::Checkpoint;
use crate::cri::pod::{Pod, RUNNING};
use crate::cri::record::Record;
use crate::cri::stream::in_network;
use crate::requirements::{self, Needs};

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[Scenario {
    name: "cri_checkpoint",
    needs: Needs::Pods,
    run: |bed| compare::same_in_turn(bed, checkpoint),
}];

fn ask(cri: &Cri<'_>, id: &str, location: &Path) -> Answer<()> {
    let location = location.display().to_string();
    cri.tell("CheckpointContainer", Checkpoint { id: id.to_owned(), location, timeout: 30 })
}

fn checkpoint(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "checkpoint", record)?;
    let script = "echo kept > /tmp/x; i=0; while :; do i=$((i+1)); echo $i > /tmp/next; mv /tmp/next /tmp/count; [ $i -gt 3 ] || echo line $i; sleep 0.1; done";
    let id = pod.start("main", &["sh", "-c", script], record)?;
    pod.wait_log("main", "line 3")?;
    let archive = cri.bed.shared()?.join(format!("{handler}.tar"));
    let asked = ask(cri, &id, &archive);
    record.outcome("checkpoint", &asked);
    if cri.bed.containerd() == Containerd::V17 {
        ensure!(asked.is_err_and(|s| s.code() == tonic::Code::Unimplemented), "containerd 1.7 knows it now");
        return pod.remove();
    }
    asked?;
    let count = || -> Result<u64> { Ok(cri.output(&id, &["cat", "/tmp/count"])?.trim().parse()?) };
    let before = count()?;
    wait_for(Duration::from_secs(5), "it to run on", || Ok(count()? > before))?;
    record.outcome("it runs on", &cri.verbose(&id));
    record.note("its files", files(&archive)?);
    checkpointctl(&archive, record)?;
    // a second one, in the same place, of the same container
    std::fs::remove_file(&archive)?;
    ask(cri, &id, &archive)?;
    record.note("the second's files", files(&archive)?);
    record.note("left in the node", left(cri, &id)?);
    cri.stop(&id, 0)?;
    record.outcome("checkpoint after its end", &ask(cri, &id, &archive));
    restore(cri, &pod, &archive, record)?;
    std::fs::remove_file(&archive)?;
    pod.remove()
}

/// The files of an archive, sorted.
fn files(archive: &Path) -> Result<String> {
    let output = Command::new("tar").arg("-tf").arg(archive).output()?;
    ensure!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut names: Vec<&str> = text.lines().map(|l| l.trim_start_matches("./")).collect();
    names.sort_unstable();
    for wanted in [
        "checkpoint/inventory.img",
        "config.dump",
        "spec.dump",
        "status.dump",
        "stats-dump",
        "dump.log",
        "rootfs-diff.tar",
    ] {
        ensure!(names.contains(&wanted), "no {wanted} in {names:?}");
    }
    // how many processes there are is chance, and the numbers of namespaces and devices are not the runtime's
    let plain = |name: &&str| name.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
    let mut plain: Vec<String> = names.iter().map(plain).collect();
    plain.dedup();
    Ok(plain.join(" "))
}

/// What checkpointctl reads in it: the overview, and every detail that it knows.
fn checkpointctl(archive: &Path, record: &mut Record) -> Result<()> {
    let program: PathBuf = requirements::opt().join("checkpointctl/bin/checkpointctl");
    let run = |args: &[&str]| -> Result<String> {
        let output = Command::new(&program)
            .args(args)
            .arg(archive)
            .output()
            .with_context(|| program.display().to_string())?;
        ensure!(output.status.success(), "checkpointctl {args:?}: {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let overview = run(&["show"])?;
    ensure!(overview.contains("main") && overview.contains("localhost/busybox:1"), "{overview}");
    let details: Value = serde_json::from_str(&run(&["inspect", "--all", "--format", "json"])?)?;
    let one = details.get(0).unwrap_or(&details);
    ensure!(one["container_name"].as_str().is_some_and(|n| n.contains("main")), "{one}");
    ensure!(one["process_tree"]["command"].as_str().is_some_and(|c| c.contains("sh")), "{one}");
    for key in ["container_name", "image", "engine", "runtime", "mounts"] {
        record.fields(&format!("checkpointctl/{key}"), &one[key]);
    }
    let keys: Vec<&str> = one.as_object().context("an object")?.keys().map(String::as_str).collect();
    record.note("checkpointctl's keys", keys.join(" "));
    let statistics = one["statistics"].as_object().context("no statistics")?;
    record.note(
        "checkpointctl's statistics",
        statistics.keys().map(String::as_str).collect::<Vec<_>>().join(" "),
    );
    Ok(())
}

/// CRIU's files that a checkpoint leaves where CRI keeps the container.
fn left(cri: &Cri<'_>, id: &str) -> Result<String> {
    let dir = format!("/var/lib/containerd/io.containerd.grpc.v1.cri/containers/{id}");
    cri.bed.sh(Node::A, &format!("ls {dir}"))
}

/// A container whose image is the archive: CRI restores it, with its writable layer, in the same pod. It asks a registry for the image of
/// which the first was made, though it is there.
fn restore(cri: &Cri<'_>, pod: &Pod<'_, '_>, archive: &Path, record: &mut Record) -> Result<()> {
    let _registry = Registry::serve(cri.bed)?;
    let image = archive.display().to_string();
    record.call(&image, "<the archive>");
    let again = pod.create_with("again", &[], record, |config| {
        config.image.as_mut().expect("set").image = image;
    })?;
    let started = cri.start(&again);
    record.outcome("restored", &started);
    started?;
    cri.wait_state(&again, RUNNING)?;
    let state = "cat /tmp/x; a=$(cat /tmp/count); sleep 0.5; b=$(cat /tmp/count); [ $a -gt 3 ] && [ $b -gt $a ] && echo counts on";
    record.outcome("restored state", &cri.exec(&again, &["sh", "-c", state], 5));
    record.outcome("restored status", &cri.verbose(&again));
    record.outcome("restored stop", &cri.stop(&again, 1));
    record.outcome("restored after its end", &cri.verbose(&again));
    record.note(
        "restored log",
        without_times(&pod.log("again").unwrap_or_default()).lines().take(3).collect::<Vec<_>>().join("\n"),
    );
    Ok(())
}

/// As much of a registry as it takes: at port 80 of node a's loopback interface, it has every manifest that is asked for by its digest, of
/// busybox' size. That what follows is in containerd's store already, containerd finds by itself.
struct Registry {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Registry {
    fn serve(bed: &Bed) -> Result<Registry> {
        let digest = "ctr -n k8s.io images ls name==localhost/busybox:1 | awk 'NR == 2 { print $3 }'";
        let size: usize =
            bed.sh(Node::A, &format!("ctr -n k8s.io content get $({digest}) | wc -c"))?.trim().parse()?;
        let listener = in_network(bed, Node::A, || Ok(TcpListener::bind("127.0.0.1:80")?))?;
        listener.set_nonblocking(true)?;
        let over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => answer(stream, size).unwrap_or_else(|e| eprintln!("registry: {e:#}")),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Ok(Registry { over, thread: Some(thread) })
    }
}

/// One request of a connection: a HEAD for `/v2/NAME/manifests/DIGEST`.
fn answer(mut stream: TcpStream, size: usize) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut request = String::new();
    let mut lines = BufReader::new(stream.try_clone()?);
    while lines.read_line(&mut request)? > 2 {}
    let path = request.split_whitespace().nth(1).context("no path")?;
    let digest = path.rsplit('/').next().unwrap_or_default();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\nDocker-Content-Digest: {digest}\r\n\
         Content-Length: {size}\r\nConnection: close\r\n\r\n"
    )?;
    Ok(())
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
