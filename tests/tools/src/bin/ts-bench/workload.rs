//! The workloads: what runs in the container, and who looks at it from outside (ts-client at redis, ts-load's own figures else).

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bed::Bed;

pub const IP: &str = "10.77.1.50";
pub const MAC: &str = "02:77:01:00:00:32";

/// One line of the table of workloads.
pub struct Workload {
    pub name: &'static str,
    pub about: &'static str,
    pub image: &'static str,
    pub command: &'static [&'static str],
    /// Filled by the client with so many MB; 0: the workload fills itself and is asked through its port.
    pub redis_mb: u32,
    /// The link is shaped to this, as tc writes it.
    pub link: Option<&'static str>,
    /// Runs at most, however many are asked for: the large ones take minutes each.
    pub max_runs: usize,
    /// MB that must be available on the machine.
    pub needs_mb: u64,
}

const REDIS: &[&str] = &["/usr/bin/redis-server", "--protected-mode", "no", "--save", "", "--dir", "/data"];

const fn load(
    name: &'static str,
    about: &'static str,
    command: &'static [&'static str],
    needs_mb: u64,
) -> Workload {
    Workload { name, about, image: "load", command, redis_mb: 0, link: None, max_runs: 99, needs_mb }
}

const fn redis(name: &'static str, about: &'static str, redis_mb: u32) -> Workload {
    let needs_mb = redis_mb as u64 * 4;
    Workload { name, about, image: "redis", command: REDIS, redis_mb, link: None, max_runs: 99, needs_mb }
}

/// All of them, small ones first.
pub const ALL: &[Workload] = &[
    load(
        "shell",
        "a busybox shell loop that forks sleeps, beside a ticker of 1 MB that measures",
        &["sh", "-c", "ts-load writer --mb 1 --rate 1MB/s & while :; do n=$((n+1)); sleep 0.01; done"],
        500,
    ),
    load(
        "tree",
        "50 processes that talk through pipes, 1 MB each",
        &["ts-load", "tree", "--procs", "50"],
        1000,
    ),
    redis("redis-256m", "redis with 256 MB, a client at 1 kHz", 256),
    redis("redis-1g", "redis with 1 GiB, a client at 1 kHz", 1024),
    // its performance data is a file in the writable layer, which the peers do not copy
    Workload {
        image: "jvm",
        ..load(
            "jvm",
            "a JVM with 256 MB of live objects, 65 MB of them replaced each second",
            &["java", "-Xmx700m", "-XX:-UsePerfData", "/root/Load.java", "256"],
            3000,
        )
    },
    redis("redis-4g", "redis with 4 GiB, a client at 1 kHz", 4096),
    load(
        "writer-1g-100",
        "1 GiB, 100 MB/s written at random",
        &["ts-load", "writer", "--mb", "1024", "--rate", "100MB/s"],
        4096,
    ),
    load(
        "writer-1g-500",
        "1 GiB, 500 MB/s written at random",
        &["ts-load", "writer", "--mb", "1024", "--rate", "500MB/s"],
        4096,
    ),
    load(
        "writer-1g-max",
        "1 GiB, written at random as fast as one core does it",
        &["ts-load", "writer", "--mb", "1024", "--rate", "max"],
        4096,
    ),
    Workload {
        max_runs: 3,
        link: Some("1gbit"),
        ..load(
            "writer-6g-50",
            "6 GiB, 50 MB/s written at random, over a link of 1 Gbit/s",
            &["ts-load", "writer", "--mb", "6144", "--rate", "50MB/s"],
            15_000,
        )
    },
    Workload {
        max_runs: 5,
        link: Some("1gbit"),
        ..load(
            "writer-8g-50",
            "8 GiB, 50 MB/s written at random, over a link of 1 Gbit/s",
            &["ts-load", "writer", "--mb", "8192", "--rate", "50MB/s"],
            20_000,
        )
    },
];

/// Who looks at a running workload.
pub enum Watch {
    Client { child: Child, out: PathBuf, progress: PathBuf },
    Load,
}

impl Workload {
    /// Waits until the workload is up and filled.
    pub fn watch(&self, bed: &Bed, dir: &std::path::Path) -> Result<Watch, String> {
        if self.redis_mb == 0 {
            let start = Instant::now();
            loop {
                match ask(bed, "status") {
                    Ok(_) => return Ok(Watch::Load),
                    Err(e) if start.elapsed() > Duration::from_secs(60) => return Err(e),
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        }
        let (out, progress) = (dir.join("client.json"), dir.join("progress"));
        for file in [&out, &progress] {
            let _ = std::fs::remove_file(file);
        }
        let address = format!("{IP}:6379");
        // redis answers as soon as it listens, which takes a moment
        let start = Instant::now();
        while bed
            .client("ts-client", &[&address, "--seconds", "0"])
            .output()
            .is_ok_and(|o| !o.status.success())
        {
            if start.elapsed() > Duration::from_secs(20) {
                return Err("redis does not answer".into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let mb = self.redis_mb.to_string();
        let path = progress.to_str().ok_or("path")?;
        let stdout = File::create(&out).map_err(|e| format!("{}: {e}", out.display()))?;
        let mut child = bed
            .client(
                "ts-client",
                &[&address, "--rate", "1000", "--fill-mb", &mb, "--gap-ms", "5", "--progress", path],
            )
            .stdin(Stdio::null())
            .stdout(stdout)
            .spawn()
            .map_err(|e| e.to_string())?;
        let start = Instant::now();
        while !std::fs::read_to_string(&progress).is_ok_and(|t| t.contains("\"running\"")) {
            if child.try_wait().map_err(|e| e.to_string())?.is_some() {
                return Err(format!("ts-client: {}", std::fs::read_to_string(&out).unwrap_or_default()));
            }
            if start.elapsed() > Duration::from_secs(300) {
                let _ = child.kill();
                return Err("ts-client does not get redis filled".into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(Watch::Client { child, out, progress })
    }
}

/// A command for ts-load.
pub fn ask(bed: &Bed, command: &str) -> Result<Value, String> {
    let output = bed
        .client("ts-load", &["ask", &format!("{IP}:7000"), command])
        .output()
        .map_err(|e| e.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|e| format!("ts-load {command}: {e}"))
}

/// What the client says at its end, after it has read all data once more.
pub fn client_end(child: &mut Child, out: &std::path::Path) -> Result<Value, String> {
    // SAFETY: a signal to our own child, which has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let start = Instant::now();
    while child.try_wait().map_err(|e| e.to_string())?.is_none() {
        if start.elapsed() > Duration::from_secs(180) {
            let _ = child.kill();
            let _ = child.wait();
            return Err("ts-client does not end".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let text = std::fs::read_to_string(out).map_err(|e| e.to_string())?;
    serde_json::from_str(&text).map_err(|e| format!("ts-client said {text:?}: {e}"))
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Watch::Client { child, out, progress } = self {
            // no harm to one that has ended
            let _ = child.kill();
            let _ = child.wait();
            let _ = std::fs::remove_file(out);
            let _ = std::fs::remove_file(progress);
        }
    }
}
