//! transship moves a running container to another node: memory, open files, writable layer, stdio, IP address and
//! established TCP connections.
//!
//! # Layout
//!
//! | room | what lives there |
//! |---|---|
//! | [`migrate`] | the migration itself: wire codec, protocol, source, destination, report |
//! | [`memory`] | dirty tracking, pages on the wire, the destination's page store and page daemon |
//! | [`criu`] | CRIU's RPC, dump options, page server, image writers, the gates around a restore |
//! | [`cgroup`] | the freezer of cgroup v1 and v2 |
//! | [`net`] | a network namespace captured, rebuilt, fenced and announced |
//! | [`rootfs`] | the writable layer: captured as a stream of entries, applied exactly |
//! | [`control`] | the unix socket between agent and shim, with descriptors passed along |
//! | [`policy`] | what a container from elsewhere may be on this node |
//! | [`tls`] | certificates, mutual TLS 1.3, the ClientHello peek |
//! | [`containerd`] | what we ask of containerd: containers, tasks, images, snapshots, content |
//! | [`agent`] | the node's daemon: peers, tickets, preparing and undoing a destination |
//! | [`cli`] | the operator's command line |
//! | [`doctor`] | is this node fit, and what to do about it |
//! | [`private`] | no core dumps, a umask, directories and files for root only |
//! | [`procstat`] | the fields of /proc/PID/stat |
//! | [`program`] | the files of our own programs, for whoever starts them again |
//!
//! The shim (`shim/`, binary `containerd-shim-transship-v2`) uses `migrate`, `memory`, `criu`, `cgroup`, `net`, `rootfs`, `control` and `tls`;
//! it never talks to containerd's gRPC API. The binary `transship` (`src/main.rs`) is `cli`.
//! The library knows nothing of Kubernetes or ctr.

pub mod agent;
pub mod cgroup;
pub mod cli;
pub mod containerd;
pub mod control;
pub mod criu;
pub mod doctor;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod journal;
pub mod memory;
pub mod migrate;
pub mod net;
pub mod policy;
pub mod private;
pub mod procstat;
pub mod program;
pub mod rootfs;
pub mod tls;
