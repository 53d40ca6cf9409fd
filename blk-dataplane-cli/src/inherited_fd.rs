//! Descriptors that whoever started the program has left open for it: `--fd`, socket activation.

// UNSAFETY: only the command line and the environment say that the program owns these descriptor numbers.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// Numbers that have been taken: each is given once.
static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// Takes ownership of an inherited descriptor. Standard input, output and error are refused, and so
/// is one that has been taken. To be called before the program opens anything itself that stays open.
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
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return Err(io::Error::other("the descriptor has been taken already"));
    }
    taken.push(number);
    // SAFETY: it is open (checked above); the caller asks before the program opens anything, so it
    // was inherited from whoever started the program and named it; and it is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
