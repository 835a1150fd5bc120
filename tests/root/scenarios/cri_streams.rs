//! Exec, Attach and PortForward as kubectl uses them: both ways at once, terminals, exit codes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::cri_containers::{in_any_order, without_times};
use crate::Scenario;
use crate::bed::wait_for;
use crate::cri::client::Cri;
use crate::cri::compare;
use crate::cri::config::{Attach, PortForward};
use crate::cri::pod::{EXITED, Pod, exec_request};
use crate::cri::record::Record;
use crate::cri::stream::{RESIZE, STATUS, STDERR, STDIN, STDOUT, Stream};
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "cri_stream_exec", needs: Needs::Pods, run: |bed| compare::same(bed, exec) },
    Scenario { name: "cri_stream_attach", needs: Needs::Pods, run: |bed| compare::same(bed, attach) },
    Scenario { name: "cri_stream_ports", needs: Needs::Pods, run: |bed| compare::same(bed, ports) },
];

/// What a stream brought, when it is over.
fn over(stream: &mut Stream, what: &str, record: &mut Record) -> Result<()> {
    stream.end().with_context(|| what.to_owned())?;
    let out = stream.came(STDOUT);
    let shown = if out.len() < 1000 { out } else { format!("{} bytes", out.len()) };
    record.note(&format!("{what}: stdout"), shown);
    record.note(&format!("{what}: stderr"), stream.came(STDERR));
    record.note(&format!("{what}: status"), stream.came(STATUS));
    Ok(())
}

fn exec(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "exec", record)?;
    let id = pod.start("main", &["sleep", "1000"], record)?;
    let open = |cmd: &[&str], tty| Stream::open(cri, "Exec", exec_request(&id, cmd, tty));

    let mut stream = open(&["sh"], false)?;
    stream.send(STDIN, b"echo one; echo two >&2\n")?;
    stream.wait_for(STDOUT, "one\n")?;
    stream.wait_for(STDERR, "two\n")?;
    stream.send(STDIN, b"exit 3\n")?;
    over(&mut stream, "a shell", record)?;
    let status: Value = serde_json::from_str(&stream.came(STATUS))?;
    ensure!(
        status["reason"] == "NonZeroExitCode" && status["details"]["causes"][0]["message"] == "3",
        "{status}"
    );

    let size = |wanted: &str| {
        format!("until [ \"$(stty size 2> /dev/null)\" = \"{wanted}\" ]; do sleep 0.05; done; stty size")
    };
    let script = format!("{}; {}; tty; exit 4", size("33 101"), size("22 77"));
    let mut stream = open(&["sh", "-c", &script], true)?;
    stream.send(RESIZE, br#"{"Width": 101, "Height": 33}"#)?;
    stream.wait_for(STDOUT, "33 101")?;
    stream.send(RESIZE, br#"{"Width": 77, "Height": 22}"#)?;
    stream.wait_for(STDOUT, "22 77")?;
    over(&mut stream, "a terminal", record)?;

    let mut stream =
        open(&["sh", "-c", "yes | head -c 2000000 | md5sum; head -c 300000 /dev/zero | tr '\\0' a"], false)?;
    over(&mut stream, "much", record)?;
    let mut stream = open(&["/no/such/program"], false)?;
    over(&mut stream, "what is not there", record)?;
    let mut stream = open(&["sh", "-c", "kill -TERM $$"], false)?;
    over(&mut stream, "a signal", record)?;
    // when the client goes away without a word, its command is ended, but not what that has started (kubectl's own warning): cat reads the end
    // of its stdin when containerd lets go of the command, which is at once or after 10 s, as it happens
    let mut stream = open(&["sh", "-c", "echo up; cat > /dev/null; sleep 0.2"], false)?;
    stream.wait_for(STDOUT, "up")?;
    drop(stream);
    let mut there = String::new();
    wait_for(Duration::from_secs(30), "the end of what was left", || {
        there = cri.output(&id, &["ps", "-o", "args"])?;
        Ok(!there.lines().any(|line| line == "cat" || line.contains("echo up")))
    })
    .with_context(|| there.clone())?;
    // nobody waits for cat here, unless it ended before its shell
    let alive: Vec<&str> = there.lines().filter(|line| !line.starts_with('[')).collect();
    record.note("still there", alive.join("\n"));
    pod.remove()
}

fn attach(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    let pod = Pod::run(cri, handler, "attach", record)?;
    for tty in [false, true] {
        let name = if tty { "terminal" } else { "pipes" };
        // it waits before its end: containerd lets go of an attached stdout when stderr ends, whatever is still on its way there
        let script = "stty -echo 2> /dev/null; echo ready; while read x; do echo got $x; [ $x != err ] || echo woe >&2; [ $x != end ] || { sleep 0.5; exit 6; }; done; echo eof; exit 5";
        let id = pod.start_with(name, &["sh", "-c", script], record, |config| {
            config.stdin = true;
            config.tty = tty;
        })?;
        pod.wait_log(name, "ready")?;
        let open = || {
            Stream::open(
                cri,
                "Attach",
                Attach { id: id.clone(), stdin: true, tty, stdout: true, stderr: !tty },
            )
        };
        let mut first = open()?;
        std::thread::sleep(Duration::from_millis(300));
        first.send(STDIN, b"one\n")?;
        first.wait_for(STDOUT, "got one")?;
        // another one sees and says the same
        let mut second = open()?;
        std::thread::sleep(Duration::from_millis(300));
        second.send(STDIN, b"err\n")?;
        second.wait_for(STDOUT, "got err")?;
        first.wait_for(STDOUT, "got err")?;
        drop(first);
        second.send(STDIN, b"end\n")?;
        over(&mut second, name, record)?;
        cri.wait_state(&id, EXITED)?;
        record.outcome(name, &cri.verbose(&id));
        record.note(&format!("{name}'s log"), in_any_order(&without_times(&pod.log(name)?)));
    }
    // the first to leave closes stdin where the pod asks for that
    let id = pod.start_with("once", &["sh", "-c", "cat; echo eof; exit 5"], record, |config| {
        config.stdin = true;
        config.stdin_once = true;
    })?;
    let mut only = Stream::open(
        cri,
        "Attach",
        Attach { id: id.clone(), stdin: true, tty: false, stdout: true, stderr: true },
    )?;
    only.send(STDIN, b"text\n")?;
    only.wait_for(STDOUT, "text")?;
    drop(only);
    cri.wait_state(&id, EXITED)?;
    record.outcome("once", &cri.verbose(&id));
    record.note("once's log", without_times(&pod.log("once")?));
    pod.remove()
}

fn ports(cri: &Cri<'_>, handler: &str, record: &mut Record) -> Result<()> {
    /// Of a port: its data, and what went wrong; each begins with the port's number.
    const DATA: u8 = 0;
    const ERROR: u8 = 1;
    let pod = Pod::run(cri, handler, "ports", record)?;
    let id = pod.start(
        "server",
        &["sh", "-c", "mkdir /www; echo hello > /www/x; echo up; exec httpd -f -p 8080 -h /www"],
        record,
    )?;
    pod.wait_log("server", "up")?;
    cri.output(
        &id,
        &["sh", "-c", "until wget -q -O /dev/null http://127.0.0.1:8080/x; do sleep 0.05; done"],
    )?;
    let mut stream = Stream::open(cri, "PortForward", PortForward { id: pod.id.clone(), port: vec![8080] })?;
    stream.send(DATA, b"GET /x HTTP/1.0\r\n\r\n")?;
    stream.wait_for(DATA, "hello\n")?;
    let body = stream.came(DATA);
    record.note("answer", body.lines().next().unwrap_or_default().trim_start_matches(|c: char| c != 'H'));
    record.note("error", stream.came(ERROR).chars().skip(2).collect::<String>());
    let mut stream = Stream::open(cri, "PortForward", PortForward { id: pod.id.clone(), port: vec![9999] })?;
    stream.end()?;
    ensure!(stream.came(ERROR).contains("refused"), "{}", stream.came(ERROR));
    pod.remove()
}
