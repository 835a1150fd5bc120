//! Tickets: an operator's word that one node may move one container here, once, soon (`transship ticket`).
//!
//! A certificate says which node it is, not that it may put a container on this one. That is this node's operator's to say: for
//! good (`accept_from`, see [`super::admission`]), or for one move, by a ticket. It is bound to the source node (by its
//! certificate), to this node (only this agent knows it, and the text names it), to the container and to a time; it is good
//! for one move. The operator carries it to the source, whose agent shows it in its hello. Who steals one can do nothing with
//! it without the source node's key.
//!
//! Tickets are kept in memory only, as digests of their secrets, and their time is this machine's uptime: setting the clock changes
//! nothing, nothing is left on a disk, and a restart of the agent makes all of them void, used ones as well as unused ones.
//! What is refused before anything was made here (no room, say) does not use a ticket up; from the moment at which
//! something is made it is used, however the move ends.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::tls::{random_hex, same_secret};

/// The longest time for which a ticket is given.
pub const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// For how long it is known of a ticket that it was used or has expired, beyond its time.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// The most tickets that are known at a time.
const MOST: usize = 1024;

/// Why a ticket was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is no ticket at all.
    Malformed,
    /// It is of another node.
    OtherDestination,
    /// This agent does not know it, or not with this secret.
    Unknown,
    /// It was given to another source node.
    OtherSource,
    /// It was given for another container.
    OtherContainer,
    /// Its time is over.
    Expired,
    /// A move with it is being prepared just now.
    InUse,
    /// It was used.
    Used,
    /// This node's operator has taken it back.
    Withdrawn,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refused::Malformed => "what it showed is no ticket",
            Refused::OtherDestination => "the ticket is for a move to another node",
            Refused::Unknown => {
                "the ticket is not known here (tickets do not outlive a restart of the agent)"
            }
            Refused::OtherSource => "the ticket was given to another node",
            Refused::OtherContainer => "the ticket is for another container",
            Refused::Expired => "the ticket has expired",
            Refused::InUse => "another move with the same ticket is being prepared",
            Refused::Used => "the ticket was used already",
            Refused::Withdrawn => "the ticket was withdrawn",
        })
    }
}

/// A ticket as it was given out.
#[derive(Clone)]
pub struct Issued {
    /// Its text: all of it is the secret of the source's operator.
    pub text: String,
    /// Its number, as in the log; no secret.
    pub id: String,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Issued({})", self.id)
    }
}

/// What a ticket is for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bound {
    source: String,
    container: String,
}

#[derive(Debug)]
struct Entry {
    /// SHA-256 of the secret.
    digest: [u8; 32],
    bound: Bound,
    expires: Instant,
    state: State,
}

/// What has become of a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing yet.
    Good,
    /// A move is being prepared with it.
    InUse,
    /// A move was made with it, or tried.
    Used,
    /// The operator has taken it back.
    Withdrawn,
}

/// A ticket as it is known here: no part of its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its number.
    pub id: String,
    /// The node that it was given to.
    pub from: String,
    /// `NAMESPACE/ID` of the container.
    pub container: String,
    /// For how long it is still good; zero: no more.
    pub left: Duration,
    /// What has become of it.
    pub state: State,
}

/// The number of a ticket, which may be given as its text.
pub fn number_in(text: &str) -> &str {
    parts(text).map_or(text, |(_, id, _)| id)
}

/// The node that a ticket's text names as its destination.
pub fn destination_of(text: &str) -> Option<&str> {
    parts(text).map(|(node, _, _)| node)
}

/// `NODE:NUMBER:SECRET`
fn parts(text: &str) -> Option<(&str, &str, &str)> {
    let (rest, secret) = text.rsplit_once(':')?;
    let (node, id) = rest.rsplit_once(':')?;
    let hex = |text: &str, len| text.len() == len && text.bytes().all(|b| b.is_ascii_hexdigit());
    (!node.is_empty() && node.len() <= 255 && hex(id, 16) && hex(secret, 64)).then_some((node, id, secret))
}

fn container(namespace: &str, id: &str) -> String {
    format!("{namespace}/{id}")
}

/// All tickets of this agent.
#[derive(Clone, Debug, Default)]
pub struct Tickets(Arc<Mutex<HashMap<String, Entry>>>);

impl Tickets {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives one out. `node`: this one.
    ///
    /// # Errors
    /// There are too many, or it would be good for longer than [`LONGEST`].
    pub fn issue(
        &self,
        node: &str,
        source: &str,
        namespace: &str,
        id: &str,
        valid: Duration,
        now: Instant,
    ) -> Result<Issued> {
        ensure!(
            (Duration::from_secs(1)..=LONGEST).contains(&valid),
            "a ticket is good for at least a second and at most {} hours",
            LONGEST.as_secs() / 3600
        );
        let (number, secret) = (random_hex(8)?, random_hex(32)?);
        let mut all = self.lock();
        all.retain(|_, entry| entry.state == State::InUse || entry.expires + REMEMBERED > now);
        if all.len() >= MOST {
            // those that are only remembered go before anything is refused
            all.retain(|_, entry| matches!(entry.state, State::Good | State::InUse) && entry.expires > now);
        }
        ensure!(all.len() < MOST, "{MOST} tickets are out already: wait until some have expired");
        let entry = Entry {
            digest: Sha256::digest(&secret).into(),
            bound: Bound { source: source.into(), container: container(namespace, id) },
            expires: now + valid,
            state: State::Good,
        };
        all.insert(number.clone(), entry);
        Ok(Issued { text: format!("{node}:{number}:{secret}"), id: number })
    }

    /// Takes a ticket for a move that is being prepared. `from`: the node that shows it, by its certificate; `node`: this one.
    ///
    /// # Errors
    /// Why not, and of which ticket the log may speak: its number and what it is for, if it is one of ours.
    pub fn redeem(
        &self,
        text: &str,
        node: &str,
        from: &str,
        namespace: &str,
        id: &str,
        now: Instant,
    ) -> Result<Held, (Refused, String)> {
        let Some((named, number, secret)) = parts(text) else {
            return Err((Refused::Malformed, "no ticket".into()));
        };
        if named != node {
            return Err((Refused::OtherDestination, format!("ticket {number}, made for {named:?}")));
        }
        let unknown = || (Refused::Unknown, format!("ticket {number}"));
        let mut all = self.lock();
        let entry = all.get_mut(number).ok_or_else(unknown)?;
        if !same_secret(&Sha256::digest(secret), &entry.digest) {
            return Err(unknown());
        }
        let refused = if entry.bound.source != from {
            Refused::OtherSource
        } else if entry.bound.container != container(namespace, id) {
            Refused::OtherContainer
        } else if entry.state == State::Used {
            Refused::Used
        } else if entry.state == State::Withdrawn {
            Refused::Withdrawn
        } else if entry.expires <= now {
            Refused::Expired
        } else if entry.state == State::InUse {
            Refused::InUse
        } else {
            entry.state = State::InUse;
            return Ok(Held { tickets: self.clone(), number: number.into() });
        };
        Err((refused, format!("ticket {number} for {} from {}", entry.bound.container, entry.bound.source)))
    }
}

impl Entry {
    fn known(&self, id: &str, now: Instant) -> Known {
        Known {
            id: id.into(),
            from: self.bound.source.clone(),
            container: self.bound.container.clone(),
            left: self.expires.saturating_duration_since(now),
            state: self.state,
        }
    }
}

impl Tickets {
    /// All that are known, those that expire first at the front.
    pub fn list(&self, now: Instant) -> Vec<Known> {
        let all = self.lock();
        let mut known: Vec<_> = all.iter().map(|(id, entry)| entry.known(id, now)).collect();
        known.sort_by(|a, b| (a.left, &a.id).cmp(&(b.left, &b.id)));
        known
    }

    /// Takes one back: it is good for nothing more. The answer is how it was. A move that is being prepared with it goes on; if it comes
    /// to nothing, the ticket is not good again.
    ///
    /// # Errors
    /// There is none with this number, or it was used: taking it back would undo nothing.
    pub fn withdraw(&self, id: &str, now: Instant) -> Result<Known> {
        let mut all = self.lock();
        let Some(entry) = all.get_mut(id) else { bail!("no ticket {id} is known here") };
        ensure!(
            entry.state != State::Used,
            "the ticket {id} for {} from {} was used already",
            entry.bound.container,
            entry.bound.source
        );
        let before = entry.known(id, now);
        entry.state = State::Withdrawn;
        Ok(before)
    }
}

/// A ticket that a move is being prepared with. Dropped before anything was made, it is good again.
#[derive(Debug)]
pub struct Held {
    tickets: Tickets,
    number: String,
}

impl Held {
    /// Something is being made with it: it is good for nothing more.
    pub fn use_up(self) {
        self.set(State::Used);
    }

    fn set(&self, state: State) {
        if let Some(entry) = self.tickets.lock().get_mut(&self.number)
            && entry.state == State::InUse
        {
            entry.state = state;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set(State::Good);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEN: Duration = Duration::from_secs(600);

    fn ours(tickets: &Tickets, now: Instant) -> Issued {
        tickets.issue("node-b", "node-a", "default", "redis", TEN, now).unwrap()
    }

    #[test]
    fn it_is_good_for_its_node_its_container_its_time_and_once() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let ticket = ours(&tickets, now);
        assert_eq!(destination_of(&ticket.text), Some("node-b"));
        let show = |text: &str, here: &str, from: &str, id: &str, at: Instant| {
            tickets.redeem(text, here, from, "default", id, at).map_err(|(why, _)| why)
        };
        let text = ticket.text.as_str();
        let why = |result: Result<Held, Refused>| result.map(drop).unwrap_err();
        assert_eq!(why(show(text, "node-b", "node-m", "redis", now)), Refused::OtherSource);
        assert_eq!(why(show(text, "node-c", "node-a", "redis", now)), Refused::OtherDestination);
        assert_eq!(why(show(text, "node-b", "node-a", "other", now)), Refused::OtherContainer);
        assert_eq!(why(show(text, "node-b", "node-a", "redis", now + TEN)), Refused::Expired);
        let (_, said) = tickets.redeem(text, "node-b", "node-m", "default", "redis", now).unwrap_err();
        assert_eq!(said, format!("ticket {} for default/redis from node-a", ticket.id));
        // another namespace is another container
        let elsewhere = tickets.redeem(text, "node-b", "node-a", "k8s.io", "redis", now);
        assert_eq!(elsewhere.unwrap_err().0, Refused::OtherContainer);
        // none of that has used it up
        let held = show(text, "node-b", "node-a", "redis", now).unwrap();
        assert_eq!(why(show(text, "node-b", "node-a", "redis", now)), Refused::InUse);
        drop(held);
        show(text, "node-b", "node-a", "redis", now).unwrap().use_up();
        assert_eq!(why(show(text, "node-b", "node-a", "redis", now)), Refused::Used);
        // a used one stays known as such beyond its time
        assert_eq!(why(show(text, "node-b", "node-a", "redis", now + TEN)), Refused::Used);
    }

    #[test]
    fn what_nobody_gave_out_is_refused() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let ticket = ours(&tickets, now);
        let show = |text: &str| tickets.redeem(text, "node-b", "node-a", "default", "redis", now);
        let wrong = format!("{}{}", &ticket.text[..ticket.text.len() - 64], "0".repeat(64));
        assert_eq!(show(&wrong).unwrap_err().0, Refused::Unknown, "the right number, another secret");
        let other = format!("node-b:{}:{}", "0".repeat(16), "0".repeat(64));
        assert_eq!(show(&other).unwrap_err().0, Refused::Unknown);
        for text in ["", ":", "::", "node-b:x:y", "node-b", &ticket.text[..ticket.text.len() - 1]] {
            assert_eq!(show(text).unwrap_err().0, Refused::Malformed, "{text}");
        }
        show(&ticket.text).unwrap();
        // of an agent that was started anew
        let after = Tickets::default();
        let again = after.redeem(&ticket.text, "node-b", "node-a", "default", "redis", now);
        assert_eq!(again.unwrap_err().0, Refused::Unknown);
    }

    #[test]
    fn one_that_is_taken_back_lets_nobody_in() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let (first, second) = (ours(&tickets, now), ours(&tickets, now));
        let show =
            |ticket: &Issued| tickets.redeem(&ticket.text, "node-b", "node-a", "default", "redis", now);
        assert_eq!(number_in(&first.text), first.id);
        assert_eq!(number_in(&first.id), first.id);
        let before = tickets.withdraw(&first.id, now).unwrap();
        let known = |ticket: &Issued, state| Known {
            id: ticket.id.clone(),
            from: "node-a".into(),
            container: "default/redis".into(),
            left: TEN,
            state,
        };
        assert_eq!(before, known(&first, State::Good));
        assert_eq!(show(&first).unwrap_err().0, Refused::Withdrawn);
        // twice is once
        assert_eq!(tickets.withdraw(&first.id, now).unwrap().state, State::Withdrawn);
        // the other one is as it was
        let held = show(&second).unwrap();
        assert_eq!(tickets.withdraw(&second.id, now).unwrap().state, State::InUse);
        drop(held);
        assert_eq!(show(&second).unwrap_err().0, Refused::Withdrawn, "not good again");
        let third = ours(&tickets, now);
        show(&third).unwrap().use_up();
        assert!(tickets.withdraw(&third.id, now).unwrap_err().to_string().contains("used already"));
        assert!(tickets.withdraw("0", now).unwrap_err().to_string().contains("no ticket 0"));
        let mut expected =
            [known(&first, State::Withdrawn), known(&second, State::Withdrawn), known(&third, State::Used)];
        expected.sort_by(|a, b| a.id.cmp(&b.id));
        assert_eq!(tickets.list(now), expected);
        assert!(tickets.list(now + TEN * 2).iter().all(|k| k.left.is_zero()));
        assert!(!format!("{:?}", tickets.list(now)).contains(&first.text[24..]));
    }

    #[test]
    fn one_that_is_taken_back_while_a_move_is_made_with_it_was_used_for_it() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let ticket = ours(&tickets, now);
        let held = tickets.redeem(&ticket.text, "node-b", "node-a", "default", "redis", now).unwrap();
        tickets.withdraw(&ticket.id, now).unwrap();
        held.use_up();
        let again = tickets.redeem(&ticket.text, "node-b", "node-a", "default", "redis", now);
        assert_eq!(again.unwrap_err().0, Refused::Withdrawn);
    }

    #[test]
    fn there_are_only_so_many_and_the_old_are_forgotten() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let first = ours(&tickets, now);
        for _ in 1..MOST {
            ours(&tickets, now);
        }
        assert!(tickets.issue("node-b", "node-a", "n", "c", TEN, now).is_err());
        // taken back, they make room
        tickets.withdraw(&tickets.list(now)[0].id, now).unwrap();
        tickets.issue("node-b", "node-a", "n", "c", TEN, now).unwrap();
        assert_eq!(tickets.lock().len(), MOST);
        ours(&tickets, now + TEN);
        assert_eq!(tickets.lock().len(), 1);
        let gone = tickets.redeem(&first.text, "node-b", "node-a", "default", "redis", now);
        assert_eq!(gone.unwrap_err().0, Refused::Unknown);
        assert!(tickets.issue("node-b", "node-a", "n", "c", LONGEST * 2, now).is_err());
        assert!(tickets.issue("node-b", "node-a", "n", "c", Duration::ZERO, now).is_err());
        assert!(!format!("{first:?} {tickets:?}").contains(&first.text[24..]));
    }
}
