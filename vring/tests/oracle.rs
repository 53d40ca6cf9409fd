//! Valid rings through this crate and through virtio-queue: the same chains come out, and the
//! same bytes go into the used ring.

mod rig;

use proptest::prelude::*;
use rig::{Rig, TABLE};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vring::{RingBase, RingFeatures, Segment};

const SIZE: u16 = 16;

#[derive(Clone, Debug)]
struct Request {
    readable: Vec<u32>,
    writable: Vec<u32>,
    indirect: bool,
}

fn request() -> impl Strategy<Value = Request> {
    let lens = || proptest::collection::vec(1u32..100_000, 0..4);
    (lens(), lens(), any::<bool>()).prop_map(|(readable, writable, indirect)| Request {
        readable,
        writable,
        indirect,
    })
}

fn segments(lens: &[u32], base: u64) -> Vec<Segment> {
    let buffer = |(&len, i)| rig::segment(base + 0x1000 * i, len);
    lens.iter().zip(0u64..).map(buffer).collect()
}

/// A virtio-queue queue on the same ring, at the same place.
fn oracle(rig: &Rig, index: u16) -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    let halves = |address: GuestAddress| {
        let address = u32::try_from(address.0).unwrap();
        (Some(address), Some(0))
    };
    let addresses = rig.config.addresses;
    let (low, high) = halves(addresses.descriptor_area);
    queue.set_desc_table_address(low, high);
    let (low, high) = halves(addresses.driver_area);
    queue.set_avail_ring_address(low, high);
    let (low, high) = halves(addresses.device_area);
    queue.set_used_ring_address(low, high);
    queue.set_event_idx(rig.config.features.event_idx);
    queue.set_next_avail(index);
    queue.set_next_used(index);
    queue.set_ready(true);
    assert!(queue.is_valid(&*rig.memory));
    queue
}

/// The bytes the device side may write: the used ring.
fn used_ring(rig: &Rig) -> Vec<u8> {
    let mut bytes = vec![0; 6 + 8 * usize::from(SIZE)];
    rig.memory
        .read_slice(&mut bytes, rig.config.addresses.device_area)
        .unwrap();
    bytes
}

proptest! {
    #[test]
    fn chains_and_used_rings_agree_with_virtio_queue(
        start in prop_oneof![Just(0u16), any::<u16>(), 65520u16..],
        event_idx: bool,
        batches in proptest::collection::vec(
            (proptest::collection::vec(request(), 1..8), any::<u16>()), 1..8
        ),
    ) {
        let features = RingFeatures { event_idx, ..rig::INDIRECT };
        let mut ours = Rig::starting_at(u32::from(SIZE), features, start);
        let mut theirs = Rig::starting_at(u32::from(SIZE), features, start);
        let mut oracle = oracle(&theirs, start);
        // Past the first decision, where the two differ on purpose.
        ours.queue.should_notify();
        oracle.needs_notification(&*theirs.memory).unwrap();

        for (requests, used_event) in batches {
            for rig in [&mut ours, &mut theirs] {
                let mut table = TABLE;
                for request in &requests {
                    let readable = segments(&request.readable, 0x10000);
                    let writable = segments(&request.writable, 0x20000);
                    // A full ring is one request fewer, the same on both.
                    let _ = if request.indirect && !(readable.is_empty() && writable.is_empty()) {
                        rig.guest
                            .add_indirect(GuestAddress(table), &readable, &writable)
                            .is_ok()
                    } else {
                        rig.guest.add_chain(&readable, &writable).is_ok()
                    };
                    table += 0x100;
                }
                rig.guest.publish();
                if event_idx {
                    rig.split().set_used_event(used_event);
                }
            }

            ours.queue.disable_notification();
            oracle.disable_notification(&*theirs.memory).unwrap();
            loop {
                let expected = oracle.iter(&*theirs.memory).unwrap().next();
                let Some(head) = ours.pop().unwrap() else {
                    prop_assert!(expected.is_none());
                    break;
                };
                let expected = expected.expect("the oracle has a chain too");
                prop_assert_eq!(head.index(), expected.head_index());
                let buffers = |writable: bool| -> Vec<Segment> {
                    expected
                        .clone()
                        .filter(|d| d.is_write_only() == writable && d.len() != 0)
                        .map(|d| rig::segment(d.addr().0, d.len()))
                        .collect()
                };
                prop_assert_eq!(ours.chain.readable(), buffers(false));
                prop_assert_eq!(ours.chain.writable(), buffers(true));
                let written = u32::try_from(ours.chain.writable_len()).unwrap();
                oracle
                    .add_used(&*theirs.memory, head.index(), written)
                    .unwrap();
                ours.queue.push(head, written);
            }
            ours.queue.publish();
            let decision = ours.queue.should_notify();
            // Without EVENT_IDX the oracle always notifies, whether there is anything or not.
            if event_idx {
                prop_assert_eq!(
                    decision,
                    oracle.needs_notification(&*theirs.memory).unwrap()
                );
            }
            prop_assert_eq!(
                ours.queue.enable_notification(),
                !oracle.enable_notification(&*theirs.memory).unwrap()
            );
            prop_assert_eq!(used_ring(&ours), used_ring(&theirs));
            prop_assert_eq!(ours.next_avail(), oracle.next_avail());
            for rig in [&mut ours, &mut theirs] {
                while let Some(used) = rig.guest.poll_used() {
                    prop_assert!(used.expected);
                }
                prop_assert_eq!(rig.guest.free(), SIZE);
            }
        }
    }
}

#[test]
fn a_ring_left_by_virtio_queue_is_resumed_where_it_stopped() {
    let features = RingFeatures::default();
    let mut rig = Rig::starting_at(u32::from(SIZE), features, 65535);
    let mut oracle = oracle(&rig, 65535);
    rig.offer_buffer();
    rig.offer_buffer();
    let first = oracle.iter(&*rig.memory).unwrap().next().unwrap();
    oracle
        .add_used(&*rig.memory, first.head_index(), 0)
        .unwrap();
    assert_eq!(oracle.next_avail(), 0);

    rig.restart(RingBase::Split {
        next_avail: oracle.next_avail(),
    });
    let second = rig.pop_head();
    rig.queue.push(second, 0);
    rig.queue.publish();
    assert_eq!(rig.split().used_idx(), 1);
    let used: Vec<_> = std::iter::from_fn(|| {
        let has_used = rig.guest.has_used();
        let used = rig.guest.poll_used();
        assert_eq!(has_used, used.is_some());
        used
    })
    .collect();
    assert!(used.len() == 2 && used.iter().all(|used| used.expected));
}
