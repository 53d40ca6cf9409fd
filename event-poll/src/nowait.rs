//! Reads that do not sleep whatever flags the descriptor's open file description carries.

// UNSAFETY: preadv2 is the only read whose "do not sleep" belongs to the call and not to the shared
// file description, and nix does not wrap it.
#![expect(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Reads without sleeping: `EAGAIN` when there is nothing to read.
///
/// Fails with `EOPNOTSUPP` or `ENOSYS` where the kernel or the file knows no such read (eventfd
/// before Linux 5.8, some sandboxes); [`read_after_poll`] does there.
pub(crate) fn read(fd: impl AsFd, buf: &mut [u8]) -> nix::Result<usize> {
    /// Read at the file's own position: an eventfd or a pipe has no other.
    const CURRENT_POSITION: libc::off_t = -1;

    let iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: `iov` is one element describing `buf`, which is writable and outlives the call; the
    // descriptor is open for as long as it is borrowed, and a wrong kind of file only fails.
    let n = unsafe {
        libc::preadv2(
            fd.as_fd().as_raw_fd(),
            &raw const iov,
            1,
            CURRENT_POSITION,
            libc::RWF_NOWAIT,
        )
    };
    usize::try_from(n).map_err(|_| Errno::last())
}

/// Reads if `poll` says there is something to read, else `EAGAIN`.
///
/// Sleeps only if a second reader of the same description takes the value between the two calls.
pub(crate) fn read_after_poll(fd: impl AsFd, buf: &mut [u8]) -> nix::Result<usize> {
    let ready = is_ready(&fd, PollFlags::POLLIN)?;
    // A hang-up or error with nothing to read is for the read to report: it does not sleep then.
    if ready.is_empty() {
        Err(Errno::EAGAIN)
    } else {
        nix::unistd::read(fd, buf)
    }
}

/// The subset of `wanted` that is ready now, with `POLLERR` and `POLLHUP` if set.
pub(crate) fn is_ready(fd: impl AsFd, wanted: PollFlags) -> nix::Result<PollFlags> {
    let mut fds = [PollFd::new(fd.as_fd(), wanted)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};

    fn blocking_eventfd(count: u32) -> EventFd {
        EventFd::from_value_and_flags(count, EfdFlags::EFD_CLOEXEC).unwrap()
    }

    #[test]
    fn both_reads_of_an_empty_blocking_eventfd_return_eagain() {
        let fd = blocking_eventfd(0);
        let mut buf = [0; 8];
        assert!(matches!(
            read(&fd, &mut buf),
            Err(Errno::EAGAIN | Errno::EOPNOTSUPP | Errno::ENOSYS)
        ));
        assert_eq!(read_after_poll(&fd, &mut buf), Err(Errno::EAGAIN));
    }

    #[test]
    fn read_after_poll_takes_the_whole_counter() {
        let fd = blocking_eventfd(7);
        let mut buf = [0; 8];
        assert_eq!(read_after_poll(&fd, &mut buf), Ok(8));
        assert_eq!(u64::from_ne_bytes(buf), 7);
        assert_eq!(read_after_poll(&fd, &mut buf), Err(Errno::EAGAIN));
    }

    #[test]
    fn read_after_poll_reports_the_end_of_a_pipe() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        drop(writer);
        assert_eq!(read_after_poll(&reader, &mut [0; 8]), Ok(0));
    }
}
