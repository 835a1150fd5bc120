//! The proof: a real container under stock runc is moved with the parts of this room, held at both gates, moved again, and refused.
//! Needs root, CRIU and the runcs named below; ignored by default. `cargo test -p transship --lib criu:: -- --ignored --nocapture`

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

mod live;
mod memory;

use super::gate_server::Opening;
use super::gate_server::{self, CRIU_CONF_ANNOTATION, GateServer, Wait};
use super::options::{Facts, Limits, dump_options};
use super::plan::{EagerPolicy, Plan, Planner};
use super::{Criu, DumpRequest, Listing, MemoryMode, PageStore, Worker, images, stdio};
use crate::cgroup::Freezer;
use crate::memory::tracker::tasks;

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

fn sh(line: &str) -> Result<String> {
    let out = Command::new("bash").args(["-ec", line]).output()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(out.status.success(), "{line}: {} {}", text, String::from_utf8_lossy(&out.stderr));
    Ok(text)
}

/// What a container has written, as its log would hold it.
#[derive(Clone, Default)]
struct Output(Arc<AtomicU64>);

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

    fn stands_still(&self) -> bool {
        // What was in the pipe before may still be on its way.
        std::thread::sleep(Duration::from_millis(20));
        let before = self.0.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(100));
        before == self.0.load(Ordering::SeqCst)
    }
}

struct Client {
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

struct Bed {
    runc: PathBuf,
    cgroupns: bool,
    criu: Criu,
    dir: PathBuf,
    output: Output,
    fast: Fast,
    /// Dump and restore of each move, milliseconds.
    took: std::cell::RefCell<Vec<[f64; 2]>>,
    /// The sums that the container has to answer, computed by its twin that is never moved.
    twin: Option<Client>,
}

/// How memory travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    /// With its bytes through CRIU.
    Full,
    /// CRIU's list; all of it in the images.
    Eager,
    /// CRIU's list; what can be lazy is.
    Lazy,
}

/// What a dump and a restore are made faster with.
#[derive(Clone, Copy, Debug, Default)]
struct Fast {
    /// CRIU runs in the container's network namespace, at both ends.
    netns: bool,
    /// Our own tar.
    tar: bool,
    /// Log level 1, at both ends.
    quiet: bool,
}

/// What waits for a dump's events.
enum Sink {
    Store(PageStore),
    Planner(Planner, live::Holes),
}

struct Container {
    id: String,
    netns: String,
    bundle: PathBuf,
    pid: i32,
}

impl Bed {
    fn new(runc: &str, cgroupns: bool) -> Result<Self> {
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
    fn netns(&self, name: &str) -> Result<()> {
        let n = if name == "t" { 8 } else { 7 };
        sh(&format!(
            "ip netns add {name}; ip -n {name} link set lo up; ip link add p-{name} type veth peer name eth0 netns {name}; \
             ip link set p-{name} master br0 up; ip -n {name} link set eth0 address 02:00:00:00:00:0{n}; \
             ip -n {name} addr add 10.9.0.{n}/24 dev eth0; ip -n {name} link set eth0 up; ip link set p-{name} down"
        ))
        .map(drop)
    }

    /// The link first: a namespace is taken down some time after its name has gone.
    fn drop_netns(&self, name: &str) -> Result<()> {
        sh(&format!("ip link del p-{name}; ip netns del {name}")).map(drop)
    }

    fn link(&self, name: &str, state: &str) -> Result<()> {
        sh(&format!("ip link set p-{name} {state}")).map(drop)
    }

    fn bundle(&self, id: &str, netns: &str) -> Result<PathBuf> {
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

    fn runc(&self, args: &[&str]) -> Result<String> {
        let out = Command::new(&self.runc).args(args).output()?;
        ensure!(out.status.success(), "runc {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    fn start(&self, id: &str, netns: &str, output: &Output) -> Result<Container> {
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

    fn connect(&self, container: &Container) -> Result<Client> {
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

    fn ask(&mut self, client: &mut Client, times: usize) -> Result<()> {
        for _ in 0..times {
            let (got, want) = (client.ask()?, self.twin.as_mut().expect("a twin").ask()?);
            ensure!(got == want, "memory differs: {got} instead of {want}");
        }
        Ok(())
    }

    /// Moves a container; `refuse` says no at the second gate.
    fn move_to(
        &self,
        from: &Container,
        id: &str,
        netns: &str,
        memory: Memory,
        refuse: bool,
    ) -> Result<Option<Container>> {
        let spec = oci_spec::runtime::Spec::load(from.bundle.join("config.json"))?;
        self.netns(netns)?;
        let bundle = self.bundle(id, netns)?;
        // The writable layer, of which this room knows nothing.
        sh(&format!("cp -a {}/rootfs/. {}/rootfs/", from.bundle.display(), bundle.display()))?;
        let dir = |name: &str| -> Result<PathBuf> {
            let path = bundle.join(name);
            fs::create_dir_all(&path)?;
            Ok(path)
        };
        let (images_out, images_in, work) = (dir("images-out")?, dir("images-in")?, dir("work")?);

        // Destination, before the freeze: everything of runc's own.
        let state = PathBuf::from(format!("/run/runc/{}/state.json", from.id));
        let descriptors = stdio::descriptors(Some(&state), from.pid)?;
        stdio::write(&images_in, &descriptors)?;
        let mut gates = GateServer::prepare(&bundle, &program()?, &self.criu.path, "")?;
        let begun = Instant::now();
        let runc = self.restore(&bundle, &images_in, &work, id, &gates)?;
        let pidfd = gate_server::pidfd(i32::try_from(runc.id())?)?;
        let wait = || Wait { or_end_of: Some(pidfd.as_fd()), ..Wait::at_most(SOON) };
        gates.wait_restore(&wait())?;
        let prepared = begun.elapsed();

        // Source.
        let freezer = Freezer::of_pid(from.pid)?;
        let mode = if memory == Memory::Full { MemoryMode::Full } else { MemoryMode::Parent };
        let tools = match self.fast.tar {
            true => Some(super::tar::tools(&work, &program()?)?),
            false => None,
        };
        let inside = match self.fast.netns {
            true => Some(File::open(format!("/proc/{}/ns/net", from.pid))?),
            false => None,
        };
        let worker = Worker {
            memory: mode,
            netns: inside.as_ref().map(|f| f.as_fd()),
            path_first: tools.as_deref(),
            ..Worker::default()
        };
        let ready = self.criu.prepare_dump(&worker)?;
        let frozen_at = Instant::now();
        ensure!(!freezer.freeze(SOON)?, "was frozen before");
        let froze = frozen_at.elapsed();
        self.link(&from.netns, "down")?;
        let facts = Facts::gather(&spec, from.pid, &from.bundle.join("rootfs"), freezer.path())?;
        let log_level = if self.fast.quiet { 1 } else { 4 };
        let opts = dump_options(&spec, &facts, &Limits { log_level, ..Limits::default() })?;
        let eager_max = if memory == Memory::Eager { u64::MAX } else { 0 };
        let mut sink = match memory {
            Memory::Full => Sink::Store(PageStore::new(&images_in, 1 << 30)),
            _ => Sink::Planner(
                Planner::new(&images_in, EagerPolicy { eager_max, hot_max: 1 << 20 }),
                live::Holes::default(),
            ),
        };
        let ids: Vec<u64> =
            tasks(&freezer.pids()?.into_iter().collect::<Vec<_>>()).iter().map(|t| t.vpid).collect();
        let mut post_dump = false;
        let dumping = Instant::now();
        let stats = ready.dump(
            &mut DumpRequest {
                opts,
                images_dir: &images_out,
                work_dir: &work,
                descriptors: &descriptors,
                on_images: None,
                on_post_dump: Some(&mut || {
                    post_dump = true;
                    Ok(())
                }),
                listing: if self.fast.netns { Listing::Written(&ids) } else { Listing::Sent },
                on_shared: None,
            },
            &mut |event| match &mut sink {
                Sink::Store(store) => store.event(event),
                Sink::Planner(planner, holes) => {
                    holes.event(&event);
                    planner.event(event)
                }
            },
        )?;
        let dumped = dumping.elapsed();
        ensure!(post_dump, "no post-dump");
        ensure!(freezer.is_frozen()?, "the source is not frozen after the dump");
        for entry in fs::read_dir(&images_out)? {
            let name = entry?.file_name().into_string().expect("plain names");
            ensure!(!images::is_memory_image(&name), "CRIU wrote {name} itself");
            if name != stdio::FILE {
                let mut to = images::create(&images_in, &name)?;
                std::io::copy(&mut File::open(images_out.join(&name))?, &mut to)?;
            }
        }

        // Destination.
        let (bytes, plan, pages) = match sink {
            Sink::Store(store) => (store.finish()?, Plan::default(), None),
            Sink::Planner(planner, holes) => {
                let store = holes.read(&freezer)?;
                let plan = planner.finish(&store, &[], &[])?;
                ensure!(plan.is_eager() == (memory == Memory::Eager), "{plan:?}");
                let pages =
                    if plan.is_eager() { None } else { Some(live::Pages::serve(&work, store, &plan)?) };
                (plan.eager_bytes + plan.lazy_bytes, plan, pages)
            }
        };
        ensure!(bytes > 0 && (memory != Memory::Full || bytes == stats.page_bytes), "{bytes} bytes");
        let opened = Instant::now();
        let target = PathBuf::from(format!("/run/netns/{netns}"));
        gates.open_restore_with(&Opening {
            lazy_pages: pages.is_some(),
            netns: self.fast.netns.then_some(target.as_path()),
            path_first: tools.as_deref(),
            log_level: self.fast.quiet.then_some(1),
        })?;
        gates.wait_restored(&wait())?;
        let restored = opened.elapsed();
        self.took.borrow_mut().push([dumped, restored].map(|d| d.as_secs_f64() * 1e3));
        ensure!(self.output.stands_still(), "tasks ran while held");
        let state = self.runc(&["state", id])?;
        ensure!(state.contains("\"running\""), "runc says {state}");
        let opened = Instant::now();
        if refuse {
            gates.refuse()?;
            ensure!(!finish(runc)?.0, "a refused restore succeeded");
            println!("refused: runc ended {:?} after", opened.elapsed());
            ensure!(self.runc(&["state", id]).is_err(), "a container is left");
            if let Some(pages) = pages {
                pages.abort();
            }
            fs::remove_dir_all(&bundle)?;
            freezer.thaw()?;
            self.link(&from.netns, "up")?;
            self.drop_netns(netns)?;
            return Ok(None);
        }
        freezer.kill_all(SOON)?;
        let killed = opened.elapsed();
        let opened = Instant::now();
        gates.open_run()?;
        self.link(netns, "up")?;
        let (ok, said) = finish(runc)?;
        ensure!(ok, "runc restore: {said}");
        let served = match pages {
            Some(pages) => {
                pages.running();
                format!("{:?}", pages.finish()?)
            }
            None => String::new(),
        };
        println!(
            "moved {} -> {id} ({memory:?}): {} KiB of pages, {} lazy | prepared {prepared:.1?} | freeze {froze:.1?} | dump {dumped:.1?} (spawn {:.1?}, sink {:.1?}) | \
             restore to gate {restored:.1?} | kill source {killed:.1?} | go to runc's end {:.1?} | {served}",
            from.id,
            bytes >> 10,
            plan.lazy_bytes >> 10,
            stats.spawn,
            stats.in_sink,
            opened.elapsed()
        );
        self.runc(&["delete", "--force", &from.id])?;
        self.drop_netns(&from.netns)?;
        gate_server::remove(&bundle)?;
        let pid = fs::read_to_string(bundle.join("pid"))?.parse()?;
        Ok(Some(Container { id: id.into(), netns: netns.into(), bundle, pid }))
    }

    /// The network fails in the middle of the pages, or the writable layer at the end: CRIU ends properly and the source goes on.
    fn failing_dumps(&self, from: &Container) -> Result<()> {
        let spec = oci_spec::runtime::Spec::load(from.bundle.join("config.json"))?;
        for in_pages in [true, false] {
            let dir = tempfile::tempdir_in(&from.bundle)?;
            let freezer = Freezer::of_pid(from.pid)?;
            freezer.freeze(SOON)?;
            let facts = Facts::gather(&spec, from.pid, &from.bundle.join("rootfs"), freezer.path())?;
            let mut request = DumpRequest {
                opts: dump_options(&spec, &facts, &Limits::default())?,
                images_dir: dir.path(),
                work_dir: dir.path(),
                descriptors: &stdio::descriptors(None, from.pid)?,
                on_images: None,
                on_post_dump: Some(&mut || anyhow::bail!("cut")),
                listing: Listing::Sent,
                on_shared: None,
            };
            let mut events = 0;
            let result = self.criu.dump(&mut request, &mut |_| {
                events += 1;
                ensure!(!in_pages || events < 5, "cut");
                Ok(())
            });
            ensure!(freezer.is_frozen()?, "not frozen after a failed dump");
            freezer.thaw()?;
            let said = format!("{:#}", result.expect_err("fails"));
            ensure!(said == "dumping the container: cut", "{said}");
        }
        Ok(())
    }

    fn restore(
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
}

impl Bed {
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

/// The program of the gates: this one, or a release build of the shim to measure with.
fn program() -> Result<PathBuf> {
    Ok(std::env::var_os("TRANSSHIP_PROOF_PROGRAM").map_or(std::env::current_exe()?, PathBuf::from))
}

fn finish(runc: Child) -> Result<(bool, String)> {
    let out = runc.wait_with_output()?;
    Ok((out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned()))
}
