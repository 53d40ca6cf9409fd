//! The guest side of a packed ring, against a naive device: what virtio 1.3 §2.8 says, written down
//! plainly over the bytes in memory.

mod rig;

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;
use rig::{BUFFERS, END, Memory, TABLE, memory, segment, size};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{
    AddError, Driver, DriverError, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, F_AVAIL, F_INDIRECT,
    F_NEXT, F_USED, F_WRITE, Full, PackedDriver, PackedLayout, RawDescriptor, Used,
};
use vring::{PackedPosition, RingAddresses, RingArea, RingBase, RingFeatures, Segment, StartError};

const PACKED: RingFeatures = RingFeatures {
    indirect_desc: true,
    event_idx: false,
    in_order: false,
    packed: true,
};

const SIZE: u16 = 8;

fn addresses() -> RingAddresses {
    let layout = PackedLayout::new(GuestAddress(rig::RING), size(u32::from(SIZE)));
    layout.unwrap().addresses()
}

fn driver(features: RingFeatures, index: u16, wrap: bool) -> (PackedDriver<Memory>, NaiveDevice) {
    let memory = memory();
    let at = addresses();
    let entries = size(u32::from(SIZE));
    let position = PackedPosition { index, wrap };
    let driver =
        PackedDriver::starting_at(Arc::clone(&memory), at, entries, features, position).unwrap();
    let device = NaiveDevice {
        memory,
        avail: (index, wrap),
        used: (index, wrap),
    };
    (driver, device)
}

/// One buffer: address, length, writable by the device.
type Buffer = (u64, u32, bool);

#[derive(Clone, Debug, PartialEq)]
struct Chain {
    id: u16,
    buffers: Vec<Buffer>,
    descriptors: u16,
}

struct NaiveDevice {
    memory: Arc<Memory>,
    avail: (u16, bool),
    used: (u16, bool),
}

fn step((index, wrap): (u16, bool)) -> (u16, bool) {
    if index + 1 == SIZE {
        (0, !wrap)
    } else {
        (index + 1, wrap)
    }
}

impl NaiveDevice {
    /// Address, length, id and flags of the 16 bytes at `at`.
    fn entry(&self, at: u64) -> (u64, u32, u16, u16) {
        let mut bytes = [0u8; 16];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        (
            u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
            u16::from_le_bytes(bytes[12..14].try_into().unwrap()),
            u16::from_le_bytes(bytes[14..].try_into().unwrap()),
        )
    }

    fn at(index: u16) -> u64 {
        addresses().descriptor_area.0 + 16 * u64::from(index)
    }

    fn pop(&mut self) -> Option<Chain> {
        let (index, wrap) = self.avail;
        let (.., flags) = self.entry(Self::at(index));
        let (avail, used) = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
        if avail != wrap || used == wrap {
            return None;
        }
        let mut chain = Chain {
            id: 0,
            buffers: Vec::new(),
            descriptors: 0,
        };
        loop {
            let (address, len, id, flags) = self.entry(Self::at(self.avail.0));
            let (_, wrap) = self.avail;
            assert_eq!(flags & 1 << 7 != 0, wrap, "AVAIL of every descriptor");
            assert_eq!(flags & 1 << 15 != 0, !wrap, "USED of every descriptor");
            self.avail = step(self.avail);
            chain.descriptors += 1;
            if flags & 4 == 0 {
                chain.buffers.push((address, len, flags & 2 != 0));
            } else {
                assert_eq!(len % 16, 0);
                for entry in 0..u64::from(len / 16) {
                    let (address, len, _, flags) = self.entry(address + 16 * entry);
                    assert_eq!(flags & !2, 0, "only WRITE in a table");
                    chain.buffers.push((address, len, flags & 2 != 0));
                }
            }
            if flags & 1 == 0 {
                chain.id = id;
                return Some(chain);
            }
        }
    }

    /// Gives `descriptors` descriptors back with one used descriptor.
    fn push(&mut self, id: u16, len: u32, descriptors: u16) {
        let (index, wrap) = self.used;
        let write = if len == 0 { 0 } else { 2 };
        let flags: u16 = write | if wrap { 1 << 7 | 1 << 15 } else { 0 };
        let mut bytes = [0u8; 8];
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        bytes[4..6].copy_from_slice(&id.to_le_bytes());
        bytes[6..].copy_from_slice(&flags.to_le_bytes());
        let at = GuestAddress(Self::at(index) + 8);
        self.memory.write_slice(&bytes, at).unwrap();
        for _ in 0..descriptors {
            self.used = step(self.used);
        }
    }

    fn ask(&self, position: u16, flags: u16) {
        let bytes = [position.to_le_bytes(), flags.to_le_bytes()];
        let at = addresses().device_area;
        self.memory.write_slice(bytes.as_flattened(), at).unwrap();
    }

    fn asked(&self) -> (u16, u16) {
        let at = addresses().driver_area;
        let word: u32 = self.memory.read_obj(at).unwrap();
        let [p0, p1, f0, f1] = word.to_ne_bytes();
        (u16::from_le_bytes([p0, p1]), u16::from_le_bytes([f0, f1]))
    }
}

fn used(id: u16, len: u32, expected: bool) -> Used {
    Used {
        id: u32::from(id),
        len,
        expected,
    }
}

#[test]
fn layout_is_aligned_and_does_not_overlap_for_every_size() {
    for shift in 0..=15 {
        let size = size(1 << shift);
        let entries = u64::from(size.get());
        for base in [0, 1, 0x1008, 0xffff_f000] {
            let layout = PackedLayout::new(GuestAddress(base), size).unwrap();
            let at = layout.addresses();
            let [ring, driver, device] = [at.descriptor_area.0, at.driver_area.0, at.device_area.0];
            assert!(base <= ring && ring % 16 == 0);
            assert!(ring + 16 * entries <= driver && driver % 4 == 0);
            assert!(driver + 4 <= device && device % 4 == 0);
            assert_eq!(base + layout.total_len(), device + 4);
        }
    }
    let base = u64::MAX - 0x100;
    assert_eq!(
        PackedLayout::new(GuestAddress(base), size(256)),
        Err(DriverError::LayoutOverflow { base })
    );
}

#[test]
fn ring_outside_memory_is_refused() {
    let layout = PackedLayout::new(GuestAddress(END), size(8)).unwrap();
    assert_eq!(
        PackedDriver::new(memory(), layout.addresses(), size(8), PACKED).unwrap_err(),
        DriverError::Ring(StartError::NotMapped {
            area: RingArea::DescriptorArea,
            address: END,
            len: 128
        })
    );
}

#[test]
fn a_new_ring_is_all_zeroes_whatever_was_there() {
    let memory = memory();
    let everything = usize::try_from(END).unwrap();
    memory
        .write_slice(&vec![0xff; everything], GuestAddress(0))
        .unwrap();
    let at = addresses();
    PackedDriver::new(Arc::clone(&memory), at, size(8), PACKED).unwrap();
    for (start, len) in [
        (at.descriptor_area, 128),
        (at.driver_area, 4),
        (at.device_area, 4),
    ] {
        let mut bytes = vec![0xff; len];
        memory.read_slice(&mut bytes, start).unwrap();
        assert_eq!(bytes, vec![0; len]);
    }
}

#[test]
fn an_idle_ring_at_any_position_has_nothing_available_and_nothing_used() {
    for index in 0..SIZE {
        for wrap in [false, true] {
            let (mut driver, mut device) = driver(PACKED, index, wrap);
            for _ in 0..3 * SIZE {
                assert_eq!(device.pop(), None);
                assert_eq!(driver.poll_used(), None);
                assert!(driver.enable_interrupts());
                let id = driver.add_chain(&[segment(BUFFERS, 4)], &[]).unwrap();
                assert_eq!(driver.publish(), 1);
                assert_eq!(driver.poll_used(), None);
                let chain = device.pop().unwrap();
                device.push(chain.id, 0, chain.descriptors);
                assert!(!driver.enable_interrupts(), "a completion raced in");
                assert_eq!(driver.poll_used(), Some(used(id, 0, true)));
            }
        }
    }
}

#[test]
fn starting_outside_the_ring_with_chains_in_flight_or_in_the_other_format_is_refused() {
    let start = |features, base| {
        let at = addresses();
        Driver::starting_at(memory(), at, size(8), features, base).map(drop)
    };
    let packed = |avail, used| RingBase::Packed {
        avail: PackedPosition::from_bits(avail),
        used: PackedPosition::from_bits(used),
    };
    let split = RingBase::Split { next_avail: 0 };
    let refused = |base| Err(DriverError::Base { base });
    for base in [packed(8, 8), packed(1, 0), packed(0x8000, 0), split] {
        assert_eq!(start(PACKED, base), refused(base));
    }
    assert_eq!(start(rig::PLAIN, packed(0, 0)), refused(packed(0, 0)));
    assert_eq!(start(PACKED, packed(0x8007, 0x8007)), Ok(()));
    assert_eq!(start(rig::PLAIN, split), Ok(()));
}

#[test]
fn a_batch_is_written_whole_before_its_first_flags_make_it_available() {
    let (mut driver, mut device) = driver(PACKED, 6, true);
    let two = [segment(BUFFERS, 8); 2];
    driver.add_chain(&two, &[]).unwrap();
    driver.add_chain(&two, &[]).unwrap();
    let (.., flags) = driver.desc(6);
    assert_eq!(flags, 0, "as the pass before left it");
    // The rest is there already, across the end of the ring.
    assert_eq!(driver.desc(7), (BUFFERS, 8, 0, F_AVAIL));
    assert_eq!(driver.desc(0), (BUFFERS, 8, !1, F_USED | F_NEXT));
    assert_eq!(driver.desc(1), (BUFFERS, 8, 1, F_USED));
    assert_eq!(device.pop(), None);
    assert!(!driver.needs_kick(), "nothing was published");
    assert_eq!(driver.publish(), 2);
    assert_eq!(driver.desc(6), (BUFFERS, 8, !0, F_AVAIL | F_NEXT));
    assert!(driver.needs_kick());
    assert!(device.pop().is_some() && device.pop().is_some());
    assert_eq!(device.pop(), None);
    assert_eq!(driver.publish(), 0);
}

#[test]
fn only_the_last_descriptor_has_the_id() {
    let (mut driver, _) = driver(PACKED, 0, true);
    let id = driver.add_chain(&[segment(BUFFERS, 8); 3], &[]).unwrap();
    driver.publish();
    let ids = [0, 1, 2].map(|index| driver.desc(index).2);
    assert_eq!(ids, [!id, !id, id]);
}

#[test]
fn a_chain_too_long_for_the_free_descriptors_leaves_them_alone() {
    let (mut driver, mut device) = driver(PACKED, 0, true);
    assert_eq!(
        driver.add_chain(&[segment(BUFFERS, 8); 9], &[]),
        Err(Full { needed: 9, free: 8 })
    );
    driver.add_chain(&[segment(BUFFERS, 8); 8], &[]).unwrap();
    assert_eq!(
        driver.add_indirect(GuestAddress(TABLE), &[segment(BUFFERS, 8)], &[]),
        Err(AddError::Full(Full { needed: 1, free: 0 }))
    );
    assert_eq!(driver.publish(), 1);
    assert_eq!(device.pop().unwrap().descriptors, 8);
}

#[test]
fn a_chain_of_nothing_is_one_empty_descriptor() {
    let (mut driver, mut device) = driver(PACKED, 0, true);
    driver.add_chain(&[], &[]).unwrap();
    driver.add_indirect(GuestAddress(TABLE), &[], &[]).unwrap();
    driver.publish();
    for _ in 0..2 {
        assert_eq!(device.pop().unwrap().buffers, [(0, 0, false)]);
    }
}

#[test]
fn an_indirect_table_outside_memory_is_refused() {
    let (mut driver, _) = driver(PACKED, 0, true);
    let two = [segment(BUFFERS, 16); 2];
    assert_eq!(
        driver.add_indirect(GuestAddress(END - 16), &two, &[]),
        Err(AddError::Table {
            address: END - 16,
            entries: 2
        })
    );
    assert_eq!((driver.free(), driver.publish()), (8, 0));
}

#[test]
fn a_device_that_returns_what_it_was_not_given_is_told_apart() {
    let (mut driver, mut device) = driver(PACKED, 0, true);
    driver.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
    driver.publish();
    for id in [3, u16::MAX, 0, 0] {
        device.push(id, 1, 1);
    }
    let all: Vec<_> = std::iter::from_fn(|| driver.poll_used()).collect();
    let expected = [
        used(3, 1, false),
        used(u16::MAX, 1, false),
        used(0, 1, true),
        used(0, 1, false), // twice
    ];
    assert_eq!(all, expected);
    assert_eq!(driver.free(), 8);
}

#[test]
fn a_used_length_without_write_means_nothing() {
    let (mut driver, _) = driver(PACKED, 0, true);
    let id = driver.add_chain(&[], &[segment(BUFFERS, 8)]).unwrap();
    driver.publish();
    driver.write_used_desc(0, id, 77, F_AVAIL | F_USED);
    assert_eq!(driver.poll_used(), Some(used(id, 0, true)));
}

#[test]
fn raw_descriptors_are_offered_as_they_are_with_any_id() {
    let (mut driver, mut device) = driver(PACKED, 7, true);
    let raw = |address, len, flags| RawDescriptor {
        address,
        len,
        flags,
    };
    let id = driver
        .add_raw(&[
            raw(1, 2, F_NEXT | F_WRITE | F_AVAIL | F_USED),
            raw(3, 0, F_WRITE),
        ])
        .unwrap();
    driver
        .add_raw_with_id(0xbeef, &[raw(u64::MAX, u32::MAX, 0x7f70)])
        .unwrap();
    assert_eq!((driver.free(), driver.publish()), (5, 2));
    // Whatever was asked for, AVAIL and USED are those of the pass.
    assert_eq!(driver.desc(7).3, F_NEXT | F_WRITE | F_AVAIL);
    assert_eq!(driver.desc(0).3, F_WRITE | F_USED);
    let first = device.pop().unwrap();
    assert_eq!(first.buffers, [(1, 2, true), (3, 0, true)]);
    let second = device.pop().unwrap();
    assert_eq!(second.id, 0xbeef);
    assert_eq!(driver.desc(1), (u64::MAX, u32::MAX, 0xbeef, 0xff70));
    device.push(second.id, 9, 1);
    device.push(first.id, 8, 2);
    assert_eq!(driver.poll_used(), Some(used(0xbeef, 9, true)));
    assert_eq!(driver.poll_used(), Some(used(id, 8, true)));
    assert_eq!(driver.free(), 8);
}

#[test]
fn raw_chains_may_overrun_the_ring_and_come_back_without_more_free_than_it_has() {
    let (mut driver, mut device) = driver(PACKED, 0, true);
    let raw = [RawDescriptor {
        address: BUFFERS,
        len: 1,
        flags: 0,
    }];
    assert_eq!(
        driver.add_raw(&raw.repeat(9)),
        Err(Full { needed: 9, free: 8 })
    );
    let first = driver.add_chain(&[segment(BUFFERS, 8); 8], &[]).unwrap();
    driver.publish();
    device.pop().unwrap();
    let second = driver.add_raw(&raw).unwrap();
    driver.publish();
    assert_eq!(driver.free(), 0);
    assert_eq!(device.pop().map(|chain| chain.id), Some(second));
    device.push(first, 0, 8);
    assert_eq!(driver.poll_used(), Some(used(first, 0, true)));
    device.push(second, 0, 1);
    assert_eq!(driver.poll_used(), Some(used(second, 0, true)));
    assert_eq!(driver.free(), 8);
}

#[test]
fn raw_writers_stay_inside_the_ring() {
    let memory = memory();
    let everything = usize::try_from(END).unwrap();
    memory
        .write_slice(&vec![0x77; everything], GuestAddress(0))
        .unwrap();
    let layout = PackedLayout::new(GuestAddress(0x1000), size(8)).unwrap();
    let at = layout.addresses();
    let driver = PackedDriver::new(Arc::clone(&memory), at, size(8), PACKED).unwrap();
    for index in [8, 9, u16::MAX] {
        driver.write_desc(index, u64::MAX, u32::MAX, u16::MAX, u16::MAX);
        driver.write_used_desc(index, u16::MAX, u32::MAX, u16::MAX);
        driver.set_driver_event(u16::MAX, u16::MAX);
        driver.set_device_event(u16::MAX, u16::MAX);
    }
    let mut bytes = vec![0; everything];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    let written = |at: u64, len: usize| {
        let start = usize::try_from(at).unwrap();
        start..start + len
    };
    let areas = [
        written(at.descriptor_area.0, 128),
        written(at.driver_area.0, 4),
        written(at.device_area.0, 4),
    ];
    for (at, &byte) in bytes.iter().enumerate() {
        assert!(byte == 0x77 || areas.iter().any(|area| area.contains(&at)));
    }
    assert_eq!(driver.desc(6), (0, 0, 0, 0));
    assert_eq!(driver.device_event(), (u16::MAX, u16::MAX));
}

#[test]
fn interrupts_are_asked_for_at_the_next_completion() {
    let event_idx = RingFeatures {
        event_idx: true,
        ..PACKED
    };
    for (features, flags) in [(PACKED, EVENT_ENABLE), (event_idx, EVENT_DESC)] {
        let (mut driver, mut device) = driver(features, 7, true);
        driver.disable_interrupts();
        assert_eq!(device.asked().1, EVENT_DISABLE);
        for position in [0x8007, 0, 1] {
            assert!(driver.enable_interrupts());
            let (asked, asked_flags) = device.asked();
            assert_eq!(asked_flags, flags);
            if features.event_idx {
                assert_eq!(asked, position);
            }
            driver.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
            driver.publish();
            let chain = device.pop().unwrap();
            device.push(chain.id, 0, 1);
            assert!(!driver.enable_interrupts());
            driver.poll_used().unwrap();
        }
    }
}

#[test]
fn kicks_follow_the_flags_without_event_idx() {
    let (mut driver, device) = driver(PACKED, 0, true);
    // The reserved value, and DESC without the feature, ask for every kick.
    for (flags, kick) in [
        (EVENT_ENABLE, true),
        (EVENT_DISABLE, false),
        (EVENT_DESC, true),
        (3, true),
    ] {
        device.ask(0x7fff, flags);
        driver.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
        driver.publish();
        assert_eq!(driver.needs_kick(), kick, "flags {flags}");
        assert!(!driver.needs_kick(), "decided already");
    }
}

#[test]
fn with_in_order_a_used_descriptor_completes_all_up_to_its_chain() {
    let in_order = RingFeatures {
        in_order: true,
        ..PACKED
    };
    let (mut driver, mut device) = driver(in_order, 5, false);
    let two = [segment(BUFFERS, 8), segment(BUFFERS, 8)];
    let ids = [(); 3].map(|()| driver.add_chain(&[], &two).unwrap());
    driver.publish();
    device.push(ids[1], 3, 4);
    device.push(ids[2], 16, 2);
    for (id, len) in ids.into_iter().zip([16, 3, 16]) {
        assert_eq!(driver.poll_used(), Some(used(id, len, true)));
    }
    assert_eq!((driver.poll_used(), driver.free()), (None, 8));
    // An id that is not outstanding completes nothing.
    device.push(ids[0], 0, 1);
    assert_eq!(driver.poll_used(), Some(used(ids[0], 0, false)));
    assert_eq!(driver.free(), 8);
}

#[derive(Clone, Debug)]
enum Step {
    Add {
        readable: u16,
        writable: u16,
        indirect: bool,
    },
    Publish,
    Pop,
    Push {
        which: usize,
        short: bool,
    },
    Poll,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let one = prop_oneof![
        4 => (0u16..4, 0u16..4, any::<bool>()).prop_map(|(readable, writable, indirect)| {
            Step::Add { readable, writable, indirect }
        }),
        2 => Just(Step::Publish),
        4 => Just(Step::Pop),
        4 => (0usize..8, any::<bool>()).prop_map(|(which, short)| Step::Push { which, short }),
        3 => Just(Step::Poll),
    ];
    proptest::collection::vec(one, 1..200)
}

fn segments(count: u16, at: u64) -> Vec<Segment> {
    (0..count)
        .map(|i| segment(at + 0x100 * u64::from(i), u32::from(i) + 1))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn what_is_added_is_what_a_naive_device_pops_and_what_it_pushes_comes_back(
        index in 0..SIZE, wrap: bool, in_order: bool, steps in steps(),
    ) {
        let features = RingFeatures { in_order, ..PACKED };
        let (mut driver, mut device) = driver(features, index, wrap);
        let mut staged: VecDeque<Chain> = VecDeque::new();
        let mut available: VecDeque<Chain> = VecDeque::new();
        let mut popped: VecDeque<Chain> = VecDeque::new();
        let mut completed: VecDeque<Used> = VecDeque::new();
        let mut free = SIZE;
        let mut free_after: VecDeque<u16> = VecDeque::new();
        let mut table = TABLE;
        for step in steps {
            match step {
                Step::Add { readable, writable, indirect } => {
                    let (readable, writable) = (segments(readable, BUFFERS), segments(writable, 0));
                    let mut buffers: Vec<Buffer> = Vec::new();
                    buffers.extend(readable.iter().map(|s| (s.addr.0, s.len, false)));
                    buffers.extend(writable.iter().map(|s| (s.addr.0, s.len, true)));
                    if buffers.is_empty() {
                        buffers.push((0, 0, false));
                    }
                    let (added, descriptors) = if indirect {
                        let table = GuestAddress(table);
                        (driver.add_indirect(table, &readable, &writable).ok(), 1)
                    } else {
                        let descriptors = u16::try_from(buffers.len()).unwrap();
                        (driver.add_chain(&readable, &writable).ok(), descriptors)
                    };
                    prop_assert_eq!(added.is_some(), descriptors <= free);
                    if let Some(id) = added {
                        free -= descriptors;
                        // More tables than chains outstanding: none is overwritten.
                        table = if table > TABLE + 0xf00 { TABLE } else { table + 0x100 };
                        staged.push_back(Chain { id, buffers, descriptors });
                    }
                }
                Step::Publish => {
                    prop_assert_eq!(driver.publish(), staged.len());
                    available.append(&mut staged);
                }
                Step::Pop => {
                    let chain = device.pop();
                    prop_assert_eq!(&chain, &available.pop_front());
                    popped.extend(chain);
                }
                Step::Push { which, short } if in_order => {
                    // A run: all up to this one, the last alone perhaps written short.
                    let Some(last) = popped.get(which).cloned() else { continue };
                    let mut descriptors = 0;
                    for chain in popped.drain(..=which) {
                        descriptors += chain.descriptors;
                        free_after.push_back(chain.descriptors);
                        let full = chain.buffers.iter().filter(|b| b.2).map(|b| b.1).sum();
                        let len = if chain == last && short { 0 } else { full };
                        completed.push_back(used(chain.id, len, true));
                    }
                    let len = completed.back().unwrap().len;
                    device.push(last.id, len, descriptors);
                }
                Step::Push { which, .. } => {
                    let Some(chain) = popped.remove(which) else { continue };
                    device.push(chain.id, 77, chain.descriptors);
                    completed.push_back(used(chain.id, 77, true));
                    free_after.push_back(chain.descriptors);
                }
                Step::Poll => {
                    prop_assert_eq!(driver.poll_used(), completed.pop_front());
                    free += free_after.pop_front().unwrap_or(0);
                }
            }
            prop_assert_eq!(driver.free(), free);
            // No two chains outstanding share an id.
            let mut ids: Vec<_> = [&staged, &available, &popped]
                .into_iter()
                .flatten()
                .map(|chain| chain.id)
                .collect();
            let outstanding = ids.len();
            ids.sort_unstable();
            ids.dedup();
            prop_assert_eq!(ids.len(), outstanding);
        }
    }

    /// Kick if the device's event is among the descriptors published since the last decision.
    #[test]
    fn kick_decisions_agree_with_the_specification(
        index in 0..SIZE,
        wrap: bool,
        batches in proptest::collection::vec((1u16..=SIZE, 0..SIZE + 2, any::<bool>(), 0u16..4), 1..30),
    ) {
        let features = RingFeatures { event_idx: true, ..PACKED };
        let (mut driver, mut device) = driver(features, index, wrap);
        let mut seen = Vec::new();
        for (count, event, event_wrap, decide) in batches {
            for _ in 0..count {
                let next = driver.next_avail();
                seen.push((next.index, next.wrap));
                driver.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
            }
            driver.publish();
            while let Some(chain) = device.pop() {
                device.push(chain.id, 0, 1);
                driver.poll_used().unwrap();
            }
            device.ask(event | u16::from(event_wrap) << 15, EVENT_DESC);
            // One decision for several publications, sometimes: more than two passes.
            if decide == 0 {
                let expected = seen.contains(&(event, event_wrap));
                prop_assert_eq!(driver.needs_kick(), expected);
                seen.clear();
            }
        }
    }
}

#[test]
fn flags_are_those_of_the_specification() {
    assert_eq!(
        [F_NEXT, F_WRITE, F_INDIRECT, F_AVAIL, F_USED],
        [1, 2, 4, 0x80, 0x8000]
    );
    assert_eq!([EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC], [0, 1, 2]);
}
