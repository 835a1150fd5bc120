//! `transship ticket`: on the node that a container is to be moved to, its operator allows it, once.

use clap::Args;
use serde_json::json;

use super::output::Answer;
use super::progress::Progress;
use super::table::{Align, render};
use super::{Common, Namespace, unexpected};
use crate::agent::api::{ErrorReport, Reply, Request, TicketEntry, TicketRequest};
use crate::agent::tickets::number_in;
use crate::migrate::quantity;

/// Allow another node to move one container to this node, once.
///
/// Needed for nodes that accept_from in this node's agent.toml does not list. The ticket is good for one move of this container from
/// that node to this one, and for a limited time; a restart of this node's agent makes it void. Give it to
/// `transship migrate --ticket` on the other node. --list shows what was given out, without the secrets; --withdraw takes one back.
#[derive(Args, Debug, Clone)]
pub struct Ticket {
    /// The container's id
    #[arg(required_unless_present_any = ["list", "withdraw"], conflicts_with_all = ["list", "withdraw"])]
    pub container: Option<String>,
    /// The node on which it is, by the name in its certificate
    #[arg(long, value_name = "NODE", required_unless_present_any = ["list", "withdraw"], conflicts_with_all = ["list", "withdraw"])]
    pub from: Option<String>,
    /// List the tickets of this node's agent
    #[arg(long, conflicts_with = "withdraw")]
    pub list: bool,
    /// Take a ticket back, by its number or its text: whoever shows it is refused
    #[arg(long, value_name = "NUMBER")]
    pub withdraw: Option<String>,
    /// For how long it is good, like 90s or 10m; at most a day (1440m)
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = valid)]
    pub valid: u64,
    /// Where containerd keeps it.
    #[command(flatten)]
    pub namespace: Namespace,
}

/// Whole seconds.
fn valid(text: &str) -> Result<u64, String> {
    Ok(quantity::duration_ms(text)?.div_ceil(1000))
}

impl Ticket {
    fn request(&self) -> Request {
        if self.list {
            return Request::Tickets;
        }
        if let Some(ticket) = &self.withdraw {
            // the secret stays here
            return Request::WithdrawTicket { id: number_in(ticket).into() };
        }
        Request::Ticket(TicketRequest {
            namespace: self.namespace.or_default(),
            container: self.container.clone().unwrap_or_default(),
            from: self.from.clone().unwrap_or_default(),
            valid_seconds: self.valid,
        })
    }

    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        let request = self.request();
        match common.call(&request, &mut Progress::new(common.json))? {
            Reply::Ticket(ticket) => {
                // alone on stdout, to be taken by a script; what to do with it is said beside it
                let text = ticket.ticket.clone();
                if !common.json {
                    eprintln!(
                        "on {}, within {} s: transship migrate {} -n {} --to {} --ticket ...",
                        ticket.from, ticket.valid_seconds, ticket.container, ticket.namespace, ticket.node
                    );
                }
                Ok(Answer::new(ticket, text))
            }
            Reply::Tickets { tickets } => {
                let text = table(&tickets);
                Ok(Answer::new(json!({ "tickets": tickets }), text))
            }
            Reply::TicketWithdrawn(ticket) => {
                let text = withdrawn(&ticket);
                Ok(Answer::new(ticket, text))
            }
            other => Err(unexpected(&other)),
        }
    }
}

/// What was done, and what that does not do. `before`: the ticket as it was.
fn withdrawn(before: &TicketEntry) -> String {
    let TicketEntry { id, from, container, state, .. } = before;
    let done = format!("the ticket {id} for {container} from {from} is withdrawn");
    match state.as_str() {
        "in use" => {
            format!("{done}; the move that is being prepared with it goes on, and it is good for no other")
        }
        "good" => done,
        state => format!("{done} (it was good for nothing before: {state})"),
    }
}

fn table(tickets: &[TicketEntry]) -> String {
    let columns = ["NUMBER", "CONTAINER", "FROM", "STATE", "SECONDS LEFT"];
    let align = |c| if c == "SECONDS LEFT" { Align::Right } else { Align::Left };
    let row = |t: &TicketEntry| {
        vec![t.id.clone(), t.container.clone(), t.from.clone(), t.state.clone(), t.seconds_left.to_string()]
    };
    let rows: Vec<_> = tickets.iter().map(row).collect();
    render(&columns.map(|c| (c, align(c))), &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_tickets() {
        let ticket = |state: &str| TicketEntry {
            id: "0f3c".into(),
            from: "node-a".into(),
            container: "default/redis".into(),
            seconds_left: 7,
            state: state.into(),
        };
        let text = table(&[ticket("good"), ticket("withdrawn")]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "NUMBER  CONTAINER      FROM    STATE      SECONDS LEFT");
        assert_eq!(lines[1], "0f3c    default/redis  node-a  good                  7");
        assert_eq!(withdrawn(&ticket("good")), "the ticket 0f3c for default/redis from node-a is withdrawn");
        assert!(withdrawn(&ticket("in use")).contains("goes on"));
        assert!(withdrawn(&ticket("expired")).ends_with("(it was good for nothing before: expired)"));
    }

    #[test]
    fn times_are_whole_seconds() {
        for (text, seconds) in [("90s", 90), ("10m", 600), ("120m", 7200), ("1500ms", 2)] {
            assert_eq!(valid(text), Ok(seconds), "{text}");
        }
        for bad in ["", "10", "m", "x h", "-1m"] {
            assert!(valid(bad).is_err(), "{bad:?}");
        }
    }
}
