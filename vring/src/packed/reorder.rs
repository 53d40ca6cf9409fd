//! What `VIRTIO_F_IN_ORDER` changes (virtio 1.3 §2.8.8). Kept out of the way of queues without it.

use vm_memory::GuestMemory;

use super::PackedQueue;

impl<M: GuestMemory> PackedQueue<M> {
    /// The rest of a pop: `writable` bytes, or `None` for a chain that is broken.
    #[inline(never)]
    pub(super) fn arrive_in_order(&mut self, slot: u16, writable: Option<u64>) {
        let Some(in_order) = &mut self.in_order else {
            return;
        };
        let arrived = in_order.arrive(slot);
        // A slot is taken until its chain leaves the order.
        debug_assert!(arrived, "slot {slot} is still in the order");
        if let Some(writable) = writable {
            in_order.set_latest_writable(writable);
        }
    }

    /// Notes that a chain is complete.
    #[inline(never)]
    pub(super) fn push_in_order(&mut self, slot: u16, len: u32) {
        let in_order = self.in_order.as_mut();
        let was_in_flight = in_order.is_some_and(|in_order| in_order.complete(slot, len));
        debug_assert!(was_in_flight, "head {slot} is not from this queue");
    }

    /// Stages the used descriptors of the chains whose turn it is.
    ///
    /// A run's descriptor goes where that of its first chain would have gone, which in this order
    /// is where that chain itself was, and the position passes all of them.
    pub(super) fn stage_in_order(&mut self) {
        if self.lost {
            return;
        }
        loop {
            let Some(in_order) = &mut self.in_order else {
                return;
            };
            let (mut id, mut descriptors) = (0, 0);
            let outstanding = &mut self.outstanding;
            let run = in_order.take_run(|slot| {
                if let Some(chain) = outstanding.remove(slot) {
                    id = chain.id;
                    descriptors += chain.descriptors;
                }
            });
            let Some(run) = run else {
                return;
            };
            self.stage(id, run.written, descriptors);
            self.staged += usize::from(run.chains);
        }
    }
}
