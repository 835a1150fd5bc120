//! The scenarios, one subject per file. To add one: write a function over a [`Bed`](crate::bed::Bed) and list it in its file's `ALL`.

mod checkpoint_errors;
mod checkpoint_file;
mod cli_ps;
mod cri_checkpoint;
mod cri_containers;
mod cri_events;
mod cri_exec;
mod cri_logs;
mod cri_pids;
mod cri_pods;
mod cri_resources;
mod cri_streams;
mod cri_transship;
mod crun;
mod ctr_checkpoint;
mod ctr_pod;
mod ctr_tasks;
mod files_appended;
mod files_layer;
mod files_open;
mod live_files;
mod live_memory;
mod live_modes;
mod live_redis;
mod live_tmpfs;
mod live_trouble;
mod matrix;
mod move_image;
mod move_normal;
mod move_others;
mod move_processes;
mod moving;
mod net_config;
mod net_connections;
mod robust_dump;
mod robust_kills;
mod robust_many;
mod robust_output;
mod robust_restart;
mod secrets;
mod stdio_attached;
mod stdio_moves;
mod tasks;
mod trouble_commit;
mod trouble_deaths;
mod trouble_dump;
mod trouble_files;
mod trouble_peers;
mod trouble_policy;
mod trouble_reboot;
mod trouble_refused;

use crate::Scenario;

/// Every scenario, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        checkpoint_errors::ALL,
        checkpoint_file::ALL,
        cli_ps::ALL,
        cri_checkpoint::ALL,
        cri_containers::ALL,
        cri_events::ALL,
        cri_exec::ALL,
        cri_logs::ALL,
        cri_pids::ALL,
        cri_pods::ALL,
        cri_resources::ALL,
        cri_streams::ALL,
        cri_transship::ALL,
        crun::ALL,
        ctr_checkpoint::ALL,
        ctr_pod::ALL,
        ctr_tasks::ALL,
        files_appended::ALL,
        files_layer::ALL,
        files_open::ALL,
        live_files::ALL,
        live_memory::ALL,
        live_modes::ALL,
        live_redis::ALL,
        live_tmpfs::ALL,
        live_trouble::ALL,
        matrix::ALL,
        move_image::ALL,
        move_normal::ALL,
        move_others::ALL,
        move_processes::ALL,
        moving::ALL,
        net_config::ALL,
        net_connections::ALL,
        robust_dump::ALL,
        robust_kills::ALL,
        robust_many::ALL,
        robust_output::ALL,
        robust_restart::ALL,
        secrets::ALL,
        stdio_attached::ALL,
        stdio_moves::ALL,
        tasks::ALL,
        trouble_commit::ALL,
        trouble_deaths::ALL,
        trouble_dump::ALL,
        trouble_files::ALL,
        trouble_peers::ALL,
        trouble_policy::ALL,
        trouble_reboot::ALL,
        trouble_refused::ALL,
    ]
    .into_iter()
    .flatten()
}
