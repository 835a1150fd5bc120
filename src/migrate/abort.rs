//! Giving up a migration from another thread: possible until the commit, impossible after it.

use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Result, ensure};

/// A handle that the thread of the migration and those who may end it share.
#[derive(Clone, Default)]
pub struct Abort(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    asked: bool,
    committed: bool,
    connection: Option<TcpStream>,
}

impl Abort {
    /// A handle that also cuts this connection when asked, so that a thread that waits for the peer notices.
    pub fn cutting(connection: &TcpStream) -> std::io::Result<Abort> {
        let connection = Some(connection.try_clone()?);
        Ok(Abort(Arc::new(Mutex::new(State { connection, ..State::default() }))))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics while holding it")
    }

    /// Asks for the end; false if it is too late.
    pub fn ask(&self) -> bool {
        let mut s = self.state();
        if s.committed {
            return false;
        }
        s.asked = true;
        if let Some(c) = &s.connection {
            c.shutdown(Shutdown::Both).ok();
        }
        true
    }

    /// Whether somebody asked.
    pub fn asked(&self) -> bool {
        self.state().asked
    }

    /// An error if somebody asked.
    pub fn go_on(&self) -> Result<()> {
        ensure!(!self.asked(), "the migration was given up by request");
        Ok(())
    }

    /// From here on nobody can ask; false if somebody did before.
    pub fn commit(&self) -> bool {
        let mut s = self.state();
        s.committed |= !s.asked;
        s.committed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abort_comes_before_the_commit_or_not_at_all() {
        let (a, b) = (Abort::default(), Abort::default());
        assert!(a.go_on().is_ok() && a.ask() && a.asked() && a.go_on().is_err() && !a.commit());
        assert!(b.commit() && !b.ask() && !b.asked() && b.commit());
    }
}
