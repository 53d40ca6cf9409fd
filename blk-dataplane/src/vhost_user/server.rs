//! Serves one front-end after another.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use event_poll::EventNotifier;
use hostmem::MemoryMap;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};

use super::connection;
use super::listener::{BindError, Listener};
use crate::data_thread::StartError;
use crate::dataplane::DataPlane;
use crate::device::Device;

/// Why serving came to an end before it was told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The host took no connection or gave no thread or descriptor. The host's fault.
    #[error("cannot serve connections: {0}")]
    Host(#[from] io::Error),
    /// The device could not start for a front-end. The host's fault.
    #[error("cannot start the device: {0}")]
    Start(#[from] StartError),
    /// The inherited descriptor is no Unix stream socket. The caller's fault.
    #[error("the descriptor is no Unix stream socket")]
    NotASocket,
}

/// Pause before another accept when the host has run out of descriptors or memory.
const EXHAUSTION_DELAY: std::time::Duration = std::time::Duration::from_millis(100);

#[derive(Debug)]
enum Endpoint {
    Listening(Listener),
    /// One front-end is connected already, and no other will be.
    Connected(UnixStream),
}

/// A vhost-user-blk server: a device and the socket it is served on.
#[derive(Debug)]
pub struct Server {
    endpoint: Endpoint,
    device: Device,
}

impl Server {
    /// Listens at `path`, mode 0660. A socket file that nobody listens on is replaced.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind(path: &Path, device: Device) -> Result<Self, BindError> {
        Ok(Self {
            endpoint: Endpoint::Listening(Listener::bind(path)?),
            device,
        })
    }

    /// Serves on an inherited socket, listening or connected.
    ///
    /// # Errors
    /// [`ServeError::NotASocket`].
    pub fn inherited(fd: OwnedFd, device: Device) -> Result<Self, ServeError> {
        let of = |_| ServeError::NotASocket;
        let kind = getsockopt(&fd, sockopt::SockType).map_err(of)?;
        // Fails for the addresses of any other family.
        getsockname::<UnixAddr>(fd.as_raw_fd()).map_err(of)?;
        if kind != SockType::Stream {
            return Err(ServeError::NotASocket);
        }
        let listening = getsockopt(&fd, sockopt::AcceptConn).map_err(of)?;
        let endpoint = if listening {
            Endpoint::Listening(Listener::inherited(fd))
        } else {
            Endpoint::Connected(UnixStream::from(fd))
        };
        Ok(Self { endpoint, device })
    }

    /// Finds out whether the device could start, so that a program fails before it says it is ready
    /// and not when the first front-end connects.
    ///
    /// # Errors
    /// [`StartError`]: the host has run out of something.
    pub fn probe(device: &Device) -> Result<(), StartError> {
        DataPlane::probe(device, Arc::new(MemoryMap::empty()))
    }

    /// Where it listens, if it bound the socket itself.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match &self.endpoint {
            Endpoint::Listening(listener) => listener.path(),
            Endpoint::Connected(_) => None,
        }
    }

    /// Serves one front-end after another until `until` is readable; then closes the connection,
    /// drains the device and returns. A second front-end waits until the first has gone. On a
    /// socket that came connected it returns when that one front-end has gone.
    ///
    /// The socket file is removed when the server is dropped.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn serve(self, until: impl AsFd) -> Result<(), ServeError> {
        let until = until.as_fd();
        let listener = match self.endpoint {
            Endpoint::Connected(stream) => {
                stream.set_nonblocking(false)?;
                return serve_one(&self.device, stream, until);
            }
            Endpoint::Listening(listener) => listener,
        };
        let socket = listener.socket();
        // Between the wake-up and the accept the front-end may have given up.
        socket.set_nonblocking(true)?;
        while !wait_for(socket.as_fd(), until)? {
            match socket.accept() {
                Ok((stream, _)) => serve_one(&self.device, stream, until)?,
                Err(error) if is_transient(&error) => {}
                Err(error) if is_exhaustion(&error) => {
                    tracing::warn!(%error, "cannot accept a front-end now; trying again");
                    std::thread::sleep(EXHAUSTION_DELAY);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Serves `stream` on a thread of its own, so that a front-end that stalls in the middle of a
/// message, or does not read its replies, cannot keep the server from stopping.
fn serve_one(device: &Device, stream: UnixStream, until: BorrowedFd<'_>) -> Result<(), ServeError> {
    let done = EventNotifier::new().map_err(io::Error::other)?;
    let control = stream.try_clone()?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("vhost-user".into())
            .spawn_scoped(scope, || {
                let result = connection::serve(device, stream);
                let told = done.notify();
                debug_assert!(told.is_ok(), "{told:?}");
                result
            })?;
        if wait_for(done.as_fd(), until)? {
            // Ends a blocked read or write on the other thread; it then drains and returns. That
            // the front-end has gone already is no error.
            let _ = control.shutdown(Shutdown::Both);
        }
        match thread.join() {
            Ok(result) => Ok(result?),
            Err(_) => Err(ServeError::Host(io::Error::other(
                "the connection's thread panicked",
            ))),
        }
    })
}

/// Waits for either; true if it was `until`, which goes first.
fn wait_for(fd: BorrowedFd<'_>, until: BorrowedFd<'_>) -> io::Result<bool> {
    loop {
        let mut fds = [
            PollFd::new(until, PollFlags::POLLIN),
            PollFd::new(fd, PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if fds[0].any().unwrap_or(true) {
            return Ok(true);
        }
        if fds[1].any().unwrap_or(true) {
            return Ok(false);
        }
    }
}

/// Errors of accept(2) that concern one connection and not the listener.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}

/// Errors of accept(2) that pass when something else lets go of a descriptor or of memory. A front-end
/// that waits is served then; to end the program would cost every front-end to come.
fn is_exhaustion(error: &io::Error) -> bool {
    const PASSING: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    error
        .raw_os_error()
        .is_some_and(|errno| PASSING.contains(&errno))
}
