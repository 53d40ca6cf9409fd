//! Telling the front-end that the configuration space has changed.
//!
//! The message goes over a socket of its own that the front-end hands over (SET_BACKEND_REQ_FD).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockType, UnixAddr, getsockname, getsockopt, send, sockopt};

use super::message::config_change;
use crate::notifier::Notifier;

/// The front-end's socket for messages from the back end.
///
/// While no ring runs, nothing may be sent ("Suspended device state"). A change in that time is told when the first ring
/// starts.
#[derive(Clone, Debug)]
pub(super) struct ConfigChannel(Arc<Channel>);

#[derive(Debug)]
struct Channel {
    socket: UnixStream,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    suspended: bool,
    /// There is something to tell.
    pending: bool,
}

impl ConfigChannel {
    /// Takes `socket` if it is a Unix stream socket (row F6); otherwise `None`, and it is closed.
    pub(super) fn new(socket: OwnedFd, suspended: bool) -> Option<Self> {
        // Fails for the addresses of any other family.
        getsockname::<UnixAddr>(socket.as_raw_fd()).ok()?;
        let kind = getsockopt(&socket, sockopt::SockType).ok()?;
        let state = State {
            suspended,
            pending: false,
        };
        (kind == SockType::Stream).then(|| {
            Self(Arc::new(Channel {
                socket: UnixStream::from(socket),
                state: Mutex::new(state),
            }))
        })
    }

    /// Whether no ring runs.
    pub(super) fn set_suspended(&self, suspended: bool) {
        let mut state = self.state();
        state.suspended = suspended;
        if !suspended
            && std::mem::take(&mut state.pending)
            && let Err(error) = self.send()
        {
            tracing::warn!(%error, "a change of the capacity could not be told");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends CONFIG_CHANGE_MSG. Never blocks: in a socket that is full lies one that the front-end has not read
    /// yet, and it will see the newest configuration when it does.
    fn send(&self) -> io::Result<()> {
        let message = config_change();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.0.socket.as_raw_fd(), &message, flags) {
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

impl Notifier for ConfigChannel {
    fn notify(&self) -> io::Result<()> {
        // Held while it is sent: once the state says suspended, nothing more is.
        let mut state = self.state();
        if state.suspended {
            state.pending = true;
            return Ok(());
        }
        self.send()
    }
}
