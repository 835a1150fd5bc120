//! A real agent's port under a thousand connections that never show a certificate: idle ones, ones that send a byte now and then, ones that
//! stop in the middle of the handshake. What they cost in memory, how long they are borne, and that an honest node gets in
//! meanwhile, from another address and from the attacker's own. A program of its own, so that its memory is its own.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};
use transship::{
    agent::{Agent, config::Config, message::Message, peer, server},
    tls::{
        ALPN_CONTROL,
        cert::{Validity, write_ca, write_node},
        config::Pki,
    },
};

/// So many at once.
const MANY: usize = 1000;
/// What all of it may cost, at most; measured was a tenth of it.
const MOST_MEMORY: u64 = 64 << 20;
/// In which time an honest node has to be in, whatever goes on.
const SOON: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
enum Kind {
    Idle,
    /// The beginning of a ClientHello, byte by byte.
    Slow,
    /// A whole ClientHello, and then nothing.
    Halfway,
}

fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Both ends of a thousand connections are in this process.
fn allow_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65536), hard).unwrap();
}

/// An agent on a runtime and a thread of its own, as in production.
fn agent(pki: &Path) -> SocketAddr {
    let text = format!("listen = '127.0.0.1:0'\npki = '{}'", pki.display());
    let agent = Arc::new(Agent::new(Config::parse(&text).unwrap()));
    let (to, address) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = server::bind_peers(&agent).await.unwrap();
            to.send(listener.local_addr().unwrap()).unwrap();
            server::serve_peers(agent, listener).await;
        });
    });
    address.recv().unwrap()
}

fn client_hello() -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(RootCertStore::empty());
    let mut config = config.with_no_client_auth();
    config.alpn_protocols = vec![ALPN_CONTROL.to_vec()];
    let name = "127.0.0.1".try_into().unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).unwrap();
    bytes
}

async fn connect(from: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(from, 0)).unwrap();
    socket.connect(to).await.unwrap()
}

/// One connection to its end, which is the agent's; how long it was borne.
async fn attack(mut stream: TcpStream, kind: Kind, hello: Arc<Vec<u8>>) -> Duration {
    let begun = Instant::now();
    let (mut read, mut write) = stream.split();
    let send = async {
        match kind {
            Kind::Idle => {}
            Kind::Slow => {
                for byte in hello.iter().take(hello.len() - 1) {
                    if write.write_all(&[*byte]).await.is_err() {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            Kind::Halfway => drop(write.write_all(&hello).await),
        }
        std::future::pending::<()>().await;
    };
    let mut waste = [0; 4096];
    let end = async { while matches!(read.read(&mut waste).await, Ok(1..)) {} };
    tokio::select! {
        () = send => {}
        () = end => {}
    }
    begun.elapsed()
}

/// An honest node's question, from the address that its routes give it; how long the answer took.
async fn honest(pki: &Pki, to: SocketAddr) -> Duration {
    let begun = Instant::now();
    let dialled = peer::dial(&to.to_string(), pki, "node-a", Duration::from_secs(20)).await;
    let mut link = dialled.unwrap().link;
    link.say(Message::Ask { migration: "0".repeat(32) }).await.unwrap();
    assert!(matches!(link.hear().await.unwrap(), Message::Fate { .. }));
    begun.elapsed()
}

#[test]
fn a_thousand_strangers_cost_little_and_keep_nobody_out() {
    allow_descriptors();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    write_ca(&path("ca"), "ca", Validity::days(2), false).unwrap();
    for node in ["node-a", "node-b"] {
        let address = ["127.0.0.1".to_string()];
        write_node(&path("ca"), &path(node), node, &address, Validity::days(2), false).unwrap();
    }
    let to = agent(&path("node-b"));
    let pki = Pki::new(path("node-a"));
    let hello = Arc::new(client_hello());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for _ in 0..3 {
            honest(&pki, to).await;
        }
        println!("undisturbed, an honest node has its answer after {:?}", honest(&pki, to).await);
        // one attacker at an address of its own, a thousand of them, and one at the honest node's address
        let own = |_| IpAddr::V4(Ipv4Addr::new(127, 0, 0, 66));
        let each = |n: usize| IpAddr::V4(Ipv4Addr::new(127, 1, (n / 250) as u8, (n % 250) as u8 + 1));
        let shared = |_| IpAddr::V4(Ipv4Addr::LOCALHOST);
        let cases = [
            ("one address", &own as &dyn Fn(usize) -> IpAddr, 64),
            ("a thousand addresses", &each, 256),
            ("the honest node's address", &shared, 64),
        ];
        for (whose, from, most) in cases {
            let before = memory();
            let mut attackers = JoinSet::new();
            let (mut slowest, mut peak) = (Duration::ZERO, 0);
            for n in 0..MANY {
                let kind = [Kind::Idle, Kind::Slow, Kind::Halfway][n % 3];
                let stream = connect(from(n), to).await;
                attackers.spawn(attack(stream, kind, hello.clone()));
                if n % 100 == 99 {
                    slowest = slowest.max(honest(&pki, to).await);
                    peak = peak.max(memory());
                }
            }
            for _ in 0..10 {
                slowest = slowest.max(honest(&pki, to).await);
                peak = peak.max(memory());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            while attackers.try_join_next().is_some() {}
            let left = attackers.len();
            let cost = peak.saturating_sub(before);
            println!(
                "{MANY} from {whose}: {left} still there at the end, {} KiB more memory at most, \
                 an honest answer within {slowest:?}",
                cost >> 10
            );
            assert!(left <= most, "{left} from {whose}");
            assert!(cost < MOST_MEMORY, "{cost} bytes");
            assert!(slowest < SOON, "{slowest:?}");
            if whose != "one address" {
                attackers.shutdown().await;
                continue;
            }
            let mut borne = Duration::ZERO;
            while let Some(time) = attackers.join_next().await {
                borne = borne.max(time.unwrap());
            }
            println!("the last of them was borne for {borne:?}");
            assert!(borne < server::STRANGER_LIMIT + Duration::from_secs(5), "{borne:?}");
        }
    });
}

/// A node with a good certificate that says nothing, or sends its hello byte by byte, is given up too.
#[test]
fn a_guest_that_does_not_say_what_it_wants_is_shown_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    write_ca(&path("ca"), "ca", Validity::days(2), false).unwrap();
    for node in ["node-a", "node-b"] {
        let address = ["127.0.0.1".to_string()];
        write_node(&path("ca"), &path(node), node, &address, Validity::days(2), false).unwrap();
    }
    let to = agent(&path("node-b"));
    let config = Pki::new(path("node-a")).client(ALPN_CONTROL, None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut all = JoinSet::new();
        for drip in [false, true] {
            let config = config.clone();
            all.spawn(async move {
                let stream = TcpStream::connect(to).await.unwrap();
                let name = "127.0.0.1".try_into().unwrap();
                let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap();
                let begun = Instant::now();
                let (mut read, mut write) = tokio::io::split(stream);
                let feed = async {
                    // a message of 60,000 bytes is announced
                    let head = [&60_000u32.to_le_bytes()[..], &[0]].concat();
                    while drip && write.write_all(&head).await.is_ok() && write.flush().await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                    std::future::pending::<()>().await;
                };
                // its signs of life come until the end
                let mut waste = [0; 4096];
                let end = async { while matches!(read.read(&mut waste).await, Ok(1..)) {} };
                tokio::select! {
                    () = feed => {}
                    () = end => {}
                }
                begun.elapsed()
            });
        }
        while let Some(time) = all.join_next().await {
            let time = time.unwrap();
            println!("a silent or dripping guest was borne for {time:?}");
            assert!(time < Duration::from_secs(20), "{time:?}");
        }
    });
}
