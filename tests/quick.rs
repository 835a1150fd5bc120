//! `transship-quick` beside the program that it stands for: whatever CRIU asks of it comes out the same.

use std::{
    fs::{self, File},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, lchown, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use nix::{
    fcntl::AT_FDCWD,
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat},
        time::TimeSpec,
    },
};
use transship::{
    criu::{
        gate_server::{GateServer, Wait},
        stand_in::ARGUMENT,
        tar::{first, flat, tools},
    },
    program::Programs,
};

const QUICK: &str = env!("CARGO_BIN_EXE_transship-quick");
const GATE: &str = env!("CARGO_BIN_EXE_transship-gate");
/// CRIU's arguments (criu/filesystems.c), up to the directory.
const CREATE: &str = "--create --gzip --no-unquote --no-wildcards --one-file-system --check-links --preserve-permissions --sparse \
                      --numeric-owner --directory";
const EXTRACT: &str = "--extract --gzip --no-unquote --no-wildcards --directory";

/// A directory as a migration makes it: our `tar`, and the quick one in front of it.
struct Tools(tempfile::TempDir);

impl Tools {
    fn new() -> Tools {
        let top = tempfile::tempdir().unwrap();
        let dir = tools(top.path(), &Programs { full: GATE.into(), quick: Some(QUICK.into()) }).unwrap();
        assert_eq!(first(&dir), top.path().join("transship-tools/quick"));
        Tools(top)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn archive(&self, tar: &str, of: &Path) -> Vec<u8> {
        let out =
            Command::new(self.path(tar)).args(CREATE.split_whitespace()).arg(of).arg(".").output().unwrap();
        assert!(out.status.success(), "{out:?}");
        out.stdout
    }

    fn extract(&self, archive: &[u8], to: &Path) -> Output {
        let file = self.path("archive");
        fs::write(&file, archive).unwrap();
        let mut tar = Command::new(self.path("transship-tools/quick/tar"));
        tar.args(EXTRACT.split_whitespace()).arg(to).stdin(File::open(file).unwrap()).output().unwrap()
    }
}

fn mkdir(path: PathBuf, mode: u32) -> PathBuf {
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    path
}

/// Mode, owner, time of modification, entries.
fn look(dir: &Path) -> (u32, u32, u32, i64, Vec<String>) {
    let meta = dir.metadata().unwrap();
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    (meta.mode(), meta.uid(), meta.gid(), meta.mtime(), names.collect())
}

#[test]
fn nothing_runs_before_it() {
    // Elf64_Ehdr: e_type at 16, e_phoff at 32, e_phnum at 56; PT_INTERP is 3, ET_EXEC 2
    let file = fs::read(QUICK).unwrap();
    let half = |at: usize| usize::from(u16::from_le_bytes(file[at..at + 2].try_into().unwrap()));
    let at = usize::try_from(u64::from_le_bytes(file[32..40].try_into().unwrap())).unwrap();
    let kinds: Vec<usize> = (0..half(56)).map(|i| half(at + i * half(54))).collect();
    assert_eq!(half(16), 2, "it has to be relocated");
    assert!(!kinds.contains(&3), "it has an interpreter: {kinds:?}");
}

#[test]
fn a_stand_in_waits_until_nobody_needs_it() {
    let mut command = Command::new(QUICK);
    command.arg(ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(child.try_wait().unwrap(), None);
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let kib = status.lines().find_map(|l| l.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")).unwrap();
    assert!(kib.parse::<u32>().unwrap() < 64, "it has memory of its own: {kib} KiB");
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn an_empty_directory_is_archived_and_comes_back() {
    let tools = Tools::new();
    for mode in [0o755, 0o1777, 0] {
        let from = mkdir(tools.path(&format!("from{mode}")), mode);
        let archive = tools.archive("transship-tools/quick/tar", &from);
        assert!(archive == tools.archive("transship-tools/tar", &from));
        let to = mkdir(tools.path(&format!("to{mode}")), 0o700);
        File::open(&to).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        let out = tools.extract(&archive, &to);
        assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
        assert_eq!(look(&to), look(&from));
    }
}

/// As a container's /dev; what is in it, with all that an archive keeps.
fn device_files(dir: &Path) {
    let root = nix::unistd::geteuid().is_root();
    let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IWGRP;
    mkdir(dir.join("shm"), 0o1777);
    mkdir(dir.join("pts"), 0o755);
    fs::write(dir.join("console"), b"").unwrap();
    symlink("/proc/self/fd", dir.join("fd")).unwrap();
    symlink("x".repeat(100), dir.join("core")).unwrap();
    nix::unistd::mkfifo(&dir.join("log"), mode).unwrap();
    let _socket = UnixListener::bind(dir.join("socket")).unwrap();
    for (name, kind, major, minor) in
        [("null", SFlag::S_IFCHR, 1, 3), ("many", SFlag::S_IFCHR, 259, 70_000), ("sda", SFlag::S_IFBLK, 8, 0)]
    {
        if root {
            mknod(&dir.join(name), kind, mode, makedev(major, minor)).unwrap();
        }
    }
    if root {
        for (name, uid, gid) in [("console", 4_000_000_000, 7), ("fd", 3, 4), ("shm", 1000, 5)] {
            lchown(dir.join(name), Some(uid), Some(gid)).unwrap();
        }
    }
    // an owner's change takes the bit away
    fs::set_permissions(dir.join("console"), PermissionsExt::from_mode(0o4755)).unwrap();
    for (name, seconds) in [("log", -5), ("fd", 1 << 33), ("shm", 1)] {
        let time = TimeSpec::new(seconds, 0);
        utimensat(AT_FDCWD, &dir.join(name), &time, &time, UtimensatFlags::NoFollowSymlink).unwrap();
    }
    File::open(dir).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
}

/// What an archive keeps of everything in a directory that has nothing below.
fn all(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<String> = entries
        .map(|path| {
            let m = path.symlink_metadata().unwrap();
            let (name, to) = (path.file_name().unwrap().to_owned(), fs::read_link(&path).ok());
            let (owner, device) = ((m.uid(), m.gid()), m.rdev());
            format!("{name:?} {:o} {owner:?} {device} {} {to:?}", m.mode(), m.mtime())
        })
        .collect();
    found.sort();
    found
}

/// Tools without the other program: what is done here is not done by that.
fn alone() -> Tools {
    let tools = Tools::new();
    fs::remove_file(tools.path("transship-tools/tar")).unwrap();
    tools
}

#[test]
fn a_directory_of_devices_and_links_is_archived_and_comes_back() {
    let (both, tools) = (Tools::new(), alone());
    let from = mkdir(tools.path("from"), 0o755);
    device_files(&from);
    let mut wanted = all(&from);
    wanted.retain(|l| !l.starts_with("\"socket\""));
    let archive = tools.archive("transship-tools/quick/tar", &from);
    assert!(archive == both.archive("transship-tools/tar", &from));
    let to = mkdir(tools.path("to"), 0o700);
    let out = tools.extract(&archive, &to);
    assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
    assert_eq!(all(&to), wanted);
    assert_eq!(to.metadata().unwrap().mtime(), 0);
    // a second time everything is there already: the other program replaces it
    assert!(!tools.extract(&archive, &to).status.success());
    let again = mkdir(both.path("again"), 0o700);
    fs::write(again.join("core"), "in the way").unwrap();
    assert!(both.extract(&archive, &again).status.success());
    assert_eq!(all(&again), wanted);
}

#[test]
fn only_what_is_mounted_in_a_directory_may_have_content() {
    let tools = alone();
    let from = mkdir(tools.path("from"), 0o755);
    let pts = mkdir(from.join("pts"), 0o755);
    fs::write(pts.join("0"), "").unwrap();
    let tar = format!("{} {CREATE} {} .", tools.path("transship-tools/quick/tar").display(), from.display());
    let sh = |line: &str| Command::new("unshare").args(["-rm", "sh", "-c", line]).output().unwrap();
    let out = sh(&tar);
    assert!(!out.status.success() && out.stdout.is_empty(), "{out:?}");
    let mounted = sh(&format!("mount -t tmpfs none {0} && mkdir {0}/below && {tar}", pts.display()));
    let names: Vec<&[u8]> = flat::read(&mounted.stdout).unwrap().map(|e| e.name).collect();
    assert_eq!(names, [&b""[..], b"pts"], "{mounted:?}");
}

#[test]
fn a_full_directory_is_the_other_programs() {
    let tools = Tools::new();
    let from = mkdir(tools.path("from"), 0o755);
    fs::write(from.join(".hidden"), "x".repeat(100_000)).unwrap();
    let archive = tools.archive("transship-tools/quick/tar", &from);
    assert!(archive == tools.archive("transship-tools/tar", &from));
    let to = mkdir(tools.path("to"), 0o700);
    let out = tools.extract(&archive, &to);
    assert!(out.status.success(), "{out:?}");
    assert_eq!(look(&to), look(&from));
    assert_eq!(fs::read(to.join(".hidden")).unwrap().len(), 100_000);
    // many names: more than one look at the directory
    let many = mkdir(tools.path("many"), 0o755);
    (0..500).for_each(|i| drop(File::create(many.join(format!("file-{i}"))).unwrap()));
    let archive = tools.archive("transship-tools/quick/tar", &many);
    assert!(archive.len() > 500 * 512);
}

#[test]
fn what_is_wrong_is_told_by_the_other_program() {
    let tools = Tools::new();
    let empty = mkdir(tools.path("empty"), 0o755);
    let mut archive = tools.archive("transship-tools/quick/tar", &empty);
    let out = tools.extract(&archive, Path::new("/proc/nowhere/at/all"));
    assert!(
        !out.status.success() && String::from_utf8_lossy(&out.stderr).contains("/proc/nowhere"),
        "{out:?}"
    );
    archive[100] ^= 1;
    let out = tools.extract(&archive, &empty);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("damaged"), "{out:?}");
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut tar = Command::new(tools.path("transship-tools/quick/tar"));
    let out = tar.args(CREATE.split_whitespace()).arg(&empty).arg(".").stdout(full).output().unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("No space"), "{out:?}");
    // and what is not ours by the stock program, which must not be found in either of our places
    let path = tools.path("transship-tools/quick/tar");
    let dir = path.parent().unwrap();
    let out = Command::new(&path)
        .env("PATH", format!("{}:/usr/bin:/bin", dir.display()))
        .arg("--version")
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains("GNU tar"), "{out:?}");
}

#[test]
fn an_action_is_answered_by_what_the_shim_has_said() {
    let top = tempfile::tempdir().unwrap();
    let at = |name: &str| top.path().join(name);
    fs::create_dir(at("quick")).unwrap();
    symlink(QUICK, at("quick/action")).unwrap();
    fs::write(at("action"), "#!/bin/sh\necho asks \"$CRTOOLS_SCRIPT_ACTION\" \"$@\"\nexit 7\n").unwrap();
    fs::set_permissions(at("action"), PermissionsExt::from_mode(0o755)).unwrap();
    let call = |stage: Option<&str>| {
        let mut script = Command::new(at("quick/action"));
        script.arg("an argument").env_remove("CRTOOLS_SCRIPT_ACTION");
        stage.map(|stage| script.env("CRTOOLS_SCRIPT_ACTION", stage));
        let out = script.output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap())
    };
    for stage in [None, Some("pre-restore"), Some("post-restore-x"), Some("network-unlock")] {
        assert_eq!(call(stage), (Some(0), String::new()), "{stage:?}");
    }
    let stage = Some("post-restore");
    assert_eq!(call(stage), (Some(7), "asks post-restore an argument\n".into()));
    for (answer, status) in [("go", 0), ("abort", 1), ("", 1), ("gone", 1)] {
        fs::write(at("answer"), answer).unwrap();
        assert_eq!(call(stage), (Some(status), String::new()), "{answer:?}");
    }
}

/// The shim's own side of the gates, with nobody but this program to ask it.
#[test]
fn an_action_asks_the_shim() {
    // longer than a socket's address may be
    let top = tempfile::tempdir().unwrap();
    let bundle = top.path().join("b".repeat(120));
    fs::create_dir(&bundle).unwrap();
    let programs = Programs { full: "/nowhere/transship-gate".into(), quick: Some(QUICK.into()) };
    let gates = || GateServer::prepare(&bundle, &programs, Path::new("/usr/sbin/criu"), "").unwrap();
    let soon = Wait::at_most(Duration::from_secs(10));
    let script = || {
        let mut script = Command::new(bundle.join("gate/quick/action"));
        script.env("CRTOOLS_SCRIPT_ACTION", "post-restore").stderr(Stdio::piped()).spawn().unwrap()
    };
    for go in [true, false] {
        let mut server = gates();
        let mut first = script();
        server.wait_restored(&soon).unwrap();
        assert_eq!(server.held_by(), Some(first.id().try_into().unwrap()));
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(first.try_wait().unwrap(), None, "it waits");
        if go { server.open_run() } else { server.refuse() }.unwrap();
        assert_eq!(first.wait().unwrap().code(), Some(i32::from(!go)));
        // CRIU's second call
        assert_eq!(script().wait().unwrap().code(), Some(i32::from(!go)));
    }
    // a shim that dies while it is asked: nothing may run
    let mut server = gates();
    let asking = script();
    server.wait_restored(&soon).unwrap();
    drop(server);
    assert!(!asking.wait_with_output().unwrap().status.success());
    // and one that is not there: told by the other program, which is not there either
    fs::remove_dir_all(bundle.join("gate")).unwrap();
    drop(gates());
    fs::remove_file(bundle.join("gate/answer")).unwrap();
    let out = script().wait_with_output().unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("missing"), "{out:?}");
}

#[test]
fn called_by_hand_it_says_what_it_is() {
    let out = Command::new(QUICK).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("not by hand"), "{out:?}");
}
