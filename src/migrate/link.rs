//! The connection of a migration, shared by the threads that use it at the same time: CRIU's dump and the copying of memory
//! on the source; the restore and the page daemon on the destination. A frame is never split: each takes the lock once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use serde::Serialize;

use super::codec::Kind;
use super::wire::{FrameSink, Wire};

/// A [`Wire`] behind a lock.
pub struct Link(Mutex<Wire>);

impl Link {
    /// Shares this connection (or checkpoint file).
    pub fn new(wire: Wire) -> Link {
        Link(Mutex::new(wire))
    }

    /// The wire, for as long as the guard lives. Whoever waits for the peer with it keeps everybody else out.
    pub fn wire(&self) -> MutexGuard<'_, Wire> {
        // a thread that panicked with it ends its migration; the others still have to say why
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends one frame, see [`FrameSink::frame`].
    pub fn frame(&self, kind: Kind, parts: &[&[u8]]) -> Result<()> {
        self.wire().frame(kind, parts)
    }

    /// Sends `message` as a JSON frame.
    pub fn json<M: Serialize>(&self, kind: Kind, message: &M) -> Result<()> {
        self.wire().json(kind, message)
    }

    /// Sends what is buffered.
    pub fn flush(&self) -> Result<()> {
        self.wire().flush()
    }
}
