//! A device embedded in a VMM: [`DataPlane`] over the VMM's own `GuestMemoryMmap`.

use std::sync::Arc;

use blk_dataplane::{DataPlane, Device, Notifier, QueueSetup};
use vring::RingBase;

use super::Watchdog;
use super::queue::{FEATURES, GuestQueue};
use super::ram::{GuestRam, Memory};

pub(crate) struct Embedded {
    pub(crate) plane: DataPlane<Memory>,
    pub(crate) ram: Arc<GuestRam>,
    /// Dropped after the device, whose end it watches too.
    _watchdog: Watchdog,
}

/// Where a ring starts: the next available index of a split ring, or the base of either.
pub(crate) trait Start {
    fn base(self) -> RingBase;
}

impl Start for u16 {
    fn base(self) -> RingBase {
        RingBase::Split { next_avail: self }
    }
}

impl Start for RingBase {
    fn base(self) -> RingBase {
        self
    }
}

/// What starts `queue` as it is, from `base`.
pub(crate) fn setup(queue: &GuestQueue, base: impl Start) -> QueueSetup {
    let call: Box<dyn Notifier> = Box::new(queue.call.try_clone().unwrap());
    let err: Box<dyn Notifier> = Box::new(queue.err.try_clone().unwrap());
    QueueSetup {
        size: queue.size(),
        addresses: queue.addresses,
        base: base.base(),
        features: queue.features,
        kick: Some(queue.kick.try_clone().unwrap()),
        call: Some(call),
        err: Some(err),
        enabled: true,
        inflight: None,
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

    pub(crate) fn start(&mut self, queue: &GuestQueue, base: impl Start) {
        self.plane
            .start_queue(queue.index, setup(queue, base))
            .unwrap();
    }

    /// Stops a split queue; the next available index.
    pub(crate) fn stop(&mut self, index: u16) -> u16 {
        match self.plane.stop_queue(index).unwrap() {
            RingBase::Split { next_avail } => next_avail,
            base @ RingBase::Packed { .. } => panic!("a packed ring's base: {base:?}"),
        }
    }

    /// A queue of the guest, started.
    pub(crate) fn queue_with(&mut self, index: u16, size: u32, features: u64) -> GuestQueue {
        let queue = self.prepare(index, size, features);
        self.start(&queue, queue.fresh());
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
