//! What the kernel tells of a process, and signals to it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// Processor time of all its threads so far, those the kernel runs for io_uring included.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration, String> {
    let clock = ClockId::pid_cpu_clock_id(as_pid(pid)?).map_err(|e| format!("pid {pid}: {e}"))?;
    let time = clock_gettime(clock).map_err(|e| format!("pid {pid}: {e}"))?;
    Ok(time.into())
}

/// Sends a signal to a process we have started and not waited for yet, so that its number is nobody else's.
pub(crate) fn signal(pid: u32, signal: Signal) -> Result<(), String> {
    kill(as_pid(pid)?, signal).map_err(|e| format!("pid {pid}: {signal}: {e}"))
}

fn as_pid(pid: u32) -> Result<Pid, String> {
    let pid = i32::try_from(pid).map_err(|e| e.to_string())?;
    Ok(Pid::from_raw(pid))
}

/// Memory in use, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// `VmRSS`: all that is mapped and there, what others have mapped as well included.
    pub(crate) resident: u64,
    /// `RssShmem`: of that, what is shared memory; of a back-end, the guest's.
    pub(crate) shared: u64,
    /// `Pss`: what several processes have mapped is divided among them.
    pub(crate) proportional: u64,
}

pub(crate) fn memory(pid: u32) -> Result<Memory, String> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))
    };
    let status = read("status")?;
    let rollup = read("smaps_rollup")?;
    let need = |text: &str, name: &str| {
        kib(text, name).ok_or_else(|| format!("/proc/{pid}: there is no {name}"))
    };
    Ok(Memory {
        resident: need(&status, "VmRSS")?,
        shared: need(&status, "RssShmem")?,
        proportional: need(&rollup, "Pss")?,
    })
}

/// The value of a line like `VmRSS: 1234 kB`.
fn kib(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(key, _)| *key == name)?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Whether somebody listens on this socket. Does not connect: some back-ends serve one front-end and exit.
pub(crate) fn is_listening(socket: &Path) -> bool {
    let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    has_listener(&sockets, &socket.display().to_string())
}

fn has_listener(sockets: &str, path: &str) -> bool {
    // __SO_ACCEPTCON of include/linux/net.h, in hexadecimal.
    const LISTENS: &str = "00010000";
    sockets.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words.nth(3) == Some(LISTENS) && words.nth(3) == Some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn our_own_processor_time_grows() {
        let before = cpu_time(std::process::id()).unwrap();
        let mut sum = 0u64;
        for number in 0..1_000_000u64 {
            sum = std::hint::black_box(sum.wrapping_add(number));
        }
        assert!(cpu_time(std::process::id()).unwrap() > before);
    }

    #[test]
    fn our_own_memory_is_told() {
        let memory = memory(std::process::id()).unwrap();
        assert!(memory.resident > 100 && memory.proportional > 100);
        assert!(memory.proportional <= memory.resident);
    }

    #[test]
    fn a_line_of_the_kernels_is_read() {
        let status = "Name:\tx\nVmRSS:\t    1234 kB\nRssShmem:\t   0 kB\n";
        assert_eq!(kib(status, "VmRSS"), Some(1234));
        assert_eq!(kib(status, "RssShmem"), Some(0));
        assert_eq!(kib(status, "Pss"), None);
    }

    #[test]
    fn a_socket_listens_from_listen_on_and_not_before_or_after() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        assert!(!is_listening(&path));
        let listener = UnixListener::bind(&path).unwrap();
        assert!(is_listening(&path));
        let stream = UnixStream::connect(&path).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        drop(listener);
        // The accepted end has the path's name, too, and does not listen.
        assert!(!is_listening(&path));
        drop((stream, accepted));
    }
}
