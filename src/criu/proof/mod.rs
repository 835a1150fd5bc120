//! The proof: a real container under stock runc is moved with the parts of this room, held at both gates, moved again, and refused.
//! Needs root, CRIU and the runcs named below; ignored by default. `cargo test -p transship --lib criu:: -- --ignored --nocapture`

//!
//! Here: what is proved, step by step. [`bed`]: what it is proved on. [`moves`]: how a container is moved. [`live`]: memory as a
//! live migration has it. [`memory`]: proofs of that part alone.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

mod bed;
mod live;
mod memory;
mod moves;

use super::Criu;
use bed::{Bed, Fast, Memory, Output, sh};

const RUNCS: [&str; 2] = ["/opt/transship/containerd-1.7/bin/runc", "/opt/transship/containerd-2.1/bin/runc"];
const CRIU: &str = "/opt/transship/criu/bin/criu";
const SCRATCH: &str = "/tmp/tcr";
const SOON: Duration = Duration::from_secs(10);

/// The test binary is the multi-call program of the gates: this runs before the test harness's main.
#[unsafe(link_section = ".init_array")]
#[used]
static AS_GATE: extern "C" fn() = as_gate;

extern "C" fn as_gate() {
    if let Some(code) = super::gate::main_if_invoked() {
        std::process::exit(i32::from(code != ExitCode::SUCCESS));
    }
}

fn skip_reason() -> Option<String> {
    let missing =
        RUNCS.iter().chain([&CRIU, &"/usr/bin/gcc", &"/usr/bin/unshare"]).find(|p| !Path::new(p).exists());
    match missing {
        Some(path) => Some(format!("{path} is missing")),
        None => (!nix::unistd::geteuid().is_root()).then(|| "not root".into()),
    }
}

#[test]
#[ignore = "needs root, runc and CRIU"]
fn probe_finds_that_criu_works() {
    if let Some(reason) = skip_reason() {
        return println!("SKIPPED: {reason}");
    }
    let criu = Criu::find(Some(Path::new(CRIU))).unwrap();
    let begun = Instant::now();
    let works = criu.works().unwrap();
    println!("probe of CRIU {}: {works:?} in {:?}", criu.version, begun.elapsed());
    assert_eq!(works, Ok(()));
}

#[test]
#[ignore = "needs root, runc and CRIU"]
fn a_container_moves_is_refused_and_moves_again() {
    if let Some(reason) = skip_reason() {
        return println!("SKIPPED: {reason}");
    }
    if std::env::var_os("TRANSSHIP_PROOF_INSIDE").is_some() {
        // to measure instead of to prove
        if std::env::var_os("ROUNDS").is_some() {
            return Bed::new(RUNCS[0], false).and_then(|mut bed| bed.fixed_cost()).unwrap();
        }
        for runc in RUNCS {
            for cgroupns in [false, true] {
                println!("--- {runc}, cgroup namespace: {cgroupns}");
                Bed::new(runc, cgroupns).and_then(|mut bed| bed.run()).unwrap();
            }
        }
        return;
    }
    fs::create_dir_all(SCRATCH).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/criu/proof/node.sh");
    let status = Command::new("bash")
        .arg(script)
        .args(["tcr", SCRATCH])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "criu::proof::a_container_moves_is_refused_and_moves_again",
            "--nocapture",
        ])
        .env("TRANSSHIP_PROOF_INSIDE", "1")
        .status()
        .unwrap();
    assert!(status.success());
}

impl Bed {
    fn run(&mut self) -> Result<()> {
        sh(
            "ip link add br0 type bridge forward_delay 0; ip link set br0 up; ip netns add c; ip link add pc type veth peer name eth0 netns c; \
            ip link set pc master br0 up; ip -n c addr add 10.9.0.1/24 dev eth0; ip -n c link set eth0 up",
        )?;
        let twin = self.start("twin", "t", &Output::default())?;
        self.twin = Some(self.connect(&twin)?);
        let first = self.start("m0", "n0", &self.output.clone())?;
        let mut client = self.connect(&first)?;
        self.ask(&mut client, 50)?;
        let second = self.move_to(&first, "m1", "n1", Memory::Full, false)?.context("moved")?;
        self.ask(&mut client, 50)?;
        for memory in [Memory::Full, Memory::Lazy] {
            ensure!(self.move_to(&second, "m2", "n2", memory, true)?.is_none(), "refused");
            self.ask(&mut client, 50)?;
        }
        ensure!(!self.output.stands_still(), "the container has stopped writing");
        self.failing_dumps(&second)?;
        self.ask(&mut client, 50)?;
        self.fast = Fast { netns: true, tar: true, quiet: true };
        let third = self.move_to(&second, "m3", "n3", Memory::Lazy, false)?.context("moved")?;
        self.ask(&mut client, 50)?;
        let fourth = self.move_to(&third, "m4", "n4", Memory::Eager, false)?.context("moved")?;
        self.ask(&mut client, 50)?;
        let third = self.move_to(&fourth, "m5", "n5", Memory::Lazy, false)?.context("moved")?;
        self.ask(&mut client, 50)?;
        ensure!(!self.output.stands_still(), "the container has stopped writing");
        // runc goes on managing it.
        let said = self.runc(&["exec", &third.id, "/busybox", "cat", "/proc/1/comm", "/etc/hosts"])?;
        ensure!(said == "hog\n127.0.0.1 localhost\n", "runc exec says {said:?}");
        self.runc(&["kill", &third.id, "KILL"])?;
        let until = Instant::now() + SOON;
        while !self.runc(&["state", &third.id])?.contains("\"stopped\"") {
            ensure!(Instant::now() < until, "runc kill did not end it");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.runc(&["delete", &third.id])?;
        self.runc(&["delete", "--force", &twin.id])?;
        ensure!(self.runc(&["list", "-q"])?.is_empty(), "containers are left");
        self.drop_netns("n5")?;
        self.drop_netns("t")?;
        sh("ip link del pc; ip netns del c; ip link del br0").map(drop)
    }

    /// Moves one container again and again, and says what a dump and a restore take with each of the means.
    fn fixed_cost(&mut self) -> Result<()> {
        sh("ip link add br0 type bridge forward_delay 0; ip link set br0 up")?;
        let mut here = self.start("f", "nf", &self.output.clone())?;
        let rounds = std::env::var("ROUNDS").map_or(6, |r| r.parse().expect("a number"));
        let with = |netns, tar, quiet| Fast { netns, tar, quiet };
        for (memory, fast) in [
            (Memory::Full, Fast::default()),
            (Memory::Eager, Fast::default()),
            (Memory::Eager, with(true, false, false)),
            (Memory::Eager, with(true, true, false)),
            (Memory::Eager, with(true, true, true)),
            (Memory::Lazy, with(true, true, true)),
        ] {
            self.fast = fast;
            for round in 0..rounds {
                let id =
                    format!("{memory:?}{}{}{}{round}", fast.netns as u8, fast.tar as u8, fast.quiet as u8);
                here = self.move_to(&here, &id, &id, memory, false)?.context("moved")?;
            }
            let took = self.took.take();
            let of = |i: usize| {
                let mut all: Vec<f64> = took.iter().map(|t| t[i]).collect();
                all.sort_by(f64::total_cmp);
                format!("{:6.1} ({:.1})", all[all.len() / 2], all[0])
            };
            println!("FIXED {memory:?} {fast:?}: dump {} restore {}", of(0), of(1));
        }
        self.runc(&["delete", "--force", &here.id]).map(drop)
    }
}
