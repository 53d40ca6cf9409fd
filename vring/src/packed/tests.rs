//! The queue against a guest written by hand: bytes in memory, and nothing of the driver side.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::base::PackedPosition;
use crate::chain::Segment;
use crate::fault::ChainFault;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const RING: u64 = 0x1000;
const DRIVER_EVENT: u64 = 0x100;
const DEVICE_EVENT: u64 = 0x200;
const BUFFERS: u64 = 0x10_0000;
const MEMORY: usize = 0x20_0000;

type Memory = GuestMemoryMmap<()>;

const PACKED: RingFeatures = RingFeatures {
    indirect_desc: true,
    event_idx: false,
    in_order: false,
    packed: true,
};
const EVENT_IDX: RingFeatures = RingFeatures {
    event_idx: true,
    ..PACKED
};
const IN_ORDER: RingFeatures = RingFeatures {
    in_order: true,
    ..PACKED
};

/// Where the guest makes the next descriptor available, and where it looks for the next used one.
struct Guest {
    memory: Arc<Memory>,
    size: u16,
    avail: PackedPosition,
    used: PackedPosition,
}

fn forward(position: &mut PackedPosition, steps: u16, size: u16) {
    for _ in 0..steps {
        position.index += 1;
        if position.index == size {
            position.index = 0;
            position.wrap = !position.wrap;
        }
    }
}

impl Guest {
    fn write(&self, index: u16, address: u64, len: u32, id: u16, flags: u16) {
        let at = RING + 16 * u64::from(index);
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Adds one descriptor as it is, marked available.
    fn add(&mut self, address: u64, len: u32, id: u16, flags: u16) {
        let bits = if self.avail.wrap { 0x80 } else { 0x8000 };
        self.write(self.avail.index, address, len, id, flags | bits);
        forward(&mut self.avail, 1, self.size);
    }

    /// Adds a chain of a readable buffer and writable ones after it, 16 bytes each.
    fn add_chain(&mut self, id: u16, descriptors: u16) {
        for i in 0..descriptors {
            let next = if i + 1 < descriptors { NEXT } else { 0 };
            let write = if i > 0 { WRITE } else { 0 };
            // Only the last one's id counts.
            let id = if next == 0 { id } else { 0xdead };
            self.add(BUFFERS + 16 * u64::from(i), 16, id, next | write);
        }
    }

    /// The used descriptor at the guest's position, of a chain with that many descriptors.
    fn take(&mut self, descriptors: u16) -> Option<(u16, u32, bool)> {
        let mut bytes = [0; 8];
        let at = RING + 16 * u64::from(self.used.index) + 8;
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        let flags = u16::from_le_bytes([bytes[6], bytes[7]]);
        let bits = if self.used.wrap { 0x8080 } else { 0 };
        if flags & 0x8080 != bits {
            return None;
        }
        forward(&mut self.used, descriptors, self.size);
        let id = u16::from_le_bytes([bytes[4], bytes[5]]);
        let len = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        Some((id, len, flags & WRITE != 0))
    }

    fn set_event(&self, position: PackedPosition, flags: u16) {
        let word = u32::from(position.to_bits()) | u32::from(flags) << 16;
        self.memory
            .write_slice(&word.to_le_bytes(), GuestAddress(DRIVER_EVENT))
            .unwrap();
    }

    fn device_event(&self) -> (PackedPosition, u16) {
        let mut bytes = [0; 4];
        self.memory
            .read_slice(&mut bytes, GuestAddress(DEVICE_EVENT))
            .unwrap();
        let [d0, d1, f0, f1] = bytes;
        let position = PackedPosition::from_bits(u16::from_le_bytes([d0, d1]));
        (position, u16::from_le_bytes([f0, f1]))
    }
}

fn config(size: u16, features: RingFeatures, at: PackedPosition) -> QueueConfig {
    QueueConfig {
        size: QueueSize::try_from(size).unwrap(),
        addresses: RingAddresses {
            descriptor_area: GuestAddress(RING),
            driver_area: GuestAddress(DRIVER_EVENT),
            device_area: GuestAddress(DEVICE_EVENT),
        },
        features,
        base: RingBase::Packed {
            avail: at,
            used: at,
        },
    }
}

struct Rig {
    guest: Guest,
    queue: PackedQueue<Memory>,
    chain: Chain,
}

impl Rig {
    fn new(size: u16, features: RingFeatures) -> Self {
        Self::at(size, features, PackedPosition::FIRST)
    }

    fn at(size: u16, features: RingFeatures, at: PackedPosition) -> Self {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let config = config(size, features, at);
        // What driver and device left behind: used descriptors of this pass and the one before.
        for index in 0..size {
            let wrap = (index < at.index) == at.wrap;
            let flags = if wrap { [0x80, 0x80] } else { [0, 0] };
            let at = GuestAddress(RING + 16 * u64::from(index) + 14);
            memory.write_slice(&flags, at).unwrap();
        }
        Self {
            guest: Guest {
                memory: Arc::clone(&memory),
                size,
                avail: at,
                used: at,
            },
            queue: PackedQueue::start(memory, &config).unwrap(),
            chain: Chain::for_queue(config.size),
        }
    }

    fn pop(&mut self) -> Head {
        self.queue
            .pop(&mut self.chain)
            .unwrap()
            .expect("a chain is available")
    }

    fn nothing(&mut self) -> bool {
        self.queue.pop(&mut self.chain) == Ok(None)
    }

    fn ring_fault(&mut self) -> RingFault {
        let base = self.queue.base();
        let Err(PopError::Ring(fault)) = self.queue.pop(&mut self.chain) else {
            panic!("no ring fault");
        };
        assert_eq!(self.queue.base(), base, "nothing consumed");
        assert!(self.nothing() && !self.queue.has_available());
        assert!(self.queue.enable_notification());
        assert_eq!(self.queue.fault(), Some(fault));
        fault
    }
}

fn at(index: u16, wrap: bool) -> PackedPosition {
    PackedPosition { index, wrap }
}

#[test]
fn a_chain_goes_round_with_the_id_of_its_last_descriptor() {
    let mut rig = Rig::new(8, PACKED);
    assert!(rig.nothing() && !rig.queue.has_available());
    rig.guest.add_chain(0xabcd, 3);
    assert!(rig.queue.has_available());
    let head = rig.pop();
    assert!(head.index() < 8);
    let segment = |i: u64| Segment {
        addr: GuestAddress(BUFFERS + 16 * i),
        len: 16,
    };
    assert_eq!(rig.chain.readable(), [segment(0)]);
    assert_eq!(rig.chain.writable(), [segment(1), segment(2)]);
    assert!(rig.nothing());
    rig.queue.push(head, 20);
    assert_eq!(rig.guest.take(3), None, "staged only");
    assert_eq!(rig.queue.publish(), 1);
    assert_eq!(rig.queue.publish(), 0);
    assert_eq!(rig.guest.take(3), Some((0xabcd, 20, true)));
    let expected = RingBase::Packed {
        avail: at(3, true),
        used: at(3, true),
    };
    assert_eq!(rig.queue.base(), expected);
}

#[test]
fn nothing_written_is_a_used_descriptor_without_the_write_flag() {
    let mut rig = Rig::new(4, PACKED);
    rig.guest.add_chain(1, 1);
    let head = rig.pop();
    rig.queue.push(head, 0);
    rig.queue.publish();
    assert_eq!(rig.guest.take(1), Some((1, 0, false)));
}

#[test]
fn a_batch_is_handed_over_with_its_first_descriptor() {
    let mut rig = Rig::at(8, PACKED, at(6, false));
    for id in [5, 6, 7] {
        rig.guest.add_chain(id, 2);
    }
    let heads: Vec<_> = (0..3).map(|_| rig.pop()).collect();
    for (head, len) in heads.into_iter().rev().zip(1..) {
        rig.queue.push(head, len);
    }
    assert_eq!(rig.guest.take(2), None);
    assert_eq!(rig.queue.publish(), 3);
    let taken: Vec<_> = std::iter::from_fn(|| rig.guest.take(2)).collect();
    assert_eq!(taken, [(7, 1, true), (6, 2, true), (5, 3, true)]);
    let expected = RingBase::Packed {
        avail: at(4, true),
        used: at(4, true),
    };
    assert_eq!(rig.queue.base(), expected);
}

#[test]
fn a6_rings_of_every_size_are_served_over_many_passes() {
    for size in [1, 2, 4, 256, 32768u16] {
        for wrap in [true, false] {
            let mut rig = Rig::at(size, PACKED, at(size - 1, wrap));
            let lens = [1, size, size.div_ceil(2), 1, 3.min(size)];
            for round in 0..40u16 {
                let len = lens[usize::from(round % 5)];
                rig.guest.add_chain(round, len);
                let head = rig.pop();
                let segments = rig.chain.readable().len() + rig.chain.writable().len();
                assert_eq!(segments, usize::from(len));
                assert!(rig.nothing());
                rig.queue.push(head, 1);
                rig.queue.publish();
                assert_eq!(rig.guest.take(len), Some((round, 1, true)));
                assert_eq!(rig.guest.take(1), None, "size {size}, round {round}");
            }
        }
    }
}

#[test]
fn a10_a_full_ring_is_served_whole() {
    let mut rig = Rig::at(8, PACKED, at(3, false));
    for id in 0..8 {
        rig.guest.add_chain(id + 100, 1);
    }
    let heads: Vec<_> = (0..8).map(|_| rig.pop()).collect();
    assert!(rig.nothing());
    assert_eq!(rig.queue.in_flight(), 8);
    let mut slots: Vec<_> = heads.iter().map(Head::index).collect();
    slots.sort_unstable();
    assert_eq!(slots, (0..8).collect::<Vec<_>>());
    for head in heads {
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), 8);
    assert_eq!(std::iter::from_fn(|| rig.guest.take(1)).count(), 8);
}

#[test]
fn chains_of_a_table_are_read_in_its_order_and_its_flags_but_write_are_ignored() {
    let mut rig = Rig::new(2, PACKED);
    let table = 0x8_0000;
    let flags = [NEXT | INDIRECT, 0x8080, WRITE, WRITE | NEXT | INDIRECT];
    for (i, flags) in (0..).zip(flags) {
        let mut bytes = Vec::new();
        bytes.extend((BUFFERS + 64 * i).to_le_bytes());
        bytes.extend(8u32.to_le_bytes());
        bytes.extend([0xff, 0xff]);
        bytes.extend(flags.to_le_bytes());
        let at = GuestAddress(table + 16 * i);
        rig.guest.memory.write_slice(&bytes, at).unwrap();
    }
    // WRITE on the indirect descriptor is ignored (row D16).
    rig.guest.add(table, 64, 9, INDIRECT | WRITE);
    let head = rig.pop();
    let addresses = |segments: &[Segment]| -> Vec<u64> {
        segments
            .iter()
            .map(|segment| segment.addr.0 - BUFFERS)
            .collect()
    };
    assert_eq!(addresses(rig.chain.readable()), [0, 64]);
    assert_eq!(addresses(rig.chain.writable()), [128, 192]);
    rig.queue.push(head, 0);
    rig.queue.publish();
    assert_eq!(rig.guest.take(1), Some((9, 0, false)));
}

#[test]
fn a_broken_chain_is_passed_whole_and_the_ring_goes_on() {
    for (flags, fault) in [
        (WRITE, ChainFault::ReadableAfterWritable),
        (INDIRECT, ChainFault::IndirectAndNext),
    ] {
        let mut rig = Rig::at(8, PACKED, at(7, true));
        rig.guest.add(BUFFERS, 16, 0, NEXT | flags);
        rig.guest.add(BUFFERS, 16, 0, NEXT);
        rig.guest.add(BUFFERS, 16, 3, 0);
        rig.guest.add_chain(4, 1);
        match rig.queue.pop(&mut rig.chain) {
            Err(PopError::Chain { head, fault: found }) => {
                assert_eq!(found, fault);
                rig.queue.push(head, 0);
            }
            other => panic!("{other:?}"),
        }
        let head = rig.pop();
        rig.queue.push(head, 0);
        rig.queue.publish();
        assert_eq!(rig.guest.take(3), Some((3, 0, false)));
        assert_eq!(rig.guest.take(1), Some((4, 0, false)));
    }
}

#[test]
fn d11_an_indirect_descriptor_without_the_feature_costs_its_chain() {
    let mut rig = Rig::new(
        4,
        RingFeatures {
            indirect_desc: false,
            ..PACKED
        },
    );
    for (flags, descriptors) in [(INDIRECT, 1), (INDIRECT | NEXT, 2)] {
        rig.guest.add(BUFFERS, 16, 0, flags);
        if descriptors == 2 {
            rig.guest.add(BUFFERS, 16, 0, 0);
        }
        match rig.queue.pop(&mut rig.chain) {
            Err(PopError::Chain { head, fault }) => {
                assert_eq!(fault, ChainFault::IndirectNotNegotiated);
                rig.queue.push(head, 0);
            }
            other => panic!("{other:?}"),
        }
        rig.queue.publish();
        assert_eq!(rig.guest.take(descriptors), Some((0, 0, false)));
    }
}

#[test]
fn d17_an_indirect_descriptor_after_direct_ones_costs_its_chain() {
    let mut rig = Rig::new(4, PACKED);
    rig.guest.add(BUFFERS, 16, 0, NEXT);
    rig.guest.add(BUFFERS, 16, 7, INDIRECT);
    match rig.queue.pop(&mut rig.chain) {
        Err(PopError::Chain { head, fault }) => {
            assert_eq!(fault, ChainFault::IndirectAmongDirect);
            rig.queue.push(head, 0);
        }
        other => panic!("{other:?}"),
    }
    rig.queue.publish();
    assert_eq!(rig.guest.take(2), Some((7, 0, false)));
}

#[test]
fn d3_a_chain_without_end_is_a_ring_fault() {
    for (size, in_flight) in [(1, 0), (8, 0), (8, 3), (8, 7), (32768, 5)] {
        let mut rig = Rig::at(size, PACKED, at(size - 1, true));
        for id in 0..in_flight {
            rig.guest.add_chain(id, 1);
        }
        let heads: Vec<_> = (0..in_flight).map(|_| rig.pop()).collect();
        let limit = size - in_flight;
        for _ in 0..limit {
            rig.guest.add(BUFFERS, 16, 9, NEXT);
        }
        assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit });
        // What is in flight completes.
        assert_eq!(rig.queue.in_flight(), in_flight);
        for head in heads {
            rig.queue.push(head, 0);
        }
        assert_eq!(rig.queue.publish(), usize::from(in_flight));
        let taken = std::iter::from_fn(|| rig.guest.take(1)).count();
        assert_eq!(taken, usize::from(in_flight));
    }
}

#[test]
fn d3_a_chain_into_descriptors_still_outstanding_is_a_ring_fault() {
    let mut rig = Rig::new(4, PACKED);
    rig.guest.add_chain(0, 2);
    let head = rig.pop();
    rig.queue.push(head, 0);
    // Pushed, but the driver cannot know, so two descriptors are all it has.
    rig.guest.add_chain(1, 3);
    assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 2 });
    assert_eq!(rig.queue.publish(), 1);
}

#[test]
fn a_descriptor_made_available_in_a_full_ring_is_a_ring_fault() {
    let mut rig = Rig::new(2, PACKED);
    rig.guest.add_chain(0, 1);
    rig.guest.add_chain(1, 1);
    let heads = [rig.pop(), rig.pop()];
    assert!(rig.nothing());
    rig.guest.add_chain(2, 1);
    assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 0 });
    for head in heads {
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), 2);
}

#[test]
fn a4_a_buffer_id_in_flight_twice_is_a_ring_fault() {
    for features in [PACKED, IN_ORDER] {
        let mut rig = Rig::new(4, features);
        rig.guest.add_chain(u16::MAX, 1);
        let head = rig.pop();
        rig.guest.add_chain(u16::MAX, 2);
        let id = u16::MAX;
        assert_eq!(rig.ring_fault(), RingFault::BufferIdInFlight { id });
        rig.queue.push(head, 0);
        assert_eq!(rig.queue.publish(), 1);
        assert_eq!(rig.guest.take(1), Some((id, 0, false)));
    }
}

#[test]
fn garbage_in_the_availability_bits_is_a_descriptor_not_available() {
    for wrap in [true, false] {
        let mut rig = Rig::at(4, PACKED, at(1, wrap));
        for bits in [0, 0x8080, if wrap { 0x8000 } else { 0x80 }] {
            rig.guest.write(1, BUFFERS, 16, 0, bits | 0x7f7f);
            assert!(rig.nothing() && !rig.queue.has_available());
        }
        // All other unknown flags are ignored (row D21).
        let bits = if wrap { 0x80 } else { 0x8000 };
        rig.guest.write(1, BUFFERS, 16, 0, bits | 0x7f78);
        let head = rig.pop();
        rig.queue.push(head, 0);
    }
}

#[test]
fn a9_descriptors_rewritten_in_flight_change_nothing() {
    let mut rig = Rig::new(4, PACKED);
    rig.guest.add_chain(5, 3);
    let head = rig.pop();
    for index in 0..4 {
        rig.guest.write(index, u64::MAX, u32::MAX, 77, 0xffff);
    }
    rig.queue.push(head, 1);
    rig.queue.publish();
    assert_eq!(rig.guest.take(3), Some((5, 1, true)));
}

#[test]
fn unpop_at_the_end_of_the_ring_gives_the_chain_back_to_the_next_pop() {
    for features in [PACKED, IN_ORDER] {
        for start in [at(7, true), at(7, false)] {
            let mut rig = Rig::at(8, features, start);
            rig.guest.add_chain(1, 1);
            rig.guest.add_chain(2, 3);
            let first = rig.pop();
            let base = rig.queue.base();
            let second = rig.pop();
            let first = rig.queue.unpop(first).unwrap_err();
            rig.queue.unpop(second).unwrap();
            assert_eq!(rig.queue.base(), base);
            let first = rig.queue.unpop(first).unwrap_err();
            rig.queue.push(first, 0);
            assert_eq!(rig.queue.in_flight(), 0);
            let second = rig.pop();
            rig.queue.push(second, 0);
            assert_eq!(rig.queue.publish(), 2);
            if features.in_order {
                // The first has nothing to write, so it is written in full.
                assert_eq!(rig.guest.take(4), Some((2, 0, false)));
            } else {
                assert_eq!(rig.guest.take(1), Some((1, 0, false)));
                assert_eq!(rig.guest.take(3), Some((2, 0, false)));
            }
        }
    }
}

#[test]
fn unpop_over_the_wrap_undoes_the_flip() {
    let mut rig = Rig::at(4, PACKED, at(3, true));
    rig.guest.add_chain(1, 3);
    let before = rig.queue.base();
    let head = rig.pop();
    rig.queue.unpop(head).unwrap();
    assert_eq!(rig.queue.base(), before);
    assert_eq!(
        (rig.queue.in_flight(), rig.queue.has_available()),
        (0, true)
    );
    let head = rig.pop();
    rig.queue.push(head, 0);
    rig.queue.publish();
    assert_eq!(rig.guest.take(3), Some((1, 0, false)));
}

#[test]
fn in_order_a_run_is_one_descriptor_at_its_start_with_the_id_of_its_end() {
    let mut rig = Rig::at(8, IN_ORDER, at(5, true));
    for id in [10, 11, 12] {
        rig.guest.add_chain(id, 2);
    }
    let mut heads: Vec<_> = (0..3).map(|_| rig.pop()).collect();
    rig.queue.push(heads.remove(1), 16);
    rig.queue.push(heads.remove(1), 4);
    assert_eq!((rig.queue.publish(), rig.queue.in_flight()), (0, 1));
    assert_eq!(rig.guest.take(2), None);
    rig.queue.push(heads.remove(0), 16);
    assert_eq!(rig.queue.publish(), 3);
    // One for all three: the first two are written in full.
    assert_eq!(rig.guest.take(6), Some((12, 4, true)));
    assert_eq!(rig.guest.take(1), None);
    let expected = RingBase::Packed {
        avail: at(3, false),
        used: at(3, false),
    };
    assert_eq!(rig.queue.base(), expected);
}

#[test]
fn in_order_a_chain_written_short_ends_its_run() {
    let mut rig = Rig::new(8, IN_ORDER);
    for id in [10, 11, 12] {
        rig.guest.add_chain(id, 2);
    }
    let heads: Vec<_> = (0..3).map(|_| rig.pop()).collect();
    for (head, len) in heads.into_iter().zip([16, 15, 16]) {
        rig.queue.push(head, len);
    }
    assert_eq!(rig.queue.publish(), 3);
    assert_eq!(rig.guest.take(4), Some((11, 15, true)));
    assert_eq!(rig.guest.take(2), Some((12, 16, true)));
}

#[test]
fn in_order_an_id_is_in_flight_until_the_driver_has_it_back() {
    let mut rig = Rig::new(8, IN_ORDER);
    rig.guest.add_chain(1, 1);
    rig.guest.add_chain(2, 1);
    let first = rig.pop();
    let second = rig.pop();
    rig.queue.push(second, 0);
    assert_eq!(rig.queue.publish(), 0);
    rig.guest.add_chain(2, 1);
    let fault = rig.ring_fault();
    assert_eq!(fault, RingFault::BufferIdInFlight { id: 2 });
    rig.queue.push(first, 0);
    assert_eq!(rig.queue.publish(), 2);
}

#[test]
fn notification_is_decided_once_for_all_that_was_published() {
    for (features, event, first, later) in [
        (PACKED, (at(0, true), 0), true, true),
        (PACKED, (at(0, true), 1), false, false),
        (PACKED, (at(0, true), 2), true, true),
        (EVENT_IDX, (at(0, true), 0), true, true),
        (EVENT_IDX, (at(0, true), 1), false, false),
        (EVENT_IDX, (at(4, true), 2), true, true),
        (EVENT_IDX, (at(3, true), 2), true, false),
        (EVENT_IDX, (at(5, true), 2), true, false),
        (EVENT_IDX, (at(4, false), 2), true, false),
        (EVENT_IDX, (at(0, true), 3), true, true),
    ] {
        let mut rig = Rig::new(8, features);
        let (position, flags) = event;
        rig.guest.set_event(position, flags);
        for (id, expected) in [(0, first), (1, later)] {
            rig.guest.add_chain(id, id + 3);
            let head = rig.pop();
            rig.queue.push(head, 0);
            rig.queue.publish();
            // After the second: descriptors 3 to 6 were passed since the last decision.
            let passed_four = position == at(3, true) && flags == 2 && id == 1;
            let passed_five = position == at(5, true) && flags == 2 && id == 1;
            let expected = expected || (features.event_idx && (passed_four || passed_five));
            assert_eq!(
                rig.queue.should_notify(),
                expected,
                "{features:?} {event:?}"
            );
            assert!(!rig.queue.should_notify());
        }
    }
}

#[test]
fn a_position_asked_for_is_notified_when_passed_and_only_then() {
    // Chains of one descriptor, over two passes, against each position.
    let size = 4;
    for asked in 0..8 {
        let position = to_position(asked, size);
        let mut rig = Rig::new(size, EVENT_IDX);
        rig.queue.should_notify();
        rig.guest.set_event(position, 2);
        for index in 0..8 {
            rig.guest.add_chain(index, 1);
            let head = rig.pop();
            rig.queue.push(head, 0);
            rig.queue.publish();
            assert_eq!(rig.queue.should_notify(), index == asked, "{index} {asked}");
        }
    }
}

#[test]
fn kicks_are_asked_for_at_the_position_looked_at_next() {
    let mut rig = Rig::at(4, EVENT_IDX, at(3, true));
    assert_eq!(rig.guest.device_event().1, 0);
    rig.queue.disable_notification();
    assert_eq!(rig.guest.device_event().1, 1);
    assert!(rig.queue.enable_notification());
    assert_eq!(rig.guest.device_event(), (at(3, true), 2));
    rig.guest.add_chain(0, 2);
    assert!(!rig.queue.enable_notification());
    let head = rig.pop();
    rig.queue.push(head, 0);
    assert!(rig.queue.enable_notification());
    assert_eq!(rig.guest.device_event(), (at(1, false), 2));
}

#[test]
fn kicks_are_asked_for_plainly_without_event_idx() {
    let mut rig = Rig::new(4, PACKED);
    for _ in 0..2 {
        rig.queue.disable_notification();
        rig.queue.disable_notification();
        assert_eq!(rig.guest.device_event().1, 1);
        assert!(rig.queue.enable_notification());
        assert_eq!(rig.guest.device_event().1, 0);
    }
}

#[test]
fn r10_a_base_outside_the_ring_is_refused() {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
    for size in [1, 8, 32768u16] {
        let starts = |avail, used| {
            let mut config = config(size, PACKED, PackedPosition::FIRST);
            config.base = RingBase::Packed { avail, used };
            PackedQueue::start(Arc::clone(&memory), &config).map(|queue| queue.base())
        };
        for (avail, used) in [
            (at(0, true), at(0, true)),
            (at(0, false), at(0, true)),
            (at(size - 1, false), at(size - 1, true)),
            (at(0, false), at(size - 1, true)),
        ] {
            assert_eq!(starts(avail, used), Ok(RingBase::Packed { avail, used }));
        }
        if size < 32768 {
            let refused = Err(StartError::BaseOutOfRange { index: size, size });
            assert_eq!(starts(at(size, true), at(0, true)), refused);
            assert_eq!(starts(at(0, true), at(size, true)), refused);
        }
        if size > 1 {
            let outstanding = size + 1;
            let refused = Err(StartError::BaseTooFarAhead { outstanding, size });
            assert_eq!(starts(at(1, false), at(0, true)), refused);
        }
    }
}

#[test]
fn the_format_of_features_and_base_is_checked() {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
    let mut config = config(8, PACKED, PackedPosition::FIRST);
    config.features.packed = false;
    let started = PackedQueue::start(Arc::clone(&memory), &config).map(|_| ());
    assert_eq!(started, Err(StartError::FormatMismatch));
    config.features.packed = true;
    config.base = RingBase::Split { next_avail: 0 };
    let started = PackedQueue::start(memory, &config).map(|_| ());
    assert_eq!(started, Err(StartError::FormatMismatch));
}

#[test]
fn m17_a_map_without_the_ring_stops_it_for_good() {
    let mut rig = Rig::new(8, PACKED);
    rig.guest.add_chain(1, 1);
    rig.guest.add_chain(2, 1);
    rig.guest.add_chain(3, 1);
    let (first, second) = (rig.pop(), rig.pop());
    rig.queue.push(first, 8);
    let addresses = config(8, PACKED, PackedPosition::FIRST).addresses;
    let elsewhere = [(GuestAddress(0x40_0000), 0x1000)];
    let elsewhere = Arc::new(Memory::from_ranges(&elsewhere).unwrap());
    assert!(rig.queue.set_memory(elsewhere, addresses).is_err());
    assert_eq!(rig.ring_fault(), RingFault::MemoryLost);
    rig.queue.push(second, 8);
    assert_eq!((rig.queue.in_flight(), rig.queue.publish()), (0, 0));
    assert!(!rig.queue.should_notify());
    rig.queue.disable_notification();
    assert_eq!(rig.guest.device_event().1, 0);
    assert_eq!(rig.guest.take(1), None);
    let again = Arc::clone(&rig.guest.memory);
    let refused = rig.queue.set_memory(again, addresses);
    assert_eq!(refused, Err(StartError::RingLost));
}

#[test]
fn a_ring_moved_to_another_map_goes_on_there_with_what_was_staged() {
    let mut rig = Rig::new(8, PACKED);
    rig.guest.add_chain(1, 1);
    rig.guest.add_chain(2, 2);
    let (first, second) = (rig.pop(), rig.pop());
    rig.queue.push(first, 8);
    let addresses = config(8, PACKED, PackedPosition::FIRST).addresses;
    let same = Arc::clone(&rig.guest.memory);
    rig.queue.set_memory(same, addresses).unwrap();
    rig.queue.push(second, 9);
    assert_eq!(rig.queue.publish(), 2);
    assert_eq!(rig.guest.take(1), Some((1, 8, true)));
    assert_eq!(rig.guest.take(2), Some((2, 9, true)));
}
