//! Packets that came to the frozen container, on their way to where it runs on ([`crate::net::backlog`]): payloads of
//! [`Kind::Backlog`](super::codec::Kind::Backlog), which a peer of an older build skips. Bytes only, no I/O.
//!
//! A payload is a list of packets, all numbers little-endian: length of the link's name u8, name, offload (flags u8, gso_type u8,
//! hdr_len u16, gso_size u16, csum_start u16, csum_offset u16), length of the frame u32, frame.

use anyhow::{Context, Result, ensure};

use super::codec::{Kind, MAX_DATA};
use super::link::Link;
use crate::net::backlog::{MAX_FRAME, Offload};
use crate::net::{Backlog, Packet};

/// The most bytes of packets that a destination keeps.
const ROOM: usize = 8 << 20;
/// IFNAMSIZ without its NUL.
const MAX_NAME: usize = 15;

/// Sends what `backlog` holds. Returns the number of packets.
///
/// # Errors
/// The connection's.
pub(super) fn send(backlog: &mut Backlog, link: &Link) -> Result<u64> {
    let packets = backlog.take();
    for payload in encode(&packets) {
        link.frame(Kind::Backlog, &[&payload])?;
    }
    Ok(packets.len() as u64)
}

/// Packets as payloads.
pub(super) fn encode(packets: &[Packet]) -> Vec<Vec<u8>> {
    let mut payloads: Vec<Vec<u8>> = Vec::new();
    for packet in packets {
        let (name, frame, o) = (packet.link.as_bytes(), &packet.frame, packet.offload);
        let mut bytes = vec![name.len() as u8];
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(&[o.flags, o.gso_type]);
        for word in [o.hdr_len, o.gso_size, o.csum_start, o.csum_offset] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&(frame.len() as u32).to_le_bytes());
        bytes.extend_from_slice(frame);
        match payloads.last_mut() {
            Some(last) if last.len() + bytes.len() <= MAX_DATA => last.append(&mut bytes),
            _ => payloads.push(bytes),
        }
    }
    payloads
}

/// What has come from the source, to be delivered when the container runs.
#[derive(Debug, Default)]
pub(super) struct Arrived {
    pub packets: Vec<Packet>,
    bytes: usize,
}

impl Arrived {
    /// Takes a payload. What finds no room, or makes no sense as a packet, is left out: the network may lose packets.
    ///
    /// # Errors
    /// It is no list of packets.
    pub fn add(&mut self, payload: &[u8]) -> Result<()> {
        let mut rest = payload;
        while !rest.is_empty() {
            let packet = decode(&mut rest).context("packets from the source")?;
            if packet.is_sane() && self.bytes + packet.frame.len() <= ROOM {
                self.bytes += packet.frame.len();
                self.packets.push(packet);
            }
        }
        Ok(())
    }
}

fn decode(rest: &mut &[u8]) -> Result<Packet> {
    let mut take = |len: usize| -> Result<&[u8]> {
        let (taken, left) = rest.split_at_checked(len).context("cut off")?;
        *rest = left;
        Ok(taken)
    };
    let name_len = usize::from(take(1)?[0]);
    ensure!(name_len <= MAX_NAME, "a link's name of {name_len} bytes");
    let link = String::from_utf8(take(name_len)?.to_vec()).context("a link's name")?;
    let head = take(14)?;
    let word = |n: usize| u16::from_le_bytes([head[n], head[n + 1]]);
    let offload = Offload {
        flags: head[0],
        gso_type: head[1],
        hdr_len: word(2),
        gso_size: word(4),
        csum_start: word(6),
        csum_offset: word(8),
    };
    let len = u32::from_le_bytes([head[10], head[11], head[12], head[13]]) as usize;
    ensure!(len <= MAX_FRAME, "a packet of {len} bytes");
    Ok(Packet { link, offload, frame: take(len)?.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(len: usize, seed: u8) -> Packet {
        let mut frame = vec![seed; len];
        frame[12..14].copy_from_slice(&[8, 0]);
        let offload =
            Offload { flags: 1, hdr_len: 54, csum_start: 34, csum_offset: 16, ..Offload::default() };
        Packet { link: "eth0".into(), offload, frame }
    }

    #[test]
    fn packets_arrive_as_they_were_and_in_order() {
        let packets: Vec<Packet> = (0..200).map(|n| packet(60 + n * 300, n as u8)).collect();
        let payloads = encode(&packets);
        assert!(payloads.len() > 1 && payloads.iter().all(|p| p.len() <= MAX_DATA));
        let mut arrived = Arrived::default();
        payloads.iter().for_each(|p| arrived.add(p).unwrap());
        assert_eq!(arrived.packets, packets);
        assert!(encode(&[]).is_empty());
    }

    #[test]
    fn a_source_that_sends_rubbish_is_told_and_costs_little() {
        let good = encode(&[packet(100, 1)]).remove(0);
        for len in 1..good.len() {
            assert!(Arrived::default().add(&good[..len]).is_err(), "{len} bytes");
        }
        for (at, value) in [(0, 16), (0, 255), (1, 0xff), (18, 0xff)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(Arrived::default().add(&bad).is_err(), "{value} at {at}");
        }
        let mut arrived = Arrived::default();
        let senseless = Packet { frame: vec![0; 60], ..packet(60, 0) };
        arrived.add(&encode(&[senseless]).remove(0)).unwrap();
        assert!(arrived.packets.is_empty());
        for payload in encode(&vec![packet(MAX_FRAME, 2); 200]) {
            arrived.add(&payload).unwrap();
        }
        assert_eq!(arrived.packets.len(), ROOM / MAX_FRAME);
    }
}
