//! `transship ps`: the containers that run under transship on this node.

use clap::Args;
use serde_json::json;

use super::output::Answer;
use super::progress::Progress;
use super::table::{Align, render};
use super::{Common, unexpected};
use crate::agent::api::{ErrorReport, PsEntry, PsRequest, Reply, Request};

/// List the containers that run under transship.
#[derive(Args, Debug, Clone)]
pub struct Ps {
    /// Only this namespace of containerd's [default: all]
    #[arg(short, long, value_name = "NS")]
    pub namespace: Option<String>,
}

impl Ps {
    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        let request = Request::Ps(PsRequest { namespace: self.namespace.clone().unwrap_or_default() });
        match common.call(&request, &mut Progress::new(true))? {
            Reply::Ps { containers } => {
                let text = list(&containers);
                Ok(Answer::new(json!({ "containers": containers }), text))
            }
            other => Err(unexpected(&other)),
        }
    }
}

fn list(containers: &[PsEntry]) -> String {
    let columns = ["NAMESPACE", "CONTAINER", "STATE", "PID", "FROM", "IMAGE", "DETAIL"];
    let align = |c| if c == "PID" { Align::Right } else { Align::Left };
    let rows: Vec<_> = containers
        .iter()
        .map(|c| {
            let pid = if c.pid == 0 { "-".into() } else { c.pid.to_string() };
            let from = if c.from.is_empty() { "-".into() } else { c.from.clone() };
            vec![
                c.namespace.clone(),
                c.container.clone(),
                c.state.clone(),
                pid,
                from,
                c.image.clone(),
                c.detail.clone(),
            ]
        })
        .collect();
    render(&columns.map(|c| (c, align(c))), &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_on_fixed_input() {
        let entry = PsEntry {
            namespace: "default".into(),
            container: "redis".into(),
            image: "docker.io/library/redis:7".into(),
            state: "undecided".into(),
            detail: "frozen; node-b does not answer: transship resolve".into(),
            ..PsEntry::default()
        };
        let text = list(&[entry, PsEntry { pid: 4711, from: "node-a".into(), ..PsEntry::default() }]);
        let mut lines = text.lines();
        assert_eq!(
            lines.next().unwrap(),
            "NAMESPACE  CONTAINER  STATE       PID  FROM    IMAGE                      DETAIL"
        );
        assert_eq!(
            lines.next().unwrap(),
            "default    redis      undecided     -  -       docker.io/library/redis:7  frozen; node-b does not answer: transship resolve"
        );
        assert_eq!(lines.next().unwrap(), "                                 4711  node-a");
    }
}
