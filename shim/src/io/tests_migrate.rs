//! The streams of a container that moves: nothing lost, nothing twice, in order. SIGSTOP plays the freezer.

use std::{
    fs::File,
    io::{Read, Write},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::timeout;

use super::{tests::*, *};

const NO_GRACE: Duration = Duration::ZERO;
const GRACE: Duration = Duration::from_millis(200);

/// Waits until a writer stands still because nobody reads: what `client` could read has filled its FIFO, and the writer has slept for a
/// while without writing on. Only for one that never stops writing by itself.
async fn stuck(writer: &Child, client: &File) {
    use std::os::fd::AsRawFd;
    let proc = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", writer.id())).unwrap();
    let written = || proc("io").lines().find_map(|l| l.strip_prefix("wchar: ").map(String::from));
    let sleeps = || proc("stat").rsplit_once(") ").unwrap().1.starts_with('S');
    let (begun, mut before, mut quiet) = (Instant::now(), None, 0);
    while quiet < 8 {
        assert!(begun.elapsed() < LONG, "the writer never got stuck");
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut readable = 0;
        // SAFETY: FIONREAD writes one int.
        let asked = unsafe { libc::ioctl(client.as_raw_fd(), libc::FIONREAD, &mut readable) };
        let now = (written(), readable);
        let still = asked == 0 && readable > 16 << 10 && sleeps() && before.as_ref() == Some(&now);
        quiet = if still { quiet + 1 } else { 0 };
        before = Some(now);
    }
}

fn freeze(child: &Child) {
    let pid = Pid::from_raw(child.id() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    let stat = format!("/proc/{pid}/stat");
    let begun = Instant::now();
    // Z: it has ended in the meantime.
    while !std::fs::read_to_string(&stat).unwrap().rsplit_once(") ").unwrap().1.starts_with(['T', 'Z']) {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn thaw(child: &Child) {
    kill(Pid::from_raw(child.id() as i32), Signal::SIGCONT).unwrap();
}

/// `seq` without a shell in between, so that the signal reaches the writer.
fn seq(last: u32, child: ChildStdio) -> Child {
    let out = child.stdout.unwrap();
    Command::new("seq").arg(last.to_string()).stdin(Stdio::null()).stdout(out).spawn().unwrap()
}

/// What is left in a client's FIFO that was opened without blocking, to its end. It waits for that end: for a moment after the
/// shim has closed the FIFO, the child that another test's thread is just forking still holds a copy of the descriptor.
fn read_rest(mut client: File, into: &mut Vec<u8>) {
    fcntl(&client, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    client.read_to_end(into).unwrap();
}

fn numbers(last: u32) -> String {
    (1..=last).map(|i| format!("{i}\n")).collect()
}

#[tokio::test]
async fn rollback_under_load_is_exact() {
    const LAST: u32 = 3_000_000;
    let bed = Bed::new();
    let cfg = bed.config(false);
    let out = reader(&cfg.stdout);
    let (io, child) = ProcessIo::open(&cfg, &context(false)).await.unwrap();
    let mut seq = seq(LAST, child);
    let mut carried = 0;
    for round in 0..40 {
        tokio::time::sleep(Duration::from_millis(2 + round % 5)).await;
        if seq.try_wait().unwrap().is_some() {
            break;
        }
        freeze(&seq);
        let grace = if round % 2 == 0 { NO_GRACE } else { Duration::from_millis(3) };
        // A migration calls from its own thread.
        let (runtime, other) = (tokio::runtime::Handle::current(), io.clone());
        let quiesce = move || {
            let carry = runtime.block_on(other.quiesce(grace));
            other.resume();
            carry
        };
        carried +=
            usize::from(!tokio::task::spawn_blocking(quiesce).await.unwrap().unwrap().stdout.is_empty());
        thaw(&seq);
    }
    wait(seq).await;
    io.drain(LONG).await;
    assert!(carried > 0, "the test never caught anything in flight");
    assert!(text(out).await == numbers(LAST));
}

/// Moves a writer's stream from one pair of streams to another; the "restored" writer continues where the frozen one stopped.
async fn moved(grace: Duration, slow_source: bool) {
    const LAST: u32 = 1_000_000;
    let (a, b) = (Bed::new(), Bed::new());
    let (cfg_a, cfg_b) = (a.config(false), b.config(false));
    let (io_a, child) = ProcessIo::open(&cfg_a, &context(false)).await.unwrap();
    // The source's writer is ourselves, so that we know exactly what it has written when it "freezes".
    let pipe = File::from(fd::reopen(child.stdout.as_ref().unwrap(), true).unwrap());
    let all = numbers(LAST);
    let out_a = (!slow_source).then(|| reader(&cfg_a.stdout));
    let mut written = 0;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(60) {
        match (&pipe).write(&all.as_bytes()[written..]) {
            Ok(n) => written += n,
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
        tokio::task::yield_now().await;
    }
    let begun = Instant::now();
    let carry = io_a.quiesce(grace).await.unwrap();
    assert!(begun.elapsed() < grace + Duration::from_millis(500), "quiesce took {:?}", begun.elapsed());
    assert_eq!(carry.stdout.is_empty(), !slow_source, "{} bytes carried", carry.stdout.len());

    let out_b = reader(&cfg_b.stdout);
    let carry = serde_json::from_str(&serde_json::to_string(&carry).unwrap()).unwrap();
    let (io_b, child_b) = ProcessIo::open_like(&io_a.kinds(), &cfg_b, &context(true)).await.unwrap();
    io_b.preload(carry).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    io_a.discard();
    io_b.resume();
    let out_a = out_a.unwrap_or_else(|| reader(&cfg_a.stdout));
    let mut rest = File::from(child_b.stdout.unwrap());
    drop(child_b.stderr);
    let tail = all.as_bytes()[written..].to_vec();
    tokio::task::spawn_blocking(move || rest.write_all(&tail).unwrap()).await.unwrap();
    drop((child, pipe));
    io_a.drain(LONG).await;
    io_a.close().await;
    io_b.drain(LONG).await;
    // The FIFO of a source whose reader came only after its shim had closed it has lost its content: there the test has no reader
    // before, and only looks at the destination.
    let (got_a, got_b) = (
        if slow_source {
            out_a.abort();
            String::new()
        } else {
            text(out_a).await
        },
        text(out_b).await,
    );
    if slow_source {
        assert!(all.ends_with(&got_b) && got_b.len() > all.len() - written);
    } else {
        assert!(got_a + &got_b == all);
    }
}

#[tokio::test]
async fn moved_with_a_quick_reader() {
    moved(GRACE, false).await;
}

#[tokio::test]
async fn moved_with_a_stuck_reader() {
    moved(Duration::from_millis(30), true).await;
}

#[tokio::test]
async fn stuck_reader_that_wakes_up_reads_no_carried_byte() {
    let (a, b) = (Bed::new(), Bed::new());
    let (cfg_a, cfg_b) = (a.config(false), b.config(false));
    // The client on the source has its FIFO open and does not read.
    let mut client =
        std::os::unix::fs::OpenOptionsExt::custom_flags(File::options().read(true), libc::O_NONBLOCK)
            .open(&cfg_a.stdout)
            .unwrap();
    let (io_a, child) = ProcessIo::open(&cfg_a, &context(false)).await.unwrap();
    let writer = seq(100_000, child);
    stuck(&writer, &client).await;
    freeze(&writer);
    let carry = io_a.quiesce(Duration::from_millis(20)).await.unwrap();
    assert!(carry.stdout.len() > 64 << 10, "pipe and pending: {}", carry.stdout.len());
    // It wakes up when everything is carried already, and not yet committed.
    let mut got_a = vec![0; 20_000];
    client.read_exact(&mut got_a).unwrap();
    tokio::time::sleep(Duration::from_millis(30)).await;
    let (io_b, child_b) = ProcessIo::open_like(&io_a.kinds(), &cfg_b, &context(true)).await.unwrap();
    let mut early =
        std::os::unix::fs::OpenOptionsExt::custom_flags(File::options().read(true), libc::O_NONBLOCK)
            .open(&cfg_b.stdout)
            .unwrap();
    io_b.preload(carry).await.unwrap();
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(early.read(&mut [0; 1]).is_err(), "written before the commit");
    drop(early);
    let out_b = reader(&cfg_b.stdout);
    io_a.discard();
    io_b.resume();
    drop(child_b);
    kill(Pid::from_raw(writer.id() as i32), Signal::SIGKILL).unwrap();
    wait(writer).await;
    io_a.drain(LONG).await;
    io_a.close().await;
    read_rest(client, &mut got_a);
    io_b.drain(LONG).await;
    let both = String::from_utf8(got_a).unwrap() + &text(out_b).await;
    assert!(numbers(100_000).starts_with(&both) && both.len() > 128 << 10, "{}", both.len());
}

#[tokio::test]
async fn kinds_win_over_uris() {
    let bed = Bed::new();
    let cfg = bed.config(true);
    let out = reader(&cfg.stdout);
    // The process has stderr only; here a client asks for everything.
    let kinds = StdioKinds { stdin: Kind::Null, stdout: Kind::Null, stderr: Kind::Pipe };
    let (io, child) = ProcessIo::open_like(&kinds, &cfg, &context(false)).await.unwrap();
    assert!(child.stdin.is_none() && child.stdout.is_none() && child.stderr.is_some());
    drop(child);
    io.drain(LONG).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    io.close().await;
    assert_eq!(text(out).await, "");
    // And the other way round: three pipes and nobody who asks.
    let kinds = StdioKinds { stdin: Kind::Pipe, stdout: Kind::Pipe, stderr: Kind::Pipe };
    let (io, child) = ProcessIo::open_like(&kinds, &StdioConfig::default(), &context(false)).await.unwrap();
    let sh = container("seq 1 100000; seq 1 100000 >&2; cat; exit 0", child);
    tokio::time::sleep(Duration::from_millis(100)).await;
    io.close_stdin().await;
    timeout(LONG, wait(sh)).await.unwrap();
    io.drain(LONG).await;
}

#[tokio::test]
async fn stdin_moves_with_what_nobody_has_read() {
    let (a, b) = (Bed::new(), Bed::new());
    let (cfg_a, cfg_b) = (a.config(true), b.config(true));
    let (io_a, child_a) = ProcessIo::open(&cfg_a, &context(false)).await.unwrap();
    let sent: Vec<u8> = numbers(30_000).into_bytes();
    let client =
        std::os::unix::fs::OpenOptionsExt::custom_flags(File::options().write(true), libc::O_NONBLOCK)
            .open(&cfg_a.stdin)
            .unwrap();
    let mut at = 0;
    // Fill everything: the process's pipe, what the shim holds, the FIFO.
    for _ in 0..50 {
        while let Ok(n) = (&client).write(&sent[at..]) {
            at += n;
            if at == sent.len() {
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(at > 100_000, "{at}");
    let mut process = File::from(child_a.stdin.unwrap());
    let mut first = vec![0; 1000];
    process.read_exact(&mut first).unwrap();
    // Twice, with a rollback in between.
    let once = io_a.quiesce(NO_GRACE).await.unwrap();
    io_a.resume();
    let mut more = vec![0; 5000];
    process.read_exact(&mut more).unwrap();
    let carry = io_a.quiesce(NO_GRACE).await.unwrap();
    assert!(once.stdin == sent[1000..at] && carry.stdin == sent[6000..at]);
    assert!(!carry.stdin_ended && !carry.stdin_closed);

    let (io_b, child_b) = ProcessIo::open_like(&io_a.kinds(), &cfg_b, &context(true)).await.unwrap();
    io_b.preload(carry).await.unwrap();
    io_a.discard();
    let mut moved = File::from(child_b.stdin.unwrap());
    let mut head = vec![0; 50_000];
    // Before resume already: the first part is in the pipe.
    moved.read_exact(&mut head).unwrap();
    io_b.resume();
    let client = File::options().write(true).open(&cfg_b.stdin).unwrap();
    (&client).write_all(b"new client\n").unwrap();
    drop(client);
    io_b.close_stdin().await;
    let rest = tokio::task::spawn_blocking(move || {
        let mut rest = Vec::new();
        moved.read_to_end(&mut rest).unwrap();
        rest
    });
    head.extend(timeout(LONG, rest).await.unwrap().unwrap());
    assert!(head == [&sent[6000..at], b"new client\n"].concat());
}

#[tokio::test]
async fn ended_stdin_stays_ended() {
    let (a, b) = (Bed::new(), Bed::new());
    let cfg_a = a.config(true);
    let (io_a, child_a) = ProcessIo::open(&cfg_a, &context(false)).await.unwrap();
    File::options().write(true).open(&cfg_a.stdin).unwrap().write_all(b"all there is").unwrap();
    io_a.close_stdin().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let carry = io_a.quiesce(NO_GRACE).await.unwrap();
    assert!(carry.stdin_ended && carry.stdin == b"all there is");
    drop(child_a);
    for cfg in [StdioConfig::default(), b.config(true)] {
        let (io_b, child_b) = ProcessIo::open_like(&io_a.kinds(), &cfg, &context(true)).await.unwrap();
        // A client that has its end open changes nothing: what has ended has ended.
        let client = (!cfg.stdin.is_empty()).then(|| File::options().write(true).open(&cfg.stdin).unwrap());
        io_b.preload(carry.clone()).await.unwrap();
        io_b.resume();
        let mut stdin = File::from(child_b.stdin.unwrap());
        let read = tokio::task::spawn_blocking(move || {
            let mut all = String::new();
            stdin.read_to_string(&mut all).unwrap();
            all
        });
        assert_eq!(timeout(LONG, read).await.unwrap().unwrap(), "all there is");
        drop(client);
    }
}

#[tokio::test]
async fn large_pipes_keep_their_size() {
    let (io_a, child) = ProcessIo::open_like(
        &StdioKinds { stdin: Kind::Null, stdout: Kind::Pipe, stderr: Kind::Null },
        &StdioConfig::default(),
        &context(true),
    )
    .await
    .unwrap();
    let out = child.stdout.unwrap();
    fd::set_capacity(&out, 1 << 20).unwrap();
    let full: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    File::from(fd::reopen(&out, true).unwrap()).write_all(&full).unwrap();
    // Held from the start, so nothing has moved; the sink is nowhere, so all of it is taken there.
    let carry = io_a.quiesce(NO_GRACE).await.unwrap();
    assert_eq!(carry.pipe_sizes[1], 1 << 20);
    let (io_b, child_b) =
        ProcessIo::open_like(&io_a.kinds(), &StdioConfig::default(), &context(true)).await.unwrap();
    io_b.preload(carry).await.unwrap();
    assert_eq!(fd::capacity(&child_b.stdout.unwrap()).unwrap(), 1 << 20);
}

#[tokio::test]
async fn terminal_moves_with_its_queue() {
    let (a, b) = (Bed::new(), Bed::new());
    let (cfg_a, cfg_b) = (a.config(true), b.config(true));
    let (io_a, slave_a) = console(&cfg_a, false).await;
    io_a.resize(90, 30).unwrap();
    let out_a = reader(&cfg_a.stdout);
    let client = File::options().write(true).open(&cfg_a.stdin).unwrap();
    (&client).write_all(b"whole line\nsecond\npart").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut process = File::from(slave_a.try_clone().unwrap());
    process.write_all(b"prompt> ").unwrap();

    // A rollback: the process reads line by line what was typed, and nothing is echoed again.
    let once = io_a.quiesce(GRACE).await.unwrap();
    assert_eq!(once.tty_input, b"whole line\nsecond\npart");
    assert_eq!(once.winsize, Some((90, 30)));
    io_a.resume();
    let mut line = [0; 64];
    assert_eq!(process.read(&mut line).unwrap(), 11, "{:?}", String::from_utf8_lossy(&line));

    let carry = io_a.quiesce(GRACE).await.unwrap();
    assert_eq!(carry.tty_input, b"second\npart");
    assert_eq!(carry.stdout, b"");
    let (io_b, slave_b) = console(&cfg_b, true).await;
    let out_b = reader(&cfg_b.stdout);
    io_b.preload(carry).await.unwrap();
    io_a.discard();
    io_b.resume();
    assert_eq!(crate::console::size(std::os::fd::AsFd::as_fd(&slave_b)).unwrap(), (90, 30));
    let mut moved = File::from(slave_b);
    let n = moved.read(&mut line).unwrap();
    assert_eq!(&line[..n], b"second\n");
    // The line that was being typed can still be edited: delete "t", go on.
    File::options().write(true).open(&cfg_b.stdin).unwrap().write_all(b"\x7fk\n").unwrap();
    let (n, moved) =
        tokio::task::spawn_blocking(move || (moved.read(&mut line).map(|n| line[..n].to_vec()), moved))
            .await
            .unwrap();
    assert_eq!(n.unwrap(), b"park\n");
    drop((moved, process, slave_a));
    io_a.drain(LONG).await;
    io_b.drain(LONG).await;
    assert_eq!(text(out_a).await, "whole line\r\nsecond\r\npartprompt> ");
    assert_eq!(text(out_b).await, "\x08 \x08k\r\n");
}

#[tokio::test]
async fn terminal_output_is_carried_when_the_reader_is_stuck() {
    let (a, b) = (Bed::new(), Bed::new());
    let (cfg_a, cfg_b) = (a.config(true), b.config(true));
    let client =
        std::os::unix::fs::OpenOptionsExt::custom_flags(File::options().read(true), libc::O_NONBLOCK)
            .open(&cfg_a.stdout)
            .unwrap();
    let (io_a, slave_a) = console(&cfg_a, false).await;
    let mut seq = Command::new("seq").arg("100000").stdin(Stdio::null()).stdout(slave_a).spawn().unwrap();
    stuck(&seq, &client).await;
    assert!(seq.try_wait().unwrap().is_none(), "it must be blocked");
    freeze(&seq);
    let once = io_a.quiesce(Duration::from_millis(20)).await.unwrap();
    let carry = io_a.quiesce(Duration::from_millis(20)).await.unwrap();
    assert!(carry.stdout.len() > 4096);
    // The second time the FIFO may have taken a little more: a write of less than PIPE_BUF is all or nothing.
    assert!(once.stdout.ends_with(&carry.stdout), "{} then {}", once.stdout.len(), carry.stdout.len());
    let (io_b, slave_b) = console(&cfg_b, true).await;
    let out_b = reader(&cfg_b.stdout);
    let carried = carry.stdout.len();
    io_b.preload(carry).await.unwrap();
    io_a.discard();
    kill(Pid::from_raw(seq.id() as i32), Signal::SIGKILL).unwrap();
    wait(seq).await;
    io_a.drain(LONG).await;
    io_a.close().await;
    let mut got = Vec::new();
    read_rest(client, &mut got);
    io_b.resume();
    io_b.drain(LONG).await;
    drop(slave_b);
    // how much a FIFO takes depends on the sizes of what is written to it
    let taken = got.len();
    let both = String::from_utf8(got).unwrap() + &text(out_b).await;
    assert_eq!(both.len(), taken + carried, "{taken} and {carried}");
    assert!(numbers(100_000).replace('\n', "\r\n").starts_with(&both), "{taken} and {carried}");
}

#[tokio::test]
async fn logging_program_on_both_sides() {
    let bed = Bed::new();
    let program = |name: &str, body: &str| {
        let (script, log) = (bed.dir.path().join(format!("{name}.sh")), bed.dir.path().join(name));
        std::fs::write(
            &script,
            format!("#!/bin/sh\nPATH=/usr/bin:/bin\nexec 5>&- >{}\n{body}\n", log.display()),
        )
        .unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        (
            StdioConfig {
                stdout: format!("binary://{}", script.display()),
                stderr: "x".into(),
                ..Default::default()
            },
            log,
        )
    };
    // The source's program reads one line and then stalls until the move is over.
    let go = bed.dir.path().join("go");
    let body = format!(
        "read line <&3; echo $line; until [ -e {} ]; do sleep 0.01; done; exec cat <&3",
        go.display()
    );
    let (cfg_a, log_a) = program("a", &body);
    let (cfg_b, log_b) = program("b", "exec cat <&3");
    let (io_a, child_a) = ProcessIo::open(&cfg_a, &context(false)).await.unwrap();
    let mut process = File::from(child_a.stdout.unwrap());
    process.write_all(b"to a\n").unwrap();
    let begun = Instant::now();
    while std::fs::read_to_string(&log_a).unwrap_or_default() != "to a\n" {
        assert!(begun.elapsed() < LONG, "the source's program never read its line");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    process.write_all(b"to b\n").unwrap();
    for _ in 0..2 {
        assert_eq!(io_a.quiesce(Duration::from_millis(20)).await.unwrap().stdout, b"to b\n");
        io_a.resume();
    }
    let carry = io_a.quiesce(Duration::from_millis(20)).await.unwrap();
    let (io_b, child_b) = ProcessIo::open_like(&io_a.kinds(), &cfg_b, &context(true)).await.unwrap();
    io_b.preload(carry).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(std::fs::read_to_string(&log_b).unwrap(), "", "written before the commit");
    io_a.discard();
    io_b.resume();
    File::from(child_b.stdout.unwrap()).write_all(b"and more\n").unwrap();
    drop((process, child_a.stderr, child_b.stderr));
    std::fs::write(go, "").unwrap();
    io_a.drain(LONG).await;
    io_b.drain(LONG).await;
    io_a.close().await;
    assert_eq!(std::fs::read_to_string(&log_a).unwrap(), "to a\n");
    assert_eq!(std::fs::read_to_string(&log_b).unwrap(), "to b\nand more\n");
}
