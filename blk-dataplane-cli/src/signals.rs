//! What the program does on signals, other than to end.

// UNSAFETY: sigaction, which nix has no safe form of.
#![expect(unsafe_code)]

use blk_dataplane::Device;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::{Failure, report, say};

/// Signals as a descriptor that becomes readable. For the calling thread and all that it starts.
pub(crate) fn block(signals: &[Signal]) -> Result<SignalFd, Failure> {
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC))
        .map_err(|errno| Failure::host(format!("cannot watch for signals: {errno}")))
}

/// Has writes beyond the limit on a file's size (`ulimit -f`) fail, as on a full disk, rather than end the
/// program: the guest is told, and goes on with what it has.
pub(crate) fn survive_file_size_limit() -> Result<(), Failure> {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: nothing of this process has handled the signal before, and ignoring it runs no code of ours.
    unsafe { sigaction(Signal::SIGXFSZ, &ignore) }
        .map(drop)
        .map_err(|errno| Failure::host(format!("cannot ignore SIGXFSZ: {errno}")))
}

/// Reads the image's size anew at SIGHUP and says the counters at SIGUSR1, for as long as the program runs.
pub(crate) fn obey(signals: SignalFd, device: Device) -> Result<(), Failure> {
    const USR1: u32 = Signal::SIGUSR1 as u32;
    let wait_and_obey = move || {
        while let Ok(Some(signal)) = signals.read_signal() {
            match signal.ssi_signo {
                USR1 => say(&report::counters(&device)),
                _ => resize(&device),
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(wait_and_obey)
        .map(drop)
        .map_err(|error| Failure::host(format!("cannot start a thread: {error}")))
}

fn resize(device: &Device) {
    match device.resize() {
        Ok(resized) => say(&format!(
            "blk-dataplane: {} bytes; it was {}\n",
            resized.new, resized.old
        )),
        Err(error) => say(&format!(
            "blk-dataplane: the size stays as it was: {error}\n"
        )),
    }
}
