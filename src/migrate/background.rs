//! Working behind the container's back: while it runs, whoever copies its memory yields the processor to it.
//!
//! A higher nice value, not another scheduling class: on a node that is never idle the migration must still come to its end. Only
//! where the way back is allowed, because in the freeze and after it everybody waits for us. A thread that is started meanwhile
//! inherits it: none may be that lives on. What must not wait (stopping tasks to look which pages they wrote) is not done in here.
//!
//! It tells among threads that share a cgroup's part of the processor. Between cgroups (a container's and that of containerd, as
//! systemd makes them) their own weights decide, which are the operator's.

use std::marker::PhantomData;

use nix::errno::Errno;

/// The nice value in the background: a tenth of the weight of a thread at 0. Measured on two cores that others used, too: a writer at
/// full speed was slowed down by 60 % without this, by 46 % at 5, by 15 % at 10, where the rounds took about twice as long.
const NICE: i32 = 10;

/// The calling thread is in the background while this lives.
#[derive(Debug)]
pub(super) struct Background {
    /// The nice value to go back to; none if nothing was changed.
    before: Option<i32>,
    /// It belongs to its thread.
    not_send: PhantomData<*const ()>,
}

impl Background {
    /// Enters it, if the way back is certain.
    pub fn enter() -> Background {
        let now = get();
        let before = now.and_then(|now| {
            let to = lowered(now, may_raise())?;
            set(to).then_some(now)
        });
        Background { before, not_send: PhantomData }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && !set(before)
        {
            log::warn!("this thread stays at nice {NICE}: {}", std::io::Error::last_os_error());
        }
    }
}

/// The nice value for the background; none if it is there already or could not come back.
fn lowered(now: i32, may_raise: bool) -> Option<i32> {
    (may_raise && now < NICE).then_some(NICE)
}

/// May this thread lower its nice value again? Asked of its capabilities: an attempt would tell only when it is too late.
fn may_raise() -> bool {
    caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_NICE).unwrap_or(false)
}

/// The nice value of the calling thread: with Linux, "process 0" is the thread.
fn get() -> Option<i32> {
    Errno::clear();
    // SAFETY: a plain system call.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    // -1 is a nice value, too
    (nice != -1 || Errno::last_raw() == 0).then_some(nice)
}

fn set(nice: i32) -> bool {
    // SAFETY: a plain system call; it changes the calling thread only.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_goes_where_he_cannot_come_back_from() {
        assert_eq!(lowered(0, true), Some(NICE));
        assert_eq!(lowered(-5, true), Some(NICE));
        assert_eq!(lowered(0, false), None);
        assert_eq!(
            (lowered(NICE, true), lowered(19, true)),
            (None, None),
            "an operator who said more means it"
        );
    }

    #[test]
    fn it_ends_with_the_value() {
        std::thread::spawn(|| {
            let before = get().unwrap();
            let background = Background::enter();
            let inside = get().unwrap();
            match may_raise() && before < NICE {
                true => assert_eq!(inside, NICE),
                false => assert_eq!(inside, before),
            }
            drop(background);
            assert_eq!(get().unwrap(), before);
        })
        .join()
        .unwrap();
    }
}
