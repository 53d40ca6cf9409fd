//! The call and err descriptors that the data thread writes to, within reach of other threads.
//!
//! A front-end shares the open file description of each: it can fill an eventfd's counter and make
//! it blocking between our look and our write, and the data thread then sleeps in that write for as
//! long as nobody reads (hostile-inputs N3). So whoever waits for the data thread to end can read
//! them: see [`Handed::release`].

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use event_poll::EventNotifier;

use crate::notifier::Notifier;

/// Descriptors that the data thread may be writing to.
#[derive(Debug, Default)]
pub(super) struct Handed {
    listed: Mutex<(u64, BTreeMap<u64, EventNotifier>)>,
}

impl Handed {
    /// Lists `notifier` until what is returned is dropped: to be kept for as long as the data thread
    /// has a duplicate.
    pub(super) fn list(
        self: &Arc<Self>,
        notifier: EventNotifier,
    ) -> Result<Listed, event_poll::Error> {
        let duplicate = notifier.try_clone()?;
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        let id = listed.0;
        listed.0 += 1;
        listed.1.insert(id, duplicate);
        Ok(Listed {
            notifier,
            id,
            list: Arc::clone(self),
        })
    }

    /// Reads every descriptor once, so that a write that blocks goes on. An interrupt may be lost by
    /// it: only for when the front-end has gone or the device is ending. A front-end that comes back
    /// hands over new descriptors, and each is signalled when it comes.
    pub(super) fn release(&self) {
        let listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        for notifier in listed.1.values() {
            // What cannot be read holds nobody up.
            let _ = notifier.test_and_clear();
        }
    }
}

/// A listed descriptor.
#[derive(Debug)]
pub(super) struct Listed {
    notifier: EventNotifier,
    id: u64,
    list: Arc<Handed>,
}

impl Listed {
    pub(super) fn notifier(&self) -> &EventNotifier {
        &self.notifier
    }
}

impl Notifier for Listed {
    fn notify(&self) -> io::Result<()> {
        self.notifier.notify()
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut listed = self
            .list
            .listed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listed.1.remove(&self.id);
    }
}
