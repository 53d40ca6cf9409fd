//! Serves one front-end after another.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use event_poll::EventNotifier;
use hostmem::MemoryMap;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};

use super::connection::{self, ConnectionError};
use super::handed::Handed;
use super::listener::{BindError, Listener};
use crate::data_thread::StartError;
use crate::dataplane::{DataPlane, StopError};
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
    /// The device did not stop cleanly, now or after an earlier front-end: writes that no flush
    /// covered may be lost. The host's fault.
    #[error("the image may not be written out: {0}")]
    Stop(#[from] StopError),
    /// The inherited descriptor is no Unix stream socket. The caller's fault.
    #[error("the descriptor is no Unix stream socket")]
    NotASocket,
}

/// Pause before another accept when the host has run out of descriptors or memory.
const EXHAUSTION_DELAY: Duration = Duration::from_millis(100);

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
        // The first failure to write the image out: reported at the end, since it is not undone by
        // whatever is served after it.
        let mut unwritten = None;
        while !wait_for(socket.as_fd(), until)? {
            match socket.accept() {
                Ok((stream, _)) => match serve_one(&self.device, stream, until) {
                    Ok(()) => {}
                    Err(ServeError::Stop(error)) => {
                        tracing::error!(%error, "the device did not stop cleanly");
                        unwritten.get_or_insert(error);
                    }
                    // The host had not enough for this front-end. The next may be luckier, and to
                    // end here would cost them all.
                    Err(error) => {
                        tracing::error!(%error, "a front-end could not be served");
                        std::thread::sleep(EXHAUSTION_DELAY);
                    }
                },
                Err(error) if is_transient(&error) => {}
                Err(error) if is_exhaustion(&error) => {
                    tracing::warn!(%error, "cannot accept a front-end now; trying again");
                    std::thread::sleep(EXHAUSTION_DELAY);
                }
                Err(error) => return Err(error.into()),
            }
        }
        unwritten.map_or(Ok(()), |error| Err(error.into()))
    }
}

impl From<ConnectionError> for ServeError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::Start(error) => Self::Start(error),
            ConnectionError::Host(error) => Self::Host(error),
            ConnectionError::Stop(error) => Self::Stop(error),
        }
    }
}

/// Tells that the connection's thread is at its end, even if it panics.
struct Done<'a>(&'a EventNotifier);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        let told = self.0.notify();
        debug_assert!(told.is_ok(), "{told:?}");
    }
}

/// Serves `stream` on a thread of its own, so that a front-end that stalls in the middle of a
/// message, or does not read its replies, cannot keep the server from stopping.
fn serve_one(device: &Device, stream: UnixStream, until: BorrowedFd<'_>) -> Result<(), ServeError> {
    let done = EventNotifier::new().map_err(io::Error::other)?;
    let control = stream.try_clone()?;
    let handed = Arc::new(Handed::default());
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("vhost-user".into())
            .spawn_scoped(scope, || {
                let _done = Done(&done);
                connection::serve(device, stream, Arc::clone(&handed))
            })?;
        if wait_for_end(&done, &control, until)? {
            // Ends a blocked read or write on the other thread; it then drains and returns. That
            // the front-end has gone already is no error.
            let _ = control.shutdown(Shutdown::Both);
        }
        let mut patience = DRAIN_PATIENCE;
        while !wait_for_done(&done, patience)? {
            // Slow disk or hostile front-end: reading its descriptors is no harm now.
            handed.release();
            patience = RELEASE_INTERVAL;
        }
        match thread.join() {
            Ok(result) => Ok(result?),
            Err(_) => Err(ServeError::Host(io::Error::other(
                "the connection's thread panicked",
            ))),
        }
    })
}

/// How long a device may drain before its front-end is suspected of holding up the data thread (see
/// `handed.rs`). Longer than a disk takes that is merely busy; an interrupt is lost at worst.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// How often it is released after that: each time lets one blocked write through.
const RELEASE_INTERVAL: Duration = Duration::from_millis(20);

/// Waits until the connection's thread is done, the front-end hangs up, or `until`; true for the last.
fn wait_for_end(
    done: &EventNotifier,
    control: &UnixStream,
    until: BorrowedFd<'_>,
) -> io::Result<bool> {
    let mut fds = [
        PollFd::new(until, PollFlags::POLLIN),
        PollFd::new(done.as_fd(), PollFlags::POLLIN),
        // No events asked for: a hang-up is always told.
        PollFd::new(control.as_fd(), PollFlags::empty()),
    ];
    poll_retrying(&mut fds, PollTimeout::NONE)?;
    Ok(is_ready(&fds[0]))
}

fn wait_for_done(done: &EventNotifier, patience: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(patience).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(done.as_fd(), PollFlags::POLLIN)];
    poll_retrying(&mut fds, timeout)?;
    Ok(is_ready(&fds[0]))
}

/// Waits for either; true if it was `until`, which goes first.
fn wait_for(fd: BorrowedFd<'_>, until: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [
        PollFd::new(until, PollFlags::POLLIN),
        PollFd::new(fd, PollFlags::POLLIN),
    ];
    poll_retrying(&mut fds, PollTimeout::NONE)?;
    Ok(is_ready(&fds[0]))
}

/// Signals are taken from a descriptor; one that interrupts all the same begins the wait anew.
fn poll_retrying(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> io::Result<()> {
    loop {
        match poll(fds, timeout) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether anything was reported, flags that nix does not know included.
fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.any().unwrap_or(true)
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
