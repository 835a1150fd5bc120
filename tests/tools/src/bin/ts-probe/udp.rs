//! Datagrams sent back to where they came from.

use std::net::UdpSocket;

use transship_testtools::args::Args;

use crate::say;

pub fn echo(args: &mut Args) -> Result<(), String> {
    let port = args.number("PORT")?;
    let socket = UdpSocket::bind(format!("0.0.0.0:{port}")).map_err(|e| format!("port {port}: {e}"))?;
    std::thread::spawn(move || {
        let mut datagram = vec![0; 65536];
        while let Ok((len, from)) = socket.recv_from(&mut datagram) {
            // whoever sent it may be gone
            let _ = socket.send_to(&datagram[..len], from);
        }
        say::line("udp broken");
    });
    say::line("udp listening");
    say::rounds("udp", args, |_| Ok(String::new()))
}
