//! The scenarios, one subject per file. To add one: write a function over a [`Bed`](crate::bed::Bed) and list it in its file's `ALL`.

mod moving;
mod net_config;
mod net_connections;
mod tasks;
mod trouble_commit;
mod trouble_deaths;
mod trouble_dump;
mod trouble_files;
mod trouble_peers;
mod trouble_refused;

use crate::Scenario;

/// Every scenario, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    let trouble = [
        trouble_refused::ALL,
        trouble_peers::ALL,
        trouble_dump::ALL,
        trouble_deaths::ALL,
        trouble_commit::ALL,
        trouble_files::ALL,
    ];
    [tasks::ALL, moving::ALL, net_connections::ALL, net_config::ALL].into_iter().chain(trouble).flatten()
}
