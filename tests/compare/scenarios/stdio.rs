//! Standard streams on FIFOs: what containerd's own clients give a task.

use anyhow::Result;

use crate::calls::{Call, Stdio};
use crate::making::New;
use crate::spec::{self, Spec};
use crate::subject::Subject;

list![
    both_streams,
    stdin_closed,
    stdin_of_the_client_closed,
    stdin_stream,
    stdin_of_an_exec,
    stdin_never_given,
    only_stdout,
    fifo_missing,
    held_by_a_child,
    client_gone,
    close_after_the_end,
];

fn both_streams(s: &mut Subject) -> Result<()> {
    let (stdio, streams) = s.fifos("t1", false, false)?;
    s.run(New::of(Spec::sh("echo out; echo err >&2; ls -l /proc/self/fd | wc -l; exit 3")).stdio(stdio))?;
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::State(""));
    s.note("stdout", streams.stdout.finish());
    s.note("stderr", streams.stderr.map(|e| e.finish()).unwrap_or_default());
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn stdin_closed(s: &mut Subject) -> Result<()> {
    let (stdio, mut streams) = s.fifos("t1", true, false)?;
    s.run(New::of(Spec::sh("cat; echo end")).stdio(stdio))?;
    streams.write(b"one\ntwo\n")?;
    s.until("it has come", |_| streams.stdout.text().contains("two"));
    let _ = s.call(Call::CloseIo(""));
    std::thread::sleep(std::time::Duration::from_millis(100));
    s.note("while the client has it open", streams.stdout.text());
    streams.close();
    let _ = s.call(Call::Wait(""));
    s.note("stdout", streams.stdout.finish());
    let _ = s.call(Call::CloseIo(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn stdin_of_the_client_closed(s: &mut Subject) -> Result<()> {
    let (stdio, mut streams) = s.fifos("t1", true, false)?;
    s.run(New::of(Spec::sh("cat; echo end")).stdio(stdio))?;
    streams.write(b"one\n")?;
    s.until("it has come", |_| streams.stdout.text().contains("one"));
    streams.close();
    std::thread::sleep(std::time::Duration::from_millis(150));
    s.note("nobody has called CloseIO", streams.stdout.text());
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::CloseIo(""));
    let _ = s.call(Call::Wait(""));
    s.note("stdout", streams.stdout.finish());
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn stdin_stream(s: &mut Subject) -> Result<()> {
    let (stdio, mut streams) = s.fifos("t1", true, false)?;
    s.run(New::of(Spec::sh("cat | md5sum; exit 8")).stdio(stdio))?;
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    streams.write(&bytes)?;
    streams.close();
    let _ = s.call(Call::CloseIo(""));
    let _ = s.call(Call::Wait(""));
    s.note("its sum", streams.stdout.finish());
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn stdin_of_an_exec(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let (stdio, mut streams) = s.fifos("x1", true, false)?;
    let _ = s.exec("x1", spec::script("cat; echo err >&2; exit 2"), stdio);
    streams.write(b"typed")?;
    s.until("it has come", |_| streams.stdout.text().contains("typed"));
    streams.close();
    let _ = s.call(Call::CloseIo("x1"));
    let _ = s.call(Call::Wait("x1"));
    s.note("stdout", streams.stdout.finish());
    s.note("stderr", streams.stderr.map(|e| e.finish()).unwrap_or_default());
    let _ = s.call(Call::Delete("x1"));
    s.end();
    Ok(())
}

fn stdin_never_given(s: &mut Subject) -> Result<()> {
    let log = s.log("t1.log");
    s.run(New::of(Spec::sh("cat; readlink /proc/self/fd/0; exit 3")).stdio(log))?;
    let _ = s.call(Call::CloseIo(""));
    let _ = s.call(Call::Wait(""));
    let text = s.scratched("t1.log");
    s.note("it read to the end at once", text);
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn only_stdout(s: &mut Subject) -> Result<()> {
    let (stdio, streams) = s.fifos("t1", false, false)?;
    let stdio = Stdio { stderr: String::new(), ..stdio };
    s.create(New::of(Spec::sh("echo out; echo err >&2; exit 3")).stdio(stdio))?;
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::Wait(""));
    s.note("stdout", streams.stdout.finish());
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn fifo_missing(s: &mut Subject) -> Result<()> {
    let stdio = Stdio { stdout: s.scratch("none-out"), stderr: s.scratch("none-err"), ..Default::default() };
    s.create(New::of(Spec::idle()).stdio(stdio))?;
    Ok(())
}

/// A process that an exec has left behind holds its stdout: it is waited for a while, not for ever.
fn held_by_a_child(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let (stdio, streams) = s.fifos("x1", false, false)?;
    let _ = s.exec("x1", spec::script("(sleep 1; echo late) & echo early; exit 2"), stdio);
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Delete("x1"));
    s.note("stdout", streams.stdout.finish());
    s.end();
    Ok(())
}

/// The client goes away: the container's writes must neither fail nor stop it.
fn client_gone(s: &mut Subject) -> Result<()> {
    let (stdio, streams) = s.fifos("t1", false, false)?;
    let script =
        "echo first; sleep 0.5; i=0; while [ $i -lt 200 ]; do echo $i; i=$((i+1)); done; touch /done; exit 9";
    s.run(New::of(Spec::sh(script)).stdio(stdio))?;
    s.until("the first line", |_| streams.stdout.text().contains("first"));
    drop(streams);
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn close_after_the_end(s: &mut Subject) -> Result<()> {
    let (stdio, mut streams) = s.fifos("t1", true, false)?;
    s.run(New::of(Spec::sh("exit 5")).stdio(stdio))?;
    let _ = s.call(Call::Wait(""));
    let written = streams.write(b"too late").is_ok();
    s.note("a write after the end", written.to_string());
    let _ = s.call(Call::CloseIo(""));
    let _ = s.direct(Call::CloseIo(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}
