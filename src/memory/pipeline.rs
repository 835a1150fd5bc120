//! Reading and compressing in one thread, encrypting and sending in another, a few payloads between them.
//!
//! What is read, and what a payload means, is the caller's: [`run`] only moves buffers, there full, back empty.

use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::{Result, anyhow};

/// Full payloads that may wait: enough that neither side waits for the other's slowest moment.
const DEPTH: usize = 4;

/// Where the reading side hands its payloads.
pub struct Outlet {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
}

impl Outlet {
    /// Hands one payload over; waits while too many are on the way. Returns memory to go on with, if some came back.
    ///
    /// # Errors
    /// The sending side has failed: stop reading. Its own error is what [`run`] returns.
    pub fn put(&mut self, payload: Vec<u8>) -> Result<Option<Vec<u8>>> {
        self.full.send(payload).map_err(|_| anyhow!(Ended))?;
        Ok(self.empty.try_recv().ok())
    }
}

/// The sending side has ended before the reading side.
#[derive(Debug, thiserror::Error)]
#[error("nobody takes what is read")]
struct Ended;

/// Runs `read` in a thread of its own, and here `send` with each payload that it puts, in order, until `read` has returned
/// and all of it is sent.
///
/// # Errors
/// Of either side; `send`'s, if both failed.
pub fn run<T: Send>(
    read: impl FnOnce(&mut Outlet) -> Result<T> + Send,
    mut send: impl FnMut(&[u8]) -> Result<()>,
) -> Result<T> {
    let (full, fulls) = sync_channel::<Vec<u8>>(DEPTH);
    let (empties, empty) = sync_channel(2 * DEPTH);
    std::thread::scope(|scope| {
        let reader = std::thread::Builder::new()
            .name("memory".into())
            .spawn_scoped(scope, move || read(&mut Outlet { full, empty }))?;
        let sent = fulls.iter().try_for_each(|payload| {
            send(&payload)?;
            // when the reader has ended, or has enough, this one is dropped
            empties.try_send(payload).ok();
            Ok(())
        });
        drop(fulls);
        let read = reader.join().unwrap_or_else(|panic| resume_unwind(panic));
        sent.and(read)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::time::Duration;

    #[test]
    fn everything_goes_through_in_order_and_memory_comes_back() {
        let mut got = Vec::new();
        let mut seen = HashSet::new();
        let read = run(
            |outlet| {
                let mut buffer = Vec::new();
                for n in 0..1000u32 {
                    buffer.clear();
                    buffer.extend_from_slice(&n.to_le_bytes());
                    buffer.resize(1 << 16, 0);
                    buffer = outlet.put(buffer)?.unwrap_or_default();
                }
                Ok("read")
            },
            |payload| {
                seen.insert(payload.as_ptr() as usize);
                got.push(u32::from_le_bytes(payload[..4].try_into()?));
                Ok(())
            },
        );
        assert_eq!(read.unwrap(), "read");
        assert_eq!(got, (0..1000).collect::<Vec<_>>());
        assert!(seen.len() < 100, "{}", seen.len());
    }

    #[test]
    fn an_error_of_either_side_ends_both() {
        let endless = |outlet: &mut Outlet| -> Result<()> {
            loop {
                outlet.put(vec![1])?;
            }
        };
        let e = run(endless, |_| Err(anyhow!("the link broke"))).unwrap_err();
        assert_eq!(e.to_string(), "the link broke");
        let mut sent = 0;
        let slow = |_: &[u8]| {
            std::thread::sleep(Duration::from_millis(1));
            sent += 1;
            Ok(())
        };
        let e = run(
            |outlet| {
                (0..20).try_for_each(|n| outlet.put(vec![n]).map(drop))?;
                Err::<(), _>(anyhow!("the task is not ours"))
            },
            slow,
        );
        assert_eq!((e.unwrap_err().to_string(), sent), ("the task is not ours".into(), 20));
    }

    #[test]
    fn a_panic_is_not_swallowed() {
        let panicked = std::panic::catch_unwind(|| run(|_| -> Result<()> { panic!("boom") }, |_| Ok(())));
        assert!(panicked.is_err());
    }
}
