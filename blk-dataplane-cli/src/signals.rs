//! What the program does on signals.

// UNSAFETY: sigaction, which nix has no safe form of.
#![expect(unsafe_code)]

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::failure::signal_failure;
use crate::served::Named;
use crate::service_manager::ServiceManager;
use crate::standard_error::say;
use crate::{Failure, report};

/// Stack of the thread that waits for signals: it formats text.
const STACK: usize = 256 << 10;

/// Signals as a descriptor that becomes readable. For the calling thread and all that it starts.
pub(crate) fn block(signals: &[Signal]) -> Result<SignalFd, Failure> {
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC))
        .map_err(signal_failure)
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

/// What is done on signals other than to end, and what is said when the program ends.
#[derive(Debug)]
pub(crate) struct Obeying {
    /// Readable when the program is to end. Read by nobody here.
    pub(crate) ending: Arc<SignalFd>,
    /// SIGHUP and SIGUSR1.
    pub(crate) others: SignalFd,
    pub(crate) devices: Vec<Named>,
    pub(crate) manager: Arc<ServiceManager>,
}

impl Obeying {
    /// Does so on a thread of its own: reads the images' sizes anew at SIGHUP, says the counters at SIGUSR1, tells
    /// the service manager when the program is to end, and ends itself then.
    pub(crate) fn start(self) -> Result<(), Failure> {
        std::thread::Builder::new()
            .name("signals".into())
            .stack_size(STACK)
            .spawn(move || {
                while let Ok(true) = self.wait() {
                    self.obey();
                }
                self.manager.stopping();
            })
            .map(drop)
            .map_err(|error| Failure::host(format!("cannot start a thread: {error}")))
    }

    /// Waits for a signal; false for one to end.
    fn wait(&self) -> nix::Result<bool> {
        let mut fds = [
            PollFd::new(self.ending.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.others.as_fd(), PollFlags::POLLIN),
        ];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                polled => {
                    polled?;
                    return Ok(!fds[0].any().unwrap_or(true));
                }
            }
        }
    }

    fn obey(&self) {
        const USR1: u32 = Signal::SIGUSR1 as u32;
        let Ok(Some(signal)) = self.others.read_signal() else {
            return;
        };
        if signal.ssi_signo == USR1 {
            for device in &self.devices {
                say(&report::counters(&device.prefix(), &device.device));
            }
            return;
        }
        self.manager.reloading();
        for device in &self.devices {
            resize(device);
        }
        self.manager.ready(self.devices.len());
    }
}

fn resize(named: &Named) {
    let prefix = named.prefix();
    match named.device.resize() {
        Ok(resized) => say(&format!(
            "{prefix}{} bytes; it was {}\n",
            resized.new, resized.old
        )),
        Err(error) => say(&format!("{prefix}the size stays as it was: {error}\n")),
    }
}
