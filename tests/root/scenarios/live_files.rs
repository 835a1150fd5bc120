//! The writable layer while the container moves: files that are made, written, appended to, cut, renamed, deleted and mapped during
//! the rounds are in the end what the processes and the source's disk say they are.

use anyhow::{Result, ensure};

use crate::Scenario;
use crate::bed::Bed;
use crate::container;
use crate::live::{MODES, Mutants};
use crate::manifest::{Manifest, View};
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] =
    &[Scenario { name: "live_files_change", needs: Needs::Migration, run: files_change }];

/// Three processes write files, one of them much. Beside them lies what nobody touches.
fn files_change(bed: &Bed) -> Result<()> {
    let mut mutants =
        Mutants::start(bed, "live", &["files", "--copies", "3", "--every", "1", "--dir", "/data"])?;
    let still = "mkdir -p /still/a/b && for i in 1 2 3 4 5; do echo $i > /still/a/f$i; head -c 3000000 /dev/urandom > /still/a/b/g$i; done
        rm /etc/group; ln -s f1 /still/a/link; mkfifo /still/fifo; chmod 4751 /still/a/f2; rm -r /root; mkdir /root";
    let made = container::exec(bed, mutants.at, "live", &["sh", "-ec", still])?;
    ensure!(made.status.success(), "{made:?}");
    let view = |mutants: &Mutants<'_>| {
        Manifest::of(&container::rootfs(bed, mutants.at, "live")?.join("still"), View::Merged)
    };
    let before = view(&mutants)?;
    ensure!(before.len() > 12, "{} entries", before.len());
    for mode in MODES {
        mutants.go(mode)?;
        let found = before.differences(&view(&mutants)?);
        ensure!(found.is_empty(), "files that nobody touched differ: {found:?}");
        let gone = container::rootfs(bed, mutants.at, "live")?.join("etc/group").exists();
        ensure!(!gone, "a deleted file is there again");
    }
    mutants.end()
}
