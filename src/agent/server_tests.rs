//! Two and three nodes' agents in one process, over real sockets: who gets in, what who does not is told, and what the log says of it.
//! No containerd: whoever is let in is refused by its absence, which is how one sees that it was let in.

use std::{
    fs,
    path::PathBuf,
    sync::{OnceLock, RwLock},
    time::SystemTime,
};

use super::*;
use crate::{
    agent::{
        api::{ErrorReport, ExitCode, Reply, TicketRequest},
        config::Config,
        message::{Message, MoveAsked, Offer, Refusal},
        peer::{self, Peer},
    },
    tls::{
        cert::{CA_CERT, NODE_CERT, NODE_KEY, Pair, Validity, new_node, write_ca, write_node},
        config::Pki,
        revocation::{CRL, Which, write_revoked},
    },
};

/// Everything that was logged in this process.
struct Lines(RwLock<Vec<String>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        self.0.write().unwrap().push(record.args().to_string());
    }
    fn flush(&self) {}
}

fn lines() -> &'static Lines {
    static LINES: OnceLock<&'static Lines> = OnceLock::new();
    LINES.get_or_init(|| {
        let lines: &'static Lines = Box::leak(Box::new(Lines(RwLock::default())));
        log::set_logger(lines).unwrap();
        log::set_max_level(log::LevelFilter::Info);
        lines
    })
}

/// A line with all of these words comes within moments.
async fn logged(words: &[&str]) {
    for _ in 0..500 {
        if lines().0.read().unwrap().iter().any(|line| words.iter().all(|w| line.contains(w))) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("nothing with {words:?} in {:#?}", lines().0.read().unwrap());
}

/// Nodes of one CA, each at 127.0.0.1 by its certificate; one of them has an agent that listens.
struct Nodes {
    dir: tempfile::TempDir,
    agent: Arc<Agent>,
    to: String,
}

impl Nodes {
    /// `names`: the first one listens, with these lines in its configuration.
    async fn new(names: &[&str], config: &str) -> Nodes {
        lines();
        let dir = tempfile::tempdir().unwrap();
        write_ca(&dir.path().join("ca"), "ca", Validity::days(2), false).unwrap();
        let text = format!(
            "listen = '127.0.0.1:0'\npki = '{}'\ncontainerd = '/nonexistent/containerd.sock'\n{config}",
            dir.path().join(names[0]).display()
        );
        for name in names {
            node(&dir, name, "127.0.0.1");
        }
        let agent = Arc::new(Agent::new(Config::parse(&text).unwrap()));
        let listener = bind_peers(&agent).await.unwrap();
        let to = listener.local_addr().unwrap().to_string();
        tokio::spawn(serve_peers(agent.clone(), listener));
        Nodes { dir, agent, to }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// This node dials the agent.
    async fn dial(&self, from: &str, moving: Option<MoveAsked>) -> Result<Peer, ErrorReport> {
        let pki = Pki::new(self.path(from));
        peer::dial_to_move(&self.to, &pki, from, Duration::from_secs(20), moving).await
    }

    /// And is not trusted, or does not trust.
    async fn untrusted(&self, from: &str, words: &str) {
        let error = self.dial(from, None).await.unwrap_err();
        assert_eq!(error.code, ExitCode::Untrusted, "{error}");
        assert!(error.message.contains(words) && !error.advice.is_empty(), "{error}");
    }

    /// A ticket for a move of `default/CONTAINER` from this node.
    fn ticket(&self, from: &str, container: &str) -> String {
        let request = TicketRequest {
            namespace: "default".into(),
            container: container.into(),
            from: from.into(),
            valid_seconds: 600,
        };
        match super::super::ticket::issue(&self.agent, &request).unwrap() {
            Reply::Ticket(ticket) => ticket.ticket,
            other => panic!("{other:?}"),
        }
    }

    /// What a move comes to: the refusal in place of a hello, or after the offer.
    async fn move_from(&self, from: &str, container: &str, ticket: &str) -> Result<Refusal, ErrorReport> {
        let mut link = self.dial(from, Some(asked(container, ticket))).await?.link;
        link.say(Message::Offer(Box::new(offer(container)))).await.unwrap();
        match link.hear().await.unwrap() {
            Message::Refused(refusal) => Ok(refusal),
            other => panic!("{other:?}"),
        }
    }
}

fn node(dir: &tempfile::TempDir, name: &str, address: &str) {
    let at = |name| dir.path().join(name);
    write_node(&at("ca"), &at(name), name, &[address.into()], Validity::days(2), true).unwrap();
}

fn asked(container: &str, ticket: &str) -> MoveAsked {
    MoveAsked { namespace: "default".into(), container: container.into(), ticket: ticket.into() }
}

fn offer(container: &str) -> Offer {
    let mut offer = Offer { namespace: "default".into(), ..Offer::default() };
    offer.record.id = container.into();
    offer
}

/// Puts a certificate of that name into a pki directory, of this CA and with this validity.
fn replace(dir: &std::path::Path, ca: &std::path::Path, name: &str, address: &str, validity: Validity) {
    let read = |file: &str| fs::read_to_string(ca.join(file)).unwrap();
    let ca = Pair { cert: read(CA_CERT), key: read("ca.key") };
    let made = new_node(&ca, name, &[address.into()], validity).unwrap();
    fs::write(dir.join(NODE_CERT), made.cert).unwrap();
    fs::write(dir.join(NODE_KEY), made.key).unwrap();
}

#[tokio::test]
async fn a_running_agent_goes_by_the_certificates_that_are_there_now() {
    let nodes = Nodes::new(&["rl-b", "rl-a"], "").await;
    nodes.dial("rl-a", None).await.unwrap();
    let (ca, theirs, good) = (nodes.path("ca"), nodes.path("theirs"), Validity::days(2));
    write_ca(&theirs, "ca", good, false).unwrap();
    let (now, day) = (SystemTime::now(), Duration::from_secs(86400));
    let past = Validity { from: now - 2 * day, until: now - day };
    let future = Validity { from: now + day, until: now + 2 * day };
    // the agent's own, while it runs: the dialling side does not accept it
    let here = nodes.path("rl-b");
    replace(&here, &ca, "rl-b", "127.0.0.1", past);
    nodes.untrusted("rl-a", "the peer's certificate has expired").await;
    replace(&here, &ca, "rl-b", "127.0.0.1", future);
    nodes.untrusted("rl-a", "the peer's certificate is not valid yet").await;
    replace(&here, &theirs, "rl-b", "127.0.0.1", good);
    nodes.untrusted("rl-a", "of another CA").await;
    replace(&here, &ca, "rl-b", "10.9.9.9", good);
    nodes.untrusted("rl-a", "it does not name the address that was dialled").await;
    logged(&["refused 127.0.0.1", "the peer did not accept this node's certificate: it has expired"]).await;
    replace(&here, &ca, "rl-b", "127.0.0.1", good);
    nodes.dial("rl-a", None).await.unwrap();
    // the dialling side's: the agent does not accept it
    let there = nodes.path("rl-a");
    replace(&there, &ca, "rl-a", "127.0.0.1", past);
    nodes.untrusted("rl-a", "did not accept this node's certificate: it has expired").await;
    logged(&["refused 127.0.0.1", "the peer's certificate has expired"]).await;
    replace(&there, &ca, "rl-a", "127.0.0.1", future);
    nodes.untrusted("rl-a", "did not accept this node's certificate").await;
    logged(&["refused 127.0.0.1", "not valid yet"]).await;
    replace(&there, &theirs, "rl-a", "127.0.0.1", good);
    nodes.untrusted("rl-a", "did not accept this node's certificate").await;
    logged(&["refused 127.0.0.1", "the peer's certificate is of another CA"]).await;
    // a good one that is then revoked, without anybody being started anew
    node(&nodes.dir, "rl-a", "127.0.0.1");
    nodes.dial("rl-a", None).await.unwrap();
    let (list, _) = write_revoked(&ca, &Which::Node("rl-a".into()), good).unwrap();
    fs::copy(list, here.join(CRL)).unwrap();
    nodes.untrusted("rl-a", "did not accept this node's certificate: it was revoked").await;
    logged(&["refused 127.0.0.1", "the peer's certificate was revoked"]).await;
    node(&nodes.dir, "rl-a", "127.0.0.1");
    nodes.dial("rl-a", None).await.unwrap();
    // and the agent's own, revoked in the eyes of who dials
    let (list, _) = write_revoked(&ca, &Which::File(here.join(NODE_CERT)), good).unwrap();
    fs::copy(list, there.join(CRL)).unwrap();
    nodes.untrusted("rl-a", "the peer's certificate was revoked").await;
}

#[tokio::test]
async fn a_valid_certificate_alone_moves_nothing_here() {
    let nodes = Nodes::new(&["ca-b", "ca-a"], "").await;
    let error = nodes.move_from("ca-a", "redis", "").await.unwrap_err();
    assert_eq!((error.code, error.node.as_str()), (ExitCode::Refused, "ca-b"));
    assert!(error.message.contains("ca-a may not move default/redis to ca-b"), "{error}");
    for words in
        ["on ca-b: transship ticket redis -n default --from ca-a", "accept_from in ca-b's agent.toml"]
    {
        assert!(error.advice.contains(words), "{}", error.advice);
    }
    logged(&["refused ca-a (127.0.0.1)", "default/redis", "not listed in accept_from"]).await;
    // it may ask, and not offer what it did not say
    let mut link = nodes.dial("ca-a", None).await.unwrap().link;
    link.say(Message::Ask { migration: "0".repeat(32) }).await.unwrap();
    assert!(matches!(link.hear().await.unwrap(), Message::Fate { .. }));
    let mut link = nodes.dial("ca-a", None).await.unwrap().link;
    link.say(Message::Offer(Box::new(offer("redis")))).await.unwrap();
    assert!(link.hear().await.is_err());
    logged(&["peer ca-a", "in place of a question"]).await;
    // a name that would write into the log
    let error = nodes.move_from("ca-a", "x\nrefused nobody", "").await.unwrap_err();
    assert!(error.message.contains(r#"x\nrefused nobody"#), "{error}");
}

#[tokio::test]
async fn a_listed_node_is_let_in_with_what_it_said_and_nothing_else() {
    let nodes = Nodes::new(&["li-b", "li-a", "li-m"], "accept_from = ['li-a']").await;
    assert_eq!(nodes.move_from("li-a", "redis", "").await.unwrap().code, "containerd");
    nodes.move_from("li-m", "redis", "").await.unwrap_err();
    logged(&["refused li-m"]).await;
    let mut link = nodes.dial("li-a", Some(asked("redis", ""))).await.unwrap().link;
    link.say(Message::Offer(Box::new(offer("other")))).await.unwrap();
    let Message::Refused(refusal) = link.hear().await.unwrap() else { panic!() };
    assert_eq!(refusal.code, "policy");
    logged(&["refused li-a (127.0.0.1)", "another container than default/redis"]).await;
}

#[tokio::test]
async fn a_ticket_lets_in_one_node_with_one_container_once() {
    let nodes = Nodes::new(&["ti-b", "ti-a", "ti-m"], "").await;
    let ticket = nodes.ticket("ti-a", "redis");
    // stolen by a node with a good certificate of its own
    let error = nodes.move_from("ti-m", "redis", &ticket).await.unwrap_err();
    assert_eq!(error.code, ExitCode::Refused);
    assert!(
        error.message.contains("ti-m may not") && error.message.contains("given to another node"),
        "{error}"
    );
    logged(&["refused ti-m (127.0.0.1)", "given to another node", "for default/redis from ti-a"]).await;
    // for something else
    let error = nodes.move_from("ti-a", "other", &ticket).await.unwrap_err();
    assert!(error.message.contains("for another container"), "{error}");
    // what comes of it is refused for lack of a containerd: it was let in, nothing was made, and it is still good
    for _ in 0..2 {
        assert_eq!(nodes.move_from("ti-a", "redis", &ticket).await.unwrap().code, "containerd");
    }
    // while one move is being prepared, there is no other
    let first = nodes.dial("ti-a", Some(asked("redis", &ticket))).await.unwrap();
    let error = nodes.move_from("ti-a", "redis", &ticket).await.unwrap_err();
    assert!(error.message.contains("another move with the same ticket"), "{error}");
    logged(&["refused ti-a", "another move with the same ticket"]).await;
    drop(first);
    // used, as the placement does it
    let held = loop {
        let node = nodes.agent.certified_name();
        let now = Instant::now();
        match nodes.agent.tickets.redeem(&ticket, &node, "ti-a", "default", "redis", now) {
            Ok(held) => break held,
            // the connection that was dropped has not been noticed yet
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    held.use_up();
    let error = nodes.move_from("ti-a", "redis", &ticket).await.unwrap_err();
    assert!(error.message.contains("used already"), "{error}");
    logged(&["refused ti-a", "used already", "for default/redis from ti-a"]).await;
    // after a restart of the agent, or made up
    let unknown = format!("ti-b:{}:{}", "a".repeat(16), "b".repeat(64));
    let error = nodes.move_from("ti-a", "redis", &unknown).await.unwrap_err();
    assert!(error.message.contains("not known here"), "{error}");
    // of another node: it is not even shown
    let error = nodes.move_from("ti-a", "redis", &unknown.replace("ti-b", "ti-c")).await.unwrap_err();
    assert_eq!(error.code, ExitCode::Usage, "{error}");
}

#[tokio::test]
async fn tickets_for_all_means_all() {
    let nodes = Nodes::new(&["al-b", "al-a"], "tickets = 'always'").await;
    let error = nodes.move_from("al-a", "redis", "").await.unwrap_err();
    assert!(error.message.contains("every move to this node needs one"), "{error}");
    let ticket = nodes.ticket("al-a", "redis");
    assert_eq!(nodes.move_from("al-a", "redis", &ticket).await.unwrap().code, "containerd");
}

#[tokio::test]
async fn a_ticket_that_was_taken_back_lets_nobody_in() {
    let nodes = Nodes::new(&["wi-b", "wi-a"], "").await;
    let text = nodes.ticket("wi-a", "redis");
    let states = |nodes: &Nodes| match super::super::ticket::list(&nodes.agent) {
        Reply::Tickets { tickets } => {
            let shown = serde_json::to_string(&tickets).unwrap();
            assert!(!shown.contains(text.rsplit(':').next().unwrap()), "the secret is shown");
            tickets.iter().map(|t| (t.id.clone(), t.container.clone(), t.state.clone())).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    let number = crate::agent::tickets::number_in(&text).to_string();
    assert_eq!(states(&nodes), [(number.clone(), "default/redis".into(), "good".into())]);
    super::super::ticket::withdraw(&nodes.agent, &number).unwrap();
    let error = nodes.move_from("wi-a", "redis", &text).await.unwrap_err();
    assert!(error.message.contains("the ticket was withdrawn"), "{error}");
    assert_eq!(states(&nodes)[0].2, "withdrawn");
    let error = super::super::ticket::withdraw(&nodes.agent, "7").unwrap_err();
    assert!(error.code == ExitCode::Usage && error.message.contains("no ticket 7"), "{error}");
}

#[tokio::test]
async fn a_node_is_not_moved_to_itself_and_a_ticket_is_for_another() {
    let nodes = Nodes::new(&["se-b"], "accept_from = ['*']").await;
    let error = nodes.move_from("se-b", "redis", "").await.unwrap_err();
    assert!(error.code == ExitCode::Usage && error.message.contains("is this node"), "{error}");
    let request = TicketRequest { from: "se-b".into(), ..ticket_request() };
    assert_eq!(super::super::ticket::issue(&nodes.agent, &request).unwrap_err().code, ExitCode::Usage);
    let request = TicketRequest { container: "a/b".into(), ..ticket_request() };
    assert_eq!(super::super::ticket::issue(&nodes.agent, &request).unwrap_err().code, ExitCode::Usage);
    super::super::ticket::issue(&nodes.agent, &ticket_request()).unwrap();
}

fn ticket_request() -> TicketRequest {
    TicketRequest {
        namespace: "default".into(),
        container: "redis".into(),
        from: "se-a".into(),
        valid_seconds: 60,
    }
}

#[test]
fn a_node_has_so_many_connections_and_others_are_not_counted_with_it() {
    let guests: Arc<Guests> = Arc::default();
    let mut all: Vec<_> = (0..MAX_PER_NODE).map(|_| guests.enter("node-a").unwrap()).collect();
    assert!(guests.enter("node-a").is_none());
    assert!(guests.enter("node-c").is_some());
    all.pop();
    let again = guests.enter("node-a");
    assert!(again.is_some());
    drop((all, again));
    assert!(guests.0.lock().unwrap().is_empty());
}
