//! The descriptor given by `--fd`.

// UNSAFETY: only the command line says that the program owns this descriptor number.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the descriptor has been taken: it is given once.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes ownership of an inherited descriptor. Standard input, output and error are refused, and so
/// is a second call. To be called before the program opens anything itself.
pub(crate) fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::other("descriptors count from 0"));
    }
    if number <= 2 {
        return Err(io::Error::other(
            "0, 1 and 2 are standard input, output and error",
        ));
    }
    // SAFETY: borrowed only for this fcntl, which answers EBADF if nothing is open there.
    let probe = unsafe { BorrowedFd::borrow_raw(number) };
    nix::fcntl::fcntl(probe, nix::fcntl::FcntlArg::F_GETFD)?;
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(io::Error::other("the descriptor has been taken already"));
    }
    // SAFETY: it is open (checked above); the caller asks before the program opens anything, so it
    // was inherited from whoever started the program and named it; and it is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
