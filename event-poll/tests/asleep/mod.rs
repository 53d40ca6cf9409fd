//! Waiting for another thread to have gone to sleep.

use nix::unistd::Pid;

/// Returns once thread `tid` of this process sleeps in the kernel.
pub(crate) fn until_asleep(tid: Pid) {
    loop {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap();
        // The state follows the name, which is in brackets.
        if stat.rsplit_once(") ").unwrap().1.starts_with('S') {
            return;
        }
        std::thread::yield_now();
    }
}
