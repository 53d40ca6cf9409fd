//! What keeps others off an image while it is served: its lock, and the claim to a block device. Let go of and taken
//! again when a guest migrates to another process.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::lock::{self, LockRefused};
use super::{ImageError, claim};

/// What an image needs to be held, and whether it is.
#[derive(Debug)]
pub(super) struct Hold {
    /// Nobody is to be kept off.
    shared: bool,
    exclusive: bool,
    /// A block device that is written to.
    claims: bool,
    held: Mutex<Option<Held>>,
}

/// Let go of when dropped, but for the lock, which goes with its file or with [`Hold::release`].
#[derive(Debug)]
struct Held {
    /// Open for nothing but its claim to the block device.
    _claim: Option<File>,
}

impl Hold {
    pub(super) fn new(shared: bool, exclusive: bool, claims: bool) -> Self {
        Self {
            shared,
            exclusive,
            claims,
            held: Mutex::new(None),
        }
    }

    /// Keeps others off. Again: nothing happens.
    pub(super) fn take(&self, path: &Path, file: &File) -> Result<(), ImageError> {
        if self.shared {
            return Ok(());
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.is_some() {
            return Ok(());
        }
        let at = || path.to_owned();
        lock::lock(file, self.exclusive).map_err(|refused| match refused {
            LockRefused::Held(holder) => ImageError::InUse { path: at(), holder },
            LockRefused::Failed(source) => ImageError::Lock { path: at(), source },
        })?;
        let claimed = if self.claims {
            claim(path, file).map(Some)
        } else {
            Ok(None)
        };
        match claimed {
            Ok(claim) => {
                *held = Some(Held { _claim: claim });
                Ok(())
            }
            Err(error) => {
                lock::unlock(file);
                Err(error)
            }
        }
    }

    /// Lets others have it.
    pub(super) fn release(&self, file: &File) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.take().is_some() {
            lock::unlock(file);
        }
    }
}
