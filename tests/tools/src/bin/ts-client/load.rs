//! INCR and GET by turns, one request at a time, every reply checked.
//!
//! A reply is *wrong* when INCR does not give exactly one more than before, or GET not what the last INCR gave. *Lost* are the
//! increments that were acknowledged and are no longer there, and a request whose reply never came. A *gap* is the time
//! between two replies: what an interruption looks like from here, the pause between two requests included.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use transship_testtools::{latency::Latency, signals, time};

use crate::connection::{Connection, Reply, command};
use crate::journal::Journal;

/// Requests are those "after" the longest gap for so long.
const AFTER: Duration = Duration::from_secs(5);

pub struct Options {
    pub key: String,
    pub interval: Duration,
    pub seconds: Option<f64>,
    pub gap: Duration,
}

#[derive(Default)]
pub struct Found {
    pub replies: u64,
    pub lost: u64,
    pub wrong: u64,
    pub counter: i64,
    pub longest: Duration,
    pub gaps: Vec<Value>,
    /// How long replies took: all of them; those asked for in the 5 s after the longest gap; those before it.
    pub all: Latency,
    pub after: Latency,
    pub before: Option<Value>,
    pub error: Option<String>,
}

impl Found {
    /// Checks one reply; `incr`: it answers an INCR.
    fn check(&mut self, incr: bool, reply: &Reply) {
        let value = match reply {
            Reply::Integer(n) if incr => Some(*n),
            Reply::Bulk(Some(b)) if !incr => std::str::from_utf8(b).ok().and_then(|s| s.parse().ok()),
            _ => None,
        };
        let expected = self.counter + i64::from(incr);
        match value {
            Some(n) if n == expected => {}
            // the server is behind: acknowledged increments are gone
            Some(n) if n < expected => {
                self.wrong += 1;
                self.lost += (expected - n) as u64;
            }
            _ => self.wrong += 1,
        }
        if let Some(n) = value {
            self.counter = n;
        }
        self.replies += 1;
    }
}

pub fn run(connection: &mut Connection, options: &Options, journal: &mut Journal) -> Found {
    let mut found = Found::default();
    let key = options.key.as_bytes();
    let requests = [command(&[b"INCR", key]), command(&[b"GET", key])];
    let start = Instant::now();
    let mut exchange = |found: &mut Found, incr: bool| -> Result<Instant, String> {
        let sent = Instant::now();
        let reply = connection.send(&requests[usize::from(!incr)]).and_then(|()| connection.reply());
        match reply {
            Ok(reply) if found.replies == 0 => {
                // whatever the counter stood at before us
                if let Reply::Integer(n) = reply {
                    found.counter = n - 1;
                }
                found.check(incr, &reply);
            }
            Ok(reply) => found.check(incr, &reply),
            Err(e) => {
                found.lost += 1;
                return Err(e.to_string());
            }
        }
        Ok(sent)
    };
    let (mut last, mut tick, mut longest_end) = (None::<Instant>, Instant::now(), start);
    for n in 0u64.. {
        if signals::stops() > 0 || options.seconds.is_some_and(|s| start.elapsed().as_secs_f64() >= s) {
            break;
        }
        let sent = match exchange(&mut found, n % 2 == 0) {
            Ok(sent) => sent,
            Err(e) => {
                found.error = Some(e);
                break;
            }
        };
        let now = Instant::now();
        if n == 0 {
            journal.event(json!({"event": "running"}));
        }
        let gap = now - last.unwrap_or(now);
        if gap > found.longest {
            (found.longest, longest_end) = (gap, now);
            found.after.clear();
            found.before = Some(found.all.json());
        } else if sent < longest_end + AFTER {
            found.after.add(now - sent);
        }
        found.all.add(now - sent);
        if gap > options.gap {
            let entry = json!({
                "at_s": (start.elapsed() - gap).as_secs_f64(), "realtime_end": time::realtime(),
                "ms": time::ms(gap), "wait_ms": time::ms(now - sent),
            });
            let mut event = entry.clone();
            event["event"] = json!("gap");
            journal.event(event);
            found.gaps.push(entry);
        }
        if tick.elapsed() >= Duration::from_secs(1) {
            tick = now;
            journal.event(
                json!({"event": "tick", "replies": found.replies, "lost": found.lost, "wrong": found.wrong}),
            );
        }
        last = Some(now);
        if let Some(rest) = options.interval.checked_sub(sent.elapsed()) {
            signals::pause(rest);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_judged() {
        let mut found = Found { counter: 5, ..Found::default() };
        found.check(true, &Reply::Integer(6));
        found.check(false, &Reply::Bulk(Some(b"6".to_vec())));
        assert_eq!((found.replies, found.lost, found.wrong), (2, 0, 0));
        found.check(true, &Reply::Integer(8));
        assert_eq!((found.lost, found.wrong), (0, 1));
        found.check(true, &Reply::Integer(4));
        assert_eq!((found.lost, found.wrong, found.counter), (5, 2, 4));
        found.check(false, &Reply::Bulk(None));
        assert_eq!((found.replies, found.lost, found.wrong), (5, 5, 3));
    }
}
