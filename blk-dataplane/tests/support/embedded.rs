//! A device embedded in a VMM: [`DataPlane`] over the VMM's own `GuestMemoryMmap`.

use std::sync::Arc;

use blk_dataplane::{DataPlane, Device, Notifier, QueueSetup};

use super::Watchdog;
use super::queue::{FEATURES, GuestQueue};
use super::ram::{GuestRam, Memory};

pub(crate) struct Embedded {
    pub(crate) plane: DataPlane<Memory>,
    pub(crate) ram: Arc<GuestRam>,
    /// Dropped after the device, whose end it watches too.
    _watchdog: Watchdog,
}

/// What starts `queue` as it is, from `base`.
pub(crate) fn setup(queue: &GuestQueue, base: u16) -> QueueSetup {
    let call: Box<dyn Notifier> = Box::new(queue.call.try_clone().unwrap());
    let err: Box<dyn Notifier> = Box::new(queue.err.try_clone().unwrap());
    QueueSetup {
        size: queue.size(),
        addresses: queue.addresses,
        base,
        features: queue.features,
        kick: queue.kick.try_clone().unwrap(),
        call: Some(call),
        err: Some(err),
        enabled: true,
    }
}

impl Embedded {
    pub(crate) fn new(device: &Device) -> Self {
        let ram = GuestRam::new();
        let plane = DataPlane::start(device, Arc::clone(&ram.memory)).unwrap();
        Self {
            plane,
            ram,
            _watchdog: Watchdog::start(),
        }
    }

    /// A queue of the guest, not started.
    pub(crate) fn prepare(&self, index: u16, size: u32, features: u64) -> GuestQueue {
        GuestQueue::new(&self.ram, index, size, features)
    }

    pub(crate) fn start(&mut self, queue: &GuestQueue, base: u16) {
        self.plane
            .start_queue(queue.index, setup(queue, base))
            .unwrap();
    }

    /// A queue of the guest, started.
    pub(crate) fn queue_with(&mut self, index: u16, size: u32, features: u64) -> GuestQueue {
        let queue = self.prepare(index, size, features);
        self.start(&queue, 0);
        queue
    }

    pub(crate) fn queue(&mut self, index: u16, size: u32) -> GuestQueue {
        self.queue_with(index, size, FEATURES)
    }
}

/// A device with one queue of 128 entries.
pub(crate) fn single(device: &Device) -> (Embedded, GuestQueue) {
    let mut vmm = Embedded::new(device);
    let queue = vmm.queue(0, 128);
    (vmm, queue)
}
