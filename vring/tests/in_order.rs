//! `VIRTIO_F_IN_ORDER`: whatever order the device completes chains in, the driver gets them in the
//! order it made them available (virtio 1.3 §2.7.9, §2.8.8), in a ring of either format.

mod rig;

use std::collections::VecDeque;

use proptest::prelude::*;
use rig::{BUFFERS, Rig, TABLE, base_after, both, packed, segment};
use vm_memory::GuestAddress;
use vring::driver::{F_AVAIL, F_NEXT, F_USED, F_WRITE, RawDescriptor, Used};
use vring::{Head, PopError, RingFault, RingFeatures};

const IN_ORDER: RingFeatures = RingFeatures {
    indirect_desc: true,
    event_idx: false,
    in_order: true,
    packed: false,
};

const SIZE: u32 = 8;

/// Offers `count` chains with `len` writable bytes each, and pops them.
fn pop_all(rig: &mut Rig, count: usize, len: u32) -> Vec<Head> {
    for _ in 0..count {
        rig.guest.add_chain(&[], &[segment(BUFFERS, len)]).unwrap();
    }
    rig.guest.publish();
    (0..count).map(|_| rig.pop_head()).collect()
}

fn completions(rig: &mut Rig) -> Vec<(u32, u32)> {
    let next = || {
        let has_used = rig.guest.has_used();
        let used = rig.guest.poll_used();
        assert_eq!(has_used, used.is_some());
        used
    };
    std::iter::from_fn(next)
        .map(|Used { id, len, expected }| {
            assert!(expected);
            (id, len)
        })
        .collect()
}

/// The lengths of all completions, each of which the driver expected.
fn lens(rig: &mut Rig) -> Vec<u32> {
    completions(rig).into_iter().map(|(_, len)| len).collect()
}

#[test]
fn a_chain_waits_for_those_before_it() {
    for features in both(IN_ORDER) {
        let mut rig = Rig::new(SIZE, features);
        let mut heads = pop_all(&mut rig, 3, 16);
        let first = heads.remove(0);
        for head in heads {
            rig.queue.push(head, 16);
        }
        assert_eq!(rig.queue.publish(), 0);
        assert!(rig.queue.should_notify(), "the first decision");
        assert!(!rig.queue.should_notify());
        assert_eq!((rig.guest.poll_used(), rig.queue.in_flight()), (None, 1));
        rig.queue.push(first, 16);
        assert_eq!(rig.queue.publish(), 3);
        assert!(rig.queue.should_notify());
        assert_eq!(lens(&mut rig), [16, 16, 16]);
    }
}

#[test]
fn a_run_written_in_full_has_one_used_element_where_its_first_would_be() {
    let mut rig = Rig::starting_at(SIZE, IN_ORDER, 65534);
    let heads = pop_all(&mut rig, 4, 16);
    for head in heads.into_iter().rev() {
        rig.queue.push(head, 16);
    }
    assert_eq!(rig.queue.publish(), 4);
    assert_eq!(rig.split().used_idx(), 2);
    assert_eq!(rig.split().used_entry(65534), (3, 16));
    for skipped in [65535, 0, 1] {
        assert_eq!(rig.split().used_entry(skipped), (0, 0), "left alone");
    }
    // The next batch's element is where the next available entry was.
    let head = pop_all(&mut rig, 1, 16).remove(0);
    rig.queue.push(head, 9);
    rig.queue.publish();
    assert_eq!(rig.split().used_entry(2), (4, 9));
}

#[test]
fn a_chain_written_short_is_never_skipped() {
    let mut rig = Rig::new(SIZE, IN_ORDER);
    let heads = pop_all(&mut rig, 5, 16);
    for (head, len) in heads.into_iter().zip([16, 3, 16, 16, 0]) {
        rig.queue.push(head, len);
    }
    rig.queue.publish();
    assert_eq!(rig.split().used_entry(0), (1, 3));
    assert_eq!(rig.split().used_entry(2), (4, 0));
    let expected = [(0, 16), (1, 3), (2, 16), (3, 16), (4, 0)];
    assert_eq!(completions(&mut rig), expected);
}

#[test]
fn a_broken_chain_is_returned_in_its_turn_and_with_its_own_element() {
    for features in both(IN_ORDER) {
        let mut rig = Rig::new(SIZE, features);
        let buffer = (BUFFERS, 16, F_WRITE);
        rig.offer_raw(&[buffer]);
        // Readable after writable.
        rig.offer_raw(&[(BUFFERS, 16, F_WRITE | F_NEXT), (BUFFERS, 16, 0)]);
        rig.offer_raw(&[buffer]);
        let first = rig.pop_head();
        let Err(PopError::Chain { head: broken, .. }) = rig.pop() else {
            panic!("readable after writable");
        };
        let last = rig.pop_head();
        rig.queue.push(last, 16);
        rig.queue.push(broken, 0);
        rig.queue.push(first, 16);
        assert_eq!(rig.queue.publish(), 3);
        assert_eq!(lens(&mut rig), [16, 0, 16]);
        assert_eq!(rig.guest.free(), 8);
        rig.assert_ring_goes_on();
    }
}

#[test]
fn a_packed_run_has_one_used_descriptor_where_its_first_chain_was() {
    let mut rig = Rig::starting_at(SIZE, packed(IN_ORDER), 5);
    for _ in 0..3 {
        let header = [segment(BUFFERS, 16)];
        rig.guest
            .add_chain(&header, &[segment(BUFFERS, 8)])
            .unwrap();
    }
    rig.guest.publish();
    let heads = rig.pop_all();
    let untouched = [6, 7, 0, 1, 2].map(|index| rig.packed().desc(index));
    for head in heads.into_iter().rev() {
        rig.queue.push(head, 8);
    }
    assert_eq!(rig.queue.publish(), 3);
    let (_, len, id, flags) = rig.packed().desc(5);
    assert_eq!((len, id, flags), (8, 2, F_AVAIL | F_USED | F_WRITE));
    assert_eq!(
        [6, 7, 0, 1, 2].map(|index| rig.packed().desc(index)),
        untouched
    );
    assert_eq!(rig.queue.base(), base_after(11, 8, packed(IN_ORDER)));
    assert_eq!(lens(&mut rig), [8, 8, 8]);
    assert_eq!(rig.guest.free(), 8);
    rig.assert_ring_goes_on();
}

#[test]
fn a_buffer_id_that_waits_for_its_turn_cannot_be_offered_again() {
    let mut rig = Rig::new(SIZE, packed(IN_ORDER));
    let mut heads = pop_all(&mut rig, 2, 16);
    let second = heads.pop().unwrap();
    rig.queue.push(second, 16);
    let raw = RawDescriptor {
        address: BUFFERS,
        len: 16,
        flags: 0,
    };
    rig.packed().add_raw_with_id(1, &[raw]).unwrap();
    rig.guest.publish();
    let fault = RingFault::BufferIdInFlight { id: 1 };
    assert_eq!(rig.ring_fault(), fault);
    // What is in flight still completes, in order.
    for head in heads {
        rig.queue.push(head, 16);
    }
    assert_eq!(rig.queue.publish(), 2);
}

#[test]
fn a_packed_device_that_completes_out_of_order_is_caught_by_the_driver() {
    let mut rig = Rig::new(SIZE, packed(IN_ORDER));
    drop(pop_all(&mut rig, 3, 16));
    // An id of no chain; one of a chain is taken for a run up to it.
    rig.packed().write_used_desc(0, 5, 16, F_AVAIL | F_USED);
    assert!(!rig.guest.poll_used().unwrap().expected);
    assert_eq!((rig.guest.poll_used(), rig.guest.free()), (None, 5));
}

#[test]
fn a_head_that_waits_for_its_turn_cannot_be_offered_again() {
    let mut rig = Rig::new(SIZE, IN_ORDER);
    let mut heads = pop_all(&mut rig, 2, 16);
    let second = heads.pop().unwrap();
    rig.queue.push(second, 16);
    rig.offer(1);
    assert_eq!(rig.ring_fault(), RingFault::HeadInFlight { head: 1 });
    // What is in flight still completes, in order.
    for head in heads {
        rig.queue.push(head, 16);
    }
    assert_eq!(rig.queue.publish(), 2);
    assert_eq!(rig.split().used_entry(0), (1, 16));
}

#[test]
fn unpop_leaves_no_gap() {
    for features in both(IN_ORDER) {
        let mut rig = Rig::new(SIZE, features);
        let mut heads = pop_all(&mut rig, 3, 16);
        let third = heads.pop().unwrap();
        rig.queue.unpop(third).unwrap();
        for head in heads {
            rig.queue.push(head, 16);
        }
        assert_eq!(rig.queue.publish(), 2);
        let third = rig.pop_head();
        rig.queue.push(third, 16);
        assert_eq!(rig.queue.publish(), 1);
        assert_eq!(lens(&mut rig), [16, 16, 16]);
    }
}

/// Pushes a head of another queue, and looks whether anything came of it.
fn push_foreign(features: RingFeatures) {
    let mut rig = Rig::new(SIZE, features);
    let mut other = Rig::new(SIZE, features);
    let foreign = pop_all(&mut other, 1, 16).remove(0);
    rig.queue.push(foreign, 1);
    assert_eq!(rig.queue.publish(), 0);
}

#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "is not from this queue"))]
fn a_head_of_another_split_queue_completes_nothing() {
    push_foreign(IN_ORDER);
}

#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "is not from this queue"))]
fn a_head_of_another_packed_queue_completes_nothing() {
    push_foreign(packed(IN_ORDER));
}

#[test]
fn the_driver_takes_descriptors_in_ring_order() {
    // What virtio 1.3 §2.7.5.2 asks of a driver with IN_ORDER: next is always the index after.
    let mut rig = Rig::new(SIZE, IN_ORDER);
    let mut expected = 0;
    for round in 0..20u16 {
        let buffers = [segment(BUFFERS, 4); 3];
        let len = usize::from(round % 3) + 1;
        let head = rig.guest.add_chain(&buffers[..len], &[]).unwrap();
        assert_eq!(head, expected);
        expected = (expected + round % 3 + 1) % 8;
        rig.guest.publish();
        let popped = rig.pop_head();
        rig.queue.push(popped, 0);
        rig.queue.publish();
        completions(&mut rig);
    }
}

#[test]
fn a_device_that_completes_out_of_order_is_caught_by_the_driver() {
    let mut rig = Rig::new(SIZE, IN_ORDER);
    drop(pop_all(&mut rig, 3, 16));
    rig.split().write_used_entry(0, 2, 16);
    rig.split().set_used_idx(1);
    let used = rig.guest.poll_used().unwrap();
    assert!(!used.expected, "it stands for three, and one is announced");
    assert_eq!(rig.guest.poll_used(), None);
    assert_eq!(rig.guest.free(), 5);
}

#[derive(Clone, Debug)]
enum Step {
    Offer { lens: Vec<u32>, indirect: bool },
    Pop,
    Unpop,
    Push { which: usize, short: u32 },
    Publish,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (proptest::collection::vec(1u32..100, 0..4), any::<bool>())
            .prop_map(|(lens, indirect)| Step::Offer { lens, indirect }),
        4 => Just(Step::Pop),
        1 => Just(Step::Unpop),
        4 => (0usize..8, prop_oneof![3 => Just(0u32), 1 => 1u32..50])
            .prop_map(|(which, short)| Step::Push { which, short }),
        2 => Just(Step::Publish),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// The naive model: a list of what was offered, each with the length it was completed with.
    #[test]
    fn the_driver_sees_every_chain_in_order_with_its_own_length(
        start in prop_oneof![Just(0u16), 65500u16.., any::<u16>()],
        event_idx: bool,
        packed: bool,
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let features = RingFeatures { event_idx, packed, ..IN_ORDER };
        let mut rig = Rig::starting_at(SIZE, features, start);
        // Id, writable bytes, and what was written.
        let mut offered: VecDeque<(u16, u32, Option<u32>)> = VecDeque::new();
        // With its number in the order of all offered, of which `gone` are not in the list.
        let mut popped: Vec<(Head, usize)> = Vec::new();
        let (mut next_pop, mut gone, mut added) = (0, 0, 0u64);
        let mut steps = steps;
        // In the end everything completes.
        steps.extend(std::iter::repeat_n(Step::Pop, 8));
        steps.extend(std::iter::repeat_n(Step::Push { which: 0, short: 0 }, 8));
        steps.push(Step::Publish);
        for step in steps {
            match step {
                Step::Offer { lens, indirect } => {
                    let buffers: Vec<_> = lens.iter().map(|&len| segment(BUFFERS, len)).collect();
                    let header = [segment(BUFFERS, 16)];
                    // One table for each chain that can be outstanding.
                    let table = GuestAddress(TABLE + 0x100 * (added % 8));
                    let id = if indirect {
                        rig.guest.add_indirect(table, &header, &buffers).ok()
                    } else {
                        rig.guest.add_chain(&header, &buffers).ok()
                    };
                    if let Some(id) = id {
                        added += 1;
                        offered.push_back((id, lens.iter().sum(), None));
                        rig.guest.publish();
                    }
                }
                Step::Pop => {
                    let head = rig.pop().unwrap();
                    prop_assert_eq!(head.is_some(), next_pop < gone + offered.len());
                    if let Some(head) = head {
                        let (id, writable, _) = offered[next_pop - gone];
                        prop_assert_eq!(rig.chain.writable_len(), u64::from(writable));
                        if !packed {
                            prop_assert_eq!(head.index(), id);
                        }
                        popped.push((head, next_pop));
                        next_pop += 1;
                    }
                }
                Step::Unpop => {
                    if let Some((head, number)) = popped.pop() {
                        match rig.queue.unpop(head) {
                            Ok(()) => next_pop -= 1,
                            Err(head) => popped.push((head, number)),
                        }
                    }
                }
                Step::Push { which, short } => {
                    if which < popped.len() {
                        let (head, number) = popped.remove(which);
                        let chain = &mut offered[number - gone];
                        let len = chain.1.saturating_sub(short);
                        chain.2 = Some(len);
                        rig.queue.push(head, len);
                    }
                }
                Step::Publish => {
                    let mut expected = Vec::new();
                    while let Some(&(id, _, Some(len))) = offered.front() {
                        offered.pop_front();
                        gone += 1;
                        expected.push((u32::from(id), len));
                    }
                    prop_assert_eq!(rig.queue.publish(), expected.len());
                    prop_assert_eq!(completions(&mut rig), expected);
                }
            }
            prop_assert_eq!(usize::from(rig.queue.in_flight()), popped.len());
        }
        prop_assert!(offered.is_empty() && popped.is_empty());
        prop_assert_eq!(rig.guest.free(), 8);
    }
}
