//! Rows N5 and N7 at full speed: one side publishes at the very moment the other one falls
//! asleep. Each stores, then loads what the other stored; without the full barrier in between
//! (in any of the eight places: two sides, two directions, two formats) a processor may let the load
//! overtake the store, both sides miss
//! the other's, and nobody ever wakes.

mod rig;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use rig::{BUFFERS, Rig, all, ends, segment};
use vring::driver::Driver;
use vring::{Chain, Queue, RingFeatures};

/// In a release build on x86 each missing barrier, alone, fails its race. In a debug build the code
/// between store and load is so slow that it does not show, so fewer rounds will do there: run
/// this test with `--release` after touching a barrier.
const ROUNDS: u32 = if cfg!(debug_assertions) {
    2_000
} else {
    20_000
};

/// The sides start apart by up to this many steps, one way or the other, a different number each
/// round: the window is some tens of nanoseconds wide, and passing the gate is not symmetrical.
const STAGGER: u32 = 64;

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

fn wait(steps: u32) {
    for step in 0..steps {
        std::hint::black_box(step);
    }
}

type Device = Queue<rig::Memory>;
type Guest = Driver<rig::Memory>;

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

/// One race at a time: four spinning threads on two cores mostly wait for one another.
static RACING: Mutex<()> = Mutex::new(());

/// Rounds in which neither side noticed the other: the lost wake-ups.
fn lost_wake_ups(features: RingFeatures, race: Race) -> u32 {
    // A race that failed does not spoil the next.
    let _turn = RACING.lock().unwrap_or_else(PoisonError::into_inner);
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
                for round in 0..ROUNDS {
                    gate.pass();
                    (race.device_prepares)(&mut queue, &mut chain);
                    gate.pass();
                    wait((round % (2 * STAGGER)).saturating_sub(STAGGER));
                    let noticed = (race.device_acts)(&mut queue);
                    device_noticed.store(noticed, Ordering::SeqCst);
                    gate.pass();
                    (race.device_clears)(&mut queue, &mut chain);
                    gate.pass();
                }
            });
            let mut lost = 0;
            for round in 0..ROUNDS {
                (race.guest_prepares)(&mut guest);
                gate.pass();
                gate.pass();
                wait(STAGGER.saturating_sub(round % (2 * STAGGER)));
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
    for features in all() {
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
    for features in all() {
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
