//! Control from many threads while requests run: nothing is lost, nothing happens twice, and what arrives
//! meanwhile waits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use blk_dataplane::QueueSetup;
use event_poll::EventNotifier;
use ioq::testing::{Dice, Faults};
use vring::{RingAddresses, RingBase};

use super::load::Bench;
use crate::support::embedded::Embedded;
use crate::support::queue::{
    BLK_DISCARD, BLK_WRITE_ZEROES, CONFIG_WCE, FEATURES, GuestQueue, RING_PACKED,
};

/// Requests that each of the four queues' guests makes in a row, until the commands are through.
const COUNT: usize = 100;

/// Threads that command.
const COMMANDERS: u64 = 4;

/// Commands of all of them.
const COMMANDS: u64 = 160;

/// What a commander needs of a queue whose guest is another thread.
struct Wiring {
    index: u16,
    size: u32,
    addresses: RingAddresses,
    features: u64,
    kick: EventNotifier,
    call: EventNotifier,
}

impl Wiring {
    fn of(queue: &GuestQueue) -> Self {
        Self {
            index: queue.index,
            size: queue.size(),
            addresses: queue.addresses,
            features: queue.features,
            kick: queue.kick.try_clone().unwrap(),
            call: queue.call.try_clone().unwrap(),
        }
    }

    fn setup(&self, base: RingBase) -> QueueSetup {
        QueueSetup {
            size: self.size,
            addresses: self.addresses,
            base,
            features: self.features,
            kick: Some(self.kick.try_clone().unwrap()),
            call: Some(Box::new(self.call.try_clone().unwrap())),
            err: None,
            enabled: true,
            inflight: None,
        }
    }
}

/// What a queue has done so far.
fn history(vmm: &Embedded, queue: u16) -> String {
    format!("{:?}", vmm.plane.queue_counters(queue))
}

/// Nothing of `queue` moves for a moment.
fn still(vmm: &Embedded, queue: u16, dice: &mut Dice) {
    let before = history(vmm, queue);
    std::thread::sleep(Duration::from_micros(dice.below(3000)));
    assert_eq!(history(vmm, queue), before);
}

fn command(vmm: &mut Embedded, bench: &Bench, wiring: &[Wiring], dice: &mut Dice) {
    let queue = &wiring[dice.index(wiring.len())];
    match dice.below(8) {
        0 | 1 => {
            vmm.plane.pause().unwrap();
            assert_eq!(bench.disk.in_flight(), 0);
            for queue in wiring {
                still(vmm, queue.index, dice);
            }
            // Other commands are carried out while it is paused.
            if dice.chance(300) {
                vmm.plane.drain().unwrap();
                still(vmm, queue.index, dice);
            }
            if dice.chance(300) {
                let base = vmm.plane.stop_queue(queue.index).unwrap();
                vmm.plane
                    .start_queue(queue.index, queue.setup(base))
                    .unwrap();
                still(vmm, queue.index, dice);
            }
            vmm.plane.resume().unwrap();
        }
        2 => vmm.plane.drain().unwrap(),
        3 | 4 => {
            let base = vmm.plane.stop_queue(queue.index).unwrap();
            still(vmm, queue.index, dice);
            vmm.plane
                .start_queue(queue.index, queue.setup(base))
                .unwrap();
        }
        5 => {
            vmm.plane.enable_queue(queue.index, false).unwrap();
            vmm.plane.drain().unwrap();
            still(vmm, queue.index, dice);
            vmm.plane.enable_queue(queue.index, true).unwrap();
        }
        6 => {
            let memory = vmm.ram.map_again();
            let place = |index| Some(wiring[usize::from(index)].addresses);
            vmm.plane.update_memory(memory, place).unwrap();
        }
        _ => {
            // The disk may refuse the fdatasync that this takes.
            let _ = vmm.plane.write_config(32, &[u8::from(dice.chance(500))]);
            let kick = queue.kick.try_clone().unwrap();
            vmm.plane.set_kick(queue.index, Some(kick)).unwrap();
            let call = Box::new(queue.call.try_clone().unwrap());
            vmm.plane.set_call(queue.index, Some(call)).unwrap();
        }
    }
}

#[test]
fn x1_x5_commands_from_many_threads_under_load_lose_nothing_and_repeat_nothing() {
    for (seed, threads, fail) in [(1, 1, 0), (2, 2, 0), (3, 4, 20)] {
        let bench = Bench::new(seed);
        bench.disk.set_faults(Faults {
            fail,
            ..Faults::default()
        });
        let mut vmm = Embedded::new(&bench.device(threads));
        let features = BLK_DISCARD | BLK_WRITE_ZEROES | CONFIG_WCE;
        let queues = (0u16..4).map(|index| {
            let format = if index < 2 { 0 } else { RING_PACKED };
            vmm.queue_with(index, 128, FEATURES | format | features)
        });
        let mut queues: Vec<GuestQueue> = queues.collect();
        let wiring: Vec<Wiring> = queues.iter().map(Wiring::of).collect();
        let vmm = Mutex::new(vmm);
        let commands = AtomicU64::new(0);
        let under_way = || commands.load(Ordering::Relaxed) < COMMANDS;
        std::thread::scope(|scope| {
            for number in 0..COMMANDERS {
                let (vmm, bench, wiring) = (&vmm, &bench, &wiring);
                let (commands, under_way) = (&commands, &under_way);
                scope.spawn(move || {
                    let mut dice = Dice::new(seed * 100 + number);
                    while under_way() {
                        let mut vmm = vmm.lock().unwrap_or_else(PoisonError::into_inner);
                        command(&mut vmm, bench, wiring, &mut dice);
                        drop(vmm);
                        commands.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_micros(dice.below(2000)));
                    }
                });
            }
            for queue in &mut queues {
                let (bench, under_way) = (&bench, &under_way);
                scope.spawn(move || {
                    while under_way() {
                        let tally = bench.load(queue, seed, COUNT);
                        assert!(fail > 0 || tally.failed == 0, "{tally:?}");
                    }
                });
            }
        });
        let vmm = vmm.into_inner().unwrap();
        bench.disk.set_faults(Faults::default());
        for queue in &mut queues {
            bench.read_all(queue);
        }
        bench.check();
        let counters = vmm.plane.counters();
        assert_eq!((counters.ring_faults, counters.bad_chains), (0, 0));
        vmm.plane.stop().unwrap();
        bench.lose_power();
    }
}
