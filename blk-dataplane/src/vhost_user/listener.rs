//! The listening socket: made so that only owner and group can connect, and never in the place of
//! anything but a dead socket.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
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

/// What the caller chooses about the socket file.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SocketOptions {
    /// Numeric id of the group whose members may connect, beside the owner. `None`: the one the file gets by
    /// itself, which is the process's or, in a directory that hands its own down, the directory's.
    pub group: Option<u32>,
}

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
    /// What had just been made there was something else a moment later. The fault of whoever may write the
    /// directory.
    #[error("{path} was replaced while it was being made", path = path.display())]
    Replaced {
        /// The path.
        path: PathBuf,
    },
    /// The file cannot be given to the group. The caller's fault: only root may give it to a group that the
    /// process is not in.
    #[error("cannot give {path} to group {group}: {source}", path = path.display())]
    Group {
        /// The socket's path.
        path: PathBuf,
        /// The group's number.
        group: u32,
        /// What the host said.
        source: io::Error,
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

/// A socket file, whatever may be found at its path by now.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// The file itself (O_PATH). Open for as long as it matters, so that no other can be given its inode number.
    file: File,
}

impl SocketFile {
    /// The socket that has just been bound to `path`, and nothing that somebody has put in its place: a symbolic
    /// link to, or another name of, a file of ours would be made accessible to the group otherwise.
    fn just_bound(path: &Path) -> io::Result<Option<Self>> {
        let file = open_itself(path)?;
        let metadata = file.metadata()?;
        let ours = metadata.file_type().is_socket() && metadata.nlink() == 1;
        Ok(ours.then(|| Self {
            path: path.to_owned(),
            file,
        }))
    }

    /// A name of the file that stays the file's whatever is done to the directory.
    fn fixed_name(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    fn give_to(&self, group: u32) -> io::Result<()> {
        if self.file.metadata()?.gid() == group {
            return Ok(());
        }
        std::os::unix::fs::chown(self.fixed_name(), None, Some(group))
    }

    /// Gives back what the umask took from the group: connecting needs write permission.
    fn open_to_group(&self) -> io::Result<()> {
        if self.file.metadata()?.mode() & 0o7777 == MODE {
            return Ok(());
        }
        std::fs::set_permissions(self.fixed_name(), Permissions::from_mode(MODE))
    }

    /// Removes the file, unless another one is at its path by now.
    fn remove(&self) -> io::Result<()> {
        let ours = self.file.metadata()?;
        let removed = match std::fs::symlink_metadata(&self.path) {
            Ok(there) if is_same(&ours, &there) => std::fs::remove_file(&self.path),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}

/// Opens what is at `path` as such, without following a link or waking whoever listens.
fn open_itself(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path)
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file
            && let Err(error) = file.remove()
        {
            tracing::warn!(path = %file.path.display(), %error, "cannot remove the socket");
        }
    }
}

impl Listener {
    pub(super) fn bind(path: &Path, options: &SocketOptions) -> Result<Self, BindError> {
        let address = UnixAddr::new(path).map_err(|_| BindError::TooLong {
            path: path.to_owned(),
        })?;
        let io_host = |source| BindError::Host {
            path: path.to_owned(),
            source,
        };
        let host = |errno: Errno| io_host(errno.into());
        let _one_at_a_time = lock_directory(path)?;
        remove_stale(path, &address)?;
        let fd = stream_socket().map_err(host)?;
        // Linux gives the file the socket's own mode, less the umask, which is the whole process's and is left
        // alone.
        fchmod(&fd, Mode::from_bits_truncate(MODE)).map_err(host)?;
        bind(fd.as_raw_fd(), &address).map_err(host)?;
        // Nobody can connect before `listen`: by then group and mode are what they are to be.
        let file = SocketFile::just_bound(path)
            .map_err(io_host)?
            .ok_or_else(|| BindError::Replaced {
                path: path.to_owned(),
            })?;
        // From here on the file goes if anything fails.
        let bound = Self {
            listener: UnixListener::from(fd),
            file: Some(file),
        };
        bound.admit(path, options)?;
        Ok(bound)
    }

    /// Lets those connect who may.
    fn admit(&self, path: &Path, options: &SocketOptions) -> Result<(), BindError> {
        let host = |source| BindError::Host {
            path: path.to_owned(),
            source,
        };
        let Some(file) = &self.file else {
            return Ok(());
        };
        if let Some(group) = options.group {
            file.give_to(group).map_err(|source| BindError::Group {
                path: path.to_owned(),
                group,
                source,
            })?;
        }
        file.open_to_group().map_err(host)?;
        Backlog::new(BACKLOG)
            .and_then(|backlog| listen(&self.listener, backlog))
            .map_err(|errno| host(errno.into()))
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
    let file = match open_itself(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(host)?,
    };
    if !file.metadata().map_err(host)?.file_type().is_socket() {
        return Err(BindError::NotASocket {
            path: path.to_owned(),
        });
    }
    let found = SocketFile {
        path: path.to_owned(),
        file,
    };
    let probe = stream_socket().map_err(|errno| host(errno.into()))?;
    match connect(probe.as_raw_fd(), address) {
        Err(Errno::ECONNREFUSED) => found.remove().map_err(host),
        Err(Errno::ENOENT) => Ok(()),
        // EAGAIN: it lives, and its backlog is full. EPROTOTYPE: a socket of another kind, which lives too.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Err(BindError::InUse {
            path: path.to_owned(),
        }),
        Err(errno) => Err(host(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_the_socket_itself_is_taken_for_the_one_just_bound() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let just_bound = |name: &str| SocketFile::just_bound(&at(name)).unwrap();
        std::fs::write(at("secret"), "of ours").unwrap();
        std::fs::set_permissions(at("secret"), Permissions::from_mode(0o600)).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        assert!(just_bound("socket").is_some());
        // What somebody who may write the directory can put in its place in that moment.
        symlink(at("secret"), at("link to file")).unwrap();
        symlink(at("socket"), at("link to socket")).unwrap();
        assert!(just_bound("secret").is_none());
        assert!(just_bound("link to file").is_none());
        assert!(just_bound("link to socket").is_none());
        std::fs::hard_link(at("socket"), at("other name")).unwrap();
        assert!(just_bound("other name").is_none());
        let secret = at("secret").metadata().unwrap();
        assert_eq!(secret.mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_done_to_the_file_is_done_to_that_file_wherever_it_is_by_then() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mode = |name: &str| at(name).symlink_metadata().unwrap().mode() & 0o777;
        let _socket = UnixListener::bind(at("socket")).unwrap();
        std::fs::set_permissions(at("socket"), Permissions::from_mode(0o600)).unwrap();
        let file = SocketFile::just_bound(&at("socket")).unwrap().unwrap();
        // The swap comes after the look.
        std::fs::rename(at("socket"), at("elsewhere")).unwrap();
        std::fs::write(at("secret"), "of ours").unwrap();
        std::fs::set_permissions(at("secret"), Permissions::from_mode(0o600)).unwrap();
        symlink(at("secret"), at("socket")).unwrap();
        file.open_to_group().unwrap();
        file.give_to(file.file.metadata().unwrap().gid()).unwrap();
        assert_eq!((mode("secret"), mode("elsewhere")), (0o600, MODE));
        // Nor is it removed.
        file.remove().unwrap();
        assert!(at("socket").is_symlink());
    }

    #[test]
    fn an_inode_number_given_out_again_is_not_taken_for_the_old_file() {
        // Beside the test itself: on a disk, where /tmp may be none.
        let test = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(test.parent().unwrap()).unwrap();
        let path = directory.path().join("s");
        let ours = Listener::bind(&path, &SocketOptions::default()).unwrap();
        std::fs::remove_file(&path).unwrap();
        // Some file systems give out the number that was freed last.
        let _theirs: Vec<_> = (0..64)
            .map(|_| {
                let _ = std::fs::remove_file(&path);
                UnixListener::bind(&path).unwrap()
            })
            .collect();
        drop(ours);
        assert!(path.exists(), "somebody else's");
    }

    #[test]
    fn a_group_that_cannot_be_leaves_no_socket_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        // The last number there is: nobody is in that group.
        let options = SocketOptions {
            group: Some(u32::MAX - 1),
        };
        match Listener::bind(&path, &options) {
            // Root may.
            Ok(listener) => {
                assert_eq!(path.metadata().unwrap().gid(), u32::MAX - 1);
                drop(listener);
            }
            Err(error) => assert!(matches!(error, BindError::Group { .. }), "{error}"),
        }
        assert!(!path.exists());
    }
}
