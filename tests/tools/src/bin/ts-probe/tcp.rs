//! One TCP connection, numbered lines in both directions at once. Neither side ever connects again: a connection that broke
//! says `tcp closed`. Each side sends on its own clock, so a lost or doubled byte in either direction shows as a wrong number.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use transship_testtools::args::Args;

use crate::say;

#[derive(Default)]
struct Seen {
    received: AtomicU64,
    wrong: AtomicU64,
    longest_ms: AtomicU64,
    closed: AtomicU64,
}

pub fn listen(args: &mut Args) -> Result<(), String> {
    let port = args.number("PORT")?;
    // v6 takes v4 too
    let listener =
        TcpListener::bind(format!("[::]:{port}")).or_else(|_| TcpListener::bind(format!("0.0.0.0:{port}")));
    let listener = listener.map_err(|e| format!("port {port}: {e}"))?;
    say::line("tcp listening");
    let (stream, peer) = listener.accept().map_err(|e| format!("accept: {e}"))?;
    say::line(&format!("tcp accepted {peer}"));
    exchange(stream, args)
}

pub fn connect(args: &mut Args) -> Result<(), String> {
    let (host, port) = (args.position("HOST")?, args.number("PORT")? as u16);
    let stream = TcpStream::connect((host.as_str(), port)).map_err(|e| format!("{host}:{port}: {e}"))?;
    say::line(&format!("tcp connected {host}:{port}"));
    exchange(stream, args)
}

fn exchange(mut stream: TcpStream, args: &Args) -> Result<(), String> {
    let seen = Arc::new(Seen::default());
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let reader = stream.try_clone().map_err(|e| e.to_string())?;
    let theirs = Arc::clone(&seen);
    std::thread::spawn(move || receive(reader, &theirs));
    say::rounds("tcp", args, |n| {
        let sent = stream.write_all(format!("{n}\n").as_bytes());
        let closed = sent.is_err() || seen.closed.load(Relaxed) > 0;
        Ok(format!(
            "sent={n} received={} wrong={} longest_gap_ms={}{}",
            seen.received.load(Relaxed),
            seen.wrong.load(Relaxed),
            seen.longest_ms.load(Relaxed),
            if closed { " closed" } else { "" }
        ))
    })
}

fn receive(stream: TcpStream, seen: &Seen) {
    let mut last = None::<Instant>;
    let mut lines = BufReader::new(stream).lines();
    while let Some(Ok(line)) = lines.next() {
        let number = seen.received.fetch_add(1, Relaxed) + 1;
        if line.parse() != Ok(number) {
            seen.wrong.fetch_add(1, Relaxed);
        }
        let now = Instant::now();
        if let Some(last) = last {
            seen.longest_ms.fetch_max((now - last).as_millis() as u64, Relaxed);
        }
        last = Some(now);
    }
    seen.closed.store(1, Relaxed);
}
