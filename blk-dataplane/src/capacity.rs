//! The device's size, which changes while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::{ResizeError, Resized};
use crate::notifier::Notifier;

/// The size in force, and who wants to know when it changes. Read by the data threads for each request,
/// and written once in a blue moon: the line stays in every processor's cache.
pub(crate) struct Capacity {
    bytes: AtomicU64,
    /// Held for a whole change, so that the listeners of one hear of it before the next.
    listeners: Mutex<Listeners>,
}

#[derive(Default)]
struct Listeners {
    next_id: u64,
    list: Vec<(u64, Box<dyn Notifier>)>,
}

impl std::fmt::Debug for Capacity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Capacity").field(&self.get()).finish()
    }
}

impl Capacity {
    pub(crate) fn new(bytes: u64) -> Self {
        Self {
            bytes: AtomicU64::new(bytes),
            listeners: Mutex::default(),
        }
    }

    /// In bytes.
    ///
    /// Relaxed is enough for a request that the guest has sent because it was told of a new size: the
    /// telling, the guest and the ring lie between, each of them a release and an acquire.
    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Takes over the size that `measure` finds, and tells the listeners if it is another.
    pub(crate) fn set_from(
        &self,
        measure: impl FnOnce() -> Result<u64, ResizeError>,
    ) -> Result<Resized, ResizeError> {
        let listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let new = measure()?;
        let old = self.bytes.swap(new, Ordering::Relaxed);
        if new != old {
            tracing::info!(old, new, "the device has another capacity");
            for (_, listener) in &listeners.list {
                if let Err(error) = listener.notify() {
                    tracing::warn!(%error, "a change of the capacity could not be told");
                }
            }
        }
        Ok(Resized { old, new })
    }
}

/// As long as it lives, a listener hears of changes of a device's configuration space. See
/// [`Device::on_config_change`](crate::Device::on_config_change).
#[derive(Debug)]
#[must_use = "dropping it ends the subscription"]
pub struct ConfigSubscription {
    capacity: Arc<Capacity>,
    id: u64,
}

impl ConfigSubscription {
    pub(crate) fn new(capacity: &Arc<Capacity>, notifier: Box<dyn Notifier>) -> Self {
        let mut listeners = capacity
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let id = listeners.next_id;
        listeners.next_id += 1;
        listeners.list.push((id, notifier));
        Self {
            capacity: Arc::clone(capacity),
            id,
        }
    }
}

impl Drop for ConfigSubscription {
    fn drop(&mut self) {
        let mut listeners = self
            .capacity
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.list.retain(|(id, _)| *id != self.id);
    }
}
