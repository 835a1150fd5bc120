//! `transship ticket`: this node's operator allows one move to it, sees what was allowed, and takes it back.

use std::time::{Duration, Instant};

use super::{
    Agent,
    api::{ErrorReport, ExitCode, Reply, TicketEntry, TicketReport, TicketRequest},
    placement::plain,
    tickets::{Known, State},
};

/// Gives a ticket out.
pub fn issue(agent: &Agent, request: &TicketRequest) -> Result<Reply, ErrorReport> {
    let TicketRequest { namespace, container, from, valid_seconds } = request;
    if !plain(namespace) || !plain(container) {
        return Err(ErrorReport::new(
            ExitCode::Usage,
            format!("{namespace}/{container} is no name of a container"),
        ));
    }
    let node = agent.certified_name();
    if from.is_empty() || *from == node {
        return Err(ErrorReport::new(ExitCode::Usage, format!("--from {from:?} is not another node"))
            .advice("name the node on which the container is, as in its certificate (`transship version` there shows it)"));
    }
    let valid = Duration::from_secs(*valid_seconds);
    let issued = agent.tickets.issue(&node, from, namespace, container, valid, Instant::now());
    let issued = issued.map_err(|e| ErrorReport::new(ExitCode::Usage, format!("{e:#}")))?;
    log::info!(
        "ticket {} given out: {from} may move {namespace}/{container} here, once, within {valid_seconds} s",
        issued.id
    );
    Ok(Reply::Ticket(TicketReport {
        ticket: issued.text,
        id: issued.id,
        node,
        from: from.clone(),
        namespace: namespace.clone(),
        container: container.clone(),
        valid_seconds: *valid_seconds,
    }))
}

/// Those that were given out.
pub fn list(agent: &Agent) -> Reply {
    Reply::Tickets { tickets: agent.tickets.list(Instant::now()).into_iter().map(entry).collect() }
}

/// Takes one back.
pub fn withdraw(agent: &Agent, id: &str) -> Result<Reply, ErrorReport> {
    let before = agent.tickets.withdraw(id, Instant::now()).map_err(|e| {
        ErrorReport::new(ExitCode::Usage, format!("{e:#}"))
            .advice("`transship ticket --list` shows the tickets of this node; `accept_from` in agent.toml lets nodes in without any")
    })?;
    log::info!("ticket {id} for {} from {} is withdrawn", before.container, before.from);
    Ok(Reply::TicketWithdrawn(entry(before)))
}

fn entry(known: Known) -> TicketEntry {
    let state = match known.state {
        State::InUse => "in use",
        State::Used => "used",
        State::Withdrawn => "withdrawn",
        State::Good if known.left.is_zero() => "expired",
        State::Good => "good",
    };
    TicketEntry {
        id: known.id,
        from: known.from,
        container: known.container,
        seconds_left: known.left.as_secs(),
        state: state.into(),
    }
}
