//! Counts a program's system calls, as `strace -c -f` does, so that tests can rely on it.

// UNSAFETY: the child asks to be traced between fork and exec.
#![expect(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::Error;

/// How often each system call was entered, by number (`libc::SYS_*`).
pub type Counts = BTreeMap<libc::c_long, u64>;

/// Runs `command` to its end and counts the system calls of all its threads. Timing under the
/// tracer is not that of a free run: what depends on which thread sleeps first is only indicative.
///
/// # Errors
///
/// The host forbids tracing one's own children (some sandboxes do), or the command failed.
pub fn count(mut command: Command) -> Result<Counts, Error> {
    // SAFETY: PTRACE_TRACEME is one system call, allowed between fork and exec.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(io::Error::from)) };
    // A group of its own, so that its threads can be waited for, and no other child of this process.
    command.process_group(0);
    let mut child = command.spawn()?;
    let main = Pid::from_raw(child.id().cast_signed());
    let counts = trace(main);
    if counts.is_err() {
        // Neither leave it stopped nor let the caller wait for it.
        let _ = child.kill();
        let _ = child.wait();
    }
    counts
}

fn trace(main: Pid) -> Result<Counts, Error> {
    // Stopped at its exec.
    match waitpid(main, None)? {
        WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
        status => return Err(format!("the program did not start: {status:?}").into()),
    }
    ptrace::setoptions(
        main,
        ptrace::Options::PTRACE_O_TRACESYSGOOD
            | ptrace::Options::PTRACE_O_TRACECLONE
            | ptrace::Options::PTRACE_O_EXITKILL,
    )?;
    ptrace::syscall(main, None)?;

    let group = Pid::from_raw(-main.as_raw());
    let mut counts = Counts::new();
    // Whether each thread is inside a system call: stops come at entry and exit by turns.
    let mut inside: HashMap<Pid, bool> = HashMap::from([(main, false)]);
    loop {
        let status = waitpid(group, Some(WaitPidFlag::__WALL))?;
        let (pid, signal) = match status {
            WaitStatus::PtraceSyscall(pid) => {
                let inside = inside.entry(pid).or_insert(false);
                *inside = !*inside;
                if *inside {
                    *counts.entry(number(pid)?).or_default() += 1;
                }
                (pid, None)
            }
            WaitStatus::Exited(pid, 0) if pid == main => return Ok(counts),
            WaitStatus::Exited(pid, code) if pid == main => {
                return Err(format!("the program exited with {code}").into());
            }
            WaitStatus::Signaled(pid, signal, _) if pid == main => {
                return Err(format!("the program was killed by {signal:?}").into());
            }
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) => {
                inside.remove(&pid);
                continue;
            }
            // A thread is born: its own first stop is a SIGSTOP that the tracer swallows.
            WaitStatus::PtraceEvent(pid, ..) => (pid, None),
            WaitStatus::Stopped(pid, Signal::SIGSTOP) if !inside.contains_key(&pid) => {
                inside.insert(pid, false);
                (pid, None)
            }
            WaitStatus::Stopped(pid, signal) => (pid, Some(signal)),
            _ => continue,
        };
        match ptrace::syscall(pid, signal) {
            // A thread may be killed by another's exit_group while it is stopped.
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn number(pid: Pid) -> Result<libc::c_long, Error> {
    let info = ptrace::syscall_info(pid)?;
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return Err(format!("thread {pid}: a stop out of turn").into());
    }
    // SAFETY: at an entry stop the kernel filled this variant.
    let number = unsafe { info.u.entry.nr };
    Ok(libc::c_long::try_from(number)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::null());
        command
    }

    #[test]
    fn each_entry_counts_once() {
        let writes = |script| count(shell(script)).unwrap().get(&libc::SYS_write).copied();
        assert_eq!(writes(":"), None);
        assert_eq!(writes("echo a; echo b; echo c"), Some(3));
    }

    #[test]
    fn a_program_that_fails_is_an_error() {
        assert!(count(shell("exit 3")).is_err());
        assert!(count(shell("kill -TERM $$")).is_err());
        assert!(count(Command::new("/nonexistent")).is_err());
    }
}
