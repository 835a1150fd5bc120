//! One move: a container dumped behind one gate and restored behind the other, or refused; and dumps that fail.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::bed::{Bed, Container, Memory, finish, programs, sh};
use super::{SOON, live};
use crate::cgroup::Freezer;
use crate::criu::gate_server::{self, GateServer, Opening, Wait};
use crate::criu::options::{Facts, Limits, dump_options};
use crate::criu::plan::{EagerPolicy, Plan, Planner};
use crate::criu::{DumpRequest, Listing, MemoryMode, PageStore, Worker, images, stdio, tar};
use crate::memory::tracker::tasks;

/// What waits for a dump's events.
enum Sink {
    Store(PageStore),
    Planner(Planner, live::Holes),
}

impl Bed {
    /// Moves a container; `refuse` says no at the second gate.
    pub(super) fn move_to(
        &self,
        from: &Container,
        id: &str,
        netns: &str,
        memory: Memory,
        refuse: bool,
    ) -> Result<Option<Container>> {
        let spec = oci_spec::runtime::Spec::load(from.bundle.join("config.json"))?;
        self.netns(netns)?;
        let bundle = self.bundle(id, netns)?;
        // The writable layer, of which this room knows nothing.
        sh(&format!("cp -a {}/rootfs/. {}/rootfs/", from.bundle.display(), bundle.display()))?;
        let dir = |name: &str| -> Result<PathBuf> {
            let path = bundle.join(name);
            fs::create_dir_all(&path)?;
            Ok(path)
        };
        let (images_out, images_in, work) = (dir("images-out")?, dir("images-in")?, dir("work")?);

        // Destination, before the freeze: everything of runc's own.
        let state = PathBuf::from(format!("/run/runc/{}/state.json", from.id));
        let descriptors = stdio::descriptors(Some(&state), from.pid)?;
        stdio::write(&images_in, &descriptors)?;
        let mut gates = GateServer::prepare(&bundle, &programs()?, &self.criu.path, "")?;
        let begun = Instant::now();
        let runc = self.restore(&bundle, &images_in, &work, id, &gates)?;
        let pidfd = gate_server::pidfd(i32::try_from(runc.id())?)?;
        let wait = || Wait { or_end_of: Some(pidfd.as_fd()), ..Wait::at_most(SOON) };
        gates.wait_restore(&wait())?;
        let prepared = begun.elapsed();

        // Source.
        let freezer = Freezer::of_pid(from.pid)?;
        let mode = if memory == Memory::Full { MemoryMode::Full } else { MemoryMode::Parent };
        let tools = match self.fast.tar {
            true => Some(tar::tools(&work, &programs()?)?),
            false => None,
        };
        let inside = match self.fast.netns {
            true => Some(File::open(format!("/proc/{}/ns/net", from.pid))?),
            false => None,
        };
        let worker = Worker {
            memory: mode,
            netns: inside.as_ref().map(|f| f.as_fd()),
            path_first: tools.as_deref(),
            ..Worker::default()
        };
        let ready = self.criu.prepare_dump(&worker)?;
        let frozen_at = Instant::now();
        ensure!(!freezer.freeze(SOON)?, "was frozen before");
        let froze = frozen_at.elapsed();
        self.link(&from.netns, "down")?;
        let facts = Facts::gather(&spec, from.pid, &from.bundle.join("rootfs"), freezer.path())?;
        let log_level = if self.fast.quiet { 1 } else { 4 };
        let opts = dump_options(&spec, &facts, &Limits { log_level, ..Limits::default() })?;
        let eager_max = if memory == Memory::Eager { u64::MAX } else { 0 };
        let mut sink = match memory {
            Memory::Full => Sink::Store(PageStore::new(&images_in, 1 << 30)),
            _ => Sink::Planner(
                Planner::new(&images_in, EagerPolicy { eager_max, hot_max: 1 << 20 }),
                live::Holes::default(),
            ),
        };
        let ids: Vec<u64> =
            tasks(&freezer.pids()?.into_iter().collect::<Vec<_>>()).iter().map(|t| t.vpid).collect();
        let mut post_dump = false;
        let dumping = Instant::now();
        let stats = ready.dump(
            &mut DumpRequest {
                opts,
                images_dir: &images_out,
                work_dir: &work,
                descriptors: &descriptors,
                on_images: None,
                on_post_dump: Some(&mut || {
                    post_dump = true;
                    Ok(())
                }),
                listing: if self.fast.netns { Listing::Written(&ids) } else { Listing::Sent },
                on_shared: None,
            },
            &mut |event| match &mut sink {
                Sink::Store(store) => store.event(event),
                Sink::Planner(planner, holes) => {
                    holes.event(&event);
                    planner.event(event)
                }
            },
        )?;
        let dumped = dumping.elapsed();
        ensure!(post_dump, "no post-dump");
        ensure!(freezer.is_frozen()?, "the source is not frozen after the dump");
        for entry in fs::read_dir(&images_out)? {
            let name = entry?.file_name().into_string().expect("plain names");
            ensure!(!images::is_memory_image(&name), "CRIU wrote {name} itself");
            if name != stdio::FILE {
                let mut to = images::create(&images_in, &name)?;
                std::io::copy(&mut File::open(images_out.join(&name))?, &mut to)?;
            }
        }

        // Destination.
        let (bytes, plan, pages) = match sink {
            Sink::Store(store) => (store.finish()?, Plan::default(), None),
            Sink::Planner(planner, holes) => {
                let store = holes.read(&freezer)?;
                let plan = planner.finish(&store, &[], &[])?;
                ensure!(plan.is_eager() == (memory == Memory::Eager), "{plan:?}");
                let pages =
                    if plan.is_eager() { None } else { Some(live::Pages::serve(&work, store, &plan)?) };
                (plan.eager_bytes + plan.lazy_bytes, plan, pages)
            }
        };
        ensure!(bytes > 0 && (memory != Memory::Full || bytes == stats.page_bytes), "{bytes} bytes");
        let opened = Instant::now();
        let target = PathBuf::from(format!("/run/netns/{netns}"));
        gates.open_restore_with(&Opening {
            lazy_pages: pages.is_some(),
            netns: self.fast.netns.then_some(target.as_path()),
            path_first: tools.as_deref(),
            log_level: self.fast.quiet.then_some(1),
        })?;
        gates.wait_restored(&wait())?;
        let restored = opened.elapsed();
        self.took.borrow_mut().push([dumped, restored].map(|d| d.as_secs_f64() * 1e3));
        ensure!(self.output.stands_still(), "tasks ran while held");
        let state = self.runc(&["state", id])?;
        ensure!(state.contains("\"running\""), "runc says {state}");
        let opened = Instant::now();
        if refuse {
            gates.refuse()?;
            ensure!(!finish(runc)?.0, "a refused restore succeeded");
            println!("refused: runc ended {:?} after", opened.elapsed());
            ensure!(self.runc(&["state", id]).is_err(), "a container is left");
            if let Some(pages) = pages {
                pages.abort();
            }
            fs::remove_dir_all(&bundle)?;
            freezer.thaw()?;
            self.link(&from.netns, "up")?;
            self.drop_netns(netns)?;
            return Ok(None);
        }
        freezer.kill_all(SOON)?;
        let killed = opened.elapsed();
        let opened = Instant::now();
        gates.open_run()?;
        self.link(netns, "up")?;
        let (ok, said) = finish(runc)?;
        ensure!(ok, "runc restore: {said}");
        let served = match pages {
            Some(pages) => {
                pages.running();
                format!("{:?}", pages.finish()?)
            }
            None => String::new(),
        };
        println!(
            "moved {} -> {id} ({memory:?}): {} KiB of pages, {} lazy | prepared {prepared:.1?} | freeze {froze:.1?} | dump {dumped:.1?} (spawn {:.1?}, sink {:.1?}) | \
             restore to gate {restored:.1?} | kill source {killed:.1?} | go to runc's end {:.1?} | {served}",
            from.id,
            bytes >> 10,
            plan.lazy_bytes >> 10,
            stats.spawn,
            stats.in_sink,
            opened.elapsed()
        );
        self.runc(&["delete", "--force", &from.id])?;
        self.drop_netns(&from.netns)?;
        gate_server::remove(&bundle)?;
        let pid = fs::read_to_string(bundle.join("pid"))?.parse()?;
        Ok(Some(Container { id: id.into(), netns: netns.into(), bundle, pid }))
    }

    /// The network fails in the middle of the pages, or the writable layer at the end: CRIU ends properly and the source goes on.
    pub(super) fn failing_dumps(&self, from: &Container) -> Result<()> {
        let spec = oci_spec::runtime::Spec::load(from.bundle.join("config.json"))?;
        for in_pages in [true, false] {
            let dir = tempfile::tempdir_in(&from.bundle)?;
            let freezer = Freezer::of_pid(from.pid)?;
            freezer.freeze(SOON)?;
            let facts = Facts::gather(&spec, from.pid, &from.bundle.join("rootfs"), freezer.path())?;
            let mut request = DumpRequest {
                opts: dump_options(&spec, &facts, &Limits::default())?,
                images_dir: dir.path(),
                work_dir: dir.path(),
                descriptors: &stdio::descriptors(None, from.pid)?,
                on_images: None,
                on_post_dump: Some(&mut || anyhow::bail!("cut")),
                listing: Listing::Sent,
                on_shared: None,
            };
            let mut events = 0;
            let result = self.criu.dump(&mut request, &mut |_| {
                events += 1;
                ensure!(!in_pages || events < 5, "cut");
                Ok(())
            });
            ensure!(freezer.is_frozen()?, "not frozen after a failed dump");
            freezer.thaw()?;
            let said = format!("{:#}", result.expect_err("fails"));
            ensure!(said == "dumping the container: cut", "{said}");
        }
        Ok(())
    }
}
