//! Telling the front-end that the configuration space has changed.
//!
//! The message goes over a socket of its own that the front-end hands over (SET_BACKEND_REQ_FD). The `vhost`
//! crate takes that socket and neither sends this message on it nor gives it to us. So we look at a message
//! before the crate takes it off the stream, and where it is this one, get a duplicate of its socket.

// UNSAFETY: descriptors that come with a message are received as numbers.
#![expect(unsafe_code)]

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

use crate::notifier::Notifier;

/// A vhost-user header: request, flags, size of what follows; 32 bits each, in the host's byte order.
const HEADER_LEN: usize = 12;

/// Version 1, and no answer wanted: there is nothing to do without one.
const FLAGS: u32 = 1;

/// Looks at the next message without taking it, waiting until there is one. If it hands over a socket, gives
/// a duplicate of that; the crate must still be asked whether the message is a good one.
///
/// A header that comes in pieces is not looked at: front-ends send it with one call, and the worst of
/// missing it is a guest that is not told of a new size.
pub(super) fn handed_over_next(stream: &UnixStream) -> Option<OwnedFd> {
    let mut header = [0; HEADER_LEN];
    // Without room for descriptors, so that none is made for any other message.
    let seen = loop {
        match recv(stream.as_raw_fd(), &mut header, MsgFlags::MSG_PEEK) {
            Err(Errno::EINTR) => {}
            // The crate will come to the same, and knows what to make of it.
            Err(_) => return None,
            Ok(seen) => break seen,
        }
    };
    let code = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
    if seen < HEADER_LEN || code != u32::from(FrontendReq::SET_BACKEND_REQ_FD) {
        return None;
    }
    // One is what belongs there; the kernel makes no more than there is room for.
    let mut room = cmsg_space!([std::os::fd::RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut header)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut room), flags).ok()?;
    let mut first = None;
    for part in message.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            for number in numbers {
                // SAFETY: the kernel has just made this descriptor for this call, which nobody else knows of.
                let fd = unsafe { OwnedFd::from_raw_fd(number) };
                first.get_or_insert(fd);
            }
        }
    }
    first
}

/// The front-end's socket for messages from the back end.
#[derive(Debug)]
pub(super) struct ConfigChannel(UnixStream);

impl ConfigChannel {
    /// `socket` is a connected Unix stream socket, as the crate has found.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(UnixStream::from(socket))
    }
}

impl Notifier for ConfigChannel {
    /// Sends CONFIG_CHANGE_MSG. Never blocks: in a socket that is full lies one that the front-end has not read
    /// yet, and it will see the newest configuration when it does.
    fn notify(&self) -> io::Result<()> {
        let code = u32::from(BackendReq::CONFIG_CHANGE_MSG);
        let mut message = [0; HEADER_LEN];
        for (place, word) in message.chunks_exact_mut(4).zip([code, FLAGS, 0]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.0.as_raw_fd(), &message, flags) {
            Ok(HEADER_LEN) | Err(Errno::EAGAIN) => Ok(()),
            Ok(sent) => Err(io::Error::other(format!(
                "{sent} of {HEADER_LEN} bytes sent"
            ))),
            Err(errno) => Err(errno.into()),
        }
    }
}
