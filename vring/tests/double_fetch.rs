//! Rows T: a guest that rewrites what the device is reading, on another thread.
//!
//! Looks at every value that comes out while it does. That each descriptor is read once does not
//! rest on luck here: the tests of `split::walk` count the reads.

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rig::{BUFFERS, Entry, INDIRECT, PLAIN, Rig, TABLE, ends};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{F_NEXT, F_WRITE};
use vring::{ChainFault, PopError};

/// Pops per test: enough for both values to come up thousands of times.
const POPS: u32 = 50_000;

/// Pops while `flip(true)` and `flip(false)` alternate on another thread, and hands the outcome
/// of each pop to `check`, which says whether it was the good one. Both must come up.
fn race(
    mut rig: Rig,
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
            rig.offer(0);
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
            rig.queue.push(head, 0);
            rig.queue.publish();
        }
        stop.store(true, Ordering::Relaxed);
        flipper.join().unwrap();
    });
}

#[test]
fn t1_address_changed_between_check_and_use_is_never_seen() {
    let rig = Rig::new(8, PLAIN);
    rig.guest.write_desc(0, BUFFERS, 16, 0, 0);
    let table = rig.config.addresses.descriptor_area;
    race(
        rig,
        move |memory, good| {
            let address: u64 = if good { BUFFERS } else { u64::MAX - 3 };
            memory
                .store(address.to_le(), table, Ordering::Relaxed)
                .unwrap();
        },
        |rig, fault| match fault {
            None => {
                assert_eq!(rig.chain.readable(), [rig::segment(BUFFERS, 16)]);
                true
            }
            Some(fault) => {
                assert!(matches!(fault, ChainFault::BufferOverflow { .. }));
                false
            }
        },
    );
}

#[test]
fn t1_next_changed_between_check_and_use_is_never_followed() {
    let rig = Rig::new(8, PLAIN);
    rig.guest.write_desc(1, BUFFERS, 1, F_WRITE, 0);
    let flags_and_next = GuestAddress(rig.config.addresses.descriptor_area.0 + 12);
    rig.guest.write_desc(0, BUFFERS, 16, F_NEXT, 1);
    race(
        rig,
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
    let rig = Rig::new(8, INDIRECT);
    let entry = Entry {
        address: BUFFERS,
        len: 16,
        flags: 0,
        next: 0,
    };
    rig.memory
        .write_slice(&entry.bytes(), GuestAddress(TABLE))
        .unwrap();
    rig.guest
        .write_desc(0, TABLE, 16, vring::driver::F_INDIRECT, 0);
    race(
        rig,
        move |memory, good| {
            let address: u64 = if good { BUFFERS } else { u64::MAX - 3 };
            let table = GuestAddress(TABLE);
            memory
                .store(address.to_le(), table, Ordering::Relaxed)
                .unwrap();
        },
        |rig, fault| match fault {
            None => {
                assert_eq!(rig.chain.readable(), [rig::segment(BUFFERS, 16)]);
                true
            }
            Some(fault) => {
                assert!(matches!(fault, ChainFault::BufferOverflow { .. }));
                false
            }
        },
    );
}
