//! What runs in a pod's sandbox: holds its namespaces, and where the pod shares one pid namespace reaps what nobody else does. Ends when it
//! is asked to.

use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: an all-zero set is valid for sigemptyset; all pointers are to it, or null where null is allowed.
    unsafe {
        let mut waited: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut waited);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
            libc::sigaddset(&mut waited, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &waited, std::ptr::null_mut());
        loop {
            match libc::sigwaitinfo(&waited, std::ptr::null_mut()) {
                libc::SIGCHLD => while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {},
                libc::SIGTERM | libc::SIGINT => return ExitCode::SUCCESS,
                // a freeze by CRIU interrupts it
                _ => {}
            }
        }
    }
}
