//! Whether what the host's page cache holds still gets onto stable storage.
//!
//! After a failed fdatasync Linux calls pages clean that it has not written: reads find them, the next fdatasync
//! says that all is well, and they are gone when the memory is needed or the host goes down. Which pages, nobody
//! can tell. So where the page cache is used, no flush succeeds any more after one has failed
//! (hostile-inputs I6), until the image is opened anew.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Shared by all that runs a device.
#[derive(Debug)]
pub(crate) struct WriteBack {
    /// Whether there is a page cache that forgets.
    forgets: bool,
    failed: AtomicBool,
}

impl WriteBack {
    pub(crate) fn new(forgets: bool) -> Self {
        Self {
            forgets,
            failed: AtomicBool::new(false),
        }
    }

    /// An fdatasync has failed.
    pub(crate) fn note_failure(&self) {
        if self.forgets && !self.failed.swap(true, Ordering::AcqRel) {
            tracing::error!(
                "an fdatasync has failed, and the host may have lost what it should have written: every flush \
                 fails until the image is opened anew"
            );
        }
    }

    /// Whether no flush may succeed any more.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// What an fdatasync by somebody else than a data thread has come to.
    pub(crate) fn judge(&self, result: io::Result<()>) -> io::Result<()> {
        match result {
            Ok(()) if self.has_failed() => Err(io::Error::other(
                "an earlier fdatasync has failed, and the host may have lost what it should have written",
            )),
            Err(error) => {
                self.note_failure();
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }
}
