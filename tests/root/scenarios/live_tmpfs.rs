//! Files on the container's tmpfs mounts: they go ahead while the container runs, and what the freeze sends of them is what changed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Scenario;
use crate::bed::{Bed, Node, wait_for};
use crate::container::{self, Run};
use crate::moves;
use crate::output;
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] = &[Scenario { name: "live_tmpfs", needs: Needs::Migration, run: tmpfs }];

const MB: u64 = 1 << 20;
/// Files that nobody changes.
const STILL_MB: u64 = 200;

/// 200 MB that stay as they are, a file that is changed through a mapping all the time, one that is mapped, changed and closed again, and
/// files with holes, with several names and protected ones. There and back.
fn tmpfs(bed: &Bed) -> Result<()> {
    let id = "tf1";
    output::forget(bed, id)?;
    let script = format!(
        "mkdir -p /shm/d /shm/e; cd /shm/e
        dd if=/dev/urandom of=holes bs=64k count=3 seek=7000 2> /dev/null; truncate -s 3G holes
        head -c 300000 /dev/urandom > names; ln names 'another name'; chmod 640 names; chown 12:34 names; touch -d 2001-02-03 names
        head -c 70001 /dev/zero > zeros; head -c 100 /dev/urandom > small; ln -s names link; mkfifo fifo
        for i in 1 2 3 4; do dd if=/dev/urandom of=still$i bs=1M count={part} 2> /dev/null; done
        sha256sum still? names zeros small > /shm/sums; dd if=holes bs=64k skip=7000 count=3 2> /dev/null | sha256sum > /shm/data
        stat -c '%n %s %h %a %u:%g %Y' holes names zeros small > /shm/stats
        ts-probe files /shm/d 8 --every 100 & ts-probe mapped /dev/shm/mapped 6 --every 20 &
        ts-probe visits /dev/shm/visited 8 --every 20 & wait",
        part = STILL_MB / 4
    );
    let mount = "type=tmpfs,src=tmpfs,dst=/shm,options=size=300m";
    Run::new(bed, id, "probe")
        .options(&["--mount", mount])
        .log()?
        .args(&["sh", "-c", &script])
        .start(Node::A)?;
    let workloads = ["files", "mapped", "visits"];
    for name in workloads {
        let said = || Ok(container::log(bed, id).is_ok_and(|log| log.contains(&format!("{name} round=2 "))));
        wait_for(Duration::from_secs(60), &format!("two rounds of {name}"), said)?;
    }
    for (from, to) in [(Node::A, Node::B), (Node::B, Node::A)] {
        let report = moves::migrate(bed, id, from, to)?;
        sent(&report["shim"]).with_context(|| report["shim"].to_string())?;
        let check = "cd /shm/e && sha256sum -c -s /shm/sums && dd if=holes bs=64k skip=7000 count=3 2> /dev/null | sha256sum | diff /shm/data - &&
            [ names -ef 'another name' ] && [ -p fifo ] && [ $(readlink link) = names ] &&
            stat -c '%n %s %h %a %u:%g %Y' holes names zeros small | diff /shm/stats - && [ $(du -k holes | cut -f1) -lt 400 ]";
        let checked = container::exec(bed, to, id, &["sh", "-ec", check])?;
        ensure!(checked.status.success(), "{checked:?}");
        output::wait_rounds(bed, to, id, 0, &workloads)?;
    }
    for name in workloads {
        output::all_right(&container::log(bed, id)?, name)?;
        for node in Node::ALL {
            output::all_right(&output::arrived(bed, node, id)?, name)?;
        }
    }
    container::delete(bed, Node::A, id)
}

/// What was sent, and when.
fn sent(shim: &Value) -> Result<()> {
    let rounds = shim["rounds"].as_array().context("rounds")?;
    let ahead: u64 = rounds.iter().filter_map(|r| r["tmpfs_bytes"].as_u64()).sum();
    ensure!(ahead >= STILL_MB * MB, "{ahead} bytes went ahead");
    let of = |name: &str| shim["sent"][name].as_u64().with_context(|| format!("no {name}"));
    let (files, tmpfs) = (of("file_bytes")?, of("tmpfs_bytes")?);
    // CRIU's images are metadata; the two files that change have 14 MB
    ensure!(
        files < 4 * MB && tmpfs < 15 * MB,
        "in the freeze: {files} bytes of images, {tmpfs} of tmpfs files"
    );
    Ok(())
}
