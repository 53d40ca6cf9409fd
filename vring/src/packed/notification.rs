//! Who is to be notified: the driver of what was used, the device of what was made available
//! (virtio 1.3 §2.8.10, §2.8.14).

use std::sync::atomic::{Ordering, fence};

use vm_memory::GuestMemory;

use super::PackedQueue;
use super::event::EventSuppression;
use super::position::to_position;

impl<M: GuestMemory> PackedQueue<M> {
    /// Decides whether the driver is to be interrupted, once for everything published since the
    /// last decision.
    ///
    /// No if nothing was published since the last decision. The first decision after a start is
    /// made as if something had been, since nobody knows what the driver has been told before: an
    /// interrupt too many does no harm. Otherwise as the driver's event suppression structure
    /// says: always, never, or, with `VIRTIO_F_EVENT_IDX`, if the descriptor it names was passed,
    /// and the first time.
    #[inline]
    pub fn should_notify(&mut self) -> bool {
        let passed = std::mem::take(&mut self.unsignalled);
        if passed == 0 || self.lost {
            return false;
        }
        // Full barrier between the store of the used descriptor and the load of what the driver
        // wants; pairs with the driver's, between storing what it wants and looking at the
        // descriptor again (virtio 1.3 §2.8.22; `PackedDriver::enable_interrupts`). Without it
        // both could miss the other's store, and the driver sleep for ever.
        fence(Ordering::SeqCst);
        let size = self.size().get();
        let used = to_position(self.used, size);
        let event_idx = self.features.event_idx;
        self.rings
            .driver_event()
            .wants(event_idx, used, passed, size)
    }

    /// Asks the driver not to kick while the device is polling anyway. A hint: kicks may come.
    ///
    /// With `VIRTIO_F_EVENT_IDX` too: the position last asked for comes round again after two
    /// passes of the ring, which a busy driver makes in no time.
    #[inline]
    pub fn disable_notification(&mut self) {
        if !self.kicks_disabled && !self.lost {
            self.rings.store_device_event(EventSuppression::DISABLE);
            self.kicks_disabled = true;
        }
    }

    /// Asks the driver to kick for the next chain, then looks again: true means the ring is empty
    /// and a kick will come, so the caller may sleep; false means that buffers raced in and must
    /// be processed first.
    ///
    /// Looks exactly once, however fast the driver publishes (row N6). After a ring fault it is
    /// true: nothing is fetched any more.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        if self.fault.is_some() {
            return true;
        }
        let size = self.size().get();
        let wanted = if self.features.event_idx {
            EventSuppression::at(to_position(self.next_avail, size))
        } else {
            EventSuppression::ENABLE
        };
        self.rings.store_device_event(wanted);
        self.kicks_disabled = false;
        // Full barrier between asking for kicks and the last look at the descriptor; pairs with
        // the driver's, between making a descriptor available and reading what the device asked
        // for (virtio 1.3 §2.8.21.2; `PackedDriver::needs_kick`).
        fence(Ordering::SeqCst);
        !self.is_available()
    }
}
