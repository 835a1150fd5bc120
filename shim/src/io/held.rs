//! A held pump: what a migration takes out of it and puts into it. Everything is still here afterwards.

use anyhow::{Context, Result, bail};
use tokio::time::{Instant, timeout_at};

use super::{
    ends::{Sink, Source, Watched},
    fd,
    flow::Step,
    pump::{Pump, writable},
};

impl Pump {
    /// For a held output whose writers are frozen: moves what the sink takes until `deadline`, then returns what it did not take.
    /// Everything returned is still here too: in the pipe, or (a pty cannot be looked into) in `pending`.
    pub async fn settle(&self, deadline: Instant) -> Result<Vec<u8>> {
        let Ok(mut state) = timeout_at(deadline, self.state.lock()).await else {
            bail!("{}: a write to the log does not return", self.name);
        };
        while state.sink.is_some() {
            match timeout_at(deadline, self.step(&mut state)).await {
                Err(_) => bail!("{}: a write to the log does not return", self.name),
                Ok(Step::Moved) if Instant::now() < deadline => {}
                Ok(Step::Writable(fd)) => {
                    if timeout_at(deadline, writable(&fd)).await.is_err() {
                        break;
                    }
                }
                Ok(_) => break,
            }
        }
        if state.writing.is_some() {
            bail!("{}: a write to the log does not return", self.name);
        }
        state.hoard_tty().with_context(|| format!("{}: reading the terminal", self.name))?;
        let mut left = state.pending[state.from..].to_vec();
        if let Some(source) = &state.source {
            left.extend(source.peek().with_context(|| format!("{}: looking into the pipe", self.name))?);
        }
        Ok(left)
    }

    /// For a held input: what the process has not read yet, in order, all of it left where it is. The flag says that the process
    /// will read the end of its stdin after that.
    pub async fn unread(&self, deadline: Instant) -> Result<(Vec<u8>, bool)> {
        let Ok(state) = timeout_at(deadline, self.state.lock()).await else {
            bail!("{}: busy", self.name);
        };
        let mut bytes = match (&state.unread, &state.sink) {
            (Some(read), _) => fd::peek(read)?,
            // A pty's input queue is the console's business.
            (None, Some(Sink::Pipe(pipe))) if !is_tty(pipe) => fd::peek(&fd::reopen(pipe.get_ref(), false)?)?,
            _ => Vec::new(),
        };
        bytes.extend_from_slice(&state.pending[state.from..]);
        bytes.extend_from_slice(&self.first.lock().unwrap_or_else(|e| e.into_inner()));
        if let Some(source) = &state.source {
            bytes.extend(source.peek()?);
        }
        Ok((bytes, state.source.is_none()))
    }

    /// For a held input: moves what fits into the process's pipe now.
    pub async fn push(&self) {
        let mut state = self.state.lock().await;
        let first = std::mem::take(&mut *self.first.lock().unwrap_or_else(|e| e.into_inner()));
        state.put_first(first);
        let _ = state.flush(self.name).await;
    }

    /// Capacity of the process's pipe, if that is what is at its end.
    pub async fn capacity(&self) -> Option<usize> {
        let state = self.state.lock().await;
        match (state.is_input, &state.source, &state.sink) {
            (false, Some(Source::Pipe(w)), _) | (true, _, Some(Sink::Pipe(w))) => {
                fd::capacity(w.get_ref()).ok()
            }
            _ => None,
        }
    }

    /// Gives the process's pipe a capacity.
    pub async fn set_capacity(&self, bytes: usize) -> Result<()> {
        let state = self.state.lock().await;
        match (state.is_input, &state.source, &state.sink) {
            (false, Some(Source::Pipe(w)), _) | (true, _, Some(Sink::Pipe(w))) => {
                fd::set_capacity(w.get_ref(), bytes)
            }
            _ => Ok(()),
        }
    }
}

fn is_tty(fd: &Watched) -> bool {
    nix::unistd::isatty(fd.get_ref()).unwrap_or(false)
}
