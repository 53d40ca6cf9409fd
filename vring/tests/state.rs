//! Saving an idle queue and going on from there: exactly, or not at all.

mod rig;

use std::sync::Arc;

use proptest::prelude::*;
use rig::{BUFFERS, Memory, Rig, SEAM};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::Driver;
use vring::{
    PackedPosition, PopError, Queue, QueueConfig, QueueSize, QueueState, RestoreError,
    RingAddresses, RingBase, RingFault, RingFeatures, SaveError, Segment, StartError,
};

/// Entries of the rings here.
const SIZE: u16 = 8;

fn fresh(features: RingFeatures) -> Rig {
    Rig::new(u32::from(SIZE), features)
}

fn features(packed: bool) -> RingFeatures {
    RingFeatures {
        packed,
        ..RingFeatures::default()
    }
}

fn bytes(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SEAM).unwrap()];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// One chain there and back; what the guest sees of it.
fn round_trip(rig: &mut Rig) -> (u16, Option<vring::driver::Used>) {
    rig.offer_buffer();
    let head = rig.pop_head();
    let index = head.index();
    rig.queue.push(head, 7);
    rig.queue.publish();
    (index, rig.guest.poll_used())
}

#[test]
fn a_queue_that_is_not_idle_says_what_to_do_first() {
    for packed in [false, true] {
        for in_order in [false, true] {
            let mut rig = fresh(RingFeatures {
                in_order,
                ..features(packed)
            });
            rig.offer_buffer();
            rig.offer_buffer();
            let first = rig.pop_head();
            let second = rig.pop_head();
            let in_flight = |count| Err(SaveError::InFlight { count });
            assert_eq!(rig.queue.save(), in_flight(2));
            rig.queue.push(second, 0);
            assert_eq!(rig.queue.save(), in_flight(1));
            rig.queue.publish();
            assert_eq!(rig.queue.save(), in_flight(1));
            rig.queue.push(first, 0);
            let count = if in_order { 2 } else { 1 };
            assert_eq!(rig.queue.save(), Err(SaveError::Unpublished { count }));
            rig.queue.publish();
            let state = rig.queue.save().unwrap();
            assert_eq!(state.config.base, rig.queue.base());
            assert_eq!(state.config.addresses, rig.config.addresses);
            assert_eq!(state.used_idx, (!packed).then_some(2));
        }
    }
}

#[test]
fn a_broken_ring_is_not_saved() {
    let mut rig = fresh(features(false));
    let Driver::Split(guest) = &mut rig.guest else {
        panic!("a split ring");
    };
    guest.set_avail_idx(100);
    let Err(PopError::Ring(fault)) = rig.queue.pop(&mut rig.chain) else {
        panic!("the index jumped");
    };
    assert_eq!(rig.queue.save(), Err(SaveError::Stopped { fault }));

    let mut rig = fresh(features(true));
    let elsewhere = Arc::new(Memory::from_ranges(&[(GuestAddress(1 << 40), 0x1000)]).unwrap());
    rig.queue
        .set_memory(elsewhere, rig.config.addresses)
        .unwrap_err();
    let fault = RingFault::MemoryLost;
    assert_eq!(rig.queue.save(), Err(SaveError::Stopped { fault }));
}

#[test]
fn a_ring_that_moved_is_saved_where_it_is_now() {
    for packed in [false, true] {
        let mut rig = fresh(features(packed));
        round_trip(&mut rig);
        let shift = 0x10_0000;
        let start = GuestAddress(shift);
        let memory = Arc::new(Memory::from_ranges(&[(start, 0x40000)]).unwrap());
        memory.write_slice(&bytes(&rig.memory), start).unwrap();
        let old = rig.config.addresses;
        let addresses = RingAddresses {
            descriptor_area: GuestAddress(old.descriptor_area.0 + shift),
            driver_area: GuestAddress(old.driver_area.0 + shift),
            device_area: GuestAddress(old.device_area.0 + shift),
        };
        rig.queue
            .set_memory(Arc::clone(&memory), addresses)
            .unwrap();
        let state = rig.queue.save().unwrap();
        assert_eq!(state.config.addresses, addresses);
        Queue::restore(memory, &state).unwrap();
    }
}

#[test]
fn a_state_of_another_moment_is_refused_and_nothing_written() {
    let mut rig = fresh(features(false));
    round_trip(&mut rig);
    rig.queue.disable_notification();
    let state = rig.queue.save().unwrap();
    round_trip(&mut rig);
    let before = bytes(&rig.memory);
    assert_eq!(
        Queue::restore(Arc::clone(&rig.memory), &state).unwrap_err(),
        RestoreError::UsedIndex { saved: 1, found: 2 }
    );
    assert!(bytes(&rig.memory) == before, "used.flags is not cleared");
}

#[test]
fn a_state_that_contradicts_itself_is_refused() {
    for packed in [false, true] {
        let rig = fresh(features(packed));
        let state = rig.queue.save().unwrap();
        let restore = |state| Queue::restore(Arc::clone(&rig.memory), &state).map(drop);
        assert_eq!(restore(state), Ok(()));
        let other_format = Err(RestoreError::Start(StartError::FormatMismatch));
        let mut wrong = state;
        wrong.config.features.packed = !packed;
        assert_eq!(restore(wrong), other_format);
        wrong = state;
        wrong.config.base = RingBase::fresh(features(!packed));
        assert_eq!(restore(wrong), other_format);
        wrong = state;
        wrong.used_idx = if packed { Some(0) } else { None };
        assert_eq!(restore(wrong), other_format);

        wrong = state;
        wrong.config.base = if packed {
            let RingBase::Packed { avail, .. } = state.config.base else {
                panic!("a packed ring");
            };
            // One whole ring and one more.
            let used = PackedPosition {
                index: 1,
                wrap: !avail.wrap,
            };
            RingBase::Packed {
                avail: used,
                used: avail,
            }
        } else {
            RingBase::Split {
                next_avail: SIZE + 1,
            }
        };
        assert_eq!(
            restore(wrong),
            Err(RestoreError::Start(StartError::BaseTooFarAhead {
                outstanding: SIZE + 1,
                size: SIZE
            }))
        );
    }
}

#[test]
fn kicks_are_enabled_and_the_first_decision_is_to_interrupt() {
    for packed in [false, true] {
        let mut rig = fresh(features(packed));
        round_trip(&mut rig);
        rig.queue.should_notify();
        rig.queue.disable_notification();
        rig.offer_buffer();
        assert!(!rig.guest.needs_kick());
        let head = rig.pop_head();
        rig.queue.unpop(head).unwrap();
        let state = rig.queue.save().unwrap();
        rig.queue = Queue::restore(Arc::clone(&rig.memory), &state).unwrap();
        assert!(rig.queue.should_notify());
        assert!(!rig.queue.enable_notification(), "a chain is waiting");
        let head = rig.pop_head();
        rig.queue.push(head, 0);
        rig.offer_buffer();
        assert!(rig.guest.needs_kick());
    }
}

/// What guest and device do between two saves.
#[derive(Clone, Copy, Debug)]
enum Step {
    Offer,
    Pop,
    Push(usize),
    Publish,
    Poll,
    /// Drain, save, and go on with the restored queue.
    Replace,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Offer),
        4 => Just(Step::Pop),
        4 => (0..usize::from(SIZE)).prop_map(Step::Push),
        2 => Just(Step::Publish),
        2 => Just(Step::Poll),
        1 => Just(Step::Replace),
    ]
}

fn any_features() -> impl Strategy<Value = RingFeatures> {
    any::<[bool; 4]>().prop_map(
        |[indirect_desc, event_idx, in_order, packed]| RingFeatures {
            indirect_desc,
            event_idx,
            in_order,
            packed,
        },
    )
}

/// Everything the outside sees of `steps`; `replace` says whether queues are replaced.
fn run(rig: &mut Rig, steps: &[Step], replace: bool) -> Vec<String> {
    let mut seen = Vec::new();
    let mut held = Vec::new();
    let mut offered = 0;
    for &step in steps {
        match step {
            Step::Offer if rig.guest.free() > 0 => {
                // Each has a buffer of its own, to be told apart by: a head in a packed ring is a
                // number of the queue's, and no outsider's business.
                offered += 1;
                let addr = GuestAddress(BUFFERS + 16 * offered);
                rig.guest
                    .add_chain(&[], &[Segment { addr, len: 16 }])
                    .unwrap();
                rig.guest.publish();
            }
            Step::Offer => {}
            Step::Pop => {
                let popped = rig.queue.pop(&mut rig.chain).unwrap();
                let writable = popped.as_ref().map(|_| rig.chain.writable());
                seen.push(format!("{writable:?}"));
                held.extend(popped);
            }
            Step::Push(which) if which < held.len() => {
                rig.queue
                    .push(held.remove(which), u32::try_from(which).unwrap());
            }
            Step::Push(_) => {}
            Step::Publish => seen.push(format!("{}", rig.queue.publish())),
            Step::Poll => seen.push(format!("{:?}", rig.guest.poll_used())),
            Step::Replace => {
                for head in held.drain(..) {
                    rig.queue.push(head, 0);
                }
                rig.queue.publish();
                let state = rig.queue.save().unwrap();
                // Through the outside world and back.
                let json = serde_json::to_string(&state).unwrap();
                let read: QueueState = serde_json::from_str(&json).unwrap();
                assert_eq!(read, state);
                if replace {
                    rig.queue = Queue::restore(Arc::clone(&rig.memory), &read).unwrap();
                }
            }
        }
        seen.push(format!("{:?} {}", rig.queue.base(), rig.queue.in_flight()));
    }
    for head in held.drain(..) {
        rig.queue.push(head, 0);
    }
    rig.queue.publish();
    // Writes the same word whatever was there before.
    rig.queue.enable_notification();
    seen
}

fn any_base() -> impl Strategy<Value = RingBase> {
    let position = || {
        let index = prop_oneof![0..SIZE, any::<u16>()];
        (index, any::<bool>()).prop_map(|(index, wrap)| PackedPosition { index, wrap })
    };
    prop_oneof![
        prop_oneof![0..SIZE, any::<u16>()].prop_map(|next_avail| RingBase::Split { next_avail }),
        (position(), position()).prop_map(|(avail, used)| RingBase::Packed { avail, used }),
    ]
}

fn any_state() -> impl Strategy<Value = QueueState> {
    let address = || {
        prop_oneof![
            4 => (0u64..0x3fff).prop_map(|a| a * 16),
            1 => any::<u64>(),
            1 => Just(u64::MAX - 15),
        ]
        .prop_map(GuestAddress)
    };
    let size = (0u32..16).prop_map(|bits| QueueSize::new(1 << bits).unwrap());
    (
        size,
        [address(), address(), address()],
        any_features(),
        any_base(),
        proptest::option::of(prop_oneof![Just(0u16), 0..SIZE, any::<u16>()]),
    )
        .prop_map(
            |(size, [descriptor_area, driver_area, device_area], features, base, used_idx)| {
                QueueState {
                    config: QueueConfig {
                        size,
                        addresses: RingAddresses {
                            descriptor_area,
                            driver_area,
                            device_area,
                        },
                        features,
                        base,
                    },
                    used_idx,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_restored_queue_goes_on_exactly_as_the_saved_one_would_have(
        features in any_features(),
        start: u16,
        steps in proptest::collection::vec(step(), 1..150),
    ) {
        let mut replaced = Rig::starting_at(u32::from(SIZE), features, start);
        let mut kept = Rig::starting_at(u32::from(SIZE), features, start);
        prop_assert_eq!(run(&mut replaced, &steps, true), run(&mut kept, &steps, false));
        prop_assert_eq!(replaced.queue.save(), kept.queue.save());
        prop_assert!(bytes(&replaced.memory) == bytes(&kept.memory));
    }

    /// Over memory full of whatever the previous cases left there, and some of it random.
    #[test]
    fn no_state_makes_restore_or_the_queue_panic_or_run_for_ever(
        state in any_state(),
        noise in proptest::collection::vec((0u64..0x3ff00, any::<u64>()), 0..100),
    ) {
        let rig = fresh(RingFeatures::default());
        for (at, value) in noise {
            rig.memory.write_obj(value, GuestAddress(at)).unwrap();
        }
        let before = bytes(&rig.memory);
        match Queue::restore(Arc::clone(&rig.memory), &state) {
            Err(_) => prop_assert!(bytes(&rig.memory) == before, "written by a failed restore"),
            Ok(mut queue) => {
                prop_assert_eq!(queue.save(), Ok(state), "what was restored is what it is");
                let mut chain = vring::Chain::for_queue(state.config.size);
                for _ in 0..20 {
                    let mut batch = queue.batch(4);
                    while let Ok(Some(head)) | Err(PopError::Chain { head, .. }) =
                        batch.pop(&mut chain)
                    {
                        batch.push(head, 0);
                    }
                    let _ = batch.finish();
                }
                prop_assert_eq!(queue.in_flight(), 0);
            }
        }
    }

    #[test]
    fn no_text_makes_reading_a_state_panic(text in "\\PC*", cut in 0usize..400, put: char) {
        let _ = serde_json::from_str::<QueueState>(&text);
        // And a valid one with one character changed: an error, or a state that is checked later.
        let rig = fresh(RingFeatures::default());
        let mut json = serde_json::to_string(&rig.queue.save().unwrap()).unwrap();
        if json.is_char_boundary(cut) && cut < json.len() {
            json.remove(cut);
            json.insert(cut, put);
        }
        if let Ok(state) = serde_json::from_str::<QueueState>(&json) {
            let _ = Queue::restore(rig.memory, &state);
        }
    }
}

#[test]
fn the_serialised_form_is_this() {
    let rig = Rig::starting_at(u32::from(SIZE), features(false), 7);
    let json = serde_json::to_string(&rig.queue.save().unwrap()).unwrap();
    assert_eq!(
        json,
        r#"{"size":8,"descriptor_area":4096,"driver_area":4224,"device_area":4288,"indirect_desc":false,"event_idx":false,"in_order":false,"position":{"split":{"next_avail":7,"used_idx":7}}}"#
    );
    let rig = fresh(features(true));
    let json = serde_json::to_string(&rig.queue.save().unwrap()).unwrap();
    assert!(json.ends_with(r#""position":{"packed":{"avail":32768,"used":32768}}}"#));
}

#[test]
fn r2_a_serialised_size_that_is_none_is_refused() {
    let rig = fresh(features(false));
    let json = serde_json::to_string(&rig.queue.save().unwrap()).unwrap();
    for wrong in [
        r#""size":0"#,
        r#""size":3"#,
        r#""size":65536"#,
        r#""size":-8"#,
    ] {
        let json = json.replace(r#""size":8"#, wrong);
        assert!(
            serde_json::from_str::<QueueState>(&json).is_err(),
            "{wrong}"
        );
    }
    let unknown = json.replace(r#""size":8"#, r#""size":8,"new":1"#);
    assert!(serde_json::from_str::<QueueState>(&unknown).is_err());
}
