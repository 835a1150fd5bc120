//! The migration itself: what two shims say to each other and what each of them does.
//!
//! ```text
//! source                                     destination
//!   Hello (version, id, ticket)        ->
//!                                      <-      Welcome (version chosen)
//!   Manifest                           ->
//!   Round, Memory, Layer*, Staged      ->      page store, layer applied        the container runs;
//!     ... again with what was written since, until the rest is small            again and again
//!   Prepare                            ->      root mounted, runc restore started, held in front of CRIU
//!                                      <-      Ready
//!   FREEZE   cgroup frozen, netns fenced, output drained
//!   Frozen, PagesHole*, PagesExist*    ->      the list of the pages that exist
//!   Memory, Layer, Staged, Files, Stdio ->     what was written last; metadata images
//!   RemotePages, HotPages, Final       ->      images planned; CRIU restores; tasks complete, held at the gate
//!                                      <-      Restored | Failed (the source thaws)
//!   Backlog, Commit                    ->      fence lifted, gate opened, addresses announced
//!                                      <-      Running  (without post-copy the source's tasks are killed)
//!   Memory, faults first               <->     MemoryWant                       post-copy only
//!   MemoryDone                         <->     MemoryDone (every page is in its place)
//! ```
//!
//! With a peer of protocol 3 that list comes run by run. With a peer of protocol 2 tmpfs files come in the freeze, among CRIU's images. A peer of protocol 1, a CRIU that cannot leave memory alone, and a checkpoint file get everything in one copy in the freeze.
//!
//! The guarantee: before `Commit` is sent every failure leaves the source running as before; after it the source
//! never runs again unless the destination has said that it aborted, or has killed what it could not complete.
//!
//! | file | what lives there |
//! |---|---|
//! | [`codec`] | bytes <-> frames: header, caps, checksums |
//! | [`protocol`] | the messages and the choice of a version (pure) |
//! | [`wire`], [`tls_io`] | a blocking connection that sends and receives frames, with a deadline by silence |
//! | [`admission`] | who is let in at the destination: the source's certificate and its ticket, in time |
//! | [`link`] | that connection, shared by threads |
//! | [`source`] | the order of a migration on the source: commit, or roll back |
//! | [`prepared`] | what the source finds out before the freeze |
//! | [`precopy`] | rounds while the container runs |
//! | [`slowdown`] | how much the first round may slow the container down |
//! | [`copier`] | memory asked for, read and sent; what the destination has |
//! | [`layers`], [`tmpfs`] | the writable layer and the content of tmpfs files, in rounds |
//! | [`still`] | tasks that stand still, and how they are let go |
//! | [`turn`] | how many stand still at the same time |
//! | [`capture`] | the freeze with one copy of everything |
//! | [`live`] | the freeze of a live migration |
//! | [`backlog`] | packets that came to the frozen container, passed on |
//! | [`code_pages`], [`shared`] | what CRIU changes for a moment; what of shared memory need not be sent again |
//! | [`postcopy`], [`remains`] | pages that follow after the commit, on the source: sent; which of them next (pure) |
//! | [`stream`] | the container's state as frames: the same for a peer and for a checkpoint file |
//! | [`destination`] | what both forms of an arrival share; one copy of everything received |
//! | [`arrival`] | a live migration received |
//! | [`filling`] | the page daemon of an arrival, and what happens when memory cannot be completed |
//! | [`archive`], [`seal`] | a checkpoint file: the same stream, recorded; encrypted |
//! | [`fault`] | standing still at a named point, for tests (debug builds only) |
//! | [`shown`] | what a peer says, made fit for a terminal and a log |
//! | [`background`] | yielding the processor to the container while it runs |
//! | [`abort`] | giving up from another thread, up to the commit |
//! | [`report`], [`loss`] | what was measured; what was lost in a post-copy |
//! | [`tuning`], [`quantity`] | what the operator chooses, and the rates and durations that are written for it |
//!
//! What does not live here: containerd (the agent's room), runc and stdio (the shim's; both are reached through
//! the two traits [`source::SourceTask`] and [`destination::DestinationTask`]).

pub mod abort;
pub mod admission;
pub mod archive;
mod arrival;
mod background;
mod backlog;
mod capture;
mod code_pages;
pub mod codec;
mod copier;
pub mod destination;
pub mod fault;
pub mod filling;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod layers;
mod link;
mod live;
pub mod loss;
mod postcopy;
mod precopy;
mod prepared;
pub mod protocol;
pub mod quantity;
mod remains;
pub mod report;
pub mod seal;
mod shared;
pub mod shown;
mod slowdown;
pub mod source;
mod still;
pub mod stream;
mod tls_io;
mod tmpfs;
pub mod tuning;
mod turn;
pub mod wire;
