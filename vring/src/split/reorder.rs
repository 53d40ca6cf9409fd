//! What `VIRTIO_F_IN_ORDER` changes (virtio 1.3 §2.7.9). All of it cold: out of the way of queues without it,
//! where each instruction counts.

use vm_memory::GuestMemory;

use super::SplitQueue;

impl<M: GuestMemory> SplitQueue<M> {
    /// Takes a head that `in_flight` has refused: because it has no room, with
    /// `VIRTIO_F_IN_ORDER`. False if it is in flight, or waits for its turn to be given back and so
    /// is still the device's.
    #[cold]
    pub(super) fn arrive_in_order(&mut self, index: u16) -> bool {
        let in_order = self.in_order.as_mut();
        in_order.is_some_and(|in_order| in_order.arrive(index))
    }

    /// Notes how much there is to write in the chain just popped, which is sound.
    #[cold]
    pub(super) fn set_latest_writable(&mut self, writable: u64) {
        if let Some(in_order) = &mut self.in_order {
            in_order.set_latest_writable(writable);
        }
    }

    /// The rest of a push whose head is not in `in_flight`.
    #[cold]
    pub(super) fn push_in_order(&mut self, index: u16, len: u32) {
        let in_order = self.in_order.as_mut();
        let was_in_flight = in_order.is_some_and(|in_order| in_order.complete(index, len));
        debug_assert!(was_in_flight, "head {index} is not from this queue");
    }

    /// Stages the used elements of the chains whose turn it is.
    ///
    /// A run's element goes where that of its first chain would have gone, and the index passes all
    /// of them (virtio 1.3 §2.7.9).
    pub(super) fn stage_in_order(&mut self) {
        let mut position = self.next_used();
        let Some(in_order) = (self.in_order.as_mut()).filter(|_| !self.lost) else {
            return;
        };
        while let Some(run) = in_order.take_run(|_| {}) {
            self.rings
                .store_used_element(position, run.last, run.written);
            position = position.wrapping_add(run.chains);
            self.staged += usize::from(run.chains);
        }
    }
}
