//! The fuzz target of the socket between agent and shim: see [`crate::fuzz`].

/// What comes through the socket, with and without descriptors.
pub mod control_messages {
    use std::io::Write;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::super::transport;
    use super::super::{Decision, Event, Request};
    use crate::fuzz::{Input, json};

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let how = input.byte();
        if how & 1 == 0 {
            let bytes = input.rest();
            json::<Request>(bytes);
            json::<Event>(bytes);
            return;
        }
        let (to, from) = UnixStream::pair().expect("a pair of sockets");
        to.set_nonblocking(true).expect("a socket");
        let fds = vec![from.as_raw_fd(); usize::from(how >> 1) % 8];
        let bytes = input.rest();
        let (first, rest) = bytes.split_at(bytes.len().min(1));
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let io = [std::io::IoSlice::new(first)];
        if first.is_empty() || sendmsg::<()>(to.as_raw_fd(), &io, rights, MsgFlags::empty(), None).is_err() {
            return;
        }
        // what the socket has no room for is cut off
        let _ = (&to).write_all(rest);
        drop(to);
        let mut got: Vec<OwnedFd> = Vec::new();
        while let Ok(Some((request, with))) = transport::recv::<Request>(&from) {
            got.extend(with);
            let (a, b) = UnixStream::pair().expect("a pair of sockets");
            transport::send(&a, &request, &[]).expect("it came through such a socket");
            assert!(transport::recv::<Request>(&b).expect("it was sent").is_some());
        }
        assert!(got.len() <= fds.len());
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let send = serde_json::json!({
            "request": "send", "migration_id": "m-1", "ticket": "t", "node": "a", "peer": "b",
            "tls": {"ca": "", "cert": "", "key": ""},
            "limits": {"silence_s": 10, "ghost_limit": 1, "images_dir": "/run/x"}
        });
        let receive = serde_json::json!({
            "request": "receive", "migration_id": "m-1", "ticket": "t", "node": "b", "peer": "a",
            "limits": {"silence_s": 10, "ghost_limit": 1, "images_dir": "/run/x", "memory_cap": 5},
            "netns": "/run/netns/x", "net": {"links": []}, "on_post_copy_failure": "thaw"
        });
        let checkpoint = serde_json::json!({
            "request": "checkpoint", "migration_id": "m-1", "node": "a", "stop": true, "container": {"id": "c"},
            "limits": {"silence_s": 10, "ghost_limit": 1, "images_dir": "/run/x", "criu": "/c"}
        });
        let mut all: Vec<Vec<u8>> =
            [send, receive, checkpoint].iter().map(|r| r.to_string().into_bytes()).collect();
        for request in [Request::Inspect, Request::Abort, Request::Resolve { decision: Decision::Stay }] {
            all.push(serde_json::to_vec(&request).expect("a request"));
        }
        for event in [
            Event::Phase { phase: "freeze".into() },
            Event::Progress { bytes: 1, total: Some(2) },
            Event::Done { report: Default::default() },
            Event::Failed { failure: Default::default(), state: "running".into() },
        ] {
            all.push(serde_json::to_vec(&event).expect("an event"));
        }
        let framed = |json: &[u8]| [&[3][..], &(json.len() as u32).to_le_bytes(), json].concat();
        let plain = |json: &Vec<u8>| [&[0][..], json].concat();
        all.iter().map(|json| framed(json)).chain(all.iter().map(plain)).collect()
    }
}
