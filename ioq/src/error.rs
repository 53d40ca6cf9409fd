//! What can go wrong, when, and whose fault it is.

use std::{fmt, io};

/// Why an [`IoQueue`](crate::IoQueue) could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The kernel's limit on AIO operations for the whole system is used up (`EAGAIN`). The host's
    /// fault: raise the limit, or use a smaller depth.
    #[error(
        "the system's limit of AIO operations leaves no room for {depth} more: raise fs.aio-max-nr \
         (sysctl; compare /proc/sys/fs/aio-nr with /proc/sys/fs/aio-max-nr) or lower the depth"
    )]
    AioLimit {
        /// Operations asked for.
        depth: u16,
    },
    /// `io_setup` failed for another reason, such as a kernel without AIO (`ENOSYS`) or a seccomp
    /// filter (`EPERM`). The host's fault.
    #[error("io_setup failed; Linux AIO is not usable here: {0}")]
    AioUnavailable(#[source] io::Error),
    /// The file is open with `O_APPEND`: the kernel would ignore every write's offset. The
    /// caller's fault.
    #[error("the file is open with O_APPEND, which makes the kernel ignore a write's offset")]
    AppendMode,
    /// `depth` is 0. The caller's fault.
    #[error("a queue needs a depth of at least 1")]
    Depth,
    /// No eventfd could be made. The host's fault: out of file descriptors or memory.
    #[error("cannot create the completion eventfd: {0}")]
    EventFd(#[source] io::Error),
    /// The flags of the file descriptor could not be read. The caller's fault.
    #[error("cannot read the file's flags: {0}")]
    File(#[source] io::Error),
    /// `io_uring_setup` or what follows failed, such as a kernel without it (`ENOSYS`), one that
    /// forbids it (`EPERM`: the sysctl kernel.io_uring_disabled, or a seccomp profile), one before
    /// Linux 5.8 (`EOPNOTSUPP`), or one that can start no thread for it (`RLIMIT_NPROC`, `pids.max`). The
    /// host's fault.
    #[error("io_uring is not usable here: {0}")]
    IoUringUnavailable(#[source] io::Error),
    /// [`Engine::Auto`](crate::Engine::Auto) found the host refusing both. The host's fault.
    #[error("the host has no I/O engine: {linux_aio}; {io_uring}")]
    NoEngine {
        /// What it said to Linux AIO.
        linux_aio: Box<Self>,
        /// What it said to io_uring.
        io_uring: Box<Self>,
    },
    /// `max_segments` is 0 or above [`SEGMENTS_MAX`](crate::SEGMENTS_MAX). The caller's fault.
    #[error("max_segments is {max_segments}, not within 1..={limit}", limit = crate::SEGMENTS_MAX)]
    Segments {
        /// Segments asked for.
        max_segments: u16,
    },
    /// No address space for the slots' segments. The host's fault.
    #[error("cannot map {bytes} bytes for segments: {source}")]
    Storage {
        /// Bytes asked for.
        bytes: usize,
        /// What `mmap` said.
        source: io::Error,
    },
}

/// Why an operation was not queued. The owner comes back; nothing was kept.
///
/// Every variant is the caller's fault, never the guest's or the host's.
#[non_exhaustive]
#[derive(thiserror::Error)]
pub enum QueueError<O> {
    /// Every slot is taken: reap first.
    #[error("every slot of the queue is taken")]
    Full {
        /// What was passed in.
        owner: O,
    },
    /// The operation's end lies beyond 2⁶³ − 1, the largest file offset.
    #[error("the operation at offset {offset} ends beyond the largest file offset")]
    OffsetTooLarge {
        /// What was passed in.
        owner: O,
        /// Byte offset in the file.
        offset: u64,
    },
    /// More segments than [`Config::max_segments`](crate::Config::max_segments), after segments
    /// that touch in host memory were joined and empty ones dropped.
    #[error("the operation has more than {limit} segments")]
    TooManySegments {
        /// What was passed in.
        owner: O,
        /// Segments a slot holds.
        limit: u16,
    },
}

impl<O> QueueError<O> {
    /// The owner that was passed in.
    pub fn into_owner(self) -> O {
        match self {
            Self::Full { owner }
            | Self::OffsetTooLarge { owner, .. }
            | Self::TooManySegments { owner, .. } => owner,
        }
    }
}

// By hand, so that `expect` and `?` work with owners that are not `Debug`.
impl<O> fmt::Debug for QueueError<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { .. } => f.debug_struct("Full").finish_non_exhaustive(),
            Self::OffsetTooLarge { offset, .. } => f
                .debug_struct("OffsetTooLarge")
                .field("offset", offset)
                .finish_non_exhaustive(),
            Self::TooManySegments { limit, .. } => f
                .debug_struct("TooManySegments")
                .field("limit", limit)
                .finish_non_exhaustive(),
        }
    }
}

/// Why an operation failed; delivered with its owner by [`IoQueue::reap`](crate::IoQueue::reap).
///
/// The operation's effect is then undefined: part of a read's buffer may be filled, part of a
/// write may have reached the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoError {
    kind: IoErrorKind,
    errno: Option<i32>,
}

impl IoError {
    /// The end of the file lay inside a read.
    pub(crate) const UNEXPECTED_EOF: Self = Self {
        kind: IoErrorKind::UnexpectedEof,
        errno: None,
    };
    /// A write that wrote nothing.
    pub(crate) const WRITE_ZERO: Self = Self {
        kind: IoErrorKind::WriteZero,
        errno: None,
    };

    pub(crate) fn from_errno(errno: i32) -> Self {
        Self {
            kind: IoErrorKind::from_errno(errno),
            errno: Some(errno),
        }
    }

    /// What sort of failure.
    pub const fn kind(self) -> IoErrorKind {
        self.kind
    }

    /// The kernel's error number as it was, or `None` for [`IoErrorKind::UnexpectedEof`] and
    /// [`IoErrorKind::WriteZero`], which the kernel does not call errors.
    pub const fn errno(self) -> Option<i32> {
        self.errno
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(f)?;
        if let Some(errno) = self.errno {
            write!(f, ": {}", io::Error::from_raw_os_error(errno))?;
        }
        Ok(())
    }
}

impl std::error::Error for IoError {}

impl From<IoError> for io::Error {
    fn from(error: IoError) -> Self {
        match (error.errno, error.kind) {
            (Some(errno), _) => Self::from_raw_os_error(errno),
            (None, IoErrorKind::UnexpectedEof) => Self::new(io::ErrorKind::UnexpectedEof, error),
            (None, IoErrorKind::WriteZero) => Self::new(io::ErrorKind::WriteZero, error),
            (None, _) => Self::other(error),
        }
    }
}

/// What sort of failure an [`IoError`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum IoErrorKind {
    /// `EINTR` or `EAGAIN` came back more often than
    /// [`TRANSIENT_RETRIES_MAX`](crate::TRANSIENT_RETRIES_MAX) times. The host's fault.
    #[error("the host kept asking for another try")]
    Busy,
    /// `EINVAL`, `EFAULT` or `EBADF`: buffers or offset not aligned for `O_DIRECT`, memory that is
    /// not mapped, a write to a file open for reading. The caller's fault.
    #[error("the host refused the operation")]
    Invalid,
    /// `ENOSPC`, `EDQUOT` or `EFBIG`: no room. The host's fault; later writes may succeed.
    #[error("no space left on the host")]
    NoSpace,
    /// Any other error number. The host's fault unless the number says otherwise.
    #[error("the operation failed")]
    Other,
    /// `EROFS` or `EPERM`: the file system or file may not be written. The host's fault.
    #[error("the host's storage is read-only")]
    ReadOnly,
    /// `EIO` and its like: the storage failed. The host's fault.
    #[error("the host's storage failed")]
    Storage,
    /// The end of the file lies inside a read: the file was shorter than the caller thought, or
    /// was truncated meanwhile. The caller's or the host's fault.
    #[error("the file ends inside the read")]
    UnexpectedEof,
    /// `EOPNOTSUPP` or `ENOSYS`: the kernel or file system cannot do it at all. The host's fault.
    #[error("the host does not support the operation")]
    Unsupported,
    /// The kernel wrote 0 bytes without an error, so that trying again could go on for ever. The
    /// host's fault.
    #[error("the write made no progress")]
    WriteZero,
}

impl IoErrorKind {
    fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EINTR | libc::EAGAIN => Self::Busy,
            libc::EINVAL | libc::EFAULT | libc::EBADF => Self::Invalid,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpace,
            libc::EROFS | libc::EPERM => Self::ReadOnly,
            libc::EIO | libc::ENXIO | libc::ENODEV | libc::EREMOTEIO | libc::ESTALE => {
                Self::Storage
            }
            libc::EOPNOTSUPP | libc::ENOSYS => Self::Unsupported,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i11_limit_text_names_the_sysctl_and_the_depth() {
        let text = SetupError::AioLimit { depth: 77 }.to_string();
        assert!(
            text.contains("fs.aio-max-nr") && text.contains("77"),
            "{text}"
        );
    }

    #[test]
    fn io_error_keeps_its_errno_on_the_way_to_std() {
        let error = IoError::from_errno(libc::ENOSPC);
        assert_eq!(error.kind(), IoErrorKind::NoSpace);
        assert_eq!(io::Error::from(error).raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(
            io::Error::from(IoError::WRITE_ZERO).kind(),
            io::ErrorKind::WriteZero
        );
    }

    #[test]
    fn queue_error_gives_the_owner_back() {
        struct NotDebug(u8);
        let error = QueueError::TooManySegments {
            owner: NotDebug(7),
            limit: 3,
        };
        assert_eq!(format!("{error:?}"), "TooManySegments { limit: 3, .. }");
        assert_eq!(error.into_owner().0, 7);
    }
}
