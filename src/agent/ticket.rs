//! `transship ticket`: this node's operator allows one move to it.

use std::time::{Duration, Instant};

use super::{
    Agent,
    api::{ErrorReport, ExitCode, Reply, TicketReport, TicketRequest},
    placement::plain,
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
