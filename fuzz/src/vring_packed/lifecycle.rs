//! Moves, successors, saved states and new beginnings.

use std::sync::Arc;

use vm_memory::GuestAddress;
use vring::{Chain, Queue, QueueConfig, QueueState, RingAddresses, RingBase, SaveError};

use super::input::{Change, Place, Ring, Start};
use super::model::outstanding;
use super::{Fresh, Model, Position, Rig, addresses, areas, fresh, packed_base};
use crate::ring_input::Memory;
use crate::sleep::Sleep;

impl Rig<'_> {
    fn addresses(&self) -> RingAddresses {
        RingAddresses {
            descriptor_area: GuestAddress(self.model.areas.descriptors),
            driver_area: GuestAddress(self.model.areas.driver_event),
            device_area: GuestAddress(self.model.areas.device_event),
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
    pub(super) fn resume(&mut self, base: Option<(u16, u16)>) {
        let (avail, used) = match base {
            Some((avail, used)) => (Position::from_bits(avail), Position::from_bits(used)),
            None => (self.model.avail, self.model.used),
        };
        let config = QueueConfig {
            size: self.queue.size(),
            addresses: self.addresses(),
            features: self.queue.features(),
            base: packed_base(avail, used),
        };
        let result = Queue::start(Arc::clone(&self.memory), &config);
        let fits = outstanding(avail, used, self.model.size).is_some();
        assert_eq!(result.is_ok(), fits);
        if let Ok(queue) = result {
            // A chain that was staged is half written where the next one goes. In order, the driver
            // waits for those that nobody knows of any more.
            let in_order = self.model.features.in_order && !self.model.is_idle();
            self.clean &= base.is_none() && self.model.staged.is_empty() && !in_order;
            self.succeed(queue, (avail, used));
        }
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
        let (mut avail, mut used) = (self.model.avail, self.model.used);
        let expected = QueueState {
            config: QueueConfig {
                size: self.queue.size(),
                addresses: self.addresses(),
                features: self.queue.features(),
                base: packed_base(avail, used),
            },
            used_idx: None,
        };
        assert_eq!(state, expected);
        let mut areas = self.model.areas;
        let mut wrong_format = false;
        match change {
            None => {}
            Some(Change::UsedIndex(index)) => {
                state.used_idx = Some(index);
                wrong_format = true;
            }
            Some(Change::Split(next_avail)) => {
                state.config.base = RingBase::Split { next_avail };
                wrong_format = true;
            }
            Some(Change::Avail(bits)) => avail = Position::from_bits(bits),
            Some(Change::Used(bits)) => used = Position::from_bits(bits),
            Some(Change::Ring(ring)) => {
                if let Some((_, addresses)) = addresses(Ring {
                    size: self.model.size,
                    ..ring
                }) {
                    state.config.addresses = addresses;
                    areas = super::areas(addresses);
                }
            }
        }
        if let RingBase::Packed { .. } = state.config.base {
            state.config.base = packed_base(avail, used);
        }
        let fits = outstanding(avail, used, self.model.size).is_some();
        let fits = fits && !wrong_format && areas.hold(self.naive, self.model.size);
        let result = Queue::restore(Arc::clone(&self.memory), &state);
        assert_eq!(result.is_ok(), fits);
        if let Ok(queue) = result {
            self.clean &= change.is_none();
            self.model.areas = areas;
            self.succeed(queue, (avail, used));
        }
    }

    /// Another device takes over.
    fn succeed(&mut self, queue: Queue<Memory>, at: (Position, Position)) {
        self.queue = queue;
        self.forgotten |= !self.model.is_idle();
        let Model {
            areas,
            size,
            features,
            ..
        } = self.model;
        self.model =
            Model::start(self.naive, areas, size, features, at).expect("it was found to fit");
        self.forget_in_flight();
    }

    fn forget_in_flight(&mut self) {
        self.heads.clear();
        self.numbers.clear();
        self.popped.clear();
        self.buffers = None;
        self.device = Sleep::default();
    }

    /// Guest and device begin anew, elsewhere; or stay, if the ring cannot be there.
    pub(super) fn start_fresh(&mut self, ring: Ring, start: Start) {
        self.before_device();
        self.before_guest();
        let features = self.queue.features();
        let Some(Fresh {
            guest,
            queue,
            model,
        }) = fresh(&self.memory, self.naive, (ring, start), features)
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
