//! Operations in any order on a split ring: [`SplitQueue`] driven by [`vring::driver`], compared
//! with a model over plain bytes.
//!
//! After each run of device operations all of guest memory is compared with what the model wrote,
//! so a byte outside the used ring, or a wrong one inside it, is found wherever it is. As long as
//! the guest has kept to the rules, a second check needs no model of the ring at all: chains come
//! out in the order and with the buffers they went in, and completions arrive as they were pushed.

mod copies;
mod guest;
mod input;
mod model;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::driver::{SplitDriver, SplitLayout};
use vring::{
    Chain, Head, PopError, QueueConfig, QueueSize, RingAddresses, RingBase, RingFeatures, Segment,
    SplitQueue,
};

pub use self::input::Input;
use self::input::{Buffers, Op, Piece, Place, REGIONS, Ring};
use self::model::{Areas, Model, Popped};
use crate::naive_memory::NaiveMemory;
use crate::naive_walk::Buffer;

type Memory = GuestMemoryMmap<()>;

thread_local! {
    /// Mapped once: mapping costs more than everything else in a run.
    static MEMORY: RefCell<(Arc<Memory>, NaiveMemory)> = RefCell::new((
        Arc::new(
            Memory::from_ranges(&REGIONS.map(|(at, len)| (GuestAddress(at), len))).unwrap(),
        ),
        NaiveMemory::new(&REGIONS),
    ));
}

/// Runs one input; panics where queue and model differ.
pub fn run(input: Input) {
    MEMORY.with_borrow_mut(|(memory, naive)| {
        naive.reset(&**memory);
        if let Some(mut rig) = Rig::new(Arc::clone(memory), naive, &input) {
            for op in input.ops {
                rig.step(op);
            }
            rig.finish();
        }
    });
}

/// A chain that a guest which keeps to the rules has made available.
struct Offered {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    /// Start and end of its indirect table; empty if it has none.
    table: (u64, u64),
}

struct Rig<'a> {
    memory: Arc<Memory>,
    naive: &'a mut NaiveMemory,
    guest: SplitDriver<Memory>,
    queue: SplitQueue<Memory>,
    model: Model,
    chain: Chain,
    /// What `chain` holds, if the latest pop filled it.
    buffers: Option<Vec<Buffer>>,
    heads: Vec<Head>,
    /// The guest has written since `naive` was last refreshed.
    guest_wrote: bool,
    /// The device may have written since memory was last compared.
    device_ran: bool,
    /// The guest has kept to the rules, so that the ends of the ring can be compared directly.
    clean: bool,
    offered: VecDeque<Offered>,
    /// The front ones, that are published.
    visible: usize,
    /// By head.
    popped: BTreeMap<u16, Offered>,
    completed: VecDeque<(u16, u32)>,
}

fn addresses(ring: Ring) -> Option<(QueueSize, RingAddresses)> {
    let size = QueueSize::new(u32::from(ring.size)).expect("a power of two");
    let addresses = match ring.place {
        Place::Sound { base } => SplitLayout::new(GuestAddress(base), size).ok()?.addresses(),
        Place::Raw {
            descriptors,
            available,
            used,
        } => RingAddresses {
            descriptor_area: GuestAddress(descriptors),
            driver_area: GuestAddress(available),
            device_area: GuestAddress(used),
        },
    };
    Some((size, addresses))
}

fn areas(addresses: RingAddresses) -> Areas {
    Areas {
        descriptors: addresses.descriptor_area.0,
        available: addresses.driver_area.0,
        used: addresses.device_area.0,
    }
}

fn segments(pieces: &[Piece]) -> Vec<Segment> {
    let segment = |piece: &Piece| Segment {
        addr: GuestAddress(piece.addr),
        len: piece.len,
    };
    pieces.iter().map(segment).collect()
}

impl<'a> Rig<'a> {
    /// `None` if the ring cannot be there, and the queue says so too.
    fn new(memory: Arc<Memory>, naive: &'a mut NaiveMemory, input: &Input) -> Option<Self> {
        let Input {
            indirect_desc,
            event_idx,
            index,
            ring,
            ..
        } = *input;
        let features = RingFeatures {
            indirect_desc,
            event_idx,
            ..RingFeatures::default()
        };
        let (size, addresses) = addresses(ring)?;
        let config = QueueConfig {
            size,
            addresses,
            features,
            base: RingBase::Split { next_avail: index },
        };
        if !areas(addresses).hold(naive, size.get()) {
            SplitQueue::start(Arc::clone(&memory), &config).unwrap_err();
            naive.compare(&*memory, |_| false);
            return None;
        }
        let guest = SplitDriver::starting_at(Arc::clone(&memory), addresses, size, features, index)
            .unwrap();
        naive.refresh(&*memory);
        let queue = SplitQueue::start(Arc::clone(&memory), &config).unwrap();
        let features = (indirect_desc, event_idx);
        let model = Model::start(naive, areas(addresses), size.get(), features, index);
        Some(Self {
            memory,
            naive,
            guest,
            queue,
            model,
            chain: Chain::for_queue(size),
            buffers: None,
            heads: Vec::new(),
            guest_wrote: false,
            device_ran: true,
            clean: matches!(ring.place, Place::Sound { .. }),
            offered: VecDeque::new(),
            visible: 0,
            popped: BTreeMap::new(),
            completed: VecDeque::new(),
        })
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Pop
            | Op::Push { .. }
            | Op::Publish
            | Op::Unpop { .. }
            | Op::ShouldNotify
            | Op::EnableNotification
            | Op::DisableNotification
            | Op::HasAvailable
            | Op::CopyFromReadable { .. }
            | Op::CopyToWritable { .. }
            | Op::SetMemory(_)
            | Op::Resume { .. } => {
                self.before_device();
                self.device(op);
                self.compare_state();
            }
            Op::StartFresh { ring, index } => self.start_fresh(ring, index),
            Op::RoundTrip { count, beyond } => self.round_trip(count, beyond),
            _ => {
                self.before_guest();
                self.guest(op);
            }
        }
    }

    fn round_trip(&mut self, count: u8, beyond: u16) {
        let buffers = || Buffers {
            readable: vec![Piece { addr: 0, len: 16 }],
            writable: vec![Piece { addr: 0, len: 1 }],
        };
        (0..count).for_each(|_| self.step(Op::AddDirect(buffers())));
        self.step(Op::GuestPublish);
        for _ in 0..count {
            self.step(Op::Pop);
            self.step(Op::Push { which: 0, len: 1 });
        }
        self.step(Op::Publish);
        self.step(Op::SetUsedEvent { beyond });
        self.step(Op::ShouldNotify);
        (0..count).for_each(|_| self.step(Op::PollUsed));
    }

    fn before_device(&mut self) {
        if std::mem::take(&mut self.guest_wrote) {
            self.naive.refresh(&*self.memory);
        }
        self.device_ran = true;
    }

    fn before_guest(&mut self) {
        if std::mem::take(&mut self.device_ran) {
            self.naive.compare(&*self.memory, |_| false);
        }
        self.guest_wrote = true;
    }

    fn device(&mut self, op: Op) {
        match op {
            Op::Pop => {
                self.pop();
            }
            Op::Push { which, len } => self.push(which, len),
            Op::Publish => self.publish(),
            Op::Unpop { which } => self.unpop(which),
            Op::ShouldNotify => {
                assert_eq!(
                    self.queue.should_notify(),
                    self.model.should_notify(self.naive)
                );
            }
            Op::EnableNotification => assert_eq!(
                self.queue.enable_notification(),
                self.model.enable_notification(self.naive)
            ),
            Op::DisableNotification => {
                self.queue.disable_notification();
                self.model.disable_notification(self.naive);
            }
            Op::HasAvailable => {
                assert_eq!(
                    self.queue.has_available(),
                    self.model.has_available(self.naive)
                );
            }
            Op::CopyFromReadable { offset, count } => self.copy_from_readable(offset, count),
            Op::CopyToWritable { offset, count } => self.copy_to_writable(offset, count),
            Op::SetMemory(ring) => self.set_memory(ring),
            Op::Resume { base } => self.resume(base),
            _ => unreachable!("the guest's"),
        }
    }

    /// Pops from both. True if there was a chain, good or bad.
    fn pop(&mut self) -> bool {
        let popped = self.queue.pop(&mut self.chain);
        let expected = self.model.pop(self.naive);
        self.buffers = None;
        match (popped, expected) {
            (Ok(None), Popped::Nothing) => {
                assert!(!self.clean || self.visible == 0, "a chain was overlooked");
                false
            }
            (Ok(Some(found)), Popped::Chain { head, buffers }) => {
                assert_eq!(found.index(), head);
                self.compare_chain(&buffers);
                self.heads.push(found);
                self.buffers = Some(buffers);
                self.take_offered(head, true);
                true
            }
            (
                Err(PopError::Chain {
                    head: found,
                    fault: why,
                }),
                Popped::BadChain { head, fault },
            ) => {
                assert_eq!((found.index(), why), (head, fault));
                self.heads.push(found);
                self.take_offered(head, false);
                true
            }
            (Err(PopError::Ring(found)), Popped::Broken(fault)) => {
                assert_eq!(found, fault);
                assert!(!self.clean, "{fault} without a cause");
                false
            }
            (popped, expected) => panic!("popped {popped:?} instead of {expected:?}"),
        }
    }

    fn compare_chain(&self, buffers: &[Buffer]) {
        let found = [
            (self.chain.readable(), false),
            (self.chain.writable(), true),
        ];
        let found = found.iter().flat_map(|&(segments, writable)| {
            segments.iter().map(move |segment| Buffer {
                addr: segment.addr.0,
                len: segment.len,
                writable,
            })
        });
        assert!(
            found.eq(buffers.iter().copied()),
            "{:?} is not {buffers:?}",
            self.chain
        );
        let total = |writable| -> u64 {
            let lens = buffers.iter().filter(|buffer| buffer.writable == writable);
            lens.map(|buffer| u64::from(buffer.len)).sum()
        };
        assert_eq!(self.chain.readable_len(), total(false));
        assert_eq!(self.chain.writable_len(), total(true));
    }

    /// What came out is what went in.
    fn take_offered(&mut self, head: u16, whole: bool) {
        if !self.clean {
            return;
        }
        assert!(self.visible > 0, "popped what was not published");
        let offered = self.offered.pop_front().expect("at least the visible ones");
        assert_eq!(offered.head, head);
        if whole {
            let not_empty = |segments: &[Segment]| -> Vec<Segment> {
                segments
                    .iter()
                    .copied()
                    .filter(|segment| segment.len > 0)
                    .collect()
            };
            assert_eq!(self.chain.readable(), not_empty(&offered.readable));
            assert_eq!(self.chain.writable(), not_empty(&offered.writable));
        }
        self.visible -= 1;
        self.popped.insert(head, offered);
    }

    fn push(&mut self, which: u8, len: u32) {
        if self.heads.is_empty() {
            return;
        }
        let head = self
            .heads
            .swap_remove(usize::from(which) % self.heads.len());
        self.popped.remove(&head.index());
        self.model.push(self.naive, head.index(), len);
        self.queue.push(head, len);
    }

    fn publish(&mut self) {
        let published = self.model.publish(self.naive);
        assert_eq!(self.queue.publish(), published.len());
        self.completed.extend(published);
    }

    fn unpop(&mut self, which: u8) {
        if self.heads.is_empty() {
            return;
        }
        // Mostly the latest, which is the one that can be taken back.
        let from_the_end = if which < 192 {
            0
        } else {
            usize::from(which) % self.heads.len()
        };
        let head = self.heads.remove(self.heads.len() - 1 - from_the_end);
        let index = head.index();
        match (self.queue.unpop(head), self.model.unpop(index)) {
            (Ok(()), true) => {
                if let Some(offered) = self.popped.remove(&index) {
                    self.offered.push_front(offered);
                    self.visible += 1;
                }
            }
            (Err(head), false) => {
                assert_eq!(head.index(), index);
                self.heads.push(head);
            }
            (result, expected) => panic!("un-popped {result:?}, expected success: {expected}"),
        }
    }

    /// `None`: where it is already.
    fn set_memory(&mut self, ring: Option<Ring>) {
        let moved = ring.and_then(|ring| {
            addresses(Ring {
                size: self.model.size,
                ..ring
            })
        });
        let addresses = match moved {
            Some((_, addresses)) => {
                // The guest has not moved with it.
                self.clean = false;
                addresses
            }
            None => RingAddresses {
                descriptor_area: GuestAddress(self.model.areas.descriptors),
                driver_area: GuestAddress(self.model.areas.available),
                device_area: GuestAddress(self.model.areas.used),
            },
        };
        let result = self.queue.set_memory(Arc::clone(&self.memory), addresses);
        assert_eq!(
            result.is_ok(),
            self.model.set_memory(self.naive, areas(addresses))
        );
    }

    /// A new queue on the same ring, as after a reconnect: what was in flight stays with the guest.
    fn resume(&mut self, base: Option<u16>) {
        self.clean &= base.is_none();
        let base = base.unwrap_or(self.model.next_avail);
        let Model {
            areas,
            size,
            indirect_desc,
            event_idx,
            ..
        } = self.model;
        let config = QueueConfig {
            size: self.queue.size(),
            addresses: RingAddresses {
                descriptor_area: GuestAddress(areas.descriptors),
                driver_area: GuestAddress(areas.available),
                device_area: GuestAddress(areas.used),
            },
            features: self.queue.features(),
            base: RingBase::Split { next_avail: base },
        };
        self.queue = SplitQueue::start(Arc::clone(&self.memory), &config).unwrap();
        self.model = Model::start(self.naive, areas, size, (indirect_desc, event_idx), base);
        self.forget_in_flight();
    }

    fn forget_in_flight(&mut self) {
        self.heads.clear();
        self.popped.clear();
        self.buffers = None;
    }

    /// Guest and device begin anew, elsewhere; or stay, if the ring cannot be there.
    fn start_fresh(&mut self, ring: Ring, index: u16) {
        let Some((size, addresses)) = addresses(ring) else {
            return;
        };
        let features = self.queue.features();
        let config = QueueConfig {
            size,
            addresses,
            features,
            base: RingBase::Split { next_avail: index },
        };
        if !areas(addresses).hold(self.naive, size.get()) {
            self.before_device();
            SplitQueue::start(Arc::clone(&self.memory), &config).unwrap_err();
            return;
        }
        self.before_guest();
        self.guest =
            SplitDriver::starting_at(Arc::clone(&self.memory), addresses, size, features, index)
                .unwrap();
        self.before_device();
        self.queue = SplitQueue::start(Arc::clone(&self.memory), &config).unwrap();
        let bits = (features.indirect_desc, features.event_idx);
        self.model = Model::start(self.naive, areas(addresses), size.get(), bits, index);
        self.chain = Chain::for_queue(size);
        self.forget_in_flight();
        self.offered.clear();
        self.visible = 0;
        self.completed.clear();
        self.clean = matches!(ring.place, Place::Sound { .. });
        self.compare_state();
    }

    /// What the queue says of itself.
    fn compare_state(&self) {
        assert_eq!(
            usize::from(self.queue.in_flight()),
            self.model.in_flight.len()
        );
        assert_eq!(usize::from(self.queue.in_flight()), self.heads.len());
        assert!(self.queue.in_flight() <= self.model.size);
        assert_eq!(self.queue.next_avail(), self.model.next_avail);
        assert_eq!(self.queue.fault(), self.model.fault);
    }

    /// The ring empties in as many pops as it has entries, and everything popped goes back.
    fn finish(&mut self) {
        self.before_device();
        let mut pops = 0;
        while self.pop() {
            pops += 1;
            assert!(pops <= self.model.size, "more chains than entries");
        }
        // The pop after a fault, and every one after that, finds nothing.
        if self.queue.fault().is_some() {
            assert!(!self.pop() && !self.queue.has_available());
        }
        while !self.heads.is_empty() {
            self.push(u8::MAX, 0);
        }
        self.publish();
        self.compare_state();
        assert_eq!(self.queue.in_flight(), 0);
        self.before_guest();
        while self.clean && !self.completed.is_empty() {
            self.poll_used();
        }
    }
}
