//! Chains that a device which died has left in a split ring. Cold: once after such an end.

use vm_memory::GuestMemory;

use super::walk::walk;
use super::{NONE, SplitQueue};
use crate::chain::Chain;
use crate::head::Head;
use crate::reclaim::ReclaimError;

impl<M: GuestMemory> SplitQueue<M> {
    /// Takes over the chain at `head`; see [`Queue::reclaim`](crate::Queue::reclaim). Its descriptors
    /// are read anew: the driver may not change them while the chain is in flight.
    ///
    /// # Errors
    ///
    /// [`ReclaimError`].
    pub fn reclaim(&mut self, head: u16, chain: &mut Chain) -> Result<Head, ReclaimError> {
        if head >= self.rings.size().get()
            || !self.in_flight.insert(head) && !self.arrive_in_order(head)
        {
            return Err(ReclaimError::Impossible);
        }
        // Not one that `unpop` may take back: that would move the position.
        self.latest = NONE;
        let indirect_desc = self.features.indirect_desc;
        let walked = walk(&self.rings, indirect_desc, head, chain);
        let head = Head::new(head);
        match walked {
            Ok(()) => {
                if self.in_order.is_some() {
                    self.set_latest_writable(chain.writable_len());
                }
                Ok(head)
            }
            Err(fault) => Err(ReclaimError::Chain { head, fault }),
        }
    }

    /// Undoes a [`reclaim`](Self::reclaim); see [`Queue::unreclaim`](crate::Queue::unreclaim).
    ///
    /// # Errors
    ///
    /// Returns the head if it is not in flight, or not the latest with `VIRTIO_F_IN_ORDER`.
    pub fn unreclaim(&mut self, head: Head) -> Result<(), Head> {
        let index = head.index();
        let taken_back = match &mut self.in_order {
            None => self.in_flight.remove(index),
            Some(in_order) => in_order.retract(index),
        };
        if taken_back { Ok(()) } else { Err(head) }
    }
}
