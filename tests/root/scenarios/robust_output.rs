//! Containers that write as fast as they can: nothing is lost, whoever reads or does not, and the others of the pod do not wait.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::bed::{Bed, Node};
use crate::many::{self, Api};
use crate::requirements::Needs;

/// The scenarios of this file.
pub const ALL: &[Scenario] =
    &[Scenario { name: "robust_output_in_gigabytes", needs: Needs::Shim, run: gigabytes }];

/// What `ts-probe pour` writes at a time.
const BLOCK: usize = 4096;
/// What is read of the endless one at least.
const ENOUGH: u64 = 1 << 30;
/// Megabytes into a file, and through a FIFO whose first reader goes away.
const FILE_MB: u64 = 256;
const LATE_MB: u64 = 32;

/// Checks a stream of `ts-probe pour`, however it is cut.
#[derive(Debug, Default)]
struct Checked {
    bytes: u64,
    left: Vec<u8>,
}

impl Checked {
    /// Reads once.
    fn read(&mut self, from: &mut impl Read) -> Result<usize> {
        let mut buffer = vec![0; 256 << 10];
        let n = from.read(&mut buffer)?;
        self.left.extend_from_slice(&buffer[..n]);
        let whole = self.left.len() / BLOCK * BLOCK;
        for block in self.left[..whole].chunks(BLOCK) {
            let number = self.bytes / BLOCK as u64;
            let mut wanted = [number.to_le_bytes()[0]; BLOCK];
            wanted[..8].copy_from_slice(&number.to_le_bytes());
            ensure!(block == wanted, "block {number} is wrong: {:?}", &block[..16]);
            self.bytes += BLOCK as u64;
        }
        self.left.drain(..whole);
        Ok(n)
    }

    fn finish(mut self, from: &mut impl Read) -> Result<u64> {
        while self.read(from)? > 0 {}
        Ok(self.bytes + self.left.len() as u64)
    }
}

/// Medians, in milliseconds, of a state and of a whole exec.
async fn calls(api: &Api) -> Result<[f64; 2]> {
    let mut times = [const { Vec::new() }; 2];
    for n in 0..9 {
        let begun = Instant::now();
        ensure!(api.state("o1").await? == 2, "o1 does not run");
        times[0].push(begun.elapsed());
        let begun = Instant::now();
        ensure!(api.exec("o1", &format!("x{n}"), &["true"]).await? == 0, "the command failed");
        times[1].push(begun.elapsed());
    }
    Ok(times.map(|mut all| {
        all.sort();
        all[4].as_secs_f64() * 1000.0
    }))
}

/// A FIFO with a reader, which runc's shim waits for, and its path in the node.
fn fifo(path: &Path) -> Result<(File, String)> {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).context("a FIFO")?;
    // without waiting for a writer; reads then wait as usual
    let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
    Ok((reader, format!("/run/{}", path.file_name().context("a name")?.to_string_lossy())))
}

fn gigabytes(bed: &Bed) -> Result<()> {
    let run = bed.path(Node::A, "/run")?;
    let (endless, late) = (run.join("rob-endless"), run.join("rob-late"));
    let log = bed.shared()?.join("poured.log");
    std::fs::remove_file(&log).ok();
    let megabytes = |mb: u64| mb.to_string();
    many::with(bed, Node::A, async |api| {
        let pour = async |id: &str, mb: u64, stdout: &str| {
            api.create(id, Some("o1"), &["ts-probe", "pour", &megabytes(mb)], stdout).await
        };
        api.run("o1", Some("o1"), &[]).await?;
        let quiet = calls(&api).await?;

        let (mut reader, path) = fifo(&endless)?;
        pour("o2", 1 << 20, &path).await?;
        let enough = Arc::new(AtomicBool::new(false));
        let stop = enough.clone();
        let poured = tokio::task::spawn_blocking(move || -> Result<_> {
            let (begun, mut checked) = (Instant::now(), Checked::default());
            while checked.bytes < ENOUGH || !stop.load(Ordering::Relaxed) {
                ensure!(checked.read(&mut reader)? > 0, "it ended by itself");
            }
            let rate = checked.bytes as f64 / begun.elapsed().as_secs_f64() / 1e6;
            Ok((checked, reader, rate))
        });
        pour("o3", FILE_MB, &format!("file://{}", log.display())).await?;
        // its first reader goes away early, and the next comes when all else has been seen
        let (mut early, path) = fifo(&late)?;
        pour("o4", LATE_MB, &path).await?;
        for id in ["o2", "o3", "o4"] {
            api.start(id).await?;
        }
        let mut first = Checked::default();
        while first.bytes < 1 << 20 {
            first.read(&mut early)?;
        }
        drop(early);

        let busy = calls(&api).await.context("while others write")?;
        ensure!(!poured.is_finished(), "the writer stopped: {:?}", poured.await);
        ensure!(api.wait("o3", "").await? == 0, "the one with a log file");
        api.forget("o3").await?;
        enough.store(true, Ordering::Relaxed);
        let (checked, mut reader, rate) = poured.await??;
        // read on to the end, or the end would wait for its output
        let rest = tokio::task::spawn_blocking(move || checked.finish(&mut reader));
        api.remove("o2").await?;
        let all = rest.await??;
        eprintln!(
            "state, exec in ms: {quiet:.1?}; beside {rate:.0} MB/s of output: {busy:.1?}; {all} bytes in all"
        );

        let in_file = Checked::default().finish(&mut File::open(&log)?).context("the log file")?;
        ensure!(in_file == FILE_MB << 20, "{in_file} bytes in the log file");
        let mut second = File::open(&late)?;
        let rest = tokio::task::spawn_blocking(move || first.finish(&mut second));
        let through = rest.await?.context("after the first reader went away")?;
        ensure!(through == LATE_MB << 20, "{through} bytes of a FIFO with two readers");
        ensure!(api.wait("o4", "").await? == 0, "the one with two readers");
        api.forget("o4").await?;
        api.remove("o1").await
    })?;
    for path in [endless, late, log] {
        std::fs::remove_file(path)?;
    }
    Ok(())
}
