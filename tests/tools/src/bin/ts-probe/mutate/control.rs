//! The controller: starts the workers, hears what they and a person want, and ends with the first that ends. Its socket is an abstract
//! one, in the container's network namespace, so it is there wherever the container is.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use serde_json::{Value, json};
use transship_testtools::{args::Args, signals};

use super::book::Checked;
use super::worker::{GIVEN_UP, Ledger, Link, SPOIL, Setup, VERIFY, fork, work};
use crate::say;

const NAME: &str = "ts-probe-mutate";
/// How long the workers may take to check all they have, not counting the time in which this process stands still.
const PATIENCE: Duration = Duration::from_secs(60);

fn address() -> Checked<SocketAddr> {
    SocketAddr::from_abstract_name(NAME).map_err(|e| e.to_string())
}

/// A worker as the controller sees it.
struct Worker {
    setup: Setup,
    pid: i32,
    requests: File,
    answers: BufReader<File>,
}

/// Asks the controller in this container for `verify`, or `spoil NAME` (which has a worker change a byte, so that the next `verify` must
/// fail); prints its answer.
pub fn ask(args: &mut Args) -> Result<(), String> {
    let mut what = args.position("REQUEST")?;
    if let Ok(name) = args.position("NAME") {
        what = format!("{what} {name}");
    }
    let mut stream = UnixStream::connect_addr(&address()?).map_err(|e| format!("no `mutate` here: {e}"))?;
    let mut answer = String::new();
    let asked =
        stream.write_all(format!("{what}\n").as_bytes()).and_then(|()| stream.read_to_string(&mut answer));
    asked.map_err(|e| format!("asking: {e}"))?;
    println!("{}", answer.trim());
    let answer: Value = serde_json::from_str(&answer).map_err(|e| format!("{answer:?}: {e}"))?;
    if answer["ok"] == true { Ok(()) } else { Err(format!("{}", answer["error"])) }
}

fn start(setup: Setup, workers: &mut Vec<Worker>, ledger: &Ledger) -> Checked {
    let pipe = || std::io::pipe().map_err(|e| format!("pipe: {e}"));
    let ((requests, to), (from, answers)) = (pipe()?, pipe()?);
    let file = |fd: OwnedFd| File::from(fd);
    let mut theirs = Some((file(requests.into()), file(answers.into())));
    let pid = fork(|| {
        // other workers' pipes are not this one's business
        workers.clear();
        let (Some((requests, answers)), Ok(ledger)) = (theirs.take(), ledger.again()) else {
            return GIVEN_UP;
        };
        let link = Link::new(requests, answers, ledger);
        let behaviour = super::make(&setup);
        work(&setup, &link, 0, behaviour)
    })?;
    drop(theirs);
    workers.push(Worker {
        setup,
        pid,
        requests: file(to.into()),
        answers: BufReader::new(file(from.into())),
    });
    Ok(())
}

/// Takes up children that have ended; an error if one of the workers did.
fn look(workers: &[Worker]) -> Checked {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the answer.
        let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
        if pid <= 0 {
            return Ok(());
        }
        if let Some(worker) = workers.iter().find(|w| w.pid == pid) {
            let how =
                if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) };
            return Err(format!("the worker {} has ended: {how}", worker.setup.name));
        }
    }
}

/// Has every worker check everything; what they said.
fn verify(workers: &mut [Worker], ledger: &Ledger) -> Checked<Vec<Value>> {
    for worker in workers.iter() {
        (&worker.requests).write_all(&[VERIFY]).map_err(|e| format!("asking {}: {e}", worker.setup.name))?;
    }
    let (mut said, mut left) = (Vec::new(), PATIENCE);
    for i in 0..workers.len() {
        let step = Duration::from_millis(20);
        let mut poll =
            libc::pollfd { fd: workers[i].answers.get_ref().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid entry.
        while unsafe { libc::poll(&mut poll, 1, step.as_millis() as i32) } < 1 {
            look(workers)?;
            left = left.saturating_sub(step);
            if left.is_zero() {
                return Err(format!("the worker {} does not answer", workers[i].setup.name));
            }
        }
        let mut line = String::new();
        workers[i].answers.read_line(&mut line).map_err(|e| format!("an answer: {e}"))?;
        let parts: Vec<&str> = line.split_whitespace().collect();
        let numbers = match parts[..] {
            [name, steps, pages] if name == workers[i].setup.name => {
                steps.parse::<u64>().ok().zip(pages.parse::<u64>().ok())
            }
            _ => None,
        };
        let Some((steps, pages)) = numbers else {
            // an empty line: it has ended
            std::thread::sleep(step);
            look(workers)?;
            return Err(format!("the worker {} answered {line:?}", workers[i].setup.name));
        };
        let counted = ledger.steps(workers[i].setup.number).load(std::sync::atomic::Ordering::SeqCst);
        if counted < steps {
            return Err(format!(
                "{} has done {steps} steps, the ledger says {counted}",
                workers[i].setup.name
            ));
        }
        said.push(json!({"name": workers[i].setup.name, "steps": steps, "pages": pages}));
    }
    Ok(said)
}

/// Starts them all and serves until TERM.
pub fn run(names: &[&'static str], args: &Args) -> Result<(), String> {
    let listener = UnixListener::bind_addr(&address()?).map_err(|e| format!("{NAME}: {e}"))?;
    listener.set_nonblocking(true).map_err(|e| e.to_string())?;
    let (mut workers, ledger) = (Vec::new(), Ledger::new()?);
    for copy in 0..args.option_number("copies", 1)? {
        for (i, name) in names.iter().copied().enumerate() {
            let setup = Setup::new(name, copy * names.len() as u64 + i as u64, args)?;
            start(setup, &mut workers, &ledger)?;
        }
    }
    let mut verified = 0;
    let served = serve(&listener, &mut workers, &ledger, &mut verified);
    for worker in &workers {
        // SAFETY: our own children, ended or not.
        unsafe { libc::kill(worker.pid, libc::SIGKILL) };
    }
    if let Err(e) = served {
        say::line(&format!("mutate WRONG: {e}"));
        std::process::exit(GIVEN_UP);
    }
    Ok(())
}

fn serve(listener: &UnixListener, workers: &mut [Worker], ledger: &Ledger, verified: &mut u64) -> Checked {
    verify(workers, ledger)?;
    say::line(&format!("mutate ready workers={}", workers.len()));
    while signals::stops() == 0 {
        look(workers)?;
        let Ok((mut stream, _)) = listener.accept() else {
            signals::pause(Duration::from_millis(20));
            continue;
        };
        let mut line = String::new();
        // whoever asks and goes away does not matter
        let _ = stream.set_nonblocking(false).and_then(|()| BufReader::new(&stream).read_line(&mut line));
        let mut reply = |what: &str| {
            let _ = writeln!(stream, "{}", json!({"ok": what.is_empty(), "error": what}));
        };
        let outcome = match line.trim().split_once(' ') {
            None if line.trim() == "verify" => verify(workers, ledger),
            Some(("spoil", name)) => {
                let worker = workers.iter().find(|w| w.setup.name == name);
                let told = worker.is_some_and(|w| (&w.requests).write_all(&[SPOIL]).is_ok());
                reply(if told { "" } else { "there is no such worker" });
                continue;
            }
            _ => {
                reply(&format!("no request {line:?}"));
                continue;
            }
        };
        match outcome {
            Ok(said) => {
                *verified += 1;
                let steps: u64 = said.iter().filter_map(|w| w["steps"].as_u64()).sum();
                let pages: u64 = said.iter().filter_map(|w| w["pages"].as_u64()).sum();
                say::line(&format!("mutate verified={verified} wrong=0 steps={steps} pages={pages}"));
                let answer = json!({"ok": true, "verified": verified, "steps": steps, "pages": pages, "workers": said});
                let _ = writeln!(stream, "{answer}");
            }
            Err(e) => {
                let _ = writeln!(stream, "{}", json!({"ok": false, "error": e}));
                return Err(e);
            }
        }
    }
    Ok(())
}
