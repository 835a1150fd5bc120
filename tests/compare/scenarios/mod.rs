//! The scenarios, one subject per file. To add one: a function over a [`Subject`](crate::subject::Subject), named in its file's `list!`.

/// The scenarios of a file, by their functions' names.
macro_rules! list {
    ($($name:ident),* $(,)?) => {
        /// The scenarios of this file.
        pub const ALL: &[crate::Scenario] = &[$(crate::Scenario { name: stringify!($name), run: $name }),*];
    };
}

mod checkpoint;
mod create;
mod exec;
mod hooks;
mod kill;
mod logger;
mod options;
mod pause;
mod program;
mod resources;
mod shim;
mod start;
mod stdio;
mod terminal;

use crate::Scenario;

/// Every scenario, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        create::ALL,
        start::ALL,
        exec::ALL,
        kill::ALL,
        pause::ALL,
        stdio::ALL,
        logger::ALL,
        terminal::ALL,
        resources::ALL,
        hooks::ALL,
        options::ALL,
        checkpoint::ALL,
        shim::ALL,
        program::ALL,
    ]
    .into_iter()
    .flatten()
}
