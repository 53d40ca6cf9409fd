//! Who is to be notified: the driver of what was used, the device of what was made available
//! (virtio 1.3 §2.7.7, §2.7.10).

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::GuestMemory;

use super::{SplitQueue, layout};
use crate::notification::need_event;

/// `avail.flags`: the driver wants no interrupt. The only bit looked at (row A7).
pub(crate) const NO_INTERRUPT: u16 = layout::flag(VRING_AVAIL_F_NO_INTERRUPT);
/// `used.flags`: the device wants no kick.
pub(crate) const NO_NOTIFY: u16 = layout::flag(VRING_USED_F_NO_NOTIFY);

impl<M: GuestMemory> SplitQueue<M> {
    /// Decides whether the driver is to be interrupted, once for everything published since the
    /// last decision.
    ///
    /// No if nothing was published since the last decision. The first decision after a start is
    /// made as if something had been, since nobody knows what the driver has been told before: an
    /// interrupt too many does no harm. Otherwise, with `VIRTIO_F_EVENT_IDX`: yes if the published
    /// index passed `used_event`, and always the first time. Without: yes unless `avail.flags` has
    /// `NO_INTERRUPT` set.
    #[inline]
    pub fn should_notify(&mut self) -> bool {
        if self.lost {
            return false;
        }
        let new = self.used_idx;
        let old = self.signalled_used.replace(new);
        if old == Some(new) {
            return false;
        }
        // Full barrier between the store of `used.idx` and the load of what the driver wants;
        // pairs with the driver's, between storing what it wants and reading `used.idx` again
        // (virtio 1.3 §2.7.7.2; `SplitDriver::enable_interrupts`). Without it both could miss
        // the other's store, and the driver sleep for ever.
        fence(Ordering::SeqCst);
        if !self.features.event_idx {
            return self.rings.avail_flags() & NO_INTERRUPT == 0;
        }
        match old {
            Some(old) => need_event(self.rings.used_event(), new, old),
            None => true,
        }
    }

    /// Asks the driver not to kick while the device is polling anyway. A hint: kicks may come.
    ///
    /// With `VIRTIO_F_EVENT_IDX` there is nothing to write. The driver kicks when its index
    /// passes `avail_event`, and once it has passed, the stale value keeps it quiet for the next
    /// 65535 entries.
    #[inline]
    pub fn disable_notification(&mut self) {
        if !self.features.event_idx && !self.kicks_disabled && !self.lost {
            self.rings.store_used_flags(NO_NOTIFY);
            self.kicks_disabled = true;
        }
    }

    /// Asks the driver to kick for the next entry, then looks again: true means the ring is
    /// empty and a kick will come, so the caller may sleep; false means that buffers raced in
    /// and must be processed first.
    ///
    /// Looks exactly once, however fast the driver publishes (row N6). After a ring fault it is
    /// true: nothing is fetched any more.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        if self.fault.is_some() {
            return true;
        }
        if self.features.event_idx {
            self.rings.store_avail_event(self.next_avail);
        } else {
            self.rings.store_used_flags(0);
            self.kicks_disabled = false;
        }
        // Full barrier between asking for kicks and the last look at `avail.idx`; pairs with the
        // driver's, between storing `avail.idx` and reading what the device asked for
        // (virtio 1.3 §2.7.13.4; `SplitDriver::needs_kick`).
        fence(Ordering::SeqCst);
        self.rings.avail_idx() == self.next_avail
    }
}
