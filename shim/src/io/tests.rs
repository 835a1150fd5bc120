//! Streams with a shell, or the test itself, as the container. No root, no runc.

use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::sys::stat::Mode;
use tokio::time::timeout;

use super::*;

/// Generous: the machine may be busy.
pub const LONG: Duration = Duration::from_secs(60);

/// Starts a logging program as the shim's reaper would.
pub fn spawn(mut command: Command) -> Result<Spawned> {
    let mut child = command.spawn()?;
    let pid = child.id();
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = child.wait();
        let _ = tell.send(());
    });
    Ok(Spawned { pid, exited: Box::pin(async { drop(told.await) }) })
}

pub fn context(held: bool) -> Context<'static> {
    Context { namespace: "test", id: "box", owner: None, spawn: &spawn, held }
}

/// A directory with FIFOs, and the streams' configuration for them.
pub struct Bed {
    pub dir: tempfile::TempDir,
}

impl Bed {
    pub fn new() -> Bed {
        Bed { dir: tempfile::tempdir().unwrap() }
    }

    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        path
    }

    pub fn config(&self, stdin: bool) -> StdioConfig {
        let text = |p: PathBuf| p.to_str().unwrap().to_string();
        StdioConfig {
            stdin: if stdin { text(self.fifo("in")) } else { String::new() },
            stdout: text(self.fifo("out")),
            stderr: text(self.fifo("err")),
            terminal: false,
        }
    }
}

/// Starts `sh -c script` with the streams, as runc would start the container.
pub fn container(script: &str, child: ChildStdio) -> Child {
    let stdio = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
    Command::new("sh")
        .args(["-c", script])
        .stdin(stdio(child.stdin))
        .stdout(stdio(child.stdout))
        .stderr(stdio(child.stderr))
        .spawn()
        .unwrap()
}

/// A client that reads a FIFO to its end, as containerd's does.
pub fn reader(path: impl AsRef<Path>) -> tokio::task::JoinHandle<Vec<u8>> {
    // Opened non-blocking and before the shim has opened it.
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
    tokio::task::spawn_blocking(move || {
        let mut file = file;
        let mut all = Vec::new();
        let mut buffer = [0; 8192];
        let begun = Instant::now();
        let mut seen = false;
        loop {
            match file.read(&mut buffer) {
                Ok(0) if seen => return all,
                Ok(0) => std::thread::sleep(Duration::from_millis(1)),
                Ok(n) => {
                    seen = true;
                    all.extend_from_slice(&buffer[..n]);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    seen = true; // somebody has it open for writing
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => panic!("{e}"),
            }
            assert!(begun.elapsed() < LONG, "no end of the stream after {} bytes", all.len());
        }
    })
}

pub async fn text(task: tokio::task::JoinHandle<Vec<u8>>) -> String {
    String::from_utf8(timeout(LONG, task).await.unwrap().unwrap()).unwrap()
}

pub async fn wait(mut child: Child) {
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
}

#[tokio::test]
async fn output_arrives_and_ends() {
    let bed = Bed::new();
    let cfg = bed.config(false);
    let (out, err) = (reader(&cfg.stdout), reader(&cfg.stderr));
    let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
    assert_eq!(io.kinds(), StdioKinds { stdin: Kind::Null, stdout: Kind::Pipe, stderr: Kind::Pipe });
    wait(container("for i in 1 2 3; do echo o$i; echo e$i >&2; done; cat", child)).await;
    io.drain(LONG).await;
    assert_eq!(text(out).await, "o1\no2\no3\n");
    assert_eq!(text(err).await, "e1\ne2\ne3\n");
    io.close().await;
}

#[tokio::test]
async fn null_streams() {
    let (io, child) = ProcessIo::open(&StdioConfig::default(), &context(false)).await.unwrap();
    assert!(child.stdin.is_none() && child.stdout.is_none() && child.stderr.is_none());
    assert_eq!(io.kinds(), StdioKinds::default());
    io.drain(LONG).await;
    io.close().await;
}

#[tokio::test]
async fn one_fifo_for_both() {
    let bed = Bed::new();
    let mut cfg = bed.config(false);
    cfg.stderr = cfg.stdout.clone();
    let out = reader(&cfg.stdout);
    let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
    wait(container("echo one; exec >&-; sleep 0.05; echo two >&2", child)).await;
    io.drain(LONG).await;
    assert_eq!(text(out).await, "one\ntwo\n");
}

#[tokio::test]
async fn missing_reader_and_a_reader_that_leaves() {
    let bed = Bed::new();
    let cfg = bed.config(false);
    let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
    let sh = container("echo first; read x </dev/null; sleep 0.2; echo second; sleep 0.6; echo third", child);
    let mut buffer = [0; 6];
    let (path, first) = (cfg.stdout.clone(), tokio::time::sleep(Duration::from_millis(50)));
    first.await;
    // A client that comes late and leaves after one line.
    File::open(&path).unwrap().read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"first\n");
    // Everything that it missed waits in the FIFO for the next one.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let out = reader(&path);
    wait(sh).await;
    io.drain(LONG).await;
    io.close().await;
    assert_eq!(text(out).await, "second\nthird\n");
}

#[tokio::test]
async fn much_output_with_a_slow_reader_next_to_a_quick_one() {
    let (slow, quick) = (Bed::new(), Bed::new());
    let (slow_cfg, quick_cfg) = (slow.config(false), quick.config(false));
    let (slow_io, child) = ProcessIo::open(&slow_cfg, &context(false)).await.unwrap();
    let slow_sh = container("seq 1 2000000", child);
    tokio::time::sleep(Duration::from_millis(50)).await;
    // The slow one has no reader at all by now; the quick one must not notice.
    let out = reader(&quick_cfg.stdout);
    let (quick_io, child) = ProcessIo::open(&quick_cfg, &context(false)).await.unwrap();
    wait(container("seq 1 300000", child)).await;
    quick_io.drain(LONG).await;
    assert_eq!(text(out).await, (1..=300000).map(|i| format!("{i}\n")).collect::<String>());
    let out = reader(&slow_cfg.stdout);
    wait(slow_sh).await;
    slow_io.drain(LONG).await;
    assert!(text(out).await == (1..=2000000).map(|i| format!("{i}\n")).collect::<String>());
}

#[tokio::test]
async fn log_file_is_appended_to() {
    let bed = Bed::new();
    let log = bed.dir.path().join("new/dir/box.log");
    let uri = format!("file://{}", log.display());
    let cfg = StdioConfig { stdout: uri.clone(), stderr: uri, ..Default::default() };
    for _ in 0..2 {
        let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
        wait(container("seq 1 50000", child)).await;
        io.drain(LONG).await;
        io.close().await;
    }
    let once: String = (1..=50000).map(|i| format!("{i}\n")).collect();
    assert!(std::fs::read_to_string(log).unwrap() == once.repeat(2));
}

#[tokio::test]
async fn full_log_does_not_stop_the_container() {
    let cfg = StdioConfig { stdout: "/dev/full".into(), ..Default::default() };
    let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
    timeout(LONG, wait(container("seq 1 300000", child))).await.unwrap();
    io.drain(LONG).await;
}

#[tokio::test]
async fn stdin_until_closed() {
    let bed = Bed::new();
    let cfg = bed.config(true);
    let out = reader(&cfg.stdout);
    let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
    let sh = container("cat; echo end", child);
    let client = |bytes: &str| {
        File::options().write(true).open(&cfg.stdin).unwrap().write_all(bytes.as_bytes()).unwrap()
    };
    client("first\n");
    tokio::time::sleep(Duration::from_millis(100)).await;
    // The client has detached: not the end.
    client("second\n");
    let big = "x".repeat(200_000);
    let (path, text_of_big) = (cfg.stdin.clone(), big.clone());
    let last = File::options().write(true).open(&path).unwrap();
    io.close_stdin().await;
    // CloseIO comes before the client has closed: what it still sends arrives.
    tokio::task::spawn_blocking(move || (&last).write_all(text_of_big.as_bytes()).unwrap()).await.unwrap();
    timeout(LONG, wait(sh)).await.unwrap();
    io.drain(LONG).await;
    assert!(text(out).await == format!("first\nsecond\n{big}end\n"));
}

#[tokio::test]
async fn stdin_that_the_process_has_closed() {
    let bed = Bed::new();
    let cfg = bed.config(true);
    let out = reader(&cfg.stdout);
    let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
    let sh = container("exec <&-; sleep 0.2; echo alive", child);
    let client = File::options().write(true).open(&cfg.stdin).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    (&client).write_all(b"nobody reads this").unwrap();
    wait(sh).await;
    io.drain(LONG).await;
    assert_eq!(text(out).await, "alive\n");
}

#[tokio::test]
async fn drain_is_bounded() {
    let bed = Bed::new();
    let cfg = bed.config(false);
    let out = reader(&cfg.stdout);
    let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
    wait(container("echo before; sleep 3 & exit", child)).await;
    let begun = Instant::now();
    io.drain(Duration::from_millis(300)).await;
    assert!(begun.elapsed() >= Duration::from_millis(300) && begun.elapsed() < Duration::from_secs(2));
    io.close().await;
    assert_eq!(text(out).await, "before\n");
}

#[tokio::test]
async fn logging_program() {
    let bed = Bed::new();
    let (script, log) = (bed.dir.path().join("log.sh"), bed.dir.path().join("log"));
    std::fs::write(&script, format!(
        "#!/bin/sh\nPATH=/usr/bin:/bin\nexec >{}\necho $CONTAINER_NAMESPACE $CONTAINER_ID $*\nexec 5>&-\ncat <&3\ncat <&4\n",
        log.display()
    )).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?level=a%20b&x", script.display());
    let cfg = StdioConfig { stdout: uri.clone(), stderr: uri.clone(), ..Default::default() };
    let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
    wait(container("seq 1 50000; echo error >&2", child)).await;
    io.drain(LONG).await;
    io.close().await;
    let lines: String = (1..=50000).map(|i| format!("{i}\n")).collect();
    let got = std::fs::read_to_string(&log).unwrap();
    let wanted = format!("test box level a b x\n{lines}error\n");
    assert!(got == wanted, "{} bytes: {:?}...", got.len(), got.get(..60));
    // binary-v2 wants a byte on the ready pipe; this program only closes it.
    let cfg = StdioConfig { stdout: uri.replace("binary", "binary-v2"), ..Default::default() };
    let error = ProcessIo::open(&cfg, &context(false)).await.err().unwrap();
    assert!(format!("{error:#}").contains("without a word"), "{error:#}");
}

/// A pty as runc would send it: streams attached to its master, and the slave.
pub async fn console(cfg: &StdioConfig, held: bool) -> (Arc<ProcessIo>, OwnedFd) {
    let (io, socket) = ProcessIo::open_console(cfg, &std::env::temp_dir(), &context(held)).await.unwrap();
    let pty = nix::pty::openpty(None, None).unwrap();
    let path = socket.path().to_path_buf();
    let master = pty.master;
    std::thread::spawn(move || send_fd(&path, master));
    timeout(LONG, io.attach_console(socket)).await.unwrap().unwrap();
    (io, pty.slave)
}

fn send_fd(path: &Path, fd: OwnedFd) {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::os::fd::AsRawFd;
    let stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    let fds = [fd.as_raw_fd()];
    let parts = [std::io::IoSlice::new(b"/dev/ptmx")];
    sendmsg::<()>(stream.as_raw_fd(), &parts, &[ControlMessage::ScmRights(&fds)], MsgFlags::empty(), None)
        .unwrap();
}

#[tokio::test]
async fn terminal_echo_size_and_exit() {
    let bed = Bed::new();
    let cfg = bed.config(true);
    let out = reader(&cfg.stdout);
    let (io, slave) = console(&cfg, false).await;
    assert!(io.kinds().terminal());
    io.resize(101, 37).unwrap();
    let child = ChildStdio {
        stdin: Some(slave.try_clone().unwrap()),
        stdout: Some(slave.try_clone().unwrap()),
        stderr: Some(slave),
    };
    // A process in the background that keeps the terminal must not keep the output open.
    let sh = container("stty size; read line; echo got $line >&2; trap '' HUP; sleep 2 & sleep 0.1", child);
    tokio::time::sleep(Duration::from_millis(100)).await;
    File::options().write(true).open(&cfg.stdin).unwrap().write_all(b"hello\n").unwrap();
    timeout(LONG, wait(sh)).await.unwrap();
    // The client waits for the end of the output, only then it deletes (and the shim drains).
    io.process_exited();
    assert_eq!(text(out).await, "37 101\r\nhello\r\ngot hello\r\n");
    io.drain(LONG).await;
    io.close().await;
    assert!(io.resize(1, 1).is_err());
}

#[tokio::test]
async fn terminal_without_a_process_for_a_while() {
    let bed = Bed::new();
    let cfg = bed.config(true);
    let out = reader(&cfg.stdout);
    let (io, socket) = ProcessIo::open_console(&cfg, bed.dir.path(), &context(false)).await.unwrap();
    let pty = nix::pty::openpty(None, None).unwrap();
    let name = nix::unistd::ttyname(&pty.slave).unwrap();
    drop((socket, pty.slave));
    io.attach_master(pty.master).unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await;
    for line in ["one", "two"] {
        let slave = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&name).unwrap();
        (&slave).write_all(format!("{line}\n").as_bytes()).unwrap();
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    io.drain(LONG).await;
    assert_eq!(text(out).await, "one\r\ntwo\r\n");
}

#[tokio::test]
async fn terminal_hangs_up_when_stdin_ends() {
    let bed = Bed::new();
    let cfg = bed.config(true);
    let out = reader(&cfg.stdout);
    let (io, slave) = console(&cfg, false).await;
    File::from(slave.try_clone().unwrap()).write_all(b"bye\n").unwrap();
    io.close_stdin().await;
    assert_eq!(text(out).await, "bye\r\n");
    // The master is gone: the slave reads the end.
    let mut slave = File::from(slave);
    let ended = tokio::task::spawn_blocking(move || slave.read(&mut [0; 8]));
    assert_eq!(timeout(LONG, ended).await.unwrap().unwrap().unwrap_or(0), 0);
}
