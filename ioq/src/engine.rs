//! Which engine runs a queue, and how `Auto` chooses.

// UNSAFETY: fcntl and preadv2, which tells what a file can do, are foreign calls.
#![expect(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::str::FromStr;

use crate::error::SetupError;

/// What runs a queue's operations.
///
/// As text (`Display`, `FromStr`): `auto`, `aio` (also `native`, QEMU's name), `io_uring`, `null`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// The one that is faster on the file, by the rule and the measurements in the crate's README;
    /// if the host refuses it, the other, and [`IoQueue::fallback`](crate::IoQueue::fallback) says
    /// so.
    #[default]
    Auto,
    /// Linux AIO (`io_submit`).
    LinuxAio,
    /// io_uring. Needs Linux 5.8; cancelling at teardown needs 6.0.
    IoUring,
    /// No I/O: operations complete while they are submitted, reads give zeroes, writes go
    /// nowhere.
    Null,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::LinuxAio => "aio",
            Self::IoUring => "io_uring",
            Self::Null => "null",
        })
    }
}

/// No engine has that name. The caller's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no I/O engine is called {name:?}; there are auto, aio (or native), io_uring and null")]
pub struct UnknownEngine {
    name: String,
}

impl FromStr for Engine {
    type Err = UnknownEngine;

    fn from_str(name: &str) -> Result<Self, UnknownEngine> {
        Ok(match name {
            "auto" => Self::Auto,
            "aio" | "native" => Self::LinuxAio,
            "io_uring" | "io-uring" => Self::IoUring,
            "null" => Self::Null,
            _ => return Err(UnknownEngine { name: name.into() }),
        })
    }
}

/// [`Engine::Auto`] could not have the engine it would have chosen. One line of text, for a log.
#[derive(Debug)]
#[non_exhaustive]
pub struct Fallback {
    /// The engine that suits the file better.
    pub wanted: Engine,
    /// The engine that runs instead.
    pub used: Engine,
    /// What the host said to the one wanted.
    pub reason: SetupError,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            wanted,
            used,
            reason,
        } = self;
        write!(f, "using {used} instead of {wanted}: {reason}")
    }
}

/// The engine for `file`, by the measurements in README.md: io_uring where it submits without a
/// kernel thread of its own, which costs two to seven times what Linux AIO does. That is what direct I/O is
/// for, and reads through the page cache; writes through it go to such a thread.
pub(crate) fn preferred(file: &File) -> Engine {
    let inline = status_flags(file).is_ok_and(|flags| {
        flags & libc::O_DIRECT != 0 || flags & libc::O_ACCMODE == libc::O_RDONLY
    });
    if inline && takes_nowait(file) {
        Engine::IoUring
    } else {
        Engine::LinuxAio
    }
}

/// Whether the file can say "this would block" (`FMODE_NOWAIT`). io_uring hands every operation on
/// a file that cannot, tmpfs among them, to a kernel thread.
fn takes_nowait(file: &File) -> bool {
    let mut byte = 0u8;
    let segment = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // The kernel looks at the flag before it looks at anything else (kiocb_set_rw_flags), and with
    // the flag it does not wait for a disk.
    // SAFETY: one iovec that names one writable byte; both outlive the call.
    let rc = unsafe { libc::preadv2(file.as_raw_fd(), &raw const segment, 1, 0, libc::RWF_NOWAIT) };
    if rc >= 0 {
        return true;
    }
    // EAGAIN: it would have blocked. EINVAL: one byte is not aligned for O_DIRECT.
    matches!(
        io::Error::last_os_error().raw_os_error(),
        Some(libc::EAGAIN | libc::EINVAL)
    )
}

/// Refuses a file that no engine can serve.
pub(crate) fn check(file: &File) -> Result<(), SetupError> {
    if status_flags(file).map_err(SetupError::File)? & libc::O_APPEND != 0 {
        return Err(SetupError::AppendMode);
    }
    Ok(())
}

fn status_flags(file: &File) -> io::Result<libc::c_int> {
    // SAFETY: no pointer is passed.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for engine in [
            Engine::Auto,
            Engine::LinuxAio,
            Engine::IoUring,
            Engine::Null,
        ] {
            assert_eq!(engine.to_string().parse(), Ok(engine));
        }
        assert_eq!("native".parse(), Ok(Engine::LinuxAio));
        let error = "libaio".parse::<Engine>().unwrap_err().to_string();
        assert!(
            error.contains("libaio") && error.contains("io_uring"),
            "{error}"
        );
    }

    #[test]
    fn tmpfs_cannot_say_that_it_would_block_and_keeps_aio() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        assert!(!takes_nowait(file.as_file()));
        assert_eq!(preferred(file.as_file()), Engine::LinuxAio);
        let read_only = File::open(file.path()).unwrap();
        assert_eq!(preferred(&read_only), Engine::LinuxAio);
    }

    #[test]
    fn buffered_writes_keep_aio_wherever_they_go() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        assert_eq!(preferred(&file), Engine::LinuxAio);
    }
}
