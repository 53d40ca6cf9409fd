//! Rows T: a guest that rewrites what the device is reading, on another thread.
//!
//! Looks at every value that comes out while it does. That each descriptor is read once does not
//! rest on luck here: the tests of `split::walk` and `packed::walk` count the reads.

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rig::{BUFFERS, EVENT_IDX, INDIRECT, PLAIN, Rig, TABLE, both, ends, packed};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{EVENT_DESC, EVENT_DISABLE, F_INDIRECT, F_NEXT, F_WRITE, RawDescriptor};
use vring::{ChainFault, PopError};

/// Pops per test: enough for both values to come up thousands of times.
const POPS: u32 = 50_000;

/// Offers chains and pops them while `flip(true)` and `flip(false)` alternate on another thread,
/// and hands the outcome of each pop to `check`, which says whether it was the good one. Both must
/// come up.
fn race(
    mut rig: Rig,
    mut offer: impl FnMut(&mut Rig) + Send + 'static,
    mut flip: impl FnMut(&rig::Memory, bool) + Send + 'static,
    mut check: impl FnMut(&Rig, Option<&ChainFault>) -> bool + Send + 'static,
) {
    ends(move || {
        let stop = Arc::new(AtomicBool::new(false));
        let memory = Arc::clone(&rig.memory);
        let flipper = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::Relaxed) {
                    flip(&memory, false);
                    flip(&memory, true);
                }
            }
        });
        let (mut good, mut bad) = (0u32, 0u32);
        // Until both were seen: on one core the two threads may take long turns.
        while good == 0 || bad == 0 || good + bad < POPS {
            offer(&mut rig);
            let (head, fault) = match rig.pop() {
                Ok(Some(head)) => (head, None),
                Err(PopError::Chain { head, fault }) => (head, Some(fault)),
                other => panic!("{other:?}"),
            };
            if check(&rig, fault.as_ref()) {
                good += 1;
            } else {
                bad += 1;
            }
            rig.complete(head, 0);
            while rig.guest.poll_used().is_some() {}
        }
        stop.store(true, Ordering::Relaxed);
        flipper.join().unwrap();
    });
}

/// Flips the 8-byte address at `at` between a good one and one whose buffer wraps.
fn flip_address(at: GuestAddress) -> impl FnMut(&rig::Memory, bool) + Send + 'static {
    move |memory, good| {
        let address: u64 = if good { BUFFERS } else { u64::MAX - 3 };
        memory
            .store(address.to_le(), at, Ordering::Relaxed)
            .unwrap();
    }
}

/// The good outcome is 16 bytes at the good address, the bad one the fault of the other.
fn good_address_or_fault(rig: &Rig, fault: Option<&ChainFault>) -> bool {
    match fault {
        None => {
            assert_eq!(rig.chain.readable(), [rig::segment(BUFFERS, 16)]);
            true
        }
        Some(fault) => {
            assert!(matches!(fault, ChainFault::BufferOverflow { .. }));
            false
        }
    }
}

#[test]
fn t1_address_changed_between_check_and_use_is_never_seen() {
    for features in both(PLAIN) {
        // A ring of one: every chain is in the same descriptor.
        let rig = Rig::new(1, features);
        let at = rig.config.addresses.descriptor_area;
        race(
            rig,
            |rig| {
                rig.offer_raw(&[(BUFFERS, 16, 0)]);
            },
            flip_address(at),
            good_address_or_fault,
        );
    }
}

#[test]
fn t1_next_changed_between_check_and_use_is_never_followed() {
    let mut rig = Rig::new(8, PLAIN);
    rig.split().write_desc(1, BUFFERS, 1, F_WRITE, 0);
    let flags_and_next = GuestAddress(rig.config.addresses.descriptor_area.0 + 12);
    rig.split().write_desc(0, BUFFERS, 16, F_NEXT, 1);
    race(
        rig,
        |rig| rig.offer(0),
        move |memory, good| {
            let next: u16 = if good { 1 } else { 0xfff0 };
            let word = u32::from(F_NEXT) | u32::from(next) << 16;
            memory
                .store(word.to_le(), flags_and_next, Ordering::Relaxed)
                .unwrap();
        },
        |rig, fault| match fault {
            None => {
                assert_eq!(rig.chain.readable(), [rig::segment(BUFFERS, 16)]);
                assert_eq!(rig.chain.writable(), [rig::segment(BUFFERS, 1)]);
                true
            }
            Some(fault) => {
                let expected = ChainFault::NextOutOfRange {
                    next: 0xfff0,
                    limit: 8,
                };
                assert_eq!(*fault, expected);
                false
            }
        },
    );
}

#[test]
fn t3_indirect_table_changed_during_the_walk_is_read_once() {
    for features in both(INDIRECT) {
        let rig = Rig::new(8, features);
        rig.write_table(TABLE, &[(BUFFERS, 16, 0)]);
        race(
            rig,
            |rig| {
                rig.offer_raw(&[(TABLE, 16, F_INDIRECT)]);
            },
            flip_address(GuestAddress(TABLE)),
            good_address_or_fault,
        );
    }
}

#[test]
fn t4_buffer_id_changed_between_check_and_use_is_taken_once() {
    // Were it read twice, the id noted as in flight would not be the one noted as given back, and
    // the next chain with it would be a ring fault.
    let rig = Rig::new(1, packed(PLAIN));
    let area = rig.config.addresses.descriptor_area;
    let id_at = GuestAddress(area.0 + 12);
    race(
        rig,
        |rig| {
            let raw = RawDescriptor {
                address: BUFFERS,
                len: 16,
                flags: 0,
            };
            rig.packed().add_raw_with_id(5, &[raw]).unwrap();
            rig.guest.publish();
        },
        move |memory, good| {
            let id: u16 = if good { 5 } else { 6 };
            memory.store(id.to_le(), id_at, Ordering::Relaxed).unwrap();
        },
        |rig, fault| {
            assert_eq!(fault, None);
            let area = rig.config.addresses.descriptor_area;
            let id: u16 = rig.memory.read_obj(GuestAddress(area.0 + 12)).unwrap();
            id == 5
        },
    );
}

#[test]
fn t5_event_changed_while_it_is_read_is_the_old_or_the_new_one() {
    // Neither asks for an interrupt: one names a position outside the ring, the other has DISABLE beside
    // one that is passed all the time. The position of one with the flags of the other would.
    const OUTSIDE: (u16, u16) = (100, EVENT_DESC);
    const DISABLED: (u16, u16) = (1 << 15, EVENT_DISABLE);
    ends(|| {
        let mut rig = Rig::new(1, packed(EVENT_IDX));
        let event_at = rig.config.addresses.driver_area;
        let store = move |memory: &rig::Memory, (desc, flags): (u16, u16)| {
            let word = u32::from(desc) | u32::from(flags) << 16;
            memory
                .store(word.to_le(), event_at, Ordering::Relaxed)
                .unwrap();
        };
        assert!(rig.queue.should_notify(), "the first decision");
        // The position is one that notifies, with the flags that go with it.
        store(&rig.memory, (DISABLED.0, EVENT_DESC));
        rig.offer_buffer();
        let head = rig.pop_head();
        rig.complete(head, 0);
        assert!(rig.queue.should_notify());
        rig.guest.poll_used().unwrap();

        let stop = Arc::new(AtomicBool::new(false));
        store(&rig.memory, OUTSIDE);
        let flipper = std::thread::spawn({
            let (stop, memory) = (Arc::clone(&stop), Arc::clone(&rig.memory));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    store(&memory, DISABLED);
                    store(&memory, OUTSIDE);
                }
            }
        });
        let mut seen = [0u32; 2];
        while seen.contains(&0) || seen.iter().sum::<u32>() < POPS {
            rig.offer_buffer();
            let head = rig.pop_head();
            rig.complete(head, 0);
            assert!(!rig.queue.should_notify(), "a request nobody made");
            rig.guest.poll_used().unwrap();
            let word: u32 = rig.memory.load(event_at, Ordering::Relaxed).unwrap();
            seen[usize::from(u32::from_le(word) >> 16 == u32::from(EVENT_DISABLE))] += 1;
        }
        stop.store(true, Ordering::Relaxed);
        flipper.join().unwrap();
    });
}
