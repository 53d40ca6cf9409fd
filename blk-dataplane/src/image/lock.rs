//! The lock on an image: one writer, or any number of readers.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, fcntl};

/// The process that has an image locked, as far as the host tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// Its process number.
    pub pid: u32,
    /// Its name (`/proc/PID/comm`), empty if that could not be read.
    pub name: String,
}

impl fmt::Display for LockHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)?;
        if !self.name.is_empty() {
            // A process chooses its name: it must not put control characters into a log.
            write!(f, " ({})", self.name.escape_default())?;
        }
        Ok(())
    }
}

/// Why a lock was not granted.
#[derive(Debug)]
pub(super) enum LockRefused {
    /// Somebody else has one that excludes ours.
    Held(Option<LockHolder>),
    /// The host or its file system takes no locks.
    Failed(io::Error),
}

/// Locks the whole file: shared, or for one alone.
///
/// An open file description lock: unlike a POSIX lock it belongs to `file` and its duplicates, so
/// that another part of the process which opens and closes the same file does not drop it. It goes
/// with the last descriptor, however the process ends. QEMU's own locks are ranges of the same
/// kind, so the two exclude each other.
pub(super) fn lock(file: &File, exclusive: bool) -> Result<(), LockRefused> {
    let wanted = whole_file(exclusive);
    match fcntl(file, FcntlArg::F_OFD_SETLK(&wanted)) {
        Ok(_) => Ok(()),
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => {
            Err(LockRefused::Held(holder(file, exclusive)))
        }
        Err(errno) => Err(LockRefused::Failed(errno.into())),
    }
}

/// Takes the lock off again.
pub(super) fn unlock(file: &File) {
    let none = libc::flock {
        l_type: UNLOCK,
        ..whole_file(false)
    };
    if let Err(errno) = fcntl(file, FcntlArg::F_OFD_SETLK(&none)) {
        tracing::warn!(%errno, "an image stays locked");
    }
}

#[expect(clippy::cast_possible_truncation, reason = "as in `whole_file`")]
const UNLOCK: libc::c_short = libc::F_UNLCK as libc::c_short;

#[expect(
    clippy::cast_possible_truncation,
    reason = "F_RDLCK, F_WRLCK and SEEK_SET are small; libc's types for field and constant differ"
)]
const fn whole_file(exclusive: bool) -> libc::flock {
    libc::flock {
        l_type: if exclusive {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        // Length 0 is to the end, wherever that moves.
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn holder(file: &File, exclusive: bool) -> Option<LockHolder> {
    // Names the process for a POSIX lock, and only says -1 for one of an open file description.
    let mut found = whole_file(exclusive);
    if fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)).is_ok()
        && let Ok(pid @ 1..) = u32::try_from(found.l_pid)
    {
        return Some(named(pid));
    }
    let metadata = file.metadata().ok()?;
    let device = metadata.dev();
    let identity = format!(
        "{:02x}:{:02x}:{}",
        libc::major(device),
        libc::minor(device),
        metadata.ino()
    );
    // Processes of other users keep their descriptors to themselves: then nobody is named.
    fs::read_dir("/proc")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .find(|pid| locks(*pid, &identity))
        .map(named)
}

/// Whether a descriptor of the process carries a lock on the file `identity`
/// (`/proc/PID/fdinfo/FD`, see proc_pid_fdinfo(5)).
fn locks(pid: u32, identity: &str) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else {
        return false;
    };
    descriptors.filter_map(Result::ok).any(|descriptor| {
        fs::read_to_string(descriptor.path()).is_ok_and(|info| {
            info.lines()
                .filter(|line| line.starts_with("lock:"))
                .any(|line| line.split_whitespace().any(|word| word == identity))
        })
    })
}

fn named(pid: u32) -> LockHolder {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    LockHolder {
        pid,
        name: name.trim_end().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn writers_exclude_everybody_and_readers_only_writers() {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        for (first, second, granted) in [
            (true, true, false),
            (true, false, false),
            (false, true, false),
            (false, false, true),
        ] {
            let (one, other) = (opened(scratch.path()), opened(scratch.path()));
            lock(&one, first).unwrap();
            match lock(&other, second) {
                Ok(()) => assert!(granted),
                Err(LockRefused::Held(holder)) => {
                    assert!(!granted);
                    assert_eq!(holder.unwrap().pid, std::process::id());
                }
                Err(LockRefused::Failed(error)) => panic!("{error}"),
            }
            drop(one);
            lock(&other, second).unwrap();
        }
    }

    #[test]
    fn a_holders_name_cannot_garble_a_log() {
        let holder = LockHolder {
            pid: 7,
            name: "a\x1b[2J\nb".to_owned(),
        };
        assert_eq!(holder.to_string(), r"process 7 (a\u{1b}[2J\nb)");
    }
}
