//! podman's own way: `podman container checkpoint --export`, copy, `podman container restore --import`. Unpacked by
//! `hack/lib/bench-podman`; storage and the exported file on tmpfs, no compression, runc and CRIU the bed's.

use super::peer::{self, CONF, DIR, done, spawn, write};
use super::{ID, Move, System};
use crate::bed::Bed;
use crate::workload::{IP, MAC, Workload};

#[derive(Default)]
pub struct Podman {
    gate: Option<String>,
}

/// DIR/podman: podman with a storage and a configuration of its own.
const WRAPPER: &str = r#"#!/bin/sh
export LD_LIBRARY_PATH=$PODMAN/lib CONTAINERS_CONF=/run/bench/containers.conf
exec $PODMAN/bin/podman --root /run/bench/storage --runroot /run/bench/runroot --tmpdir /run/bench/tmp --storage-driver overlay "$@"
"#;

const CONTAINERS_CONF: &str = r#"[containers]
log_driver = "none"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
conmon_path = ["$PODMAN/bin/conmon"]
[engine.runtimes]
runc = ["$RUNC"]
"#;

impl Podman {
    fn install(bed: &mut Bed, workload: &Workload) -> Result<(), String> {
        let prefix = std::env::var("TRANSSHIP_OPT").unwrap_or("/opt/transship".into()) + "/podman";
        let cache = std::env::var("TRANSSHIP_CACHE").unwrap_or("/var/cache/transship".into());
        if !std::path::Path::new(&prefix).join("bin/podman").exists() {
            return Err(format!("no podman in {prefix}: hack/lib/bench-podman could not unpack it"));
        }
        for node in [&mut bed.a, &mut bed.b] {
            let runc = node.sh("command -v runc")?;
            let fill = |text: &str| text.replace("$PODMAN", &prefix).replace("$RUNC", runc.trim());
            write(
                node,
                "/etc/containers/policy.json",
                r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
            )?;
            write(node, "/etc/containers/registries.conf", "")?;
            write(node, &format!("{DIR}/containers.conf"), &fill(CONTAINERS_CONF))?;
            write(node, &format!("{DIR}/podman"), &fill(WRAPPER))?;
            let image = workload.image;
            node.sh(&format!("chmod +x {DIR}/podman; mkdir -p {DIR}/images; {DIR}/podman load -q -i {cache}/images/{image}.tar"))?;
        }
        Ok(())
    }
}

impl System for Podman {
    fn name(&self) -> &'static str {
        "podman"
    }

    fn about(&self) -> &'static str {
        "podman container checkpoint --export to tmpfs, copy over plain TCP, podman container restore --import"
    }

    fn memory_percent(&self) -> u64 {
        // the images and the exported file at once
        130
    }

    fn start(&mut self, bed: &mut Bed, workload: &Workload) -> Result<(), String> {
        bed.nodes(&["pod", "a", ID, IP, MAC])?;
        Self::install(bed, workload)?;
        let (podman, image) = (format!("{DIR}/podman"), format!("localhost/{}:1", workload.image));
        let (netns, conf) = (format!("ns:/run/netns/{ID}"), format!("org.criu.config={CONF}"));
        let mut line =
            vec![podman.as_str(), "run", "-d", "--name", ID, "--network", &netns, "--pull", "never"];
        if workload.redis_mb > 0 {
            write(&mut bed.a, CONF, "tcp-established\n")?;
            line.extend(["--annotation", &conf]);
        }
        line.push(&image);
        line.extend(workload.command);
        bed.a.run(&line, 30).map(drop)
    }

    fn prepare(&mut self, bed: &mut Bed, workload: &Workload) -> Result<(), String> {
        self.gate = peer::pod_apart(bed, workload.redis_mb > 0)?;
        Ok(())
    }

    fn migrate(&mut self, bed: &mut Bed, _: &Workload) -> Result<Move, String> {
        let (podman, file) = (format!("{DIR}/podman"), format!("{DIR}/images/bench.tar"));
        let mut line =
            vec![podman.as_str(), "container", "checkpoint", "--export", &file, "--compress", "none"];
        line.extend(["--tcp-established", "--ignore-volumes", ID]);
        let dump = bed.a.run(&line, 300)?;
        let unpod = spawn(&mut bed.a, &format!("{podman} rm -f {ID}; ip netns del {ID}"))?;
        let copy = peer::copy(bed)?;
        done(&mut bed.a, unpod, 60)?;
        bed.a.try_sh(&format!("rm -f {file}"));
        let line = [podman.as_str(), "container", "restore", "--import", &file, "--tcp-established"];
        let restore = bed.b.run(&line, 300)?;
        if let Some(gate) = self.gate.take() {
            bed.b.try_sh(&gate);
        }
        bed.b.try_sh(&format!("rm -f {file}"));
        Ok(peer::stopped(&dump, &copy, &restore))
    }

    fn clean(&mut self, bed: &mut Bed) {
        self.gate = None;
        for node in [&mut bed.a, &mut bed.b] {
            node.try_sh(&format!(
                "{DIR}/podman rm -f -t 0 -a; umount {DIR}/storage/overlay; umount {DIR}/storage; rm -rf {DIR}"
            ));
        }
        for node in ["a", "b"] {
            let _ = bed.nodes(&["unpod", node, ID]);
        }
    }
}
