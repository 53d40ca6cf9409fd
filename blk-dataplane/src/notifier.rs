//! How the device tells a guest or front-end something.

use std::io;
use std::sync::Arc;

use event_poll::EventNotifier;

/// Delivers a queue's interrupt, or its error signal. A VMM may bring its own, such as a direct MSI
/// ioctl; [`EventNotifier`] is the eventfd one.
///
/// Called on the data thread between batches: it must not block.
pub trait Notifier: Send {
    /// Signals once. Signals not yet taken may merge.
    ///
    /// # Errors
    /// Whatever the transport says. The device logs it and goes on: completions stay in the ring.
    fn notify(&self) -> io::Result<()>;
}

impl Notifier for EventNotifier {
    fn notify(&self) -> io::Result<()> {
        Self::notify(self)
    }
}

/// One that all data threads signal.
#[derive(Clone)]
pub(crate) struct SharedNotifier(pub(crate) Arc<dyn Notifier + Sync>);

impl std::fmt::Debug for SharedNotifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SharedNotifier")
    }
}
