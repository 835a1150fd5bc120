//! The scenarios, one subject per file. To add one: write a function over a [`Bed`](crate::bed::Bed) and list it in its file's `ALL`.

mod files_appended;
mod files_layer;
mod files_open;
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
        files_appended::ALL,
        files_layer::ALL,
        files_open::ALL,
        move_image::ALL,
        move_normal::ALL,
        move_others::ALL,
        move_processes::ALL,
        moving::ALL,
        net_config::ALL,
        net_connections::ALL,
        tasks::ALL,
    ]
    .into_iter()
    .flatten()
}
