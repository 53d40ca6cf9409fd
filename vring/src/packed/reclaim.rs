//! Chains that a device which died has left in a packed ring. Cold, but for the record of a chain.

use vm_memory::GuestMemory;

use super::PackedQueue;
use super::descriptor::{F_AVAIL, F_USED, Tail, available_flags, used_flags};
use super::position::wrap;
use super::walk::{Broken, Walked, walk_list};
use crate::chain::Chain;
use crate::head::Head;
use crate::reclaim::{ReclaimError, RingDescriptor};

impl<M: GuestMemory> PackedQueue<M> {
    /// Gives the descriptors of the latest chain popped to `record`, in order; none if it has been
    /// un-popped. To be called before anything is published.
    ///
    /// They are read once more, for the record alone: what the guest has changed since the pop is in
    /// the record and not in the chain. A record is checked like any input when it is used.
    #[inline]
    pub fn describe_latest(&self, mut record: impl FnMut(RingDescriptor)) {
        let Some(slot) = self.latest else {
            return;
        };
        let descriptors = self.outstanding.descriptors(slot);
        let first = self.next_avail.wrapping_sub(descriptors);
        for ahead in 0..descriptors {
            let (Tail { len, id, flags }, address) = self.rings.later(first.wrapping_add(ahead));
            record(RingDescriptor {
                address,
                len,
                id,
                flags,
            });
        }
    }

    /// Takes over the chain of `descriptors`; see [`Queue::reclaim`](crate::Queue::reclaim).
    ///
    /// # Errors
    ///
    /// [`ReclaimError`].
    pub fn reclaim(
        &mut self,
        descriptors: &[RingDescriptor],
        chain: &mut Chain,
    ) -> Result<Head, ReclaimError> {
        let count = u16::try_from(descriptors.len()).unwrap_or(u16::MAX);
        if count == 0 || count > self.size().get() {
            return Err(ReclaimError::Impossible);
        }
        let walked = walk_list(
            &**self.rings.memory(),
            self.features.indirect_desc,
            descriptors,
            chain,
        );
        let (Walked { descriptors, id }, fault) = match walked {
            Ok(walked) => (walked, None),
            Err(Broken::Chain { walked, fault }) => (walked, Some(fault)),
            Err(Broken::Endless) => {
                chain.clear();
                return Err(ReclaimError::Impossible);
            }
        };
        // The positions passed must be as many as the record says, or the ring is out of step.
        if descriptors != count {
            chain.clear();
            return Err(ReclaimError::Impossible);
        }
        let Ok(slot) = self.outstanding.insert(id, descriptors) else {
            chain.clear();
            return Err(ReclaimError::Impossible);
        };
        // Not one that `unpop` may take back: that would move the position.
        self.latest = None;
        if self.in_order.is_some() {
            let writable = fault.is_none().then(|| chain.writable_len());
            self.arrive_in_order(slot, writable);
        }
        let head = Head::new(slot);
        match fault {
            None => Ok(head),
            Some(fault) => Err(ReclaimError::Chain { head, fault }),
        }
    }

    /// Undoes a [`reclaim`](Self::reclaim); see [`Queue::unreclaim`](crate::Queue::unreclaim).
    ///
    /// # Errors
    ///
    /// Returns the head if it is not in flight, or not the latest with `VIRTIO_F_IN_ORDER`.
    pub fn unreclaim(&mut self, head: Head) -> Result<(), Head> {
        let slot = head.index();
        if let Some(in_order) = &mut self.in_order
            && !in_order.retract(slot)
        {
            return Err(head);
        }
        match self.outstanding.remove(slot) {
            Some(_) => Ok(()),
            None => Err(head),
        }
    }

    /// Takes back what a device which died has staged and not published: used descriptors behind the
    /// position at which the driver looks. Left there, they would be found when that position passes
    /// them, though their chains are still in flight, and be completions for a second time.
    ///
    /// For a queue started where that device stopped, before anything is popped or pushed. The
    /// positions are the device's until it publishes, so nobody else reads or writes them.
    pub fn discard_staged(&mut self) {
        let size = self.size().get();
        let mut changed = false;
        for ahead in 1..self.next_avail.wrapping_sub(self.used) {
            let index = self.used.wrapping_add(ahead);
            let wrap = wrap(index, size);
            let (tail, _) = self.rings.later(index);
            let both = F_AVAIL | F_USED;
            if tail.flags & both == used_flags(wrap) {
                let flags = tail.flags & !both | available_flags(wrap);
                self.rings.store_tail(index, Tail { flags, ..tail });
                changed = true;
            }
        }
        if changed {
            self.rings.mark_used_dirty(self.used, self.next_avail);
        }
    }
}
