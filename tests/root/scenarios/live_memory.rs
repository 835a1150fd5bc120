//! Memory that changes in every way while the container moves back and forth: each page is checked where it is used and after each
//! move. What the processes do is in `tests/tools/src/bin/ts-probe/mutate/`.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container;
use crate::live::Mutants;
use crate::moves;
use crate::requirements::Needs;
use crate::traffic;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[
    Scenario { name: "live_mappings", needs: Needs::Migration, run: mappings },
    Scenario { name: "live_content", needs: Needs::Migration, run: content },
    Scenario { name: "live_guards", needs: Needs::Migration, run: guards },
    Scenario { name: "live_flags", needs: Needs::Migration, run: flags },
    Scenario { name: "live_processes", needs: Needs::Migration, run: processes },
    Scenario { name: "live_shared_memory", needs: Needs::Migration, run: shared },
    Scenario { name: "live_everything", needs: Needs::Migration, run: everything },
    Scenario { name: "live_fifty_processes", needs: Needs::Migration, run: fifty },
    Scenario { name: "live_forks_without_end", needs: Needs::Migration, run: forks },
    Scenario { name: "live_wrong_byte_is_seen", needs: Needs::Migration, run: wrong_byte },
];

/// These behaviours through three moves, one in each mode.
fn each(bed: &Bed, behaviours: &str, first_mode: usize) -> Result<()> {
    let mut mutants = Mutants::start(bed, "live", &[behaviours])?;
    mutants.travel(3, first_mode)?;
    mutants.end()
}

fn mappings(bed: &Bed) -> Result<()> {
    each(bed, "mmap,replace,mremap,mprotect,brk,sparse", 0)
}

fn content(bed: &Bed) -> Result<()> {
    each(bed, "writes,madvise,file-private,thp,jit,stack", 1)
}

/// In memory that CRIU does not see, so that they are ours to put into its images.
fn guards(bed: &Bed) -> Result<()> {
    each(bed, "guards", 0)
}

/// Of mappings that CRIU hears of from us.
fn flags(bed: &Bed) -> Result<()> {
    each(bed, "flags", 0)
}

fn processes(bed: &Bed) -> Result<()> {
    each(bed, "fork,exec,threads", 2)
}

fn shared(bed: &Bed) -> Result<()> {
    each(bed, "shared-anon,memfd,sysv,shm-file", 0)
}

fn everything(bed: &Bed) -> Result<()> {
    each(bed, "all", 1)
}

/// Nine that write, nine that fork four children each (which fork too), and the controller.
fn fifty(bed: &Bed) -> Result<()> {
    let line =
        ["fork,writes", "--copies", "9", "--mb", "2", "--threads", "1", "--rate", "2", "--every", "20"];
    let mut mutants = Mutants::start(bed, "live", &line)?;
    let table = bed.ok(Node::A, &["ctr", "task", "ps", "live"])?;
    ensure!(table.lines().count() > 50, "{table}");
    mutants.travel(2, 0)?;
    mutants.end()
}

/// Processes that come and go faster than they can be listed: some of those that live are never in the list.
fn forks(bed: &Bed) -> Result<()> {
    let script = "storm() { while sleep 0.01; (exit 7); [ $? = 7 ]; do :; done; echo storm round=0 wrong=1; }
        for i in 1 2 3 4 5 6 7 8 9 10 11 12; do storm & done; n=0
        while (exit 7); [ $? = 7 ]; do n=$((n + 1)); [ $((n % 200)) != 0 ] || echo storm round=$n wrong=0; done; echo storm round=$n wrong=1";
    traffic::start(bed, Node::A, "live", &[], &["sh", "-c", script])?;
    let goes_on = || {
        let before = traffic::inside(bed, "live")?.len();
        wait_for(Duration::from_secs(15), "it goes on", || Ok(traffic::inside(bed, "live")?.len() > before))
    };
    goes_on()?;
    for from in [Node::A, Node::B] {
        moves::migrate(bed, "live", from, from.other())?;
        goes_on()?;
    }
    traffic::expect_right(&traffic::inside(bed, "live")?)?;
    container::delete(bed, Node::A, "live")
}

/// The checks see a byte that changed behind their back: otherwise all the others would show nothing.
fn wrong_byte(bed: &Bed) -> Result<()> {
    let mut mutants = Mutants::start(bed, "live", &["writes,mremap,files"])?;
    mutants.go(&[])?;
    container::exec(bed, mutants.at, "live", &["ts-probe", "ask", "spoil", "mremap"])?;
    ensure!(mutants.verify().is_err(), "a changed byte was not seen");
    wait_for(Duration::from_secs(20), "its end", || {
        Ok(traffic::inside(bed, "live")?.contains("mutate WRONG in mremap"))
    })?;
    container::delete(bed, mutants.at, "live")
}
