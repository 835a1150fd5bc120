//! Workloads that the tests run inside containers, to be moved while they work. Static, so that it runs in any image.
//!
//! Every one of them holds something that a migration has to carry, checks it over and over, and says so in lines of the form
//! `NAME round=N wrong=W ...` on stdout. USR1 makes it check at once, TERM ends it. One workload per file.

mod appenders;
mod check;
mod count;
mod deleted;
mod files;
mod inotify;
mod io_uring;
mod locks;
mod mapped;
mod memory;
mod mutate;
mod names;
mod say;
mod shared;
mod stream;
mod streams;
mod tcp;
mod threads;
mod timers;
mod tree;
mod udp;
mod unix_pair;
mod visits;
mod zombie;

use std::process::ExitCode;

use transship_testtools::{args::Args, signals};

const HELP: &str = "ts-probe WORKLOAD [--every MS]   (pace of rounds, default 200)
  count [--stderr]           a counter on stdout (and stderr); lines from stdin come back as `in LINE`
  tcp-echo PORT              accept; both sides send numbered lines and check each other's
  tcp-connect HOST PORT      the other side of it, over one connection
  stream PORT                accept; both sides send bytes as fast as they go and check each other's
  stream-connect HOST PORT   the other side of it; [--blocks N] of 16 KiB, the same on both
  append FILE                append a numbered line each round, the file stays open
  appenders FILE N           N threads append lines `WRITER NUMBER` to one file, as fast as they can
  check-append FILE          print how many lines it has; fail unless they are 1, 2, 3 ...
  deleted FILE MB            a file that is open but deleted
  flood [--numbers N]        1, 2, 3 ... on stdout in digits, on stderr in letters, as fast as they are taken
  files DIR MB               files of pseudo-random content in DIR (a tmpfs, say)
  inotify DIR                a watched directory in which files are made
  locks DIR                  file locks of every kind
  mapped FILE MB             a file changed through a shared mapping
  memory MB [--dirty PCT]    anonymous memory, PCT percent of it rewritten each round
  mutate all|NAME,NAME,...   processes that map, unmap, move, protect, share, fork ... and check all of it; see the folder mutate/
                             [--copies N] [--mb N] [--threads N] [--rate MB/S] [--dir DIR]
  ask verify                 have `mutate` in this container check everything now; ask spoil NAME: a worker changes a byte
  names DIR                  open files that are renamed, deleted, replaced, one of two names deleted
  pour MB                    stdout as fast as it is taken, in blocks of 4096 bytes: its number in 8, the rest is the number's last byte
  patient                    stdin is read from the first USR1 on; lines come back as `in LINE`
  io-uring                   hold an io_uring
  udp-echo PORT              datagrams go back to their sender
  unix-pair                  a socketpair between two processes
  threads N                  N threads, each with its own counter
  tree N                     N children with a child each, all answering through pipes
  shared                     memory shared between two processes
  timers                     timers of every kind
  visits FILE MB             a file that is mapped, changed and closed again each round
  zombie                     a child that ended and was not waited for
  sleep                      nothing";

fn run() -> Result<(), String> {
    let mut args = Args::new(std::env::args().skip(1), &["help", "stderr"]);
    signals::install();
    if args.flag("help") {
        println!("{HELP}");
        return Ok(());
    }
    match args.position("WORKLOAD")?.as_str() {
        "count" => count::run(&args),
        "tcp-echo" => tcp::listen(&mut args),
        "tcp-connect" => tcp::connect(&mut args),
        "stream" => stream::listen(&mut args),
        "stream-connect" => stream::connect(&mut args),
        "shared" => shared::run(&args),
        "timers" => timers::run(&args),
        "visits" => visits::run(&mut args),
        "zombie" => zombie::run(&args),
        "append" => files::append(&mut args),
        "appenders" => appenders::run(&mut args),
        "check-append" => check::append(&mut args),
        "deleted" => deleted::run(&mut args),
        "files" => files::run(&mut args),
        "flood" => streams::flood(&args),
        "inotify" => inotify::run(&mut args),
        "locks" => locks::run(&mut args),
        "mapped" => mapped::run(&mut args),
        "names" => names::run(&mut args),
        "pour" => streams::pour(&mut args),
        "patient" => streams::patient(&args),
        "memory" => memory::run(&mut args),
        "mutate" => mutate::run(&mut args),
        "mutate-again" => mutate::again(&mut args),
        "ask" => mutate::ask(&mut args),
        "io-uring" => io_uring::run(&args),
        "udp-echo" => udp::echo(&mut args),
        "unix-pair" => unix_pair::run(&args),
        "threads" => threads::run(&mut args),
        "tree" => tree::run(&mut args),
        "sleep" => say::rounds("sleep", &args, |_| Ok(String::new())),
        other => Err(format!("no workload {other:?}\n{HELP}")),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ts-probe: {e}");
            ExitCode::from(2)
        }
    }
}
