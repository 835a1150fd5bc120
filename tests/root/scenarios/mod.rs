//! The scenarios, one subject per file. To add one: write a function over a [`Bed`](crate::bed::Bed) and list it in its file's `ALL`.

mod move_image;
mod move_normal;
mod move_others;
mod move_processes;
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
        move_normal::ALL,
        move_image::ALL,
        move_processes::ALL,
        move_others::ALL,
    ]
    .into_iter()
    .flatten()
}
