//! Rows N5 and N7 at full speed: one side publishes at the very moment the other one falls
//! asleep. Each stores, then loads what the other stored; without the full barrier in between
//! (in any of the four places) a processor may let the load overtake the store, both sides miss
//! the other's, and nobody ever wakes.

mod rig;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rig::{BUFFERS, EVENT_IDX, PLAIN, Rig, ends, segment};
use vring::driver::SplitDriver;
use vring::{Chain, RingFeatures, SplitQueue};

/// Enough that each missing barrier shows hundreds of times on x86.
const ROUNDS: u32 = 50_000;

/// Checks of the gate before the core is offered to someone else, such as the thread waited for.
const SPINS: u32 = 1000;

/// Two threads pass it together, without a sleep: waking up takes longer than the race lasts.
#[derive(Default)]
struct Gate(AtomicU32);

impl Gate {
    fn pass(&self) {
        let arrived = self.0.fetch_add(1, Ordering::SeqCst) + 1;
        let both = arrived.next_multiple_of(2);
        let mut spins = 0;
        while self.0.load(Ordering::SeqCst) < both {
            spins += 1;
            if spins % SPINS == 0 {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}

type Device = SplitQueue<rig::Memory>;
type Guest = SplitDriver<rig::Memory>;

/// One kind of race. Each round: the guest prepares, then the device does, then both act at once
/// and say whether they noticed the other, then the device clears up, then the guest does.
struct Race {
    guest_prepares: fn(&mut Guest),
    device_prepares: fn(&mut Device, &mut Chain),
    device_acts: fn(&mut Device) -> bool,
    guest_acts: fn(&mut Guest) -> bool,
    device_clears: fn(&mut Device, &mut Chain),
    guest_clears: fn(&mut Guest),
}

/// Rounds in which neither side noticed the other: the lost wake-ups.
fn lost_wake_ups(features: RingFeatures, race: Race) -> u32 {
    ends(move || {
        let Rig {
            mut guest,
            mut queue,
            mut chain,
            ..
        } = Rig::new(8, features);
        queue.should_notify();
        let gate = Gate::default();
        let device_noticed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    gate.pass();
                    (race.device_prepares)(&mut queue, &mut chain);
                    gate.pass();
                    let noticed = (race.device_acts)(&mut queue);
                    device_noticed.store(noticed, Ordering::SeqCst);
                    gate.pass();
                    (race.device_clears)(&mut queue, &mut chain);
                    gate.pass();
                }
            });
            let mut lost = 0;
            for _ in 0..ROUNDS {
                (race.guest_prepares)(&mut guest);
                gate.pass();
                gate.pass();
                let noticed = (race.guest_acts)(&mut guest);
                gate.pass();
                if !noticed && !device_noticed.load(Ordering::SeqCst) {
                    lost += 1;
                }
                gate.pass();
                (race.guest_clears)(&mut guest);
            }
            lost
        })
    })
}

fn add(guest: &mut Guest) {
    guest.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
}

fn stage(queue: &mut Device, chain: &mut Chain) {
    let head = queue.pop(chain).unwrap().expect("the guest added a chain");
    queue.push(head, 0);
}

fn take(guest: &mut Guest) {
    assert!(guest.poll_used().expect("the device published").expected);
}

#[test]
fn n5_completing_while_the_guest_goes_to_sleep_is_noticed_by_one_of_them() {
    for features in [PLAIN, EVENT_IDX] {
        let lost = lost_wake_ups(
            features,
            Race {
                guest_prepares: |guest| {
                    guest.disable_interrupts();
                    add(guest);
                    guest.publish();
                },
                device_prepares: stage,
                device_acts: |queue| {
                    queue.publish();
                    queue.should_notify()
                },
                guest_acts: |guest| !guest.enable_interrupts(),
                device_clears: |_, _| {},
                guest_clears: take,
            },
        );
        assert_eq!(lost, 0, "{features:?}");
    }
}

#[test]
fn n7_adding_while_the_device_goes_to_sleep_is_noticed_by_one_of_them() {
    for features in [PLAIN, EVENT_IDX] {
        let lost = lost_wake_ups(
            features,
            Race {
                guest_prepares: add,
                device_prepares: |queue, _| queue.disable_notification(),
                device_acts: |queue| !queue.enable_notification(),
                guest_acts: |guest| {
                    guest.publish();
                    guest.needs_kick()
                },
                device_clears: |queue, chain| {
                    stage(queue, chain);
                    queue.publish();
                },
                guest_clears: take,
            },
        );
        assert_eq!(lost, 0, "{features:?}");
    }
}
