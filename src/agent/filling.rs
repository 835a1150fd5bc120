//! A container that runs here while memory of it is still on the node it came from (post-copy). What becomes of it is kept as the
//! migration's outcome, for a source that lost the connection and asks: only when all memory is here may the frozen copy go.

use std::time::Duration;

use super::outcome::{self, Fate};
use crate::{
    control::{self, MigrationState},
    migrate::{loss::megabytes, tuning::OnPostCopyFailure},
};

/// Between two looks at the shim.
const LOOK: Duration = Duration::from_millis(250);
/// Looks without an answer of the shim after which there is nothing more to learn.
const SILENT: u32 = 40;

/// What a shim's state says of the memory of a migration that ran on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// So many bytes are still on the source.
    Left(u64),
    /// It is decided.
    Known(Fate),
    /// The shim speaks of another migration, or of none.
    Other,
}

fn standing(state: &MigrationState, migration: &str) -> Standing {
    match state {
        MigrationState::Filling { migration_id, left, .. } if migration_id == migration => {
            Standing::Left(*left)
        }
        MigrationState::Arrived { migration_id } if migration_id == migration => Standing::Known(Fate::Runs),
        MigrationState::Lost { migration_id, choice, .. } if migration_id == migration => {
            Standing::Known(match choice {
                OnPostCopyFailure::Kill => Fate::Lost,
                OnPostCopyFailure::Thaw => Fate::GivenBack,
            })
        }
        _ => Standing::Other,
    }
}

async fn look(namespace: &str, id: &str, migration: &str) -> Option<Standing> {
    let inspected = control::client::inspect(namespace, id).await.ok()?;
    Some(standing(&inspected.migration, migration))
}

/// It runs here since just now: keeps that if all of its memory is here, else follows it in the background. Returns how many
/// bytes are still on the source.
pub async fn begun(namespace: &str, id: &str, migration: &str, source: &str) -> u64 {
    match look(namespace, id, migration).await {
        Some(Standing::Left(left)) if left > 0 => {
            let following = follow(namespace.into(), id.into(), migration.into(), source.into());
            tokio::spawn(following);
            return left;
        }
        Some(Standing::Known(fate)) => outcome::keep(migration, source, fate),
        // what is not in its place yet is on this node: the source is not needed any more
        _ => outcome::keep(migration, source, Fate::Runs),
    }
    0
}

/// Follows the container until all of its memory is here or lost, and keeps which of the two.
pub async fn follow(namespace: String, id: String, migration: String, source: String) {
    let mut silent = 0;
    loop {
        match look(&namespace, &id, &migration).await {
            Some(Standing::Left(left)) => {
                silent = 0;
                log::debug!("{namespace}/{id}: {} still on {source}", megabytes(left));
            }
            Some(Standing::Known(fate)) => {
                match fate {
                    Fate::Runs => log::info!("{namespace}/{id}: all of its memory is here"),
                    _ => log::error!("{namespace}/{id}: memory was lost with {source}; it was killed here"),
                }
                return outcome::keep(&migration, &source, fate);
            }
            // nobody knows: nothing is kept, and a source that asks keeps its copy
            Some(Standing::Other) => return,
            None if silent >= SILENT => return,
            None => silent += 1,
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frozen_copy_is_given_up_only_when_everything_is_here_or_all_is_lost() {
        let id = || "m".to_string();
        let filling = MigrationState::Filling { migration_id: id(), peer: "a".into(), left: 7 };
        assert_eq!(standing(&filling, "m"), Standing::Left(7));
        assert_eq!(standing(&filling, "other"), Standing::Other);
        assert_eq!(
            standing(&MigrationState::Arrived { migration_id: id() }, "m"),
            Standing::Known(Fate::Runs)
        );
        let lost = |choice| MigrationState::Lost { migration_id: id(), peer: "a".into(), bytes: 1, choice };
        assert_eq!(standing(&lost(OnPostCopyFailure::Kill), "m"), Standing::Known(Fate::Lost));
        assert_eq!(standing(&lost(OnPostCopyFailure::Thaw), "m"), Standing::Known(Fate::GivenBack));
        assert_eq!(standing(&MigrationState::Idle, "m"), Standing::Other);
    }
}
