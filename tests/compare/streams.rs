//! A client's ends of a process's FIFOs.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bed::patient;

/// Reads a FIFO to its end.
pub struct Reader {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl Reader {
    /// Makes a FIFO and reads it.
    pub fn make(path: &Path) -> Result<Reader> {
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600))
            .with_context(|| path.display().to_string())?;
        // nonblocking: there is no writer yet
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let reader = Reader { state: Arc::default(), stop: Arc::default() };
        let (state, stop) = (Arc::clone(&reader.state), Arc::clone(&reader.stop));
        std::thread::spawn(move || read(file, &state, &stop));
        Ok(reader)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has come so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.state().bytes).into_owned()
    }

    /// Whether all writers have closed it.
    pub fn ended(&self) -> bool {
        self.state().ended
    }

    /// Waits for the end, a while; the text, and a word if there was no end.
    pub fn finish(&self) -> String {
        let start = Instant::now();
        while !self.ended() && start.elapsed() < patient(Duration::from_secs(3)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let end = if self.ended() { "" } else { " and no end" };
        format!("{:?}{end}", self.text())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn read(mut file: File, state: &Mutex<State>, stop: &AtomicBool) {
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Acquire) {
        let ready = {
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(50).unwrap_or(PollTimeout::ZERO);
            // a hang-up is told only once there has been a writer
            poll(&mut fds, timeout).is_ok_and(|n| n > 0)
        };
        if !ready {
            continue;
        }
        let read = file.read(&mut buffer);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(0) => {
                state.ended = true;
                return;
            }
            Ok(n) => state.bytes.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// A process's streams on FIFOs.
pub struct Streams {
    /// Its input, until it is closed.
    pub stdin: Option<File>,
    /// What it prints.
    pub stdout: Reader,
    /// What it complains; a terminal has none.
    pub stderr: Option<Reader>,
}

impl Streams {
    /// Types something.
    pub fn write(&mut self, text: &[u8]) -> Result<()> {
        self.stdin.as_mut().context("no stdin")?.write_all(text).context("writing to stdin")
    }

    /// Closes our end of the input.
    pub fn close(&mut self) {
        self.stdin = None;
    }
}

/// The client's end of a stdin FIFO, opened so that nothing is waited for.
pub fn stdin(path: &Path) -> Result<File> {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600))
        .with_context(|| path.display().to_string())?;
    Ok(OpenOptions::new().read(true).write(true).open(path)?)
}
