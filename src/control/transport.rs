//! Length-prefixed JSON over a unix socket, with descriptors passed along. Blocking.
//!
//! ```text
//! | length u32 LE | JSON |      descriptors ride on the first byte (SCM_RIGHTS)
//! ```

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

/// The largest message, in bytes.
const MAX: usize = 16 << 20;
/// The most descriptors that one message carries.
const MAX_FDS: usize = 4;
/// The most that the kernel passes with one (SCM_MAX_FD). With less room than that what did fit would be lost, and stay open.
const MOST_FDS: usize = 253;

/// Sends a message and the descriptors that belong to it.
pub fn send<M: Serialize>(to: &UnixStream, message: &M, fds: &[BorrowedFd]) -> Result<()> {
    // a message may hold the node's key: nothing of it stays in memory
    let json = Zeroizing::new(serde_json::to_vec(message)?);
    if json.len() > MAX || fds.len() > MAX_FDS {
        bail!("a control message of {} bytes and {} descriptors is too large", json.len(), fds.len());
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(4 + json.len()));
    bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&json);
    let raw: Vec<_> = fds.iter().map(|f| f.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights: &[ControlMessage] = if raw.is_empty() { &[] } else { &rights };
    let sent = loop {
        match sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(&bytes)], rights, MsgFlags::MSG_NOSIGNAL, None) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other.context("sending a control message")?,
        }
    };
    (&mut &*to).write_all(&bytes[sent..]).context("sending a control message")
}

/// Receives a message and the descriptors that came with it; `None` at the end of the stream.
pub fn recv<M: DeserializeOwned>(from: &UnixStream) -> Result<Option<(M, Vec<OwnedFd>)>> {
    let (mut head, mut got, mut fds) = ([0u8; 4], 0, Vec::new());
    while got < head.len() {
        let mut space = nix::cmsg_space!([i32; MOST_FDS]);
        let mut into = [IoSliceMut::new(&mut head[got..])];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(from.as_raw_fd(), &mut into, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.context("receiving a control message")?,
        };
        for c in message.cmsgs().context("descriptors of a control message")? {
            if let ControlMessageOwned::ScmRights(raw) = c {
                // SAFETY: the kernel has just made these descriptors for us, nobody else owns them
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        match message.bytes {
            0 if got == 0 => return Ok(None),
            0 => bail!("the control connection ended inside a message"),
            n => got += n,
        }
    }
    if fds.len() > MAX_FDS {
        bail!("a control message with {} descriptors, at most {MAX_FDS} are allowed", fds.len());
    }
    let len = u32::from_le_bytes(head) as usize;
    if len > MAX {
        bail!("a control message claims {len} bytes, at most {MAX} are allowed");
    }
    let mut json = Zeroizing::new(vec![0; len]);
    (&mut &*from).read_exact(&mut json).context("receiving a control message")?;
    Ok(Some((serde_json::from_slice(&json).context("a control message")?, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn messages_and_descriptors_arrive_together() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut r, w) = std::io::pipe().unwrap();
        send(&a, &"first", &[]).unwrap();
        send(&a, &("x".repeat(100_000)), &[w.as_fd()]).unwrap();
        drop((w, a));
        let (m, fds) = recv::<String>(&b).unwrap().unwrap();
        assert_eq!((m.as_str(), fds.len()), ("first", 0));
        let (m, fds) = recv::<String>(&b).unwrap().unwrap();
        assert_eq!((m.len(), fds.len()), (100_000, 1));
        std::fs::File::from(fds.into_iter().next().unwrap()).write_all(b"hi").unwrap();
        let mut said = String::new();
        r.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hi");
        assert!(recv::<String>(&b).unwrap().is_none());
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut r, w) = std::io::pipe().unwrap();
        let raw = vec![w.as_raw_fd(); 9];
        let bytes = [IoSlice::new(&[2, 0, 0, 0, b'"', b'"'])];
        sendmsg::<()>(a.as_raw_fd(), &bytes, &[ControlMessage::ScmRights(&raw)], MsgFlags::empty(), None)
            .unwrap();
        assert!(recv::<String>(&b).unwrap_err().to_string().contains("9 descriptors"));
        drop(w);
        // with a copy of the other end left open this would wait for ever
        assert_eq!(r.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_huge_length_is_refused_before_memory_is_taken() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(recv::<String>(&b).unwrap_err().to_string().contains("at most"));
    }
}
