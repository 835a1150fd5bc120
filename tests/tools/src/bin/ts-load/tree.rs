//! Many processes: the first asks its children in turn, through pipes, to write one of their pages. A child says how many it has
//! written; an answer that is lost, doubled or old is seen.

use std::io::{Error, Read, Write};

use crate::drive::Work;
use crate::pages::{PAGE, Pages, Verdict};

struct Child {
    ask: std::fs::File,
    answer: std::fs::File,
    written: u64,
}

pub struct Tree {
    children: Vec<Child>,
    next: usize,
    wrong: u64,
}

fn pipe() -> Result<(std::fs::File, std::fs::File), String> {
    use std::os::fd::FromRawFd;
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(format!("pipe: {}", Error::last_os_error()));
    }
    // SAFETY: both were just opened and belong to nobody else.
    Ok(unsafe { (std::fs::File::from_raw_fd(fds[0]), std::fs::File::from_raw_fd(fds[1])) })
}

/// The life of a child: ends when the parent's end of the pipe does.
fn child(mut questions: std::fs::File, mut answers: std::fs::File, bytes: usize) -> Result<(), String> {
    let mut pages = Pages::new(bytes)?;
    let (mut written, mut question) = (0u64, [0u8]);
    while questions.read_exact(&mut question).is_ok() {
        let answer = match question[0] {
            b'w' => {
                pages.write(written as usize % pages.count());
                written += 1;
                written
            }
            _ => pages.verify().wrong,
        };
        answers.write_all(&answer.to_le_bytes()).map_err(|e| e.to_string())?;
    }
    Ok(())
}

impl Tree {
    pub fn new(count: usize, bytes: usize) -> Result<Self, String> {
        let mut children = Vec::new();
        for _ in 0..count {
            let ((questions, ask), (answer, answers)) = (pipe()?, pipe()?);
            // SAFETY: this process has one thread, so the child may do as it likes.
            match unsafe { libc::fork() } {
                -1 => return Err(format!("fork: {}", Error::last_os_error())),
                0 => {
                    drop((ask, answer));
                    // the elder siblings' pipes: they would never end otherwise
                    drop(children);
                    let code = i32::from(child(questions, answers, bytes).is_err());
                    std::process::exit(code);
                }
                _ => children.push(Child { ask, answer, written: 0 }),
            }
        }
        Ok(Self { children, next: 0, wrong: 0 })
    }
}

impl Child {
    fn ask(&mut self, question: u8) -> Result<u64, String> {
        let mut answer = [0; 8];
        self.ask.write_all(&[question]).map_err(|e| format!("a child: {e}"))?;
        self.answer.read_exact(&mut answer).map_err(|e| format!("a child: {e}"))?;
        Ok(u64::from_le_bytes(answer))
    }
}

impl Work for Tree {
    fn step(&mut self) -> Result<(), String> {
        let child = &mut self.children[self.next];
        child.written += 1;
        self.wrong += u64::from(child.ask(b'w')? != child.written);
        self.next = (self.next + 1) % self.children.len();
        Ok(())
    }

    fn verify(&mut self) -> Result<Verdict, String> {
        let mut wrong = self.wrong;
        let mut named = Vec::new();
        if wrong > 0 {
            named.push(format!("{wrong} answers were not the expected ones"));
        }
        for (i, child) in self.children.iter_mut().enumerate() {
            let bad = child.ask(b'v')?;
            wrong += bad;
            if bad > 0 {
                named.push(format!("child {i}: {bad} pages (of {PAGE} bytes)"));
            }
        }
        Ok(Verdict { pages: self.children.len(), wrong, named })
    }
}
