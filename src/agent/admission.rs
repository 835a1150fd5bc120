//! May this node move this container here? Asked of every peer before its offer is read. Pure.
//!
//! | `tickets` | a node in `accept_from` | any other node |
//! |---|---|---|
//! | `"unlisted"` (default) | may | with a ticket ([`super::tickets`]) |
//! | `"always"` | with a ticket | with a ticket |
//!
//! By default `accept_from` is empty, and nobody may without a ticket: a certificate of our CA says who a node is, and nothing
//! about what it may do here. If it were enough, one node that is broken into could put containers on all others. A list is right
//! for nodes that trust each other as far as that anyway; who cannot say so has tickets. Both are words of the
//! destination's operator, kept on the destination: a node can make up neither for itself, and no third party has to be
//! asked. `accept_from = ["*"]` is every node of the CA; the agent says so at each start, and `transship doctor` too.

use std::time::Instant;

use super::{
    config::{Config, TicketPolicy},
    message::{MoveAsked, Refusal},
    tickets::{Held, Refused, Tickets},
};

/// In `accept_from`: every node with a certificate of our CA.
pub const ANYBODY: &str = "*";

/// Why a node may not, and what is said of it in the log.
#[derive(Debug)]
pub struct Denied {
    /// For the peer.
    pub refusal: Refusal,
    /// For this node's log.
    pub logged: String,
}

/// Whether the node is one that needs no ticket.
fn is_listed(config: &Config, peer: &str) -> bool {
    config.tickets == TicketPolicy::Unlisted && config.accept_from.iter().any(|n| n == peer || n == ANYBODY)
}

/// Decides about `peer` (by its certificate). A ticket that is shown has to be good, also where none is needed.
///
/// # Errors
/// It may not.
pub fn admit(
    config: &Config,
    tickets: &Tickets,
    node: &str,
    peer: &str,
    asked: &MoveAsked,
    now: Instant,
) -> Result<Option<Held>, Box<Denied>> {
    let MoveAsked { namespace, container, ticket } = asked;
    let denied = |message: String, why: String, about: String| {
        let list = match config.tickets {
            TicketPolicy::Unlisted => {
                format!("; or, for good, list {peer} under accept_from in {node}'s agent.toml")
            }
            TicketPolicy::Always => String::new(),
        };
        let advice = format!(
            "on {node}: transship ticket {container} -n {namespace} --from {peer}; then here: transship migrate ... --ticket TICKET{list}"
        );
        let logged = format!("{peer} may not move {namespace}/{container} here: {why}{about}");
        Err(Box::new(Denied { refusal: Refusal { code: "policy".into(), message, advice }, logged }))
    };
    if ticket.is_empty() {
        if is_listed(config, peer) {
            return Ok(None);
        }
        let why = match config.tickets {
            TicketPolicy::Unlisted => "it is not listed in accept_from, and showed no ticket",
            TicketPolicy::Always => "it showed no ticket, and every move to this node needs one",
        };
        return denied(
            format!("{peer} may not move {namespace}/{container} to {node}: {why}"),
            why.into(),
            String::new(),
        );
    }
    match tickets.redeem(ticket, node, peer, namespace, container, now) {
        Ok(held) => Ok(Some(held)),
        Err((Refused::InUse, about)) => {
            let refusal = Refusal {
                code: "policy".into(),
                message: Refused::InUse.to_string(),
                advice: "wait for its end; see `transship ps`".into(),
            };
            let logged =
                format!("{peer} may not move {namespace}/{container} here: {} ({about})", Refused::InUse);
            Err(Box::new(Denied { refusal, logged }))
        }
        Err((why, about)) => denied(
            format!("{peer} may not move {namespace}/{container} to {node}: {why}"),
            why.to_string(),
            format!(" ({about})"),
        ),
    }
}

/// The policy in a sentence, for the agent's log and `transship doctor`; and whether everybody is let in.
pub fn in_words(config: &Config) -> (String, bool) {
    let listed = config.accept_from.iter().filter(|n| *n != ANYBODY).cloned().collect::<Vec<_>>().join(", ");
    let anybody = config.tickets == TicketPolicy::Unlisted && config.accept_from.iter().any(|n| n == ANYBODY);
    let text = match config.tickets {
        TicketPolicy::Always => "every move to this node needs a ticket".into(),
        TicketPolicy::Unlisted if anybody => {
            "every node with a certificate of our CA may move containers to this node".into()
        }
        TicketPolicy::Unlisted if listed.is_empty() => {
            "no node may move containers here without a ticket".into()
        }
        TicketPolicy::Unlisted => format!("{listed} may move containers here; other nodes need a ticket"),
    };
    (text, anybody)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text).unwrap()
    }

    fn asked(ticket: &str) -> MoveAsked {
        MoveAsked { namespace: "default".into(), container: "redis".into(), ticket: ticket.into() }
    }

    fn ask(config: &Config, tickets: &Tickets, peer: &str, ticket: &str) -> Result<bool, Box<Denied>> {
        let held = admit(config, tickets, "node-b", peer, &asked(ticket), Instant::now())?;
        Ok(held.map(Held::use_up).is_some())
    }

    #[test]
    fn a_certificate_alone_is_not_enough() {
        let (nobody, tickets) = (config(""), Tickets::default());
        let denied = ask(&nobody, &tickets, "node-a", "").unwrap_err();
        assert_eq!(denied.refusal.code, "policy");
        assert!(denied.refusal.message.contains("not listed in accept_from"), "{denied:?}");
        for word in ["transship ticket redis -n default --from node-a", "--ticket", "accept_from"] {
            assert!(denied.refusal.advice.contains(word), "{denied:?}");
        }
        assert!(denied.logged.contains("node-a") && denied.logged.contains("default/redis"));
        // a name that only looks like a listed one
        let one = config("accept_from = ['node-a']");
        assert!(!ask(&one, &tickets, "node-a", "").unwrap());
        for other in ["node-aa", "node", "NODE-A", "*", ""] {
            ask(&one, &tickets, other, "").unwrap_err();
        }
        assert!(!ask(&config("accept_from = ['*']"), &tickets, "node-x", "").unwrap());
    }

    #[test]
    fn a_ticket_lets_in_who_is_not_listed_and_is_needed_by_all_if_so_wanted() {
        let (nobody, tickets) = (config(""), Tickets::default());
        let ten = Duration::from_secs(600);
        let give =
            || tickets.issue("node-b", "node-a", "default", "redis", ten, Instant::now()).unwrap().text;
        assert!(ask(&nobody, &tickets, "node-a", &give()).unwrap());
        let always = config("tickets = 'always'");
        let denied = ask(&always, &tickets, "node-a", "").unwrap_err();
        assert!(denied.refusal.message.contains("every move to this node needs one"));
        assert!(!denied.refusal.advice.contains("accept_from"));
        let ticket = give();
        assert!(ask(&always, &tickets, "node-a", &ticket).unwrap());
        // used twice: refused and logged, also from a node that would have needed none
        for config in [&always, &config("accept_from = ['node-a']")] {
            let denied = ask(config, &tickets, "node-a", &ticket).unwrap_err();
            assert!(denied.refusal.message.contains("used already"), "{denied:?}");
            assert!(denied.logged.contains("used already (ticket "), "{denied:?}");
        }
        let denied = ask(&nobody, &tickets, "node-m", &give()).unwrap_err();
        assert!(denied.logged.contains("node-m may not") && denied.logged.contains("redis from node-a"));
        assert!(denied.refusal.message.contains("given to another node"));
    }

    #[test]
    fn a_ticket_in_use_is_no_reason_for_another_one() {
        let (nobody, tickets, now) = (config(""), Tickets::default(), Instant::now());
        let ten = Duration::from_secs(600);
        let ticket = tickets.issue("node-b", "node-a", "default", "redis", ten, now).unwrap().text;
        let held = admit(&nobody, &tickets, "node-b", "node-a", &asked(&ticket), now).unwrap();
        let denied = ask(&nobody, &tickets, "node-a", &ticket).unwrap_err();
        assert!(!denied.refusal.advice.contains("transship ticket"), "{denied:?}");
        drop(held);
        assert!(ask(&nobody, &tickets, "node-a", &ticket).unwrap());
    }

    #[test]
    fn the_policy_is_said_aloud() {
        for (text, words, open) in [
            ("", "no node may", false),
            ("accept_from = ['a', 'b']", "a, b may", false),
            ("accept_from = ['*']", "every node with a certificate", true),
            ("tickets = 'always'", "every move", false),
        ] {
            let (said, anybody) = in_words(&config(text));
            assert!(said.contains(words) && anybody == open, "{text}: {said}");
        }
    }
}
