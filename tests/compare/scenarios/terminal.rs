//! Terminals: of containers and execs, their size, their end.

use anyhow::Result;

use crate::calls::Call;
use crate::making::New;
use crate::spec::{self, Spec};
use crate::subject::Subject;

list![terminal, terminal_size, terminal_of_an_exec, terminal_input_closed, resize_without, terminal_unread];

fn terminal(s: &mut Subject) -> Result<()> {
    let (stdio, mut streams) = s.fifos("t1", true, true)?;
    let script =
        "tty; test -t 0 && test -t 1 && test -t 2 && echo all; read line; echo \"got $line\"; exit 7";
    s.run(New::of(Spec::sh(script).terminal()).stdio(stdio))?;
    let _ = s.call(Call::State(""));
    s.until("it asks", |_| streams.stdout.text().contains("all"));
    streams.write(b"typed\n")?;
    let _ = s.call(Call::Wait(""));
    s.note("the screen", streams.stdout.finish());
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn terminal_size(s: &mut Subject) -> Result<()> {
    let (stdio, streams) = s.fifos("t1", true, true)?;
    let script = "trap 'stty size' WINCH; stty size; echo ready; while :; do sleep 0.05; done";
    let spec = Spec::sh(script).terminal();
    let spec = spec.with("/process/consoleSize", serde_json::json!({ "height": 12, "width": 34 }));
    s.create(New::of(spec).stdio(stdio))?;
    let _ = s.call(Call::Resize("", 97, 31));
    let _ = s.call(Call::Start(""));
    s.until("it is ready", |_| streams.stdout.text().contains("ready"));
    let _ = s.call(Call::Resize("", 55, 17));
    s.until("it has heard", |_| streams.stdout.text().contains("17 55"));
    // more than a terminal can have
    let _ = s.call(Call::Resize("", 70_000, 3));
    s.until("it has heard again", |_| streams.stdout.text().matches("3 ").count() > 0);
    let _ = s.call(Call::Kill("", 9));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Resize("", 80, 25));
    let _ = s.direct(Call::Resize("", 80, 25));
    s.note("the screen", streams.stdout.finish());
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn terminal_of_an_exec(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let (stdio, mut streams) = s.fifos("x1", true, true)?;
    let _ =
        s.exec("x1", spec::script("tty; stty size; read line; stty size; echo \"got $line\"; exit 7"), stdio);
    s.until("it asks", |_| streams.stdout.text().contains("\n"));
    let _ = s.call(Call::Resize("x1", 97, 31));
    streams.write(b"typed\n")?;
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Resize("x1", 97, 31));
    let _ = s.direct(Call::Resize("x1", 97, 31));
    s.note("the screen", streams.stdout.finish());
    let _ = s.call(Call::Delete("x1"));
    s.end();
    Ok(())
}

/// The client is gone for good: the terminal hangs up.
fn terminal_input_closed(s: &mut Subject) -> Result<()> {
    let (stdio, mut streams) = s.fifos("t1", true, true)?;
    let script = "trap 'exit 11' HUP; echo ready; while :; do sleep 0.05; done";
    s.run(New::of(Spec::sh(script).terminal()).stdio(stdio))?;
    s.until("it is ready", |_| streams.stdout.text().contains("ready"));
    let _ = s.call(Call::CloseIo(""));
    streams.close();
    let _ = s.call(Call::Wait(""));
    s.note("the screen", streams.stdout.finish());
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn resize_without(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let _ = s.call(Call::Resize("", 80, 25));
    let _ = s.direct(Call::Resize("", 80, 25));
    let _ = s.exec("x1", spec::script("sleep 1000"), Default::default());
    let _ = s.call(Call::Resize("x1", 80, 25));
    let _ = s.direct(Call::Resize("x1", 80, 25));
    let _ = s.call(Call::Kill("x1", 9));
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Resize("x1", 80, 25));
    let _ = s.direct(Call::Resize("x1", 80, 25));
    s.end();
    Ok(())
}

/// A terminal that nobody has asked to read: no stdin, stdout nowhere.
fn terminal_unread(s: &mut Subject) -> Result<()> {
    let stdio = crate::calls::Stdio { terminal: true, ..Default::default() };
    s.create(New::of(Spec::sh("echo out; exit 3").terminal()).stdio(stdio))?;
    let _ = s.call(Call::Start(""));
    Ok(())
}
