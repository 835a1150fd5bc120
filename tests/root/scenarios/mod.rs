//! The scenarios, one subject per file. To add one: write a function over a [`Bed`](crate::bed::Bed) and list it in its file's `ALL`.

mod checkpoint_errors;
mod checkpoint_file;
mod cli_ps;
mod ctr_checkpoint;
mod ctr_tasks;
mod moving;
mod net_config;
mod net_connections;
mod tasks;

use crate::Scenario;

/// Every scenario, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        tasks::ALL,
        moving::ALL,
        net_connections::ALL,
        net_config::ALL,
        checkpoint_file::ALL,
        checkpoint_errors::ALL,
        cli_ps::ALL,
        ctr_checkpoint::ALL,
        ctr_tasks::ALL,
    ]
    .into_iter()
    .flatten()
}
