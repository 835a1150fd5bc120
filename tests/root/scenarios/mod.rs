//! The scenarios, one subject per file. To add one: write a function over a [`Bed`](crate::bed::Bed) and list it in its file's `ALL`.

mod files_appended;
mod files_layer;
mod files_open;
mod moving;
mod stdio_attached;
mod stdio_moves;
mod tasks;

use crate::Scenario;

/// Every scenario, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        tasks::ALL,
        moving::ALL,
        files_appended::ALL,
        files_open::ALL,
        files_layer::ALL,
        stdio_moves::ALL,
        stdio_attached::ALL,
    ]
    .into_iter()
    .flatten()
}
