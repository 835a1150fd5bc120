//! One TCP connection full of checkable bytes in both directions: the sender never pauses and the receiver is slower, so that
//! at any moment there is unread and unsent data on both sides.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use transship_testtools::{args::Args, pattern::Pattern};

use crate::say;

const BLOCK: usize = 16 << 10;

#[derive(Default)]
struct Seen {
    sent: AtomicU64,
    received: AtomicU64,
    wrong: AtomicU64,
    ended: AtomicBool,
    broken: AtomicBool,
}

pub fn listen(args: &mut Args) -> Result<(), String> {
    let port = args.number("PORT")?;
    let listener = TcpListener::bind(format!("[::]:{port}")).map_err(|e| format!("port {port}: {e}"))?;
    say::line("stream listening");
    let (stream, peer) = listener.accept().map_err(|e| format!("accept: {e}"))?;
    say::line(&format!("stream accepted {peer}"));
    exchange(stream, args)
}

pub fn connect(args: &mut Args) -> Result<(), String> {
    let (host, port) = (args.position("HOST")?, args.number("PORT")? as u16);
    let stream = TcpStream::connect((host.as_str(), port)).map_err(|e| format!("{host}:{port}: {e}"))?;
    say::line(&format!("stream connected {host}:{port}"));
    exchange(stream, args)
}

/// `--blocks N`: after N blocks of 16 KiB the sending side ends, so that both know how much there has to be.
fn exchange(stream: TcpStream, args: &Args) -> Result<(), String> {
    let seen = Arc::new(Seen::default());
    let blocks = args.option_number("blocks", 2000)?;
    let copy = || stream.try_clone().map_err(|e| e.to_string());
    let (writer, reader) = (copy()?, copy()?);
    let (ours, theirs) = (Arc::clone(&seen), Arc::clone(&seen));
    std::thread::spawn(move || send(writer, blocks, &ours));
    std::thread::spawn(move || receive(reader, &theirs));
    say::rounds("stream", args, |_| {
        let whole = seen.ended.load(Relaxed) && seen.received.load(Relaxed) == blocks * BLOCK as u64;
        Ok(format!(
            "sent={} received={} wrong={}{}{}",
            seen.sent.load(Relaxed),
            seen.received.load(Relaxed),
            seen.wrong.load(Relaxed),
            if whole { " whole" } else { "" },
            if seen.broken.load(Relaxed) { " broken" } else { "" }
        ))
    })
}

fn send(mut stream: TcpStream, blocks: u64, seen: &Seen) {
    let mut block = vec![0; BLOCK];
    for i in 0..blocks {
        Pattern::new(i).fill(&mut block);
        if stream.write_all(&block).is_err() {
            seen.broken.store(true, Relaxed);
            return;
        }
        seen.sent.fetch_add(BLOCK as u64, Relaxed);
    }
    if stream.shutdown(Shutdown::Write).is_err() {
        seen.broken.store(true, Relaxed);
    }
}

fn receive(mut stream: TcpStream, seen: &Seen) {
    let mut block = vec![0; BLOCK];
    for i in 0.. {
        match stream.read_exact(&mut block) {
            Ok(()) => {}
            Err(e) => {
                let end = e.kind() == std::io::ErrorKind::UnexpectedEof;
                (if end { &seen.ended } else { &seen.broken }).store(true, Relaxed);
                return;
            }
        }
        seen.wrong.fetch_add(Pattern::new(i).wrong(&block), Relaxed);
        seen.received.fetch_add(BLOCK as u64, Relaxed);
        std::thread::sleep(Duration::from_millis(1));
    }
}
