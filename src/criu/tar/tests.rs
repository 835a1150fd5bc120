use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use super::*;

/// One of everything, and names and files that do not fit into a plain header.
fn tree(dir: &Path) {
    let long = "n".repeat(120);
    std::fs::create_dir_all(dir.join(format!("sub/{long}"))).unwrap();
    std::fs::write(dir.join("file"), b"content").unwrap();
    std::fs::write(dir.join("empty"), b"").unwrap();
    std::fs::write(dir.join("sub/block"), vec![7; 512]).unwrap();
    std::fs::write(dir.join(format!("sub/{long}/f")), vec![8; 70_000]).unwrap();
    std::fs::set_permissions(dir.join("file"), std::fs::Permissions::from_mode(0o4751)).unwrap();
    std::fs::set_permissions(dir.join("sub"), std::fs::Permissions::from_mode(0o1777)).unwrap();
    std::fs::hard_link(dir.join("file"), dir.join("sub/second name")).unwrap();
    symlink("/nowhere/else", dir.join("link")).unwrap();
    symlink("x".repeat(300), dir.join("long link")).unwrap();
    nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
    let sparse = std::fs::File::create(dir.join("sparse")).unwrap();
    for i in 0..30 {
        sparse.write_all_at(&[9; 4096], i << 20).unwrap();
    }
    sparse.set_len(9 << 30).unwrap();
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::lchown(dir.join("link"), Some(3_000_000), Some(5)).unwrap();
        std::os::unix::fs::chown(dir.join("empty"), Some(1000), Some(4_000_000_000)).unwrap();
        let device = nix::sys::stat::makedev(1, 300);
        nix::sys::stat::mknod(
            &dir.join("dev"),
            nix::sys::stat::SFlag::S_IFCHR,
            nix::sys::stat::Mode::S_IRUSR,
            device,
        )
        .unwrap();
    }
    for (name, time) in [("file", 1), ("sub", 1_000_000_000), ("link", 77)] {
        let path = dir.join(name);
        let time = nix::sys::time::TimeSpec::new(time, 0);
        let follow = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
        nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &path, &time, &time, follow).unwrap();
    }
}

/// As a container's /dev.
pub(super) fn flat(dir: &Path) {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    std::fs::create_dir(dir.join("shm")).unwrap();
    std::fs::set_permissions(dir.join("shm"), std::fs::Permissions::from_mode(0o1777)).unwrap();
    std::fs::write(dir.join("console"), b"").unwrap();
    symlink("/proc/self/fd", dir.join("fd")).unwrap();
    nix::unistd::mkfifo(&dir.join("log"), Mode::S_IRUSR).unwrap();
    if nix::unistd::geteuid().is_root() {
        for (name, kind, device) in [("null", SFlag::S_IFCHR, (1, 3)), ("b", SFlag::S_IFBLK, (259, 70_000))] {
            mknod(&dir.join(name), kind, Mode::S_IRUSR, makedev(device.0, device.1)).unwrap();
        }
        std::os::unix::fs::lchown(dir.join("fd"), Some(3_000_000), Some(5)).unwrap();
    }
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o751)).unwrap();
}

/// Everything that is to be the same, by name.
pub(super) fn look(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(at) = todo.pop() {
        for entry in std::fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let m = path.symlink_metadata().unwrap();
            if m.is_dir() {
                todo.push(path.clone());
            }
            let content = match m.is_file() && m.size() < 1 << 30 {
                true => format!("{:?}", xxhash_rust::xxh3::xxh3_64(&std::fs::read(&path).unwrap())),
                false => std::fs::read_link(&path).map(|l| l.display().to_string()).unwrap_or_default(),
            };
            found.push(format!(
                "{} {:o} {}:{} {} {} links {} {content} {}",
                path.strip_prefix(dir).unwrap().display(),
                m.mode(),
                m.uid(),
                m.gid(),
                if m.is_dir() { 0 } else { m.size() },
                m.mtime(),
                if m.is_dir() { 0 } else { m.nlink() },
                m.rdev()
            ));
        }
    }
    found.sort();
    found
}

#[test]
fn a_tree_comes_back_as_it_was_from_us_and_from_stock_tar() {
    let top = tempfile::tempdir().unwrap();
    let (from, ours, theirs) = (top.path().join("a"), top.path().join("b"), top.path().join("c"));
    for dir in [&from, &ours, &theirs] {
        std::fs::create_dir(dir).unwrap();
    }
    tree(&from);
    let mut archive = Vec::new();
    write::archive(&from, &staged::Known::default(), &mut archive).unwrap();
    assert!(archive.len() < 1 << 20, "{} bytes: the holes are in it", archive.len());
    let mut want = look(&from);
    want.retain(|l| !l.starts_with("socket "));

    std::fs::write(ours.join("file"), "in the way").unwrap();
    read::extract(&ours, Path::new("/nowhere"), &archive[..]).unwrap();
    assert_eq!(look(&ours), want);
    assert!(ours.join("sparse").metadata().unwrap().blocks() * 512 < 1 << 20);

    let mut tar = Command::new("tar")
        .args(["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"])
        .arg(&theirs)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(&archive).unwrap();
    let said = tar.wait_with_output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    assert_eq!(look(&theirs), want);
}

#[test]
fn damage_and_names_that_lead_out_are_errors() {
    let top = tempfile::tempdir().unwrap();
    let from = top.path().join("a");
    std::fs::create_dir(&from).unwrap();
    std::fs::write(from.join("f"), b"x").unwrap();
    let mut archive = Vec::new();
    write::archive(&from, &staged::Known::default(), &mut archive).unwrap();
    for end in [10, 100, 600, archive.len() - 1] {
        assert!(read::extract(top.path(), Path::new("/nowhere"), &archive[..end]).is_err(), "cut at {end}");
    }
    for (name, dirs) in [("../f", true), ("/f", true), ("./link/f", false)] {
        let mut bytes = Vec::new();
        let mut out = gzip::Stored::new(&mut bytes).unwrap();
        let header = header::Header { kind: header::FILE, name: name.into(), ..Default::default() };
        if dirs {
            let top =
                header::Header { kind: header::DIR, name: "./".into(), mode: 0o700, ..Default::default() };
            out.write_all(&top.encode().unwrap()).unwrap();
        }
        out.write_all(&header.encode().unwrap()).unwrap();
        out.write_all(&[0; 1024]).unwrap();
        out.finish().unwrap();
        assert!(read::extract(&from, Path::new("/nowhere"), &bytes[..]).is_err(), "{name}");
    }
}

#[test]
fn links_lead_to_nothing_outside() {
    let top = tempfile::tempdir().unwrap();
    let [to, node] = ["to", "node"].map(|n| top.path().join(n));
    for dir in [&to, &node] {
        std::fs::create_dir(dir).unwrap();
    }
    std::fs::write(node.join("victim"), b"x").unwrap();
    let header = |kind, name: &str, target: &str| header::Header {
        kind,
        name: name.into(),
        target: target.into(),
        mode: 0o755,
        ..Default::default()
    };
    let extract = |entries: &[header::Header]| {
        let mut bytes = Vec::new();
        let mut out = gzip::Stored::new(&mut bytes).unwrap();
        for entry in entries {
            out.write_all(&entry.encode().unwrap()).unwrap();
        }
        out.write_all(&[0; 1024]).unwrap();
        out.finish().unwrap();
        let result = read::extract(&to, Path::new("/nowhere"), &bytes[..]);
        let victim = node.join("victim").metadata().unwrap();
        assert_eq!((victim.nlink(), victim.mode() & 0o777, victim.uid()), (1, 0o644, 0));
        assert_eq!(std::fs::read_dir(&node).unwrap().count(), 1);
        result
    };
    let dir = || header(header::DIR, "./", "");
    let out = || header(header::SYMLINK, "./out", &node.display().to_string());
    extract(&[dir(), out()]).unwrap();
    assert!(extract(&[dir(), out(), header(header::LINK, "./l", "./out/victim")]).is_err(), "a link's way");
    assert!(extract(&[dir(), out(), header(header::LINK, "./l", "../node/victim")]).is_err());
    assert!(extract(&[dir(), out(), header(header::FILE, "./out/new", "")]).is_err());
    // in the link's place, not behind it
    extract(&[dir(), out(), header(header::DIR, "./out", ""), header(header::FILE, "./out/new", "")])
        .unwrap();
    assert!(to.join("out/new").exists());
    assert!(extract(&[dir(), out()]).is_err(), "a directory does not become a link");
}

#[test]
fn no_link_leads_out_and_no_size_is_too_large() {
    let top = tempfile::tempdir().unwrap();
    let root = top.path().join("root");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(top.path().join("secret"), b"x").unwrap();
    let header = |kind: u8, name: &str, target: &str| header::Header {
        kind,
        name: name.into(),
        target: target.into(),
        mode: 0o700,
        ..Default::default()
    };
    let dir = header(header::DIR, "./", "");
    let symlink = header(header::SYMLINK, "./a", "..");
    let through = header(header::LINK, "./b", "./a/secret");
    let mut huge = header(header::SPARSE, "./f", "");
    huge.sparse = Some((vec![(0, u64::MAX), (0, 1)], 1));
    for (bad, why) in
        [([&dir, &symlink, &through], "no directory"), ([&dir, &symlink, &huge], "not its size")]
    {
        let mut bytes = Vec::new();
        let mut out = gzip::Stored::new(&mut bytes).unwrap();
        bad.iter().for_each(|h| out.write_all(&h.encode().unwrap()).unwrap());
        out.write_all(&[0; 1024]).unwrap();
        out.finish().unwrap();
        let e = read::extract(&root, Path::new("/nowhere"), &bytes[..]).unwrap_err();
        assert!(format!("{e:#}").contains(why), "{e:#}");
    }
    assert_eq!(top.path().join("secret").metadata().unwrap().nlink(), 1);
}

#[test]
fn only_what_criu_asks_for_is_done_here() {
    let asked = |line: &'static str| job(line.split(' ').map(str::as_bytes));
    let create = "--create --gzip --no-unquote --no-wildcards --one-file-system --check-links --preserve-permissions --sparse \
                  --numeric-owner --directory /proc/self/fd/0 .";
    assert_eq!(asked(create), Some(Job::Create(b"/proc/self/fd/0")));
    let extract = "--extract --gzip --no-unquote --no-wildcards --directory /x/y";
    assert_eq!(asked(extract), Some(Job::Extract(b"/x/y")));
    for other in
        ["--create --gzip .", "--extract --bzip2 --directory /x", "--extract --directory /x file", "-xf a"]
    {
        assert_eq!(asked(other), None, "{other}");
    }
    assert!(is_ours(Path::new("/b/gate/transship-tools/tar")) && !is_ours(Path::new("/usr/bin/tar")));
}

#[test]
fn what_the_destination_has_is_only_named_and_comes_back_whole() {
    use crate::rootfs::content::{self, How};
    let top = tempfile::tempdir().unwrap();
    let [from, to, files] = ["a", "b", "staged"].map(|n| top.path().join(n));
    for dir in [&from, &to, &files] {
        std::fs::create_dir(dir).unwrap();
    }
    tree(&from);
    let long = from.join(format!("sub/{}/f", "n".repeat(120)));
    let mut all = Vec::new();
    for (id, path) in [&long, &from.join("file")].into_iter().enumerate() {
        let (file, meta) = (File::open(path).unwrap(), path.metadata().unwrap());
        let (size, block, seed) = (meta.size(), 4096, 9);
        let blocks = content::scan(&file, &How { size, block, seed, threads: 1 }, &|_, _, _| Ok(())).unwrap();
        let reference =
            staged::Reference { id: id as u64, size, block, seed, digest: content::digest(size, &blocks) };
        let (key, mtime) = ((meta.dev(), meta.ino()), (meta.mtime(), meta.mtime_nsec()));
        all.push(staged::Staged { key, mtime, reference });
        std::fs::copy(path, files.join(staged::file_name(id as u64))).unwrap();
    }
    let (mut plain, mut archive) = (Vec::new(), Vec::new());
    write::archive(&from, &staged::Known::default(), &mut plain).unwrap();
    write::archive(&from, &staged::Known::new(all), &mut archive).unwrap();
    assert!(archive.len() + 69_000 < plain.len(), "{} and {} bytes", archive.len(), plain.len());
    read::extract(&to, &files, &archive[..]).unwrap();
    let mut want = look(&from);
    want.retain(|l| !l.starts_with("socket "));
    assert_eq!(look(&to), want);
    assert!(read::extract(&to, &files, &archive[..]).is_err(), "it was taken");
}
