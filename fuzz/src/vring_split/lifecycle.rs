//! Moves, successors, saved states and new beginnings.

use std::sync::Arc;

use vm_memory::GuestAddress;
use vring::{
    Chain, PackedPosition, Queue, QueueConfig, QueueState, RingAddresses, RingBase, SaveError,
};

use super::input::{Change, Place, Ring};
use super::{Fresh, Model, Rig, addresses, areas, fresh};
use crate::ring_input::Memory;
use crate::sleep::Sleep;

impl Rig<'_> {
    fn addresses(&self) -> RingAddresses {
        RingAddresses {
            descriptor_area: GuestAddress(self.model.areas.descriptors),
            driver_area: GuestAddress(self.model.areas.available),
            device_area: GuestAddress(self.model.areas.used),
        }
    }

    /// `None`: where it is already.
    pub(super) fn set_memory(&mut self, ring: Option<Ring>) {
        let size = self.model.size;
        let moved = ring.and_then(|ring| addresses(Ring { size, ..ring }));
        let addresses = match moved {
            Some((_, addresses)) => {
                // The guest has not moved with it.
                self.clean = false;
                addresses
            }
            None => self.addresses(),
        };
        let result = self.queue.set_memory(Arc::clone(&self.memory), addresses);
        let expected = self.model.set_memory(self.naive, areas(addresses));
        assert_eq!(result.is_ok(), expected);
    }

    /// A new queue on the same ring, as after a reconnect: what was in flight stays with the guest.
    pub(super) fn resume(&mut self, base: Option<u16>) {
        let next_avail = base.unwrap_or(self.model.next_avail);
        let config = QueueConfig {
            size: self.queue.size(),
            addresses: self.addresses(),
            features: self.queue.features(),
            base: RingBase::Split { next_avail },
        };
        let queue = Queue::start(Arc::clone(&self.memory), &config).unwrap();
        // In order, the driver waits for those that nobody knows of any more.
        let in_order = self.model.features.in_order && !self.model.is_idle();
        self.clean &= base.is_none() && !in_order;
        self.succeed(queue, next_avail);
    }

    /// The state is saved, maybe falsified, and restored.
    pub(super) fn restore(&mut self, change: Option<Change>) {
        let saved = self.queue.save();
        let waiting = self.model.owned.waiting() + self.model.staged.len();
        let Ok(mut state) = saved else {
            let expected = match (self.model.fault, self.heads.len()) {
                (Some(fault), _) => SaveError::Stopped { fault },
                (None, 0) => SaveError::Unpublished { count: waiting },
                (None, count) => SaveError::InFlight {
                    count: u16::try_from(count).expect("at most the queue size"),
                },
            };
            assert_eq!(saved, Err(expected));
            return;
        };
        assert_eq!((self.model.fault, self.heads.len(), waiting), (None, 0, 0));
        let mut next_avail = self.model.next_avail;
        let mut used_idx = Some(self.model.used_idx);
        let expected = QueueState {
            config: QueueConfig {
                size: self.queue.size(),
                addresses: self.addresses(),
                features: self.queue.features(),
                base: RingBase::Split { next_avail },
            },
            used_idx,
        };
        assert_eq!(state, expected);
        let mut areas = self.model.areas;
        let mut wrong_format = false;
        match change {
            None => {}
            Some(Change::Packed(bits)) => {
                let at = PackedPosition::from_bits(bits);
                state.config.base = RingBase::Packed {
                    avail: at,
                    used: at,
                };
                wrong_format = true;
            }
            Some(Change::NextAvail(index)) => {
                next_avail = index;
                state.config.base = RingBase::Split { next_avail };
            }
            Some(Change::UsedIndex(index)) => {
                used_idx = index;
                state.used_idx = used_idx;
            }
            Some(Change::Ring(ring)) => {
                let size = self.model.size;
                if let Some((_, addresses)) = addresses(Ring { size, ..ring }) {
                    state.config.addresses = addresses;
                    areas = super::areas(addresses);
                }
            }
        }
        // Entries from the one used last to the one fetched last: no more than there are.
        let size = self.model.size;
        let fits = !wrong_format
            && areas.hold(self.naive, size)
            && used_idx.is_some_and(|index| {
                (0..=size).any(|count| index.wrapping_add(count) == next_avail)
                    && self.naive.word(areas.used + 2) == index
            });
        let result = Queue::restore(Arc::clone(&self.memory), &state);
        assert_eq!(result.is_ok(), fits);
        if let Ok(queue) = result {
            self.clean &= change.is_none();
            self.model.areas = areas;
            self.succeed(queue, next_avail);
        }
    }

    /// Another device takes over.
    fn succeed(&mut self, queue: Queue<Memory>, next_avail: u16) {
        self.queue = queue;
        self.forgotten |= !self.model.is_idle();
        let Model {
            areas,
            size,
            features,
            ..
        } = self.model;
        self.model = Model::start(self.naive, areas, size, features, next_avail);
        self.forget_in_flight();
    }

    fn forget_in_flight(&mut self) {
        self.heads.clear();
        self.popped.clear();
        self.buffers = None;
        self.device = Sleep::default();
    }

    /// Guest and device begin anew, elsewhere; or stay, if the ring cannot be there.
    pub(super) fn start_fresh(&mut self, ring: Ring, index: u16) {
        self.before_device();
        self.before_guest();
        let features = self.queue.features();
        let Some(Fresh {
            guest,
            queue,
            model,
        }) = fresh(&self.memory, self.naive, (ring, index), features)
        else {
            return;
        };
        self.guest_wrote = false;
        self.device_ran = true;
        self.guest = guest;
        self.queue = queue;
        self.model = model;
        self.chain = Chain::for_queue(self.queue.size());
        self.forget_in_flight();
        self.offered.clear();
        self.visible = 0;
        self.completed.clear();
        self.forgotten = false;
        self.driver = Sleep::default();
        self.clean = matches!(ring.place, Place::Sound { .. });
        self.compare_state();
    }
}
