//! One step of rustls' unbuffered interface: what it says of received bytes, and what is to be done next. No socket.

use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};

/// What a step should do once the connection is free to send.
#[derive(Clone, Copy)]
pub(super) enum Ask<'a> {
    Nothing,
    Encrypt(&'a [u8]),
    Close,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Step {
    /// Records were dealt with; there may be more.
    Progress,
    /// What stands in `out` must be sent before anything else.
    Transmit,
    /// The handshake needs bytes of the peer.
    Blocked,
    /// Nothing is left to do with what was received; what was asked for is done.
    Open,
    /// The peer said that it will send no more.
    Ended,
    /// So did we: nothing can be sent or received.
    Over,
}

/// One status of rustls: what to discard of the received bytes, and what to do next.
pub(super) fn settle<D>(
    status: UnbufferedStatus<'_, '_, D>,
    ask: Ask<'_>,
    out: &mut Vec<u8>,
    out_len: &mut usize,
    take: &mut dyn FnMut(&[u8]),
) -> (usize, Result<Step, rustls::Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let state = match state {
        Ok(state) => state,
        Err(e) => return (discard, Err(e)),
    };
    let step = match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        take(record.payload);
                    }
                    Err(e) => return (discard, Err(e)),
                }
            }
            Step::Progress
        }
        ConnectionState::EncodeTlsData(mut data) => {
            grow(out, *out_len, |room| match data.encode(room) {
                Ok(n) => Ok(n),
                Err(EncodeError::InsufficientSize(e)) => Err(Some(e.required_size)),
                Err(_) => Err(None),
            })
            .map(|n| *out_len += n)
            .ok();
            Step::Progress
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Step::Transmit
        }
        ConnectionState::BlockedHandshake => Step::Blocked,
        ConnectionState::WriteTraffic(mut traffic) => {
            let mut seal = |room: &mut [u8]| match ask {
                Ask::Nothing => Ok(0),
                Ask::Encrypt(data) => traffic.encrypt(data, room),
                Ask::Close => traffic.queue_close_notify(room),
            };
            let sealed = grow(out, *out_len, |room| {
                seal(room).map_err(|e| match e {
                    EncryptError::InsufficientSize(e) => Some(e.required_size),
                    EncryptError::EncryptExhausted => None,
                })
            });
            match sealed {
                Ok(n) => *out_len += n,
                Err(()) => return (discard, Err(rustls::Error::EncryptError)),
            }
            Step::Open
        }
        ConnectionState::PeerClosed => Step::Ended,
        ConnectionState::Closed => Step::Over,
        _ => return (discard, Err(rustls::Error::General("early data, which nobody asked for".into()))),
    };
    (discard, Ok(step))
}

/// Writes behind `out[..len]`, which grows if `write` says how much it needs.
fn grow(
    out: &mut Vec<u8>,
    len: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
) -> Result<usize, ()> {
    loop {
        match write(&mut out[len..]) {
            Ok(n) => return Ok(n),
            Err(Some(need)) if len + need > out.len() => out.resize(len + need, 0),
            Err(_) => return Err(()),
        }
    }
}
