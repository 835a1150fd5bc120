//! A blocking netlink socket: requests with acknowledgement, dumps, nfnetlink batches.
//!
//! A socket belongs for life to the namespace of the thread that opened it, so one may be opened inside a namespace and
//! used from outside.

use std::fmt;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail, ensure};
use netlink_sys::{Socket, SocketAddr};

use super::wire::{self, Message, Request};

/// The kernel's refusal of a request.
#[derive(Debug, Clone)]
pub struct Refused {
    /// Positive errno.
    pub errno: i32,
    /// The kernel's own words (extended acknowledgement), perhaps empty.
    pub text: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let os = std::io::Error::from_raw_os_error(self.errno);
        if self.text.is_empty() { write!(f, "{os}") } else { write!(f, "{}: {os}", self.text) }
    }
}

impl std::error::Error for Refused {}

/// The errno inside `error`, if the kernel refused the request.
pub fn errno_of(error: &anyhow::Error) -> Option<i32> {
    error.downcast_ref::<Refused>().map(|r| r.errno)
}

/// `Ok` also when the kernel refused with `errno`: for requests whose goal is then already reached.
pub fn unless(result: Result<()>, errno: i32) -> Result<()> {
    match result {
        Err(e) if errno_of(&e) == Some(errno) => Ok(()),
        other => other,
    }
}

/// The socket.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// For links, addresses, routes, rules and neighbours of the calling thread's namespace.
    pub fn route() -> Result<Self> {
        Self::open(libc::NETLINK_ROUTE as isize)
    }

    /// For nftables of the calling thread's namespace.
    pub fn netfilter() -> Result<Self> {
        Self::open(libc::NETLINK_NETFILTER as isize)
    }

    fn open(protocol: isize) -> Result<Self> {
        let mut socket = Socket::new(protocol).context("opening a netlink socket")?;
        socket.bind_auto().context("binding a netlink socket")?;
        socket.connect(&SocketAddr::new(0, 0)).context("connecting a netlink socket to the kernel")?;
        // Both only make refusals readable; kernels without them answer all the same.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        // The kernel answers while it handles the request; a limit only guards against waiting for ever.
        let limit = nix::sys::time::TimeVal::new(5, 0);
        let fd = socket.as_raw_fd();
        // SAFETY: the descriptor is open for as long as `socket` lives, which outlives this borrow.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &limit)
            .context("limiting a netlink socket's wait")?;
        Ok(Self { socket, sequence: 0 })
    }

    fn receive(&self) -> Result<Vec<Message>> {
        loop {
            match self.socket.recv_from_full() {
                Ok((bytes, _)) => return Ok(wire::split(&bytes)),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e).context("waiting for the kernel's netlink answer"),
            }
        }
    }

    fn next(&mut self) -> u32 {
        self.sequence += 1;
        self.sequence
    }

    /// Sends `request` and waits for its acknowledgement. The error's root is [`Refused`] when the kernel said no.
    pub fn request(&mut self, mut request: Request) -> Result<()> {
        ensure!(!request.is_too_long(), "a netlink request with more than an attribute can hold");
        let sequence = self.next();
        request.flag(libc::NLM_F_ACK as u16);
        self.socket.send(&request.finish(sequence), 0).context("sending a netlink request")?;
        loop {
            for message in self.receive()? {
                if message.sequence == sequence && message.kind == libc::NLMSG_ERROR as u16 {
                    return acknowledgement(&message);
                }
            }
        }
    }

    /// Sends a dump request and gathers the answers; asked again when the kernel says that they are not of one moment.
    pub fn dump(&mut self, request: Request) -> Result<Vec<Message>> {
        for _ in 0..20 {
            if let Some(all) = self.dump_once(request.clone())? {
                return Ok(all);
            }
        }
        bail!("the namespace's configuration changes too fast to be read")
    }

    fn dump_once(&mut self, mut request: Request) -> Result<Option<Vec<Message>>> {
        let sequence = self.next();
        request.flag(libc::NLM_F_DUMP as u16);
        self.socket.send(&request.finish(sequence), 0).context("sending a netlink dump request")?;
        let mut all = Vec::new();
        let mut torn = false;
        loop {
            for message in self.receive()? {
                if message.sequence != sequence {
                    continue;
                }
                torn |= message.flags & libc::NLM_F_DUMP_INTR as u16 != 0;
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => {
                        let errno = -(wire::u32_of(&message.body) as i32);
                        if errno != 0 {
                            return Err(Refused { errno, text: String::new() }.into());
                        }
                        return Ok((!torn).then_some(all));
                    }
                    libc::NLMSG_ERROR => acknowledgement(&message)?,
                    _ => all.push(message),
                }
            }
        }
    }

    /// Sends nftables messages as one transaction: all of them take effect, or none.
    pub fn transaction(&mut self, requests: &[Request]) -> Result<()> {
        let Some((last, before)) = requests.split_last() else { return Ok(()) };
        // struct nfgenmsg: family, version, and in big endian the subsystem that the batch is for.
        let mut body = vec![0, 0];
        body.extend_from_slice(&(libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes());
        let mut bytes = Request::new(libc::NFNL_MSG_BATCH_BEGIN as u16, 0, &body).finish(self.next());
        let first = self.sequence + 1;
        for request in before {
            bytes.extend(request.finish(self.next()));
        }
        let mut last = last.clone();
        last.flag(libc::NLM_F_ACK as u16);
        bytes.extend(last.finish(self.next()));
        let acked = self.sequence;
        bytes.extend(Request::new(libc::NFNL_MSG_BATCH_END as u16, 0, &body).finish(self.next()));
        self.socket.send(&bytes, 0).context("sending an nftables transaction")?;
        // Refusals come in the order of the messages, then the acknowledgement of the last one.
        loop {
            for message in self.receive()? {
                let ours = (first - 1..=self.sequence).contains(&message.sequence);
                if ours && message.kind == libc::NLMSG_ERROR as u16 {
                    acknowledgement(&message)?;
                    if message.sequence == acked {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// What an NLMSG_ERROR says: struct nlmsgerr { int error; struct nlmsghdr msg; }, then attributes (1: text).
fn acknowledgement(message: &Message) -> Result<()> {
    let errno = -(wire::u32_of(&message.body) as i32);
    if errno == 0 {
        return Ok(());
    }
    let text = (message.flags & libc::NLM_F_ACK_TLVS as u16 != 0)
        .then(|| message.body.get(4 + wire::HEADER..))
        .flatten()
        .and_then(|attrs| wire::find(attrs, 1))
        .map(wire::text)
        .unwrap_or_default();
    Err(Refused { errno, text }.into())
}
