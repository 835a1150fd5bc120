//! The streams of a container that moves. On the source, with the tasks frozen: [`ProcessIo::quiesce`], then either
//! [`ProcessIo::resume`] (rollback) or [`ProcessIo::discard`] (the destination has it). On the destination: streams opened with
//! [`Context::held`](super::Context::held), [`ProcessIo::preload`], and [`ProcessIo::resume`] once the source has committed.
//!
//! Each byte of output is written on exactly one side: what the source's sink has taken stays there, all the rest is carried.
//! Until `discard` the source still has what it carries, where it was: in the pipes (looked into by `tee`, CRIU does not restore
//! the content of pipes that runc inherits), in its own memory (a pty's output) or put back (a pty's input).

use std::{os::fd::AsFd, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    Kind,
    process::ProcessIo,
    pump::{Phase, Pump},
};
use crate::console;

/// How much longer than the grace the bookkeeping of a quiesce may take.
const SLACK: Duration = Duration::from_millis(100);

/// What moves with the process. Each stream is at most 1 MiB and a little (the largest pipe, and what was read from it).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Carry {
    /// What a client had sent and the process has not read. For a terminal: what is not yet in its input queue.
    pub stdin: Vec<u8>,
    /// The process reads the end of its stdin after that.
    pub stdin_ended: bool,
    /// CloseIO was called; the end comes when the clients have closed the FIFO.
    pub stdin_closed: bool,
    /// What the process had written and the source's sink has not taken.
    pub stdout: Vec<u8>,
    /// The same.
    pub stderr: Vec<u8>,
    /// A terminal's input queue: typed, echoed, not yet read.
    pub tty_input: Vec<u8>,
    /// A terminal's width and height in characters.
    pub winsize: Option<(u16, u16)>,
    /// Capacities of the process's pipes, in bytes; 0 is not known.
    pub pipe_sizes: [u32; 3],
}

impl ProcessIo {
    fn pumps(&self) -> [Option<Arc<Pump>>; 3] {
        let streams = self.streams();
        [streams.stdin.clone(), streams.stdout.clone(), streams.stderr.clone()]
    }

    /// Stops the copying and returns what the destination has to have. The tasks must be frozen. Output goes to this side's sink
    /// as far as it takes it within `grace`; a reader that is stuck costs no more than that. On an error the streams are held:
    /// call [`ProcessIo::resume`] for that too.
    pub async fn quiesce(&self, grace: Duration) -> Result<Carry> {
        self.phase.send_replace(Phase::Held);
        let deadline = Instant::now() + grace;
        let [stdin, stdout, stderr] = self.pumps();
        let mut carry = Carry::default();
        let settle = async |pump: &Option<Arc<Pump>>| match pump {
            Some(pump) => pump.settle(deadline).await,
            None => Ok(Vec::new()),
        };
        let (out, err) = tokio::join!(settle(&stdout), settle(&stderr));
        (carry.stdout, carry.stderr) = (out?, err?);
        if let Some(logger) = &self.logger {
            let (out, err) = logger.settle(deadline).await.context("the logging program")?;
            // A terminal's output goes through a pump into the program's pipe: the pipe's content is older.
            carry.stdout.splice(..0, out);
            carry.stderr.splice(..0, err);
        }
        if let Some(stdin) = &stdin {
            (carry.stdin, carry.stdin_ended) = stdin.unread(deadline + SLACK).await.context("stdin")?;
        }
        for (size, pump) in carry.pipe_sizes.iter_mut().zip([&stdin, &stdout, &stderr]) {
            if let Some(pump) = pump {
                *size = pump.capacity().await.unwrap_or(0) as u32;
            }
        }
        let mut streams = self.streams();
        carry.stdin_closed = streams.stdin_closed;
        if let Some(console) = streams.console.clone() {
            let master = console.get_ref().as_fd();
            carry.winsize = Some(console::size(master)?);
            // Twice without a resume in between: the queue is with us already.
            streams
                .taken
                .extend(console::take_input(master).context("taking over the terminal's input queue")?);
            carry.tty_input = streams.taken.clone();
        }
        Ok(carry)
    }

    /// Copying goes on exactly where it stopped: nothing lost, nothing twice. On the source for a rollback, before the tasks are
    /// thawed; on the destination after the commit.
    pub fn resume(&self) {
        {
            let mut streams = self.streams();
            let taken = std::mem::take(&mut streams.taken);
            if let (Some(console), false) = (&streams.console, taken.is_empty()) {
                let put = console::put_input(console.get_ref().as_fd(), &taken);
                let put = put.unwrap_or_else(|e| {
                    log::warn!("the terminal's input queue could not be put back: {e:#}");
                    0
                });
                if let Some(stdin) = streams.stdin.as_ref().filter(|_| put < taken.len()) {
                    stdin.prepend(taken[put..].to_vec());
                }
            }
        }
        if let Some(logger) = &self.logger {
            logger.resume();
        }
        self.phase.send_if_modified(|phase| {
            let held = *phase == Phase::Held;
            if held {
                *phase = Phase::Run;
            }
            held
        });
    }

    /// After the commit, on the source: what was carried is not written here; the sinks are closed, so that their readers read
    /// the end.
    pub fn discard(&self) {
        self.streams().taken.clear();
        self.phase.send_replace(Phase::Closed);
        if let Some(logger) = &self.logger {
            logger.discard();
        }
    }

    /// On the destination, when the tasks exist and do not run (a terminal must be attached): carried output goes to the sink
    /// before anything that the process writes from now on (it is written after [`ProcessIo::resume`], so that an abort leaves
    /// nothing here), carried input goes into the process's pipe or queue at once.
    pub async fn preload(&self, carry: Carry) -> Result<()> {
        let pumps = self.pumps();
        for (pump, size) in pumps.iter().zip(carry.pipe_sizes) {
            if let (Some(pump), true) = (pump, size > 0) {
                pump.set_capacity(size as usize).await?;
            }
        }
        let [stdin, stdout, stderr] = pumps;
        if let Some(stdout) = &stdout {
            stdout.prepend(carry.stdout);
            if let Some(stderr) = &stderr {
                stderr.prepend(carry.stderr);
            }
        } else if let Some(logger) = &self.logger {
            logger.preload(&carry.stdout, &carry.stderr)?;
        }
        if let Some(console) = self.streams().console.clone() {
            let master = console.get_ref().as_fd();
            if let Some((width, height)) = carry.winsize
                && console::size(master)? != (width, height)
            {
                console::resize(master, width, height)?;
            }
            let put =
                console::put_input(master, &carry.tty_input).context("filling the terminal's input queue")?;
            if let Some(stdin) = &stdin {
                stdin.prepend(carry.stdin);
                stdin.prepend(carry.tty_input[put..].to_vec());
            }
        } else if let Some(stdin) = &stdin {
            stdin.prepend(carry.stdin);
            stdin.push().await;
        }
        if carry.stdin_closed || carry.stdin_ended {
            self.close_stdin().await;
        }
        if carry.stdin_ended
            && self.kinds.stdin == Kind::Pipe
            && let Some(stdin) = &stdin
        {
            stdin.close_when_empty();
        }
        Ok(())
    }
}
