//! Messages on and off a stream socket, however they are cut up.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::ancillary;
use super::message::{DESCRIPTORS_MAX, FramingError, HEADER_LEN, Header};

/// A message as it came. What it means is for `Request` to say.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    /// In the order they came in.
    pub(super) fds: Vec<OwnedFd>,
}

/// Why no message came.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// The front-end has closed, between two messages.
    #[error("the front-end has closed")]
    Closed,
    /// Row S2: the front-end has closed in the middle of a message.
    #[error("the front-end has closed within a message")]
    WithinMessage,
    /// What comes cannot be trusted.
    #[error(transparent)]
    Framing(#[from] FramingError),
    /// The host's fault, or a front-end that reset the connection.
    #[error("the connection failed: {0}")]
    Socket(#[from] io::Error),
}

/// One end of a connection.
///
/// Reads never go beyond the message that is being received: descriptors come with the first byte they were sent
/// with, so that is how each goes with its message and no other.
#[derive(Debug)]
pub(super) struct Stream {
    socket: UnixStream,
}

impl Drop for Stream {
    /// Closing it is not enough: whoever sees the connection to its end has a duplicate (`serving.rs`), and the
    /// front-end would be told only when the device has drained.
    fn drop(&mut self) {
        // That the front-end has gone already is no error.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Stream {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket }
    }

    /// Waits until there is something to read, or the end; false if there was neither for `patience`.
    pub(super) fn wait(&self, patience: Duration) -> io::Result<bool> {
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        self.poll(PollFlags::POLLIN, timeout)
    }

    fn poll(&self, events: PollFlags, timeout: PollTimeout) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.socket.as_fd(), events)];
        match poll(&mut fds, timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the next message, all of it.
    ///
    /// # Errors
    ///
    /// [`Ended`]. Descriptors that came are closed.
    pub(super) fn receive(&self) -> Result<Message, Ended> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_LEN];
        self.fill(&mut header, &mut fds, Ended::Closed)?;
        let header = Header::parse(header)?;
        let mut body = vec![0; header.size];
        self.fill(&mut body, &mut fds, Ended::WithinMessage)?;
        Ok(Message { header, body, fds })
    }

    /// Fills `buffer`, whatever pieces it comes in.
    fn fill(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        mut at_end: Ended,
    ) -> Result<(), Ended> {
        let mut filled = 0;
        while filled < buffer.len() {
            let received = match ancillary::receive(&self.socket, &mut buffer[filled..], fds) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A socket that was inherited is shared with whoever may have made it non-blocking.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.poll(PollFlags::POLLIN, PollTimeout::NONE)?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if received.truncated || fds.len() > DESCRIPTORS_MAX {
                return Err(FramingError::DescriptorsCut.into());
            }
            if received.len == 0 {
                return Err(at_end);
            }
            filled += received.len;
            at_end = Ended::WithinMessage;
        }
        Ok(())
    }

    /// Sends a message, with a descriptor if there is one. Waits while the front-end does not read (row S13): one
    /// reply is all there ever is, and the data threads have no part in it.
    ///
    /// # Errors
    ///
    /// The front-end has gone, or the host's fault.
    pub(super) fn send(&self, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
        let numbers: Vec<RawFd> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let mut rights = if numbers.is_empty() { &[][..] } else { &rights };
        let mut rest = bytes;
        while !rest.is_empty() {
            let parts = [io::IoSlice::new(rest)];
            let raw = self.socket.as_raw_fd();
            match sendmsg::<()>(raw, &parts, rights, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    rights = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    self.poll(PollFlags::POLLOUT, PollTimeout::NONE)?;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}
