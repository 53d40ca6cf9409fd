//! Devices and the sockets they are served on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use hostmem::MemoryMap;
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};

use super::listener::{BindError, Listener, SocketOptions};
use super::serving;
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

#[derive(Debug)]
pub(super) enum Endpoint {
    Listening(Listener),
    /// One front-end is connected already, and no other will be.
    Connected(UnixStream),
}

/// A vhost-user-blk server: a device and the socket it is served on.
#[derive(Debug)]
pub struct Server {
    pub(super) endpoint: Endpoint,
    pub(super) device: Device,
    pub(super) name: Option<Box<str>>,
    pub(super) once: bool,
}

impl Server {
    /// Listens at `path`, mode 0660. A socket file that nobody listens on is replaced.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind(path: &Path, device: Device) -> Result<Self, BindError> {
        Self::bind_with(path, &SocketOptions::default(), device)
    }

    /// Listens at `path`, as `options` has it.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind_with(
        path: &Path,
        options: &SocketOptions,
        device: Device,
    ) -> Result<Self, BindError> {
        let listener = Listener::bind(path, options)?;
        Ok(Self::over(Endpoint::Listening(listener), device))
    }

    /// Serves on an inherited socket, listening or connected. Its file, if it has one, is somebody else's
    /// and stays.
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
        Ok(Self::over(endpoint, device))
    }

    fn over(endpoint: Endpoint, device: Device) -> Self {
        Self {
            endpoint,
            device,
            name: None,
            once: false,
        }
    }

    /// Names the device in what is logged about it and its front-ends.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Serves one front-end and no other: while it is connected nobody can connect, and when it has gone, the
    /// device is done with. Whoever connects and goes without a word does not count.
    #[must_use]
    pub fn once(mut self) -> Self {
        self.once = true;
        self
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
    /// The socket file is removed before the last connection is closed: a front-end that comes back finds
    /// nobody there rather than somebody who is about to go.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn serve(self, until: impl AsFd) -> Result<(), ServeError> {
        Self::serve_all(vec![self], until)
    }

    /// The same for several devices at a time. None has a thread until a front-end of its own has something
    /// to say, and what one front-end does or does not do concerns its own device only. Returns when `until` is
    /// readable, or when no device is left that anybody could be served on.
    ///
    /// # Errors
    /// See [`ServeError`]. A device that can no longer be served is logged, and the first such error returned
    /// when all others are done with, too.
    ///
    /// ```
    /// use blk_dataplane::vhost_user::Server;
    /// use blk_dataplane::{Backing, Device, DeviceOptions};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let directory = tempfile::tempdir()?;
    /// # let directory = directory.path();
    /// let mut servers = Vec::new();
    /// for name in ["root", "data"] {
    ///     let device = Device::new(Backing::null(1 << 30), &DeviceOptions::default())?;
    ///     servers.push(Server::bind(&directory.join(name), device)?.named(name));
    /// }
    /// let until = event_poll::EventNotifier::new()?; // readable: stop
    /// # until.notify()?;
    /// Server::serve_all(servers, &until)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn serve_all(servers: Vec<Self>, until: impl AsFd) -> Result<(), ServeError> {
        serving::serve(servers, until.as_fd())
    }
}
