//! Connections to the port that have not shown a certificate yet: how many there may be, and who makes room for whom.
//!
//! A stranger may be idle for as long as its deadline lets it, so whoever opens enough connections could keep all places
//! taken. Two rules prevent that. Nobody waits for a place: a newcomer always gets one, and the oldest stranger of the
//! address that holds the most goes for it. An honest peer needs its place for milliseconds, an idle one loses it to its own
//! like. And one address has a share only ([`Limits::per_address`]), so that it makes room among its own and not among others'. IPv6
//! addresses count by their /64, which is what one customer gets.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

/// How many strangers there may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// In all.
    pub most: usize,
    /// Of one address.
    pub per_address: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        // twenty moves at once in both directions are eighty connections, each a stranger for some milliseconds
        Limits { most: 256, per_address: 64 }
    }
}

/// All strangers.
#[derive(Clone, Debug)]
pub struct Strangers(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    limits: Limits,
    next: u64,
    /// By age, the oldest first.
    all: BTreeMap<u64, (IpAddr, oneshot::Sender<()>)>,
}

impl Strangers {
    /// None yet.
    pub fn new(limits: Limits) -> Strangers {
        Strangers(Arc::new(Mutex::new(State { limits, next: 0, all: BTreeMap::new() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A newcomer takes a place. It has it until it is dropped, or until [`Stranger::evicted`].
    pub fn enter(&self, from: IpAddr) -> Stranger {
        let address = share_of(from);
        let mut state = self.state();
        while let Some(oldest) = state.to_go(address) {
            // whoever waits on the other end hears of it
            state.all.remove(&oldest);
        }
        let (to, evicted) = oneshot::channel();
        let number = state.next;
        state.next += 1;
        state.all.insert(number, (address, to));
        Stranger { strangers: self.clone(), number, evicted }
    }

    /// How many there are now.
    pub fn count(&self) -> usize {
        self.state().all.len()
    }
}

impl State {
    /// Who has to go before one of this address may come.
    fn to_go(&self, address: IpAddr) -> Option<u64> {
        let oldest_of = |a: IpAddr| self.all.iter().find(|(_, (of, _))| *of == a).map(|(n, _)| *n);
        let mut held: HashMap<IpAddr, usize> = HashMap::new();
        for (of, _) in self.all.values() {
            *held.entry(*of).or_default() += 1;
        }
        if held.get(&address).is_some_and(|n| *n >= self.limits.per_address) {
            return oldest_of(address);
        }
        if self.all.len() < self.limits.most {
            return None;
        }
        let largest = held.values().copied().max()?;
        // among addresses that hold as many, the one with the oldest stranger
        self.all.iter().find(|(_, (of, _))| held.get(of) == Some(&largest)).map(|(n, _)| *n)
    }
}

/// Whose share a connection counts to.
fn share_of(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

/// A stranger's place.
#[derive(Debug)]
pub struct Stranger {
    strangers: Strangers,
    number: u64,
    evicted: oneshot::Receiver<()>,
}

impl Stranger {
    /// Ends when it has to make room for another.
    pub async fn evicted(&mut self) {
        let _ = (&mut self.evicted).await;
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.strangers.state().all.remove(&self.number);
    }
}

/// How often something that strangers cause may be said in the log: their lines must not fill a disk either.
#[derive(Debug)]
pub struct Throttle {
    most: u32,
    every: Duration,
    since: Instant,
    said: u32,
    unsaid: u64,
}

impl Throttle {
    /// So many in each period.
    pub fn new(most: u32, every: Duration, now: Instant) -> Throttle {
        Throttle { most, every, since: now, said: 0, unsaid: 0 }
    }

    /// Whether it may be said now, and how many times it could not be since it last was.
    pub fn may(&mut self, now: Instant) -> Option<u64> {
        if now.duration_since(self.since) >= self.every {
            (self.since, self.said) = (now, 0);
        }
        if self.said >= self.most {
            self.unsaid += 1;
            return None;
        }
        self.said += 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Whether it has lost its place.
    fn gone(stranger: &mut Stranger) -> bool {
        !matches!(stranger.evicted.try_recv(), Err(oneshot::error::TryRecvError::Empty))
    }

    #[test]
    fn one_address_makes_room_among_its_own() {
        let strangers = Strangers::new(Limits { most: 10, per_address: 3 });
        let mut honest = strangers.enter(ip("10.0.0.1"));
        let mut idle: Vec<_> = (0..20).map(|_| strangers.enter(ip("10.0.0.66"))).collect();
        assert_eq!(strangers.count(), 4);
        assert!(!gone(&mut honest));
        let left: Vec<_> = idle.iter_mut().map(gone).collect();
        assert_eq!(left.iter().filter(|gone| !**gone).count(), 3);
        assert!(left[..17].iter().all(|gone| *gone), "the oldest went");
        drop((idle, honest));
        assert_eq!(strangers.count(), 0);
    }

    #[test]
    fn many_addresses_make_room_too_and_who_holds_most_goes_first() {
        let strangers = Strangers::new(Limits { most: 6, per_address: 3 });
        let mut first = strangers.enter(ip("10.0.0.1"));
        let mut greedy: Vec<_> = (0..3).map(|_| strangers.enter(ip("10.0.0.66"))).collect();
        let _others: Vec<_> = (2..4).map(|n| strangers.enter(ip(&format!("10.0.0.{n}")))).collect();
        let _fresh = strangers.enter(ip("10.0.0.9"));
        assert!(gone(&mut greedy[0]) && !gone(&mut greedy[1]) && !gone(&mut first));
        // the place of one that is gone is not given back twice
        drop(greedy.remove(0));
        assert_eq!(strangers.count(), 6);
        let _more: Vec<_> = (20..26).map(|n| strangers.enter(ip(&format!("10.0.1.{n}")))).collect();
        assert_eq!(strangers.count(), 6);
        assert!(gone(&mut first), "with one each, the oldest goes");
    }

    #[test]
    fn a_share_is_a_customers() {
        assert_eq!(share_of(ip("fd00::1:2:3:4")), share_of(ip("fd00::ffff")));
        assert_ne!(share_of(ip("fd00:0:0:1::1")), share_of(ip("fd00::1")));
        assert_eq!(share_of(ip("::ffff:10.0.0.1")), ip("10.0.0.1"));
    }

    #[test]
    fn what_is_not_said_is_counted() {
        let start = Instant::now();
        let mut throttle = Throttle::new(2, Duration::from_secs(10), start);
        let said: Vec<_> = (0..5).map(|_| throttle.may(start)).collect();
        assert_eq!(said, [Some(0), Some(0), None, None, None]);
        assert_eq!(throttle.may(start + Duration::from_secs(10)), Some(3));
        assert_eq!(throttle.may(start + Duration::from_secs(11)), Some(0));
    }
}
