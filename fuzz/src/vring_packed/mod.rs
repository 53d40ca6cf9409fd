//! Operations in any order on a packed ring: [`Queue`] driven by [`vring::driver`], compared with a
//! model over plain bytes.
//!
//! As in [`vring_split`](crate::vring_split): after each run of device operations all of guest
//! memory is what the model wrote, and as long as the guest has kept to the rules the two ends of
//! the ring are compared without a model too.

mod guest;
mod input;
mod lifecycle;
mod model;
mod walk;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use vm_memory::GuestAddress;
use vring::driver::{PackedDriver, PackedLayout};
use vring::{
    Chain, Head, PackedPosition, Queue, QueueConfig, QueueSize, RingAddresses, RingBase,
    RingFeatures, Segment,
};

pub use self::input::Input;
use self::input::{Op, Place, Ring, Start};
use self::model::{Areas, Features, Model, Popped, Position, Serial};
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
    id: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    /// Start and end of its indirect table; empty if it has none.
    table: (u64, u64),
}

struct Rig<'a> {
    memory: Arc<Memory>,
    naive: &'a mut NaiveMemory,
    guest: PackedDriver<Memory>,
    queue: Queue<Memory>,
    model: Model,
    chain: Chain,
    /// What `chain` holds, if the latest pop filled it.
    buffers: Option<Vec<Buffer>>,
    heads: Vec<(Serial, Head)>,
    /// The head's number of each chain that the queue has.
    numbers: BTreeMap<Serial, u16>,
    /// The guest has written since `naive` was last refreshed.
    guest_wrote: bool,
    /// The device may have written since memory was last compared.
    device_ran: bool,
    /// The guest has kept to the rules, so that the ends of the ring can be compared directly.
    clean: bool,
    offered: VecDeque<Offered>,
    /// The front ones, that are published.
    visible: usize,
    popped: BTreeMap<Serial, Offered>,
    completed: VecDeque<(u16, u32)>,
    /// Chains will never come back, since their device was replaced.
    forgotten: bool,
    device: Sleep,
    driver: Sleep,
}

fn addresses(ring: Ring) -> Option<(QueueSize, RingAddresses)> {
    let size = QueueSize::new(u32::from(ring.size)).expect("a power of two");
    let addresses = match ring.place {
        Place::Sound { base } => PackedLayout::new(GuestAddress(base), size)
            .ok()?
            .addresses(),
        Place::Raw {
            descriptors,
            driver_event,
            device_event,
        } => RingAddresses {
            descriptor_area: GuestAddress(descriptors),
            driver_area: GuestAddress(driver_event),
            device_area: GuestAddress(device_event),
        },
    };
    Some((size, addresses))
}

fn areas(addresses: RingAddresses) -> Areas {
    Areas {
        descriptors: addresses.descriptor_area.0,
        driver_event: addresses.driver_area.0,
        device_event: addresses.device_area.0,
    }
}

fn packed_base(avail: Position, used: Position) -> RingBase {
    let position = |at: Position| PackedPosition {
        index: at.index,
        wrap: at.wrap,
    };
    RingBase::Packed {
        avail: position(avail),
        used: position(used),
    }
}

/// A guest and a device on a new ring.
struct Fresh {
    guest: PackedDriver<Memory>,
    queue: Queue<Memory>,
    model: Model,
}

/// `None` if the ring cannot be there, and the queue says so too.
fn fresh(
    memory: &Arc<Memory>,
    naive: &mut NaiveMemory,
    (ring, start): (Ring, Start),
    features: RingFeatures,
) -> Option<Fresh> {
    let (size, addresses) = addresses(ring)?;
    let (index, wrap) = start.in_ring(ring.size);
    let at = Position { index, wrap };
    let config = QueueConfig {
        size,
        addresses,
        features,
        base: packed_base(at, at),
    };
    let start = || Queue::start(Arc::clone(memory), &config);
    if !areas(addresses).hold(naive, size.get()) || index >= size.get() {
        start().unwrap_err();
        naive.compare(&**memory, |_| false);
        return None;
    }
    let position = PackedPosition { index, wrap };
    let guest =
        PackedDriver::starting_at(Arc::clone(memory), addresses, size, features, position).unwrap();
    naive.refresh(&**memory);
    let queue = start().unwrap();
    let bits = Features {
        indirect_desc: features.indirect_desc,
        event_idx: features.event_idx,
        in_order: features.in_order,
    };
    let model = Model::start(naive, areas(addresses), size.get(), bits, (at, at))?;
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
            ring,
            start,
            ..
        } = *input;
        let features = RingFeatures {
            indirect_desc,
            event_idx,
            in_order,
            packed: true,
        };
        let Fresh {
            guest,
            queue,
            model,
        } = fresh(&memory, naive, (ring, start), features)?;
        let rig = Self {
            chain: Chain::for_queue(queue.size()),
            memory,
            naive,
            guest,
            queue,
            model,
            buffers: None,
            heads: Vec::new(),
            numbers: BTreeMap::new(),
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
            Op::StartFresh { ring, start } => self.start_fresh(ring, start),
            Op::RoundTrip { count, back } => self.round_trip(count, back),
            _ => {
                self.before_guest();
                self.guest(op);
            }
        }
    }

    fn round_trip(&mut self, count: u8, back: u8) {
        (0..count).for_each(|_| self.step(Op::AddDirect(Buffers::plain())));
        self.step(Op::GuestPublish);
        for _ in 0..count {
            self.step(Op::Pop);
            self.step(Op::Push { which: 0, len: 1 });
        }
        self.step(Op::Publish);
        self.step(Op::SetDriverEvent { back, flags: 2 });
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
        let serial = self.judge(found);
        if let (Some(serial), Some(head)) = (serial, head) {
            self.heads.push((serial, head));
        }
        serial.is_some()
    }

    /// What the queue found is what the model finds.
    fn judge(&mut self, found: Found) -> Option<Serial> {
        let expected = self.model.pop(self.naive);
        self.buffers = None;
        match (found, expected) {
            (Found::Nothing, Popped::Nothing) => {
                assert!(!self.clean || self.visible == 0, "a chain was overlooked");
                None
            }
            (
                Found::Chain {
                    head,
                    buffers: found,
                },
                Popped::Chain {
                    serial,
                    id,
                    buffers,
                },
            ) => {
                assert_eq!(found, buffers);
                self.take_number(serial, head);
                self.take_offered(serial, id, Some(&buffers));
                self.buffers = Some(buffers);
                Some(serial)
            }
            (Found::BadChain { head, fault: why }, Popped::BadChain { serial, id, fault }) => {
                assert_eq!(why, fault);
                self.take_number(serial, head);
                self.take_offered(serial, id, None);
                Some(serial)
            }
            (Found::Broken(found), Popped::Broken(fault)) => {
                assert_eq!(found, fault);
                assert!(!self.clean, "{fault} without a cause");
                None
            }
            (found, expected) => panic!("popped {found:?} instead of {expected:?}"),
        }
    }

    /// No two chains that the queue has may be one for its user.
    fn take_number(&mut self, serial: Serial, head: u16) {
        assert!(head < self.model.size, "head {head}");
        assert!(
            self.numbers.values().all(|&other| other != head),
            "head {head} is taken"
        );
        self.numbers.insert(serial, head);
    }

    /// What came out is what went in.
    fn take_offered(&mut self, serial: Serial, id: u16, buffers: Option<&[Buffer]>) {
        if !self.clean {
            return;
        }
        assert!(self.visible > 0, "popped what was not published");
        let offered = self.offered.pop_front().expect("at least the visible ones");
        assert_eq!(offered.id, id);
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
        self.popped.insert(serial, offered);
    }

    fn push(&mut self, which: u8, len: u32) {
        if self.heads.is_empty() {
            return;
        }
        let at = usize::from(which) % self.heads.len();
        let (serial, head) = self.heads.swap_remove(at);
        let len = if which < 128 {
            len
        } else {
            full(self.model.room(serial))
        };
        self.queue.push(head, len);
        self.pushed(serial, len);
    }

    fn pushed(&mut self, serial: Serial, len: u32) {
        self.popped.remove(&serial);
        self.model.push(self.naive, serial, len);
        self.forget_numbers();
    }

    fn published(&mut self, count: usize) {
        let published = self.model.publish(self.naive);
        assert_eq!(count, published.len());
        self.driver.published(count);
        self.completed.extend(published);
        self.forget_numbers();
    }

    /// A number is free as soon as its chain is not the queue's any more.
    fn forget_numbers(&mut self) {
        let owned = &self.model.owned;
        self.numbers
            .retain(|serial, _| owned.iter().any(|chain| chain.key.serial == *serial));
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
            let Some(serial) = self.judge(step.found) else {
                empty = true;
                break;
            };
            if left == limit {
                self.disabled();
            }
            left -= 1;
            match (step.head, step.pushed) {
                (Some(head), _) => self.heads.push((serial, head)),
                (None, len) => self.pushed(serial, len.expect("kept, or pushed")),
            }
        }
        // The storage has been used again since.
        self.buffers = None;
        let published = self.model.publish(self.naive);
        self.driver.published(published.len());
        self.completed.extend(published);
        self.forget_numbers();
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
        let (serial, head) = self.heads.remove(self.heads.len() - 1 - from_the_end);
        let number = head.index();
        match (self.queue.unpop(head), self.model.unpop(serial)) {
            (Ok(()), true) => {
                if let Some(offered) = self.popped.remove(&serial) {
                    self.offered.push_front(offered);
                    self.visible += 1;
                }
            }
            (Err(head), false) => {
                assert_eq!(head.index(), number);
                self.heads.push((serial, head));
            }
            (result, expected) => panic!("un-popped {result:?}, expected success: {expected}"),
        }
        self.forget_numbers();
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
        let base = packed_base(self.model.avail, self.model.used);
        assert_eq!(self.queue.base(), base);
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
