//! The bed: network namespaces on one bridge, containers under stock runc that answer a client and write a log, and what
//! runc is asked for. What is done with them is the proof's business.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

use super::{CRIU, SCRATCH, SOON};
use crate::criu::Criu;
use crate::criu::gate_server::{CRIU_CONF_ANNOTATION, GateServer};
use crate::program::Programs;

pub(super) fn sh(line: &str) -> Result<String> {
    let out = Command::new("bash").args(["-ec", line]).output()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(out.status.success(), "{line}: {} {}", text, String::from_utf8_lossy(&out.stderr));
    Ok(text)
}

/// What a container has written, as its log would hold it.
#[derive(Clone, Default)]
pub(super) struct Output(Arc<AtomicU64>);

impl Output {
    fn pipe(&self) -> Result<std::io::PipeWriter> {
        let (mut from, to) = std::io::pipe()?;
        let count = self.0.clone();
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buf) {
                count.fetch_add(n as u64, Ordering::SeqCst);
            }
        });
        Ok(to)
    }

    pub(super) fn stands_still(&self) -> bool {
        // What was in the pipe before may still be on its way.
        std::thread::sleep(Duration::from_millis(20));
        let before = self.0.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(100));
        before == self.0.load(Ordering::SeqCst)
    }
}

pub(super) struct Client {
    stream: BufReader<TcpStream>,
    asked: u64,
}

impl Client {
    fn ask(&mut self) -> Result<String> {
        self.asked += 1;
        // One segment: Nagle.
        self.stream.get_mut().write_all(format!("{}\n", self.asked).as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        ensure!(
            line.starts_with(&format!("{} ", self.asked)) && line.ends_with(" still here\n"),
            "answer {line:?}"
        );
        Ok(line)
    }
}

pub(super) struct Bed {
    runc: PathBuf,
    cgroupns: bool,
    pub(super) criu: Criu,
    dir: PathBuf,
    pub(super) output: Output,
    pub(super) fast: Fast,
    /// Dump and restore of each move, milliseconds.
    pub(super) took: RefCell<Vec<[f64; 2]>>,
    /// The sums that the container has to answer, computed by its twin that is never moved.
    pub(super) twin: Option<Client>,
}

/// How memory travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// With its bytes through CRIU.
    Full,
    /// CRIU's list; all of it in the images.
    Eager,
    /// CRIU's list; what can be lazy is.
    Lazy,
}

/// What a dump and a restore are made faster with.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fast {
    /// CRIU runs in the container's network namespace, at both ends.
    pub(super) netns: bool,
    /// Our own tar.
    pub(super) tar: bool,
    /// Log level 1, at both ends.
    pub(super) quiet: bool,
}

pub(super) struct Container {
    pub(super) id: String,
    pub(super) netns: String,
    pub(super) bundle: PathBuf,
    pub(super) pid: i32,
}

impl Bed {
    pub(super) fn new(runc: &str, cgroupns: bool) -> Result<Self> {
        let dir = PathBuf::from(format!("{SCRATCH}/{}-{cgroupns}", runc.split('/').nth(3).unwrap_or("x")));
        fs::create_dir_all(dir.join("rootfs/tmp"))?;
        fs::write(dir.join("hosts"), "127.0.0.1 localhost\n")?;
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/criu/proof/hog.c");
        sh(&format!(
            "gcc -O1 -static -w -o {0}/rootfs/hog {1} && cp /usr/bin/busybox {0}/rootfs/busybox",
            dir.display(),
            source.display()
        ))?;
        Ok(Self {
            runc: runc.into(),
            cgroupns,
            criu: Criu::find(Some(Path::new(CRIU)))?,
            dir,
            output: Output::default(),
            fast: Fast::default(),
            took: Default::default(),
            twin: None,
        })
    }

    /// Containers' netns: the same address and MAC in each, at most one with its link up.
    pub(super) fn netns(&self, name: &str) -> Result<()> {
        let n = if name == "t" { 8 } else { 7 };
        sh(&format!(
            "ip netns add {name}; ip -n {name} link set lo up; ip link add p-{name} type veth peer name eth0 netns {name}; \
             ip link set p-{name} master br0 up; ip -n {name} link set eth0 address 02:00:00:00:00:0{n}; \
             ip -n {name} addr add 10.9.0.{n}/24 dev eth0; ip -n {name} link set eth0 up; ip link set p-{name} down"
        ))
        .map(drop)
    }

    /// The link first: a namespace is taken down some time after its name has gone.
    pub(super) fn drop_netns(&self, name: &str) -> Result<()> {
        sh(&format!("ip link del p-{name}; ip netns del {name}")).map(drop)
    }

    pub(super) fn link(&self, name: &str, state: &str) -> Result<()> {
        sh(&format!("ip link set p-{name} {state}")).map(drop)
    }

    pub(super) fn bundle(&self, id: &str, netns: &str) -> Result<PathBuf> {
        let bundle = self.dir.join(id);
        fs::create_dir_all(bundle.join("rootfs"))?;
        // Each side has its own copy of the root file system, as two nodes have.
        sh(&format!("cp -a {}/rootfs/. {}/rootfs/", self.dir.display(), bundle.display()))?;
        let cgroup = if self.cgroupns { r#",{"type":"cgroup"}"# } else { "" };
        let json = format!(
            r#"{{"ociVersion":"1.0.2","annotations":{{"{CRIU_CONF_ANNOTATION}":"{bundle}/criu.conf"}},
 "process":{{"terminal":false,"user":{{"uid":0,"gid":0}},"args":["/hog","{mb}"],"cwd":"/","env":["PATH=/"],
  "capabilities":{{"bounding":["CAP_KILL"],"effective":["CAP_KILL"],"permitted":["CAP_KILL"]}},"noNewPrivileges":true}},
 "root":{{"path":"rootfs"}},"hostname":"hog",
 "mounts":[{{"destination":"/proc","type":"proc","source":"proc"}},
  {{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]}},
  {{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620"]}},
  {{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","noexec","nodev","mode=1777","size=65536k"]}},
  {{"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]}},
  {{"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]}},
  {{"destination":"/run","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]}},
  {{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["nosuid","noexec","nodev","relatime","ro"]}},
  {{"destination":"/etc/hosts","type":"bind","source":"{dir}/hosts","options":["rbind","ro"]}}],
 "linux":{{"cgroupsPath":"/proof/{id}","resources":{{"devices":[{{"allow":false,"access":"rwm"}}]}},
  "namespaces":[{{"type":"pid"}},{{"type":"ipc"}},{{"type":"uts"}},{{"type":"mount"}},{{"type":"network","path":"/run/netns/{netns}"}}{cgroup}],
  "maskedPaths":["/proc/acpi","/proc/kcore","/proc/keys","/proc/timer_list","/sys/firmware"],
  "readonlyPaths":["/proc/bus","/proc/fs","/proc/irq","/proc/sys","/proc/sysrq-trigger"]}}}}"#,
            bundle = bundle.display(),
            dir = self.dir.display(),
            mb = std::env::var("MB").unwrap_or("16".into())
        );
        fs::write(bundle.join("config.json"), json)?;
        Ok(bundle)
    }

    pub(super) fn runc(&self, args: &[&str]) -> Result<String> {
        let out = Command::new(&self.runc).args(args).output()?;
        ensure!(out.status.success(), "runc {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    pub(super) fn start(&self, id: &str, netns: &str, output: &Output) -> Result<Container> {
        self.netns(netns)?;
        let bundle = self.bundle(id, netns)?;
        let pid_file = bundle.join("pid");
        let mut runc = Command::new(&self.runc);
        runc.args(["run", "-d", "--pid-file"]).arg(&pid_file).arg("--bundle").arg(&bundle).arg(id);
        let status = runc.stdin(Stdio::null()).stdout(output.pipe()?).stderr(output.pipe()?).status()?;
        drop(runc);
        ensure!(status.success(), "runc run: {status}");
        Ok(Container {
            id: id.into(),
            netns: netns.into(),
            pid: fs::read_to_string(pid_file)?.parse()?,
            bundle,
        })
    }

    pub(super) fn connect(&self, container: &Container) -> Result<Client> {
        self.link(&container.netns, "up")?;
        let to = if container.netns == "t" { "10.9.0.8:7000" } else { "10.9.0.7:7000" };
        let joined = std::thread::spawn(move || -> Result<TcpStream> {
            setns(File::open("/run/netns/c")?, CloneFlags::CLONE_NEWNET)?;
            let until = Instant::now() + SOON;
            loop {
                match TcpStream::connect(to) {
                    Err(e) if Instant::now() > until => return Err(e.into()),
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                    Ok(s) => return Ok(s),
                }
            }
        });
        let stream = joined.join().expect("connects")?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(Client { stream: BufReader::new(stream), asked: 0 })
    }

    pub(super) fn ask(&mut self, client: &mut Client, times: usize) -> Result<()> {
        for _ in 0..times {
            let (got, want) = (client.ask()?, self.twin.as_mut().expect("a twin").ask()?);
            ensure!(got == want, "memory differs: {got} instead of {want}");
        }
        Ok(())
    }

    pub(super) fn restore(
        &self,
        bundle: &Path,
        images: &Path,
        work: &Path,
        id: &str,
        gates: &GateServer,
    ) -> Result<Child> {
        let mut runc = Command::new(&self.runc);
        runc.arg("--log").arg(work.join("runc.log")).args([
            "restore",
            "--detach",
            "--tcp-established",
            "--ext-unix-sk",
            "--file-locks",
        ]);
        runc.arg("--image-path").arg(images).arg("--work-path").arg(work);
        runc.arg("--bundle").arg(bundle).arg("--pid-file").arg(bundle.join("pid")).arg(id);
        runc.env("PATH", format!("{}:{}", gates.dir().display(), std::env::var("PATH")?));
        runc.stdin(Stdio::null()).stdout(self.output.pipe()?).stderr(self.output.pipe()?);
        runc.spawn().context("runc restore")
    }
}

/// The program of the gates: this one, or a release build of the shim to measure with.
pub(super) fn programs() -> Result<Programs> {
    let full = std::env::var_os("TRANSSHIP_PROOF_PROGRAM").map_or(std::env::current_exe()?, PathBuf::from);
    Ok(Programs { full, quick: None })
}

pub(super) fn finish(runc: Child) -> Result<(bool, String)> {
    let out = runc.wait_with_output()?;
    Ok((out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned()))
}
