//! Operations in any order on a split ring: [`Queue`] driven by [`vring::driver`], compared
//! with a model over plain bytes.
//!
//! After each run of device operations all of guest memory is compared with what the model wrote,
//! so a byte outside the used ring, or a wrong one inside it, is found wherever it is. As long as
//! the guest has kept to the rules, a second check needs no model of the ring at all: chains come
//! out in the order and with the buffers they went in, and completions arrive as they were pushed.

mod guest;
pub(crate) mod input;
mod lifecycle;
mod model;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use vm_memory::GuestAddress;
use vring::driver::{SplitDriver, SplitLayout};
use vring::{
    Chain, Head, Queue, QueueConfig, QueueSize, RingAddresses, RingBase, RingFeatures, Segment,
};

pub use self::input::Input;
use self::input::{Op, Place, Ring};
use self::model::{Areas, Features, Model, Popped};
use crate::copies;
use crate::device::{Found, found, full, pass};
use crate::naive_memory::NaiveMemory;
use crate::naive_walk::Buffer;
use crate::ring_input::{Buffers, Memory, REGIONS, memory};
use crate::sleep::Sleep;

thread_local! {
    /// Mapped once: mapping costs more than everything else in a run.
    static MEMORY: RefCell<(Arc<Memory>, NaiveMemory)> =
        RefCell::new((Arc::new(memory()), NaiveMemory::new(&REGIONS)));
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
    queue: Queue<Memory>,
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
    /// Chains will never come back, since their device was replaced.
    forgotten: bool,
    device: Sleep,
    driver: Sleep,
}

pub(crate) fn addresses(ring: Ring) -> Option<(QueueSize, RingAddresses)> {
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

/// A guest and a device on a new ring.
struct Fresh {
    guest: SplitDriver<Memory>,
    queue: Queue<Memory>,
    model: Model,
}

/// `None` if the ring cannot be there, and the queue says so too.
fn fresh(
    memory: &Arc<Memory>,
    naive: &mut NaiveMemory,
    (ring, index): (Ring, u16),
    features: RingFeatures,
) -> Option<Fresh> {
    let (size, addresses) = addresses(ring)?;
    let config = QueueConfig {
        size,
        addresses,
        features,
        base: RingBase::Split { next_avail: index },
    };
    let start = || Queue::start(Arc::clone(memory), &config);
    if !areas(addresses).hold(naive, size.get()) {
        start().unwrap_err();
        naive.compare(&**memory, |_| false);
        return None;
    }
    let guest =
        SplitDriver::starting_at(Arc::clone(memory), addresses, size, features, index).unwrap();
    naive.refresh(&**memory);
    let queue = start().unwrap();
    let bits = Features {
        indirect_desc: features.indirect_desc,
        event_idx: features.event_idx,
        in_order: features.in_order,
    };
    let model = Model::start(naive, areas(addresses), size.get(), bits, index);
    Some(Fresh {
        guest,
        queue,
        model,
    })
}

impl<'a> Rig<'a> {
    /// `None` if the ring cannot be there.
    fn new(memory: Arc<Memory>, naive: &'a mut NaiveMemory, input: &Input) -> Option<Self> {
        let Input {
            indirect_desc,
            event_idx,
            in_order,
            index,
            ring,
            ..
        } = *input;
        let features = RingFeatures {
            indirect_desc,
            event_idx,
            in_order,
            packed: false,
        };
        let Fresh {
            guest,
            queue,
            model,
        } = fresh(&memory, naive, (ring, index), features)?;
        let rig = Self {
            chain: Chain::for_queue(queue.size()),
            memory,
            naive,
            guest,
            queue,
            model,
            buffers: None,
            heads: Vec::new(),
            guest_wrote: false,
            device_ran: true,
            clean: matches!(ring.place, Place::Sound { .. }),
            offered: VecDeque::new(),
            visible: 0,
            popped: BTreeMap::new(),
            completed: VecDeque::new(),
            forgotten: false,
            device: Sleep::default(),
            driver: Sleep::default(),
        };
        rig.compare_state();
        Some(rig)
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
            | Op::Pass { .. }
            | Op::CopyFromReadable { .. }
            | Op::CopyToWritable { .. }
            | Op::SetMemory(_)
            | Op::Resume { .. }
            | Op::Restore(_) => {
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
        (0..count).for_each(|_| self.step(Op::AddDirect(Buffers::plain())));
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
            Op::Publish => {
                let published = self.queue.publish();
                self.published(published);
            }
            Op::Unpop { which } => self.unpop(which),
            Op::ShouldNotify => {
                let notified = self.queue.should_notify();
                self.notified(notified);
            }
            Op::EnableNotification => {
                let empty = self.queue.enable_notification();
                self.enabled(empty);
            }
            Op::DisableNotification => {
                self.queue.disable_notification();
                self.disabled();
            }
            Op::HasAvailable => {
                let available = self.queue.has_available();
                assert_eq!(available, self.model.has_available(self.naive));
            }
            Op::Pass { limit, keep } => self.pass(limit, keep),
            Op::CopyFromReadable { offset, count } => {
                if let Some(buffers) = &self.buffers {
                    let range = (offset, count);
                    let memory = &self.memory;
                    copies::copy_from_readable(&self.chain, buffers, memory, self.naive, range);
                }
            }
            Op::CopyToWritable { offset, count } => self.copy_to_writable(offset, count),
            Op::SetMemory(ring) => self.set_memory(ring),
            Op::Resume { base } => self.resume(base),
            Op::Restore(change) => self.restore(change),
            _ => unreachable!("the guest's"),
        }
    }

    /// Pops from both. True if there was a chain, good or bad.
    fn pop(&mut self) -> bool {
        let (found, head) = found(self.queue.pop(&mut self.chain), &self.chain);
        let popped = self.judge(found).is_some();
        self.heads.extend(head);
        popped
    }

    /// What the queue found is what the model finds.
    fn judge(&mut self, found: Found) -> Option<u16> {
        let expected = self.model.pop(self.naive);
        self.buffers = None;
        match (found, expected) {
            (Found::Nothing, Popped::Nothing) => {
                assert!(!self.clean || self.visible == 0, "a chain was overlooked");
                None
            }
            (
                Found::Chain {
                    head: index,
                    buffers: found,
                },
                Popped::Chain { head, buffers },
            ) => {
                assert_eq!((index, found), (head, buffers.clone()));
                self.take_offered(head, Some(&buffers));
                self.buffers = Some(buffers);
                Some(head)
            }
            (
                Found::BadChain {
                    head: index,
                    fault: why,
                },
                Popped::BadChain { head, fault },
            ) => {
                assert_eq!((index, why), (head, fault));
                self.take_offered(head, None);
                Some(head)
            }
            (Found::Broken(found), Popped::Broken(fault)) => {
                assert_eq!(found, fault);
                assert!(!self.clean, "{fault} without a cause");
                None
            }
            (found, expected) => panic!("popped {found:?} instead of {expected:?}"),
        }
    }

    /// What came out is what went in.
    fn take_offered(&mut self, head: u16, buffers: Option<&[Buffer]>) {
        if !self.clean {
            return;
        }
        assert!(self.visible > 0, "popped what was not published");
        let offered = self.offered.pop_front().expect("at least the visible ones");
        assert_eq!(offered.head, head);
        if let Some(buffers) = buffers {
            let went_in = |segments: &[Segment], writable: bool| -> Vec<Buffer> {
                let buffer = |segment: &Segment| Buffer {
                    addr: segment.addr.0,
                    len: segment.len,
                    writable,
                };
                let all = segments.iter().map(buffer);
                all.filter(|buffer| buffer.len > 0).collect()
            };
            let readable = went_in(&offered.readable, false);
            let writable = went_in(&offered.writable, true);
            assert_eq!(buffers, [readable, writable].concat());
        }
        self.visible -= 1;
        self.popped.insert(head, offered);
    }

    fn push(&mut self, which: u8, len: u32) {
        if self.heads.is_empty() {
            return;
        }
        let at = usize::from(which) % self.heads.len();
        let head = self.heads.swap_remove(at);
        let index = head.index();
        let len = if which < 128 {
            len
        } else {
            full(self.model.room(index))
        };
        self.queue.push(head, len);
        self.pushed(index, len);
    }

    fn pushed(&mut self, head: u16, len: u32) {
        self.popped.remove(&head);
        self.model.push(self.naive, head, len);
    }

    fn published(&mut self, count: usize) {
        let published = self.model.publish(self.naive);
        assert_eq!(count, published.len());
        self.driver.published(count);
        self.completed.extend(published);
    }

    fn notified(&mut self, notified: bool) {
        assert_eq!(notified, self.model.should_notify(self.naive));
        self.driver.decided(notified, self.clean);
    }

    fn enabled(&mut self, empty: bool) {
        assert_eq!(empty, self.model.enable_notification(self.naive));
        self.device = Sleep::new(empty);
    }

    fn disabled(&mut self) {
        self.model.disable_notification(self.naive);
        self.device = Sleep::default();
    }

    fn pass(&mut self, limit: u8, keep: u8) {
        let (steps, finished) = pass(&mut self.queue, &mut self.chain, limit, keep);
        let mut left = limit;
        let mut empty = false;
        for step in steps {
            if left == 0 {
                // It does not even look.
                assert!(matches!(step.found, Found::Nothing));
                break;
            }
            let Some(index) = self.judge(step.found) else {
                empty = true;
                break;
            };
            if left == limit {
                self.disabled();
            }
            left -= 1;
            match (step.head, step.pushed) {
                (Some(head), _) => self.heads.push(head),
                (None, len) => self.pushed(index, len.expect("kept, or pushed")),
            }
        }
        // The storage has been used again since.
        self.buffers = None;
        let published = self.model.publish(self.naive);
        self.driver.published(published.len());
        self.completed.extend(published);
        self.notified(finished.notify);
        if empty {
            self.enabled(finished.sleep);
        } else {
            assert!(!finished.sleep, "it has not looked");
        }
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

    fn copy_to_writable(&mut self, offset: u32, count: u16) {
        let Some(buffers) = &self.buffers else { return };
        let range = (offset, count);
        let memory = &self.memory;
        let written = copies::copy_to_writable(&self.chain, buffers, memory, self.naive, range);
        if written.into_iter().any(|at| self.in_use(at, 1)) {
            // The guest has harmed itself.
            self.clean = false;
        }
    }

    /// What the queue says of itself.
    fn compare_state(&self) {
        let in_flight = usize::from(self.queue.in_flight());
        assert_eq!(in_flight, self.model.owned.in_flight());
        assert_eq!(in_flight, self.heads.len());
        assert!(self.queue.in_flight() <= self.model.size);
        let next_avail = self.model.next_avail;
        assert_eq!(self.queue.base(), RingBase::Split { next_avail });
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
        let published = self.queue.publish();
        self.published(published);
        self.compare_state();
        assert_eq!(self.queue.in_flight(), 0);
        self.before_guest();
        while self.clean && !self.completed.is_empty() {
            self.poll_used();
        }
        if self.clean && !self.forgotten && self.offered.is_empty() {
            assert_eq!(self.guest.free(), self.model.size, "a chain is missing");
        }
    }
}
