//! The listening socket: made so that only owner and group can connect, and never in the place of
//! anything but a dead socket.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

/// Front-ends that may wait while one is served. One reconnecting is the usual case.
const BACKLOG: i32 = 8;

/// Owner and group may connect, nobody else: a front-end is trusted with the whole image.
const MODE: u32 = 0o660;

/// Why there is no listening socket at a path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another process listens there. The caller's fault.
    #[error("{path} is in use: another process listens there", path = path.display())]
    InUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// Something that is no socket is there; it is left alone. The caller's fault.
    #[error("{path} exists and is no socket", path = path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The path is longer than the 107 bytes a socket address holds. The caller's fault.
    #[error("{path} is too long for a socket: at most 107 bytes fit", path = path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// The host refused. The host's fault.
    #[error("cannot listen at {path}: {source}", path = path.display())]
    Host {
        /// The path.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// A listening socket and the file it is bound to, which goes with it.
#[derive(Debug)]
pub(super) struct Listener {
    listener: UnixListener,
    /// `None` for a socket that somebody else bound.
    file: Option<SocketFile>,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode: by the time it is removed another process may have put its own there.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

impl Listener {
    pub(super) fn bind(path: &Path) -> Result<Self, BindError> {
        let address = UnixAddr::new(path).map_err(|_| BindError::TooLong {
            path: path.to_owned(),
        })?;
        let host = |errno: Errno| BindError::Host {
            path: path.to_owned(),
            source: errno.into(),
        };
        let _one_at_a_time = lock_directory(path)?;
        remove_stale(path, &address)?;
        let fd = stream_socket().map_err(host)?;
        // Linux gives the file the socket's own mode, less the umask: there is no moment at which
        // others could connect, and the process's umask is left alone.
        fchmod(&fd, Mode::from_bits_truncate(MODE)).map_err(host)?;
        bind(fd.as_raw_fd(), &address).map_err(host)?;
        let io_host = |source| BindError::Host {
            path: path.to_owned(),
            source,
        };
        let metadata = std::fs::symlink_metadata(path).map_err(io_host)?;
        let identity = (metadata.dev(), metadata.ino());
        let file = SocketFile {
            path: path.to_owned(),
            identity,
        };
        // What the umask took away from the group: connecting needs write permission.
        std::fs::set_permissions(path, Permissions::from_mode(MODE)).map_err(io_host)?;
        listen(&fd, Backlog::new(BACKLOG).map_err(host)?).map_err(host)?;
        Ok(Self {
            listener: UnixListener::from(fd),
            file: Some(file),
        })
    }

    /// Takes over a socket that listens already.
    pub(super) fn inherited(fd: OwnedFd) -> Self {
        Self {
            listener: UnixListener::from(fd),
            file: None,
        }
    }

    pub(super) fn socket(&self) -> &UnixListener {
        &self.listener
    }

    pub(super) fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }
}

/// Tries at the directory's lock, 10 ms apart: a start takes well under that.
const LOCK_TRIES: u32 = 100;

/// Holds off others that start in the same directory: between `bind` and `listen` a socket looks
/// dead, and would be removed. A lock on the directory leaves no file behind. Whoever may read the
/// directory can hold it, so after a while it goes without.
fn lock_directory(path: &Path) -> Result<Option<Flock<File>>, BindError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut directory = File::open(directory).map_err(|source| BindError::Host {
        path: path.to_owned(),
        source,
    })?;
    for _ in 0..LOCK_TRIES {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((back, _)) => directory = back,
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok(None)
}

fn stream_socket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

/// Removes a socket that nobody listens on, and refuses to touch anything else.
fn remove_stale(path: &Path, address: &UnixAddr) -> Result<(), BindError> {
    let host = |source: io::Error| BindError::Host {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(host(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    let probe = stream_socket().map_err(|errno| host(errno.into()))?;
    match connect(probe.as_raw_fd(), address) {
        Err(Errno::ECONNREFUSED) => match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(host(error)),
            _ => Ok(()),
        },
        Err(Errno::ENOENT) => Ok(()),
        // EAGAIN: it lives, and its backlog is full.
        Ok(()) | Err(Errno::EAGAIN) => Err(BindError::InUse {
            path: path.to_owned(),
        }),
        Err(errno) => Err(host(errno.into())),
    }
}
