//! `transship ticket`: on the node that a container is to be moved to, its operator allows it, once.

use clap::Args;

use super::output::Answer;
use super::progress::Progress;
use super::{Common, Namespace, unexpected};
use crate::agent::api::{ErrorReport, Reply, Request, TicketRequest};
use crate::migrate::quantity;

/// Allow another node to move one container to this node, once.
///
/// Needed for nodes that accept_from in this node's agent.toml does not list. The ticket is good for one move of this container from
/// that node to this one, and for a limited time; a restart of this node's agent makes it void. Give it to
/// `transship migrate --ticket` on the other node.
#[derive(Args, Debug, Clone)]
pub struct Ticket {
    /// The container's id
    pub container: String,
    /// The node on which it is, by the name in its certificate
    #[arg(long, value_name = "NODE")]
    pub from: String,
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
    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        let request = Request::Ticket(TicketRequest {
            namespace: self.namespace.or_default(),
            container: self.container.clone(),
            from: self.from.clone(),
            valid_seconds: self.valid,
        });
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
            other => Err(unexpected(&other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
