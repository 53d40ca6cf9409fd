//! What ends the program before its time, in words that name the option, the file and the remedy.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use blk_dataplane::vhost_user::BindError;
use blk_dataplane::{DeviceError, ImageError, StartError};
use nix::errno::Errno;

/// The message, with its remedy, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) code: u8,
}

/// A bad command line, or files that are not as it says. Also clap's own code.
const EXIT_USAGE: u8 = 2;
/// The host refused something: permission, memory, descriptors, I/O.
pub(crate) const EXIT_HOST: u8 = 1;

impl Failure {
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: EXIT_USAGE,
        }
    }

    pub(crate) fn host(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: EXIT_HOST,
        }
    }
}

pub(crate) fn image_failure(error: &ImageError) -> Failure {
    const GIVE_AN_IMAGE: &str = "give a raw disk image or a block device";
    let usage = |remedy: &str| Failure::usage(format!("--blk-file: {error}; {remedy}"));
    let host = |remedy: &str| Failure::host(format!("--blk-file: {error}; {remedy}"));
    match error {
        ImageError::Open { path, source } => match source.kind() {
            // Not created through a link, which --create would not follow.
            ErrorKind::NotFound if path.is_symlink() => usage(
                "it is a symbolic link to what does not exist: create that, or give another path",
            ),
            ErrorKind::NotFound => usage("give --create SIZE to create it"),
            ErrorKind::IsADirectory => usage(GIVE_AN_IMAGE),
            ErrorKind::NotADirectory => {
                usage("what comes before the last / is no directory: give another path")
            }
            ErrorKind::PermissionDenied => {
                host("check its permissions, or give --read-only if reading is enough")
            }
            ErrorKind::ReadOnlyFilesystem => host("give --read-only"),
            // What open(2) says of a socket.
            _ if is(source, Errno::ENXIO) && !is_block_device(path) => usage(GIVE_AN_IMAGE),
            ErrorKind::InvalidFilename => usage("give another path"),
            _ if is(source, Errno::ELOOP) => {
                usage("its symbolic links lead in a circle: give another path")
            }
            _ => host("check that the file can be opened by this user"),
        },
        ImageError::Create { source, .. } => {
            let remedy = match source.kind() {
                ErrorKind::NotFound => "make its directory first",
                ErrorKind::PermissionDenied => "check the directory's permissions",
                ErrorKind::ReadOnlyFilesystem => "give a path on another file system",
                ErrorKind::FileTooLarge => {
                    "give a smaller SIZE: its file system has no files that large, or ulimit -f forbids them"
                }
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                    "make room, or give a path on another file system"
                }
                ErrorKind::NotADirectory => "what comes before the last / is no directory",
                _ => "check the directory's permissions and the file system's limits",
            };
            Failure::host(format!("--create: {error}; {remedy}"))
        }
        ImageError::InUse {
            holder: Some(holder),
            ..
        } if holder.pid == std::process::id() => {
            usage("another device here has it: give each an image of its own, or both read-only")
        }
        ImageError::InUse { .. } => usage(
            "stop it, or give --incoming if its guest is to migrate here, or --force-share if both are meant to use it",
        ),
        ImageError::InUseByHost { .. } => usage(
            "lsblk shows what has it: unmount or detach it there, or give --read-only, or --force-share if both \
             are meant to write",
        ),
        ImageError::Lock { .. } => host(
            "its file system has no locks: give --force-share and see to it that nobody else writes",
        ),
        ImageError::NotAnImage { .. } => usage(GIVE_AN_IMAGE),
        ImageError::TooSmall { path, .. } if is_block_device(path) => {
            usage("nothing is attached to the device, or it is not ready: see lsblk")
        }
        ImageError::TooSmall { .. } => usage("enlarge the image, for example with truncate -s 1G"),
        _ => host("check that the file can be read by this user"),
    }
}

fn is_block_device(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.file_type().is_block_device())
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

/// Of a device made of `image`, or of none.
pub(crate) fn device_failure(error: &DeviceError, image: Option<&Path>) -> Failure {
    let (option, remedy) = match error {
        DeviceError::SerialTooLong { .. } => ("--serial", ""),
        DeviceError::NumQueues(_) => ("--num-queues", ""),
        DeviceError::QueueSize(_) => ("--queue-size", ""),
        DeviceError::BlockSize(_) => ("--block-size", ""),
        DeviceError::BlockTooSmall { .. } => (
            "--block-size",
            "; leave it out to have what the image needs",
        ),
        DeviceError::Threads { .. } => ("--num-threads", ""),
        DeviceError::QueueThread { .. } => ("--queue-threads", ""),
        DeviceError::Cpu(_) => ("--cpu-affinity", ""),
        DeviceError::PollMax(_) => ("--poll-max-us", ""),
        DeviceError::Empty => match image {
            Some(path) => {
                return Failure::usage(format!(
                    "--blk-file: {} is smaller than one block; enlarge it, or give a smaller --block-size",
                    path.display()
                ));
            }
            None => (
                "--null",
                ": less than one block; give a larger SIZE or a smaller --block-size",
            ),
        },
        _ => ("the device", ""),
    };
    Failure::usage(format!("{option}: {error}{remedy}"))
}

pub(crate) fn start_failure(error: &StartError) -> Failure {
    if let StartError::Affinity { .. } = error {
        return Failure::usage(format!(
            "--cpu-affinity: {error}; give CPUs that there are and that this process may use (taskset -cp $$)"
        ));
    }
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    let mut remedy = match error {
        StartError::IoQueue(_) => "; fewer data threads (--num-threads) need less",
        StartError::Thread(_) => {
            "; raise the limit of threads (ulimit -u, TasksMax=), or give fewer (--num-threads)"
        }
        _ => "",
    };
    while let Some(error) = cause {
        let errno = match (error.downcast_ref::<io::Error>(), error.downcast_ref()) {
            (Some(error), _) => error.raw_os_error().map(Errno::from_raw),
            (None, errno) => errno.copied(),
        };
        remedy = errno.and_then(exhaustion).unwrap_or(remedy);
        cause = error.source();
    }
    Failure::host(format!("the device cannot start: {error}{remedy}"))
}

/// What helps where the host has run out of something, as the end of a message.
fn exhaustion(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::EMFILE => Some("; raise the limit of open files (ulimit -n)"),
        Errno::ENFILE => Some("; raise fs.file-max (sysctl), or close files"),
        Errno::ENOMEM => Some("; make memory available"),
        _ => None,
    }
}

/// Signals could not be set up.
pub(crate) fn signal_failure(errno: Errno) -> Failure {
    let remedy = exhaustion(errno).unwrap_or_default();
    Failure::host(format!("cannot watch for signals: {errno}{remedy}"))
}

pub(crate) fn bind_failure(error: &BindError) -> Failure {
    match error {
        BindError::InUse { .. } => Failure::usage(format!(
            "--socket-path: {error}; stop it, or choose another --socket-path"
        )),
        BindError::NotASocket { .. } => Failure::usage(format!(
            "--socket-path: {error}; it is left alone: choose another --socket-path"
        )),
        BindError::Group { .. } => Failure::host(format!(
            "--socket-group: {error}; give a group that this user is a member of, or start as root"
        )),
        BindError::Replaced { .. } => Failure::host(format!(
            "--socket-path: {error}; choose a directory that nobody else may write to"
        )),
        BindError::TooLong { .. } => {
            Failure::usage(format!("--socket-path: {error}; choose a shorter one"))
        }
        _ => Failure::host(format!(
            "--socket-path: {error}; check that its directory exists and may be written to, or choose another \
             --socket-path"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those that a test of the program cannot bring about everywhere.
    #[test]
    fn what_the_host_refuses_comes_with_a_remedy() {
        let mounted = ImageError::InUseByHost {
            path: "/dev/sdz".into(),
        };
        let locks = ImageError::Lock {
            path: "/mnt/disk".into(),
            source: Errno::ENOLCK.into(),
        };
        let read_only = ImageError::Open {
            path: "/mnt/disk".into(),
            source: Errno::EROFS.into(),
        };
        for (error, code, parts) in [
            (
                mounted,
                EXIT_USAGE,
                ["/dev/sdz", "unmount", "--force-share"],
            ),
            (locks, EXIT_HOST, ["/mnt/disk", "no locks", "--force-share"]),
            (
                read_only,
                EXIT_HOST,
                ["/mnt/disk", "Read-only", "--read-only"],
            ),
        ] {
            let failure = image_failure(&error);
            assert_eq!(failure.code, code, "{}", failure.message);
            for part in ["--blk-file"].iter().chain(&parts) {
                assert!(
                    failure.message.contains(part),
                    "{part}: {}",
                    failure.message
                );
            }
        }
        let threads = start_failure(&StartError::Thread(Errno::EAGAIN.into()));
        assert!(threads.message.contains("ulimit -u"), "{}", threads.message);
    }
}
