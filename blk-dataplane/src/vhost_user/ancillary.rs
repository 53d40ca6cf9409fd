//! Receives bytes with the descriptors that come along, so that each has an owner from the first instant.
//!
//! nix receives them as numbers, and where the kernel has cut some off (MSG_CTRUNC) gives none of those that did
//! come: they would stay open for ever (rows F3, F8).

// UNSAFETY: recvmsg(2) is called here, and the descriptors it makes are numbers in a buffer.
#![expect(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::message::DESCRIPTORS_MAX;

/// Bytes of [`DESCRIPTORS_MAX`] descriptors.
const DATA_LEN: libc::c_uint = 128;
const _: () = assert!(DATA_LEN as usize == DESCRIPTORS_MAX * size_of::<RawFd>());

/// Bytes of a control message with them.
// SAFETY: arithmetic on the length alone.
const CONTROL_LEN: usize = unsafe { libc::CMSG_SPACE(DATA_LEN) } as usize;

/// Aligned as a `cmsghdr` must be.
#[repr(C)]
union Control {
    header: libc::cmsghdr,
    bytes: [u8; CONTROL_LEN],
}

/// What one call received.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes; 0 at the stream's end.
    pub(crate) len: usize,
    /// Some descriptors have been cut off, or there was ancillary data of another kind than was asked for.
    pub(crate) truncated: bool,
}

/// Waits for bytes, at least one and at most those of `buffer`, and appends the descriptors that came with them,
/// close-on-exec, to `fds`: at most [`DESCRIPTORS_MAX`].
///
/// # Errors
///
/// What recvmsg(2) says, `EINTR` and `EAGAIN` included.
pub(crate) fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<Received> {
    let mut control = Control {
        bytes: [0; CONTROL_LEN],
    };
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all of it are integers and pointers that may be zero; not all C libraries let it be written out, since
    // some have private padding.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL_LEN;
    // SAFETY: `message` names one buffer, which is borrowed mutably until the call returns, and a control buffer of
    // the length given.
    let len = unsafe {
        libc::recvmsg(
            socket.as_fd().as_raw_fd(),
            &raw mut message,
            libc::MSG_CMSG_CLOEXEC,
        )
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: recvmsg has filled in the control buffer and its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: the macros return null or a header within the control buffer, whose data is of the length it says;
        // the kernel wrote both.
        unsafe {
            take(header, fds);
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(Received {
        len,
        truncated: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Takes the descriptors of one control message.
///
/// # Safety
///
/// - `header` is that of a control message which recvmsg(2) has just written, in a buffer that is alive.
/// - It is taken once: its descriptors have no owner yet.
unsafe fn take(header: *const libc::cmsghdr, fds: &mut Vec<OwnedFd>) {
    debug_assert!(!header.is_null());
    // SAFETY: it is alive and written, by contract.
    let (level, kind, len) = unsafe {
        (
            (*header).cmsg_level,
            (*header).cmsg_type,
            (*header).cmsg_len,
        )
    };
    if (level, kind) != (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
        return;
    }
    // SAFETY: arithmetic on the address alone.
    let data = unsafe { libc::CMSG_DATA(header) };
    let before = data.addr() - header.addr();
    let bytes = len.saturating_sub(before);
    for place in 0..bytes / size_of::<RawFd>() {
        // SAFETY: within the control message's data. Nothing is said about the alignment.
        let number = unsafe { data.cast::<RawFd>().add(place).read_unaligned() };
        // SAFETY: the kernel has just made this descriptor for this process, and nobody else has been told of it.
        fds.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
}
