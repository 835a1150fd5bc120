//! CRIU's `tar`, for directories that [`flat`] describes.

use core::ffi::CStr;

use transship::criu::tar::call::{Job, job};
use transship::criu::tar::flat::{self, Entry, Kind, LEN, TEXT, Writer};

use super::run::{PATH, Path, join, string};
use super::start::Start;
use super::sys::{Fd, STDERR, STDIN, STDOUT, device, exit};

/// None: nothing was done, or nothing that cannot be done once more.
pub fn archive(start: &Start) -> Option<()> {
    let mut path: Path = [0; PATH];
    let mut open = |dir| Fd::open(join(&mut path, &[dir])?, libc::O_DIRECTORY);
    match job(start.args())? {
        Job::Create(dir) => create(open(dir)?),
        Job::Extract(dir) => extract(open(dir)?),
    }
}

// the buffer is on the stack: not in the frame of those who wait for hours
#[inline(never)]
fn create(dir: Fd) -> Option<()> {
    let mut space = [0; LEN];
    let mut archive = Writer::new(&mut space);
    let own = dir.look(c"")?;
    archive.add(&entry(b"", Kind::Directory, &own))?;
    dir.each(|name| {
        let is = dir.look(name)?;
        let mut target = [0; TEXT];
        let device = (is.stx_rdev_major, is.stx_rdev_minor);
        let kind = match u32::from(is.stx_mode) & libc::S_IFMT {
            // what is mounted there belongs to another archive
            libc::S_IFDIR if on(&is) != on(&own) || is_empty(dir, name)? => Kind::Directory,
            // CRIU makes it itself
            libc::S_IFSOCK => return Some(()),
            _ if is.stx_nlink > 1 => return None,
            libc::S_IFREG if is.stx_size == 0 => Kind::Empty,
            libc::S_IFLNK => Kind::Symlink(dir.target(name, &mut target)?),
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFCHR => Kind::Char(device.0, device.1),
            libc::S_IFBLK => Kind::Block(device.0, device.1),
            _ => return None,
        };
        archive.add(&entry(name.to_bytes(), kind, &is))
    })?;
    let at = STDOUT.position();
    if STDOUT.write(archive.finish()).is_some() {
        return Some(());
    }
    // the full program says what is wrong, if it can begin where we have begun
    if at.is_none() || STDOUT.position() != at {
        STDERR.write(b"tar: half of an archive could not be written\n");
        exit(1);
    }
    None
}

fn entry<'a>(name: &'a [u8], kind: Kind<'a>, is: &libc::statx) -> Entry<'a> {
    let mode = u32::from(is.stx_mode) & 0o7777;
    Entry { name, kind, mode, uid: is.stx_uid, gid: is.stx_gid, mtime: is.stx_mtime.tv_sec }
}

/// The file system.
fn on(is: &libc::statx) -> (u32, u32) {
    (is.stx_dev_major, is.stx_dev_minor)
}

fn is_empty(dir: Fd, name: &CStr) -> Option<bool> {
    let mut empty = true;
    let within = dir.open_in(name, libc::O_DIRECTORY | libc::O_NOFOLLOW)?;
    within.each(|_| {
        empty = false;
        Some(())
    })?;
    Some(empty)
}

#[inline(never)]
fn extract(dir: Fd) -> Option<()> {
    // one more byte than there may be
    let mut space = [0; LEN + 1];
    let filled = STDIN.read_at(&mut space, STDIN.position()?)?;
    let mut entries = flat::read(space.get(..filled)?)?;
    let own = entries.next()?;
    for entry in entries {
        let mut name = [0; TEXT];
        make(dir, terminated(&mut name, entry.name)?, &entry)?;
    }
    // last: what is made in it changes its time
    attributes(dir, c"", &own)
}

/// What is there already under this name is the full program's to replace.
fn make(dir: Fd, name: &CStr, entry: &Entry) -> Option<()> {
    match entry.kind {
        Kind::Directory => dir.make_directory(name)?,
        Kind::Symlink(to) => {
            let mut target = [0; TEXT];
            dir.make_symlink(name, terminated(&mut target, to)?)?;
        }
        Kind::Empty => dir.make_node(name, libc::S_IFREG, 0)?,
        Kind::Fifo => dir.make_node(name, libc::S_IFIFO, 0)?,
        Kind::Char(major, minor) => dir.make_node(name, libc::S_IFCHR, device(major, minor)?)?,
        Kind::Block(major, minor) => dir.make_node(name, libc::S_IFBLK, device(major, minor)?)?,
    }
    attributes(dir, name, entry)
}

/// Of something that was made here, or, without a name, of the directory itself.
fn attributes(dir: Fd, name: &CStr, entry: &Entry) -> Option<()> {
    dir.own(name, entry.uid, entry.gid)?;
    match entry.kind {
        Kind::Symlink(_) => {}
        _ if name.is_empty() => dir.permit(entry.mode)?,
        _ => dir.permit_in(name, entry.mode)?,
    }
    dir.date(name, entry.mtime)
}

fn terminated<'a>(to: &'a mut [u8; TEXT], text: &[u8]) -> Option<&'a CStr> {
    to.get_mut(..text.len())?.copy_from_slice(text);
    string(to)
}
