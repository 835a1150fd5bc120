//! The peers that runc and CRIU offer: checkpoint, copy, restore; memory through CRIU's page server instead of files; and CRIU's
//! own post-copy (lazy-pages); and, where the kernel has soft-dirty, rounds of `--pre-dump`. By hand, in the order and with the care of somebody who knows them well: images on tmpfs, a plain TCP
//! copy, the destination's pod and root file system made beforehand, the source's network removed while the copy runs.
//!
//! The writable layer is not copied (the workloads write no files), nor is anything encrypted: favours to the peers.

use serde_json::{Value, json};

use super::peer::{self, CONF, DIR, done, ms, spawn, time, write};
use super::{ID, Move, System};
use crate::bed::{Bed, Helper, address};
use crate::workload::{IP, MAC, Workload};

const PAGE_PORT: u16 = 7200;

/// How memory goes.
#[derive(Clone, Copy, PartialEq)]
pub enum Way {
    Copy,
    PageServer,
    Lazy,
    PreDump,
}

/// Rounds of pre-dump before the last dump.
const ROUNDS: u32 = 2;

pub struct Runc {
    way: Way,
    /// The page server or lazy-pages daemon on the destination, by the helper's number.
    daemon: Option<u64>,
    /// Joins the destination's pod to the bridge after the restore, where no action script does so during it.
    gate: Option<String>,
    pipes: Option<Pipes>,
}

/// The machine's limit of a pipe's size, raised; the value it had comes back when this is dropped.
struct Pipes(String);

const PIPE_MAX: &str = "/proc/sys/fs/pipe-max-size";

impl Pipes {
    fn raise() -> Option<Self> {
        let before = std::fs::read_to_string(PIPE_MAX).ok()?;
        std::fs::write(PIPE_MAX, "67108864").ok()?;
        Some(Self(before))
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        let _ = std::fs::write(PIPE_MAX, &self.0);
    }
}

impl Runc {
    pub fn new(way: Way) -> Self {
        Self { way, daemon: None, gate: None, pipes: None }
    }
}

/// The errors of CRIU's logs, for those who ask why it failed.
fn errors(node: &mut Helper) -> String {
    let script = format!(
        "cd {DIR} && grep -hE 'Error|BUG' */*.log *.log 2>/dev/null | grep -v RLIMIT_NOFILE | tail -n 8; true"
    );
    node.sh(&script).unwrap_or_default().trim().to_owned()
}

impl Runc {
    /// The same container that containerd would make, by its own spec.
    fn bundle(&self, bed: &mut Bed, workload: &Workload) -> Result<(), String> {
        let image = format!("localhost/{}:1", workload.image);
        let netns = format!("network:/run/netns/{ID}");
        let mut line = vec!["ctr", "c", "create", "--with-ns", &netns, &image, ID];
        line.extend(workload.command);
        bed.a.run(&line, 30)?;
        let spec = bed.a.sh(&format!("ctr c info --spec {ID}; ctr c rm {ID}"))?;
        let mut spec: Value = serde_json::from_str(&spec).map_err(|e| format!("the spec: {e}"))?;
        spec["root"]["path"] = json!(format!("{DIR}/rootfs"));
        if workload.redis_mb > 0 {
            spec["annotations"]["org.criu.config"] = json!(CONF);
        }
        let spec = spec.to_string();
        for node in [&mut bed.a, &mut bed.b] {
            node.sh(&format!(
                "mkdir -p {DIR}/rootfs {DIR}/images {DIR}/work; ctr images mount --rw {image} {DIR}/rootfs"
            ))?;
            write(node, &format!("{DIR}/config.json"), &spec)?;
        }
        Ok(())
    }
}

impl System for Runc {
    fn name(&self) -> &'static str {
        match self.way {
            Way::Copy => "runc",
            Way::PageServer => "runc-page-server",
            Way::Lazy => "runc-lazy-pages",
            Way::PreDump => "runc-pre-dump",
        }
    }

    fn about(&self) -> &'static str {
        match self.way {
            Way::Copy => "runc checkpoint to tmpfs, copy over plain TCP, runc restore",
            Way::PageServer => "the same, memory through `criu page-server` on the destination",
            Way::Lazy => {
                "runc checkpoint --lazy-pages, stock `criu lazy-pages` on the destination, runc restore --lazy-pages"
            }
            Way::PreDump => {
                "two rounds of runc checkpoint --pre-dump and copy, then as runc with --parent-path"
            }
        }
    }

    fn unavailable(&self) -> Option<String> {
        // without it CRIU cannot tell what was written since, and aborts
        (self.way == Way::PreDump && !crate::machine::soft_dirty())
            .then(|| "needs soft-dirty, which this kernel does not have".into())
    }

    fn start(&mut self, bed: &mut Bed, workload: &Workload) -> Result<(), String> {
        bed.nodes(&["pod", "a", ID, IP, MAC])?;
        self.bundle(bed, workload)?;
        if workload.redis_mb > 0 {
            write(&mut bed.a, CONF, "tcp-established\n")?;
        }
        // the container's output must be /dev/null, not a file of ours, which the destination does not have
        bed.a
            .sh(&format!(
                "runc --log {DIR}/run.log run -d --bundle {DIR} {ID} > /dev/null 2>&1 || {{ cat {DIR}/run.log; exit 1; }}"
            ))
            .map(drop)
    }

    fn prepare(&mut self, bed: &mut Bed, workload: &Workload) -> Result<(), String> {
        self.gate = peer::pod_apart(bed, workload.redis_mb > 0)?;
        if self.way == Way::Lazy {
            // CRIU wants pipes larger than an unprivileged user gets; put back by clean()
            self.pipes = Pipes::raise();
        }
        if self.way == Way::PageServer {
            let server = format!(
                "exec criu page-server --images-dir {DIR}/images --work-dir {DIR}/work -o page-server.log --address {} --port {PAGE_PORT}",
                address("b")
            );
            self.daemon = Some(spawn(&mut bed.b, &server)?);
            bed.b.sh("sleep 0.3")?;
        }
        Ok(())
    }

    fn migrate(&mut self, bed: &mut Bed, _: &Workload) -> Result<Move, String> {
        let result = match self.way {
            Way::Copy | Way::PageServer => self.stop_and_copy(bed),
            Way::Lazy => self.lazy(bed),
            Way::PreDump => self.pre_dump(bed),
        };
        if let Some(gate) = self.gate.take() {
            bed.b.try_sh(&gate);
        }
        result
            .map_err(|e| format!("{e}\nsource: {}\ndestination: {}", errors(&mut bed.a), errors(&mut bed.b)))
    }

    fn clean(&mut self, bed: &mut Bed) {
        (self.daemon, self.gate, self.pipes) = (None, None, None);
        for node in [&mut bed.a, &mut bed.b] {
            node.try_sh(&format!(
                "runc kill {ID} KILL; for i in 1 2 3 4 5 6 7 8 9 10; do runc delete -f {ID} && break; sleep 0.1; done
                 umount {DIR}/rootfs; ctr snapshots rm {DIR}/rootfs; ctr c rm {ID}; rm -rf {DIR}"
            ));
        }
        for node in ["a", "b"] {
            let _ = bed.nodes(&["unpod", node, ID]);
        }
    }
}

impl Runc {
    fn restore(&self, bed: &mut Bed, images: &str, more: &[&str]) -> Result<Value, String> {
        let work = format!("{DIR}/work");
        let mut line = vec!["runc", "restore", "-d", "--tcp-established", "--bundle", DIR];
        line.extend(["--image-path", images, "--work-path", &work]);
        line.extend(more);
        line.push(ID);
        bed.b.run(&line, 120)
    }

    fn stop_and_copy(&mut self, bed: &mut Bed) -> Result<Move, String> {
        let (images, work) = (format!("{DIR}/images"), format!("{DIR}/work"));
        let pages = format!("{}:{PAGE_PORT}", address("b"));
        let mut line =
            vec!["runc", "checkpoint", "--tcp-established", "--image-path", &images, "--work-path", &work];
        if self.way == Way::PageServer {
            line.extend(["--page-server", &pages]);
        }
        line.push(ID);
        let dump = bed.a.run(&line, 300)?;
        // beside the copy: nothing of the source may answer for the address any more
        let unpod = spawn(&mut bed.a, &format!("ip netns del {ID}"))?;
        let copy = peer::copy(bed)?;
        done(&mut bed.a, unpod, 30)?;
        if let Some(server) = self.daemon.take() {
            done(&mut bed.b, server, 30)?;
        }
        // the source's images are of no more use, and the machine has both nodes' memory
        let remove = spawn(&mut bed.a, &format!("rm -rf {DIR}/images"))?;
        let restore = self.restore(bed, &images, &[])?;
        done(&mut bed.a, remove, 30)?;
        bed.b.try_sh(&format!("rm -rf {DIR}/images"));
        Ok(peer::stopped(&dump, &copy, &restore))
    }

    fn lazy(&mut self, bed: &mut Bed) -> Result<Move, String> {
        let pages = format!("{}:{PAGE_PORT}", address("a"));
        let dump = spawn(
            &mut bed.a,
            &format!(
                "exec runc checkpoint --tcp-established --lazy-pages --page-server {pages} --status-fd 3 \
                 --image-path {DIR}/images --work-path {DIR}/work {ID} 3> {DIR}/status"
            ),
        )?;
        let begin = transship_testtools::time::realtime();
        let ready = bed.a.ask(json!({"do": "await_file", "path": format!("{DIR}/status"), "limit_s": 60}));
        let ready = match ready {
            Ok(ready) => ready,
            // rather its own words than ours
            Err(e) => return Err(done(&mut bed.a, dump, 1).err().unwrap_or(e)),
        };
        let copy = peer::copy(bed)?;
        let daemon = spawn(
            &mut bed.b,
            &format!(
                "exec criu lazy-pages --page-server --address {} --port {PAGE_PORT} --images-dir {DIR}/images --work-dir {DIR}/work -o lazy.log",
                address("a")
            ),
        )?;
        // the socket that the restore connects to
        bed.b.sh(&format!(
            "for i in $(seq 200); do [ -S {DIR}/work/lazy-pages.socket ] || [ -S {DIR}/images/lazy-pages.socket ] && exit 0; sleep 0.005; done; exit 1"
        ))?;
        let restore = self.restore(bed, &format!("{DIR}/images"), &["--lazy-pages"])?;
        let filled = done(&mut bed.b, daemon, 300)?;
        done(&mut bed.a, dump, 60)?;
        bed.a.try_sh(&format!("ip netns del {ID}"));
        let frozen_end = time(&restore, "end");
        Ok(Move {
            begin,
            end: time(&filled, "end"),
            freeze_ms: ms(begin, frozen_end),
            detail: json!({
                "checkpoint_ms": ms(begin, time(&ready, "end")), "copy_ms": ms(time(&copy, "begin"), time(&copy, "end")),
                "restore_ms": ms(time(&restore, "begin"), frozen_end), "fill_ms": ms(frozen_end, time(&filled, "end")),
            }),
        })
    }

    fn pre_dump(&mut self, bed: &mut Bed) -> Result<Move, String> {
        let work = format!("{DIR}/work");
        let (mut begin, mut rounds) = (None, Vec::new());
        let mut restore = None;
        for round in 0..=ROUNDS {
            let last = round == ROUNDS;
            let images = format!("{DIR}/images.{round}");
            let parent = format!("../images.{}", round.saturating_sub(1));
            let link = if round > 0 { format!("; ln -s {parent} {images}/parent") } else { String::new() };
            bed.a.sh(&format!("mkdir -p {images}"))?;
            bed.b.sh(&format!("mkdir -p {images}{link}"))?;
            let mut line = vec![
                "runc",
                "checkpoint",
                "--tcp-established",
                "--image-path",
                &images,
                "--work-path",
                &work,
            ];
            if !last {
                line.push("--pre-dump");
            }
            if round > 0 {
                line.extend(["--parent-path", &parent]);
            }
            line.push(ID);
            let dump = bed.a.run(&line, 300)?;
            begin = begin.or(Some(time(&dump, "begin")));
            let unpod = if last { Some(spawn(&mut bed.a, &format!("ip netns del {ID}"))?) } else { None };
            let copy = peer::copy_dir(bed, &images)?;
            rounds.push(
                json!({"dump_ms": ms(time(&dump, "begin"), time(&dump, "end")), "copy_bytes": copy["bytes"]}),
            );
            if let Some(unpod) = unpod {
                done(&mut bed.a, unpod, 30)?;
                restore = Some((time(&dump, "begin"), self.restore(bed, &images, &[])?));
            }
        }
        let (freeze, restore) = restore.ok_or("no round")?;
        let end = time(&restore, "end");
        bed.b.try_sh(&format!("rm -rf {DIR}/images.*"));
        Ok(Move {
            begin: begin.unwrap_or(freeze),
            end,
            freeze_ms: ms(freeze, end),
            detail: json!({"rounds": rounds, "restore_ms": ms(time(&restore, "begin"), end)}),
        })
    }
}
