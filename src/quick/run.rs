//! What is done here, and what is the full program's.

use core::ffi::CStr;

use transship::criu::gate::{ACTION, ANSWER, GO, POST_RESTORE, STAGE};
use transship::criu::stand_in;
use transship::criu::tar;
use transship::criu::tar::call::{Job, job};
use transship::criu::tar::empty::{self, Directory};
use transship::program::QUICK_DIR;

use super::start::Start;
use super::sys::{self, Fd, STDERR, STDIN, STDOUT, exit};

/// Longer than a path may be, with its nul.
const PATH: usize = 4097;
type Path = [u8; PATH];

/// Does it, or becomes who does.
pub fn run(start: &Start) -> ! {
    if let Some((dir, name)) = place(start.path) {
        let status = if name == ACTION.as_bytes() {
            action(start, dir)
        } else if name == tar::NAME.as_bytes() {
            archive(start).map(|()| 0)
        } else {
            None
        };
        if let Some(status) = status {
            exit(status);
        }
        let mut path: Path = [0; PATH];
        if let Some(full) = join(&mut path, &[dir, b"/", name]) {
            // SAFETY: the vectors are the kernel's.
            unsafe { sys::become_program(full, start.argv, start.envp) };
        }
    } else if start.args().eq([stand_in::ARGUMENT.as_bytes()]) {
        exit(wait());
    }
    STDERR.write(b"transship-quick is called by CRIU while a container is moved, not by hand; or the program that it stands for is missing.\n");
    exit(1)
}

/// Of `DIR/quick/NAME`, DIR and NAME.
fn place(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let (quick, name) = split(path)?;
    let (dir, quick) = split(quick)?;
    (quick == QUICK_DIR.as_bytes()).then_some((dir, name))
}

fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = path.iter().rposition(|b| *b == b'/')?;
    Some((path.get(..at)?, path.get(at + 1..)?))
}

/// The pieces as one string that ends with nul.
fn join<'a>(to: &'a mut Path, pieces: &[&[u8]]) -> Option<&'a CStr> {
    let mut at = 0;
    for piece in pieces {
        let end = at + piece.len();
        to.get_mut(at..end)?.copy_from_slice(piece);
        at = end;
    }
    *to.get_mut(at)? = 0;
    string(to)
}

/// The string up to the first nul.
fn string(bytes: &[u8]) -> Option<&CStr> {
    CStr::from_bytes_until_nul(bytes).ok()
}

/// Is there to be looked at, until somebody closes stdin.
fn wait() -> u8 {
    while STDIN.read(&mut [0]).is_some_and(|n| n > 0) {}
    0
}

/// CRIU's action script: the answer to CRIU, if it is known. `dir` is where the gates are.
fn action(start: &Start, dir: &[u8]) -> Option<u8> {
    if start.variable(STAGE.as_bytes()) != Some(POST_RESTORE.as_bytes()) {
        return Some(0);
    }
    // CRIU asks twice; what the shim has answered lies here
    let mut path: Path = [0; PATH];
    let file = Fd::open(join(&mut path, &[dir, b"/", ANSWER.as_bytes()])?, 0)?;
    let mut answer = [0; 8];
    let n = file.read(&mut answer)?;
    Some(u8::from(answer.get(..n)? != GO))
}

/// CRIU's `tar`, for directories with nothing in them. None: nothing was done, or nothing that cannot be done once more.
fn archive(start: &Start) -> Option<()> {
    let mut path: Path = [0; PATH];
    match job(start.args())? {
        Job::Create(dir) => {
            let dir = Fd::open(join(&mut path, &[dir])?, libc::O_DIRECTORY)?;
            if !is_empty(dir)? {
                return None;
            }
            let is = dir.look()?;
            let (mode, mtime) = (u32::from(is.stx_mode) & 0o7777, is.stx_mtime.tv_sec);
            let archive = empty::write(Directory { mode, uid: is.stx_uid, gid: is.stx_gid, mtime });
            let at = STDOUT.position();
            if STDOUT.write(&archive).is_some() {
                return Some(());
            }
            // the full program says what is wrong, if it can begin where we have begun
            if at.is_none() || STDOUT.position() != at {
                STDERR.write(b"tar: half of an archive could not be written\n");
                exit(1);
            }
            None
        }
        Job::Extract(dir) => {
            let at = STDIN.position()?;
            let mut archive = [0; empty::LEN];
            let mut one_more = [0; 1];
            let whole = STDIN.read_at(&mut archive, at)? == empty::LEN
                && STDIN.read_at(&mut one_more, at + empty::LEN)? == 0;
            let Directory { mode, uid, gid, mtime } = empty::read(&archive).filter(|_| whole)?;
            let dir = Fd::open(join(&mut path, &[dir])?, libc::O_DIRECTORY)?;
            dir.own(uid, gid)?;
            dir.permit(mode)?;
            dir.date(mtime)
        }
    }
}

/// Nothing in it but itself and the directory above.
fn is_empty(dir: Fd) -> Option<bool> {
    let mut entries = [0; 1024];
    // inode and offset, the record's length, a type, the name and its nul (getdents64(2))
    const LENGTH: usize = 16;
    const NAME: usize = 19;
    loop {
        let filled = dir.entries(&mut entries)?;
        if filled == 0 {
            return Some(true);
        }
        let mut rest = entries.get(..filled)?;
        while !rest.is_empty() {
            let length = u16::from_ne_bytes([*rest.get(LENGTH)?, *rest.get(LENGTH + 1)?]);
            let name = string(rest.get(NAME..length.into())?)?.to_bytes();
            if name != b"." && name != b".." {
                return Some(false);
            }
            rest = rest.get(length.into()..)?;
        }
    }
}
