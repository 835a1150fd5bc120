//! What is done here, and what is the full program's.

use core::ffi::CStr;

use transship::criu::gate::{ACTION, ANSWER, GO, HELLO, POST_RESTORE, SOCKET, STAGE};
use transship::criu::stand_in;
use transship::criu::tar;
use transship::program::QUICK_DIR;

use super::archive::archive;
use super::start::Start;
use super::sys::{self, Fd, STDERR, STDIN, exit};

/// Longer than a path may be, with its nul.
pub const PATH: usize = 4097;
pub type Path = [u8; PATH];

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
pub fn join<'a>(to: &'a mut Path, pieces: &[&[u8]]) -> Option<&'a CStr> {
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
pub fn string(bytes: &[u8]) -> Option<&CStr> {
    CStr::from_bytes_until_nul(bytes).ok()
}

/// Is there to be looked at, until somebody closes stdin.
fn wait() -> u8 {
    while STDIN.read(&mut [0]).is_some_and(|n| n > 0) {}
    0
}

/// CRIU's action script: the answer to CRIU. `dir` is where the gates are.
fn action(start: &Start, dir: &[u8]) -> Option<u8> {
    if start.variable(STAGE.as_bytes()) != Some(POST_RESTORE.as_bytes()) {
        return Some(0);
    }
    // CRIU asks twice
    if let Some(known) = answer(dir) {
        return Some(known);
    }
    ask(dir)?;
    answer(dir)
}

/// What the shim has answered.
fn answer(dir: &[u8]) -> Option<u8> {
    let mut path: Path = [0; PATH];
    let file = Fd::open(join(&mut path, &[dir, b"/", ANSWER.as_bytes()])?, 0)?;
    let mut answer = [0; 8];
    let n = file.read(&mut answer)?;
    Some(u8::from(answer.get(..n)? != GO))
}

/// Says that it is time to answer, and waits until that is done.
fn ask(dir: &[u8]) -> Option<()> {
    let mut path: Path = [0; PATH];
    // an address is too short for most paths; from there it is a name. The full program has to be found from there as well
    let at = Fd::open(join(&mut path, &[dir])?, libc::O_DIRECTORY).filter(|_| dir.starts_with(b"/"))?;
    at.enter()?;
    let shim = Fd::connect(SOCKET.as_bytes())?;
    shim.write(HELLO)?;
    while shim.read(&mut [0; 64])? > 0 {}
    Some(())
}
