//! Telling the front-end that the configuration space has changed.
//!
//! The message goes over a socket of its own that the front-end hands over (SET_BACKEND_REQ_FD).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockType, UnixAddr, getsockname, getsockopt, send, sockopt};

use super::message::config_change;
use crate::notifier::Notifier;

/// The front-end's socket for messages from the back end.
#[derive(Debug)]
pub(super) struct ConfigChannel(UnixStream);

impl ConfigChannel {
    /// Takes `socket` if it is a Unix stream socket (row F6); otherwise `None`, and it is closed.
    pub(super) fn new(socket: OwnedFd) -> Option<Self> {
        // Fails for the addresses of any other family.
        getsockname::<UnixAddr>(socket.as_raw_fd()).ok()?;
        let kind = getsockopt(&socket, sockopt::SockType).ok()?;
        (kind == SockType::Stream).then(|| Self(UnixStream::from(socket)))
    }
}

impl Notifier for ConfigChannel {
    /// Sends CONFIG_CHANGE_MSG. Never blocks: in a socket that is full lies one that the front-end has not read
    /// yet, and it will see the newest configuration when it does.
    fn notify(&self) -> io::Result<()> {
        let message = config_change();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.0.as_raw_fd(), &message, flags) {
            Ok(sent) if sent == message.len() => Ok(()),
            Err(Errno::EAGAIN) => Ok(()),
            Ok(sent) => Err(io::Error::other(format!(
                "{sent} of {} bytes sent",
                message.len()
            ))),
            Err(errno) => Err(errno.into()),
        }
    }
}
