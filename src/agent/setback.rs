//! A migration that did not go as it should, on its source: what went wrong where, what everything is in now, what to do. What can
//! still be found out from the other node is waited for.

use std::time::Duration;

use anyhow::Result;

use super::{
    Agent,
    api::{ErrorReport, ExitCode},
    departed::clean_up,
    examine::Subject,
    link::Link,
    message::{Message, Started},
    outcome::{Fate, Undecided},
    peer,
    reporter::Reporter,
};
use crate::migrate::{
    loss::{self, Loss},
    protocol::Failure,
    tuning::OnPostCopyFailure,
};

type Outcome<T> = Result<T, ErrorReport>;

/// The connection to the peer failed, or the trust in it.
pub(super) fn lost(peer: &str, error: &anyhow::Error) -> ErrorReport {
    match peer::trust_in(error) {
        Some(problem) => ErrorReport::new(ExitCode::Untrusted, format!("{peer}: {problem}")),
        None => ErrorReport::new(ExitCode::Unreachable, format!("{peer}: {error:#}")),
    }
}

/// The destination failed before the commit.
pub(super) fn failed_there(failure: Failure, left: &[String], peer: &str) -> ErrorReport {
    let mut error = ErrorReport::new(code_of(&failure), failure.message).advice(failure.advice);
    error.node = if failure.node.is_empty() { peer.into() } else { failure.node };
    error.phase = failure.phase;
    if !left.is_empty() {
        error.state = format!("it runs here as before, but on {peer} this is left: {}", left.join("; "));
    }
    error
}

fn code_of(failure: &Failure) -> ExitCode {
    if failure.lost {
        return ExitCode::Unreachable;
    }
    match failure.phase.as_str() {
        phase if phase.contains("restore") => ExitCode::RestoreFailed,
        "freeze" | "final scan" | "dump" | "dump end" | "late pages" | "files" | "layer" | "sync" => {
            ExitCode::DumpFailed
        }
        // reached, but not let in
        "connect" => ExitCode::Refused,
        _ => ExitCode::Failed,
    }
}

/// The commit was sent and its answer lost: asks the destination until it is known what became of the container.
///
/// # Errors
/// It is this node's again, or the operator has decided.
pub(super) async fn follow_undecided(
    agent: &Agent,
    undecided: &Undecided,
    message: String,
    peer: &str,
    silence: Duration,
    reporter: &mut Reporter,
) -> Outcome<()> {
    let id = &undecided.record.id;
    let why = message.clone();
    let fate = match undecided.ask_soon(agent, silence).await {
        Some(fate) => fate,
        None => {
            // the operator hears of it now; the asking goes on
            let mut error = ErrorReport::new(ExitCode::Undecided, message);
            error.node.clone_from(&agent.node);
            let after = reporter.phase_name() == loss::PHASE;
            error.phase = if after { loss::PHASE.into() } else { "commit".into() };
            error.state =
                format!("{id} is frozen on {} until it is known whether it runs on {peer}", agent.node);
            error.advice = format!(
                "the agent goes on asking {peer}; or look there whether it runs, then `transship resolve {id} --moved` or `--run-here`"
            );
            reporter.end(Err(error));
            undecided.pursue(agent).await
        }
    };
    match fate {
        Fate::Runs => Ok(()),
        Fate::Aborted => {
            let message = format!("{peer} gave up after the commit, before anything of {id} ran there");
            let mut error = ErrorReport::new(ExitCode::RestoreFailed, message);
            error.node = peer.into();
            error.phase = "commit".into();
            error.state = format!("{id} runs on {} as before; nothing was left on {peer}", agent.node);
            Err(error)
        }
        Fate::Lost | Fate::GivenBack => {
            let message =
                format!("memory of {id} that had not reached {peer} was lost after the commit: {why}");
            let choice = if fate == Fate::Lost { OnPostCopyFailure::Kill } else { OnPostCopyFailure::Thaw };
            let advice = Loss { choice, ..Loss::default() }.advice().into();
            let failure = Failure { message, advice, ..Failure::default() };
            let mut error = lost_after(failure, choice, agent, peer, id);
            if fate == Fate::Lost {
                // that node answered: what can be started anew is there, as after any move
                let notes = clean_up(&undecided.containerd, &undecided.record, true, false).await;
                for note in notes {
                    log::warn!("{id}: {note}");
                }
                error.state =
                    format!("{id} is lost: killed on both nodes; its record and its files are on {peer}");
            }
            Err(error)
        }
        Fate::Unknown => {
            Err(ErrorReport::new(ExitCode::Failed, format!("{id} was resolved by the operator"))
                .state("as the operator decided"))
        }
    }
}

/// Memory was lost after the container ran on the destination, and what was chosen for that was done.
pub(super) fn lost_after(
    failure: Failure,
    choice: OnPostCopyFailure,
    agent: &Agent,
    peer: &str,
    id: &str,
) -> ErrorReport {
    let mut error = ErrorReport::new(ExitCode::Lost, failure.message).advice(failure.advice);
    error.node = if failure.node.is_empty() { agent.node.clone() } else { failure.node };
    error.phase = loss::PHASE.into();
    error.state = match choice {
        OnPostCopyFailure::Kill => {
            format!("{id} is lost: its copy on {} was killed, and {peer} cannot go on without it", agent.node)
        }
        OnPostCopyFailure::Thaw => {
            format!("{id} runs on {} from the moment of its freeze; it was killed on {peer}", agent.node)
        }
    };
    error
}

/// The source's shim died in the post-copy, and the frozen copy with it. `fate`: what the destination said of it, if it did.
pub(super) fn shim_died(agent: &Agent, peer: &str, id: &str, fate: Option<Fate>) -> ErrorReport {
    let message = format!(
        "memory of {id} that had not reached {peer} was lost after the commit: its shim on {} died",
        agent.node
    );
    let advice = Loss::default().advice();
    let mut error = ErrorReport::new(ExitCode::Lost, message).advice(advice);
    error.node.clone_from(&agent.node);
    error.phase = loss::PHASE.into();
    error.state = match fate {
        Some(_) => format!("{id} is lost: its frozen copy died with the shim, and {peer} has killed it"),
        None => format!(
            "{id}'s frozen copy died with the shim; {peer} does not answer, and kills it when it notices"
        ),
    };
    error
}

/// The source's shim died before its agent heard of an end: what the destination says, to which the rest was left. `Err`: it gave
/// up, or (None) does not answer.
pub(super) async fn hear_of_end(
    agent: &Agent,
    link: &mut Link,
    undecided: &Undecided,
    limit: Duration,
) -> Result<Started, Option<(Failure, Vec<String>)>> {
    cancel(link, "the source's shim died").await;
    while !link.is_over() {
        match tokio::time::timeout(limit * 2, link.hear()).await {
            Ok(Ok(Message::Started(started))) => return Ok(started),
            Ok(Ok(Message::Failed { failure, left })) => return Err(Some((failure, left))),
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => break,
        }
    }
    match undecided.hear_of_end(agent, limit * 2).await {
        Some(Fate::Runs) => Ok(Started::default()),
        Some(Fate::Aborted) => Err(Some((Failure::default(), Vec::new()))),
        _ => Err(None),
    }
}

/// The source's shim died before the commit, and with it the container; `there`: how the destination ended its part, if it said so.
pub(super) fn shim_died_before(
    agent: &Agent,
    peer: &str,
    id: &str,
    there: Option<(Failure, Vec<String>)>,
) -> ErrorReport {
    let message = format!("the shim of {id} on {} died while it sent the container", agent.node);
    let mut error = ErrorReport::new(ExitCode::Failed, message);
    error.node.clone_from(&agent.node);
    let (other, advice) = match &there {
        Some((_, left)) if left.is_empty() => (format!("nothing was left on {peer}"), "start it anew here"),
        Some((_, left)) => (format!("left on {peer}: {}", left.join("; ")), "start it anew here"),
        None => (
            format!("{peer} does not say what became of it"),
            "look on both nodes by `transship ps` before you start it anew anywhere",
        ),
    };
    error.state = format!(
        "{id} has ended on {} with its shim, as containers do; its record and files are there; {other}",
        agent.node
    );
    error.advice = advice.into();
    error
}

/// The shim gave up before the commit; waits for the destination to have undone its part, to be able to say so.
pub(super) async fn failed_here(
    link: &mut Link,
    failure: Failure,
    state: &str,
    there: Option<Result<(Failure, Vec<String>)>>,
    agent: &Agent,
    peer: &str,
    subject: &Subject,
) -> ErrorReport {
    // lost first: that is why this node's shim was asked to give up, or what it met itself
    let lost_first = there.as_ref().and_then(|heard| heard.as_ref().err()).map(|gone| lost(peer, gone));
    let there = match there {
        Some(heard) => heard,
        None => {
            cancel(link, &failure.message).await;
            loop {
                match link.hear().await {
                    Ok(Message::Failed { failure, left }) => break Ok((failure, left)),
                    Ok(_) => {}
                    Err(error) => break Err(error),
                }
            }
        }
    };
    // what the other side met itself says more than that the connection to it broke
    let failure = match &there {
        Ok((theirs, _)) if failure.lost && !theirs.lost && theirs.node != agent.node => Failure {
            node: if theirs.node.is_empty() { peer.into() } else { theirs.node.clone() },
            ..theirs.clone()
        },
        _ => failure,
    };
    let mut error = lost_first
        .unwrap_or_else(|| ErrorReport::new(code_of(&failure), &failure.message).advice(&failure.advice));
    error.phase = failure.phase;
    error.node = failure.node;
    let id = &subject.record.id;
    let here = match state {
        "running" => format!("{id} runs on {} as before", agent.node),
        other => format!("{id} is {other} on {}", agent.node),
    };
    let other = match there {
        Ok((_, left)) if left.is_empty() => format!("nothing was left on {peer}"),
        Ok((_, left)) => format!("left on {peer}: {}", left.join("; ")),
        Err(_) => format!("{peer} does not answer, and undoes its part by itself"),
    };
    error.state = format!("{here}; {other}");
    error
}

/// Tells the destination that it is given up; it may be gone already.
pub(super) async fn cancel(link: &Link, reason: &str) {
    let _ = link.say(Message::Cancel { reason: reason.into() }).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phase_decides_the_exit_status() {
        let code = |phase: &str, lost| code_of(&Failure { phase: phase.into(), lost, ..Failure::default() });
        assert_eq!(code("criu restore", false), ExitCode::RestoreFailed);
        assert_eq!(code("dump", false), ExitCode::DumpFailed);
        assert_eq!(code("late pages", false), ExitCode::DumpFailed);
        assert_eq!(code("round 7", false), ExitCode::Failed);
        assert_eq!(code("connect", false), ExitCode::Refused);
        assert_eq!(
            code("dump", true),
            ExitCode::Unreachable,
            "the connection is the reason, whatever the phase"
        );
    }

    #[test]
    fn what_is_left_there_is_said() {
        let failure = Failure { phase: "plan".into(), message: "no room".into(), ..Failure::default() };
        let error = failed_there(failure.clone(), &["a lease".into()], "node-b");
        assert_eq!((error.node.as_str(), error.phase.as_str()), ("node-b", "plan"));
        assert!(error.state.contains("a lease"));
        assert_eq!(failed_there(failure, &[], "node-b").state, "", "who knows the whole state says it");
    }
}
