//! A tree of processes that do to their memory whatever programs do to memory, and check every byte of it: what a live migration must
//! carry while it happens. A wrong byte is said (`mutate WRONG ...`) and ends all of it with status 3.
//!
//! | file | what lives there |
//! |---|---|
//! | `control.rs` | the controller, which is asked by `ts-probe ask verify` |
//! | `worker.rs` | a worker process: its pace, its link to the controller |
//! | `content.rs`, `book.rs` | what a page holds; memory with a book about it |
//! | the others | one behaviour each (`maps.rs`: those of whole mappings) |

mod advice;
mod book;
mod brk;
mod content;
mod control;
mod exec;
mod family;
mod files;
mod flags;
mod guards;
mod huge;
mod jit;
mod maps;
mod private_file;
mod protect;
mod shared;
mod sparse;
mod stack;
mod threads;
mod worker;
mod writes;

use transship_testtools::args::Args;

use book::Checked;
use shared::Backing;
use worker::{Behaviour, Link, Setup};

pub use control::ask;

/// Every behaviour.
pub const NAMES: [&str; 22] = [
    "writes",
    "mmap",
    "replace",
    "mremap",
    "mprotect",
    "brk",
    "fork",
    "exec",
    "threads",
    "madvise",
    "file-private",
    "shared-anon",
    "memfd",
    "sysv",
    "shm-file",
    "sparse",
    "stack",
    "thp",
    "jit",
    "files",
    "guards",
    "flags",
];

fn make(setup: &Setup) -> Checked<Box<dyn Behaviour>> {
    Ok(match setup.name {
        "writes" => Box::new(writes::Writes::new(setup)?),
        "mmap" => Box::new(maps::Mmap::new(setup)?),
        "replace" => Box::new(maps::Replace::new(setup)?),
        "mremap" => Box::new(maps::Mremap::new(setup)?),
        "mprotect" => Box::new(protect::Protect::new(setup)?),
        "brk" => Box::new(brk::Brk::new(setup)?),
        "fork" => Box::new(family::Family::new(setup)?),
        "exec" => Box::new(exec::Exec::new(setup)?),
        "threads" => Box::new(threads::Threads::new(setup)?),
        "madvise" => Box::new(advice::Advice::new(setup)?),
        "file-private" => Box::new(private_file::PrivateFile::new(setup)?),
        "shared-anon" => Box::new(shared::Shared::new(Backing::Anonymous, setup)?),
        "memfd" => Box::new(shared::Shared::new(Backing::Memfd, setup)?),
        "sysv" => Box::new(shared::Shared::new(Backing::SystemV, setup)?),
        "shm-file" => Box::new(shared::Shared::new(Backing::File, setup)?),
        "sparse" => Box::new(sparse::Sparse::new(setup)?),
        "stack" => Box::new(stack::Stack::new(setup)?),
        "thp" => Box::new(huge::Huge::new(setup)?),
        "jit" => Box::new(jit::Jit::new(setup)?),
        "files" => Box::new(files::Files::new(setup)?),
        "guards" => Box::new(guards::Guards::new(setup)?),
        "flags" => Box::new(flags::Flags::new(setup)?),
        other => return Err(format!("no behaviour {other:?}")),
    })
}

fn named(name: &str) -> Checked<&'static str> {
    let found = NAMES.into_iter().find(|n| *n == name);
    found.ok_or_else(|| format!("no behaviour {name:?}; there are {}", NAMES.join(", ")))
}

/// `mutate all|NAME,NAME...`
pub fn run(args: &mut Args) -> Result<(), String> {
    let wanted = args.position("BEHAVIOURS")?;
    let names = match wanted.as_str() {
        "all" => NAMES.to_vec(),
        list => list.split(',').map(named).collect::<Result<_, _>>()?,
    };
    control::run(&names, args)
}

/// What the worker `exec` executes.
pub fn again(args: &mut Args) -> Result<(), String> {
    let name = named(&args.position("BEHAVIOUR")?)?;
    let setup = Setup::new(name, args.option_number("number", 0)?, args)?;
    let (memfd, life) = (args.option_number("memfd", 0)? as i32, args.option_number("life", 0)? as u32);
    let link = Link::inherited(args)?;
    let behaviour = exec::Exec::again(&setup, memfd, life).map(|e| Box::new(e) as Box<dyn Behaviour>);
    worker::work(&setup, &link, args.option_number("steps", 0)?, behaviour)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a process of its own with one thread, as a worker is. The test's threads do not exist there; nothing they held is used.
    fn alone(work: impl FnOnce() -> Checked) -> i32 {
        let child = worker::fork(|| match work() {
            Ok(()) => 0,
            Err(e) => worker::give_up("test", &e),
        });
        let (child, mut status) = (child.unwrap(), 0);
        // SAFETY: `status` is a valid place for the answer.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) }
    }

    fn setup(name: &'static str, number: u64, dir: &str) -> Setup {
        let args = Args::new(["--mb=1", "--rate=0", "--dir", dir].map(String::from), &[]);
        Setup::new(name, number, &args).unwrap()
    }

    /// Every behaviour runs without a fault of its own, and sees a byte that was changed behind its back.
    #[test]
    fn each_behaviour_is_right_by_itself_and_sees_a_wrong_byte() {
        // as deep as a process's first stack
        let thread = std::thread::Builder::new().stack_size(8 << 20).spawn(each_behaviour);
        thread.unwrap().join().unwrap();
    }

    fn each_behaviour() {
        let dir = std::env::temp_dir().join(format!("mutate-test-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        for (number, name) in NAMES.into_iter().enumerate() {
            let setup = setup(name, number as u64, dir.to_str().unwrap());
            let right = alone(|| {
                let mut behaviour = make(&setup)?;
                for round in 0..60 {
                    behaviour.step()?;
                    if round % 30 == 29 {
                        behaviour.verify()?;
                    }
                }
                Ok(())
            });
            assert_eq!(right, 0, "{name}");
            // a second one must not meet the first one's files
            let setup = Setup { number: setup.number + 100, ..setup };
            let noticed = alone(|| {
                let mut behaviour = make(&setup)?;
                (0..20).try_for_each(|_| behaviour.step())?;
                // what threads check lives on stacks that no test reaches; the check itself is tested in `content`
                if name == "threads" || behaviour.notices() { Ok(()) } else { Err("not seen".into()) }
            });
            // another process of this worker may have seen it first
            let first = ["fork", "shared-anon", "memfd", "sysv", "shm-file", "writes"].contains(&name);
            assert!(noticed == 0 || first && noticed == worker::GIVEN_UP, "{name}: {noticed}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
