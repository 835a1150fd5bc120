//! `transship resolve`: the operator decides about a container that is frozen because the answer was lost after the commit.

use clap::Args;
use serde_json::json;

use super::output::Answer;
use super::progress::Progress;
use super::{Common, Namespace, ask, unexpected};
use crate::agent::api::{Decision, ErrorReport, ExitCode, Reply, Request, ResolveRequest};

/// Decide a migration whose outcome this node could not learn.
///
/// The container is frozen here and may run on the other node: look there first (`transship ps` on that node). A wrong decision
/// leaves two copies running, or none.
#[derive(Args, Debug, Clone)]
#[command(group = clap::ArgGroup::new("decision").required(true).args(["run_here", "moved"]))]
pub struct Resolve {
    /// The container's id
    pub container: String,
    /// It does not run on the other node: let it run on here
    #[arg(long)]
    pub run_here: bool,
    /// It runs on the other node: delete it here
    #[arg(long)]
    pub moved: bool,
    /// Where containerd keeps it.
    #[command(flatten)]
    pub namespace: Namespace,
    /// Do not ask (needed when this is not a terminal)
    #[arg(short, long)]
    pub yes: bool,
}

impl Resolve {
    /// Runs it.
    pub fn run(&self, common: &Common) -> Result<Answer, ErrorReport> {
        let (decision, consequence) = match self.run_here {
            true => {
                (Decision::RunHere, "runs on here; if it runs on the other node too, there are two of it")
            }
            false => (Decision::Moved, "is deleted here; if it does not run on the other node, it is lost"),
        };
        if !self.yes {
            if common.json || !ask::possible() {
                return Err(ErrorReport::new(ExitCode::Usage, "this decision cannot be taken back")
                    .advice("look at the other node (transship ps), then add --yes"));
            }
            if !ask::yes(&format!("{} {consequence}. Go on?", self.container)) {
                return Err(ErrorReport::new(ExitCode::Usage, "nothing was decided"));
            }
        }
        let request = Request::Resolve(ResolveRequest {
            namespace: self.namespace.or_default(),
            container: self.container.clone(),
            decision,
        });
        match common.call(&request, &mut Progress::new(common.json))? {
            Reply::Resolved { message } => Ok(Answer::new(json!({ "message": message }), message)),
            other => Err(unexpected(&other)),
        }
    }
}
