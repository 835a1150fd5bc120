//! The daemon under CRIU itself: a tree of processes is dumped while it does everything that the daemon has to follow, restored with
//! `--lazy-pages`, and goes on doing it. Needs root and CRIU; ignored by default:
//! `cargo test -p transship --lib memory::daemon::tests::criu -- --ignored --nocapture`

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

use prost::Message;

use super::*;
use crate::criu::page_server::{PE_LAZY, PE_PRESENT};

const CRIUS: [&str; 2] = ["/opt/transship/criu/bin/criu", "/opt/criu/bin/criu"];

/// pagemap_entry of images/pagemap.proto.
#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(uint64, optional, tag = "1")]
    vaddr: Option<u64>,
    #[prost(uint32, optional, tag = "2")]
    pages: Option<u32>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pages_64: Option<u64>,
}

/// pagemap_head.
#[derive(Clone, PartialEq, Message)]
struct Head {
    #[prost(uint32, optional, tag = "1")]
    pages_id: Option<u32>,
}

/// What a plain dump holds of pages that may be restored lazily.
fn load(images: &Path) -> (Store, LazySets) {
    let mut store = Store::new(1 << 40).unwrap();
    let mut sets = LazySets::default();
    for file in fs::read_dir(images).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        let Some(id) = name.strip_prefix("pagemap-").and_then(|n| n.strip_suffix(".img")) else { continue };
        let Ok(id) = id.parse() else { continue };
        let space = Space { kind: ImageKind::Pid, id };
        let bytes = fs::read(images.join(&name)).unwrap();
        let mut messages = Vec::new();
        let mut at = 8;
        while at < bytes.len() {
            let len = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            messages.push(&bytes[at + 4..at + 4 + len]);
            at += 4 + len;
        }
        let pages_id = Head::decode(messages[0]).unwrap().pages_id.unwrap();
        let pages = fs::File::open(images.join(format!("pages-{pages_id}.img"))).unwrap();
        let (mut offset, mut lazy) = (0, RangeSet::new());
        for m in &messages[1..] {
            let e = Entry::decode(*m).unwrap();
            let flags = e.flags.unwrap_or(0);
            assert!(flags & PE_PRESENT != 0, "a hole in a plain dump");
            let len = e.pages_64.unwrap_or(u64::from(e.pages.unwrap_or(0))) * P;
            if flags & PE_LAZY != 0 {
                let mut content = vec![0; len as usize];
                pages.read_exact_at(&mut content, offset).unwrap();
                store.put(space, e.vaddr.unwrap(), &content).unwrap();
                lazy.insert(e.vaddr.unwrap()..e.vaddr.unwrap() + len);
            }
            offset += len;
        }
        sets.lazy.push((space, lazy));
    }
    (store, sets)
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn tail(path: &Path) -> String {
    let log = fs::read_to_string(path).unwrap_or_default();
    log.lines().filter(|l| l.contains("Error") || l.contains("Warn")).collect::<Vec<_>>().join("\n")
}

#[test]
#[ignore = "needs root and CRIU"]
fn a_tree_of_busy_processes_goes_on() {
    let Some(criu) = CRIUS.iter().find(|c| Path::new(c).exists()) else {
        return println!("SKIPPED: no CRIU");
    };
    if skip() {
        return;
    }
    let top = tempfile::tempdir().unwrap();
    let (dir, images, work) = (top.path().join("t"), top.path().join("images"), top.path().join("work"));
    [&dir, &images, &work].into_iter().for_each(|d| fs::create_dir(d).unwrap());
    let log = fs::File::create(dir.join("log")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["transship-test-task", "tree"]).arg(&dir).arg("16000");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    unsafe { command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into)) };
    let mut tree = command.spawn().unwrap();
    let result = || fs::read_to_string(dir.join("result")).unwrap_or_default();
    until("start", || result().contains("ready"));
    std::thread::sleep(Duration::from_millis(150));

    let run = |verb: &str, more: &[&str]| {
        let mut c = Command::new(criu);
        c.args([verb, "-v4", "-o", &format!("{verb}.log"), "--manage-cgroups=ignore", "-D"])
            .arg(&images)
            .arg("-W")
            .arg(&work);
        let begun = Instant::now();
        let status =
            c.args(more).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        println!("criu {verb}: {:?}", begun.elapsed());
        assert!(status.success(), "{}", tail(&work.join(format!("{verb}.log"))));
    };
    // The pids have to be free again: whoever CRIU kills must not stay a zombie of an init that does not care.
    // SAFETY: plain system call.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    run("dump", &["-t", &tree.id().to_string()]);
    tree.wait().unwrap();
    let dead = |file: fs::DirEntry| {
        let name = file.file_name().into_string().unwrap();
        name.strip_prefix("core-").and_then(|n| n.strip_suffix(".img")).and_then(|n| n.parse::<i32>().ok())
    };
    for pid in fs::read_dir(&images).unwrap().filter_map(|f| dead(f.unwrap())) {
        // SAFETY: plain system call; threads and the parent, already collected, give ECHILD.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    }

    let (store, sets) = load(&images);
    let (spaces, lazy) = (sets.lazy.len(), store.bytes());
    let mut cfg = DaemonConfig::new(work.join(SOCKET));
    cfg.keeper = Some(Keeper::start(&std::env::current_exe().unwrap(), KEEPER).unwrap());
    // Slowly, so that the tasks have time to interfere.
    cfg.batch = 16 << 10;
    let daemon = Daemon::listen(cfg).unwrap();
    let ctl = DaemonCtl::new().unwrap();
    let orders = ctl.clone();
    let daemon = std::thread::spawn(move || daemon.run(store, &sets, None, ctl, &mut |e| println!("{e:?}")));
    run("restore", &["-d", "--lazy-pages"]);
    std::thread::sleep(Duration::from_millis(30));
    orders.running();
    let stats = daemon.join().unwrap().unwrap();
    println!("{spaces} tasks, {} MB lazy: {stats:?}", lazy >> 20);
    std::thread::sleep(Duration::from_millis(200));
    fs::write(dir.join("stop"), "").unwrap();
    let mut ended = String::new();
    until("end of the tree", || {
        ended = result();
        ended.contains("parent") || fs::read_to_string(dir.join("log")).is_ok_and(|l| l.contains("WRONG"))
    });
    let log = fs::read_to_string(dir.join("log")).unwrap();
    println!("{log}");
    assert_eq!(ended.matches("child\n").count(), 2, "{ended} {log}");
    assert!(ended.contains("parent") && !log.contains("WRONG"), "{ended} {log}");
    assert!(stats.complete && stats.faults_local > 10 && stats.filled_bytes > 1 << 20);
    assert_eq!(stats.unplaced_bytes, 0);
    assert_eq!(fs::read_dir(&work).unwrap().filter(|e| e.as_ref().unwrap().file_name() == SOCKET).count(), 0);
}
