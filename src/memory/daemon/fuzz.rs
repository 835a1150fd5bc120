//! The fuzz target of what CRIU, the kernel and the tasks tell the page daemon: see [`crate::fuzz`].

/// The handshake with descriptors of all kinds, the messages of a userfaultfd, and the book of what waits where.
pub mod lazy_pages {
    use std::fs::File;
    use std::io::IoSlice;
    use std::ops::Range;
    use std::os::fd::{AsRawFd, OwnedFd};

    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
    };

    use super::super::handshake::{Connection, FINISHED, Said};
    use super::super::pieces::{Piece, Pieces};
    use super::super::uffd::{self, Event};
    use crate::fuzz::Input;
    use crate::memory::RangeSet;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        match input.byte() {
            0 => handshake(&mut input),
            1 => messages(&mut input),
            _ => book(&mut input),
        }
    }

    /// A userfaultfd of our own, if the kernel gives one to everybody.
    fn userfaultfd() -> Option<OwnedFd> {
        use std::os::fd::FromRawFd;
        // SAFETY: the call takes flags only (UFFD_USER_MODE_ONLY among them).
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1) };
        // SAFETY: the kernel has just made this descriptor for us.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Words, cut anywhere, with no descriptor, one, or several, of a userfaultfd or of something else.
    fn handshake(input: &mut Input<'_>) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (to, from) =
            socketpair(AddressFamily::Unix, SockType::Stream, None, flags).expect("a pair of sockets");
        let null = File::open("/dev/null").expect("/dev/null");
        let mut connection = Connection::new(from).expect("a connection");
        let mut tasks = 0;
        while !input.is_empty() {
            let how = input.byte();
            let bytes = input.take(usize::from(how >> 4));
            let uffd = (how & 4 == 4).then(userfaultfd).flatten();
            let fds = match (&uffd, how & 3) {
                (_, 0) => vec![],
                (Some(uffd), n) => vec![uffd.as_raw_fd(); n.into()],
                (None, n) => vec![null.as_raw_fd(); n.into()],
            };
            let rights = [ControlMessage::ScmRights(&fds)];
            let rights: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
            if sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_DONTWAIT, None)
                .is_err()
            {
                break;
            }
            loop {
                match connection.read() {
                    Ok(None) => break,
                    Ok(Some(Said::Task { pid, .. })) => {
                        assert!(pid > 0 && pid <= i32::MAX as u64 && pid != FINISHED as u64);
                        tasks += 1;
                    }
                    Ok(Some(Said::Finished)) => {}
                    Ok(Some(Said::End)) => panic!("the other end is open"),
                    // a restore that says such things has failed
                    Err(_) => return,
                }
            }
        }
        drop(to);
        assert!(matches!(connection.read(), Ok(Some(Said::End)) | Err(_)), "{tasks} tasks, and no end");
    }

    /// Messages as the kernel lays them out; a fork's has a descriptor that is the kernel's to make.
    fn messages(input: &mut Input<'_>) {
        while !input.is_empty() {
            let mut message = [0; 32];
            let bytes = input.take(32);
            message[..bytes.len()].copy_from_slice(bytes);
            if message[0] != 0x13 {
                match uffd::decode(&message) {
                    Ok(Event::Fault(at)) => assert_eq!(at.to_ne_bytes(), message[16..24]),
                    Ok(Event::Fork(_)) => panic!("a fork out of nothing"),
                    _ => {}
                }
            }
        }
    }

    /// Pages of a small memory.
    const PAGES: u64 = 64;
    const P: u64 = 4096;

    fn bytes(pages: &Range<u64>) -> Range<u64> {
        pages.start * P..pages.end * P
    }

    fn pages(piece: &Piece) -> Range<u64> {
        piece.start / P..piece.end / P
    }

    /// Changes of a task's memory, beside a model that has an entry for each page.
    fn book(input: &mut Input<'_>) {
        let mut set = RangeSet::new();
        let first = input.number();
        (0..PAGES).filter(|n| first >> n & 1 == 1).for_each(|n| set.insert(bytes(&(n..n + 1))));
        let mut pieces = Pieces::new(set.clone());
        let mut model: Vec<Option<u64>> = (0..2 * PAGES).map(|n| set.contains(n * P).then_some(n)).collect();
        while !input.is_empty() {
            let (what, a, b, c) = (input.byte(), input.byte(), input.byte(), input.byte());
            let (start, to) = (u64::from(a) % PAGES, u64::from(c) % PAGES);
            let end = (start + u64::from(b) % PAGES).min(PAGES);
            let window = start..end;
            let waiting: Vec<(u64, u64)> =
                window.clone().filter_map(|n| model[n as usize].map(|image| (n, image))).collect();
            match what % 5 {
                0 => {
                    let taken = pieces.take(bytes(&window));
                    let each =
                        taken.iter().flat_map(|p| pages(p).map(|n| (n, (p.image + n * P - p.start) / P)));
                    assert_eq!(each.collect::<Vec<_>>(), waiting);
                    window.for_each(|n| model[n as usize] = None);
                }
                1 => {
                    pieces.remove(bytes(&window));
                    window.for_each(|n| model[n as usize] = None);
                }
                2 => {
                    pieces.remap(start * P, to * P, (end - start) * P);
                    window.clone().for_each(|n| model[n as usize] = None);
                    (to..to + (end - start)).for_each(|n| model[n as usize] = None);
                    waiting.iter().for_each(|(n, image)| model[(n - start + to) as usize] = Some(*image));
                }
                3 => {
                    let mut found: Vec<u64> =
                        pieces.take_images(bytes(&window)).iter().flat_map(pages).collect();
                    found.sort_unstable();
                    let at = |n: &u64| model[*n as usize].is_some_and(|image| window.contains(&image));
                    let want: Vec<u64> = (0..2 * PAGES).filter(at).collect();
                    assert_eq!(found, want);
                    want.iter().for_each(|n| model[*n as usize] = None);
                }
                _ => {
                    pieces.insert(Piece { start: start * P, end: end * P, image: to * P });
                    window.for_each(|n| model[n as usize] = Some(n - start + to));
                }
            }
            let now = (0..2 * PAGES).map(|n| pieces.at(n * P).map(|p| (p.image + (n * P - p.start)) / P));
            assert_eq!(now.collect::<Vec<_>>(), model);
            let count = model.iter().flatten().count() as u64;
            assert_eq!((pieces.bytes(), pieces.is_empty()), (count * P, count == 0));
            let group = pieces.group(start * P, 8 * P);
            assert!(group.windows(2).all(|p| p[0].images().end <= p[1].image && p[0].end <= p[1].start));
            assert_eq!(
                pieces.next(start * P).map(|p| p.start / P),
                (start..2 * PAGES).find(|n| model[*n as usize].is_some())
            );
        }
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let (pid, zombie, end) = (7i32.to_ne_bytes(), (-9i32).to_ne_bytes(), FINISHED.to_ne_bytes());
        let whole = [&[0, 0x40][..], &pid, &[0x15, 0], &[0x40], &zombie, &[0x40], &end].concat();
        let cut = [&[0, 0x20][..], &pid[..2], &[0x20], &pid[2..], &[0x10, 1]].concat();
        let other = [&[0, 0x40][..], &pid, &[0x13, 0]].concat();
        let message = |kind: u8, words: [u64; 3]| {
            let words: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
            [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &words].concat()
        };
        let events = [
            message(0x12, [0, 0x7000, 0]),
            message(0x14, [0x1000, 0x2000, 0x3000]),
            message(0x15, [0x1000, 0x2000, 0]),
            message(0x16, [0x1000, 0x2000, 0]),
        ];
        let book = [
            &[2][..],
            &[0xff, 0, 0xff, 0, 0xf0, 0xf, 0, 1],
            &[2, 0, 8, 40],
            &[3, 2, 5, 0],
            &[4, 9, 3, 0],
            &[0, 0, 63, 0],
        ];
        vec![whole, cut, other, [&[1][..], &events.concat()].concat(), book.concat()]
    }
}
